"""The schema of a run: every key checked, every slot open to one's own, and what is written loads again."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image as Pillow
from pydantic import BaseModel

from sfumato import config as module
from sfumato.catalogue import KINDS, build
from sfumato.config import FILLED_IN, Config
from sfumato.errors import ConfigError
from sfumato.overlay import as_yaml, from_resolved, load_config, parse_yaml, recipes, resolved
from sfumato.problems import SLOTS, dig, slot_problems

LEAST: dict[str, Any] = {"name": "a", "steps": 1, "data": "scenes", "model": {"net": "dit"}}


def fault(**changes: Any) -> str:
    """What is said of the least configuration with these changes."""
    with pytest.raises(ConfigError) as caught:
        from_resolved(LEAST | changes, "here")
    return str(caught.value)


def fields(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema with its annotation, sections entered."""
    for name, field in model.model_fields.items():
        where = f"{above}{field.alias or name}"
        inner = next(
            (
                one
                for one in (field.annotation, *get_args(field.annotation))
                if inspect.isclass(one) and issubclass(one, BaseModel)
            ),
            None,
        )
        yield where, field
        if inner is not None:
            yield from fields(inner, f"{where}.")


def test_little_is_enough() -> None:
    config = from_resolved(LEAST, "here")
    assert (config.batch, config.precision, config.optim.lr) == (32, "fp32", 1e-3)
    assert config.data == {"kind": "scenes"}


def test_every_slot_of_the_schema_is_checked_and_of_a_known_kind() -> None:
    in_schema = {where for where, field in fields(Config) if "BeforeValidator(func=<function _slot" in repr(field)}
    in_schema |= {
        where for where, field in fields(Config) if any("_slot" in repr(one) for one in get_args(field.annotation))
    }
    assert in_schema == {where for where in SLOTS if not where.startswith("objective.")}
    assert set(SLOTS.values()) <= set(KINDS)


