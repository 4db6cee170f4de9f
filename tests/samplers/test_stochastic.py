"""Samplers that draw noise: the marginals they leave, the identities between them, and the chance they tell of."""

import pytest
import torch
from torch import Tensor

from sfumato.catalogue import SAMPLERS, build
from sfumato.denoiser import VARIANCE, Bound
from sfumato.errors import ConfigError
from sfumato.exact import Gaussian
from sfumato.grids import linear, logistic
from sfumato.paths import Linear, Path, SubVariancePreserving, Tabulated, VarianceExploding, VariancePreserving
from sfumato.samplers import SeededNoise, drive, sample
from sfumato.samplers.ancestral import euler_ancestral
from sfumato.samplers.consistency import consistency, lcm
from sfumato.samplers.ddim import ddim
from sfumato.samplers.ddpm import ddpm
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.heun import heun
from sfumato.samplers.langevin import predictor_corrector
from sfumato.samplers.restart import restart
from sfumato.samplers.sde import sde_em, sde_heun
from sfumato.samplers.sde_dpm_solver import sde_dpmpp

PATHS = {
    "linear": Linear(),
    "vp": VariancePreserving(),
    "sub_vp": SubVariancePreserving(),
    "ve": VarianceExploding(20.0),
    "table": Tabulated("scaled_linear"),
    "zero_terminal": Tabulated(zero_terminal_snr=True),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
DATA = Gaussian(torch.full((8,), 0.5, dtype=torch.float64), torch.full((8,), 0.6, dtype=torch.float64))
MANY = 3000  # rows of 8: a standard deviation has a standard error of 0.0027


def begun(path: Path, n: int, seed: int = 12345) -> Tensor:  # no other seed here: equal streams would be correlated
    """What sampling starts from: the true marginal at t = 1, so that what is wrong at the end is the sampler's."""
    one = torch.ones((), dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    x0, eps = DATA.draw(n, rng), torch.randn(n, 8, generator=rng, dtype=torch.float64)
    return path.alpha(one) * x0 + path.sigma(one) * eps


STOCHASTIC = [name for name, line in SAMPLERS.items() if line.stochastic and name not in ("consistency", "lcm")]


@pytest.mark.parametrize("name", STOCHASTIC)
@paths
def test_the_marginal_at_the_end_is_the_data(path: Path, name: str) -> None:
    torch.manual_seed(77)
    x = begun(path, MANY)
    # steps sized by each sample's own score are the paper's, and unbiased only in many dimensions
    options = {"size": "level"} if name == "predictor_corrector" else {}
    end = drive(SAMPLERS[name].fn(path, x, logistic(path, 120), **options), DATA.denoiser(path))
    mean, std = float(end.mean()), float(end.std())
    assert abs(mean - 0.5) < 0.03, mean
    assert abs(std / 0.6 - 1) < 0.04, std


@paths
def test_four_names_of_one_step(path: Path) -> None:
    x, times = begun(path, 4), linear(path, 9)
    ends = [
        drive(running, DATA.denoiser(path), SeededNoise.of(range(4)))
        for running in (
            ddpm(path, x, times),
            ddim(path, x, times, eta=1.0),
            euler_ancestral(path, x, times),
            sde_dpmpp(path, x, times, order=1),
        )
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


@paths
def test_without_noise_each_is_its_twin(path: Path) -> None:
    x, times, exact = begun(path, 4), logistic(path, 12), DATA.denoiser(path)
    pairs = [
        (euler_ancestral(path, x, times, eta=0.0), ddim(path, x, times)),
        (sde_dpmpp(path, x, times, eta=0.0), dpmpp_2m(path, x, times)),
        (restart(path, x, times, intervals=()), heun(path, x, times)),
        (consistency(path, x, times, eta=0.0, to="x0"), ddim(path, x, times)),
    ]
    for ours, twin in pairs:
        torch.testing.assert_close(drive(ours, exact), drive(twin, exact), rtol=1e-9, atol=1e-9)


def test_the_third_order_keeps_the_variance_where_diffusers_sign_would_not() -> None:
    """h -> 0 makes the published coefficient of the second difference -1 instead of 0 (algorithms, C6)."""
    path = VariancePreserving()
    torch.manual_seed(77)
    found = [
        float(drive(sde_dpmpp(path, begun(path, MANY), logistic(path, n), order=3), DATA.denoiser(path)).std())
        for n in (12, 48)
    ]
    assert abs(found[1] - 0.6) < 0.01 and abs(found[1] - 0.6) < abs(found[0] - 0.6) + 0.006


@paths
def test_a_learned_variance_lies_between_small_and_large(path: Path) -> None:
    x, times = begun(path, 4)[:, None, :], linear(path, 6)

    def told(share: float) -> Bound:
        exact = DATA.denoiser(path)
        return Bound(
            path, lambda x, t, to="x0": torch.cat([exact(x, t), torch.full_like(x, share)], 1), ("x0", VARIANCE)
        )

    for share, variance in ((-1.0, "small"), (1.0, "large")):
        if variance == "large" and path.alpha(torch.ones(())) == 0:
            continue  # at pure noise the large variance takes the place of everything: the two differ by a limit
        ends = [
            drive(ddpm(path, x, times, variance=one), model, SeededNoise.of(range(4)))  # type: ignore[arg-type]
            for one, model in (("learned", told(share)), (variance, DATA.denoiser(path)))
        ]
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


@paths
def test_an_exact_consistency_model_needs_one_jump(path: Path) -> None:
    ends = Bound(path, lambda x, t, **to: DATA.flow(path, x, t, 0.0), ("endpoint",))
    x = begun(path, MANY)
    one = drive(consistency(path, x, torch.tensor([1.0, 0.0], dtype=torch.float64)), ends)
    torch.testing.assert_close(one, DATA.flow(path, x, 1.0, 0.0))
    torch.manual_seed(78)
    several = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64)
    for fn in (consistency, lcm):
        end = drive(fn(path, x, several), ends)
        assert abs(float(end.std()) / 0.6 - 1) < 0.02 and abs(float(end.mean()) - 0.5) < 0.02


def test_ends_are_clipped_at_each_jump() -> None:
    path = Linear()
    ends = Bound(path, lambda x, t, **to: x * 3, ("endpoint",))
    x, times = begun(path, MANY), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    torch.manual_seed(1)
    clipped = drive(consistency(path, x, times, clip=0.5), ends)
    assert float(clipped.abs().max()) == 0.5
    torch.manual_seed(1)
    by_hand = x.mul(3).clamp(-0.5, 0.5) / 2 + torch.randn_like(x) / 2
    torch.testing.assert_close(clipped, by_hand.mul(3).clamp(-0.5, 0.5))
    with pytest.raises(ConfigError, match="clipped"):
        drive(consistency(path, x, times, clip=0), ends)


def test_an_ordinary_denoiser_has_no_endpoint() -> None:
    path = Linear()
    for fn in (consistency, lcm):
        with pytest.raises(ConfigError, match="where the flow ends"):
            drive(fn(path, begun(path, 2), linear(path, 2)), DATA.denoiser(path))
    drive(lcm(path, begun(path, 2), linear(path, 2), to="x0"), DATA.denoiser(path))


def test_the_published_boundary_is_the_state_itself_at_index_zero() -> None:
    path = Tabulated("scaled_linear")
    times = torch.stack([path.at(torch.tensor(0.0, dtype=torch.float64)), torch.zeros((), dtype=torch.float64)])
    x = begun(path, 3)
    torch.testing.assert_close(drive(lcm(path, x, times, boundary=10, to="x0"), DATA.denoiser(path)), x)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "sde_dpmpp", "sde_em", "predictor_corrector"])
