"""Denoisers: what a network is given and what is made of its answer, against the exact solution of a Gaussian."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import SHAPES, Gaussian, gaussian_like
from sfumato.denoiser import (
    VARIANCE,
    Bound,
    Denoiser,
    as_index,
    as_log_level,
    as_log_level_thousandths,
    as_reversed,
    as_thousandths,
    as_time,
    on_path,
    times_like,
    unit_variance,
)
from sfumato.errors import ConfigError
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.paths import (
    Cosine,
    Linear,
    Path,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
    log_snr,
    noised,
)
from sfumato.predictions import EPS, SCORE, VELOCITY, X0, Prediction, V, bounded, edm

PATHS: tuple[Path, ...] = (
    Linear(),
    Cosine(),
    VarianceExploding(),
    VariancePreserving(),
    Tabulated(),
    Tabulated("scaled_linear", zero_terminal_snr=True),
)
PREDICTIONS = (X0, EPS, V, VELOCITY, SCORE, edm(), bounded())
paths = pytest.mark.parametrize("path", PATHS, ids=str)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: p.name)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def states(shape: tuple[int, ...], path: Path, t: Tensor | float) -> Tensor:
    """Draws of x_t for a Gaussian of that shape."""
    rng = torch.Generator().manual_seed(1)
    x0 = gaussian_like(shape).draw(shape[0], rng)
    t = torch.as_tensor(t, dtype=torch.float64)
    return noised(path, x0, torch.randn(shape, generator=rng, dtype=torch.float64), t)


class Knows(nn.Module):
    """A network that says exactly the right thing: it undoes what it is told of time and of scale."""

    def __init__(
        self, exact: Gaussian, path: Path, prediction: Prediction, unscale: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.exact, self.path, self.prediction, self.unscale = exact, path, prediction, unscale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t / 1000
        x = x / self.unscale(t).reshape(-1, *(1,) * (x.ndim - 1))
        return self.prediction.answer(self.path, self.exact.x0(self.path, x, t), x, t)


class Recorder(nn.Module):
    """A network that keeps what it was called with, and answers with its input, in a type of its own."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x, t, cond))
        return x.to(self.dtype or x.dtype)


@paths
@predictions
def test_the_right_answer_gives_the_posterior_mean(prediction: Prediction, path: Path) -> None:
    for shape in SHAPES:
        exact, scale = gaussian_like(shape), unit_variance(0.7)
        model = Denoiser(
            Knows(exact, path, prediction, lambda t: scale(path, t)), path, prediction, as_thousandths, scale
        )
        each = torch.linspace(0.11, 0.93, shape[0], dtype=torch.float64)
        x_t = states(shape, path, each)
        close(model(x_t, each), exact.x0(path, x_t, each), 1e-9)
        close(model(x_t, 0.37), exact.x0(path, x_t, 0.37), 1e-9)
        close(model(x_t, torch.tensor(0.37, dtype=torch.float64)), exact.x0(path, x_t, 0.37), 1e-9)


def test_a_network_is_called_with_states_times_and_its_own_words() -> None:
    net, path = Recorder(), Tabulated(steps=50)
    model = Denoiser(net, path, V, as_index, unit_variance(0.4))
    x, t, cond = torch.randn(3, 2, 2), torch.tensor([0.2, 0.5, 0.9]), {"label": torch.tensor([1, 2, 0])}
    said = model.predict(x, t, cond)
    seen, told, words = net.calls.pop()
    torch.testing.assert_close(told, torch.tensor([9.0, 24.0, 44.0]))
    scale = unit_variance(0.4)(path, t)
    torch.testing.assert_close(seen, scale[:, None, None] * x)
    torch.testing.assert_close(said, seen)
    assert words.keys() == cond.keys() and words["label"] is cond["label"]
    torch.testing.assert_close(model(x, t, cond), V.x0(path, said, x, t))


def test_a_plain_network_is_given_the_state_and_the_time_themselves() -> None:
    net, x = Recorder(), torch.randn(3, 2)
    Denoiser(net, Linear(), V).predict(x, 0.25)
    seen, told, words = net.calls.pop()
    assert torch.equal(seen, x) and torch.equal(told, torch.full((3,), 0.25)) and words == {}


