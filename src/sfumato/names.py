"""The names that people know samplers and grids by: k-diffusion's, A1111's, ComfyUI's, InvokeAI's and diffusers'.

Here a sampler and a grid are two choices. Elsewhere one name often says both ("DPM++ 2M Karras", "dpmpp_2m_k"), or a
class and its config do (`DPMSolverMultistepScheduler`); all of them resolve to slots of the catalogue. What is already
a slot passes through as it is. Only strings, so that config errors need no torch.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sfumato.catalogue import GRIDS, SAMPLERS
from sfumato.errors import ConfigError, nearest

Slot = dict[str, Any]
TUNED = "tuned"  # the name of whatever `sfumato tune-sampler` made for the number of steps


class Known(NamedTuple):
    """What a name stands for: slots of a sampler and, if the name says so, of a grid."""

    sampler: Slot
    grid: Slot | None = None


# Spelled as `_plain` leaves them: small letters, "++" as "pp", words joined by "_", no "k_" or "sample_" in front.
SAMPLER_NAMES: dict[str, Slot] = {
    "euler_a": {"kind": "euler_ancestral"},
    "euler_discrete": {"kind": "euler"},
    "flowmatch": {"kind": "euler"},
    "flow_match_euler": {"kind": "euler"},
    "heun_discrete": {"kind": "heun"},
    "dpm2": {"kind": "dpm_2"},
    "kdpm_2": {"kind": "dpm_2"},
    "dpm2_a": {"kind": "dpm_2_ancestral"},
    "kdpm_2_a": {"kind": "dpm_2_ancestral"},
    "dpm_2_a": {"kind": "dpm_2_ancestral"},
    "dpmpp_2s_a": {"kind": "dpmpp_2s_ancestral"},
    "dpm_solverpp": {"kind": "dpmpp_2m"},
    "dpmsolverpp": {"kind": "dpmpp_2m"},
    "dpmpp_2m_sde": {"kind": "sde_dpmpp", "order": 2},
    "dpmpp_2m_sde_heun": {"kind": "sde_dpmpp", "order": 2, "form": "heun"},
    "dpmpp_3m_sde": {"kind": "sde_dpmpp", "order": 3},
    "plms": {"kind": "pndm"},
    "ipndm_v": {"kind": "ipndm", "variable": "sigma"},
    "res_multistep": {"kind": "exp_ab", "order": 2},
    "uni_pc": {"kind": "unipc", "order": 3, "variant": "bh1"},
    "uni_pc_bh2": {"kind": "unipc", "order": 3, "variant": "bh2"},
}
GRID_NAMES: dict[str, Slot] = {
    "ka": {"kind": "karras"},
    "k": {"kind": "karras"},
    "exp": {"kind": "exponential"},
    "poly_exponential": {"kind": "polyexponential"},
    "normal": {"kind": "linspace"},
    "sgm_uniform": {"kind": "linspace", "spare": True},
    "simple": {"kind": "trailing"},
    "ddim_uniform": {"kind": "leading", "offset": 1},
    "uniform": {"kind": "linspace"},
    "beta": {"kind": "beta_time"},
    "align_your_steps": {"kind": "ays"},
    "ays_sdxl": {"kind": "ays", "model": "sdxl"},
    "ays_svd": {"kind": "ays", "model": "svd"},
}


def spelled_out(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which `sampler` and `grid` are the catalogue's. A grid that a sampler's name says yields to one that
    is given beside it.

    ConfigError for a name that nothing is known by, with the nearest that are known.
    """
    out = dict(asked)
    sampler, grid = out.get("sampler"), out.get("grid")
    if sampler is not None and sampler != TUNED:
        known = sampler_named(sampler)
        out["sampler"] = known.sampler if known.sampler != {"kind": sampler} else sampler
        if grid is None and known.grid is not None:
            out["grid"] = known.grid
    if grid is not None:
        found = grid_named(grid)
        out["grid"] = found if found != {"kind": grid} else grid
    return out


def sampler_named(asked: Any) -> Known:
    """What a name, a slot with such a name as its kind, or a diffusers scheduler's config stands for."""
    if isinstance(asked, Mapping):
        if "_class_name" in asked:
            return _of_diffusers(str(asked["_class_name"]), asked)
        kind = asked.get("kind")
        if not isinstance(kind, str) or kind in SAMPLERS:
            return Known(dict(asked))
        known = sampler_named(kind)
        return Known({**known.sampler, **{key: value for key, value in asked.items() if key != "kind"}}, known.grid)
    if not isinstance(asked, str) or ":" in asked:  # the user's own, or a mistake that the catalogue's check tells of
        return Known({"kind": asked})
    if asked in CLASSES:
        return _of_diffusers(asked, {})
    plain = _plain(asked)
    if (slot := _sampler(plain)) is not None:
        return Known(slot)
    for end in sorted([*GRID_NAMES, *GRIDS], key=len, reverse=True):
        slot = _sampler(plain.removesuffix(f"_{end}")) if plain.endswith(f"_{end}") else None
        if slot is not None:
            return Known(slot, grid_named(end))
    known_names = [*SAMPLERS, *SAMPLER_NAMES, *CLASSES]
    raise ConfigError("sampler is not known", where="sampler", seen=asked, fix=_nearest(asked, known_names))


