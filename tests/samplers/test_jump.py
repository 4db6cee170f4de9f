"""Jumps between two times: exact on one Gaussian however few there are, alone, with others and with fresh noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import SHAPES, gaussian_like
from sfumato.denoiser import Bound, on_path
from sfumato.errors import ConfigError
from sfumato.exact import Gaussian
from sfumato.grids import linear
from sfumato.guidance import CFG, Unguided, guided
from sfumato.paths import Cosine, Linear, Path, SubVariancePreserving, Tabulated, VarianceExploding, VariancePreserving
from sfumato.samplers import Job, SeededNoise, drive, drive_many
from sfumato.samplers.consistency import consistency
from sfumato.samplers.ddim import ddim
from sfumato.samplers.jump import jump
from sfumato.starts import known_where

PATHS = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "sub_vp": SubVariancePreserving(),
    "ve": VarianceExploding(20.0),
    "table": Tabulated("scaled_linear"),
    "zero_terminal": Tabulated(zero_terminal_snr=True),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
DATA = Gaussian(torch.full((8,), 0.5, dtype=torch.float64), torch.full((8,), 0.6, dtype=torch.float64))


def grid(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@paths
def test_any_number_of_exact_jumps_is_the_flow(path: Path, shape: tuple[int, ...]) -> None:
    data, x = gaussian_like(shape), normal(*shape)
    for times in (grid(1, 0), grid(1, 0.4, 0), grid(1, 0.9, 0.5, 0.1, 0.02, 0), grid(0.8, 0.3)):
        start = x * float(path.sigma(times[0]))
        end = drive(jump(path, start, times), data.jumper(path))
        torch.testing.assert_close(end, data.flow(path, start, float(times[0]), float(times[-1])), rtol=0, atol=1e-10)


@paths
def test_a_jump_of_no_length_is_the_mean_and_one_to_the_data_the_endpoint(path: Path) -> None:
    exact, t = DATA.jumper(path), 0.7
    x = normal(5, 8)
    assert exact.answers == ("x0", "jump", "endpoint")
    torch.testing.assert_close(exact(x, t), DATA.x0(path, x, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(exact(x, t, to="jump", until=t), DATA.x0(path, x, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(exact(x, t, to="jump", until=t - 1e-6), DATA.x0(path, x, t), rtol=0, atol=1e-4)
    torch.testing.assert_close(exact(x, t, to="endpoint"), DATA.flow(path, x, t, 0.0), rtol=0, atol=1e-9)
    rows = torch.linspace(0, 0.7, 5, dtype=torch.float64)
    for i, one in enumerate(exact(x, t, to="jump", until=rows)):
        torch.testing.assert_close(one[None], exact(x[i : i + 1], t, to="jump", until=float(rows[i])))
    with pytest.raises(ConfigError, match="ends at a time"):
        exact(x, t, to="jump")


@paths
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_fresh_noise_between_jumps_leaves_the_marginal(path: Path, gamma: float) -> None:
    x = normal(3000, 8, seed=12345) * float(path.sigma(grid(1.0))) + float(path.alpha(grid(1.0))) * DATA.draw(
        3000, torch.Generator().manual_seed(5)
    )
    torch.manual_seed(78)
    ends = {one: drive(jump(path, x, grid(1, 0.7, 0.3, 0), gamma=one), DATA.jumper(path)) for one in (0.0, gamma)}
    assert abs(float(ends[gamma].std()) / 0.6 - 1) < 0.02 and abs(float(ends[gamma].mean()) - 0.5) < 0.02
    kept = torch.corrcoef(torch.stack([one.flatten() for one in ends.values()]))[0, 1]
    assert float(kept) < (0.98 if gamma < 1 else 0.95)  # it was drawn anew, in part or whole


def test_all_noise_drawn_anew_is_consistency_sampling() -> None:
    path, x, times = Linear(), normal(4, 8), linear(Linear(), 4)
    ours, theirs = (
        drive(running, DATA.jumper(path), SeededNoise.of(range(4)))
        for running in (jump(path, x, times, gamma=1.0), consistency(path, x, times))
    )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="share of the noise"):
        drive(jump(path, x, times, gamma=1.5), DATA.jumper(path))


def test_jumps_of_different_ends_share_a_forward() -> None:
    """Rows of several jobs, with other times and other ends, beside a job that asks for means."""
    path, seen = Linear(), []

    def forward(x: Tensor, t: Tensor, cond: Any, to: str = "x0", until: Tensor | None = None) -> Tensor:
        seen.append((to, None if until is None else until.tolist()))
        return DATA.jump(path, x, t, t if until is None else until) + cond["shift"][:, None]

    forward.answers = ("x0", "jump", "endpoint")  # type: ignore[attr-defined]

    def bound(shift: Tensor) -> Bound:
        return guided(forward, path, Unguided({"shift": shift}))

    fns = [(jump, grid(1, 0)), (jump, grid(1, 0.6, 0)), (jump, grid(0.9, 0.5, 0.2, 0)), (ddim, grid(1, 0.5, 0))]
    jobs, alone = [], []
    for k, (fn, times) in enumerate(fns):
        x, shift = normal(1 + k % 2, 8, seed=k), torch.full((1 + k % 2,), 0.1 * k, dtype=torch.float64)
        jobs.append(Job(fn(path, x, times), path, Unguided({"shift": shift})))
        alone.append(drive(fn(path, x, times), bound(shift)))
    seen.clear()
    together = drive_many(jobs, forward)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert seen[0] == ("jump", [0.0, 0.6, 0.6, 0.5]) and ("x0", None) in seen and len(seen) == 5


def test_guidance_combines_jumps() -> None:
    """Two branches in one batch, each with the jump's end; on the linear path this guides the average velocity."""
    path, x = Linear(), normal(3, 8)

    def forward(x: Tensor, t: Tensor, cond: Any, to: str = "x0", until: Any = None) -> Tensor:
        assert to == "jump" and len(x) == 6
        return cond["label"][:, None] * DATA.jump(path, x, t, until)

    conds = [{"label": torch.full((3,), value, dtype=torch.float64)} for value in (2.0, 1.0)]
    model = guided(forward, path, CFG(*conds, scale=3.0), answers=("x0", "jump", "endpoint"))
    for until in (0.2, grid(0.1, 0.2, 0.3)):
        got = model(x, 0.8, to="jump", until=until)
        torch.testing.assert_close(got, 4 * DATA.jump(path, x, 0.8, until))


