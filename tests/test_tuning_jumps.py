"""Times of models that jump: the search, the score, and what a model that knows the exact ends should be told."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from sfumato.exact import three_modes
from sfumato.metrics.energy import energy_score
from sfumato.paths import Linear
from sfumato.samplers import drive
from sfumato.samplers.consistency import consistency
from sfumato.tuning.jumps import GOLDEN, best_levels


def test_levels_are_found_one_after_the_other() -> None:
    """Of a score with a valley for each level that is known, and asked no more often than golden sections need."""
    asked: list[Sequence[float]] = []
    valleys = [1.0, -0.5, -2.0]

    def score(levels: Sequence[float]) -> float:
        asked.append(list(levels))
        return sum(abs(a - b) for a, b in zip(levels, valleys, strict=False))

    found = best_levels(score, 4, lowest=-4.0, highest=4.0, rounds=16)
    assert found == pytest.approx(valleys, abs=8 * GOLDEN**16)
    assert found == sorted(found, reverse=True) and len(asked) == 3 * 18
    assert best_levels(score, 1) == []


def test_the_score_is_least_for_draws_from_the_same_distribution() -> None:
    rng = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, 20_000, 1, generator=rng)
    truth = normal()
    same = energy_score([normal(), normal()], truth)
    for wrong in (
        [0.6 * normal(), 0.6 * normal()],
        [1.5 * normal(), 1.5 * normal()],
        [normal() + 0.5, normal() + 0.5],
        [truth * 0, truth * 0],
    ):
        assert energy_score(wrong, truth) > same + 0.01
    assert same == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)  # E|x - y| / 2 of two standard normals


def test_a_blurred_model_wants_its_second_jump_where_it_is_sharp() -> None:
    """A model that answers with the mean: the score finds a second time that is better than most."""
    path, exact = Linear(), three_modes()
    truth = exact.draw(3000, torch.Generator().manual_seed(5))

    def drawn(levels: Sequence[float], seed: int) -> Tensor:
        times = [1.0, *(float(path.time(torch.tensor(-2 * one, dtype=torch.float64))) for one in levels), 0.0]
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(len(truth), 1, generator=noise, dtype=torch.float64)
        walk = consistency(path, x, torch.tensor(times, dtype=torch.float64), to="x0")
        return drive(walk, exact.denoiser(path), lambda x: torch.randn(x.shape, generator=noise, dtype=x.dtype))

    def score(levels: Sequence[float]) -> float:
        return energy_score([drawn(levels, 1), drawn(levels, 2)], truth)

    found = best_levels(score, 2)
    tried = [score([level]) for level in torch.linspace(-3, 3, 13).tolist()]
    assert score(found) < min(tried) + 2e-3 and score(found) < sorted(tried)[6] - 0.01
