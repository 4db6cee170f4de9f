"""`sfumato sample`: pictures from a run or a model."""

from pathlib import Path
from typing import Any

import typer

from sfumato.cli.show import as_json, bar, home, line, made, say
from sfumato.errors import ConfigError, DataError
from sfumato.hub import SCHEME


def sample(
    run: Path = typer.Argument(
        ..., help="A run, a model, a folder of diffusers, a file, or a name of the hub.", metavar="RUN|MODEL"
    ),
    prompts: list[str] | None = typer.Argument(
        None, help="What to draw. None: without a condition.", metavar="[PROMPT]..."
    ),
    n: int = typer.Option(1, "--n", "-n", min=1, help="Pictures of each prompt."),
    steps: int | None = typer.Option(None, "--steps", help="Steps of the sampler."),
    sampler: str | None = typer.Option(
        None,
        "--sampler",
        help="ddim, unipc, 'DPM++ 2M Karras', ...; tuned; a scheduler_config.json; or your own module:Name.",
    ),
    times: str | None = typer.Option(None, "--times", help="The grid of times: linear, karras, shifted, ..."),
    guidance: str | None = typer.Option(
        None, "--guidance", help="How strongly to follow the prompt; 1 is off. Or a kind: '{kind: apg, scale: 4}'."
    ),
    negative: str | None = typer.Option(None, "--negative", help="What to steer away from."),
    seed: int = typer.Option(0, "--seed", help="The first picture's seed; each next one adds 1."),
    file: Path | None = typer.Option(None, "--prompts", help="A file with a prompt on each line.", metavar="FILE"),
    grid: bool = typer.Option(False, "--grid", help="Also all pictures on one sheet."),
    condition: list[str] | None = typer.Option(
        None, "--condition", help="What else the model is told: label=3, layout=picture.png, ...", metavar="FIELD=VALUE"
    ),
    image: Path | None = typer.Option(None, "--image", help="A picture to start from."),
    strength: float | None = typer.Option(
        None,
        "--strength",
        help="How much of it may change, above 0 up to 1. [default: the model's; or 0.6, 1 with a mask]",
    ),
    mask: Path | None = typer.Option(None, "--mask", help="A picture that is white where --image may change."),
    control: list[str] | None = typer.Option(
        None, "--control", help="A ControlNet, its picture, and perhaps a scale.", metavar="MODEL:PICTURE[:SCALE]"
    ),
    size: str | None = typer.Option(None, "--size", help="HEIGHTxWIDTH, where the network can.", metavar="HxW"),
    batch: int = typer.Option(64, "--batch", min=1, help="Pictures at a time."),
    folder: Path | None = typer.Option(None, "--out", help="Where to write. [default: RUN/pictures]"),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    precision: str = typer.Option("fp32", "--precision", help="fp32, bf16 or fp16."),
    text: str | None = typer.Option(
        None, "--text", help="Options of the text encoders: '{emphasis: true, chunks: 3}'.", metavar="OPTIONS"
    ),
    text_device: str | None = typer.Option(
        None, "--text-device", help="Where text encoders work, or offload: in main memory while nothing is read."
    ),
    parts: Path | None = typer.Option(
        None, "--parts", help="For a single file: a folder of diffusers with what it lacks (a tokenizer, ...)."
    ),
    lora: list[str] | None = typer.Option(
        None, "--lora", help="An adapter and perhaps its scale; as often as there are some.", metavar="FILE[:SCALE]"
    ),
    json: bool = typer.Option(False, "--json", help="Print the paths and settings as JSON."),
) -> None:
    """Draw pictures.

    sfumato sample runs/quickstart "a red circle left of a blue square" --n 8 --steps 20
    """
    wanted: list[str | None] = [*(prompts or []), *(read_lines(file) if file else [])]
    height_width = _size(size) if size else None
    from sfumato.io.pictures import unused
    from sfumato.pipeline import load

    options = slot(text)
    if options is not None and not isinstance(options, dict):
        raise ConfigError("options are a mapping", where="--text", seen=str(text), fix="--text '{emphasis: true}'")
    pipeline = load(run, device, precision=precision, parts=parts, text=options, text_device=text_device)
    for adapter, scale in map(scaled, lora or []):
        pipeline.load_lora(adapter, scale)
    place = made(folder or home(run) / "pictures")
    told = conditions(condition or [])
    asked = [asking(prompt, told) for prompt in wanted or [None] for _ in range(n)]
    with bar("drawing") as progress:
        drawn = pipeline.sample(
            asked,
            steps=steps,
            sampler=slot(sampler),
            grid=slot(times),
            guidance=slot(guidance),
            image=image,
            strength=strength,
            mask=mask,
            control=controls(control or []),
            negative=negative,
            seeds=seed,
            size=height_width,
            batch=batch,
            progress=progress,
        )
    paths = drawn.save(place)
    sheet = None
    if grid:
        sheet = unused(place, "grid")
        drawn.grid(columns=n if n > 1 else None).save(sheet)
    if json:
        rows = [{"path": str(path), **said} for path, said in zip(paths, drawn.settings, strict=True)]
        as_json({"pictures": rows, "grid": str(sheet) if sheet else None})
        return
    for path in [*paths, *([sheet] if sheet else [])]:
        line(path)
    say(f"{len(paths)} picture{'s' * (len(paths) > 1)} in {place}")


