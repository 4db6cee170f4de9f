"""Intervals for means, for shares, for means of shares and for differences."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964  # the 97.5% quantile of a normal


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): right also near 0 and 1, and for small n."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if hits == 0 else middle - reach), (1.0 if hits == n else middle + reach)


def mean_of_shares(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The 95% interval of the unweighted mean of independent shares, from (hits, n) of each.

    Normal, with each variance from Agresti and Coull's (hits + 2) / (n + 4), which is not zero at 0 or 1.
    """
    variance = 0.0
    for hits, n in counts:
        share = (hits + 2) / (n + 4)
        variance += share * (1 - share) / (n + 4)
    mean = sum(hits / n for hits, n in counts) / len(counts)
    reach = Z * math.sqrt(variance) / len(counts)
    return max(0.0, mean - reach), min(1.0, mean + reach)


def difference(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float]:
    """The 95% interval of one - other, independent estimates, each given as (estimate, low, high) with its interval.

    Square and add (Newcombe 1998, "Interval estimation for the difference", method 10): each end is as far away as the
    two ends that lead there, so it is right also where intervals are lopsided, near 0 and 1.
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, other
    return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def ratio(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float] | None:
    """one / other with its 95% interval, of two independent estimates that are not negative, each (value, low, high).

    By the variances that the two intervals stand for (MOVER-R: Donner & Zou 2012). None where the other's interval is
    so wide that nothing bounds the ratio.
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, other
    low_b, high_b = b_low * (2 * b - b_low), b_high * (2 * b - b_high)
    if b <= 0 or low_b <= 0 or high_b <= 0:
        return None
    below = math.sqrt(max(0.0, (a * b) ** 2 - a_low * (2 * a - a_low) * high_b))
    above = math.sqrt(max(0.0, (a * b) ** 2 - a_high * (2 * a - a_high) * low_b))
    return a / b, max(0.0, (a * b - below) / high_b), (a * b + above) / low_b


def told_share(hits: int, n: int) -> dict[str, Any]:
    """A share with its interval, as plain data."""
    low, high = wilson(hits, n)
    return {"score": round(hits / n, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def told_mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its standard error and 95% interval, as plain data; of one value, or of infinite ones, alone."""
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (n - 1) / n) if n > 1 else math.inf
    if not math.isfinite(error):
        return {"mean": round(mean, 5), "n": n}
    ends = {"low": round(mean - Z * error, 5), "high": round(mean + Z * error, 5)}
    return {"mean": round(mean, 5), "error": round(error, 5), **ends, "n": n}
