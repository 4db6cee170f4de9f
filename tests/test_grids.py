"""Grids: what all of them promise on every path, and the published numbers of each."""

import math

import pytest
import torch

from sfumato.catalogue import GRIDS, build
from sfumato.errors import ConfigError
from sfumato.grids import (
    ays,
    beta_sigma,
    dynamic_shift,
    ending,
    explicit,
    fitted,
    karras,
    kl_optimal,
    leading,
    linear,
    linspace,
    logistic,
    polyexponential,
    shift,
    shifted,
    trailing,
    uniform_log_snr,
)
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving, log_snr

PATHS = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "ve": VarianceExploding(),
    "table": Tabulated(),
    "zero_terminal": Tabulated(zero_terminal_snr=True),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
NEEDS = {"explicit": {"times": [1.0, *(1 - (i + 1) / 8 for i in range(8))]}, "dynamic_shift": {"tokens": 1024}}


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "ending"])
@paths
def test_every_grid_falls_from_the_noise_to_the_data(path: Path, name: str) -> None:
    slot = {"kind": name, **NEEDS.get(name, {})}
    if name in ("shifted", "dynamic_shift") and not isinstance(path, (Linear, Cosine)):
        pytest.skip("it pushes the first steps past the end of a path that never reaches pure noise")
    # two are published as beginning below the end, and noise levels as ending at 80 where the path's own are infinite
    start = 0.1 if name in ("leading", "ays") else 0.88
    times = build(slot, "Grid")(path, 8)
    assert times.shape == (9,) and times.dtype == torch.float64
    assert float(times[-1]) == 0 and start < float(times[0]) <= 1 and bool((times.diff() < 0).all())


def indices(path: Tabulated, times: torch.Tensor) -> list[int]:
    return [round(float(v)) for v in path.index(times[:-1])]


def test_the_three_spacings_of_a_table() -> None:
    path = Tabulated()
    assert indices(path, trailing(path, 50)) == list(range(999, 0, -20))
    assert indices(path, leading(path, 50, offset=1)) == list(range(981, 0, -20))
    assert indices(path, leading(path, 50, offset=1, spare=True))[:3] == [951, 932, 913]  # 1000 // 51 = 19
    five = indices(path, linspace(path, 5))
    assert five == [999, 749, 500, 250, 0]  # 749.25, 499.5 and 249.75, rounded to even


def levels(path: Path, times: torch.Tensor) -> torch.Tensor:
    return torch.exp(-log_snr(path, times[:-1]) / 2)


def test_karras_is_even_in_the_seventh_root() -> None:
    path = VarianceExploding(80.0)
    found = levels(path, karras(path, 10, sigma_min=0.002, sigma_max=80.0))
    roots = found ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))
    assert float(found[0]) == pytest.approx(80) and float(found[-1]) == pytest.approx(0.002)


@paths
def test_uniform_log_snr_is_even_and_polyexponential_of_power_one(path: Path) -> None:
    a = uniform_log_snr(path, 9, sigma_min=0.02, sigma_max=50.0)
    torch.testing.assert_close(a, polyexponential(path, 9, sigma_min=0.02, sigma_max=50.0))
    steps = torch.log(levels(path, a)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-6, atol=1e-6)


def test_align_your_steps_is_the_published_table_at_ten_steps() -> None:
    path = Tabulated("scaled_linear")
    assert indices(path, ays(path, 10)) == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    ve = VarianceExploding(700.0)
    want = torch.tensor([700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034], dtype=torch.float64)
    torch.testing.assert_close(levels(ve, ays(ve, 10, model="svd")), want, rtol=1e-9, atol=0)


def test_the_angle_is_even_in_the_grid_that_is_best_in_kl() -> None:
    path = Cosine()
    angles = torch.atan(levels(path, kl_optimal(path, 7, sigma_min=0.1, sigma_max=9.0)))
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(6))


def test_beta_quantiles_of_sigma_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    path = VarianceExploding(80.0)
    found = levels(path, beta_sigma(path, 8, sigma_min=0.5, sigma_max=40.0))
    u = 1 - torch.linspace(0, 1, 8, dtype=torch.float64).numpy()
    want = torch.from_numpy(0.5 + 39.5 * stats.beta.ppf(u, 0.6, 0.6))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by", [0.5, 1.0, 3.0])
