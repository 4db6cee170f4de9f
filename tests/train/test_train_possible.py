"""Which method can be taught by whom, and to whom: the table of methods against what really happens."""

from pathlib import Path

import pytest
from runs import rows_of

from sfumato.catalogue import METHODS, OBJECTIVES, build
from sfumato.config import Config
from sfumato.errors import ConfigError
from sfumato.io.directory import load_model
from sfumato.objectives.teaching import Follows, Judges, Suits, Tells
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.registry import options_of
from sfumato.train import train

NEEDED = {"adversarial": {"heads": {"kind": "features"}}}  # options that have no default
FEW = {"pairs": {"count": 8, "steps": 2}}
SAMPLED = {"sampler": "ddim", "grid": "linear", "steps": 2, "guidance": 1}
SAID = "says nothing of the data where the method begins"

methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a step: of a velocity, of noise, and of a student that says endpoints alone."""
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("models")
    train(small("steps=1"), run=folder / "velocity")
    train(small("steps=1", "model.prediction=eps"), run=folder / "noise")
    ends = (f"teacher={folder / 'velocity'}", "objective={kind: latent_consistency, points: 8}", "steps=1")
    train(small(*ends), run=folder / "ends")
    train(small("steps=1", "model.answers=[x0, x0_variance]", "objective=hybrid"), run=folder / "variance")
    return {one: folder / one for one in ("velocity", "noise", "ends", "variance")}


def configured(method: str, model: Path, place: Path, *overrides: str) -> Config:
    """One step of a method, from a model: its teacher where it can have one."""
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="student", model=None, steps=1)
    objective = {"kind": method, **NEEDED.get(method, {})}
    raw |= {"objective": objective, "sampling": SAMPLED, "condition_dropout": 0.0}
    raw |= {"start": str(model)} if METHODS[method].teacher == "none" else {"teacher": str(model)}
    raw |= FEW if METHODS[method].pairs else {}
    file = place / "student.yaml"
    file.write_text(as_yaml(raw))
    return load_config(str(file), overrides).config


def learns(config: Config, run: Path) -> None:
    train(config, run=run)
    assert [row["step"] for row in rows_of(run)] == [1]  # whose loss was finite, or it was skipped
    assert rows_of(run)[0]["skipped"] == 0


def refused(config: Config, run: Path, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        train(config, run=run)
    assert error.value.fix and not run.exists()


@methods
def test_teachers_that_predict_noise(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """On a path that ends in pure noise, where noise tells nothing of the picture."""
    gridded = "grid" in build_options(method)
    more = ["objective.grid=linear"] if gridded else []
    config = configured(method, models["noise"], tmp_path, *more)
    if not METHODS[method].begins:
        learns(config, tmp_path / "run")
        return
    refused(config, tmp_path / "run", SAID)
    grid = "pairs.grid" if METHODS[method].pairs else "objective.grid"
    begins = (
        f"{grid}={{kind: linear, start: 0.99}}" if gridded or grid != "objective.grid" else "objective.at=[0.99, 0.7]"
    )
    if method != "shortcut":  # whose jumps begin where sampling may
        learns(configured(method, models["noise"], tmp_path, begins), tmp_path / "run")


@methods
def test_low_rank_students(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    config = configured(method, models["velocity"], tmp_path, "lora.rank=2")
    if METHODS[method].told:
        refused(config, tmp_path / "run", "no layers for a number that is told")
    else:
        learns(config, tmp_path / "run")
    if METHODS[method].scales:
        told = configured(method, models["velocity"], tmp_path, "lora.rank=2", "objective.scales=[1, 4]")
        refused(told, tmp_path / "told", "no layers for a number that is told")


@methods
def test_teachers_that_say_ends_alone(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A method without a teacher goes on from such a model; to others it has nothing to say."""
    config = configured(method, models["ends"], tmp_path)
    if METHODS[method].teacher == "none":
        learns(config, tmp_path / "run")
    else:
        refused(config, tmp_path / "run", r"asked for E\[x0 \| x_t\]")