def test_a_picture_does_not_depend_on_its_batch_mates(name: str) -> None:
    path = Linear()
    x, times = begun(path, 3), linear(path, 7)
    whole = drive(SAMPLERS[name].fn(path, x, times), DATA.denoiser(path), SeededNoise.of([5, 6, 7]))
    alone = drive(SAMPLERS[name].fn(path, x[1:2], times), DATA.denoiser(path), SeededNoise.of([6]))
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)


def test_a_step_tells_what_its_state_was_drawn_from() -> None:
    path = VariancePreserving()
    x, times = begun(path, 4), linear(path, 5)
    steps = list(sample(ddpm(path, x, times), DATA.denoiser(path), SeededNoise.of(range(4))))
    assert steps[0].drawn is None and all(step.drawn is not None for step in steps[1:-1]) and steps[-1].drawn is None
    for step in steps[1:-1]:
        assert step.drawn is not None
        normal = torch.distributions.Normal(step.drawn.mean, torch.as_tensor(step.drawn.std))
        torch.testing.assert_close(step.drawn.log_density(step.x), normal.log_prob(step.x).sum(1))


def test_gradients_flow_through_a_run_with_noise() -> None:
    path, x = VariancePreserving(), begun(VariancePreserving(), 2)

    def end(k: float | Tensor) -> Tensor:
        model = Bound(path, lambda x, t: k * DATA.x0(path, x, t))
        return drive(sde_dpmpp(path, x, logistic(path, 5)), model, SeededNoise.of([0, 1])).sum()

    k = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(k), k)
    torch.testing.assert_close(slope, (end(1.1 + 1e-6) - end(1.1 - 1e-6)) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["constant", "sigma", "linear", "decreasing", "increasing_decreasing", "diffusion"])
