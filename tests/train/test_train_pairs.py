"""Pairs: made once, the same whenever they are made, kept by all that they depend on; and runs that learn from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import bytes_of, damage, kept, rows_of, stopped

from sfumato.config import Config
from sfumato.data.pairs import Paired, PairStore
from sfumato.data.scenes import Scenes
from sfumato.errors import ConfigError, Interrupted
from sfumato.grids import fitted
from sfumato.guidance import CFG, Unguided, given, guided
from sfumato.overlay import load_config
from sfumato.pipeline import load
from sfumato.samplers import drive
from sfumato.samplers.adams_moulton import exp_abm
from sfumato.samplers.ddim import ddim
from sfumato.train import pairs as making
from sfumato.train import train
from sfumato.train.keys import generator

Small = Callable[..., Config]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = str(Path(__file__).parent / "small.yaml")

    run = tmp_path_factory.mktemp("teacher") / "run"
    train(load_config(small, ["steps=4", "checkpoint.every=4"]).config, run=run)
    return run


@pytest.fixture
def reflow(teacher: Path, small: Small) -> Small:
    """The configuration of a student with 20 pairs, made 8 at a time."""

    def made(*more: str) -> Config:
        return small(
            "model=null",
            f"teacher={teacher}",
            "objective={kind: reflow}",
            "condition_dropout=0",
            "pairs={count: 20, steps: 3, batch: 4}",
            "steps=4",
            "checkpoint.every=2",
            "validate={every: 2, batches: 1, holdout: 4}",
            "sampling={sampler: ddim, grid: linear, steps: 2, guidance: 1.0}",
            *more,
        )

    return made


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairStore, "most", 8)


def store_of(run: Path) -> Path:
    (found,) = (run / "pairs" / "pairs").iterdir()
    return found


def test_a_student_learns_from_pairs(tmp_path: Path, reflow: Small) -> None:
    run = tmp_path / "run"
    train(reflow(), run=run)
    rows = [row for row in rows_of(run) if "loss" in row]
    assert len(rows) == 4 and all(row["velocity"] > 0 for row in rows)
    assert any("validation" in row for row in rows_of(run))
    said = (run / "log.txt").read_text()
    assert "making 20 pairs" in said and "pairs 20 of 20" in said
    drawn = load(run, "cpu").sample("a red circle")
    assert drawn.images.shape == (1, 32, 32, 3) and drawn.settings[0]["steps"] == 2
    assert load(run, "cpu").model.facts["method"] == "reflow"


def test_pairs_are_the_ends_of_the_teachers_flow(tmp_path: Path, teacher: Path, reflow: Small) -> None:
    """Noise by (seed, number), conditions of the data in their order, the teacher's guidance and solver."""
    run = tmp_path / "run"
    train(reflow("steps=1"), run=run)
    found = np.concatenate([np.load(store_of(run) / f"{i:06d}" / "moments.npy") for i in range(3)])
    assert found.shape == (20, 2, 3, 32, 32) and found.dtype == np.float32
    noise = torch.stack([torch.randn(3, 32, 32, generator=generator(0, "pair", k)) for k in range(20)])
    assert np.array_equal(found[:, 1], noise.numpy())
    model = load(teacher, "cpu").model
    fields = Paired(Scenes(size=32, seed=1, count=200), 20, 0).fields(range(4, 8))
    with torch.no_grad():
        cond, null = model.cond(fields), model.cond([{}] * 4)
        denoise = guided(model, model.denoiser.path, given(CFG(scale=3.0), cond, lambda: null))
        path = model.denoiser.path
        ends = drive(exp_abm(path, noise[4:8], fitted(path, 3, pixels=32 * 32)), denoise)
    torch.testing.assert_close(torch.from_numpy(found[4:8, 0]), ends, rtol=1e-4, atol=1e-4)