def test_the_known_part_of_a_picture_is_known_to_jumps_too() -> None:
    path, data = Linear(), gaussian_like((5, 2, 3, 2))
    x, known = normal(5, 2, 3, 2), normal(5, 2, 3, 2, seed=4)
    free = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    free[..., 0] = 1
    end = drive(jump(path, x, grid(1, 0.5, 0)), known_where(data.jumper(path), known, free))
    torch.testing.assert_close(end[..., 1], known[..., 1])
    torch.testing.assert_close(end[..., 0], data.flow(path, x, 1.0, 0.0)[..., 0])


def test_jumps_in_another_paths_coordinates() -> None:
    """Equal noise levels: the exact model of one path, spoken to on another, is that path's exact model."""
    for new in (Linear(), Cosine()):
        x, other = normal(4, 8), on_path(DATA.jumper(VariancePreserving()), new)
        rows = grid(0.0, 0.1, 0.3, 0.5)
        for until in (0.0, 0.4, rows):
            expected = DATA.jump(new, x, 0.8, until)
            torch.testing.assert_close(other(x, 0.8, to="jump", until=until), expected, rtol=0, atol=1e-6)


def test_a_model_of_means_is_refused() -> None:
    with pytest.raises(ConfigError, match="how far a jump goes"):
        drive(jump(Linear(), normal(2, 8), grid(1, 0)), DATA.denoiser(Linear()))
