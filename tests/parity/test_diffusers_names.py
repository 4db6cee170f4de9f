"""diffusers' classes and configs resolve to the sampler and the grid that they are: their own times, from our grids."""

from typing import Any

import pytest
import torch

from sfumato.catalogue import build
from sfumato.errors import ConfigError
from sfumato.names import CLASSES, sampler_named
from sfumato.paths import Linear, Tabulated, VarianceExploding

diffusers = pytest.importorskip("diffusers")

TABLE = Tabulated("scaled_linear")
BETAS = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
N = 8
BY_TABLE = [name for name in CLASSES if not name.startswith(("EDM", "FlowMatch", "CM", "DDIMInverse"))]
OFTEN = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # two times a step
KARRAS = [
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
]


def ours(config: dict[str, Any], path: Any = TABLE) -> torch.Tensor:
    grid = sampler_named(config).grid
    assert grid is not None
    return build(grid, "Grid")(path, N)[:-1]


def theirs(name: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A scheduler with its steps set, and the config that it would save."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(**BETAS, **config)
    scheduler.set_timesteps(N)
    return scheduler, {"_class_name": name, **dict(scheduler.config)}


@pytest.mark.parametrize("spacing", [None, "trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", BY_TABLE)
def test_times_of_a_table(name: str, spacing: str | None) -> None:
    if name in ("LCMScheduler", "DPMSolverSinglestepScheduler") and spacing:
        pytest.skip("it has no choice of them")
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler, config = theirs(name, **options, **({"timestep_spacing": spacing} if spacing else {}))
    asked = torch.as_tensor(scheduler.timesteps).double()
    if name in OFTEN:
        asked = asked[::2]
    if name == "PNDMScheduler":  # it asks twice at the second
        asked = torch.tensor(sorted(set(asked.tolist()), reverse=True), dtype=torch.float64)
    # theirs are whole, or float32
    torch.testing.assert_close(TABLE.index(ours(config)), asked, rtol=0, atol=0.51)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", KARRAS)
def test_times_of_noise_levels(name: str, flag: str) -> None:
    if flag == "use_beta_sigmas":
        pytest.importorskip("scipy")
    scheduler, config = theirs(name, **{flag: True})
    levels = torch.as_tensor(scheduler.sigmas).double()[:-1]
    levels = levels[::2] if name in OFTEN else levels
    times = ours(config)
    torch.testing.assert_close((TABLE.sigma(times) / TABLE.alpha(times))[:N], levels[:N], rtol=2e-3, atol=1e-5)


def test_times_of_flow_matching() -> None:
    for config in ({}, {"shift": 3.0}):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(N)
        times = ours({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config}, Linear())
        torch.testing.assert_close(times, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-5)


def test_times_of_edm() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(N)
    path = VarianceExploding()
    times = ours({"_class_name": "EDMEulerScheduler", **scheduler.config}, path)
    torch.testing.assert_close(path.sigma(times), scheduler.sigmas[:-1].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"num_train_timesteps": 151, "sigma_max": 70.0, "rho": 5.0}])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_times_of_consistency_models(config: dict[str, Any], n: int) -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler(**config)
    scheduler.set_timesteps(n)
    path = VarianceExploding(scheduler.config.sigma_max)
    grid = sampler_named({"_class_name": "CMStochasticIterativeScheduler", **scheduler.config}).grid
    times = build(grid, "Grid")(path, n)
    torch.testing.assert_close(path.sigma(times)[:-1], scheduler.sigmas[:-1].double(), rtol=1e-6, atol=1e-7)
    scheduler.set_timesteps(timesteps=[22, 17, 0])
    levels = build({**grid, "levels": [0, 17, 22]}, "Grid")(path, 3)
    torch.testing.assert_close(path.sigma(levels)[:-1], scheduler.sigmas[:-1].double(), rtol=1e-6, atol=1e-7)


def test_a_solver_that_is_not_here_is_named_and_not_replaced() -> None:
    for config, said in (
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, r"3S[\s\S]*dpmpp_3m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "not known here"),
        ({"_class_name": "TCDScheduler"}, "not known"),
    ):
        with pytest.raises(ConfigError, match=said):
            sampler_named(config)


@pytest.mark.parametrize(
    ("config", "slot"),
    [
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False},
            {"kind": "ddpm", "variance": "learned"},
        ),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
            {"kind": "ddpm", "variance": "large", "clip": 1.0},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            {"kind": "sde_dpmpp", "order": 2, "form": "midpoint"},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "solver_order": 3},
            {"kind": "dpmpp_3m", "coef": "published", "form": "midpoint", "of": "noise"},
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, {"kind": "dpmpp_2s"}),
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, {"kind": "ddim"}),
        ({"_class_name": "DDIMScheduler", "beta_start": 1e-4}, {"kind": "ddim", "clip": 1.0}),
        (
            {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": True, "sigma_min": 0.01},
            {"kind": "consistency", "sigma_min": 0.01, "clip": 1.0},
        ),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"kind": "pndm", "start": "plms"}),
    ],
    ids=str,
)
def test_what_a_config_makes_of_a_class(config: dict[str, Any], slot: dict[str, Any]) -> None:
    assert sampler_named(config).sampler == slot
    build(slot, "Sampler")
