"""Improved and easy consistency training: fixed points, the doubling grid, how pairs are drawn, mapped and weighed."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from taught import knows, lesson, rng

from oracles import SHAPES, gaussian_like
from sfumato.errors import ConfigError
from sfumato.grids import logistic
from sfumato.objectives import EasyConsistencyTraining, ImprovedConsistencyTraining
from sfumato.objectives.improved_consistency import per_span
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, bounded, edm
from sfumato.times import LogNormal, Uniform

PATHS: tuple[Path, ...] = (Linear(), Cosine(), Tabulated(zero_terminal_snr=True), VarianceExploding(80.0))
paths = pytest.mark.parametrize("path", PATHS, ids=str)
FINE = partial(logistic, level=0.5, spread=1.3)


def test_the_grid_doubles_in_equal_parts_of_training() -> None:
    """400000 steps, 10 to 1280: 11, 21, ..., 1281, each for 50000 (Song & Dhariwal 2024, section 3.4)."""
    training = ImprovedConsistencyTraining()
    steps = 400_000
    assert [training.points(k / steps) for k in range(0, steps, 50_000)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert training.points(49_999 / steps) == 11 and training.points(1.0) == 1281
    assert ImprovedConsistencyTraining(first=10, last=100).points(1.0) == 81 + 20  # never more than last + 1


@paths
def test_pairs_are_drawn_as_the_normal_density_has_it(path: Path) -> None:
    training = ImprovedConsistencyTraining(FINE)
    times = FINE(path, 9)
    shares = training.shares(path, times)
    level = path.sigma(times) / path.alpha(times)

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((math.log(x) + 1.1) / (2.0 * math.sqrt(2)))) if x > 0 else 0.0

    want = [below(a) - below(b) for a, b in pairwise(level.tolist())]
    torch.testing.assert_close(shares, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    exact = gaussian_like((4, 1))
    student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path)
    loss = ImprovedConsistencyTraining(FINE, 9, 9)(lesson(student, None), exact.draw(20_000, rng()), rng=rng(1))
    seen = torch.stack([(loss.t - t).abs() < 1e-6 for t in times[:-1]]).double().mean(1)  # type: ignore[operator]
    torch.testing.assert_close(seen, shares / shares.sum(), rtol=0, atol=0.02)


def test_pairs_count_by_how_far_apart_they_are() -> None:
    high, low = torch.tensor([math.inf, 2.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(per_span("level", high, low), torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(per_span("angle", high, low), torch.tensor([4 / math.pi, 1 / math.atan(2.0)]))
    torch.testing.assert_close(per_span("flat", high, low), torch.ones(2))
    path, exact = Linear(), gaussian_like((4, 3))
    pair = lambda path, n: torch.tensor([0.6, 0.5], dtype=torch.float64)
    values = {}
    for span in ("level", "flat"):
        student = knows(lambda x, t: x * t.reshape(-1, 1), path)
        objective = ImprovedConsistencyTraining(pair, 1, 1, span=span)  # type: ignore[arg-type]
        values[span] = float(objective(lesson(student, None), exact.draw(8, rng()), rng=rng(1)).value.detach())
    assert values["level"] == pytest.approx(values["flat"] / (0.6 / 0.4 - 1.0), rel=1e-5)


def test_the_lower_level_of_easy_training() -> None:
    """r(t) at stages: at the first nothing but denoising at little noise, then ever nearer."""
    training = EasyConsistencyTraining(stages=4)
    level = torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=torch.float64)
    n = 1 + 8 * torch.sigmoid(-level)
    for progress, j in ((0.0, 1), (0.24, 1), (0.5, 3), (1.0, 4)):
        torch.testing.assert_close(training.lower(level, progress), (level * (1 - n / 2**j)).clamp(min=0))
    assert float(training.lower(level, 0.0)[:2].max()) == 0
    far = training.lower(torch.tensor([math.inf]), 0.5)
    assert float(far) == pytest.approx(80 * (1 - 1 / 8))  # pure noise counts as 80


@paths
@pytest.mark.parametrize("prediction", [X0, VELOCITY, edm(), bounded()], ids=lambda p: p.name)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_pairs_from_one_noise_bring_no_gradient_when_near(path: Path, prediction: Prediction, shape: tuple) -> None:  # type: ignore[type-arg]
    """For pairs that close in, the exact ends are stationary: the pull falls to the noise of the draws."""
    exact = gaussian_like(shape)
    x0 = exact.draw(4000, rng(1))

    def pull(objective: EasyConsistencyTraining, answer: object) -> float:
        student = knows(answer, path, prediction)  # type: ignore[arg-type]
        objective(lesson(student, None), x0, rng=rng(2)).value.backward()
        return abs(float(student.net.by.grad))  # type: ignore[union-attr, arg-type]

    near = EasyConsistencyTraining(Uniform(0.2, 0.8), 4096.0, 1, metric="l2", span="angle")
    exactly = pull(near, lambda x, t: exact.flow(path, x, t, 0.0))
    blurred = pull(near, lambda x, t: 1.3 * exact.flow(path, x, t, 0.0) + t.reshape(-1, *(1,) * (x.ndim - 1)))
    assert exactly < blurred / 20


def test_where_the_lower_end_is_the_data_it_is_denoising() -> None:
    path, exact = Linear(), gaussian_like((4, 3))
    x0 = exact.draw(64, rng())
    student = knows(lambda x, t: x * 0, path)
    loss = EasyConsistencyTraining(Uniform(0.1, 0.3), metric="l2")(lesson(student, None, step=0), x0, rng=rng(1))
    torch.testing.assert_close(loss.each, x0.square().mean(1))


def test_what_cannot_be_is_refused() -> None:
    for bad, where in (
        (lambda: ImprovedConsistencyTraining(first=0), "first"),
        (lambda: ImprovedConsistencyTraining(span="wide"), "span"),  # type: ignore[arg-type]
        (lambda: EasyConsistencyTraining(base=1.0), "base"),
        (lambda: EasyConsistencyTraining(stages=0), "base"),
        (lambda: EasyConsistencyTraining(c=-1.0), "c"),
    ):
        with pytest.raises(ConfigError) as caught:
            bad()
        assert caught.value.where == f"objective.{where}"
    noisy = knows(lambda x, t: x, Linear(), EPS)
    with pytest.raises(ConfigError, match="says nothing of the data"):
        ImprovedConsistencyTraining(FINE)(lesson(noisy, None), torch.zeros(2, 3), rng=rng())
    assert EasyConsistencyTraining().times == LogNormal(-1.1, 2.0)
