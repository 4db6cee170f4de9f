"""Commands about an autoencoder that was trained alone: converting it, and what it cannot do."""

from pathlib import Path

import pytest
import torch
from commands import QUICK, Command, told

ALONE = (
    *(one for one in QUICK if not one.startswith(("model.", "checkpoint"))),
    "model.net=null",
    "model.conditioner=null",
    "model.codec={kind: latents, channels: [8, 16], latent: 3, blocks: 1, groups: 4, attention: false}",
)


@pytest.fixture
def autoencoder(sfumato: Command) -> str:
    outcome = sfumato("train", "tiny", *ALONE, "objective={kind: autoencoder, latents: channel}", "--run", "vae")
    assert outcome.code == 0 and "next: a model in its latents" in outcome.err
    return "vae"


def test_it_goes_from_layout_to_layout(sfumato: Command, tmp_path: Path, autoencoder: str) -> None:
    told(sfumato("convert", autoencoder, "folder", "--to", "diffusers"), 2, "one scale", "3 scales")
    assert sfumato("train", "tiny", *ALONE, "objective=autoencoder", "--run", "one").code == 0
    assert sfumato("convert", "one", "folder", "--to", "diffusers").code == 0
    assert (tmp_path / "folder/vae/config.json").is_file()
    assert sfumato("convert", "one", "one.safetensors", "--to", "single-file").code == 0
    assert sfumato("convert", "one", "copy", "--to", "sfumato").code == 0
    from sfumato.io.pretrained import codec_from

    first = codec_from({"kind": "latents", "weights": "one"})[1]
    for place in ("copy", "folder"):
        state = codec_from({"kind": "latents", "weights": place})[1]
        assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in first)
    assert sfumato("inspect", "one").code == 0


def test_it_is_judged_by_what_it_keeps(sfumato: Command, tmp_path: Path, autoencoder: str) -> None:
    words = ("eval", autoencoder, "--suite", "reconstruction", "--pictures", "8", "--device", "cpu")
    scores = sfumato(*words, "--json").data
    assert scores["images"] == 8 and not scores["held_out"] and 0 <= scores["kept"]["score"] <= 1
    assert (tmp_path / autoencoder / "eval/reconstruction.png").is_file()
    shown = sfumato(*words)
    assert f"PSNR in dB  {scores['psnr']['mean']:.2f}" in shown.out and "pictures kept" in shown.out
    pixels = sfumato("train", "tiny", *QUICK, "--run", "pixels")
    assert pixels.code == 0
    told(sfumato("eval", "pixels", *words[2:]), 4, "no autoencoder", "seen   codec pixels", "train autoencoder-scenes")


def test_it_draws_nothing(sfumato: Command, autoencoder: str) -> None:
    for command in (("sample", autoencoder, "a red circle"), ("eval", autoencoder), ("doctor", autoencoder)):
        outcome = sfumato(*command)
        assert outcome.code == 4 and "this is an autoencoder, which draws nothing" in outcome.err


def test_plans_count_it(sfumato: Command, autoencoder: str) -> None:
    found = sfumato("plan", "tiny", *ALONE, "objective=autoencoder", "--json").data
    assert found["parameters"] > 10_000 and found["flops"] > 0 and found["frozen"] == 0
    net = "model.net={kind: dit, patch: 4, dim: 16, depth: 1, heads: 1}"
    of_model = sfumato("plan", "tiny", net, "model.codec={kind: latents, weights: vae}", "--json").data
    assert of_model["frozen"] == found["parameters"]
