"""How much each noise level counts. A weight is a function of log_snr, stated for the error of one prediction.

The published names are stated here as in their papers; `Denoising` converts. So `MinSNR` is min(SNR, gamma) on the x0
loss, which is min(SNR, gamma) / SNR for a noise-predicting network and t^2 min(SNR, gamma) for a velocity on the
linear path, without anyone having to know. Weights that are densities over log_snr say so (`per_log_snr`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sfumato.predictions import EPS, X0, Prediction


class Weight(Protocol):
    """w(log_snr), for the error of `space` (None: the network's own prediction)."""

    space: ClassVar[Prediction | None]
    per_log_snr: ClassVar[bool]

    def __call__(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Flat:
    """1 on the network's own error: DDPM's "simple" loss for eps, rectified flow's for the velocity."""

    space: ClassVar[Prediction | None] = None
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023)."""

    gamma: float = 5.0
    space: ClassVar[Prediction | None] = X0
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """SNR gamma / (SNR + gamma) on the x0 error (Crowson et al. 2024); gamma = 1 / sigma_data^2."""

    gamma: float = 4.0
    space: ClassVar[Prediction | None] = X0
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return 1 / (torch.exp(-log_snr) + 1 / self.gamma)


@dataclass(frozen=True)
class TruncatedSNR:
    """max(SNR, 1) on the x0 error (Salimans & Ho 2022)."""

    space: ClassVar[Prediction | None] = X0
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr).clamp(min=1)


@dataclass(frozen=True)
class SNRPlusOne:
    """SNR + 1 on the x0 error: uniform in v on a variance-preserving path (Salimans & Ho 2022).

    most: SNR counts only up to it. A network that predicts x0 itself is never exact, so without an end its error at
    very little noise outweighs all others.
    """

    most: float = math.inf
    space: ClassVar[Prediction | None] = X0
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr).clamp(max=self.most) + 1


@dataclass(frozen=True)
class EDM:
    """SNR + 1 / sigma_data^2 on the x0 error (Karras et al. 2022): 1 on the error of F."""

    sigma_data: float = 0.5
    space: ClassVar[Prediction | None] = X0
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class P2:
    """1 / (k + SNR)^gamma on the noise error (Choi et al. 2022)."""

    k: float = 1.0
    gamma: float = 1.0
    space: ClassVar[Prediction | None] = EPS
    per_log_snr: ClassVar[bool] = False

    def __call__(self, log_snr: Tensor) -> Tensor:
        return (self.k + torch.exp(log_snr)) ** -self.gamma


@dataclass(frozen=True)
class ELBO:
    """The variational bound: 1 on the noise error per unit of log_snr (Kingma et al. 2021)."""

    space: ClassVar[Prediction | None] = EPS
    per_log_snr: ClassVar[bool] = True

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(bias - log_snr) on the noise error per unit of log_snr (Kingma & Gao 2023; Hoogeboom et al. 2024)."""

    bias: float = 2.0
    space: ClassVar[Prediction | None] = EPS
    per_log_snr: ClassVar[bool] = True

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(self.bias - log_snr)
