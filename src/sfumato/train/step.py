"""One optimizer step: pictures to a loss, gradients, the guards, the update."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from sfumato.codecs import Latents
from sfumato.conditioners import Raw, dropped
from sfumato.config import Config
from sfumato.data.loader import Batch
from sfumato.data.picture import Image
from sfumato.denoiser import Cond
from sfumato.devices import moved
from sfumato.model import Model, Trainable
from sfumato.nets.layers import BF16_ARITHMETIC
from sfumato.objectives import Loss, Objective
from sfumato.objectives.teaching import Lesson
from sfumato.train.cache import Cache
from sfumato.train.keys import generator, key
from sfumato.train.optim import set_rate
from sfumato.train.pixels import pixels

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """The precision meant: "auto" is bf16 on devices that multiply it themselves, fp32 on others, which crawl."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and BF16_ARITHMETIC else "fp32"


class Outcome(NamedTuple):
    """What a step's forward and backward passes gave: the loss, the norm of the gradients before clipping, and those
    terms of the loss that the objective tells of.
    """

    loss: float
    norm: float
    parts: Mapping[str, float] = MappingProxyType({})


class Stepper:
    """The parts of a step that depend on the configuration and the device, and hold nothing of the run's progress."""

    def __init__(
        self, model: Trainable, objective: Objective, optimizer: Optimizer, config: Config, device: torch.device
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.config, self.device = config, device
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.clipped = model.clipped()
        self.cache: Cache | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def gradients(self, batches: Sequence[Batch], step: int, updates: int | None = None) -> Outcome:
        """Accumulates the gradients of some micro-batches, unscales and clips them. One wait for the device.

        updates: how many were made before, which is what objectives go by; fewer than steps where some were skipped.
        """
        total = torch.zeros((), device=self.device)
        parts: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            torch.manual_seed(key(self.config.seed, "dropout", step, micro))
            said = self.loss(batch, step, micro, updates)
            loss = said.value / len(batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
            for name, part in said.parts.items():
                parts[name] = parts.get(name, 0) + part / len(batches)
        self.scaler.unscale_(self.optimizer)
        most = self.config.optim.clip or torch.inf
        norms = [torch.nn.utils.clip_grad_norm_(part, most, foreach=True) for part in self.clipped]
        norm = (
            norms[0] if len(norms) == 1 else torch.stack([one.to(self.device) for one in norms]).norm()
        )  # a part without gradients has its norm on the CPU
        seen = torch.stack([one.float() for one in (total, norm, *parts.values())]).tolist()
        return Outcome(seen[0], seen[1], dict(zip(parts, seen[2:], strict=True)))

    def loss(self, batch: Batch, step: int, micro: int, updates: int | None = None) -> Loss:
        """The objective on one micro-batch, with this address' times, noise and dropped conditions."""
        seed = self.config.seed
        kept = getattr(getattr(self.model, "conditioner", None), "kept", ())
        fields = self.model.examples(batch.images, batch.fields, generator(seed, "examples", step, micro))
        raw = dropped(fields, self.config.condition_dropout, generator(seed, "condition", step, micro), kept)
        x0 = clean(self.model, batch, self.device, generator(seed, "latents", step, micro))
        rng = generator(seed, "noise", step, micro)
        with self.autocast():
            learner = self.learner(step if updates is None else updates, raw, batch)
            return self.objective(learner, x0, self.cond(raw), rng)

    def judged(self, batch: Batch, *address: str | int) -> Loss:
        """The objective on a batch that is not learned from, with this address' times and noise, whole conditions."""
        raw = self.model.examples(batch.images, batch.fields, generator(self.config.seed, "examples", *address))
        x0 = clean(self.model, batch, self.device, generator(self.config.seed, "latents", *address))
        with self.autocast():
            rng = generator(self.config.seed, *address)
            return self.objective(self.learner(None, raw, batch), x0, self.cond(raw), rng)

    def learner(self, step: int | None, raw: Sequence[Raw], batch: Batch) -> Any:
        """What the objective is called with; of pairs it is told their noise."""
        learner = self.model.learner(step, raw)
        if batch.pairs is None:
            return learner
        assert isinstance(learner, Lesson)  # pairs are made for methods only
        return replace(learner, noise=moved(torch.from_numpy(batch.pairs[:, 1]), self.device))

    def cond(self, raw: Sequence[Raw]) -> Cond:
        """What the network is told, computed or from the cache."""
        if self.cache is None or self.cache.states is None:
            return self.model.cond(raw)
        return self.cache.cond(raw, self.device)

    def update(self, rate: float) -> None:
        """Moves the weights by gradients that `gradients` found finite: a scaler, which looks at them too, agrees."""
        set_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Forgets the gradients. A scaler lowers its scale if they were not finite, and only then."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)


def clean(model: Trainable, batch: Batch, device: torch.device, rng: Generator) -> Tensor:
    """What the objective takes as data: pictures as the network sees them, from the cache where they come from there.

    rng: of latents that are drawn from their distribution, where the codec has them so.
    """
    if batch.pairs is not None:
        return moved(torch.from_numpy(batch.pairs[:, 0]), device)
    draws = bool(getattr(getattr(model, "codec", None), "sampled", False))
    if batch.moments is not None:
        mean, spread = moved(torch.from_numpy(batch.moments), device).unbind(1)
    elif draws and isinstance(model, Model):
        assert batch.images is not None and isinstance(model.codec, Latents)
        with torch.no_grad():
            mean, spread = model.codec.moments(pixels(batch.images, device))
    else:
        assert batch.images is not None
        return encoded(model, batch.images, device)
    if not draws:
        return mean.contiguous()
    return torch.addcmul(mean, spread, torch.randn(mean.shape, generator=rng).to(mean))


def encoded(model: Trainable, images: Image, device: torch.device) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as the network sees them, on its device."""
    with torch.no_grad():
        return model.encode(pixels(images, device))
