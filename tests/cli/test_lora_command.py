"""`sfumato lora` and `--lora`: adapters inspected, converted, merged and drawn with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, told
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from tests.adapters.tuned import random_adapter

from sfumato.adapters.factors import Factors
from sfumato.adapters.parts import architectures, parts_of
from sfumato.adapters.reading import Adapter
from sfumato.adapters.writing import write_adapter
from sfumato.io.directory import load_model
from sfumato.io.pictures import read_settings

pytest.importorskip("peft")
FAST = ("--steps", "1", "--device", "cpu")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, and an adapter of its model as a.safetensors."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    parts = parts_of(load_model(tiny_run / "model"))
    write_adapter(tmp_path / "a.safetensors", random_adapter(parts, ranks=(2,), alphas=(3.0,)), parts)
    return Path("runs/tiny")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An adapter of two layers of Stable Diffusion 1, as kohya's scripts write it."""
    made = next(one for one in architectures() if one.name == "stable_unet sd15")
    changes = {}
    for layer in [key for key in made.parts[0].shapes if key.endswith("cross.v")][:2]:
        out, inside = made.parts[0].shapes[layer]
        changes[f"net.{layer}"] = Factors(torch.ones(4, inside), torch.ones(out, 4), 2.0)
    return write_adapter(tmp_path / "sd.safetensors", Adapter(changes), made.parts, "kohya")


def test_what_an_adapter_is(sfumato: Command, run: Path, published: Path) -> None:
    said = sfumato("lora", "inspect", published, "--json").data
    assert said["dialect"] == "kohya" and said["for"] == "stable_unet sd15" and said["layers"] == 2
    assert said["ranks"] == [4] and said["alphas"] == [2.0] and said["dora"] is False and said["parts"] == {"net": 2}
    assert said["metadata"]["ss_network_dim"] == "4" and said["metadata"]["ss_base_model_version"] == "sd_v1"
    text = sfumato("lora", "inspect", published).out
    assert "dialect: kohya" in text and "ss_network_dim: 4" in text
    unknown = sfumato("lora", "inspect", "a.safetensors", "--json").data
    assert unknown["for"] is None and unknown["layers"] > 10
    known = sfumato("lora", "inspect", "a.safetensors", "--model", run, "--json").data
    assert known["for"] == str(run) and known["ranks"] == [2] and known["parts"].keys() == {"net", "conditioner"}


def test_other_dialects(sfumato: Command, run: Path, published: Path) -> None:
    outcome = sfumato("lora", "convert", published, "d.safetensors", "--to", "diffusers", "--dtype", "fp16")
    assert outcome.code == 0 and "2 layers from kohya's names to diffusers's, for stable_unet sd15" in outcome.err
    there = load_file("d.safetensors")
    assert all(key.startswith("unet.down_blocks.") for key in there)
    assert {value.dtype for value in there.values()} == {torch.float16}
    assert sfumato("lora", "convert", "d.safetensors", "p", "--to", "peft").code == 0
    assert sfumato("lora", "convert", "p", "k.safetensors", "--to", "kohya").code == 0
    first, last = load_file(published), load_file("k.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(last[key], value) for key, value in first.items())
    own = sfumato("lora", "convert", "a.safetensors", "b.safetensors", "--to", "kohya", "--model", run, "--json")
    assert own.data["layers"] == len(load_file("b.safetensors")) // 3


def test_a_model_with_adapters_in_it_draws_what_they_draw_beside_it(sfumato: Command, run: Path) -> None:
    assert sfumato("lora", "merge", run, "a.safetensors:0.5", "merged").code == 0
    assert load_model(Path("merged")).facts["loras"] == [{"file": "a.safetensors", "scale": 0.5}]
    beside = Path(sfumato("sample", run, "a cross", "--lora", "a.safetensors:0.5", "--seed", "4", *FAST).out.strip())
    merged = Path(sfumato("sample", "merged", "a cross", "--seed", "4", *FAST).out.strip())
    plain = Path(sfumato("sample", run, "a cross", "--seed", "4", *FAST).out.strip())
    one, two, three = (np.asarray(Pillow.open(path)).astype(int) for path in (beside, merged, plain))
    assert abs(one - two).max() <= 1 < abs(one - three).max()
    assert read_settings(beside)["loras"] == [{"name": "a", "file": "a.safetensors", "scale": 0.5}]
    scaled = sfumato("lora", "merge", run, "a.safetensors", "again", "--scale", "0.5")
    assert scaled.code == 0
    weights = (load_model(Path(folder)).weights() for folder in ("merged", "again"))
    assert all(torch.equal(a, b) for a, b in zip(*(one.values() for one in weights), strict=True))


def test_what_cannot_be_meant_is_told(sfumato: Command, run: Path, published: Path) -> None:
    told(sfumato("lora", "convert", published, "x", "--to", "kohia"), 2, "--to", "kohya")
    told(sfumato("lora", "convert", published, "a.safetensors", "--to", "kohya"), 2, "exists already")
    told(sfumato("lora", "convert", "a.safetensors", "x", "--to", "kohya"), 4, "no published architecture", "--model")
    told(sfumato("lora", "merge", run, "x"), 2, "an adapter and what to write")
    told(sfumato("lora", "merge", run, "nothing.safetensors", "x"), 4, "no such adapter")
    told(sfumato("lora", "inspect", published, "--model", run), 4, "an adapter of another model")
    told(sfumato("sample", run, "a cross", "--lora", str(published), *FAST), 4, "an adapter of another model")
    save_file({"some.weight": torch.ones(1)}, "w.safetensors")
    told(sfumato("lora", "inspect", "w.safetensors"), 4, "none of an adapter", "some.weight")
