"""Controls of a run: ControlNets, each with its pictures, a scale, and the noise levels within which it speaks.

A control is one more condition of every branch of the guidance, and so a guidance itself: it leaves the answers alone,
and adds to what is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.codecs import Codec
from sfumato.data.given import given, recorded
from sfumato.data.picture import Image
from sfumato.errors import ConfigError
from sfumato.guidance import Branch, Guidance
from sfumato.guidance.core import ALWAYS, Interval, check_interval, within
from sfumato.image_conditions import encoded, stretched
from sfumato.nets.controlled import HINT, MODE, SCALE
from sfumato.nets.controlled import Control as AnyControl
from sfumato.paths import Path
from sfumato.settings import is_number
from sfumato.starts import one_each

KEYS = ("image", "scale", "interval", "mode")
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low quality")  # of FLUX's published union, by number


@dataclass(frozen=True)
class Control:
    """name: the control's. images: (N, H, W, 3) uint8, one for each picture that is drawn. scale: 0 is off.

    interval: noise levels sigma / alpha, (low, high], within which it speaks. said: the pictures, for the record.
    mode: of a control of several kinds of pictures, the number of this one.
    """

    name: str
    images: Image
    said: Sequence[Any]
    scale: float = 1.0
    interval: Interval = ALWAYS
    mode: int | None = None

    def part(self, start: int, stop: int) -> "Control":
        return replace(self, images=self.images[start:stop], said=self.said[start:stop])

    def plain(self, i: int) -> dict[str, Any]:
        """What a record says of it for picture i."""
        said = {"model": self.name, "image": self.said[i], "scale": self.scale, "interval": list(self.interval)}
        return said | ({} if self.mode is None else {"mode": self.mode})

    def hint(self, net: AnyControl, device: torch.device, codec: Codec) -> Tensor:
        """The pictures as the control reads them: (N, colours, H, W) in [0, 1], or encoded (N, C, h, w)."""
        pixels = torch.from_numpy(self.images).to(device).permute(0, 3, 1, 2).float() / 255
        if not net.config.latents:
            return pixels.mean(1, keepdim=True) if net.config.colours == 1 else pixels
        if getattr(net.config, "extra", 0):
            raise ConfigError("a control that is told a mask is not known here", where="control", seen=self.name)
        with torch.inference_mode():
            values = stretched(pixels) if getattr(net.config, "stretched", False) else 2 * pixels - 1
            return encoded(values, codec, shifted=not getattr(net.config, "unpooled", False))


def controls_of(asked: Mapping[str, Any] | None, n: int, size: tuple[int, int]) -> list[Control]:
    """What was asked for, checked. asked: by the control's name, a picture, or one for each of n, or a mapping
    {"image": ..., "scale": 1.0, "interval": (0, None)}.
    """
    found = []
    for name, one in (asked or {}).items():
        options = dict(one) if isinstance(one, Mapping) else {"image": one}
        if unknown := sorted(options.keys() - set(KEYS)):
            raise ConfigError("no such option of a control", where=name, seen=unknown[0], fix=", ".join(KEYS))
        if options.get("image") is None:
            raise ConfigError("a control needs a picture", where=name, seen="nothing", fix="{'image': 'edges.png'}")
        each = one_each(options["image"], n)
        scale = options.get("scale", 1.0)
        if not is_number(scale) or not np.isfinite(float(scale)):
            raise ConfigError("a control's scale is a number", where=name, seen=repr(scale), fix="1.0")
        low, high = options.get("interval") or ALWAYS
        check_interval((low, high))
        images, mode = np.stack([given(picture, size, name) for picture in each]), _mode(options.get("mode"), name)
        found.append(Control(str(name), images, [recorded(p) for p in each], float(scale), (low, high), mode))
    return found


def _mode(said: Any, name: str) -> int | None:
    """The number of a kind of picture, from a number or a name."""
    if isinstance(said, str) and said in MODES:
        return MODES.index(said)
    if said is None or (isinstance(said, int) and not isinstance(said, bool) and said >= 0):
        return said
    raise ConfigError("no such kind of picture", where=name, seen=repr(said), fix=", ".join(MODES))


@dataclass(frozen=True)
class Steered:
    """A guidance whose branches are told pictures too. hints: (B, colours, H, W), of each control; first: the number
    of the first of them among all controls of the network.
    """

    of: Guidance
    controls: Sequence[Control]
    hints: Sequence[Tensor]
    first: int = 0

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        told: dict[str, Tensor] = {}
        for i, (control, hint) in enumerate(zip(self.controls, self.hints, strict=True), self.first):
            if control.scale and within(control.interval, path, t):
                told[f"{HINT}{i or ''}"] = hint
                told[f"{SCALE}{i or ''}"] = hint.new_full((len(hint),), control.scale)
                if control.mode is not None:
                    told[f"{MODE}{i or ''}"] = hint.new_full((len(hint),), control.mode, dtype=torch.long)
        found = self.of.branches(path, t)  # a variant of the network knows nothing of controls
        return tuple(b if b.variant is not None else Branch({**b.cond, **told}) for b in found)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        return self.of.combine(path, x_t, t, answers)
