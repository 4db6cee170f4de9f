"""Training the autoencoder of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021).

A picture is encoded to a normal distribution, a latent is drawn from it and decoded. What comes out is compared with
the picture pixel by pixel and by a distance that looks at every scale; a light pull to the standard normal
distribution keeps latents from drifting apart; and from some step on a discriminator of patches learns to tell
reconstructions from pictures, while the decoder learns to pass. Its weight is such that at the decoder's last layer its
gradient is as large as the reconstruction's. Everything is a mean over the picture's numbers, in nats where it has a
unit, so the published factor 1e-6 of the divergence is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from sfumato.errors import ConfigError
from sfumato.objectives.denoising import Loss
from sfumato.objectives.distances import Distance, Laplacian

LARGEST = 1e4  # of the adversary's weight, as published


class Posterior(Protocol):
    """The distribution of latents of some pictures."""

    def sample(self, noise: Tensor) -> Tensor: ...

    def kl(self) -> Tensor: ...

    @property
    def mean(self) -> Tensor: ...


class Coder(Protocol):
    """An autoencoder whose latents have a distribution."""

    def encode(self, images: Tensor) -> Posterior: ...

    def decode(self, z: Tensor) -> Tensor: ...

    @property
    def last(self) -> Tensor:
        """The weight of the decoder's last layer."""
        ...


class Discriminator(Protocol):
    """Pictures to logits of any shape with the batch first: high where they look drawn."""

    def __call__(self, images: Tensor, /) -> Tensor: ...


class Opponents(NamedTuple):
    """What learns: an autoencoder, its discriminator if there is one, and the step; None judges, without one."""

    coder: Coder
    discriminator: nn.Module | None
    step: int | None


@dataclass(frozen=True)
class Autoencoding:
    """How an autoencoder is trained.

    reconstruction: the difference of pixels, "l1" or "l2" (square). distance: a second one, that sees every scale,
    see `sfumato.objectives.distances`, or None; distance_weight: how much it counts. kl: the weight of the divergence
    from the standard normal distribution; 1e-6 is Stable Diffusion's. discriminator: the adversary, or None; start: the
    step from which on it learns and counts; adversarial_weight: how large its gradient is beside the reconstruction's.
    train: "all", or "decoder": the latents of an autoencoder that is fine-tuned then stay what they are.
    latents: how their scale is measured when the model is kept: "one" number, or a scale and a shift a "channel".
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    distance: Distance | None = Laplacian()
    distance_weight: float = 1.0
    kl: float = 1e-6
    discriminator: Discriminator | None = None
    start: int = 0
    adversarial_weight: float = 0.5
    train: Literal["all", "decoder"] = "all"
    latents: Literal["one", "channel"] = "one"

    def __post_init__(self) -> None:
        for name in ("distance_weight", "kl", "start", "adversarial_weight"):
            if not getattr(self, name) >= 0:
                seen = str(getattr(self, name))
                raise ConfigError(f"{name} is not negative", where=f"objective.{name}", seen=seen)

    def phase(self, step: int, steps: int) -> int:
        """0 before the discriminator counts, 1 from then on."""
        return int(self.discriminator is not None and step >= self.start)

    def __call__(
        self, model: Opponents, x0: Tensor, cond: Mapping[str, Tensor] | None = None, rng: Generator | None = None
    ) -> Loss:
        """x0: pictures (B, C, H, W) in [-1, 1]. The noise of the latents comes from `rng` on the CPU.

        The value's number is the reconstruction with its divergence, which can be compared over time; its gradient is
        that of everything, the discriminator's own loss included. each: the mean square errors. parts: all terms.
        """
        posterior = model.coder.encode(x0)
        noise = torch.randn(posterior.mean.shape, generator=rng).to(posterior.mean)
        drawn = model.coder.decode(posterior.sample(noise)).to(x0.dtype)
        error = (drawn - x0).flatten(1)
        pixels = error.abs().mean() if self.reconstruction == "l1" else error.square().mean()
        parts = {"pixels": pixels, "kl": posterior.kl().mean() / error.shape[1]}
        said = pixels
        if self.distance is not None:
            parts["distance"] = self.distance(drawn, x0).mean()
            said = said + self.distance_weight * parts["distance"]
        value = said + self.kl * parts["kl"]
        if model.discriminator is not None and model.step is not None and model.step >= self.start:
            contest = self._contest(model, model.discriminator, x0, drawn, said, parts)
            value = value + (contest - contest.detach())  # its gradient, and not its number
        each = error.detach().square().mean(1)
        parts["psnr"] = (10 * torch.log10(4 / each.clamp(min=1e-10))).mean()
        return Loss(value, each, None, {name: one.detach() for name, one in parts.items()})

    def _contest(
        self,
        model: Opponents,
        discriminator: nn.Module,
        x0: Tensor,
        drawn: Tensor,
        said: Tensor,
        parts: dict[str, Tensor],
    ) -> Tensor:
        """The adversary's part in the autoencoder's loss, and the loss of its own, both to be minimised at once."""
        frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
        logits: Tensor = functional_call(discriminator, frozen, (drawn,))
        fooled = -logits.float().mean()
        weight = self.adversarial_weight * adaptive_weight(said, fooled, model.coder.last)
        parts["adversarial"], parts["adversarial_weight"] = fooled, weight
        parts["discriminator"] = hinge(discriminator(x0), discriminator(drawn.detach()))
        return weight * fooled + parts["discriminator"]


def adaptive_weight(said: Tensor, fooled: Tensor, last: Tensor) -> Tensor:
    """|grad of the reconstruction| / |grad of the adversary| at the last layer (Esser et al. 2021, eq. 7), up to 1e4.

    Without that layer's gradient (nothing of it learns) it is 0.
    """
    if not last.requires_grad:
        return torch.zeros((), device=said.device)
    (of_said,) = torch.autograd.grad(said, last, retain_graph=True)
    (of_fooled,) = torch.autograd.grad(fooled, last, retain_graph=True)
    ratio: Tensor = of_said.float().norm() / (of_fooled.float().norm() + 1e-4)
    return ratio.clamp(0, LARGEST).detach()


def hinge(drawn: Tensor, reconstructed: Tensor) -> Tensor:
    """The discriminator's loss from its logits of pictures and of reconstructions (Lim & Ye 2017)."""
    return (F.relu(1 - drawn.float()).mean() + F.relu(1 + reconstructed.float()).mean()) / 2
