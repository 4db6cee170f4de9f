"""One optimizer step: pictures to a loss, gradients, the guards, the update."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.conditioners import dropped
from sfumato.config import Config
from sfumato.data.loader import Batch
from sfumato.data.picture import Image
from sfumato.model import Model
from sfumato.nets.layers import BF16_ARITHMETIC
from sfumato.objectives import Loss, Objective
from sfumato.train.keys import generator, key

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """The precision meant: "auto" is bf16 on devices that multiply it themselves, fp32 on others, which crawl."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and BF16_ARITHMETIC else "fp32"


class Outcome(NamedTuple):
    """What a step's forward and backward passes gave: the loss and the norm of the gradients before clipping."""

    loss: float
    norm: float


class Stepper:
    """The parts of a step that depend on the configuration and the device, and hold nothing of the run's progress."""

    def __init__(
        self, model: Model, objective: Objective, optimizer: Optimizer, config: Config, device: torch.device
    ) -> None:
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.config, self.device = config, device
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def gradients(self, batches: Sequence[Batch], step: int) -> Outcome:
        """Accumulates the gradients of some micro-batches, unscales and clips them. One wait for the device."""
        total = torch.zeros((), device=self.device)
        for micro, batch in enumerate(batches):
            torch.manual_seed(key(self.config.seed, "dropout", step, micro))
            loss = self.loss(batch, step, micro).value / len(batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.optim.clip or torch.inf, foreach=True)
        seen = torch.stack([total.float(), norm.float()]).tolist()
        return Outcome(*seen)

    def loss(self, batch: Batch, step: int, micro: int) -> Loss:
        """The objective on one micro-batch, with this address' times, noise and dropped conditions."""
        seed = self.config.seed
        kept = getattr(self.model.conditioner, "kept", ())
        raw = dropped(batch.fields, self.config.condition_dropout, generator(seed, "condition", step, micro), kept)
        x0 = encoded(self.model, batch.images, self.device)
        with self.autocast():
            return self.objective(self.model.denoiser, x0, self.model.cond(raw), generator(seed, "noise", step, micro))

    def update(self, rate: float) -> None:
        """Moves the weights by gradients that `gradients` found finite: a scaler, which looks at them too, agrees."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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


def encoded(model: Model, images: Image, device: torch.device) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as the network sees them, on its device."""
    pixels = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.codec.encode(pixels.float().div(127.5).sub(1).contiguous())
