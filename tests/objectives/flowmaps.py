"""The beds of objectives for jumps: an exact student of one Gaussian, and a small network on three modes of a plane."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.exact import Gaussian, Mixture
from sfumato.guidance import Unguided
from sfumato.objectives.teaching import Follows, Judges, Lesson, Teacher
from sfumato.paths import Cosine, Linear, Path, SubVariancePreserving, Tabulated, VarianceExploding, VariancePreserving
from sfumato.predictions import VELOCITY, X0, Prediction
from sfumato.samplers import drive
from sfumato.samplers.ddim import ddim
from sfumato.samplers.jump import jump

PATHS: dict[str, Path] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "sub_vp": SubVariancePreserving(),
    "ve": VarianceExploding(20.0),
    "table": Tabulated("scaled_linear"),
}
DATA = Gaussian(torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), torch.tensor([0.6, 0.3, 1.1], dtype=torch.float64))
MODES = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]], dtype=torch.float64),
    torch.tensor([[0.2, 0.4], [0.3, 0.15], [0.2, 0.2]], dtype=torch.float64),
)


class Exact(nn.Module):
    """What a network with this prediction would say that knows every jump of the Gaussian, times a weight that is 1."""

    def __init__(self, path: Path, prediction: Prediction) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, *, until: Tensor | None = None) -> Tensor:
        x0 = self.weight * DATA.jump(self.path, x, t, t if until is None else until)
        return self.prediction.answer(self.path, x0, x, t)


def exact_student(path: Path, prediction: Prediction = X0) -> Denoiser:
    return Denoiser(Exact(path, prediction), path, prediction, answers=("jump",))


def exact_teacher(path: Path) -> Teacher:
    return Teacher(Denoiser(Exact(path, X0), path, X0).requires_grad_(False), {}, dict, Unguided())


class Plane(nn.Module):
    """Points of a plane (B, 2) and two times, as they are, through a perceptron; a label for the condition, if any."""

    def __init__(self, width: int = 128, labels: int = 0) -> None:
        super().__init__()
        self.label = nn.Embedding(labels + 1, 4) if labels else None
        inputs = 2 + 6 + (4 if labels else 0)
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.head = nn.Linear(width, 2)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        until: Tensor | None = None,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        until = t if until is None else until
        scale = torch.zeros_like(t) if guidance is None else guidance.to(t).log()
        parts = [x, torch.stack([t, t.sqrt(), until, t - until, until.sqrt(), scale], 1).to(x)]
        if self.label is not None:
            parts.append(self.label(torch.full((len(x),), 0) if label is None else label))
        out: Tensor = self.head(self.layers(torch.cat(parts, 1)))
        return out


def plane_student(seed: int = 0, prediction: Prediction = VELOCITY) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(Plane(), Linear(), prediction, answers=("jump",))


def trained(method: Any, prediction: Prediction, steps: int = 500, batch: int = 256, lr: float = 4e-3) -> Denoiser:
    """A small student of the three modes, taught from data alone; its average over the last hundred steps or so."""
    student = plane_student(prediction=prediction)
    critic = method.critic(student) if isinstance(method, Judges) else None
    slow, mean = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    learning = [*student.parameters(), *([] if critic is None else critic.parameters())]
    optimizer, rng = torch.optim.Adam(learning, lr=lr), torch.Generator().manual_seed(3)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        lesson = Lesson(student, slow=slow, critic=critic, step=k, steps=steps)
        optimizer.zero_grad()
        method(lesson, MODES.draw(batch, rng).float(), None, rng).value.backward()
        optimizer.step()
        kept = method.follow(k, steps) if isinstance(method, Follows) else 0.0
        for copied, decay in ((slow, kept), (mean, 0.99)):
            torch._foreach_lerp_(list(copied.parameters()), list(student.parameters()), 1 - decay)
    return mean


def distances(student: Denoiser) -> dict[int, tuple[float, float]]:
    """How far points of 1, 2 and 4 steps are from the data: the student's, and those of DDIM, which knows all means."""
    truth, found = MODES.draw(4000, torch.Generator().manual_seed(1)), {}
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for steps in (1, 2, 4):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        slowly = drive(ddim(Linear(), x, times), MODES.denoiser(Linear()))
        with torch.no_grad():
            jumped = drive(jump(Linear(), x.float(), times), student)
        found[steps] = (distance(jumped, truth), distance(slowly, truth))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """The sliced Wasserstein distance of as many points each: over 64 directions, of the mean distance of quantiles."""
    angles = torch.arange(64, dtype=torch.float64) * torch.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    one, other = ((points.double() @ directions).sort(0).values for points in (a, b))
    return float((one - other).abs().mean())