def test_a_shift_multiplies_the_noise_level(by: float) -> None:
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    for path in (Linear(), Cosine(), VarianceExploding()):
        low = t / (40 if isinstance(path, VarianceExploding) else 1)
        before, after = (torch.exp(-log_snr(path, one) / 2) for one in (low, shift(path, low, by)))
        torch.testing.assert_close(after, by * before)
    assert torch.equal(shifted(Linear(), 6, by=1.0), linear(Linear(), 6))


def test_flux_shifts_by_its_published_amounts() -> None:
    for tokens, mu in ((4096, 1.15), (1024, 0.63), (256, 0.5)):
        times = dynamic_shift(Linear(), 4, tokens=tokens)
        by = math.exp(mu)
        even = torch.linspace(1, 0, 5, dtype=torch.float64)
        torch.testing.assert_close(times, by * even / (1 + (by - 1) * even), rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="tokens"):
        dynamic_shift(Linear(), 4)


def test_sd3s_published_grid_ends_at_a_level_that_was_shifted_twice() -> None:
    assert float(shifted(Linear(), 28, by=3.0, compat="sd3")[-2]) == pytest.approx(0.0089, abs=1e-4)


@paths
def test_logistic_of_level_and_spread_one_is_the_linear_paths_even_grid(path: Path) -> None:
    found = levels(path, logistic(path, 10, level=1.0, spread=1.0))[1:]
    top = float(levels(path, torch.tensor([1.0, 0.0], dtype=torch.float64))[0])
    share = torch.linspace(top / (1 + top) if math.isfinite(top) else 1.0, 0, 11, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(found, share / (1 - share), rtol=1e-6, atol=1e-6)


def test_explicit_times_and_ends_that_do_not_fit_are_refused() -> None:
    given = [1.0, 0.4, 0.0]
    assert explicit(Linear(), 2, times=given).tolist() == given
    with pytest.raises(ConfigError, match="another number of steps"):
        explicit(Linear(), 3, times=given)
    assert float(ending(Linear(), 4, at=0.1)[-1]) == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="past its own end"):
        ending(Linear(), 4, at=0.5)
    with pytest.raises(ConfigError):
        leading(Tabulated(), 2000)


def test_fitted_centres_on_more_noise_for_larger_pictures_and_ends_by_the_number_of_steps() -> None:
    path, least = Tabulated(), 0.01
    small, large = (levels(path, fitted(path, 9, pixels=side**2)) for side in (8, 32))
    assert bool((large > small)[1:-1].all())
    for n, last in ((2, 0.59 * math.exp(-1)), (5, 0.59 * math.exp(-2.5)), (12, least), (50, least), (100, least / 4)):
        assert float(levels(path, fitted(path, n))[-1]) == pytest.approx(last, rel=1e-3)
    assert fitted(path, 1).tolist() == [1.0, 0.0]


def test_fitted_spends_few_steps_in_the_middle_and_many_at_the_ends_too() -> None:
    for n, spread in ((5, 1.15), (12, 1.15), (16, 1.325), (20, 1.5), (60, 1.5)):
        assert fitted(Linear(), n).tolist() == fitted(Linear(), n, spread=spread).tolist()
        assert fitted(Linear(), n).tolist() != fitted(Linear(), n, spread=spread + 0.1).tolist()


def test_fitted_asks_a_table_for_no_less_noise_than_it_was_trained_on() -> None:
    path = Tabulated("scaled_linear")
    assert path.index(fitted(path, 40, pixels=4096)[-2:-1]).item() == pytest.approx(0, abs=1e-6)
    assert float(levels(path, fitted(path, 40, pixels=4096, least=0.1))[-1]) == pytest.approx(0.1)


@paths
def test_fitted_falls_from_any_start(path: Path) -> None:
    for start in (0.7, 0.2, 0.01):
        times = fitted(path, 6, start=start)
        assert float(times[0]) == pytest.approx(start) and float(times[-1]) == 0 and bool((times.diff() < 0).all())
