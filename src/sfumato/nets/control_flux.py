"""A control of a FLUX transformer: copies of its first blocks read a picture beside x_t (InstantX, XLabs 2024).

The picture, encoded as latents are, or as pixels through convolutions, is added to x_t's patches through a projection
of zeros; what the tokens are after each copied block leaves through a linear layer of zeros. Each such tensor serves
several blocks of the network in a row, or, where the picture comes as pixels, all in turn. A control of several kinds
of pictures is told which it is by a token of its own before the words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.controlnet import Hint
from sfumato.nets.flux import DoubleBlock, Flux, FluxConfig, FluxEntry, SingleBlock
from sfumato.nets.layers import through, zeroed
from sfumato.nets.patches import folded, grid_of


@dataclass(frozen=True)
class FluxControlConfig:
    """The shape of a control of a FLUX transformer.

    net: that of the transformer, with the control's own numbers of blocks, and `guidance` where it is told a scale.
    modes: kinds of pictures that it knows, 0 for one. hint: widths of convolutions that read pixels, each after the
    first halves them; none for encoded pictures.
    """

    net: FluxConfig
    modes: int = 0
    hint: tuple[int, ...] = ()
    colours: int = 3

    @property
    def latents(self) -> bool:
        """Whether it reads encoded pictures."""
        return not self.hint

    @property
    def channels(self) -> int:
        """Of x_t, that it sees."""
        return self.net.in_channels


class FluxControl(FluxEntry):
    """x_t (B, C, H, W), times (B,) and a picture, encoded (B, C, H, W) or as pixels (B, colours, 8 H, 8 W) in [0, 1],
    to a tensor (B, L, dim) for each of its double blocks and then of its single ones.

    mode: (B,), for a control of several kinds. Other conditions are the network's. ConfigError for kinds that it does
    not know, and for none where it knows several.
    """

    def __init__(self, config: FluxControlConfig) -> None:
        super().__init__(config.net)
        self.config, shape = config, config.net
        self.double_blocks: Iterable[DoubleBlock] = nn.ModuleList(  # type: ignore[assignment]
            DoubleBlock(shape) for _ in range(shape.double)
        )
        self.single_blocks: Iterable[SingleBlock] = nn.ModuleList(  # type: ignore[assignment]
            SingleBlock(shape) for _ in range(shape.single)
        )
        self.kind = nn.Embedding(config.modes, shape.dim) if config.modes else None
        self.pixels = Hint(config.colours, config.hint, shape.in_channels) if config.hint else None
        self.hint = nn.Linear(shape.in_channels * shape.patch**2, shape.dim)
        if self.pixels is None:
            zeroed(self.hint)
        blocks = shape.double + shape.single
        self.leave = nn.ModuleList(zeroed(nn.Linear(shape.dim, shape.dim)) for _ in range(blocks))

    @classmethod
    def of(cls, net: Flux, double: int = 4, single: int = 10) -> "FluxControl":
        """A fresh control of the network's first blocks, which begins with its weights."""
        shape = net.config
        double, single = min(double, shape.double), min(single, shape.single)
        made = cls(FluxControlConfig(replace(shape, double=double, single=single)))
        own, there = made.state_dict(), net.state_dict()
        made.load_state_dict(
            own | {key: there[key] for key in own if key in there and there[key].shape == own[key].shape}
        )
        return made.to(net.entry.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        hint: Tensor,
        mode: Tensor | None = None,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> list[Tensor]:
        patch, grid = self.config.net.patch, grid_of(x, self.config.net.patch)
        read = hint if self.pixels is None else self.pixels(2 * hint - 1)
        tokens = self.entry(folded(x, patch)) + self.hint(folded(read, patch))
        words = None if self.context is None or context is None else self.context(context)
        words, context_mask = self._with_kind(words, context_mask, mode)
        before, mask = 0 if words is None else words.shape[1], None
        if words is not None and context_mask is not None:
            mask = torch.cat([context_mask, context_mask.new_ones(len(x), tokens.shape[1])], 1)
        told = (self.summary(t, label, pooled, guidance, until), mask, self.places(grid, before, x.device))
        passed = []
        for i, double in enumerate(self.double_blocks):
            tokens = self.near(tokens, "doubles", i, grid)
            tokens, words = through(double, self.checkpointing, tokens, words, *told)
            passed.append(tokens)
        tokens = tokens if words is None else torch.cat([words, tokens], 1)
        for i, single in enumerate(self.single_blocks):
            tokens = self.near(tokens, "singles", i, grid)
            tokens = through(single, self.checkpointing, tokens, *told)
            passed.append(tokens[:, before:])
        return [leave(one) for leave, one in zip(self.leave, passed, strict=True)]

    def _with_kind(
        self, words: Tensor | None, mask: Tensor | None, mode: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The words after the token of a kind, where kinds are known."""
        if self.kind is None or words is None:
            if mode is not None:
                raise ConfigError("this control knows one kind of picture", where="control.mode", fix="no mode")
            return words, mask
        if mode is None:
            fix = f"a number from 0 to {self.config.modes - 1}"
            raise ConfigError("a control of several kinds is told which", where="control.mode", seen="none", fix=fix)
        words = torch.cat([self.kind(mode)[:, None].to(words.dtype), words], 1)
        return words, None if mask is None else torch.cat([mask.new_ones(len(mask), 1), mask], 1)

    def placed(self, said: Sequence[Tensor], net: Flux) -> Sequence[Tensor | None]:
        """What is added after each block of the network, the double ones first."""
        own, theirs = self.config.net, net.config
        double, single = said[: own.double], said[own.double :]
        found = [_at(double, i, theirs.double, in_turn=self.pixels is not None) for i in range(theirs.double)]
        return [*found, *(_at(single, i, theirs.single) for i in range(theirs.single))]


def _at(said: Sequence[Tensor], i: int, blocks: int, in_turn: bool = False) -> Tensor | None:
    """What is added after block i of so many: each serves as many in a row, the last perhaps fewer."""
    if not said:
        return None
    return said[i % len(said)] if in_turn else said[i // -(-blocks // len(said))]
