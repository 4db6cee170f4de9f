"""`sfumato data`: what is in a folder, before a run is spent on it, and what can be computed of it once."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from sfumato.cli.show import as_json, bar, line, made, say
from sfumato.errors import ConfigError, DataError

data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode="rich")
SOURCE = typer.Argument(..., help="A folder of pictures, a recipe, a YAML file, a run, or scenes.", metavar="SOURCE")
OVERRIDES = typer.Argument(
    None, help="Changes of a recipe, a file or a run, as of sfumato train.", metavar="[KEY=VALUE]..."
)
SIZE = typer.Option(None, "--size", help="The side that the pictures of a folder are fitted to. [default: 256]")
SHOWN = 20  # names of a kind of fault that people see; --json has all


@data.command()
def check(
    source: str = SOURCE,
    overrides: list[str] | None = OVERRIDES,
    size: int | None = SIZE,
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Count pictures, sizes and captions; name what cannot be read, what has no caption, what is there twice.

    sfumato data check pictures
    sfumato data check quickstart data.kind=folder data.path=pictures
    """
    from sfumato.data.check import report

    found = report(_built(_slot(source, overrides, size), forgiving=True))
    if json:
        as_json(found.as_dict())
    else:
        _tell(found)
    if not found.ok:
        faults = {"unreadable": len(found.unreadable), "without a caption": len(found.uncaptioned)}
        seen = ", ".join(f"{n} {what}" for what, n in faults.items() if n)
        raise DataError("the data has faults", where=source, seen=seen, fix="repair or remove the files named above")


@data.command()
def cache(
    source: str = typer.Argument(..., help="A recipe, a YAML file, or a run.", metavar="CONFIG"),
    overrides: list[str] | None = OVERRIDES,
    folder: Path | None = typer.Option(None, "--to", help="Where to keep it. [default: what data.cache says]"),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Compute the latents of all pictures and the states of all captions once, for every run that needs the same.

    What is there already is kept; what was interrupted goes on. Training reads it where data.cache says so.

    sfumato data cache stable-diffusion-scenes
    """
    from sfumato.overlay import load_config

    run = Path(source) / "config.yaml"
    config = load_config(str(run) if run.is_file() else source, overrides or []).config
    from sfumato.train.cache import cache_folder, fill

    chosen = folder or cache_folder(config)
    if chosen is None:
        fix = "data.cache=true, or --to FOLDER"
        raise ConfigError("this configuration says of no cache", where="data.cache", seen="nothing", fix=fix)
    found = fill(config, chosen, bar)
    if json:
        as_json(asdict(found))
        return
    line(chosen)
    for what, kept, new in (
        ("pictures", found.pictures, found.pictures_made),
        ("conditions", found.conditions, found.conditions_made),
    ):
        if kept:
            say(f"{what:<11} {kept:,}, {new:,} of them new")
    say(f"size        {found.bytes / 2**20:,.1f} MiB")


@data.command()
def preview(
    source: str = SOURCE,
    overrides: list[str] | None = OVERRIDES,
    n: int = typer.Option(24, "--n", "-n", min=1, help="How many pictures."),
    size: int | None = SIZE,
    seed: int = typer.Option(0, "--seed", help="Which pictures."),
    file: Path = typer.Option(Path("preview.png"), "--out", help="The picture to write, a PNG."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Write a contact sheet of some pictures with their captions, as training will see them."""
    from io import BytesIO

    from sfumato.data.order import indices
    from sfumato.data.sheet import sheet
    from sfumato.files import write_atomic

    if file.suffix.lower() != ".png":
        raise ConfigError("a preview is a PNG", where="--out", seen=str(file), fix=f"--out {file.stem}.png")

    def some(dataset: Any) -> Any:
        return dataset.batch(indices(0, min(n, len(dataset)), len(dataset), seed).tolist())

    slot = _slot(source, overrides, size)
    try:
        images, fields = some(_built(slot, forgiving=False))
    except DataError as error:
        images, fields = some(_built(slot, forgiving=True))  # takes longer: everything is read
        say(f"{error.what}: left out here, and named by sfumato data check {source}")
    said = [str(one.get("caption", one.get("label", ""))) for one in fields]
    drawn = BytesIO()
    sheet(list(images), said).save(drawn, "PNG")
    made(file.parent)
    write_atomic(file, drawn.getvalue())
    if json:
        as_json({"path": str(file), "captions": said})
    else:
        line(file)


def _slot(source: str, overrides: list[str] | None, size: int | None) -> dict[str, Any]:
    """The data slot that a source stands for."""
    from sfumato.overlay import load_config, recipes

    config = Path(source) / "config.yaml"
    named = {recipe.name for recipe in recipes()}
    if source in named or source.endswith((".yaml", ".yml")) or config.is_file():
        if size is not None:
            raise ConfigError(
                "a configuration has a size of its own", where="--size", seen=str(size), fix="data.size=64"
            )
        return load_config(str(config) if config.is_file() else source, overrides or []).config.source
    if overrides:
        fix = f"sfumato data check quickstart data.kind=folder data.path={source} {' '.join(overrides)}"
        raise ConfigError("only a configuration can be changed", where=source, seen=overrides[0], fix=fix)
    return (
        {"kind": "scenes"}
        if source == "scenes"
        else {"kind": "folder", "path": source, "size": 256 if size is None else size}
    )


def _built(slot: dict[str, Any], *, forgiving: bool) -> Any:
    from sfumato.catalogue import build

    if slot["kind"] != "folder":
        return build(slot, "Data")
    return build({**slot, "unreadable": "skip" if forgiving else "error"}, "Data")


def _tell(found: Any) -> None:
    many = f"{found.words:,} different words"
    lines = [
        f"pictures    {found.pictures:,}, fitted to {found.size[1]}x{found.size[0]}",
        f"captions    {found.captioned:,}" + (f", {many}, the longest: {found.longest!r}" if found.words else ""),
    ]
    if found.classes:
        more = ", ..." if len(found.classes) > SHOWN else ""
        lines.append(f"classes     {len(found.classes)}: {', '.join(found.classes[:SHOWN])}{more}")
    if found.formats:
        lines.append(f"formats     {', '.join(f'{name} ({n})' for name, n in found.formats.items())}")
        lines.append(f"file sizes  {', '.join(found.file_sizes)}")
    if found.enlarged:
        lines.append(f"enlarged    {found.enlarged:,} are smaller than the size they are fitted to")
    for text in lines:
        line(text)
    _say("unreadable  ", [f"{name}: {why}" for name, why in found.unreadable])
    _say("no caption  ", found.uncaptioned)
    _say("the same    ", [", ".join(names) for names in found.duplicates])
    if not found.captioned and not found.uncaptioned:
        say("no picture has a caption: put a picture.txt beside each, or train with model.conditioner=null")


def _say(head: str, rows: list[str]) -> None:
    for row in rows[:SHOWN]:
        say(f"{head}{row}")
    if len(rows) > SHOWN:
        say(f"{head}... and {len(rows) - SHOWN:,} more (--json names all)")
