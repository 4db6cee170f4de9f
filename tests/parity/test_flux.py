"""FLUX.1: diffusers' own transformer and pipeline, small and with every weight random, both ways."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.clip import randomised
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.families.flux import config_of, lines
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.flux import PRESETS, Flux, FluxConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
AXES = (4, 6, 10)
SMALL: dict[str, Any] = {
    "in_channels": 20,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "axes_dims_rope": AXES,
}
KINDS: dict[str, dict[str, Any]] = {
    "schnell": {},
    "dev": {"guidance_embeds": True},
    "fill": {"guidance_embeds": True, "in_channels": 32, "out_channels": 12},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return randomised(diffusers.FluxTransformer2DModel(**{**SMALL, **KINDS[kind]}))


def shape_of(state: dict[str, Tensor], layout: str = DIFFUSERS) -> FluxConfig:
    return config_of(state, layout, "here", size=8, axes=AXES)


def answers(peer: Any, ours: Flux) -> tuple[Tensor, Tensor]:
    """For a picture that is not square; diffusers wants it packed, and is told where each patch lies."""
    rng, (height, width) = torch.Generator().manual_seed(5), (8, 12)
    pipe = diffusers.FluxPipeline
    x, t = torch.randn(2, ours.config.in_channels, height, width, generator=rng), torch.tensor([0.98125, 0.0035])
    context, pooled = torch.randn(2, 6, 10, generator=rng), torch.randn(2, 7, generator=rng)
    guidance = torch.tensor([3.5, 1.25]) if ours.config.guidance else None
    with torch.no_grad():
        said = peer(
            pipe._pack_latents(x, 2, ours.config.in_channels, height, width),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(6, 3),
        ).sample
        told = {} if guidance is None else {"guidance": guidance}
        return pipe._unpack_latents(said, height, width, 1), ours(x, 1000 * t, context=context, pooled=pooled, **told)


def test_the_network_of_diffusers_answers_the_same_here(peer: Any) -> None:
    config = shape_of(peer.state_dict())
    ours = Flux(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any) -> None:
    config = shape_of(peer.state_dict())
    ours = randomised(Flux(config), 2)
    assert isinstance(ours, Flux)
    fresh = diffusers.FluxTransformer2DModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours)
    torch.testing.assert_close(theirs, here, **CLOSE)


def test_the_original_layout_comes_back(peer: Any) -> None:
    state = peer.state_dict()
    config = shape_of(state)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    assert shape_of(original, ORIGINAL) == config
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("guidance", [False, True])
def test_the_original_layout_is_that_which_diffusers_converts(guidance: bool) -> None:
    """Its converter knows one width, 3072, and looks at rows alone: here each has three numbers."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        peer = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    rng = torch.Generator().manual_seed(3)
    state = {
        key: torch.randn(len(value), *(3 for _ in value.shape[1:]), generator=rng)
        for key, value in peer.state_dict().items()
    }
    config = replace(PRESETS["dev" if guidance else "schnell"], double=2, single=2)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("schnell", {}, 11_891_178_560),
        ("dev", {"guidance_embeds": True}, 11_901_408_320),
        ("dev-depth", {"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, 11_901_604_928),
        ("dev-fill", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, 11_902_391_360),
    ],
)
def test_names_shapes_and_counts_at_full_size(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        ours, theirs = Flux(PRESETS[name]), diffusers.FluxTransformer2DModel(**options)
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    shape = replace(PRESETS[name], out_channels=16)
    assert config_of(state, DIFFUSERS, "here", axes=(16, 56, 56)) == shape
    original = renamed(state, lines(shape), DIFFUSERS, ORIGINAL, "here")
    assert config_of(original, ORIGINAL, "here", axes=(16, 56, 56)) == shape
    assert original["double_blocks.18.img_attn.qkv.weight"].shape == (9216, 3072)
    assert original["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert sum(p.numel() for p in ours.parameters()) == count == sum(p.numel() for p in theirs.parameters())


def test_axes_are_the_published_ones_unless_said() -> None:
    assert replace(PRESETS["dev"], axes=None).turning == PRESETS["dev"].turning == (16, 56, 56)


def test_what_has_no_place_or_is_missing_is_named(peer: Any) -> None:
    state = peer.state_dict()
    config = shape_of(state)
    with pytest.raises(CheckpointError, match="encoder_hid_proj"):
        renamed({**state, "encoder_hid_proj.weight": torch.ones(1)}, lines(config), DIFFUSERS, OURS, "here")
    with pytest.raises(CheckpointError, match="x_embedder"):
        shape_of({key: value for key, value in state.items() if key != "x_embedder.weight"})
