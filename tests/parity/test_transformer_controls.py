"""ControlNets of Stable Diffusion 3 and FLUX.1: diffusers' own modules and pipelines, small and random, both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from test_flux import drawn_by
from test_flux import pipeline_of as flux_pipeline
from test_sd3_pipeline import drawn as drawn_by_sd3
from test_sd3_pipeline import made as sd3_pipeline
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import save_model
from sfumato.io.families.controlnet import read_control, write_control
from sfumato.io.published import save_published
from sfumato.nets.control_flux import FluxControl
from sfumato.nets.control_mmdit import MMDiTControl
from sfumato.nets.controlled import Controlled

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "caption_projection_dim": 24,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = {
    "in_channels": 20,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 8, 8),
    "guidance_embeds": True,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3ControlNetModel", SD3),
    "sd3 without norms": ("SD3ControlNetModel", {**SD3, "qk_norm": None, "force_zeros_for_pooled_projection": False}),
    "sd3.5 medium": ("SD3ControlNetModel", {**SD3, "dual_attention_layers": (0,)}),
    "sd3.5 large": (
        "SD3ControlNetModel",
        {**SD3, "joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False},
    ),
    "flux": ("FluxControlNetModel", FLUX),
    "flux double alone": ("FluxControlNetModel", {**FLUX, "num_single_layers": 0, "guidance_embeds": False}),
    "flux union": ("FluxControlNetModel", {**FLUX, "num_mode": 7}),
    "flux pixels": (
        "FluxControlNetModel",
        {**FLUX, "num_single_layers": 0, "num_layers": 2, "patch_size": 2, "conditioning_embedding_channels": 5},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def their_control(kind: str, seed: int = 1) -> Any:
    name, options = KINDS[kind]
    return randomised(getattr(diffusers, name)(**options), seed).eval()


@pytest.fixture(scope="module")
def peer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    made, folder = their_control(kind), tmp_path_factory.mktemp("control") / "theirs"
    made.save_pretrained(folder)
    return made, folder


def answers(kind: str, theirs: Any, ours: Any) -> tuple[list[Tensor], list[Tensor]]:
    rng = torch.Generator().manual_seed(5)
    channels, words = (4, 40) if kind.startswith("sd3") else (5, 32)
    x = torch.randn(2, channels, 8, 12, generator=rng)
    hint = torch.randn(2, channels, 8, 12, generator=rng)
    context, pooled = torch.randn(2, 7, words, generator=rng), torch.randn(2, 12, generator=rng)
    t = torch.tensor([981.0, 250.0])
    with torch.no_grad():
        if kind.startswith("sd3"):
            told: dict[str, Any] = {"encoder_hidden_states": context}
            mine: dict[str, Any] = {"context": context}
            if kind == "sd3.5 large":  # which is given tokens, by the pipeline
                base = randomised(diffusers.SD3Transformer2DModel(**{**SD3, "num_layers": 3}), 9)
                theirs.pos_embed = theirs._get_pos_embed_from_transformer(base)
                told, mine = {}, {"tokens": theirs.pos_embed(x)}
            zeros = theirs.config.force_zeros_for_pooled_projection  # by the pipeline
            seen = torch.zeros_like(pooled) if zeros else pooled
            said = theirs(x, hint, pooled_projections=seen, timestep=t, return_dict=False, **told)[0]
            if kind == "sd3.5 large":
                theirs.pos_embed = None
            return list(said), ours(x, t, hint=hint, pooled=pooled, **mine)
        pixels = torch.rand(2, 3, 64, 96, generator=rng)
        mode, guidance = torch.tensor([3, 5]), torch.tensor([3.5, 2.0])
        told = {"guidance": guidance} if theirs.config.guidance_embeds else {}
        told |= {"controlnet_mode": mode[:, None]} if theirs.union else {}
        pack = diffusers.FluxPipeline._pack_latents
        double, single = theirs(
            pack(x, 2, 5, 8, 12),
            2 * pixels - 1 if "pixels" in kind else pack(hint, 2, 5, 8, 12),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t / 1000,
            img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
            **told,
        )
        mine = {"mode": mode} if theirs.union else {}
        read = pixels if "pixels" in kind else hint
        own = ours(x, t, hint=read, context=context, pooled=pooled, guidance=guidance, **mine)
        return [*double, *(single or ())], own


def same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 0.1
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_control_of_diffusers_answers_the_same_here(kind: str, peer: tuple[Any, Path]) -> None:
    theirs, folder = peer
    ours = read_control(folder)
    assert isinstance(ours, MMDiTControl if kind.startswith("sd3") else FluxControl)
    same(*answers(kind, theirs, ours))


def test_our_control_answers_the_same_in_diffusers(kind: str, peer: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = peer
    ours = read_control(folder)
    randomised(ours, 2)
    write_control(tmp_path / "ours", ours, torch.float32)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    same(*answers(kind, again.eval(), ours))


# In pipelines


def picture() -> Pillow.Image:
    rng = np.random.default_rng(3)
    return Pillow.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8))


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws from the encoder's distribution, of which we take the mean: here it does, too."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize("name", ["sd3", "sd3 without norms", "sd3.5 large"])
def test_stable_diffusion_3_draws_the_same_under_control(name: str, tmp_path: Path, certain: None) -> None:
    pipe = sd3_pipeline(tmp_path, True)
    control = their_control(name)
    control.save_pretrained(tmp_path / "control")
    theirs = diffusers.StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=control)
    theirs.set_progress_bar_config(disable=True)
    told = {"control_image": picture(), "controlnet_conditioning_scale": 0.7}
    expected = drawn_by_sd3(theirs, "a red circle", 4.0, **told)
    pipeline = load(tmp_path / "whole", "cpu")
    settings: dict[str, Any] = {"steps": 5, "guidance": 4.0, "size": (16, 24), "seeds": 7}
    asked = {str(tmp_path / "control"): {"image": picture(), "scale": 0.7}}
    here = torch.from_numpy(pipeline.sample("a red circle", control=asked, **settings).images[0]) / 255
    plain = torch.from_numpy(pipeline.sample("a red circle", **settings).images[0]) / 255
    assert float((here - expected).abs().max()) < 1.01 / 255 < float((plain - expected).abs().max())


@pytest.mark.parametrize("name", ["flux", "flux union"])
def test_flux_draws_the_same_under_control(name: str, tmp_path: Path, certain: None) -> None:
    pipe = flux_pipeline(tmp_path, "dev")
    kind, options = KINDS[name]
    control = randomised(getattr(diffusers, kind)(**options), 1)
    control.save_pretrained(tmp_path / "control")
    theirs = diffusers.FluxControlNetPipeline(
        **{k: v for k, v in pipe.components.items() if k != "controlnet"}, controlnet=control
    )
    theirs.set_progress_bar_config(disable=True)
    told = {"control_image": picture(), "controlnet_conditioning_scale": 0.7, "guidance_scale": 3.5}
    told |= {"control_mode": 2} if control.union else {}
    expected = drawn_by(theirs, generator=torch.Generator().manual_seed(7), **told)
    pipeline = load(tmp_path / "whole", "cpu")
    asked: dict[str, Any] = {"image": picture(), "scale": 0.7}
    asked |= {"mode": "depth"} if control.union else {}
    settings: dict[str, Any] = {"steps": 6, "size": (16, 24), "seeds": 7}
    drawn = pipeline.sample("a red circle", control={str(tmp_path / "control"): asked}, **settings)
    here = torch.from_numpy(drawn.images) / 255
    plain = torch.from_numpy(pipeline.sample("a red circle", **settings).images) / 255
    assert float((here - expected).abs().max()) < 1.01 / 255 < float((plain - expected).abs().max())
    assert drawn.settings[0]["control"][0].get("mode") == (2 if control.union else None)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_pipeline_with_a_control_is_a_model_and_goes_back(family: str, tmp_path: Path, certain: None) -> None:
    """The same picture by the control within and beside, and in diffusers after the way there and back."""
    pipe = sd3_pipeline(tmp_path, True) if family == "sd3" else flux_pipeline(tmp_path, "dev")
    control = their_control("sd3 without norms" if family == "sd3" else "flux")
    kind = "StableDiffusion3ControlNetPipeline" if family == "sd3" else "FluxControlNetPipeline"
    whole = getattr(diffusers, kind)(**pipe.components, controlnet=control)
    whole.save_pretrained(tmp_path / "controlled")
    pipeline = load(tmp_path / "controlled", "cpu")
    settings: dict[str, Any] = {"steps": 3, "size": (16, 24), "seeds": 7}
    asked = {"caption": "a red circle", "control": picture()}
    drawn = pipeline.sample(asked, **settings).images
    apart = load(tmp_path / "whole", "cpu")
    beside = apart.sample("a red circle", control={str(tmp_path / "controlled" / "controlnet"): picture()}, **settings)
    assert np.abs(drawn.astype(int) - beside.images).max() <= 1
    assert (drawn != apart.sample("a red circle", **settings).images).any()
    save_published(tmp_path / "back", pipeline.model)
    again = getattr(diffusers, kind).from_pretrained(tmp_path / "back")
    state = control.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.controlnet.state_dict().items())
    assert np.array_equal(load(tmp_path / "back", "cpu").sample(asked, **settings).images, drawn)
    save_model(tmp_path / "ours", pipeline.model, {})
    assert np.array_equal(load(tmp_path / "ours", "cpu").sample(asked, **settings).images, drawn)


# What does not fit


def test_a_control_of_another_network_is_named(tmp_path: Path) -> None:
    for name in ("sd3", "flux union"):
        their_control(name).save_pretrained(tmp_path / name)
    sd3, union = read_control(tmp_path / "sd3"), read_control(tmp_path / "flux union")
    from sfumato.nets.flux import Flux, FluxConfig
    from sfumato.nets.mmdit import MMDiT, MMDiTConfig

    mmdit = MMDiT(MMDiTConfig(size=8, dim=24, depth=3, heads=3, in_channels=4, context_dim=40, pooled_dim=12))
    Controlled(mmdit, [sd3])
    with pytest.raises(ConfigError, match="another kind of model"):
        Controlled(mmdit, [union])
    wide = MMDiT(MMDiTConfig(size=8, dim=48, depth=3, heads=3, in_channels=4, context_dim=40, pooled_dim=12))
    with pytest.raises(ConfigError, match="dim 24, the model's 48"):
        Controlled(wide, [sd3])
    shape = FluxConfig(size=8, dim=60, double=2, single=3, heads=3, in_channels=5, context_dim=32, pooled_dim=12)
    flux = Controlled(Flux(shape), [union])
    x, hint = torch.randn(1, 5, 8, 8), torch.randn(1, 5, 8, 8)
    cond = {"context": torch.randn(1, 3, 32), "pooled": torch.randn(1, 12), "hint": hint}
    with pytest.raises(ConfigError, match="is told which"):
        flux(x, torch.tensor([500.0]), **cond)
    assert flux(x, torch.tensor([500.0]), hint_mode=torch.tensor([2]), **cond).shape == x.shape


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    their_control("flux").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {key: value for key, value in load_file(file).items() if key != "x_embedder.weight"}
    save_file(state, file)
    with pytest.raises(CheckpointError, match="x_embedder"):
        read_control(tmp_path)
