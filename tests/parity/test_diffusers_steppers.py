"""diffusers' schedulers of several calls a step, of few steps and of flow matching; and where they are wrong."""

from typing import Any

import pytest
import torch
from tests.parity.test_diffusers_samplers import COMMON, TABLE, model, noise_of
from torch import Tensor

from sfumato.denoiser import Bound
from sfumato.exact import Gaussian
from sfumato.grids import uniform_log_snr
from sfumato.paths import Linear, VarianceExploding
from sfumato.samplers import drive
from sfumato.samplers.adams import lms
from sfumato.samplers.ancestral import dpm_2_ancestral
from sfumato.samplers.consistency import consistency, lcm
from sfumato.samplers.dpm_solver import dpm_2, dpmpp_2m, dpmpp_2s, dpmpp_3m
from sfumato.samplers.heun import heun
from sfumato.samplers.pndm import pndm
from sfumato.samplers.sde_dpm_solver import sde_dpmpp

diffusers = pytest.importorskip("diffusers")

N = 10
KEEP = {"rtol": 1e-4, "atol": 1e-4}  # their tables and their interpolation are float32


@pytest.fixture(scope="module")
def start() -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def in_levels(scheduler: Any, x: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """What a scheduler in x / alpha and sigma / alpha makes of a state, and our times; it asks `each` times a step."""
    scheduler.set_timesteps(N)
    times = TABLE.at(torch.cat([scheduler.timesteps.double()[::each], torch.tensor([-1.0], dtype=torch.float64)]))
    state = x / float(TABLE.alpha(times[:1])[0])
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(state, t)
        state = scheduler.step(noise_of(seen, float(t)), t, state).prev_sample
    return state, times


def noise_from(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Tensor]:
    """The noise that a scheduler is given from now on, in order."""
    kept: list[Tensor] = []

    def noise(shape: Any, **_: Any) -> Tensor:
        kept.append(torch.randn(shape, generator=torch.Generator().manual_seed(len(kept)), dtype=torch.float64))
        return kept[-1]

    monkeypatch.setattr(getattr(diffusers.schedulers, module), "randn_tensor", noise)
    return kept


def test_heun(start: Tensor) -> None:
    state, times = in_levels(diffusers.HeunDiscreteScheduler(**COMMON, timestep_spacing="trailing"), start, 2)
    torch.testing.assert_close(drive(heun(TABLE, start, times), model()), state.double(), **KEEP)


def test_lms(start: Tensor) -> None:
    pytest.importorskip("scipy")
    state, times = in_levels(diffusers.LMSDiscreteScheduler(**COMMON, timestep_spacing="trailing"), start, 1)
    torch.testing.assert_close(drive(lms(TABLE, start, times), model()), state.double(), **KEEP)


def test_dpm_solver_2_in_k_diffusions_way(start: Tensor) -> None:
    state, times = in_levels(diffusers.KDPM2DiscreteScheduler(**COMMON, timestep_spacing="trailing"), start, 2)
    torch.testing.assert_close(drive(dpm_2(TABLE, start, times), model()), state.double(), rtol=1e-3, atol=1e-3)


def test_dpm_solver_2_with_ancestral_noise(start: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**COMMON, timestep_spacing="trailing")
    kept = noise_from(monkeypatch, "scheduling_k_dpm_2_ancestral_discrete")
    state, times = in_levels(scheduler, start, 2)
    used = iter(kept)
    ours = drive(dpm_2_ancestral(TABLE, start, times), model(), lambda like: next(used))
    torch.testing.assert_close(ours, state.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_of_the_noise(order: int, start: Tensor) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **COMMON, algorithm_type="dpmsolver", solver_order=order, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(N)
    state = start
    for t in scheduler.timesteps:
        state = scheduler.step(noise_of(state, float(t)), t, state).prev_sample
    times = TABLE.at(torch.cat([scheduler.timesteps.double(), torch.zeros(1, dtype=torch.float64)]))
    ours = dpmpp_2m if order == 2 else dpmpp_3m
    options: dict[str, Any] = {"of": "noise", "form": "midpoint"} | ({} if order == 2 else {"coef": "published"})
    torch.testing.assert_close(drive(ours(TABLE, start, times, **options), model()), state.double(), **KEEP)


def test_dpm_solver_plus_plus_2s_where_its_pairs_are_even(start: Tensor) -> None:
    """Theirs takes two points of its grid for one step; ours halves a step in half log_snr."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **COMMON, use_exponential_sigmas=True, final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(N)
    levels = scheduler.sigmas.double()
    state = start
    for t in scheduler.timesteps:
        state = scheduler.step(noise_of(state, float(t)), t, state).prev_sample
    # the points of its own grid, and the indices that it asked at, which it rounded to whole ones
    times = TABLE.time(-2 * torch.log(levels)).clamp(max=1)
    asked = dict(zip(times.tolist(), scheduler.timesteps.tolist(), strict=False))

    def x0(x: Tensor, t: float | Tensor) -> Tensor:
        near = min(asked, key=lambda known: abs(known - float(t)))
        time = torch.as_tensor(t, dtype=torch.float64)
        return (x - TABLE.sigma(time) * noise_of(x, float(asked[near]))) / TABLE.alpha(time)

    ours = drive(dpmpp_2s(TABLE, start, times[::2]), Bound(TABLE, x0))
    torch.testing.assert_close(ours, state.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runge_kutta", [False, True])
def test_pndm(runge_kutta: bool, start: Tensor) -> None:
    scheduler = diffusers.PNDMScheduler(**COMMON, skip_prk_steps=not runge_kutta, set_alpha_to_one=True)
    scheduler.set_timesteps(N)
    state = start
    for t in scheduler.timesteps:
        state = scheduler.step(noise_of(state, float(t)), t, state).prev_sample
    times = TABLE.at(torch.cat([torch.arange(N - 1, -1, -1).double() * 100, torch.tensor([-1.0]).double()]))
    options: dict[str, Any] = {"start": "runge_kutta"} if runge_kutta else {}
    torch.testing.assert_close(drive(pndm(TABLE, start, times, **options), model()), state.double(), **KEEP)


def test_latent_consistency(start: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.LCMScheduler(**COMMON, set_alpha_to_one=True)
    kept = noise_from(monkeypatch, "scheduling_lcm")
    scheduler.set_timesteps(4)
    state = start
    for t in scheduler.timesteps:
        state, end = scheduler.step(noise_of(state, float(t)), t, state, return_dict=False)
    times = TABLE.at(torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0]).double()]))
    used = iter(kept)
    ours = drive(lcm(TABLE, start, times, boundary=10.0, to="x0"), model(), lambda like: next(used))
    torch.testing.assert_close(ours, end.double(), **KEEP)


def test_consistency(start: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    kept = noise_from(monkeypatch, "scheduling_consistency_models")
    scheduler.set_timesteps(4)
    path, state = VarianceExploding(), start * 80
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        seen = scheduler.scale_model_input(state, t)
        state = scheduler.step(noise_of(seen, float(sigma)), t, state).prev_sample

    def end(x: Tensor, t: float | Tensor) -> Tensor:
        sigma = float(path.sigma(torch.as_tensor(t, dtype=torch.float64)))
        skip, out = scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma, dtype=torch.float64))
        return skip * x + out * noise_of(x / (sigma**2 + 0.25) ** 0.5, sigma)

    times = torch.cat([path.time(-2 * torch.log(scheduler.sigmas[:-1].double())), torch.zeros(1).double()])
    used = iter(kept)
    ours = consistency(path, start * 80, times, sigma_min=0.002, to="x0")
    torch.testing.assert_close(drive(ours, Bound(path, end), lambda like: next(used)), state.double(), **KEEP)


def test_flow_matching_heun(start: Tensor) -> None:
    scheduler, path = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), Linear()
    scheduler.set_timesteps(N)
    state = start
    for t in scheduler.timesteps:
        state = scheduler.step(noise_of(state, float(t)), t, state).prev_sample
    times = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2], torch.zeros(1)]).double() / 1000
    flow = Bound(path, lambda x, t: x - float(t) * noise_of(x, float(1000 * t)))
    ours = drive(heun(path, start, times, variable="time"), flow)
    torch.testing.assert_close(ours, state.double(), **KEEP)


# Where a peer is wrong: which of the two meets the closed form

DATA = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64))


def variance(step: Any, draws: int) -> float:
    """Of what a linear sampler makes of standard normal noise: the sum of the squares of what each unit of it adds."""
    return float(sum(float(step(k)) ** 2 for k in range(-1, draws)))


def test_where_diffusers_third_order_sde_is_wrong_ours_meets_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 60
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **COMMON,
        algorithm_type="sde-dpmsolver++",
        solver_order=3,
        lower_order_final=False,
        use_exponential_sigmas=True,
        final_sigmas_type="sigma_min",
    )
    count = [0, -1]

    def unit(like: Tensor) -> Tensor:
        count[0] += 1
        return torch.full_like(like, float(count[0] - 1 == count[1]))

    module = diffusers.schedulers.scheduling_dpmsolver_multistep
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: unit(torch.empty(shape, dtype=torch.float64)))

    scheduler.set_timesteps(n)  # even in log sigma, with its last level twice
    times = TABLE.time(-2 * torch.log(scheduler.sigmas[:-1].double())).clamp(max=1)

    def theirs(k: int) -> Tensor:
        count[:] = [0, k]
        scheduler.set_timesteps(n)
        x = torch.full((1, 1), float(k < 0), dtype=torch.float64)
        for i in range(n - 1):
            x = scheduler.step(DATA.eps(TABLE, x, times[i]), scheduler.timesteps[i], x).prev_sample
        return x

    def ours(k: int) -> Tensor:
        count[:] = [0, k]
        x = torch.full((1, 1), float(k < 0), dtype=torch.float64)
        return drive(sde_dpmpp(TABLE, x, times, order=3), DATA.denoiser(TABLE), unit)

    end = times[-1:]
    exact = float(TABLE.alpha(end) ** 2 * 0.25 + TABLE.sigma(end) ** 2)
    wrong, right = (abs(variance(step, n) - exact) / exact for step in (theirs, ours))
    assert right < 2e-3 and wrong > 10 * right


def test_where_a_scheduler_of_diffusers_gives_garbage_on_a_flow_model_ours_meets_the_closed_form() -> None:
    """A velocity on the linear path, given to DDIM of a table of betas as if it were noise: nothing complains."""
    path, x = Linear(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    truth = DATA.flow(path, x, 1.0, 0.0)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return DATA.eps(path, x, t) - DATA.x0(path, x, t)

    scheduler = diffusers.DDIMScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
    scheduler.set_timesteps(50)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(velocity(state, torch.tensor(float(t + 1) / 1000).double()), t, state).prev_sample
    assert float((state - truth).abs().max()) > 0.3
    for sampler in (dpmpp_2m, dpmpp_2s):
        end = drive(sampler(path, x, uniform_log_snr(path, 50)), DATA.denoiser(path))
        assert float((end - truth).abs().max()) < 0.02
