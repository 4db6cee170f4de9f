"""`sfumato train`: a recipe or a file, with anything changed by key=value."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from sfumato.cli.show import as_json, line, say
from sfumato.errors import ConfigError

if TYPE_CHECKING:
    from sfumato.config import Config


def train(
    source: str = typer.Argument(
        ..., help="A recipe's name, a YAML file, or, with --resume, a run's folder.", metavar="RECIPE|FILE|RUN"
    ),
    overrides: list[str] | None = typer.Argument(
        None, help="Changes: key=value, e.g. data.path=pictures optim.lr=1e-3.", metavar="[KEY=VALUE]..."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on with a run, from its newest whole checkpoint."),
    run: Path | None = typer.Option(None, "--run", help="The run's folder. [default: runs/NAME]"),
    stop_after: int | None = typer.Option(
        None, "--stop-after", min=1, help="Save and stop after so many steps, to be resumed."
    ),
    print_config: bool = typer.Option(
        False, "--print-config", help="Print the whole configuration, and where each value comes from."
    ),
    json: bool = typer.Option(False, "--json", help="Print where the model is, as JSON."),
) -> None:
    """Train a model.

    sfumato train quickstart
    sfumato train quickstart data.kind=folder data.path=DIR name=mine
    sfumato train --resume runs/mine
    """
    done = trained(source, overrides or [], resume, run, stop_after, print_config, json)
    if done is None:
        return
    if json:
        as_json(done.as_dict())
    else:
        done.tell()


@dataclass(frozen=True)
class Done:
    """What was trained: the run's folder, its model, and by which configuration."""

    run: Path
    model: Path
    config: "Config"

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"run": str(self.run), "model": str(self.model)}

    def tell(self) -> None:
        """Where the model is, and what may be done with it."""
        line(self.model)
        if self.config.model is not None and self.config.model.net is None:
            say(f'next: a model in its latents, with "model.codec={{kind: latents, weights: {self.run}}}"')
            return
        judge = f"sfumato eval {self.run} --suite scenes, " if self.config.data["kind"] == "scenes" else ""
        say(f'next: sfumato sample {self.run} "a prompt", {judge}sfumato doctor {self.run}')


def trained(
    source: str,
    overrides: Sequence[str],
    resume: bool,
    run: Path | None,
    stop_after: int | None,
    print_config: bool,
    json: bool,
) -> Done | None:
    """Trains, as the command's options say; None where a configuration was printed."""
    from sfumato.overlay import load_config, recipes

    folder = Path(source)
    is_recipe = source in {recipe.name for recipe in recipes()}
    is_run = (folder / "config.yaml").is_file() and (resume or not is_recipe)  # a recipe's name means the recipe
    if is_run and not resume and not print_config:
        raise ConfigError("this run exists already", where=str(folder), fix=f"sfumato train --resume {folder}")
    if resume and not is_run and not folder.is_file() and not is_recipe:
        _no_run(folder)
    loaded = load_config(str(folder / "config.yaml") if is_run else source, overrides)
    place = run or (folder if is_run else Path("runs") / loaded.config.name)
    if print_config:
        _print(loaded, json)
        return None
    if not resume and any((place / "checkpoints").glob("step-*")):
        raise ConfigError(
            "this run exists already", where=str(place), fix=f"sfumato train --resume {place}, or name=ANOTHER"
        )
    from sfumato.train import train as begin

    model = begin(loaded.config, run=place, resume=resume, stop_after=stop_after)
    return Done(place, model, loaded.config)


def _no_run(folder: Path) -> NoReturn:
    near = sorted(
        {path.parent.as_posix() for place in (folder.parent, Path("runs")) for path in place.glob("*/config.yaml")}
    )
    raise ConfigError(
        "there is no run to resume",
        where=str(folder),
        seen="no config.yaml" if folder.is_dir() else "no folder",
        fix=", ".join(f"sfumato train --resume {one}" for one in near[-3:]) or "sfumato train quickstart",
    )


def _print(loaded: object, json: bool) -> None:
    from sfumato.overlay import Loaded, as_yaml, leaves, resolved

    assert isinstance(loaded, Loaded)
    whole = resolved(loaded.config)
    if json:
        as_json(whole)
        return
    print(as_yaml(whole), end="", flush=True)
    for key in leaves(whole):
        if key in loaded.origins:
            say(f"# {key}: {loaded.origins[key]}")
    say("# everything else: default")
