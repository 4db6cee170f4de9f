"""Coefficients: the integrals behind multistep and exponential methods, made once in float64 as plain floats.

A multistep method puts a polynomial through the last values of what it integrates, and integrates that exactly. In
half log_snr the ODE is linear but for a factor e^u or e^-u, which stays under the integral: that makes the method
exponential (Hochbruck & Ostermann 2010). Gauss-Legendre quadrature of 32 points is exact here to rounding for steps of
up to 60, and has none of the cancellation that the closed forms suffer for small steps.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def lagrange_integrals(nodes: Sequence[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """The integral over u in [start, end] of e^(rate (u - end)) L_k(u), for the Lagrange polynomial of each node.

    So the integral of e^(rate (u - end)) f(u) is the sum of these times f at the nodes, exactly if f is a polynomial
    of degree len(nodes) - 1.
    """
    half = (end - start) / 2
    u = start + half * (1 + _POINTS)
    weight = half * _WEIGHTS * np.exp(rate * (u - end))
    return _against_lagrange(nodes, u, weight)


def inverse_square_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integral over u from `end` up to `start`, both above 0, of u^-2 L_k(u), for each node's Lagrange polynomial.

    Summed in log u, where u^-1 is smooth however near to 0 the end is.
    """
    half = math.log(end / start) / 2
    u = start * np.exp(half * (1 + _POINTS))
    weight = -half * _WEIGHTS / u
    return _against_lagrange(nodes, u, weight)


def moments(h: float, rate: float) -> tuple[float, float, float]:
    """The integrals over s in [0, h] of e^(rate (s - h)) times 1, s / h and (s / h)^2."""
    s = (1 + _POINTS) / 2
    weight = h / 2 * _WEIGHTS * np.exp(rate * h * (s - 1))
    return float(np.sum(weight)), float(np.sum(weight * s)), float(np.sum(weight * s**2))


def _against_lagrange(nodes: Sequence[float], u: Numbers, weight: Numbers) -> list[float]:
    """The sums of the weights times each node's Lagrange polynomial at the points u."""
    sums = []
    for k, node in enumerate(nodes):
        factors = [(u - other) / (node - other) for j, other in enumerate(nodes) if j != k]
        sums.append(float(np.sum(weight * math.prod(factors))))
    return sums