def test_the_fields_are_those_of_the_data_in_its_order() -> None:
    data = Scenes(size=32, seed=1, count=7)
    pairs = Paired(data, 20, 3)
    captions = [str(one["caption"]) for one in pairs.fields(range(20))]
    own = sorted(str(one["caption"]) for one in data.batch(range(7))[1])
    assert sorted(captions[:7]) == own == sorted(captions[7:14]) and captions[:7] != captions[7:14]
    assert len(pairs) == 20 and pairs.shape == (32, 32)
    images, fields = pairs.batch([5, 9])
    assert [one["caption"] for one in fields] == [captions[5], captions[9]]
    assert np.array_equal(pairs[9].image, images[1])


def test_who_is_stopped_goes_on_and_makes_the_same(
    tmp_path: Path, reflow: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(reflow(), run=whole)
    made: list[int] = []
    usual = PairStore.write

    def counted(store: PairStore, shard: int, moments: object) -> None:
        made.append(shard)
        usual(store, shard, moments)  # type: ignore[arg-type]

    monkeypatch.setattr(PairStore, "write", counted)
    with monkeypatch.context() as patched:

        def killed(*args: object) -> object:
            if len(made) == 2:
                raise KeyboardInterrupt
            return usual_end(*args)  # type: ignore[arg-type]

        usual_end = making.flow_end
        patched.setattr(making, "flow_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train(reflow(), run=parts)
    assert made == [0, 1] and not (parts / "checkpoints").exists()
    train(reflow(), run=parts)
    assert made == [0, 1, 2]
    ours = {name: data for name, data in kept(parts).items() if "pairs" in name and "manifest" not in name}
    assert ours == {name: data for name, data in kept(whole).items() if "pairs" in name and "manifest" not in name}
    assert bytes_of(parts / "model") == bytes_of(whole / "model")


def test_asked_to_stop_it_stops_after_a_part(tmp_path: Path, reflow: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def asked():  # type: ignore[no-untyped-def]
        yield lambda: True

    monkeypatch.setattr("sfumato.train.loop._stop_signal", asked)
    for done in ("1 of 3", "2 of 3"):
        with pytest.raises(Interrupted, match="pairs so far are kept") as told:
            train(reflow(), run=tmp_path / "run")
        assert told.value.where == f"{done} parts"


def test_a_run_that_goes_on_reads_the_same_pairs(tmp_path: Path, reflow: Small) -> None:
    straight, bent = tmp_path / "straight", tmp_path / "bent"
    train(reflow(), run=straight)
    stopped(reflow(), bent, 2)
    damage(store_of(bent) / "000001" / "moments.npy", "flip")  # which is found, and made anew
    train(load_config(str(bent / "config.yaml")).config, run=bent, resume=True)
    assert bytes_of(bent / "model") == bytes_of(straight / "model")


def test_pairs_are_named_by_what_they_depend_on(tmp_path: Path, teacher: Path, reflow: Small) -> None:
    shared = tmp_path / "shared"
    more = (f"pairs.folder={shared}", "steps=1")
    train(reflow(*more), run=tmp_path / "a")
    train(reflow(*more, "optim.lr=1e-4"), run=tmp_path / "b")
    assert len(list((shared / "pairs").iterdir())) == 1 and not (tmp_path / "a" / "pairs").exists()
    for i, change in enumerate(("teacher_guidance=2", "seed=5", "pairs.steps=4", "pairs.sampler=ddim", "data.seed=2")):
        train(reflow(*more, change), run=tmp_path / f"c{i}")
        assert len(list((shared / "pairs").iterdir())) == 2 + i, change
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    train(reflow(*more, f"teacher={other}"), run=tmp_path / "d")
    assert len(list((shared / "pairs").iterdir())) == 6  # the same weights elsewhere are the same teacher


@pytest.mark.parametrize("kind", ["skip_layers", "perturbed_attention", "cfg_plus_plus", "autoguidance"])
def test_pairs_are_drawn_under_any_guidance(tmp_path: Path, teacher: Path, reflow: Small, kind: str) -> None:
    """What a pipeline draws from the same noise; a flow has a grid, so that guidance may look ahead on it."""
    slot = {"kind": kind} | ({"model": str(teacher)} if kind == "autoguidance" else {})
    run = tmp_path / "run"
    train(
        reflow(f"teacher_guidance={json.dumps(slot)}", "pairs={count: 20, steps: 3, sampler: ddim}", "steps=1"), run=run
    )
    ends = torch.from_numpy(np.load(store_of(run) / "000000" / "moments.npy")[:4, 0])
    noise = torch.stack([torch.randn(3, 32, 32, generator=generator(0, "pair", k)) for k in range(4)])
    fields, pipe = Paired(Scenes(size=32, seed=1, count=200), 20, 0).fields(range(4)), load(teacher, "cpu")
    raw = [str(one["caption"]) for one in fields]
    path = pipe.model.denoiser.path
    times = fitted(path, 3, pixels=32 * 32)
    guide = pipe.guide(pipe.order(raw, 0, None, None, {"guidance": slot}))
    with torch.no_grad():
        denoise = guided(pipe.forwards.own, path, guide, times, pipe.forwards.variant)
        torch.testing.assert_close(ends, drive(ddim(path, noise, times), denoise), rtol=0, atol=2e-6)
        alone = guided(pipe.forwards.own, path, Unguided(guide.branches(path, 0.5)[0].cond))
        plain = drive(ddim(path, noise, times), alone)
    assert bool((ends - plain).abs().max() > 1e-4) == (kind != "autoguidance")  # which here is by itself, no weaker one


def test_pairs_are_named_by_a_weaker_models_weights_too(tmp_path: Path, small: Small, reflow: Small) -> None:
    weak, shared = tmp_path / "weak", tmp_path / "shared"
    slot = f"teacher_guidance={{kind: autoguidance, model: {weak}}}"
    for i, steps in enumerate((1, 2)):
        train(small(f"steps={steps}"), run=weak)
        for name in ("run", "again"):
            train(reflow(f"pairs.folder={shared}", "steps=1", slot), run=tmp_path / f"{name}{i}")
        assert len(list((shared / "pairs").iterdir())) == i + 1
        shutil.rmtree(weak)


def test_what_was_rectified_teaches_again(tmp_path: Path, reflow: Small) -> None:
    train(reflow("steps=1"), run=tmp_path / "first")
    train(
        reflow("steps=1", f"teacher={tmp_path / 'first'}", "objective={kind: reflow, steps: 1}", "pairs.sampler=euler"),
        run=tmp_path / "second",
    )
    assert load(tmp_path / "second", "cpu").sample("a red circle", steps=1).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "model", ["model.path=variance_preserving model.prediction=v", "model.path=variance_exploding model.prediction=edm"]
)
def test_a_teacher_on_another_path(tmp_path: Path, small: Small, reflow: Small, model: str) -> None:
    """Its student stays on that path, and learns straight lines there."""
    train(small("steps=2", *model.split()), run=tmp_path / "other")
    train(reflow(f"teacher={tmp_path / 'other'}"), run=tmp_path / "run")
    rows = [row["velocity"] for row in rows_of(tmp_path / "run") if "velocity" in row]
    assert len(rows) == 4 and all(0 < row < 1 for row in rows)
    student, other = (load(tmp_path / name, "cpu") for name in ("run", "other"))
    assert student.model.denoiser.path == other.model.denoiser.path
    drawn = student.sample("a red circle", steps=2)
    assert drawn.images.shape == (1, 32, 32, 3)


def test_what_is_no_flow(tmp_path: Path, reflow: Small, small: Small) -> None:
    with pytest.raises(ConfigError, match="draws noise"):
        train(reflow("pairs.sampler=euler_ancestral"), run=tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing that the objective denoising learns from"):
        small("pairs.count=8")
    with pytest.raises(ConfigError, match="needed by the objective reflow"):
        small("objective={kind: reflow}")
