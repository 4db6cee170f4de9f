"""Adapters in use: several at once, switched, merged and taken away, and told of in the pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.adapters.tuned import random_adapter
from tests.nets.tiny import CONFIGS, made
from torch import Tensor, nn

from sfumato import load
from sfumato.adapters.lora import Living, inject, merge_into, unwrap
from sfumato.adapters.parts import net_part, parts_of
from sfumato.adapters.reading import Adapter
from sfumato.adapters.targets import DEFAULT, chosen
from sfumato.adapters.writing import write_adapter
from sfumato.errors import CheckpointError, ConfigError, MachineError
from sfumato.io.directory import load_model, save_model
from sfumato.io.pictures import read_settings
from sfumato.model import Model
from sfumato.pipeline import Pipeline

pytest.importorskip("peft")


@pytest.fixture
def model(tiny_run: Path) -> Model:
    made = load_model(tiny_run / "model")
    rng = torch.Generator().manual_seed(0)
    for p in made.parameters():  # gates begin at zero, and hide what stands before them
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return made


def answer(model: Model) -> Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, 0.6, model.cond([{"caption": "a red square"}, {}]))


def adapters(model: Model, dora: bool = False) -> tuple[Adapter, Adapter]:
    parts = parts_of(model)
    assert [part.home for part in parts] == ["net", "conditioner"]
    return random_adapter(parts, ranks=(2,)), random_adapter(parts[:1], ranks=(1, 3), dora=dora)


def test_each_at_its_scale_is_the_sum_of_what_they_change(model: Model, tiny_run: Path) -> None:
    one, two = adapters(model, dora=True)
    plain = answer(model)
    living = Living(model)
    living.add("one", one)
    living.add("two", two, 0.5)
    for scales in ({"one": 0.7, "two": 0.2}, {"two": -1.0}, {"one": 1.0, "two": 0.0}):
        living.set(scales)
        here = answer(model)
        living.merge()
        torch.testing.assert_close(answer(model), here, rtol=1e-3, atol=1e-4)
        living.unmerge()
        assert torch.equal(answer(model), here) and float((here - plain).abs().max()) > 0.01
    living.set({})
    assert torch.equal(answer(model), plain) and living.at_work == []
    living.remove("one")
    living.remove("two")
    assert torch.equal(answer(model), plain)
    assert model.weights().keys() == load_model(tiny_run / "model").weights().keys()


@pytest.mark.parametrize("both", [False, True])
def test_merged_once_for_all_is_the_same(model: Model, both: bool) -> None:
    """A DoRA over what is added, and one over another."""
    one, two = adapters(model, dora=True)
    if both:
        one = random_adapter(parts_of(model), ranks=(2,), alphas=(1.0,), dora=True)
    living = Living(model)
    living.add("one", one, 0.4)
    living.add("two", two, 0.8)
    beside = answer(model)
    living.remove("one")
    living.remove("two")
    merge_into(model, [(one, 0.4), (two, 0.8)])
    torch.testing.assert_close(answer(model), beside, rtol=1e-3, atol=1e-4)


def test_while_merged_others_come_and_go(model: Model) -> None:
    one, two = adapters(model)
    plain, living = answer(model), Living(model)
    living.add("one", one)
    living.merge()
    assert living.merged
    living.add("two", two)
    both = answer(model)
    living.merge()
    living.remove("one")
    assert not living.merged
    living.set({"two": 1.0})
    alone = answer(model)
    living.add("one", one)
    living.set({"one": 1.0, "two": 1.0})
    torch.testing.assert_close(answer(model), both)
    assert float((alone - both).abs().max()) > 0.01
    for name in ("one", "two"):
        living.remove(name)
    assert torch.equal(answer(model), plain)


def test_nothing_of_it_learns_or_draws(model: Model) -> None:
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    living = Living(model)
    living.add("one", adapters(model)[0])
    living.set({"one": 2.0})
    assert torch.equal(torch.rand(3), wanted)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_what_cannot_be_is_named(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living = Living(model)
    living.add("one", adapters(model)[0])
    with pytest.raises(ConfigError, match="two adapters of one name"):
        living.add("one", adapters(model)[0])
    for fails in (lambda: living.set({"on": 1.0}), lambda: living.remove("on")):
        with pytest.raises(ConfigError, match=r"no such adapter[\s\S]*one"):
            fails()
    with pytest.raises(ConfigError, match="scale is a number"):
        living.set({"one": float("nan")})
    with pytest.raises(ConfigError, match="an adapter stands beside the weights"):
        save_model(tmp_path / "x", model, {})
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MachineError, match=r"LoRA needs the library peft[\s\S]*pip install"):
        living.add("two", adapters(model)[1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_network_has_targets_and_takes_an_adapter(kind: str) -> None:
    """Attention and feed-forward layers, which every network that has them names so."""
    net: nn.Module = made(kind).float()
    part = net_part(net, kind)
    names = chosen(part, DEFAULT)
    linear = [name for name in part.shapes if len(part.shapes[name]) == 2 and "." in name]
    ends = ("modulation", "told", "time", "label", "pooled", "guided", "head.", "context", "shared", "skip", "join")
    inner = [name for name in linear if not any(word in name for word in ends)]
    assert inner and set(names) == set(inner), set(inner) ^ set(names)
    state = set(net.state_dict())
    inject(net, "a", random_adapter([part]).of("net"))
    assert sum(".lora_A." in name for name in net.state_dict()) == len(part.shapes)
    assert net_part(net, kind).shapes == part.shapes
    for module in net.modules():
        if hasattr(module, "delete_adapter"):
            module.delete_adapter("a")
    unwrap(net)
    assert set(net.state_dict()) == state


# Pipelines


def drawn(pipeline: Pipeline, **more: Any) -> Any:
    return pipeline.sample("a red square", steps=2, seeds=3, **more)


def test_a_pipeline_loads_switches_and_unloads(model: Model, tmp_path: Path) -> None:
    parts = parts_of(model)
    one, two = adapters(model)
    write_adapter(tmp_path / "one.safetensors", one, parts)
    write_adapter(tmp_path / "two", two, parts, "peft")
    pipeline = Pipeline(model, "cpu")
    plain = drawn(pipeline)
    assert "loras" not in plain.settings[0]
    assert pipeline.load_lora(tmp_path / "one.safetensors", 0.5) == "one"
    assert pipeline.load_lora(tmp_path / "two", name="second") == "second"
    both = drawn(pipeline)
    said = [{"name": "one", "file": "one.safetensors", "scale": 0.5}, {"name": "second", "file": "two", "scale": 1.0}]
    assert both.settings[0]["loras"] == said
    (path,) = both.save(tmp_path / "pictures")
    assert read_settings(path)["loras"] == said
    pipeline.set_loras({"one": 0.5})
    first = drawn(pipeline)
    assert first.settings[0]["loras"] == said[:1]
    assert not np.array_equal(first.images, both.images) and not np.array_equal(first.images, plain.images)
    pipeline.unload_lora("second")
    assert np.array_equal(drawn(pipeline).images, first.images) and pipeline.loras.scales == {"one": 0.5}
    pipeline.unload_lora()
    assert np.array_equal(drawn(pipeline).images, plain.images)


def test_guidance_by_a_variant_of_the_network_follows_the_adapter(model: Model, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.safetensors", adapters(model)[1], parts_of(model))
    slot = {"kind": "skip_layers", "blocks": [0], "scale": 2.0}
    pipeline = Pipeline(model, "cpu")
    plain = drawn(pipeline, guidance=slot).images
    pipeline.load_lora(tmp_path / "one.safetensors")
    beside = drawn(pipeline, guidance=slot).images
    pipeline.loras.merge()
    merged = drawn(pipeline, guidance=slot).images
    assert abs(beside.astype(int) - merged).max() <= 1 and not np.array_equal(beside, plain)


def test_an_adapter_of_another_model_is_refused(model: Model, tiny_run: Path, tmp_path: Path) -> None:
    part = net_part(made("unet"), "unet")
    write_adapter(tmp_path / "x.safetensors", random_adapter([part]), [part])
    pipeline = load(tiny_run, "cpu")
    with pytest.raises(CheckpointError, match="an adapter of another model"):
        pipeline.load_lora(tmp_path / "x.safetensors")
    assert pipeline.loras.scales == {}