def grid_named(asked: Any) -> Slot:
    """What a name, or a slot with such a name as its kind, stands for."""
    if isinstance(asked, Mapping):
        kind = asked.get("kind")
        if not isinstance(kind, str) or kind in GRIDS:
            return dict(asked)
        return {**grid_named(kind), **{key: value for key, value in asked.items() if key != "kind"}}
    if not isinstance(asked, str) or ":" in asked:
        return {"kind": asked}
    plain = _plain(asked)
    if plain in GRIDS:
        return {"kind": plain}
    if plain in GRID_NAMES:
        return dict(GRID_NAMES[plain])
    raise ConfigError("grid is not known", where="grid", seen=asked, fix=_nearest(asked, [*GRIDS, *GRID_NAMES]))


def _sampler(plain: str) -> Slot | None:
    if plain in SAMPLERS:
        return {"kind": plain}
    return dict(SAMPLER_NAMES[plain]) if plain in SAMPLER_NAMES else None


def _plain(name: str) -> str:
    """One spelling of many: "DPM++ 2M Karras", "k_dpmpp_2m_karras" and "dpmpp-2m-karras" are one."""
    joined = re.sub(r"[^a-z0-9]+", "_", name.strip().lower().replace("++", "pp")).strip("_")
    return re.sub(r"^(k_|sample_|get_sigmas_)", "", joined)


def _nearest(asked: str, known: list[str]) -> str:
    spellings = {_plain(name): name for name in reversed(known)}
    found = nearest(_plain(asked), spellings)
    return ", ".join(spellings.get(name, name) for name in found.split(", "))


# diffusers' schedulers: each class by what its config makes of it


def _of_diffusers(name: str, config: Mapping[str, Any]) -> Known:
    if name not in CLASSES:
        raise ConfigError(
            "scheduler of diffusers is not known", where="sampler", seen=name, fix=_nearest(name, list(CLASSES))
        )
    sampler, spacing = CLASSES[name]
    return Known(sampler(config), _grid_of(config, spacing))


def _grid_of(config: Mapping[str, Any], spacing: str) -> Slot:
    """spacing: the class's own way where the config leaves it out; "flow" is what flow matching's schedulers do."""
    levels = {"sigma_min": config.get("sigma_min"), "sigma_max": config.get("sigma_max")}
    levels = {key: value for key, value in levels.items() if value is not None}
    for flag, kind in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_beta_sigmas", "beta_sigma"),
        ("use_lu_lambdas", "uniform_log_snr"),
    ):
        if config.get(flag):
            return {"kind": kind, **levels}
    if spacing == "flow" or config.get("use_flow_sigmas"):
        return _flow_grid(config)
    if spacing == "lcm":
        return {"kind": "lcm", "of": int(config.get("original_inference_steps", 50))}
    if spacing == "consistency":
        return {"kind": "consistency", "of": int(config.get("num_train_timesteps", 40)), **_plain_levels(config)}
    if spacing == "karras":
        return {"kind": "karras", **levels, "rho": config.get("rho", 7.0)}
    name = str(config.get("timestep_spacing", spacing.removesuffix("+")))
    spare = {"spare": True} if spacing.endswith("+") else {}  # multistep solvers spare the point at the data
    if name == "leading":
        return {"kind": "leading", "offset": int(config.get("steps_offset", 0)), **spare}
    return {"kind": "linspace", **spare} if name == "linspace" else {"kind": name}


def _plain_levels(config: Mapping[str, Any]) -> Slot:
    usual = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    return {name: float(config[name]) for name, value in usual.items() if config.get(name, value) != value}


def _flow_grid(config: Mapping[str, Any]) -> Slot:
    if config.get("use_dynamic_shifting"):
        names = {
            "base_shift": "low",
            "max_shift": "high",
            "base_image_seq_len": "fewest",
            "max_image_seq_len": "most",
            "shift_terminal": "terminal",
            "time_shift_type": "form",
        }
        given = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
        return {"kind": "dynamic_shift", **given}
    by = float(config.get("flow_shift", config.get("shift", 1.0)))
    return {"kind": "shifted", "by": by, "compat": "sd3"}


def _fixed(kind: str, **options: Any) -> Callable[[Mapping[str, Any]], Slot]:
    return lambda config: {"kind": kind, **options}


