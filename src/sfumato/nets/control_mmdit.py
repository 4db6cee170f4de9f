"""A control of an MMDiT: its first blocks, copied, read an encoded picture beside x_t (SD3's ControlNets, 2024).

The picture's patches, through a projection of zeros, are added to x_t's, and what the tokens are after each of the
copied blocks leaves through a linear layer of zeros. The network has more blocks than the control: each of its own adds
what the control's block at the same share of the depth said. The first published ones hide the pooled prompt from
the control, and their picture is encoded without the codec's shift.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sfumato.nets.layers import through, zeroed
from sfumato.nets.mmdit import JointBlock, JointEntry, MMDiT, MMDiTConfig
from sfumato.nets.patches import grid_of


@dataclass(frozen=True)
class MMDiTControlConfig:
    """The shape of a control of an MMDiT.

    net: that of the MMDiT, with the control's own depth; without `context_dim` it does not see the prompt's words.
    extra: channels of the picture beyond those of latents (a mask). unpooled: it is not told the pooled prompt, and its
    picture is encoded without a shift. shares: x_t comes in through the network's own way. stretched: its picture, x in
    [0, 1], is encoded as 127.5 x + 0.5, as that of the published control for edges.
    """

    net: MMDiTConfig
    extra: int = 0
    unpooled: bool = False
    shares: bool = False
    stretched: bool = False

    latents: ClassVar[bool] = True  # it reads encoded pictures
    colours: ClassVar[int] = 3

    @property
    def channels(self) -> int:
        """Of x_t, that it sees."""
        return self.net.in_channels


class MMDiTControl(JointEntry):
    """x_t (B, C, H, W), times (B,) and an encoded picture (B, C + extra, H, W) to a tensor (B, L, dim) for each of its
    blocks. tokens: where the network's way in is shared, what it made of x_t. Other conditions are the network's.
    """

    def __init__(self, config: MMDiTControlConfig) -> None:
        super().__init__(config.net, entry=not config.shares)
        self.config, shape = config, config.net
        self.shares = config.shares
        self.blocks: Iterable[JointBlock] = nn.ModuleList(  # type: ignore[assignment]
            JointBlock(shape, dual=i in shape.dual, last=False) for i in range(shape.depth)
        )
        self.hint = zeroed(nn.Conv2d(shape.in_channels + config.extra, shape.dim, shape.patch, stride=shape.patch))
        self.leave = nn.ModuleList(zeroed(nn.Linear(shape.dim, shape.dim)) for _ in range(shape.depth))

    @classmethod
    def of(cls, net: MMDiT, depth: int = 12) -> "MMDiTControl":
        """A fresh control of the network's first blocks, all but the last at most, which begins with its weights."""
        shape = net.config
        depth = max(1, min(depth, shape.depth - 1))
        made = cls(MMDiTControlConfig(replace(shape, depth=depth, dual=tuple(i for i in shape.dual if i < depth))))
        own = made.state_dict()
        there = net.state_dict()
        made.load_state_dict(
            own | {key: there[key] for key in own if key in there and there[key].shape == own[key].shape}
        )
        return made.to(net.head.out.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        hint: Tensor,
        tokens: Tensor | None = None,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> list[Tensor]:
        pooled = torch.zeros_like(pooled) if self.config.unpooled and pooled is not None else pooled
        entered = (self.tokens(x) if tokens is None else tokens) + self.hint(hint).flatten(2).mT
        words, mask = self.words(context, context_mask, entered.shape[1])
        summary, said = self.summary(t, label, pooled, guidance, until), []
        grid = grid_of(x, self.config.net.patch)
        for i, (block, leave) in enumerate(zip(self.blocks, self.leave, strict=True)):
            entered = self.near(entered, i, grid)
            entered, words = through(block, self.checkpointing, entered, words, summary, mask)
            said.append(leave(entered))
        return said

    def placed(self, said: Sequence[Tensor], net: MMDiT) -> Sequence[Tensor | None]:
        """What is added after each block of the network but the last, by its share of the depth."""
        depth = net.config.depth
        return [said[i * len(said) // depth] for i in range(depth - 1)]
