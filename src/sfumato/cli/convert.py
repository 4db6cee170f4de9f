"""`sfumato convert`: a model in another layout."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from sfumato.cli.show import as_json, line, say
from sfumato.errors import ConfigError, nearest

LAYOUTS = ("sfumato", "diffusers", "single-file")
DTYPES = ("fp32", "fp16", "bf16")


def convert(
    source: Path = typer.Argument(
        ..., help="A run, a model, a folder of diffusers, a file, or a name of the hub.", metavar="SRC"
    ),
    target: Path = typer.Argument(..., help="The folder to write, or the file; it must not exist.", metavar="DST"),
    to: str = typer.Option(..., "--to", help="sfumato; or diffusers or single-file, where the model has such a form."),
    dtype: str = typer.Option("fp32", "--dtype", help="What weights are stored as: fp32, fp16 or bf16."),
    parts: Path | None = typer.Option(
        None, "--parts", help="For a single file: a folder of diffusers with what it lacks (a tokenizer, ...)."
    ),
    trust: bool = typer.Option(False, "--trust", help="Run code that a model directory names and that is not ours."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Write a model, a ControlNet, or an autoencoder that was trained alone, in another layout. Nothing of it is lost:
    the way back gives the same bytes. What others keep in their files and no model reads is left out, and said.

    sfumato convert stable-diffusion-v1-5 models/sd15 --to sfumato
    """
    for name, given, known in (("--to", to, LAYOUTS), ("--dtype", dtype, DTYPES)):
        if given not in known:
            raise ConfigError("no such choice", where=name, seen=given, fix=nearest(given, known))
    if target.exists():
        raise ConfigError("this exists already", where=str(target), fix="choose another name, or move it away")
    from sfumato.io.controls import is_control, left_out, save_control
    from sfumato.io.directory import load_autoencoder, save_model
    from sfumato.io.families.controlnet import read_control
    from sfumato.io.models import model_folder
    from sfumato.io.published import save_file, save_published
    from sfumato.model import Trainable
    from sfumato.pipeline import DTYPES as KINDS
    from sfumato.pipeline import load

    folder = model_folder(source)
    if is_control(folder):
        control = read_control(folder)
        save_control(target, control, to, KINDS[dtype])
        left = left_out(folder) if folder.is_file() else None
        _told(target, to, dtype, control.state_dict().values(), left, json)
        return
    alone = load_autoencoder(folder) if (folder / "model.json").is_file() else None
    model: Trainable = alone or load(source, "cpu", trust=trust, parts=parts).model
    if to == "sfumato":
        save_model(target, model, model.facts, dtype=KINDS[dtype])
    elif to == "single-file":
        save_file(target, model, dtype=KINDS[dtype])
    else:
        save_published(target, model, dtype=KINDS[dtype])
    left = model.facts.get("left out") if folder.is_file() else None
    _told(target, to, dtype, model.weights().values(), left, json)


def _told(target: Path, to: str, dtype: str, weights: Iterable[Any], left: str | None, json: bool) -> None:
    count = sum(value.numel() for value in weights)
    if json:
        as_json({"path": str(target), "layout": to, "dtype": dtype, "weights": count, "left_out": left})
        return
    line(target)
    say(f"{count:,} weights as {dtype}, in the layout of {to}")
    if left:
        say(f"left out: {left}")
