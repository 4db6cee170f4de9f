"""Orders of convergence on three modes, by what each sampler's registry line promises, on every path.

The reference is the ODE's exact solution; half log_snr runs from -3 to 3, so that no step is infinite. Methods of an
order above 2 that lean on the past start by Runge-Kutta steps: a ramp from order 1 would cap them at 2.
"""

import math

import pytest
import torch
from bed import DETERMINISTIC, FIXED, PATHS, full_start, order, solved, truth

from sfumato.catalogue import SAMPLERS

SOLVERS = [name for name, line in FIXED.items() if line.order > 0]
START = {"start": "runge_kutta"}

# sampler, options, order: the first of each pair is what the paper or section 0 of the fact sheet says
VARIANTS = [
    *[("exp_ab", {"order": p, **START}, p) for p in (1, 2, 3, 4)],
    *[("deis", {"order": p, **START}, p) for p in (1, 2, 3, 4)],
    *[("lms", {"order": p, **START}, p) for p in (1, 2, 3, 4)],
    *[("ipndm", {"order": p, **START}, p) for p in (1, 2, 3, 4)],
    *[("ipndm", {"order": p, "variable": "sigma", **START}, p) for p in (2, 4)],
    *[("unipc", {"order": p, "variant": v, **START}, p + 1) for p in (1, 2) for v in ("bh1", "bh2")],
    *[("unipc", {"order": p, "corrector": False, **START}, p) for p in (1, 2, 3)],
    *[("exp_abm", {"order": p}, p + 1) for p in (1, 2)],
    ("dpmpp_2m", {"form": "heun"}, 2),
    ("dpmpp_2m", {"of": "noise"}, 2),
    ("dpmpp_2m", {"of": "noise", "form": "heun"}, 2),
    ("dpmpp_3m", {"of": "noise", **START}, 3),
    ("dpm_2", {"form": "heun"}, 2),
    ("dpm_2", {"r": 0.7}, 2),
    ("dpm_3", {"form": "heun"}, 3),
    *[("dpm_3", {"r1": 0.4, "form": form}, 3) for form in ("midpoint", "heun")],
    *[("dpm_3", {"r2": 0.8, "form": form}, 2) for form in ("midpoint", "heun")],  # sum b_i a_ij c_j = 1/6 needs 2/3
    ("dpmpp_2s", {"form": "heun"}, 2),
    ("pndm", START, 2),
    ("heun", {"variable": "time"}, 2),
    ("heun", {"variable": "angle"}, 2),
    ("rk4", {"variable": "time"}, 4),
    ("rk4", {"variable": "sigma"}, 4),
    ("rk4", {"variable": "angle"}, 4),
]
# what the ramp leaves of order 3, and of UniPC's 4
RAMPS = [*[(name, {"order": 3}, 2) for name in ("exp_ab", "deis", "lms", "ipndm")], ("dpmpp_3m", {}, 2)]
RAMPS += [("unipc", {"order": 3}, 3)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_is_what_the_registry_says(name, path) -> None:
    line = SAMPLERS[name]
    assert order(name, PATHS[path], **full_start(line)) == pytest.approx(line.order, abs=0.25)


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize(("name", "options", "expected"), VARIANTS, ids=lambda value: str(value))
def test_the_order_of_a_variant(name, options, expected, path) -> None:
    assert order(name, PATHS[path], **options) == pytest.approx(expected, abs=0.25)


def test_unipc_of_order_three_converges_with_the_fourth_power() -> None:
    assert order("unipc", PATHS["linear"], 160, order=3, **START) == pytest.approx(4, abs=0.25)


@pytest.mark.parametrize("of", ["data", "noise"])
def test_half_of_the_second_difference_leaves_3m_of_second_order(of) -> None:
    """The published coefficient against the exact one: a factor of 2 in code, an order in convergence."""
    path = PATHS["linear"]
    published, exact = (order("dpmpp_3m", path, 160, coef=c, of=of, **START) for c in ("published", "exact"))
    assert published == pytest.approx(2.1, abs=0.15)
    assert exact == pytest.approx(3, abs=0.15)


def test_the_published_ipndm_is_of_second_order_on_an_uneven_grid() -> None:
    assert order("ipndm", PATHS["linear"], coefficients="published", **START) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(("name", "options", "ramp"), RAMPS)
def test_a_ramp_caps_the_order_and_a_runge_kutta_start_does_not(name, options, ramp) -> None:
    """A step of first order at the start is an error of h^2. From half log_snr 0 on, where it is not a small one."""
    assert order(name, PATHS["linear"], low=0.0, start="ramp", **options) == pytest.approx(ramp, abs=0.25)
    assert order(name, PATHS["linear"], low=0.0, start="runge_kutta", **options) == pytest.approx(ramp + 1, abs=0.25)


@pytest.mark.parametrize("p", [2, 3])
def test_the_first_step_of_exp_abm_caps_its_order_at_3(p) -> None:
    assert order("exp_abm", PATHS["linear"], low=0.0, order=p) == pytest.approx(3, abs=0.25)


@pytest.mark.parametrize("name", [name for name, line in DETERMINISTIC.items() if line.order > 0 and not line.inverse])
@pytest.mark.parametrize("path", ["linear", "zero_terminal_snr"])
def test_from_pure_noise_to_the_data_everything_converges(name, path) -> None:
    """Both ends are infinite in half log_snr, and alpha = 0 at the first: the steps there are of first order."""
    on, line = PATHS[path], SAMPLERS[name]
    times = torch.linspace(1, 0, 121, dtype=torch.float64)
    few, many = (
        float((solved(line.fn, on, times[::every]) - truth(-math.inf, math.inf)).abs().max()) for every in (4, 1)
    )
    assert many < max(0.75 * few, 1e-4)
    assert many < (0.1 if line.order == 1 else 0.05)