def test_every_section_forbids_what_it_does_not_know() -> None:
    sections = [one for one in vars(module).values() if inspect.isclass(one) and issubclass(one, BaseModel)]
    assert len(sections) >= 10
    assert all(one.model_config.get("extra") == "forbid" for one in sections if one.__module__ == module.__name__)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_a_resolved_recipe_loads_again_to_the_same(recipe: Any) -> None:
    config = load_config(recipe.name).config
    text = as_yaml(resolved(config))
    assert from_resolved(parse_yaml(text, "again"), "again") == config
    assert resolved(config)["validate"]["holdout"] == config.validate_.holdout


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "off"},
        {"name": "2024-01-01"},
        {"name": "1e3"},
        {"guard": {"spikes": "off"}},
        {"sampling": {"interval": [0.2, None]}},
        {"optim": {"lr": 1e-7}},
    ],
)
def test_awkward_values_survive_being_written(changes: dict[str, Any]) -> None:
    config = from_resolved(LEAST | changes, "here")
    assert from_resolved(parse_yaml(as_yaml(resolved(config)), "again"), "again") == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps should be at least 1 (seen: 0)"),
        ({"steps": 2.5}, "steps should be a whole number (seen: 2.5)"),
        ({"steps": "many"}, "steps should be a whole number (seen: 'many')"),
        ({"batch": True and "1.5"}, "batch should be a whole number"),
        ({"optim": {"lr": 0}}, "optim.lr should be more than 0"),
        ({"optim": {"lr": float("inf")}}, "optim.lr should be a finite number"),
        ({"optim": {"lr": float("nan")}}, "optim.lr should be"),
        ({"optim": {"decay": "fast"}}, "optim.decay should be one of 'none', 'linear' or 'cosine' (seen: 'fast')"),
        ({"optim": 3}, "optim should be a mapping of names to values"),
        ({"optim": {"options": {"betaz": 1}}}, "optim.options.betaz is no option of adamw"),
        ({"optim": {"kind": "adamm"}}, "optim.kind is not known"),
        ({"ema": []}, "ema should not be empty"),
        ({"ema": [{"decay": 1}]}, "ema.0.decay should be less than 1"),
        ({"ema": [{"decya": 1}]}, "ema.0.decya is no key of the configuration (seen: 1)\n      try: decay"),
        ({"condition_dropout": 1.5}, "condition_dropout should be at most 1"),
        ({"compile": "perhaps"}, "compile should be true or false"),
        ({"samples": {"prompts": "a circle"}}, "samples.prompts should be a list"),
        ({"samples": {"prompts": [3]}}, "samples.prompts.0 should be text"),
        ({"sampling": {"interval": [5, 1]}}, "sampling.interval should go from a lower to a higher noise level"),
        ({"sampling": {"interval": [-1, None]}}, "sampling.interval.0 should be at least 0"),
        ({"data": None}, "data should be a name, or a mapping with kind and options"),
        ({"data": {"size": 32}}, "data names something to use, alone or as `kind` with options"),
        ({"data": {"kind": "folder"}}, "data.path is needed by folder"),
        ({"model": {}}, "model.net is missing"),
        ({"model": {"net": "dit", "path": "lineal"}}, "model.path is not known (seen: lineal)\n      try: linear"),
        ({"model": {"net": "nothing_here:Net"}}, "model.net cannot be found from here"),
        (
            {"objective": {"kind": "denoising", "times": {"kind": "uniform", "low": "a"}}},
            "objective.times.low should be float",
        ),
        ({"name": "a/b"}, "name should be letters, digits, spaces, dots and dashes, and no path"),
        ({"name": "../up"}, "name should be letters"),
        ({"name": ".hidden"}, "name should be letters"),
        ({"name": ""}, "name should be letters"),
        ({"tsep": 3}, "tsep is no key of the configuration (seen: 3)\n      try: steps"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in fault(**changes)


def test_what_can_be_meant_is_taken() -> None:
    config = from_resolved(LEAST | {"name": 7, "steps": 1000.0, "batch": "16", "optim": {"clip": None}}, "here")
    assert (config.name, config.steps, config.batch, config.optim.clip) == ("7", 1000, 16, None)
    assert from_resolved(LEAST | {"name": "Über-lauf 2.b"}, "here").name == "Über-lauf 2.b"
    assert from_resolved({**LEAST, "model": {"net": "dit", "conditioner": None}}, "here").model.conditioner is None


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        from_resolved(LEAST, "here").steps = 3  # type: ignore[misc]


def test_slots_are_looked_at_without_a_whole_configuration() -> None:
    raw = {"sampling": {"sampler": "ddmi"}, "model": {"net": {"kind": "dit", "dimm": 3}}}
    found = {problem.where: problem.fix for problem in slot_problems(raw)}
    assert set(found) == {"sampling.sampler", "model.net.dimm"}
    assert found["sampling.sampler"].startswith(("ddim", "ddpm")) and found["model.net.dimm"].startswith("dim")


def test_a_key_that_is_no_text_is_named() -> None:
    """YAML reads `null:` as a key that is nothing."""
    with pytest.raises(ConfigError, match=r"(?s)model\.net\.None.*no option of dit"):
        load_config("tiny", ["model.net={kind: dit, null: 3}"])


def test_a_value_is_dug_out() -> None:
    assert dig({"a": {"b": 3}}, "a.b") == 3
    assert dig({"a": 3}, "a.b") is dig({}, "a") is None


def test_what_a_network_is_told_is_what_networks_have() -> None:
    from sfumato.registry import options_of

    for kind in ("unet", "dit"):
        assert set(FILLED_IN) <= set(options_of(KINDS["Net"][kind]) or {})


OWN = '''
"""Somebody's own version of everything that is pluggable."""
from dataclasses import dataclass

import torch

import sfumato.codecs, sfumato.prompts, sfumato.data.folder, sfumato.denoiser, sfumato.nets.dit, sfumato.paths
import sfumato.predictions, sfumato.times, sfumato.train.optim
from sfumato.objectives.denoising import Denoising
from sfumato.objectives.couplings import Independent
from sfumato.objectives.weights import Flat

used = []


class Data(sfumato.data.folder.Folder):
    def batch(self, indices):
        used.append("data")
        return super().batch(indices)


class Path(sfumato.paths.Linear):
    def alpha(self, t):
        used.append("path")
        return super().alpha(t)


MINE = sfumato.predictions.VELOCITY


def time_input(path, t):
    used.append("time_input")
    return sfumato.denoiser.as_thousandths(path, t)


def scale_input(path, t):
    used.append("scale_input")
    return torch.ones_like(torch.as_tensor(t))


class Net(sfumato.nets.dit.DiT):
    def __init__(self, config: sfumato.nets.dit.DiTConfig) -> None:
        used.append("net")
        super().__init__(config)


class Codec(sfumato.codecs.Pixels):
    def encode(self, images):
        used.append("codec")
        return super().encode(images)


class Conditioner(sfumato.prompts.Prompts):
    def forward(self, raw):
        used.append("conditioner")
        return super().forward(raw)


class Objective(Denoising):
    def __call__(self, model, x0, cond, rng):
        used.append("objective")
        return super().__call__(model, x0, cond, rng)


class Density(sfumato.times.Uniform):
    def __call__(self, *args, **kwargs):
        used.append("density")
        return super().__call__(*args, **kwargs)


class Coupling(Independent):
    def __call__(self, *args, **kwargs):
        used.append("coupling")
        return super().__call__(*args, **kwargs)


class Weight(Flat):
    def __call__(self, *args, **kwargs):
        used.append("weight")
        return super().__call__(*args, **kwargs)


def sampler(path, x, times):
    from sfumato.samplers import ddim

    used.append("sampler")
    return ddim.ddim(path, x, times)


def grid(path, steps):
    used.append("grid")
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def optimizer(model, lr, *, weight_decay: float = 0.0):
    used.append("optimizer")
    return sfumato.train.optim.adamw(model, lr, weight_decay=weight_decay)
'''


def test_every_slot_takes_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with nothing of ours in any slot: it trains, saves, loads and draws."""
    (tmp_path / "all_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "all_mine", raising=False)
    for i in range(4):
        Pillow.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red square")
    own = {
        "data": "{kind: 'all_mine:Data', path: ., size: 32}",
        "model.path": "all_mine:Path",
        "model.prediction": "all_mine:MINE",
        "model.time_input": "all_mine:time_input",
        "model.scale_input": "all_mine:scale_input",
        "model.net": "{kind: 'all_mine:Net', patch: 16, dim: 8, depth: 1, heads: 1}",
        "model.codec": "all_mine:Codec",
        "model.conditioner": "{kind: 'all_mine:Conditioner', dim: 8, heads: 1, depth: 1}",
        "objective": "{kind: 'all_mine:Objective'}",
        "objective.times": "all_mine:Density",
        "objective.weight": "all_mine:Weight",
        "objective.space": "all_mine:MINE",
        "objective.coupling": "all_mine:Coupling",
        "sampling.sampler": "all_mine:sampler",
        "sampling.grid": "all_mine:grid",
    }
    of_autoencoders = {"objective.distance", "objective.discriminator"}  # see tests/train/test_train_autoencoder.py
    of_students = {"teacher_guidance", "objective.grid", "objective.solver", "objective.fake_times", "objective.heads"}
    of_students |= {"objective.scored"}
    of_students |= {"pairs.sampler", "pairs.grid"}  # see tests/train/test_train_pairs.py
    assert set(own) == set(SLOTS) - of_autoencoders - of_students - {"sampling.guidance"}
    rest = [
        "optim.kind=all_mine:optimizer",
        "optim.options={weight_decay: 0.1}",
        "name=own",
        "steps=2",
        "batch=2",
        "validate.holdout=0",
        "samples.every=0",
    ]
    config = load_config("tiny", [f"{key}={value}" for key, value in own.items()] + rest).config

    from sfumato.pipeline import load
    from sfumato.train import train

    train(config, run=tmp_path / "run")
    drawn = load(tmp_path / "run").sample("a red square", steps=2)
    assert drawn.images.shape == (1, 32, 32, 3)
    import all_mine  # type: ignore[import-not-found]

    assert set(all_mine.used) == {
        "data", "path", "time_input", "scale_input", "net", "codec", "conditioner",
        "objective", "density", "weight", "coupling", "sampler", "grid", "optimizer",
    }  # fmt: skip
    assert build("all_mine:MINE", "Prediction") is all_mine.MINE
