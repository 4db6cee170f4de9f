"""Which students there are, where their runs lie, and how those are taught that are not there."""

import subprocess
import sys
from pathlib import Path

from sfumato import load_config
from sfumato.config import Config
from sfumato.overlay import recipes, resolved

TEACHER = Path("runs/quickstart")
# What makes a student what it is, beside whom it learns from: a run with these is one of its recipe.
TELLING = (
    *("seed", "data", "objective", "optim", "steps", "batch", "accumulate", "condition_dropout", "lora", "pairs"),
    *("ema", "sampling"),
)


def all_methods() -> list[str]:
    """The small recipes of few-step methods on scenes: students of a teacher, and those that learn from data alone."""
    found = []
    for one in recipes():
        config = load_config(one.name).config
        if config.method is not None and config.data["kind"] == "scenes":
            found.append(one.name)
    return found


def run_of(student: str) -> Path:
    """The folder of a student's run."""
    return Path("runs") / student if student in {one.name for one in recipes()} else Path(student)


def is_there(run: Path) -> bool:
    """Whether a run has a model."""
    return (run / "model" / "model.json").is_file()


def command(recipe: str, run: Path, teacher: Path, device: str) -> list[str]:
    """What teaches a student by a recipe. teacher: in place of quickstart, wherever the recipe begins with that."""
    config = load_config(recipe).config
    verb = "train" if config.teacher is None else "distill"
    key = "start" if config.teacher is None else "teacher"
    given = [f"{key}={teacher}"] if getattr(config, key) == TEACHER.as_posix() else []
    unjudged = ["--judge", "0"] if verb == "distill" else []  # it is judged here
    return [sys.executable, "-m", "sfumato", verb, recipe, *given, f"device={device}", "--run", str(run), *unjudged]


def taught(recipe: str, run: Path, teacher: Path, device: str) -> bool:
    """Teaches a student by a recipe; whether that went well."""
    return subprocess.run(command(recipe, run, teacher, device), check=False).returncode == 0


def recipe_of(run: Path) -> str | None:
    """The recipe that a run is a training of, with nothing that matters changed."""
    if not (run / "config.yaml").is_file():
        return None
    said = load_config(str(run / "config.yaml")).config
    configs = {one.name: load_config(one.name).config for one in recipes()}
    return next((name for name, config in configs.items() if told_alike(config, said)), None)


def told_alike(recipe: Config, run: Config) -> bool:
    """Whether a run's configuration teaches as a recipe does, and begins where it does, or with its teacher."""
    mine, theirs = resolved(recipe), resolved(run)
    return run.start in (recipe.start, run.teacher) and all(mine[name] == theirs[name] for name in TELLING)