def test_a_copied_denoiser_answers_the_same_at_the_data() -> None:
    x, t = torch.randn(3, 2), torch.zeros(3)
    for prediction in PREDICTIONS:
        model = Denoiser(Recorder(), Cosine(), prediction)
        assert torch.equal(copy.deepcopy(model)(x, t), model(x, t))


# answers that hold more


class Doubled(nn.Module):
    """A network with twice its input's channels: the input, and its negative."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, -x], 1)


@predictions
def test_a_learned_variance_comes_with_x0_when_it_is_asked_for(prediction: Prediction) -> None:
    for shape in SHAPES:
        x, path = torch.randn(shape), Cosine()
        plain = Denoiser(Recorder(), path, prediction)
        model = Denoiser(Doubled(), path, prediction, answers=("x0", VARIANCE))
        assert torch.equal(model.predict(x, 0.4), plain.predict(x, 0.4))
        assert torch.equal(model(x, 0.4), plain(x, 0.4))
        x0, variance = model(x, 0.4, to=VARIANCE).chunk(2, 1)
        assert torch.equal(x0, plain(x, 0.4)) and torch.equal(variance, -x)


def test_channels_that_do_not_fit_the_answers_are_refused() -> None:
    x = torch.randn(2, 3)
    for model, seen in (
        (Denoiser(Doubled(), Cosine(), V), "6 for 3"),
        (Denoiser(Recorder(), Cosine(), V, answers=("x0", VARIANCE)), "3 for 3"),
    ):
        with pytest.raises(ConfigError, match="channels") as caught:
            model(x, 0.4)
        assert caught.value.seen == seen


def test_another_path_passes_on_what_is_asked_for() -> None:
    model = Denoiser(Doubled(), Cosine(), V, answers=("x0", VARIANCE))
    there, x = on_path(model, Linear()), torch.randn(2, 3)
    assert there.answers == model.answers
    assert there(x, 0.4, to=VARIANCE).shape == (2, 6) and there(x, 0.4).shape == (2, 3)


# answers about two times


class Until(nn.Module):
    """A network that knows one Gaussian's jumps in x0, and what it was told of them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.told = path, list[Tensor]()

    def forward(self, x: Tensor, t: Tensor, until: Tensor) -> Tensor:
        self.told.append(until)
        exact = gaussian_like(tuple(x.shape))
        return exact.jump(self.path, x, t, until)


@paths
@predictions
def test_a_model_of_jumps_answers_means_and_ends_by_them(prediction: Prediction, path: Path) -> None:
    """In any prediction: what is said at t is converted at t, whatever the jump."""
    shape = (4, 3)
    exact, t = gaussian_like(shape), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    x = states(shape, path, t)
    until = torch.tensor([0.0, 0.2, 0.7, 0.5], dtype=torch.float64)

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, until: Tensor) -> Tensor:
            x0 = exact.jump(path, x, t, until)
            a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
            return prediction.target(path, x0, (x - a * x0) / s, t)

    model = Denoiser(Net(), path, prediction, answers=("jump",))
    assert model.answers == ("x0", "jump", "endpoint")
    close(model(x, t), exact.x0(path, x, t), 1e-9)
    close(model(x, t, to="x0"), exact.x0(path, x, t), 1e-9)
    close(model(x, t, to="endpoint"), exact.flow(path, x, t, 0.0), 1e-9)
    close(model(x, t, to="jump", until=until), exact.jump(path, x, t, until), 1e-9)
    close(model(x, t, to="jump", until=0.2), exact.jump(path, x, t, 0.2), 1e-9)


def test_the_end_of_a_jump_is_told_as_times_are() -> None:
    for path, given in ((Linear(), as_thousandths), (Linear(), as_log_level), (Tabulated(), as_index)):
        net, t = Until(path), torch.tensor([0.5, 0.8])
        model = Denoiser(net, path, X0, given, answers=("jump",))
        ends = torch.tensor([0.1, 0.4])
        model.predict(torch.randn(2, 3), t, until=ends)
        model.predict(torch.randn(2, 3), t)
        model(torch.randn(2, 3), t, to="endpoint")
        told, plain, last = net.told
        assert torch.equal(told, given(path, ends)) and torch.equal(plain, given(path, t))
        assert bool(last.isfinite().all()) and torch.equal(last, last[:1].expand(2))  # where the level is infinite, too


