"""The hybrid objective: what its bound is, where it is stationary, and that training finds the variance."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

from oracles import Gaussian
from sfumato.denoiser import VARIANCE, Denoiser
from sfumato.errors import ConfigError
from sfumato.learned import Learned
from sfumato.objectives import Denoising, Hybrid, hybrid
from sfumato.objectives.weights import MinSNR
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving, along, posterior
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V

STD = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
MEAN = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
EXACT = Gaussian(MEAN, STD)
PATHS: tuple[Path, ...] = (Linear(), Cosine(), VariancePreserving(), VarianceExploding(3.0), Tabulated(steps=40))
paths = pytest.mark.parametrize("path", PATHS, ids=str)


def _table(path: Path, n: int) -> Tensor:
    return hybrid._table(path, n, torch.device("cpu"), torch.float64)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def times(path: Path, n: int) -> tuple[Tensor, Tensor]:
    t = torch.arange(n + 1, dtype=torch.float64) / n
    return t[:-1], t[1:]


def variance_of_step(path: Path, n: int) -> Tensor:
    """Of p(x_s | x_t) for Gaussian data, for every step: (n, 3), from the joint distribution of the two."""
    s, t = times(path, n)
    here, there = (path.alpha(t)[:, None] * STD) ** 2, (path.alpha(s)[:, None] * STD) ** 2
    total, before = here + path.sigma(t)[:, None] ** 2, there + path.sigma(s)[:, None] ** 2
    scale = (path.alpha(t) / path.alpha(s))[:, None]
    return before - (scale * before) ** 2 / total  # the covariance of x_s and x_t is scale times the variance of x_s


def exact_share(path: Path, n: int) -> Tensor:
    table = _table(path, n)
    middle, half = (table[:, 0] + table[:, 1]) / 2, (table[:, 1] - table[:, 0]) / 2
    return (variance_of_step(path, n).log() - middle[:, None]) / half[:, None]


class Says(nn.Module):
    """A network that knows the Gaussian and the variance of its steps, moved by what is 0 where it is right."""

    def __init__(self, path: Path, prediction: Prediction, n: int, by: float = 0.0, share: float = 0.0) -> None:
        super().__init__()
        self.path, self.prediction, self.n = path, prediction, n
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))
        self.share = nn.Parameter(torch.full((n, 3), share, dtype=torch.float64))
        self.right = exact_share(path, n)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        said = self.prediction.answer(self.path, EXACT.x0(self.path, x, t) + self.by, x, t)
        i = (t * self.n).round().long() - 1
        return torch.cat([said, self.right[i] + self.share[i]], 1)


def says(path: Path, prediction: Prediction = EPS, n: int = 10, **moved: float) -> Denoiser:
    return Denoiser(Says(path, prediction, n, **moved), path, prediction, answers=("x0", VARIANCE))


def test_variances_are_those_of_the_paper() -> None:
    """beta and its posterior twin from the products alone (eq. 10 there), the first twin replaced by the second."""
    path = Tabulated("linear", steps=1000)
    abar = path.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    twin = beta * (1 - before) / (1 - abar)
    table = _table(path, 1000)
    torch.testing.assert_close(table[:, 1].exp(), beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(table[1:, 0].exp(), twin[1:], rtol=1e-8, atol=0)
    torch.testing.assert_close(table[0, 0].exp(), twin[1], rtol=1e-8, atol=0)
    assert Hybrid().count(path) == 1000 and Hybrid().count(Linear()) == 1000 and Hybrid(steps=7).count(path) == 7


@paths
def test_the_bound_of_a_step_is_the_divergence_of_two_normal_distributions(path: Path) -> None:
    n, objective = 10, Hybrid(steps=10, levels=None)
    i = torch.tensor([3, 9])
    x0, mean, share = (torch.randn(2, 3, generator=rng(k), dtype=torch.float64) for k in range(3))
    s, t = (one[i] for one in times(path, n))
    true = posterior(path, s, t)
    x_t = torch.randn(2, 3, generator=rng(9), dtype=torch.float64)
    table = _table(path, n)[i]
    std = torch.exp((table[:, :1] * (1 - share) + table[:, 1:2] * (1 + share)) / 4)
    centre, guess = (along(true.x_t, x0) * x_t + along(true.x0, x0) * one for one in (x0, mean))
    one, other = torch.distributions.Normal(centre, along(true.std, x0)), torch.distributions.Normal(guess, std)
    expected = torch.distributions.kl_divergence(one, other).mean(1) / math.log(2)
    torch.testing.assert_close(objective.bound(path, i, x0, mean, share), expected, rtol=1e-7, atol=1e-12)


def test_a_bound_in_bits_by_hand() -> None:
    """A mean that is right and a variance of e times the posterior's: (1/e - 1 + 1) / 2 nats."""
    path, n, i = Cosine(), 10, torch.tensor([4])
    table = _table(path, n)[4]
    share = torch.full((1, 3), -1 + 2 / float(table[1] - table[0]), dtype=torch.float64)
    x0 = torch.zeros(1, 3, dtype=torch.float64)
    told = Hybrid(steps=n).bound(path, i, x0, x0, share)
    torch.testing.assert_close(float(told), (1 / math.e) / 2 / math.log(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("mean", [-1.2, -0.98, 0.0, 0.31, 1.0])
def test_the_likelihood_of_levels_is_a_distribution(levels: int, mean: float) -> None:
    objective = Hybrid(levels=levels)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for log_var in (-8.0, -3.0, 0.5):
        told = objective._likelihood(values, torch.full_like(values, mean), torch.full_like(values, log_var))
        torch.testing.assert_close(float(told.exp().sum()), 1.0, rtol=1e-4, atol=0)
        assert bool(told.isfinite().all())


def test_far_levels_keep_their_gradient() -> None:
    """In single precision the mass of a level far out is no difference of two numbers any more."""
    mean = torch.tensor([-0.9, 0.9, -1.0, 1.0], requires_grad=True)
    x0, log_var = torch.tensor([0.9, -0.9, 1.0, -1.0]), torch.full((4,), -9.0, requires_grad=True)
    told = Hybrid()._likelihood(x0, mean, log_var)
    pull = torch.autograd.grad(told.sum(), (mean, log_var))
    assert bool(told.isfinite().all()) and all(bool(one.isfinite().all()) for one in pull)
    torch.testing.assert_close(pull[0], (x0 - mean.detach()) * math.exp(9), rtol=0.01, atol=0)


@paths
def test_with_the_exact_variance_the_bound_is_the_entropy_of_the_data(path: Path) -> None:
    """Every reverse step of Gaussian data is normal, so nothing is lost: the terms and the prior's sum to -E log p."""
    n, rows = 12, 20_000
    objective, model = Hybrid(steps=n, levels=None), says(path, X0, n)
    x0 = EXACT.draw(rows, rng(1))
    total, error = torch.zeros((), dtype=torch.float64), 0.0
    for k in range(n):
        i = torch.full((rows,), k)
        t = (i + 1) / n
        eps = torch.randn(x0.shape, generator=rng(k + 2), dtype=torch.float64)
        t = t.double()
        x_t = along(path.alpha(t), x0) * x0 + along(path.sigma(t), x0) * eps
        said, share = model.outputs(x_t, t)
        each = objective.bound(path, i, x0, said, share)
        each = each.detach()
        total, error = total + each.mean(), error + float(each.var()) / rows
    last = torch.ones((), dtype=torch.float64)
    alpha, sigma = path.alpha(last), path.sigma(last)
    spread = (alpha * STD) ** 2 + sigma**2  # of x_1, which sampling starts from here
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(alpha * x0, sigma), torch.distributions.Normal(alpha * MEAN, spread.sqrt())
    )
    entropy = (0.5 * torch.log(2 * math.pi * math.e * STD**2)).mean() / math.log(2)
    found = float(total + prior.mean() / math.log(2))
    assert abs(found - float(entropy)) < 5 * error**0.5 + 0.01


@paths
def test_the_exact_variance_is_stationary(path: Path) -> None:
    """And a wider or narrower one is drawn back."""
    n, blocks = 6, 25
    objective = Hybrid(steps=n, levels=None)
    x0, draws = EXACT.draw(4000 * blocks, rng(1)), rng(5)
    pulls = {}
    for moved in (-1.5, 0.0, 1.5):
        model, found = says(path, V, n, share=moved), []
        for part in x0.chunk(blocks):
            loss = objective(model, part, rng=draws).value
            found.append(torch.autograd.grad(loss, model.net.share)[0])  # type: ignore[arg-type]
        stacked = torch.stack(found)
        pulls[moved] = (stacked.mean(0), stacked.std(0) / blocks**0.5)
    mean, error = pulls[0.0]
    assert bool((mean.abs() < 5 * error).all())
    assert bool((pulls[1.5][0] > 5 * pulls[1.5][1]).all()) and bool((pulls[-1.5][0] < -5 * pulls[-1.5][1]).all())


@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda one: one.name)
def test_the_mean_is_taught_by_the_square_error_alone(prediction: Prediction) -> None:
    """The bound's gradient to the prediction is exactly zero, and the prediction's own is that of `Denoising`."""
    path, x0 = Cosine(), EXACT.draw(64, rng(1))

    def pull(objective: Callable[..., object], name: str) -> Tensor:
        model = says(path, prediction, by=0.3, share=0.2)
        loss = objective(model, x0, rng=rng(3)).value  # type: ignore[attr-defined]
        found = torch.autograd.grad(loss, getattr(model.net, name), allow_unused=True)[0]
        return torch.zeros(()) if found is None else found

    whole, none = Hybrid(MinSNR(), steps=10, scale=1.0), Hybrid(MinSNR(), steps=10, scale=0.0)
    assert torch.equal(pull(whole, "by"), pull(none, "by")) and float(pull(whole, "by").abs()) > 0
    assert bool((pull(none, "share") == 0).all()) and bool((pull(whole, "share")[:-1] != 0).any())
    loss = whole(says(path, prediction, by=0.3, share=0.2), x0, rng=rng(3))
    factor = Denoising(weight=MinSNR()).factor(says(path, prediction), loss.t)
    torch.testing.assert_close(loss.parts["simple"], (factor * loss.each).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.value.detach(), loss.parts["simple"] + loss.parts["bound"])
    assert set((loss.t * 10).round().long().tolist()) <= set(range(1, 11))


