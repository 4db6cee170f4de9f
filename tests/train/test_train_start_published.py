"""Training further what others published: a small Stable Diffusion's adapter, its text encoder's too, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import kept, stopped

from sfumato.adapters.parts import parts_of
from sfumato.adapters.reading import read_adapter
from sfumato.cli import main
from sfumato.config import Config
from sfumato.io.directory import load_model
from sfumato.io.published import load_published, save_published
from sfumato.overlay import as_yaml, load_config
from sfumato.train import train

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

FILE: dict[str, Any] = {
    "name": "further",
    "data": {"kind": "folder", "path": "pictures", "size": 32},
    "optim": {"lr": 0.01, "warmup": 0},
    "steps": 4,
    "batch": 2,
    "device": "cpu",
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.parity.test_stable_diffusion import pipeline_of

    place = tmp_path_factory.mktemp("published")
    pipeline_of(place, "epsilon")
    return place / "whole"


def config(folder: Path, place: Path, *overrides: str) -> Config:
    from PIL import Image as Pillow

    (place / "pictures").mkdir(exist_ok=True)
    for i, colour in enumerate(("red", "blue", "green", "white")):
        Pillow.new("RGB", (40, 40), colour).save(place / f"pictures/{i}.png")
        (place / f"pictures/{i}.txt").write_text("a red circle")
    (place / "further.yaml").write_text(as_yaml(FILE))
    changes = (f"start={folder}", f"data.path={place / 'pictures'}", *overrides)
    return load_config(str(place / "further.yaml"), changes).config


def test_an_adapter_of_the_network_and_of_the_text_encoder(folder: Path, tmp_path: Path) -> None:
    train(config(folder, tmp_path, "lora={rank: 2, text: true}"), run=tmp_path / "run")
    before, after = load_published(folder), load_model(tmp_path / "run/model")
    adapter = read_adapter(tmp_path / "run/lora.safetensors", parts_of(before))
    assert {name.split(".")[0] for name in adapter.changes} == {"net", "conditioner"}
    assert all(bool(one.up.any()) for one in adapter.changes.values())
    weights, now = before.weights(), after.weights()
    touched = {f"{name}.weight" for name in adapter.changes}
    assert {name for name in weights if not torch.equal(weights[name], now[name])} == touched
    assert after.spec["sampling"]["guidance"] == 7.5 and after.spec["sampling"]["sampler"]["kind"] == "ddim"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.unet.load_lora_adapter(tmp_path / "run", weight_name="lora.safetensors", prefix="unet")
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 12)
    with torch.no_grad():
        theirs, ours = pipe.unet(x, t, context).sample, after.net(x, t.float(), context=context)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_goes_on_bit_for_bit_and_back_to_diffusers(folder: Path, tmp_path: Path) -> None:
    made = config(folder, tmp_path, "lora={rank: 2, dora: true, dropout: 0.1}")
    train(made, run=tmp_path / "whole")
    stopped(made, tmp_path / "parts", 3)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = [name for name in whole if "step-00000004" in name or name.startswith(("model", "lora", "start"))]
    assert names and [name for name in names if whole[name] != parts.get(name)] == []
    save_published(tmp_path / "there", load_model(tmp_path / "whole/model"))
    again = load_published(tmp_path / "there").weights()
    assert all(
        torch.equal(again[name], value) for name, value in load_model(tmp_path / "whole/model").weights().items()
    )


def test_latents_and_states_can_be_kept(folder: Path, tmp_path: Path) -> None:
    """By the run's own file, with the same changes."""
    cached = ("lora.rank=2", f"data.cache={tmp_path / 'cache'}")
    made = config(folder, tmp_path, *cached)
    words = [str(tmp_path / "further.yaml"), f"start={folder}", f"data.path={tmp_path / 'pictures'}", *cached]
    with pytest.raises(SystemExit) as ended:
        main(["data", "cache", *words])
    assert ended.value.code == 0
    train(made, run=tmp_path / "kept")
    train(config(folder, tmp_path, "lora.rank=2"), run=tmp_path / "plain")
    one, two = (load_model(tmp_path / name / "model").weights() for name in ("kept", "plain"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_all_of_it_learns_but_what_is_frozen(folder: Path, tmp_path: Path) -> None:
    train(config(folder, tmp_path), run=tmp_path / "run")
    before, after = load_published(folder).weights(), load_model(tmp_path / "run/model").weights()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"net"}
