"""The same numbers as diffusers' schedulers, on the same grid with the same network, to their float32 noise.

The network is a smooth function of the state and the index, so that only the samplers can differ.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.denoiser import Bound
from sfumato.exact import Gaussian
from sfumato.grids import linspace, trailing
from sfumato.paths import Linear, Tabulated
from sfumato.samplers import Draw, drive
from sfumato.samplers.adams import deis
from sfumato.samplers.ancestral import euler_ancestral
from sfumato.samplers.ddim import ddim
from sfumato.samplers.ddpm import ddpm
from sfumato.samplers.dpm_solver import dpmpp_2m, dpmpp_3m
from sfumato.samplers.runge_kutta import euler
from sfumato.samplers.sde_dpm_solver import sde_dpmpp
from sfumato.samplers.unipc import unipc

diffusers = pytest.importorskip("diffusers")

TABLE = Tabulated("scaled_linear")
COMMON = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
N = 10


def noise_of(x: Tensor, index: float) -> Tensor:
    """The network's eps."""
    return 0.8 * torch.tanh(x) + 0.1 * torch.cos(torch.tensor(index / 200.0, dtype=x.dtype)) * x


def model(path: Tabulated = TABLE) -> Bound:
    def x0(x: Tensor, t: float | Tensor) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64)
        eps = noise_of(x, float(path.index(time)))
        return (x - path.sigma(time) * eps) / path.alpha(time)

    return Bound(path, x0)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def theirs(scheduler: Any, x: Tensor, noise: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """What a scheduler makes of a state of the table's last noise, and the times that it asked at, for ours."""
    scheduler.set_timesteps(N)
    state, asked = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, t)
        asked.append(float(t))
        state = scheduler.step(noise_of(seen, float(t)), t, state).prev_sample
    times = TABLE.at(torch.tensor(asked, dtype=torch.float64))
    end = TABLE.at(times.new_zeros(1)) if float(getattr(scheduler, "sigmas", [0])[-1]) > 0 else times.new_zeros(1)
    return state, torch.cat([times, end])


def close(ours: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(ours, other.double(), rtol=3e-5, atol=3e-5)


DETERMINISTIC = {
    "ddim": (lambda: diffusers.DDIMScheduler(**COMMON, clip_sample=False, timestep_spacing="trailing"), ddim, {}),
    "ddim clipped": (
        lambda: diffusers.DDIMScheduler(**COMMON, clip_sample_range=0.4, timestep_spacing="trailing"),
        ddim,
        {"clip": 0.4},
    ),
    "dpmpp_2m": (lambda: diffusers.DPMSolverMultistepScheduler(**COMMON), dpmpp_2m, {}),
    "dpmpp_2m heun": (
        lambda: diffusers.DPMSolverMultistepScheduler(**COMMON, solver_type="heun"),
        dpmpp_2m,
        {"form": "heun"},
    ),
    "dpmpp_3m": (
        lambda: diffusers.DPMSolverMultistepScheduler(**COMMON, solver_order=3),
        dpmpp_3m,
        {"coef": "published", "form": "midpoint"},
    ),
    **{
        f"unipc {order} {kind}": (
            lambda order=order, kind=kind: diffusers.UniPCMultistepScheduler(
                **COMMON,
                solver_order=order,
                solver_type=kind,
                final_sigmas_type="sigma_min" if kind == "bh1" else "zero",  # theirs is not a number at 0
            ),
            unipc,
            {"order": order, "variant": kind},
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    },
    "deis 2": (lambda: diffusers.DEISMultistepScheduler(**COMMON, solver_order=2), deis, {"order": 2}),
    "deis 3": (lambda: diffusers.DEISMultistepScheduler(**COMMON, solver_order=3), deis, {"order": 3}),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers(name: str, start: Tensor) -> None:
    make, ours, options = DETERMINISTIC[name]
    state, times = theirs(make(), start)
    with torch.no_grad():
        close(drive(ours(TABLE, start, times, **options), model()), state)


def test_euler_in_the_noise_level(start: Tensor) -> None:
    """In x / alpha: their state starts at x / alpha of the first time."""
    scheduler = diffusers.EulerDiscreteScheduler(**COMMON, timestep_spacing="trailing")
    scheduler.set_timesteps(N)
    alpha = float(TABLE.alpha(TABLE.at(scheduler.timesteps[:1].double()))[0])
    state = start / alpha
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, t)
        state = scheduler.step(noise_of(seen, float(t)), t, state).prev_sample
    times = TABLE.at(torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)]))
    close(drive(euler(TABLE, start, times), model()), state)


