"""`sfumato plan`: what is counted is what a real pass does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.cli import main
from sfumato.errors import ConfigError, DataError
from sfumato.model import build_model
from sfumato.overlay import load_config, recipes, resolved
from sfumato.plan import plan

DIT_XL = (
    "model.net={kind: dit, patch: 2, dim: 1152, depth: 28, heads: 16}",
    "model.conditioner={kind: labels, classes: 1000}",
    "model.codec={kind: latents, weights: nowhere}",
    "data.size=256",
    "batch=256",
    "precision=bf16",
)

# Weights that learn: those of the published files, or of the paper, whose third figure they have.
PUBLISHED = {
    "ddpm-cifar10": 35_746_307,  # of google/ddpm-cifar10-32
    "adm-imagenet-256": 553_838_086,  # of OpenAI's file
    "dit-xl-2-256": 675_129_632 - 256 * 1152,  # of DiT's own, without the table of positions
    "sit-xl-2-256": 675_129_632 - 256 * 1152 - 16 * 1153,  # without the half of the last layer that it never reads
    "pixart-alpha-1": 675_129_632 - 256 * 1152,
    "pixart-alpha-2": 611_329_168 + 16 * 1153,  # "0.6 B"
    "pixart-alpha-3": 611_329_168 + 16 * 1153,  # of pixart-alpha-2, from which it starts
    "stable-diffusion-15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sdxl-refiner": 2_259_526_660,  # of diffusers' network of the published config
    "autoencoder-kl-f8": 83_653_863 + 2_765_633,  # of the published file, and of an adversary of three layers
}


def test_what_is_counted_is_what_a_real_pass_takes() -> None:
    config = load_config("quickstart", ["precision=fp32", "batch=1"]).config
    told, section = plan(config), resolved(config)
    real = build_model({"model": section["model"], "size": [32, 32], "sampling": section["sampling"]})
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, torch.nn.Parameter):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    counter = FlopCounterMode(display=False)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with plain, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        real.net.train()(
            torch.randn(1, 3, 32, 32), torch.zeros(1), context=torch.randn(1, 14, 128), pooled=torch.randn(1, 128)
        )
    assert told.flops == counter.get_total_flops()
    assert told.activations == pytest.approx(sum(kept.values()), rel=0.05)
    assert told.images == config.steps and told.run_flops == 3 * told.flops * told.images
    learning = sum(p.numel() for p in real.net.parameters())
    assert told.parameters >= learning and told.states == 12 * told.parameters  # gradients, momentum, one average


def test_published_sizes_without_published_weights() -> None:
    """DiT-XL/2 at 256: 675 M parameters with its table of positions, and 118.6 GMACs (Peebles & Xie 2023)."""
    told = plan(load_config("tiny", DIT_XL).config, "h200")
    assert told.parameters + 256 * 1152 == pytest.approx(675.1e6, rel=1e-3)
    assert told.flops / 2 == pytest.approx(118.6e9, rel=2e-3)
    assert told.frozen == 83_653_863  # the autoencoder's
    assert told.hours == pytest.approx(told.run_flops / (0.4 * 989e12) / 3600)


@pytest.mark.parametrize("recipe", [one.name for one in recipes()])
def test_every_recipe_can_be_planned(recipe: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing has been trained
    with pytest.raises(SystemExit) as left:
        main(["plan", recipe, "--device", "h100", "--json"])
    out, talk = capsys.readouterr()
    config = load_config(recipe).config
    if config.start and (config.control or config.method):  # that needs the weights of a model which is trained first
        assert left.value.code and "no model to start from" in talk
        return
    said = json.loads(out)
    assert left.value.code == 0 and said["parameters"] > 0 and said["flops"] > 0 and said["hours"] > 0
    if recipe in PUBLISHED:
        assert said["parameters"] == PUBLISHED[recipe]


def test_a_run_to_start_from_that_is_not_there_is_named_where_no_recipe_makes_it() -> None:
    with pytest.raises(DataError, match="no model to start from"):
        plan(load_config("pixart-alpha-3", ["start=runs/nosuch"]).config)


def test_what_is_not_known_is_named() -> None:
    config = load_config("tiny").config
    with pytest.raises(ConfigError, match="h200"):
        plan(config, "h20")
    with pytest.raises(ConfigError, match="share"):
        plan(config, share=0)