def test_training_finds_the_variance() -> None:
    """From the posterior's, with a mean that is learned beside it."""
    path, n = Tabulated("cosine", steps=8), 8

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.offset, self.share = (
                nn.Parameter(torch.full((n, 3), value, dtype=torch.float64)) for value in (0.0, 0.0, -1.0)
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            i = (t * n).round().long() - 1
            return torch.cat([self.slope[i] * x + self.offset[i], self.share[i]], 1)

    net = Net()
    model, objective = Denoiser(net, path, X0, answers=("x0", VARIANCE)), Hybrid(scale=1.0, levels=None)
    x0, optimizer = EXACT.draw(20_000, rng(1)), torch.optim.Adam(net.parameters(), lr=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        optimizer.zero_grad()
        objective(model, x0, rng=rng(step)).value.backward()
        optimizer.step()
    table = _table(path, n)
    middle, half = (table[:, :1] + table[:, 1:2]) / 2, (table[:, 1:2] - table[:, :1]) / 2
    found = torch.exp(middle + half * net.share.detach())
    torch.testing.assert_close(found, variance_of_step(path, n), rtol=0.06, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda one: one.name)
def test_no_end_of_any_path_is_not_a_number(prediction: Prediction, dtype: torch.dtype) -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.zeros((), dtype=dtype))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.cat([x, x], 1) * self.at

    for path in (*PATHS, Tabulated("scaled_linear", zero_terminal_snr=True)):
        for levels in (256, None):
            model = Denoiser(Zero(), path, prediction, answers=("x0", VARIANCE))
            x0 = torch.rand(256, 2, generator=rng(), dtype=dtype) * 2 - 1
            loss = Hybrid(steps=4, levels=levels)(model, x0, rng=rng())
            loss.value.backward()
            assert bool(loss.value.isfinite()) and bool(model.net.at.grad.isfinite()), (path, levels)  # type: ignore[union-attr,operator]


def test_what_cannot_be_is_named() -> None:
    x0 = EXACT.draw(4, rng())
    with pytest.raises(ConfigError, match="teaches a variance"):
        Hybrid()(Denoiser(nn.Identity(), Linear(), X0), x0, rng=rng())
    with pytest.raises(ConfigError, match="learned schedule"):
        Hybrid()(Denoiser(nn.Identity(), Learned(), X0, answers=("x0", VARIANCE)), x0, rng=rng())
    for options in ({"steps": 1}, {"levels": 1}, {"scale": -1.0}):
        with pytest.raises(ConfigError, match="at least"):
            Hybrid(**options)  # type: ignore[arg-type]
