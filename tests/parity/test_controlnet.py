"""ControlNet: diffusers' own module and pipeline, small and with every weight random, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_stable_diffusion import KINDS, SMALL, heads_of
from tests.clip import randomised
from torch import Tensor

from sfumato.io.families.controlnet import config_of, lines, original
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.stable_unet import PRESETS

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HINT = (4, 6, 10, 14)
OPTIONS = {key: value for key, value in SMALL.items() if key not in ("sample_size", "up_block_types")}
OWN: dict[str, dict[str, Any]] = {
    **{kind: KINDS[kind] for kind in ("sd15", "sd21", "sdxl")},
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "grey": {"conditioning_channels": 1},
}


def their_control(kind: str, seed: int = 1) -> Any:
    options = {k: v for k, v in {**OPTIONS, **OWN[kind]}.items() if k != "up_block_types"}
    return randomised(diffusers.ControlNetModel(**options, conditioning_embedding_out_channels=HINT), seed)


@pytest.fixture(scope="module", params=OWN)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return their_control(kind)


def ours_of(peer: Any) -> ControlNet:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", {**peer.config, "attention_head_dim": heads_of(peer)})
    made = ControlNet(config).eval()
    made.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    return made


def answers(peer: Any, ours: ControlNet, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    rng = torch.Generator().manual_seed(5)
    x, t, context = (
        torch.randn(2, 4, 8, 12, generator=rng),
        torch.tensor([981, 3]),
        torch.randn(2, 7, 12, generator=rng),
    )
    hint = torch.rand(2, ours.config.colours, 64, 96, generator=rng)
    told: dict[str, Any] = {}
    own: dict[str, Tensor] = {}
    if kind == "sdxl":
        text, sizes = torch.randn(2, 10, generator=rng), torch.tensor([[64.0, 96, 0, 4, 64, 96]] * 2)
        told["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
        own["pooled"] = torch.cat([text, peer.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
    with torch.no_grad():
        said = peer(x, t, context, hint, **told)
        return [*said.down_block_res_samples, said.mid_block_res_sample], ours(
            x, t.float(), hint=hint, context=context, **own
        )


def same(here: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(here) == len(theirs) == 10
    for a, b in zip(here, theirs, strict=True):
        assert float(b.abs().max()) > 0.1
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_control_of_diffusers_answers_the_same_here(peer: Any, kind: str) -> None:
    theirs, here = answers(peer, ours_of(peer), kind)
    same(here, theirs)


def test_our_control_answers_the_same_in_diffusers(peer: Any, kind: str) -> None:
    ours = ours_of(peer)
    randomised(ours, 2)
    fresh = diffusers.ControlNetModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(ours.config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours, kind)
    same(here, theirs)


def test_the_original_layout_is_that_which_diffusers_converts(peer: Any, kind: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    state, ours = peer.state_dict(), ours_of(peer)
    made = original(ours)
    plain = {key.removeprefix("control_model."): value for key, value in made.items()}
    told = {**peer.config, "attention_head_dim": heads_of(peer)}
    assert config_of(plain, ORIGINAL, "here", told) == ours.config
    back = renamed(plain, lines(ours.config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    theirs = convert_controlnet_checkpoint(dict(made), {**peer.config})
    added = {key for key in state if key.startswith("add_embedding")}  # of which they know nothing here
    assert theirs.keys() == state.keys() - added and (kind == "sdxl") == bool(added)
    assert all(torch.equal(value, state[key]) for key, value in theirs.items())


@pytest.mark.parametrize(("name", "count"), [("sd15", 361_279_120), ("sd21", None), ("sdxl", None)])
def test_names_shapes_and_counts_at_full_size(name: str, count: int | None) -> None:
    config = PRESETS[name]
    options: dict[str, Any] = {
        "block_out_channels": config.channels,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": list(config.heads),
        "use_linear_projection": config.linear,
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in config.depths],
        "transformer_layers_per_block": [depth or 1 for depth in config.depths],
    }
    if config.pooled_dim:
        options |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        options["projection_class_embeddings_input_dim"] = config.pooled_dim
    with torch.device("meta"):
        ours, theirs = ControlNet(ControlNetConfig(config)), diffusers.ControlNetModel(**options)
    state = renamed(ours.state_dict(), lines(ours.config), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    if count is not None:
        assert sum(p.numel() for p in ours.parameters()) == count
