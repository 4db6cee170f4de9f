"""An autoencoder trained by the same loop: resumed to the last bit, measured, kept, and read by latent diffusion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import kept, rows_of, stopped

from sfumato import load, train
from sfumato.codecs import Latents
from sfumato.config import Config
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import load_autoencoder
from sfumato.io.pretrained import codec_from
from sfumato.model import AutoencoderModel
from sfumato.overlay import load_config
from sfumato.train import checkpoint
from sfumato.train.pixels import pixels
from sfumato.train.run import Run

Small = Callable[..., Config]
Start = Callable[..., Run]
CODEC = "model.codec={kind: latents, channels: [8, 16], latent: 3, blocks: 1, groups: 4, attention: false}"
ALONE = ("model.net=null", "model.conditioner=null", CODEC)
ADVERSARY = "discriminator: {kind: patch, channels: 4, layers: 1}"
BOTH = (*ALONE, f"objective={{kind: autoencoder, {ADVERSARY}, start: 3}}")
EVERYTHING = (
    *BOTH,
    "accumulate=2",
    "batch=2",
    "ema=[{decay: 0.9}, {decay: 0.5, warmup: false}]",
    "validate={every: 4, batches: 2, holdout: 8}",
    "log.every=5",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test may change."""
    changes = (*BOTH, "samples={every: 6, count: 3}", "objective.latents=channel")
    config = load_config(str(Path(__file__).parent / "small.yaml"), changes).config
    folder = tmp_path_factory.mktemp("autoencoders") / "run"
    train(config, run=folder)
    return folder


def test_the_discriminator_may_learn_at_a_rate_of_its_own(small: Small, start: Start) -> None:
    run = start(*BOTH, "optim={kind: adamw, lr: 0.001, warmup: 0, decay: none, options: {}}", "optim.critic_lr=0.004")
    names = {p: name for name, p in run.weights.items()}
    for _ in range(2):
        run._advance()
    rates = {names[p]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == run.weights.keys()
    assert {rate for name, rate in rates.items() if name.startswith("codec.")} == {0.001}
    assert {rate for name, rate in rates.items() if not name.startswith("codec.")} == {0.004}
    with pytest.raises(ConfigError, match="the objective autoencoder has none"):
        small(*ALONE, "objective={kind: autoencoder}", "optim.critic_lr=0.004")


@pytest.mark.parametrize("how", ["optim={kind: adamw, options: {}}", "optim.kind=muon", "precision=bf16"])
def test_a_resumed_run_is_the_same_to_the_last_bit(small: Small, tmp_path: Path, how: str) -> None:
    config = small(*EVERYTHING, how)
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 2)  # before the adversary has begun, and has any state
    torch.rand(5)
    stopped(config, tmp_path / "parts", 5, resume=True)
    train(config, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = {name for name in whole if not name.startswith("checkpoints/step-00000006/")}
    assert {"metrics.jsonl", "model/model.safetensors", "model-1/model.json"} <= names
    assert [name for name in sorted(names) if whole[name] != parts.get(name)] == []


def test_both_learn_from_their_step_on(small: Small, start: Start) -> None:
    run = start(*BOTH)
    before = {name: p.detach().clone() for name, p in run.weights.items()}

    def moved(prefix: str) -> bool:
        return any(not torch.equal(before[name], p) for name, p in run.weights.items() if name.startswith(prefix))

    for _ in range(3):
        run._advance()
    assert moved("codec.autoencoder.encoder.") and moved("codec.autoencoder.decoder.") and not moved("discriminator.")
    run._advance()
    assert moved("discriminator.") and set(run.pending[-1]) - set(run.pending[0]) == {
        "adversarial",
        "adversarial_weight",
        "discriminator",
    }


def test_opponents_are_clipped_each_for_itself(start: Start) -> None:
    run = start(*BOTH, "objective.start=0", "optim.clip=0.001")
    run.stepper.gradients([next(run.loader)], 0)
    norms = [torch.stack([p.grad.norm() for p in part]).norm() for part in run.model.clipped()]
    assert [float(norm) for norm in norms] == pytest.approx([0.001, 0.001], rel=1e-2)


def test_the_terms_are_in_the_metrics_and_the_pictures_in_sheets(trained: Path) -> None:
    rows = rows_of(trained)
    assert {"loss", "pixels", "distance", "kl", "psnr"} <= rows[0].keys() and "discriminator" not in rows[0]
    assert "discriminator" in rows[-1] and all(np.isfinite(rows[-1]["adversarial_weight"]) for _ in rows[-1:])
    sheet = np.asarray(Image.open(trained / "samples/00000012.png"))
    assert sheet.shape[1] > 3 * 128 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50


def test_averages_and_model_hold_the_autoencoder_and_checkpoints_the_adversary_too(trained: Path) -> None:
    _, state = checkpoint.newest(trained / "checkpoints", print)
    assert any(name.startswith("discriminator.") for name in state.tensors["model"])
    assert state.tensors["ema-0"] and all(name.startswith("codec.") for name in state.tensors["ema-0"])
    model = load_autoencoder(trained / "model")
    assert isinstance(model, AutoencoderModel) and model.discriminator is None
    for name, value in state.tensors["ema-0"].items():
        assert torch.equal(model.weights()[name], value)


def test_latents_have_unit_variance_by_the_scale_that_was_measured(trained: Path, start: Start) -> None:
    model = load_autoencoder(trained / "model")
    assert model is not None and model.codec.scale.shape == model.codec.shift.shape == (3, 1, 1)
    run = start(*BOTH)
    x = torch.cat(list(run._some(200)))
    assert len(x) == 200
    z = model.codec.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    one = AutoencoderModel(model.codec, model.spec)
    one.measure([x[:100], x[100:]], "one")
    assert one.codec.shift.tolist() == [[[0.0]]] and float(one.codec.encode(x).std()) == pytest.approx(1, abs=1e-4)
    assert one.spec["model"]["codec"]["scale"] == pytest.approx(float(one.codec.scale))


@pytest.mark.parametrize("place", ["", "model"])
def test_what_comes_out_is_the_codec_of_a_model(small: Small, tmp_path: Path, trained: Path, place: str) -> None:
    slot = f"model.codec={{kind: latents, weights: {trained / place}, tile: 8}}"
    train(small("model.net.patch=4", "steps=2", "checkpoint.every=2", slot), run=tmp_path / "run")
    model = load(tmp_path / "run", "cpu").model
    own = load_autoencoder(trained / "model")
    assert own is not None and isinstance(model.codec, Latents) and model.codec.tile == 8
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model.codec.encode(x[:, :, :16, :16]), own.codec.encode(x[:, :, :16, :16]))
    told, state = codec_from({"kind": "latents", "weights": str(tmp_path / "run")})  # of what was trained in it, too
    assert told["tile"] == 8 and all(torch.equal(own.codec.state_dict()[name], one) for name, one in state.items())


