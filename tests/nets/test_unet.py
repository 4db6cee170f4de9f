"""The U-Net: ADM's sizes, its blocks against the formula, and its ways down and up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import UNET, inputs, made, normal, stirred

from sfumato.errors import ConfigError
from sfumato.nets.layers import resampled, sincos_2d
from sfumato.nets.unet import AttentionLayer, ResBlock, Stage, UNet, UNetConfig

# ADM (Dhariwal & Nichol 2021, appendix): size, widths, blocks, levels with attention, millions of parameters.
ADM = {
    64: ((192, 384, 576, 768), 3, (0, 1, 1, 1), 296),
    128: ((256, 256, 512, 768, 1024), 2, (0, 0, 1, 1, 1), 422),
    256: ((256, 256, 512, 512, 1024, 1024), 2, (0, 0, 0, 1, 1, 1), 554),
}


def adm(widths: tuple[int, ...], blocks: int, attention: tuple[int, ...], classes: int, out: int) -> int:
    """ADM's parameters from its description: what each of its layers holds, on the way down, at the bottom, and up."""
    dim = 4 * widths[0]

    def conv(inside: int, outside: int, side: int = 3) -> int:
        return inside * outside * side**2 + outside

    def residual(inside: int, outside: int) -> int:
        skip = 0 if inside == outside else conv(inside, outside, 1)
        return (
            2 * inside + conv(inside, outside) + (dim + 1) * 2 * outside + 2 * outside + conv(outside, outside) + skip
        )

    def attended(width: int) -> int:
        return 2 * width + 3 * (width + 1) * width + (width + 1) * width

    total = (widths[0] + 1) * dim + (dim + 1) * dim + classes * dim  # time and class
    total += conv(3, widths[0]) + 2 * widths[0] + conv(widths[0], out)  # the first and the last layers
    kept, last = [widths[0]], len(widths) - 1
    for level, width in enumerate(widths):
        for _ in range(blocks):
            total += residual(kept[-1], width) + attention[level] * attended(width)
            kept.append(width)
        if level < last:
            total += residual(width, width)
            kept.append(width)
    total += 2 * residual(widths[-1], widths[-1]) + attended(widths[-1])
    now = widths[-1]
    for level in range(last, -1, -1):
        for _ in range(blocks + 1):
            total += residual(now + kept.pop(), widths[level]) + attention[level] * attended(widths[level])
            now = widths[level]
        if level:
            total += residual(now, now)
    return total


@pytest.mark.parametrize("size", ADM)
def test_published_sizes(size: int) -> None:
    """ADM's own count is the published one, and ours is ADM's but for two things: the time's sinusoid has 256
    frequencies, not as many as the first level has channels, and there is a label more, for "none".
    """
    widths, blocks, attention, millions = ADM[size]
    config = UNetConfig(size, widths, blocks, attention, in_channels=3, out_channels=6, classes=1000)
    with torch.device("meta"):
        ours = sum(p.numel() for p in UNet(config).parameters())
    theirs, dim = adm(widths, blocks, attention, 1000, 6), 4 * widths[0]
    assert round(theirs / 1e6) == millions
    assert ours == theirs + (256 - widths[0]) * dim + dim


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"size": (8, 9)}, "channels"),
        ({"channels": (8, 16, 16), "attention": (0, 0, 0), "size": (8, 10)}, "channels"),
        ({"channels": ()}, "channels"),
        ({"channels": (6, 16)}, "channels"),
        ({"attention": (1,)}, "attention"),
        ({"blocks": (1, 1, 1)}, "blocks"),
        ({"blocks": (1, 0)}, "blocks"),
        ({"blocks": 0}, "blocks"),
        ({"head": 0}, "head"),
        ({"channels": (8, 20), "head": 3}, "head"),
    ],
)
def test_shapes_that_cannot_be_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        UNet(replace(UNET, **changes))
    assert caught.value.where == f"model.net.{where}"


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8,), "attention": (1,)},
        {"channels": (8, 8, 16), "attention": (2, 0, 1), "blocks": (1, 2, 1), "middle": 2},
        {"middle": 0, "attention": (0, 0)},
        {"head": 64},  # wider than any level: one head
        {"channels": (4, 12), "head": 4},
    ],
)
def test_other_shapes(changes: dict[str, Any]) -> None:
    net, (x, t) = made("unet", **changes), inputs()
    y = net(x, t)
    assert y.shape == x.shape
    y.backward(normal(*y.shape))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


# Blocks


