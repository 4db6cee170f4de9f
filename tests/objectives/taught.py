"""What tests of students share: exact teachers, networks that know an answer, a small one that learns, a distance."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from oracles import FullMixture, Gaussian, Mixture
from sfumato.denoiser import Cond, Denoiser
from sfumato.guidance import Guidance, Unguided
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Path
from sfumato.predictions import X0, Prediction

Answer = Callable[[Tensor, Tensor], Tensor]


class Knows(nn.Module):
    """A network that says what a function of (x, t) makes of x0, moved by a parameter; it notes what it is told."""

    def __init__(self, answer: Answer, path: Path, prediction: Prediction = X0, by: float = 0.0) -> None:
        super().__init__()
        self.answer, self.path, self.prediction = answer, path, prediction
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.seen.append((t, cond))
        return self.prediction.answer(self.path, self.answer(x, t) + self.by, x, t)


def knows(answer: Answer, path: Path, prediction: Prediction = X0, by: float = 0.0) -> Denoiser:
    return Denoiser(Knows(answer, path, prediction, by), path, prediction)


def teacher_of(
    exact: Gaussian | Mixture | FullMixture, path: Path, cond: Cond | None = None, guidance: Guidance | None = None
) -> Teacher:
    """A teacher that knows all."""
    denoiser = knows(lambda x, t: exact.x0(path, x, t), path)
    return Teacher(denoiser, cond or {}, dict, guidance or Unguided())


def lesson(student: Denoiser, teacher: Teacher | None, slow: Denoiser | None = None, **more: int | None) -> Lesson:
    return Lesson(student, teacher, slow, **more)  # type: ignore[arg-type]


class Small(nn.Module):
    """An MLP for vectors (B, 2), which knows the time by its log_snr."""

    def __init__(self, path: Path, dim: int = 96) -> None:
        super().__init__()
        self.path = path
        self.layers = nn.Sequential(
            nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU()
        )
        self.exit = nn.Linear(dim, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = torch.atan2(self.path.sigma(t), self.path.alpha(t))[:, None]
        waves = torch.cat([torch.sin(2**k * angle) for k in range(3)] + [torch.cos(2**k * angle) for k in range(3)], 1)
        out: Tensor = self.exit(self.layers(torch.cat([x, waves], 1)))
        return out


def four_modes() -> Mixture:
    """Two dimensions, four unequal modes."""
    means = torch.tensor([[-1.2, -0.8], [1.1, -1.0], [0.9, 1.2], [-1.0, 1.0]], dtype=torch.float64)
    stds = torch.tensor([[0.15, 0.25], [0.2, 0.15], [0.25, 0.2], [0.15, 0.15]], dtype=torch.float64)
    return Mixture(torch.tensor([0.35, 0.25, 0.25, 0.15], dtype=torch.float64), means, stds)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """The mean 1-Wasserstein distance of equally many draws along fixed directions of the plane."""
    angle = torch.arange(directions, dtype=torch.float64) * (torch.pi / directions)
    turned = torch.stack([angle.cos(), angle.sin()])
    return float(((x.double() @ turned).sort(0).values - (y.double() @ turned).sort(0).values).abs().mean())


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)