class Recorded:
    """One sequence of noise for both sides."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(7)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.rng, dtype=torch.float64)


STOCHASTIC = {
    "ddpm small": (
        lambda: diffusers.DDPMScheduler(
            **COMMON, variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing"
        ),
        ddpm,
        {},
    ),
    "ddpm large": (
        lambda: diffusers.DDPMScheduler(
            **COMMON, variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"
        ),
        ddpm,
        {"variance": "large"},
    ),
    "sde 1": (
        lambda: diffusers.DPMSolverMultistepScheduler(**COMMON, algorithm_type="sde-dpmsolver++", solver_order=1),
        sde_dpmpp,
        {"order": 1},
    ),
    "sde 2": (
        lambda: diffusers.DPMSolverMultistepScheduler(**COMMON, algorithm_type="sde-dpmsolver++", solver_order=2),
        sde_dpmpp,
        {"order": 2},
    ),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_given_the_same_noise(name: str, start: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    make, ours, options = STOCHASTIC[name]
    drawn, kept = Recorded(), []

    def noise(shape: Any, **_: Any) -> Tensor:
        kept.append(torch.randn(shape, generator=drawn.rng, dtype=torch.float64))
        if name == "ddpm large" and len(kept) == N:  # on a sub-grid theirs is noisy at the end, which nobody wants
            kept[-1] = torch.zeros_like(kept[-1])
        return kept[-1]

    for module in ("scheduling_ddpm", "scheduling_dpmsolver_multistep"):
        monkeypatch.setattr(getattr(diffusers.schedulers, module), "randn_tensor", noise)
    state, times = theirs(make(), start)
    replay = iter(kept)
    close(drive(ours(TABLE, start, times, **options), model(), lambda like: next(replay)), state)


def test_euler_ancestral_given_the_same_noise(start: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**COMMON, timestep_spacing="trailing")
    kept: list[Tensor] = []

    def noise(shape: Any, **_: Any) -> Tensor:
        kept.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(kept)), dtype=torch.float64))
        return kept[-1]

    monkeypatch.setattr(diffusers.schedulers.scheduling_euler_ancestral_discrete, "randn_tensor", noise)
    scheduler.set_timesteps(N)
    state = start / float(TABLE.alpha(TABLE.at(scheduler.timesteps[:1].double()))[0])
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, t)
        state = scheduler.step(noise_of(seen, float(t)), t, state).prev_sample
    times = TABLE.at(torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)]))
    replay = iter(kept)
    close(drive(euler_ancestral(TABLE, start, times), model(), lambda like: next(replay)), state)


def test_flow_matching_euler(start: Tensor) -> None:
    scheduler, path = diffusers.FlowMatchEulerDiscreteScheduler(), Linear()
    scheduler.set_timesteps(N)
    state = start
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        state = scheduler.step(noise_of(state, float(1000 * sigma)), t, state).prev_sample
    flow = Bound(path, lambda x, t: x - float(t) * noise_of(x, float(1000 * t)))
    close(drive(euler(path, start, scheduler.sigmas.double()), flow), state)


def test_where_diffusers_ddim_steps_past_its_linspace_grid_ours_meets_the_closed_form() -> None:
    """On their own grid DDIM must be Euler in sigma / alpha; theirs steps a constant number of indices instead."""
    data = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return data.eps(TABLE, x, t)

    found = {}
    for name, spacing in (("linspace", linspace), ("trailing", trailing)):
        scheduler = diffusers.DDIMScheduler(
            **COMMON, clip_sample=False, set_alpha_to_one=True, timestep_spacing=name, prediction_type="epsilon"
        )
        scheduler.set_timesteps(N)
        times, state = spacing(TABLE, N), x
        for t in scheduler.timesteps:
            state = scheduler.step(exact(state, TABLE.at(t.double())), t, state).prev_sample
        stepped = x  # one step of the closed form after another: DDIM keeps x0 and eps
        for t, s in pairwise(times):
            x0 = data.x0(TABLE, stepped, t)
            eps = exact(stepped, t)
            stepped = TABLE.alpha(s) * x0 + TABLE.sigma(s) * eps
        ours = drive(ddim(TABLE, x, times), data.denoiser(TABLE))
        found[name] = (float((ours - stepped).abs().max()), float((state - stepped).abs().max()))
    assert found["trailing"][0] < 1e-9 and found["trailing"][1] < 1e-4  # both right
    assert found["linspace"][0] < 1e-9 and found["linspace"][1] > 1e-2  # ours right


def test_recorded_noise_is_what_a_draw_adds() -> None:
    from sfumato.samplers.drive import drawn_from

    mean = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(drawn_from(Draw(mean, 2.0), lambda like: torch.full_like(like, 0.5)), mean * 2)