def test_the_first_answer_is_that_to_a_plain_question() -> None:
    path = Linear()
    net = Until(path)
    model = Denoiser(net, path, X0, answers=("endpoint", "jump"))
    assert model.answers == ("endpoint", "jump", "x0")
    model(torch.randn(2, 3), 0.5)
    assert float(net.told[-1].abs().max()) == 0


def test_ends_of_jumps_are_for_models_that_jump() -> None:
    x, path = torch.randn(2, 3), Linear()
    with pytest.raises(ConfigError, match="only a model that answers jumps"):
        Denoiser(Recorder(), path, V)(x, 0.5, until=0.2)
    model = Denoiser(Until(path), path, X0, answers=("jump",))
    with pytest.raises(ConfigError, match="a jump ends at a time"):
        model(x, 0.5, to="jump")
    with pytest.raises(ConfigError, match="only a jump ends"):
        model(x, 0.5, to="endpoint", until=0.2)
    with pytest.raises(ConfigError, match="must be told where they end") as caught:
        Denoiser(DiT(DiTConfig(size=4, dim=8, depth=1, heads=1)), path, V, answers=("jump",))
    assert caught.value.fix == "model.net.told=[until]"


# times


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint8, torch.float32),
    ],
)
def test_times_are_one_a_sample_and_never_of_half_precision(given: torch.dtype, kept: torch.dtype) -> None:
    x = torch.zeros(4, 2, 2).to(given)
    for t in (
        0.3,
        torch.tensor(0.3),
        torch.tensor(0.3, dtype=torch.float64),
        torch.full((4,), 0.3, dtype=torch.float64),
        torch.full((1,), 0.3, dtype=torch.float64),
    ):
        made = times_like(t, x)
        assert made.shape == (4,) and made.dtype == kept
        torch.testing.assert_close(made, torch.full((4,), 0.3, dtype=kept))
    rows = torch.linspace(0.1, 0.9, 4)
    torch.testing.assert_close(times_like(rows, x), rows.to(kept))


def test_a_float_time_keeps_its_digits_in_double() -> None:
    assert float(times_like(0.1, torch.zeros(1, 1, dtype=torch.float64))) == 0.1
    assert float(times_like(0.9995, torch.zeros(1, 1, dtype=torch.bfloat16))) == pytest.approx(0.9995, abs=1e-7)


@paths
def test_what_networks_are_told_of_time(path: Path) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    assert torch.equal(as_time(path, t), t)
    assert torch.equal(as_reversed(path, t), 1 - t)
    close(as_thousandths(path, t), 1000 * t)
    close(as_log_level(path, t), torch.log(path.sigma(t) / path.alpha(t)) / 4)
    close(as_log_level_thousandths(path, t), 250 * torch.log(path.sigma(t) / path.alpha(t)))


@pytest.mark.parametrize("path", [Tabulated(), Tabulated("cosine", 40), Tabulated((0.1, 0.2, 0.4))], ids=str)
def test_indices_are_those_of_the_table(path: Tabulated) -> None:
    index = torch.arange(path.steps, dtype=torch.float64)
    close(as_index(path, path.at(index)), index, 1e-9)
    close(as_index(path, path.at(index + 0.5)), index + 0.5, 1e-9)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving()], ids=str)
def test_a_path_without_a_table_has_no_indices(path: Path) -> None:
    with pytest.raises(ConfigError, match="table of betas") as caught:
        Denoiser(Recorder(), path, EPS, as_index).predict(torch.zeros(2, 2), 0.5)
    assert caught.value.where == "model.time_input" and "thousandths" in str(caught.value.fix)


# scales


@paths
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_unit_variance_is_what_it_says(path: Path, sigma_data: float) -> None:
    """Exactly: alpha^2 sigma_data^2 + sigma^2 becomes 1; and on draws of data of that deviation."""
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    scale = unit_variance(sigma_data)(path, t)
    close(scale**2 * ((path.alpha(t) * sigma_data) ** 2 + path.sigma(t) ** 2), torch.ones_like(t))
    net, rng = Recorder(), torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(20_000, 1, generator=rng, dtype=torch.float64) for _ in range(2))
    x_t = noised(path, sigma_data * x0, eps, torch.tensor(0.4, dtype=torch.float64))
    Denoiser(net, path, EPS, scale_input=unit_variance(sigma_data)).predict(x_t, 0.4)
    assert abs(float(net.calls[0][0].var()) - 1) < 5 * (2 / 20_000) ** 0.5


