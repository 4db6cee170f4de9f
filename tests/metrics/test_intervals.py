"""Intervals against published examples, another library, and their own promise of 95%."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sfumato.metrics.intervals import Z, difference, mean_of_shares, ratio, wilson

# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("hits", "n", "low", "high"), NEWCOMBE)
def test_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_intervals_of_another_library(n: int) -> None:
    for hits in {0, 1, n // 3, n // 2, n - 1, n}:
        other = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
        assert wilson(hits, n) == pytest.approx((other.low, other.high), abs=1e-7)


def test_the_ends_are_exact() -> None:
    for n in (1, 10, 10_000):
        low, high = wilson(0, n)
        assert low == 0.0 and high == pytest.approx(Z**2 / (n + Z**2))  # the formula at share 0, by hand
        assert wilson(n, n)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_quantile_is_that_of_a_normal() -> None:
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-6) == Z


# Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10.
DIFFERENCES = [
    (56, 70, 48, 80, 0.0524, 0.3339),
    (9, 10, 3, 10, 0.1705, 0.8090),
    (10, 10, 0, 10, 0.6075, 1.0),
]


@pytest.mark.parametrize(("hits", "n", "others", "of", "low", "high"), DIFFERENCES)
def test_published_differences(hits: int, n: int, others: int, of: int, low: float, high: float) -> None:
    one, other = (hits / n, *wilson(hits, n)), (others / of, *wilson(others, of))
    assert difference(one, other) == pytest.approx((low, high), abs=5e-5)
    assert difference(other, one) == pytest.approx((-high, -low), abs=5e-5)


def test_a_difference_of_even_intervals_adds_their_squares() -> None:
    assert difference((0.5, 0.46, 0.54), (0.4, 0.37, 0.43)) == pytest.approx((0.05, 0.15))  # 3, 4 and 5


def test_the_mean_of_shares_by_hand() -> None:
    # 8/10 and 3/10: variances (10/14)(4/14)/14 and (5/14)(9/14)/14, together 85/2744; half the root of that, times Z.
    reach = Z * math.sqrt(85 / 2744) / 2
    assert mean_of_shares([(8, 10), (3, 10)]) == pytest.approx((0.55 - reach, 0.55 + reach))


def test_the_mean_of_shares_stays_within_0_and_1_and_narrows() -> None:
    assert mean_of_shares([(0, 5)] * 3)[0] == 0.0
    assert mean_of_shares([(5, 5)] * 3)[1] == 1.0
    widths = [high - low for low, high in (mean_of_shares([(n // 2, n)] * 6) for n in (100, 10_000, 1_000_000))]
    assert widths[1:] == pytest.approx([width / 10 for width in widths[:-1]], rel=0.03)


@pytest.mark.parametrize(
    ("truth", "most"), [((0.1, 0.9), 0.975), ((0.5, 0.5), 0.955), ((0.02, 0.6), 0.965), ((0.97, 0.99), 1)]
)
def test_the_mean_is_covered_as_often_as_promised(truth: tuple[float, float], most: float) -> None:
    """Exactly, over every outcome of two tasks of 40 prompts. Where all shares are extreme it errs to the safe side."""
    n, mean = 40, sum(truth) / 2
    covered = 0.0
    for hits in itertools.product(range(n + 1), repeat=2):
        low, high = mean_of_shares([(k, n) for k in hits])
        if low <= mean <= high:
            covered += math.prod(stats.binom.pmf(k, n, p) for k, p in zip(hits, truth, strict=True))
    assert 0.94 < covered < most


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.95])
def test_a_share_is_covered_as_often_as_promised(share: float) -> None:
    n = 60
    inside = [k for k in range(n + 1) if wilson(k, n)[0] <= share <= wilson(k, n)[1]]
    assert 0.92 < sum(stats.binom.pmf(k, n, share) for k in inside) < 0.985


def test_a_ratio_to_what_is_known_exactly_has_the_others_interval() -> None:
    assert ratio((0.6, 0.5, 0.65), (0.8, 0.8, 0.8)) == pytest.approx((0.75, 0.625, 0.8125))
    assert ratio((0.6, 0.6, 0.6), (0.8, 0.7, 0.9)) == pytest.approx((0.75, 0.6 / 0.9, 0.6 / 0.7), rel=0.02)
    assert ratio((0.0, 0.0, 0.1), (0.8, 0.8, 0.8)) == pytest.approx((0.0, 0.0, 0.125))
    assert ratio((0.1, 0.0, 0.2), (0.0, 0.0, 0.2)) is None and ratio((0.1, 0.0, 0.2), (0.1, 0.0, 0.3)) is None


def test_a_ratio_keeps_its_promise() -> None:
    """Of two means of twenty shares each, drawn with known probabilities, 95 of 100 intervals hold the true ratio."""
    rng, held, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        both = []
        for p in (0.6, 0.85):
            counts = [(int(hits), 20) for hits in rng.binomial(20, p, 6)]
            both.append((sum(hits for hits, _ in counts) / 120, *mean_of_shares(counts)))
        found = ratio(both[0], both[1])
        assert found is not None
        held += found[1] <= 0.6 / 0.85 <= found[2]
    assert 0.93 < held / runs < 0.98
