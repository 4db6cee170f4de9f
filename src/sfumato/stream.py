"""Streams: pictures from frames as they come, with a model of few steps and a prompt that is read once.

Image-to-image of one frame after another leaves the device half idle. So a new frame enters with every round, while
those before it are at their later steps, and one batched forward answers all of them (StreamDiffusion: Kodaira et al.
2023). A picture comes out with every round too, as many rounds late as a frame has steps. All frames have the same
noise, as the same prompt and seed would give it, so that what stands still in the frames stands still in the pictures.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.picture import Image
from sfumato.errors import ConfigError
from sfumato.orders import Order, Prompt
from sfumato.pipeline import Pipeline
from sfumato.settings import is_whole
from sfumato.starts import begin

Picture = Image  # (H, W, 3) uint8


class Stream:
    """Image-to-image for frames that come one after another.

    strength, seed, negative, size, settings: as of `Pipeline.sample`; what is not said is what the model recommends.
    A frame makes round(steps * strength) of the steps, at least one. at_once: frames that a round takes in, for devices
    with room for more: that many at once come out, and late. ConfigError, now, for what cannot be.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: Prompt = None,
        *,
        strength: float | None = None,
        seed: int = 0,
        negative: Prompt = None,
        size: int | tuple[int, int] | None = None,
        at_once: int = 1,
        **settings: Any,
    ) -> None:
        if not (is_whole(at_once) and at_once >= 1):
            raise ConfigError("a round takes in one frame or more", where="at_once", seen=repr(at_once), fix="1")
        self.pipeline, self.strength, self.at_once = pipeline, strength, int(at_once)
        self._order = pipeline.order(prompt, seed, size, negative, settings)
        if len(self._order.raw) != 1:
            raise ConfigError("a stream has one prompt", where="prompt", seen=str(len(self._order.raw)), fix="a text")
        self._of(np.zeros((*self._order.size, 3), np.uint8))  # a strength that cannot be is told before any frame
        with torch.inference_mode():
            self._guide = pipeline.guide(self._order)

    def __call__(self, frames: Iterable[Any]) -> Iterator[Picture]:
        """A picture (H, W, 3) uint8 for each frame, in order, as of `Pipeline.sample` with that frame for `image`.

        frames: paths, Pillow pictures or arrays (H, W, 3) uint8, fetched one round before they are needed: an endless
        iterator will do. Other sizes than the model's are cut and scaled to it.
        """
        together, waiting = self.pipeline.together(), iter(frames)
        ended: dict[int, Tensor] = {}
        following, over = 0, False
        while not over or len(together):
            fresh = [] if over else list(islice(waiting, self.at_once))  # the caller's own code, outside of ours
            over = over or len(fresh) < self.at_once
            with torch.inference_mode():
                for frame in fresh:
                    together.add(self.pipeline.job(self._of(frame), self._guide))
                ended |= together.round()
            ready = []
            while following in ended:
                ready.append(ended.pop(following))
                following += 1
            if ready:
                yield from self.pipeline.pictures(torch.cat(ready))

    def _of(self, frame: Any) -> Order:
        """The order of one frame."""
        order = self._order
        return replace(order, begin=begin(frame, None, self.strength, 1, order.size, order.settings.strength))