@methods
def test_every_line_is_what_its_objective_does(method: str) -> None:
    line, objective = METHODS[method], build({"kind": method, **NEEDED.get(method, {})}, "Objective")
    assert (tuple(objective.told) if isinstance(objective, Tells) else ()) == line.told
    assert isinstance(objective, Follows) == bool(line.slow) and isinstance(objective, Judges) == bool(line.critic)
    options = build_options(method)
    assert ("scales" in options) == line.scales
    assert {"": set(), "optional": {"heads", "head"}, "needed": {"heads"}}[line.features] >= options & {"heads", "head"}
    assert bool(line.features) == bool(options & {"heads", "head"})
    assert isinstance(objective, Suits) or not line.begins


def build_options(method: str) -> set[str]:
    return set(options_of(OBJECTIVES[method]) or {})


@pytest.mark.parametrize(
    ("method", "model", "more", "why"),
    [
        ("meanflow", "velocity", ["objective.guidance=2"], "a teacher has guidance of its own"),
        ("meanflow", "velocity", ["teacher=null", "start={velocity}", "objective.means=teacher"], "no teacher whose"),
        ("latent_consistency", "velocity", ["objective.boundary=10"], "counts the indices of a table of betas"),
        ("progressive", "velocity", ["objective.grid=karras"], "half of this grid's times"),
        ("guidance", "velocity", ["teacher_guidance={kind: skip_layers, blocks: [9]}"], "no such block"),
        ("guidance", "velocity", ["teacher_guidance=cfg_plus_plus"], "no grid"),
        ("adversarial", "velocity", ["objective.heads.blocks=[9]"], "no such block"),
        ("guidance", "variance", [], "a student learns no variance"),
    ],
)
def test_what_options_make_impossible(
    method: str, model: str, more: list[str], why: str, models: dict[str, Path], tmp_path: Path
) -> None:
    said = [one.format(**models) if one.startswith("start=") else one for one in more]
    refused(configured(method, models[model], tmp_path, *said), tmp_path / "run", why)


def test_a_teacher_sees_what_its_student_sees(models: dict[str, Path], tmp_path: Path) -> None:
    from tests.train.conftest import small

    latents = "model.codec={kind: latents, channels: [8, 8], blocks: 1, groups: 4, latent: 4}"
    config = small(f"teacher={models['velocity']}", "objective=guidance", latents, "steps=1")
    refused(config, tmp_path / "run", "sees pictures as its student does")


def test_a_teacher_is_read_once(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.train import loop, teaching

    read: list[str] = []

    def noting(path: str) -> object:
        read.append(path)
        return load_model(Path(path) / "model").eval().requires_grad_(False)

    for one in (loop, teaching):
        monkeypatch.setattr(one, "read_teacher", noting)
    learns(configured("guidance", models["velocity"], tmp_path), tmp_path / "run")
    assert read == [str(models["velocity"])]


def test_the_guide_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs/guides/few-steps.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells[2:] for row in text.splitlines() if len(cells := row.split("|")) == 7}
    assert METHODS.keys() <= rows.keys()
    for name, line in METHODS.items():
        teacher, prediction, low_rank, beside = (cell.strip() for cell in rows[name][:4])
        assert teacher == line.teacher
        assert prediction == ("where noise tells something" if line.begins else "any")
        assert low_rank == ("no" if line.told else "unless `scales` are told" if line.scales else "yes")
        facts = {"slow copy": bool(line.slow), "critic": bool(line.critic), "derivative": line.derivative}
        facts |= {"features": line.features == "needed", "pairs": line.pairs, "low-rank": line.slow == "spared"}
        said = {word: word in beside for word in facts}
        assert said == (facts if not line.told else facts | {"low-rank": False}), name
