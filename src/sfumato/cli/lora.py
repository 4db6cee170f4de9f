"""`sfumato lora`: what an adapter is, the same in another dialect, and models with adapters in them."""

from pathlib import Path
from typing import Any

import typer

from sfumato.cli.sample import scaled
from sfumato.cli.show import as_json, line, say
from sfumato.errors import ConfigError, nearest

DIALECTS = ("diffusers", "kohya", "peft")
LAYOUTS = ("sfumato", "diffusers", "single-file")
DTYPES = ("fp32", "fp16", "bf16")

lora = typer.Typer(help="Adapters: what one is, other dialects, merging.", no_args_is_help=True)
MODEL = typer.Option(None, "--model", help="The model that it is for. [default: told by names and shapes]")


@lora.command()
def inspect(
    file: Path = typer.Argument(..., help="A file, or a folder of peft.", metavar="FILE"),
    model: Path | None = MODEL,
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Say what an adapter is: its dialect, what it is for, its layers, ranks and alphas.

    sfumato lora inspect pixel-art.safetensors
    """
    found = _described(file, model)
    if json:
        as_json(found)
        return
    for name, value in found.items():
        if name != "metadata":
            line(f"{name}: {value if not isinstance(value, dict) else _inline(value)}")
    for name, value in found["metadata"].items():
        line(f"  {name}: {value if len(value) <= 100 else value[:100] + '...'}")


@lora.command()
def convert(
    source: Path = typer.Argument(..., help="A file, or a folder of peft.", metavar="SRC"),
    target: Path = typer.Argument(..., help="What to write; it must not exist.", metavar="DST"),
    to: str = typer.Option(..., "--to", help="diffusers, kohya or peft."),
    model: Path | None = MODEL,
    dtype: str = typer.Option("fp32", "--dtype", help="What weights are stored as: fp32, fp16 or bf16."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Write an adapter in another dialect.

    sfumato lora convert pixel-art.safetensors pixel-art-kohya.safetensors --to kohya
    """
    _known("--to", to, DIALECTS)
    _known("--dtype", dtype, DTYPES)
    _new(target)
    from sfumato.adapters.writing import write_adapter
    from sfumato.pipeline import DTYPES as KINDS

    adapter, parts, base = _read(source, model)
    write_adapter(target, adapter, parts, to, dtype=KINDS[dtype], base=base)
    if json:
        as_json({"path": str(target), "dialect": to, "layers": len(adapter.changes), "base": base})
        return
    line(target)
    say(f"{len(adapter.changes)} layers from {adapter.dialect}'s names to {to}'s, for {base}")


@lora.command()
def merge(
    model: Path = typer.Argument(
        ..., help="A run, a model, a folder of diffusers, a file, or a name of the hub.", metavar="MODEL"
    ),
    files: list[str] = typer.Argument(
        ..., help="Adapters, each perhaps with a scale, and what to write.", metavar="LORA[:SCALE]... DST"
    ),
    scale: float = typer.Option(1.0, "--scale", help="Of all that say none."),
    to: str = typer.Option("sfumato", "--to", help="sfumato; or diffusers or single-file, where there is such a form."),
    dtype: str = typer.Option("fp32", "--dtype", help="What weights are stored as: fp32, fp16 or bf16."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Write a model with adapters in its weights.

    sfumato lora merge models/sd15 pixel-art.safetensors:0.8 models/sd15-pixels
    """
    _known("--to", to, LAYOUTS)
    _known("--dtype", dtype, DTYPES)
    if len(files) < 2:
        raise ConfigError("an adapter and what to write are needed", where="sfumato lora merge", seen=str(files))
    target, given = Path(files[-1]), [_with_scale(one, scale) for one in files[:-1]]
    _new(target)
    from sfumato.adapters.lora import merge_into
    from sfumato.adapters.parts import parts_of
    from sfumato.adapters.reading import read_adapter
    from sfumato.io.directory import save_model
    from sfumato.io.published import save_file, save_published
    from sfumato.pipeline import DTYPES as KINDS
    from sfumato.pipeline import load

    made = load(model, "cpu").model
    parts = parts_of(made)
    merge_into(made, [(read_adapter(path, parts), each) for path, each in given])
    made.facts = {**made.facts, "loras": [{"file": Path(path).name, "scale": each} for path, each in given]}
    if to == "sfumato":
        save_model(target, made, made.facts, dtype=KINDS[dtype])
    else:
        (save_file if to == "single-file" else save_published)(target, made, dtype=KINDS[dtype])
    if json:
        as_json({"path": str(target), "layout": to, "loras": made.facts["loras"]})
        return
    line(target)
    say(f"{len(given)} adapter{'s' * (len(given) > 1)} in the weights of {model}")


def _described(file: Path, model: Path | None) -> dict[str, Any]:
    from sfumato.adapters.parts import parts_of
    from sfumato.adapters.reading import read_adapter, read_raw, recognised
    from sfumato.errors import CheckpointError
    from sfumato.pipeline import load

    raw = read_raw(file)
    base: str | None = str(model) if model else None
    try:
        adapter, found = (read_adapter(file, parts_of(load(model, "cpu").model)), None) if model else recognised(file)
        base = base or (found.name if found else None)
    except CheckpointError:
        if model:
            raise
        return {"path": str(file), "dialect": raw.dialect, "for": None, "layers": len(raw.layers)} | {
            "metadata": dict(raw.metadata)
        }
    parts: dict[str, int] = {}
    for name in adapter.changes:
        home = name.split(".")[0]
        parts[home] = parts.get(home, 0) + 1
    changes = adapter.changes.values()
    return {
        "path": str(file),
        "dialect": adapter.dialect,
        "for": base,
        "layers": len(adapter.changes),
        "parts": parts,
        "ranks": adapter.ranks,
        "alphas": sorted({one.alpha for one in changes}),
        "dora": any(one.magnitude is not None for one in changes),
        "parameters": sum(one.down.numel() + one.up.numel() for one in changes),
        "metadata": dict(adapter.metadata),
    }


def _read(file: Path, model: Path | None) -> tuple[Any, Any, str]:
    """The adapter, the parts it is for, and what they are called."""
    from sfumato.adapters.parts import parts_of
    from sfumato.adapters.reading import read_adapter, recognised
    from sfumato.pipeline import load

    if model is None:
        adapter, found = recognised(file)
        return adapter, found.parts, found.name
    parts = parts_of(load(model, "cpu").model)
    return read_adapter(file, parts), parts, model.name


def _with_scale(text: str, scale: float) -> tuple[str, float]:
    path, each = scaled(text)
    return path, each if path != text else scale


def _known(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError("no such choice", where=name, seen=given, fix=nearest(given, known))


def _new(target: Path) -> None:
    if target.exists():
        raise ConfigError("this exists already", where=str(target), fix="choose another name, or move it away")


def _inline(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