@pytest.mark.parametrize("fn", [sde_em, sde_heun])
def test_any_strength_of_noise_keeps_the_marginals(fn, form: str) -> None:  # type: ignore[no-untyped-def]
    path = Linear()
    torch.manual_seed(79)
    end = drive(fn(path, begun(path, MANY), linear(path, 200), diffusion=form), DATA.denoiser(path))
    assert abs(float(end.std()) / 0.6 - 1) < 0.03 and abs(float(end.mean()) - 0.5) < 0.03


def test_langevin_steps_mend_a_state_that_is_too_narrow() -> None:
    """The corrector alone: from half the spread, at one level, towards the marginal's."""
    path = VarianceExploding(20.0)
    times = torch.tensor([0.06, 0.05, 0.0], dtype=torch.float64)
    torch.manual_seed(80)
    narrow = 0.5 + 0.2 * torch.randn(MANY, 8, dtype=torch.float64)
    steps = [
        float(drive(predictor_corrector(path, narrow, times, corrections=n, size="level"), DATA.denoiser(path)).std())
        for n in (0, 60)
    ]
    truth = 0.36 / (0.36 + 1) ** 0.5  # of x0-hat at sigma = 1, which the last step gives
    assert abs(steps[1] - truth) < 0.4 * abs(steps[0] - truth)


@pytest.mark.parametrize(
    "slot",
    [
        {"kind": "euler_ancestral", "eta": -1.0},
        {"kind": "sde_dpmpp", "order": 4},
        {"kind": "sde_em", "diffusion": "nothing"},
        {"kind": "restart", "intervals": [[2, 1, 0.5, 0.1]]},
        {"kind": "predictor_corrector", "ratio": 0.0},
        {"kind": "ddpm", "variance": "middling"},
        {"kind": "lcm", "boundary": 10.0},
    ],
    ids=lambda slot: str(slot["kind"]),
)
def test_options_that_cannot_be_are_refused(slot: dict[str, object]) -> None:
    path = Linear()
    with pytest.raises(ConfigError):
        drive(build(slot, "Sampler")(path, begun(path, 2), linear(path, 4)), DATA.denoiser(path))


def test_noise_that_runs_out_is_an_error_and_not_an_end() -> None:
    used = iter([torch.zeros(1, 1, dtype=torch.float64)])
    running = SAMPLERS["ddpm"].fn(PATHS["linear"], torch.ones(1, 1, dtype=torch.float64), linear(PATHS["linear"], 5))
    with pytest.raises(RuntimeError, match="StopIteration"):
        drive(running, DATA.denoiser(PATHS["linear"]), lambda like: next(used))
