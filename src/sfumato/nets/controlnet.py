"""ControlNet (Zhang et al. 2023): a copy of a U-Net's way down that reads a picture beside x_t, and adds to its skips.

The copy begins with the U-Net's own weights; what the picture becomes enters after the first convolution, through one
of zeros, and what the copy says leaves through convolutions of zeros. So at the start the U-Net answers as it did, and
the base, which stays frozen, keeps all it knows. Several controls add up; each is weighted by a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import zeroed
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig, WayDown


@dataclass(frozen=True)
class ControlNetConfig:
    """The shape of a ControlNet.

    unet: of the U-Net whose way down it copies; its `size` and `out_channels` are of no account. hint: widths of the
    convolutions that read the picture; each after the first halves it, so that the 4 of the published ones make it 8
    times smaller. colours: of the picture. bgr: whether its channels are turned round before they are read.
    """

    unet: StableUNetConfig
    hint: tuple[int, ...] = (16, 32, 96, 256)
    colours: int = 3
    bgr: bool = False

    latents: ClassVar[bool] = False  # it reads a picture's pixels

    @property
    def channels(self) -> int:
        """Of x_t, that it sees."""
        return self.unet.in_channels


class ControlNet(WayDown):
    """x_t (B, C, h, w), times (B,) and a picture (B, colours, H, W) in [0, 1] to what is added to a U-Net: a tensor for
    each of its skips, in the order of the way down, and one for its middle.

    Other conditions are those of the U-Net. ConfigError for a picture that is not as much larger than x_t as `hint`
    makes it smaller.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.config = config
        if not config.hint or config.colours < 1:
            seen = f"hint {list(config.hint)}, colours {config.colours}"
            raise ConfigError("a control reads a picture", where="control.hint", seen=seen, fix="[16, 32, 96, 256]")
        self.hint = Hint(config.colours, config.hint, config.unet.channels[0])
        self.leave = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in self.widths)
        self.leave_middle = zeroed(nn.Conv2d(config.unet.channels[-1], config.unet.channels[-1], 1))

    @classmethod
    def of(cls, net: StableUNet, **changes: object) -> "ControlNet":
        """A fresh control of a U-Net, which begins with its weights. changes: of `ControlNetConfig`."""
        made = cls(replace(ControlNetConfig(net.config), **changes))  # type: ignore[arg-type]
        own = made.state_dict()
        made.load_state_dict(own | {key: value for key, value in net.state_dict().items() if key in own})
        return made.to(net.entry.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        hint: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> list[Tensor]:
        self.check_size(x)
        read = self.hint(hint.flip(1) if self.config.bgr else hint)
        entered = self.entry(x)
        if read.shape[2:] != entered.shape[2:]:
            factor = 2 ** (len(self.config.hint) - 1)
            seen = f"{hint.shape[-2]}x{hint.shape[-1]} for {x.shape[-2]}x{x.shape[-1]}"
            what = f"a control's picture is {factor} times the size of what the network sees"
            raise ConfigError(what, where="control", seen=seen)
        told = (self.summary(x, t, pooled, guidance, until), context, context_mask)
        kept, middle = self.descended(entered + read, told)
        return [*(leave(one) for leave, one in zip(self.leave, kept, strict=True)), self.leave_middle(middle)]

    def placed(self, said: Sequence[Tensor], net: StableUNet) -> Sequence[Tensor]:
        """What is added where: it has a place for each."""
        return said


class Hint(nn.Module):
    """Convolutions from a picture to a map of the U-Net's first width, the last of zeros."""

    def __init__(self, colours: int, widths: Sequence[int], out: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(colours, widths[0], 3, padding=1)]
        for width, wider in pairwise(widths):
            convs.append(nn.Conv2d(width, width, 3, padding=1))
            convs.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.convs = nn.ModuleList([*convs, zeroed(nn.Conv2d(widths[-1], out, 3, padding=1))])

    def forward(self, picture: Tensor) -> Tensor:
        x = picture
        for i, conv in enumerate(self.convs):
            x = conv(F.silu(x) if i else x)
        return x
