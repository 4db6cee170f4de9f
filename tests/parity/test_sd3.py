"""Stable Diffusion 3 and 3.5: diffusers' own MMDiT and pipeline, small and with every weight random, both ways."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.clip import randomised
from torch import Tensor

from sfumato.io.families.sd3 import config_of, lines
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.mmdit import PRESETS, MMDiT

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 5,
    "out_channels": 5,
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "caption_projection_dim": 24,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "pos_embed_max_size": 9,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "other": {"patch_size": 4, "out_channels": 3, "dual_attention_layers": (2,)},
}


def stirred(net: torch.nn.Module, seed: int = 1) -> Any:
    """Every parameter and every buffer random: the positions are one."""
    randomised(net, seed)
    rng = torch.Generator().manual_seed(seed)
    for buffer in net.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=rng))
    return net


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return stirred(diffusers.SD3Transformer2DModel(**{**SMALL, **KINDS[kind]}))


def answers(peer: Any, ours: MMDiT) -> tuple[Tensor, Tensor]:
    """For a picture that is neither square nor as large as the table: the middle of it is taken."""
    rng = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 5, 8, 12, generator=rng), torch.tensor([981.25, 3.5])
    context, pooled = torch.randn(2, 6, 10, generator=rng), torch.randn(2, 7, generator=rng)
    with torch.no_grad():
        said = peer(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t).sample
        return said, ours(x, t, context=context, pooled=pooled)


def test_the_network_of_diffusers_answers_the_same_here(peer: Any) -> None:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", size=8, head=8)
    ours = MMDiT(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any) -> None:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", size=8, head=8)
    ours = stirred(MMDiT(config), 2)
    fresh = diffusers.SD3Transformer2DModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours)
    torch.testing.assert_close(theirs, here, **CLOSE)


def test_the_original_layout_is_that_which_diffusers_converts(peer: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    state = peer.state_dict()
    config = config_of(state, DIFFUSERS, "here", size=8, head=8)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    assert config_of(original, ORIGINAL, "here", size=8, head=8) == config
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    told = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(told)
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], value) for key, value in state.items())


def test_what_no_answer_tells_apart_has_its_own_name(peer: Any) -> None:
    """Two biases that are added, and gains of queries and keys of one stream, could be exchanged unseen."""
    config = config_of(peer.state_dict(), DIFFUSERS, "here", size=8, head=8)
    ours = renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here")
    embed = peer.time_text_embed
    assert torch.equal(ours["time.mlp.2.bias"], embed.timestep_embedder.linear_2.bias)
    assert torch.equal(ours["pooled.2.bias"], embed.text_embedder.linear_2.bias)
    for i in config.dual if config.qk_norm else ():
        theirs = peer.transformer_blocks[i].attn2
        assert torch.equal(ours[f"blocks.{i}.image.second.q_norm.weight"], theirs.norm_q.weight)
        assert torch.equal(ours[f"blocks.{i}.image.second.k_norm.weight"], theirs.norm_k.weight)


def test_fresh_positions_are_those_of_diffusers() -> None:
    theirs = diffusers.SD3Transformer2DModel(**SMALL)
    ours = MMDiT(config_of(theirs.state_dict(), DIFFUSERS, "here", size=8, head=8))
    torch.testing.assert_close(ours.positions, theirs.pos_embed.pos_embed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("sd3-medium", {"num_layers": 24}, 2_028_328_000),
        (
            "sd3.5-medium",
            {
                "num_layers": 24,
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
            2_243_171_520,
        ),
        ("sd3.5-large", {"num_layers": 38, "qk_norm": "rms_norm"}, 8_056_627_520),
    ],
)
def test_names_shapes_and_counts_at_full_size(name: str, options: dict[str, Any], count: int) -> None:
    layers = options["num_layers"]
    more = {"num_attention_heads": layers, "caption_projection_dim": 64 * layers, "joint_attention_dim": 4096}
    base = {"pooled_projection_dim": 2048, "pos_embed_max_size": 192}
    with torch.device("meta"):
        ours = MMDiT(PRESETS[name])
        theirs = diffusers.SD3Transformer2DModel(**{**base, **more, **options})
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert config_of(state, DIFFUSERS, "here") == replace(PRESETS[name], out_channels=16)
    original = renamed(state, lines(PRESETS[name]), DIFFUSERS, ORIGINAL, "here")
    assert config_of(original, ORIGINAL, "here") == replace(PRESETS[name], out_channels=16)
    assert sum(p.numel() for p in ours.parameters()) == count == sum(p.numel() for p in theirs.parameters())
