"""`sfumato data`: what is in a folder, before a run is spent on it."""

from pathlib import Path
from typing import Any

import typer

from sfumato.cli.show import as_json, out, say
from sfumato.errors import DataError

data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode="rich")
SOURCE = typer.Argument(..., help="A folder of pictures, a recipe, a YAML file, or scenes.", metavar="SOURCE")


@data.command()
def check(
    source: str = SOURCE,
    size: int = typer.Option(256, "--size", help="The side that pictures are fitted to (for a folder)."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Count pictures, sizes and captions; name what cannot be read, what has no caption, what is there twice."""
    from sfumato.data.check import report

    found = report(_opened(source, size, forgiving=True))
    if json:
        as_json(found.as_dict())
    else:
        _tell(found)
    if not found.ok:
        faults = f"{len(found.unreadable)} unreadable, {len(found.uncaptioned)} without a caption"
        raise DataError("the data has faults", where=source, seen=faults, fix="repair or remove the files named above")


@data.command()
def preview(
    source: str = SOURCE,
    n: int = typer.Option(24, "--n", "-n", min=1, help="How many pictures."),
    size: int = typer.Option(256, "--size", help="The side that pictures are fitted to (for a folder)."),
    seed: int = typer.Option(0, "--seed", help="Which pictures."),
    file: Path = typer.Option(Path("preview.png"), "--out", help="The picture to write."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Write a contact sheet of some pictures with their captions, as training will see them."""
    from sfumato.data.order import indices
    from sfumato.data.sheet import sheet

    dataset = _opened(source, size, forgiving=True)
    shown = indices(0, min(n, len(dataset)), len(dataset), seed).tolist()
    images, fields = dataset.batch(shown)
    said = [str(one.get("caption", one.get("label", ""))) for one in fields]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(images), said).save(file)
    if json:
        as_json({"path": str(file), "captions": said})
    else:
        out.print(str(file), markup=False, soft_wrap=True)


def _opened(source: str, size: int, *, forgiving: bool) -> Any:
    from sfumato.catalogue import build
    from sfumato.overlay import load_config, recipes

    named = {recipe.name for recipe in recipes()}
    if source == "scenes":
        return build({"kind": "scenes"}, "Data")
    if source in named or source.endswith((".yaml", ".yml")):
        return build(load_config(source).config.data, "Data")
    unreadable = "skip" if forgiving else "error"
    return build({"kind": "folder", "path": source, "size": size, "unreadable": unreadable}, "Data")


def _tell(found: Any) -> None:
    lines = [
        f"pictures    {found.pictures:,}, fitted to {found.size[1]}x{found.size[0]}",
        f"captions    {found.captioned:,}, {found.words:,} different words, the longest: {found.longest!r}",
    ]
    if found.classes:
        lines.append(f"classes     {len(found.classes)}: {', '.join(found.classes[:12])}")
    if found.formats:
        lines.append(f"formats     {', '.join(f'{name} ({n})' for name, n in found.formats.items())}")
        lines.append(f"file sizes  {', '.join(found.file_sizes)}")
    if found.enlarged:
        lines.append(f"enlarged    {found.enlarged:,} are smaller than the size they are fitted to")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    for name, why in found.unreadable:
        say(f"unreadable  {name}: {why}")
    for name in found.uncaptioned[:20]:
        say(f"no caption  {name}")
    for names in found.duplicates[:20]:
        say(f"the same    {', '.join(names)}")