def block_by_hand(block: ResBlock, x: torch.Tensor, summary: torch.Tensor, groups: tuple[int, int]) -> torch.Tensor:
    def norm(y: torch.Tensor, n: int, part: Any) -> torch.Tensor:
        g = y.unflatten(1, (n, -1)).flatten(2)
        g = (g - g.mean(2, keepdim=True)) / torch.sqrt(g.var(2, unbiased=False, keepdim=True) + 1e-5)
        return g.reshape(y.shape) * part.weight[:, None, None] + part.bias[:, None, None]

    def again(y: torch.Tensor) -> torch.Tensor:
        if block.resample == "down":
            return sum(y[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4  # type: ignore[return-value]
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3) if block.resample == "up" else y

    h = F.conv2d(again(F.silu(norm(x, groups[0], block.norm1))), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = (part[..., None, None] for part in block.modulation(summary).chunk(2, 1))
    h = F.silu(norm(h, groups[1], block.norm2) * (1 + scale) + shift)
    return block.skip(again(x)) + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)


@pytest.mark.parametrize(
    ("width", "out", "groups"), [(8, 8, (2, 2)), (8, 12, (2, 2)), (32, 8, (8, 2)), (128, 12, (32, 2))]
)
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_residual_block_is_its_formula(width: int, out: int, groups: tuple[int, int], resample: Any) -> None:
    block = stirred(ResBlock(width, out, 5, 0.0, resample).double())
    x, summary = normal(2, width, 4, 6), normal(2, 5, seed=1)
    want = block_by_hand(block, x, summary, groups)
    torch.testing.assert_close(block(x, summary), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_fresh_residual_blocks_are_their_shortcut(resample: Any) -> None:
    block = ResBlock(8, 8, 5, 0.0, resample)
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(block(x, torch.randn(2, 5)), resampled(x, block.resample))


@pytest.mark.parametrize("text", ["joint", "cross"])
def test_fresh_attention_layers_are_the_identity(text: Any) -> None:
    layer = AttentionLayer(replace(UNET, text=text, context_dim=6, feed=True), 16)
    x = torch.randn(2, 7, 16)
    assert torch.equal(layer(x, torch.randn(2, 5, 6), None), x)


def test_attention_is_over_the_pixels_of_a_level_in_their_places() -> None:
    stage = stirred(Stage(replace(UNET, channels=(8,), attention=(1,)), 8, 8, 5, 1).double())
    x, summary = normal(2, 8, 4, 6), normal(2, 5, seed=1)
    h = stage.residual(x, summary)
    tokens = torch.stack([h[:, :, i // 6, i % 6] for i in range(24)], 1) + sincos_2d(4, 6, 8)
    tokens = stage.attention[0](tokens, None, None)
    want = torch.stack([tokens[:, i] for i in range(24)], -1).reshape(2, 8, 4, 6)
    torch.testing.assert_close(stage(x, summary, None, None), want, rtol=0, atol=1e-12)


# The ways down and up


def test_each_feature_map_of_the_way_down_is_joined_once_on_the_way_up() -> None:
    net, sent, got = made("unet", channels=(8, 8, 16), blocks=(1, 2, 1), attention=(0, 0, 1)), [], []
    net.entry.register_forward_hook(lambda _, given, out: sent.append(out))  # type: ignore[union-attr]
    for stage in net.down:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda _, given, out: sent.append(out))
    for stage in net.up:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda stage, given, out: got.append((given[0], stage)))
    net(*inputs())
    joined = [(h, stage) for h, stage in got if stage.joins]
    assert len(joined) == len(sent) == 1 + (1 + 1) + (2 + 1) + 1
    for (h, _), skip in zip(joined, reversed(sent), strict=True):
        assert torch.equal(h[:, -skip.shape[1] :], skip)
    assert [tuple(s.shape[1:]) for s in sent] == [
        (8, 8, 12),
        (8, 8, 12),
        (8, 4, 6),
        (8, 4, 6),
        (8, 4, 6),
        (8, 2, 3),
        (16, 2, 3),
    ]


def test_patches_are_pixels_folded_into_channels() -> None:
    """A network of patches is a network of the folded picture."""
    net = made("unet", patch=2)
    inner = UNet(replace(net.config, patch=1, in_channels=12, size=(4, 6))).double()  # type: ignore[arg-type]
    inner.load_state_dict(net.state_dict())
    x, t = inputs()
    folded = x.unflatten(3, (6, 2)).unflatten(2, (4, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    want = inner(folded, t).unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
    torch.testing.assert_close(net(x, t), want, rtol=0, atol=1e-12)