def conditions(given: list[str]) -> dict[str, str]:
    """Raw fields from the command line. ConfigError for what is no FIELD=VALUE."""
    pairs = [one.partition("=") for one in given]
    for one, (field, sign, value) in zip(given, pairs, strict=True):
        if not (field and sign and value):
            raise ConfigError("a condition is FIELD=VALUE", where="--condition", seen=one, fix="--condition label=3")
    return {field: value for field, _, value in pairs}


def controls(given: list[str]) -> dict[str, Any] | None:
    """Controls from the command line. ConfigError for what is no MODEL:PICTURE[:SCALE]."""
    found: dict[str, Any] = {}
    for one in given:
        head = SCHEME.match(one)
        parts = one[head.end() if head else 0 :].split(":")
        scale = parts.pop() if len(parts) > 2 else "1"
        try:
            model, picture = parts
            model = one[: head.end()] + model if head else model
            found[model] = {"image": picture, "scale": float(scale)}
        except ValueError:
            what, fix = "a control is MODEL:PICTURE[:SCALE]", "--control canny:edges.png:0.8"
            raise ConfigError(what, where="--control", seen=one, fix=fix) from None
        if not (model and picture):
            raise ConfigError("a control has a model and a picture", where="--control", seen=one)
    return found or None


def asking(prompt: str | None, told: dict[str, str]) -> Any:
    """What a pipeline is asked for: a prompt alone, or raw fields with it."""
    return prompt if not told else {**({} if prompt is None else {"caption": prompt}), **told}


def scaled(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE; a scale of 1 is what was trained."""
    path, colon, number = text.rpartition(":")
    try:
        return (path, float(number)) if colon else (text, 1.0)
    except ValueError:  # a colon of the path itself
        return text, 1.0


def slot(text: str | None) -> Any:
    """An option that is a number, a name, a mapping with `kind`, as in a configuration, or a file of JSON with one."""
    from sfumato.overlay import parse_yaml

    if text is None:
        return None
    if not text.endswith(".json"):
        return parse_yaml(text, "the command line")
    try:
        return parse_yaml(Path(text).read_text(encoding="utf-8"), text)
    except (OSError, UnicodeDecodeError) as error:
        fix = "a scheduler_config.json"
        raise ConfigError("this file cannot be read", where=text, seen=str(error), fix=fix) from None


def read_lines(file: Path) -> list[str]:
    """The lines of a file of prompts; DataError where there are none, or it is no text."""
    try:
        lines = [text.strip() for text in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise DataError(
            "the file of prompts cannot be read", where=str(file), seen=error.strerror, fix="one prompt on each line"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            "the file of prompts is not text", where=str(file), seen=str(error), fix="save it as UTF-8"
        ) from None
    found = [text for text in lines if text and not text.startswith("#")]
    if not found:
        raise DataError("the file holds no prompts", where=str(file), fix="one prompt on each line")
    return found


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ConfigError("a size is HEIGHTxWIDTH", where="--size", seen=text, fix="--size 32x48")
    return int(height), int(width)
