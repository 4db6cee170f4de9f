"""A class-conditional DiT made over into PixArt-alpha's network, which begins as the DiT was (Chen et al. 2023, 2.3).

A DiT's block i computes its own modulation S_i(t); PixArt's has one, S(t), for all, and an offset E_i learned a block.
S takes over the first block's, and E_i is set so that S + E_i is the DiT's S_i at one time t*, and so is the last
layer's. What is new, attention to words, begins by adding nothing. So at t* the network answers what the DiT answers
without a class, and everything that was learned of pictures stays of use while it learns words.
"""

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.model import Model
from sfumato.nets.dit import DiT
from sfumato.train.start import Start, model_of

SAME = (
    *("patch", "dim", "depth", "heads", "mlp_ratio", "in_channels", "out_channels"),
    *("positions", "qk_norm", "skips", "local", "activation"),
)


def reparameterise(model: Model, start: Start, time: float) -> None:
    """Fills the network of a fresh model from that of a start. time: t*, from 0 at the data to 1, noise.

    Takes the weights out of the start. ConfigError for networks between which there is no such way.
    """
    old = model_of(start, start.spec)
    before, net = old.net, model.net
    if not (isinstance(before, DiT) and isinstance(net, DiT)):
        seen = f"{type(before).__name__} and {type(net).__name__}"
        raise ConfigError("a DiT is made over into a DiT", where="reparameterise", seen=seen)
    _check(before, net)
    with torch.no_grad():
        own, there = net.state_dict(), before.state_dict()
        for name, value in own.items():
            if name in there and there[name].shape == value.shape:
                value.copy_(there[name])
        assert net.shared is not None and net.head.offset is not None and before.head.modulation is not None
        first = before.blocks[0].modulation  # type: ignore[index]
        net.shared.load_state_dict(first.state_dict())
        told, summary = _summaries(old, before, time)
        for block, theirs in zip(net.blocks, before.blocks, strict=True):
            assert block.offset is not None and theirs.modulation is not None
            block.offset.copy_((theirs.modulation(summary) - net.shared(told)).view_as(block.offset))
        net.head.offset.copy_((before.head.modulation(summary) - told.repeat(1, 2)).view_as(net.head.offset))


def _summaries(model: Model, net: DiT, time: float) -> tuple[Tensor, Tensor]:
    """What the DiT knows of a time alone, and of a time and that no class is said, where it knows that; (1, dim)."""
    t = model.denoiser.time_input(model.denoiser.path, torch.full((1,), time, dtype=torch.float64))
    told: Tensor = net.time(t.to(net.patches.weight.dtype))
    return told, told if net.label is None else told + net.label.weight[-1:]


def _check(before: DiT, net: DiT) -> None:
    for one, kind in ((before, "block"), (net, "shared")):
        if one.config.adaln != kind:
            what = f"{'the model to start from' if one is before else 'the new model'} has adaln: {kind}"
            raise ConfigError(what, where="model.net.adaln", seen=one.config.adaln, fix=f"adaln: {kind}")
    for name in SAME:
        was, now = (_of(one, name) for one in (before, net))
        if was != now:
            raise ConfigError(
                "the new network keeps the old one's shape", where=f"model.net.{name}", seen=f"{now}", fix=f"{was}"
            )


def _of(net: DiT, name: str) -> object:
    value = getattr(net.config, name)
    return net.config.in_channels if name == "out_channels" and value is None else value