def test_the_decoder_alone_leaves_the_latents(small: Small, tmp_path: Path, trained: Path) -> None:
    """Fine-tuning for sharper pictures from the latents that other models draw."""
    slot = f"model.codec={{kind: latents, weights: {trained}}}"
    config = small(*ALONE[:2], slot, "objective={kind: autoencoder, train: decoder, latents: channel}", "steps=3")
    train(config, run=tmp_path / "run")
    before, after = load_autoencoder(trained / "model"), load_autoencoder(tmp_path / "run/model")
    assert before is not None and after is not None
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(before.net.encode(x).mean, after.net.encode(x).mean)  # type: ignore[operator]
    assert not torch.equal(before.net(x), after.net(x))
    torch.testing.assert_close(before.codec.scale, after.codec.scale)


def test_recomputed_activations_give_the_same_gradients(start: Start) -> None:
    plain, spared = start(*BOTH, "objective.start=0"), start(*BOTH, "checkpointing=true", folder="other")
    batch = next(plain.loader)
    for run in (plain, spared):
        run.stepper.gradients([batch], 5)
    assert spared.model.net.checkpointing and not plain.model.net.checkpointing
    for one, other in zip(plain.stepper.weights, spared.stepper.weights, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


OWN = """
from dataclasses import dataclass
from torch import nn

@dataclass(frozen=True)
class Distance:
    by: float = 1.0

    def __call__(self, images, others):
        return self.by * (images - others).square().flatten(1).mean(1)

class Adversary(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, images):
        return self.conv(images)
"""


def test_distances_and_adversaries_of_ones_own(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_critics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    objective = (
        "{kind: autoencoder, distance: {kind: 'own_critics:Distance', by: 2}, discriminator: 'own_critics:Adversary'}"
    )
    train(small(*ALONE, f"objective={objective}", "steps=2"), run=tmp_path / "run")
    assert {"distance", "discriminator"} <= rows_of(tmp_path / "run")[-1].keys()
    assert load_autoencoder(tmp_path / "run/model") is not None
    with pytest.raises(ConfigError, match=r"objective\.discriminator\.layerz"):
        small(*ALONE, "objective={kind: autoencoder, discriminator: {kind: patch, layerz: 2}}")


def test_what_does_not_go_together_is_named(small: Small, tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.net is not trained by the objective autoencoder"):
        small("objective=autoencoder")
    with pytest.raises(ConfigError, match=r"model\.net is needed by the objective denoising"):
        small("model.net=null")
    with pytest.raises(ConfigError, match="only an autoencoder of latents"):
        train(small(*ALONE[:2], "objective=autoencoder"), run=tmp_path / "pixels")
    with pytest.raises(ConfigError, match="multiples of 2"):
        train(small(*BOTH, "data.size=33"), run=tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"an autoencoder, which draws nothing[\s\S]*model\.codec="):
        load(trained)


def test_a_model_of_pixels_has_no_autoencoder(tiny_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no autoencoder[\s\S]*pixels"):
        codec_from({"kind": "latents", "weights": str(tiny_run)})
    assert load_autoencoder(tiny_run / "model") is None


def test_altered_directories_are_refused(tmp_path: Path, trained: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "model", copy)
    said: dict[str, Any] = json.loads((copy / "model.json").read_text())
    said["model"]["codec"]["scale"] = 3.0
    (copy / "model.json").write_text(json.dumps(said))
    for read in (lambda: load_autoencoder(copy), lambda: codec_from({"kind": "latents", "weights": str(copy)})):
        with pytest.raises(CheckpointError, match=r"truncated|altered"):
            read()


def test_pictures_reach_the_objective_as_they_are(start: Start) -> None:
    run = start(*BOTH)
    batch = next(run.loader)
    assert batch.images is not None
    x = pixels(batch.images, torch.device("cpu"))
    assert torch.equal(run.model.encode(x), x) and x.shape == (4, 3, 32, 32) and float(x.abs().max()) <= 1
