"""Pixel U-Nets: diffusers' networks both ways, and the original layout by a network written from its description."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pixel_unets import GOOGLE, KINDS, unet
from tests.clip import randomised
from torch import Tensor

from sfumato.io.families.pixel_unet import Heads, Original, lines, seen_in
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.pixel_unet import PRESETS, PixelUNet, PixelUNetConfig

diffusers = pytest.importorskip("diffusers")

ORDERS = [Original(1), Original(1, True), Original(2)]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return unet(kind)


def config_of(peer: Any, kind: str) -> PixelUNetConfig:
    said = peer.config
    return seen_in(peer.state_dict(), DIFFUSERS, "here").config(
        Heads(channels=said.attention_head_dim or 0),
        size=16,
        groups=4,
        eps=said.norm_eps,
        pad_after=kind == "ddpm",
        sines_first=kind == "ddpm",
        include_end=kind == "ddpm",
    )


def answers(peer: Any, ours: PixelUNet) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 3, 16, 20, generator=rng), torch.tensor([981.0, 3.0])
    label = torch.tensor([6, 2]) if ours.config.classes else None
    with torch.no_grad():
        return peer(x, t, class_labels=label).sample, ours(x, t, label=label)


# The network


def test_the_network_of_diffusers_answers_the_same_here(peer: Any, kind: str) -> None:
    config = config_of(peer, kind)
    ours = PixelUNet(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any, kind: str) -> None:
    config = config_of(peer, kind)
    ours = PixelUNet(config)
    randomised(ours, 2)
    fresh = diffusers.UNet2DModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours)
    torch.testing.assert_close(theirs, here, **CLOSE)


@pytest.mark.parametrize("kept", ORDERS, ids=["early", "by head", "two axes"])
def test_the_original_layout_holds_the_same_weights(peer: Any, kind: str, kept: Original) -> None:
    state, config = peer.state_dict(), config_of(peer, kind)
    original = renamed(state, lines(config, kept), DIFFUSERS, ORIGINAL, "here")
    seen = seen_in(original, ORIGINAL, "here")
    assert seen.axes == kept.axes
    known = {
        name: getattr(config, name) for name in ("size", "groups", "eps", "pad_after", "sines_first", "include_end")
    }
    heads = Heads(channels=peer.config.attention_head_dim or 0)
    assert seen.config(heads, **known) == config
    back = renamed(original, lines(config, kept), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


GOOGLE_256 = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
GOOGLE_32 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
OPENAI: dict[str, Any] = {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 64}
DOWN, UP, LOW, HIGH = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
IMAGENET_64 = {
    **OPENAI,
    "sample_size": 64,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": (DOWN, LOW, LOW, LOW),
    "up_block_types": (HIGH, HIGH, HIGH, UP),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}
LSUN = {
    **OPENAI,
    "sample_size": 256,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": (DOWN, DOWN, DOWN, LOW, LOW, LOW),
    "up_block_types": (HIGH, HIGH, HIGH, UP, UP, UP),
}
ADM_256 = {**LSUN, "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "ddpm-32": ({**GOOGLE, **GOOGLE_32}, 35_746_307),
    "ddpm-256": ({**GOOGLE, **GOOGLE_256}, 113_673_219),
    "adm-64": ({**IMAGENET_64, "out_channels": 6}, 295_904_454),
    "adm-256": ({**ADM_256, "num_class_embeds": 1000}, 553_838_086),
    "adm-256-unconditional": (ADM_256, 552_814_086),
    "consistency-64": (IMAGENET_64, 295_899_267),
    "consistency-256": (LSUN, 526_304_771),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_at_full_size(name: str) -> None:
    options, count = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = PixelUNet(PRESETS[name]), diffusers.UNet2DModel(**options)
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == count


# The original layout, by a network written from its description, which reads nothing but the names in a file


def attended_as_adm(qkv: Tensor, heads: int, by_head: bool) -> Tensor:
    """Attention of rows (B, 3 C, L), one head at a time: which rows are which is all that the two orders differ in."""
    width = qkv.shape[1] // 3
    each = width // heads
    out = []
    for head in range(heads):
        if by_head:  # the rows of a head stand together: its queries, its keys, its values
            q, k, v = (qkv[:, (3 * head + i) * each : (3 * head + i + 1) * each] for i in range(3))
        else:  # all queries, all keys, all values
            q, k, v = (qkv[:, i * width + head * each : i * width + (head + 1) * each] for i in range(3))
        weights = torch.softmax(q.mT @ k / math.sqrt(each), -1)
        out.append(v @ weights.mT)
    return torch.cat(out, 1)


class ByHand:
    """A network of an original file: 2 residual blocks a level, 4 groups a norm, 4 channels a head."""

    def __init__(self, state: dict[str, Tensor], by_head: bool) -> None:
        self.state, self.by_head = state, by_head
        self.summary = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        half = self.state["time_embed.0.weight"].shape[1] // 2
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.summary = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
        self.summary = self.linear("time_embed.2", F.silu(self.summary))
        if label is not None:
            self.summary = self.summary + self.state["label_emb.weight"][label]
        kept, h, n = [], x, 0
        while self.has(f"input_blocks.{n}.0"):
            alone = n > 0 and n % 3 == 0
            h = self.entry(f"input_blocks.{n}", h, "down" if alone else None)
            kept.append(h)
            n += 1
        h, n = self.entry("middle_block", h, None), 0
        while self.has(f"output_blocks.{n}.0"):
            h = self.entry(f"output_blocks.{n}", torch.cat([h, kept.pop()], 1), "up")
            n += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), 1)

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.state)

    def entry(self, name: str, h: Tensor, way: str | None) -> Tensor:
        """The layers of a step, by what each of them is made of. On the way up, only the last may change the size."""
        i = 0
        while self.has(f"{name}.{i}"):
            layer = f"{name}.{i}"
            if f"{layer}.in_layers.0.weight" in self.state:
                h = self.residual(layer, h, way if way == "down" or i > 0 else None)
            elif f"{layer}.qkv.weight" in self.state:
                h = self.attention(layer, h)
            elif f"{layer}.op.weight" in self.state:
                h = self.conv(f"{layer}.op", h, 1, stride=2)
            elif f"{layer}.conv.weight" in self.state:
                h = self.conv(f"{layer}.conv", doubled(h), 1)
            else:
                h = self.conv(layer, h, 1)
            i += 1
            way = None if name == "middle_block" else way
        return h

    def residual(self, name: str, x: Tensor, way: str | None) -> Tensor:
        change = {None: lambda y: y, "down": lambda y: F.avg_pool2d(y, 2), "up": doubled}[way]
        h = self.conv(f"{name}.in_layers.2", change(F.silu(self.norm(f"{name}.in_layers.0", x))), 1)
        told = self.linear(f"{name}.emb_layers.1", F.silu(self.summary))[:, :, None, None]
        if told.shape[1] == 2 * h.shape[1]:
            scale, shift = told.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), 1)
        x = change(x)
        return h + (self.conv(f"{name}.skip_connection", x, 0) if self.has(f"{name}.skip_connection") else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        def product(part: str, h: Tensor) -> Tensor:
            return self.state[f"{name}.{part}.weight"].flatten(1) @ h + self.state[f"{name}.{part}.bias"][:, None]

        qkv = product("qkv", self.norm(f"{name}.norm", x).flatten(2))
        h = product("proj_out", attended_as_adm(qkv, x.shape[1] // 4, self.by_head))
        return x + h.unflatten(2, x.shape[2:])

    def linear(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name: str, h: Tensor, padding: int, stride: int = 1) -> Tensor:
        return F.conv2d(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=padding, stride=stride)

    def norm(self, name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 4, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)


def doubled(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("kept", ORDERS, ids=["early", "by head", "two axes"])
@pytest.mark.parametrize("resample", ["block", "convolution"])
@pytest.mark.parametrize("modulation", ["scale", "add"])
def test_an_original_file_is_the_network_of_its_names(kept: Original, resample: Any, modulation: Any) -> None:
    config = replace(config_of(unet("adm"), "adm"), resample=resample, modulation=modulation)
    net = PixelUNet(config).eval()
    randomised(net, 3)
    state = renamed(net.state_dict(), lines(config, kept), OURS, ORIGINAL, "here")
    rng = torch.Generator().manual_seed(5)
    x, t, label = torch.randn(2, 3, 16, 20, generator=rng), torch.tensor([981.0, 3.0]), torch.tensor([6, 2])
    with torch.no_grad():
        want = ByHand(state, kept.by_head)(x, t, label)
        torch.testing.assert_close(net(x, t, label=label), want, rtol=1e-4, atol=3e-4)
        wrong = ByHand(state, not kept.by_head)(x, t, label)
    assert (wrong - want).abs().max() > 0.01  # the other order would be another network