def test_unit_variance_is_edms_c_in_on_its_own_path() -> None:
    path, level = VarianceExploding(80.0), torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    close(unit_variance()(path, level / 80), 1 / torch.sqrt(level**2 + 0.25))


# half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("answers", [None, torch.float32])
@predictions
def test_half_precision_goes_in_and_single_comes_out(prediction: Prediction, dtype, answers) -> None:
    path, x = Cosine(), torch.randn(3, 2, 2).to(dtype)
    for scale in (None, unit_variance()):
        net = Recorder(answers)
        model = Denoiser(net, path, prediction, scale_input=scale)
        for t in (0.4, torch.tensor(0.4), torch.tensor([0.2, 0.5, 0.9])):
            said, x0 = model.predict(x, t), model(x, t)
            assert said.dtype == x0.dtype == torch.float32
            seen, told, _ = net.calls[-1]
            assert seen.dtype == dtype and told.dtype == torch.float32
            torch.testing.assert_close(x0, prediction.x0(path, said, x.float(), times_like(t, x)))


def test_a_network_of_half_precision_works_with_a_scale() -> None:
    net: Any = nn.Linear(2, 2).to(torch.bfloat16)
    net.forward = lambda x, t: nn.functional.linear(x, net.weight, net.bias)
    model = Denoiser(net, Linear(), VELOCITY, scale_input=unit_variance())
    assert model(torch.randn(3, 2, dtype=torch.bfloat16), 0.5).dtype == torch.float32


# another path's coordinates


@pytest.mark.parametrize("new", PATHS, ids=str)
@paths
def test_a_denoiser_on_another_path_is_the_exact_one_there(path: Path, new: Path) -> None:
    for shape in SHAPES:
        exact = gaussian_like(shape)
        denoise = on_path(Bound(path, lambda x, t: exact.x0(path, x, t)), new)
        assert denoise.path == new
        # where both paths go: the mildest ends at a log_snr of -8.8
        s = new.time(torch.linspace(-8, 8, shape[0], dtype=torch.float64))
        x = states(shape, new, s)
        close(denoise(x, s), exact.x0(new, x, s), 1e-8)
        one = s[2]
        close(denoise(x, one), exact.x0(new, x, one), 1e-8)
        close(denoise(x, float(one)), exact.x0(new, x, one), 1e-8)
        close(denoise(x, 0.0), x)  # sigma = 0: the data itself


@pytest.mark.parametrize("new", PATHS, ids=str)
@paths
def test_the_other_path_is_asked_at_equal_log_snr(path: Path, new: Path) -> None:
    asked: list[tuple[Tensor, float | Tensor]] = []

    def fn(x: Tensor, t: float | Tensor) -> Tensor:
        asked.append((x, t))
        return x

    s, x = new.time(torch.linspace(-6, 6, 5, dtype=torch.float64)), torch.randn(5, 2, dtype=torch.float64)
    denoise = on_path(Bound(path, fn), new)
    denoise(x, s)
    seen, t = asked.pop()
    assert isinstance(t, Tensor)
    close(log_snr(path, t), log_snr(new, s), 1e-8)
    close(seen / path.alpha(t)[:, None], x / new.alpha(s)[:, None], 1e-9)  # the same data, the same share of noise
    denoise(x, float(s[1]))
    assert isinstance(asked[-1][1], float) and asked[-1][1] == pytest.approx(float(t[1]), abs=1e-12)
    denoise(x.float(), s.float())
    assert asked[-1][0].dtype == torch.float32


def test_a_denoiser_on_its_own_path_is_itself() -> None:
    exact, path = gaussian_like((5, 3)), Cosine()
    x = states((5, 3), path, 0.6)
    denoise = on_path(Bound(path, lambda x, t: exact.x0(path, x, t)), path)
    close(denoise(x, 0.6), exact.x0(path, x, 0.6))