def _ddpm(config: Mapping[str, Any]) -> Slot:
    variance = str(config.get("variance_type", "fixed_small"))
    if variance == "learned":
        raise ConfigError(
            "the learned variance of DDPM without a range is not known here",
            where="sampler.variance_type",
            seen=variance,
            fix="learned_range, or {kind: ddpm, variance: small}",
        )
    slot = {"kind": "ddpm", "variance": variance.removesuffix("_log").removeprefix("fixed_").removesuffix("_range")}
    return slot | ({"clip": float(config.get("clip_sample_range", 1.0))} if config.get("clip_sample", True) else {})


def _ddim(config: Mapping[str, Any]) -> Slot:
    clips = config.get("clip_sample", bool(config))  # the class alone is asked for of latents, too
    return {"kind": "ddim"} | ({"clip": float(config.get("clip_sample_range", 1.0))} if clips else {})


def _consistency(config: Mapping[str, Any]) -> Slot:
    slot = {"kind": "consistency", "sigma_min": float(config.get("sigma_min", 0.002))}
    return slot | ({"clip": 1.0} if config.get("clip_denoised", True) else {})


def _dpm_multistep(config: Mapping[str, Any]) -> Slot:
    kind = str(config.get("algorithm_type", "dpmsolver++"))
    order, form = int(config.get("solver_order", 2)), str(config.get("solver_type", "midpoint"))
    if kind == "sde-dpmsolver++":
        return {"kind": "sde_dpmpp", "order": order, "form": form}
    if kind not in ("dpmsolver++", "dpmsolver"):
        fix = "sde-dpmsolver++"
        raise ConfigError("an algorithm that is not known here", where="sampler.algorithm_type", seen=kind, fix=fix)
    of = {"of": "noise"} if kind == "dpmsolver" else {}
    final = {} if config.get("lower_order_final", True) else {"lower_order_final": False}
    if order == 1:
        return {"kind": "ddim"}
    if order == 2:
        return {"kind": "dpmpp_2m", "form": form, **of, **final}
    return {"kind": "dpmpp_3m", "coef": "published", "form": form, **of, **final}


def _dpm_single(config: Mapping[str, Any]) -> Slot:
    data, order = config.get("algorithm_type", "dpmsolver++") == "dpmsolver++", int(config.get("solver_order", 2))
    if order == 1:
        return {"kind": "ddim"}
    if data and order == 3:
        seen = "DPM-Solver++(3S)"
        raise ConfigError("a solver that is not known here", where="sampler.solver_order", seen=seen, fix="dpmpp_3m")
    return {"kind": "dpmpp_2s" if data else f"dpm_{order}"}


def _unipc(config: Mapping[str, Any]) -> Slot:
    order, variant = int(config.get("solver_order", 2)), str(config.get("solver_type", "bh2"))
    return {"kind": "unipc", "order": order, "variant": variant}


CLASSES: dict[str, tuple[Callable[[Mapping[str, Any]], Slot], str]] = {
    "DDIMScheduler": (_ddim, "leading"),
    "DDIMInverseScheduler": (_fixed("ddim_inversion"), "leading"),
    "DDPMScheduler": (_ddpm, "leading"),
    "PNDMScheduler": (
        lambda config: {"kind": "pndm", "start": "plms" if config.get("skip_prk_steps") else "runge_kutta"},
        "leading",
    ),
    "EulerDiscreteScheduler": (_fixed("euler"), "linspace"),
    "EulerAncestralDiscreteScheduler": (_fixed("euler_ancestral"), "linspace"),
    "HeunDiscreteScheduler": (_fixed("heun"), "linspace"),
    "LMSDiscreteScheduler": (_fixed("lms"), "linspace"),
    "KDPM2DiscreteScheduler": (_fixed("dpm_2"), "linspace"),
    "KDPM2AncestralDiscreteScheduler": (_fixed("dpm_2_ancestral"), "linspace"),
    "DPMSolverMultistepScheduler": (_dpm_multistep, "linspace+"),
    "DPMSolverSinglestepScheduler": (_dpm_single, "linspace+"),
    "DPMSolverSDEScheduler": (_fixed("dpmpp_sde"), "linspace"),
    "UniPCMultistepScheduler": (_unipc, "linspace+"),
    "DEISMultistepScheduler": (
        lambda config: {"kind": "deis", "order": int(config.get("solver_order", 2))},
        "linspace+",
    ),
    "LCMScheduler": (
        lambda config: {"kind": "lcm", "boundary": float(config.get("timestep_scaling", 10.0)), "to": "x0"},
        "lcm",
    ),
    "CMStochasticIterativeScheduler": (_consistency, "consistency"),
    "EDMEulerScheduler": (_fixed("euler"), "karras"),
    "EDMDPMSolverMultistepScheduler": (_dpm_multistep, "karras"),
    "FlowMatchEulerDiscreteScheduler": (_fixed("euler"), "flow"),
    "FlowMatchHeunDiscreteScheduler": (_fixed("heun", variable="time"), "flow"),
}
