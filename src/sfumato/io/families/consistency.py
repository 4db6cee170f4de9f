"""Consistency models as diffusers keeps them and in OpenAI's files (Song et al. 2023), and the EDMs that taught them.

They answer where the flow ends, as EDM does where it is on average, but for a boundary at the smallest noise level.
Files have ADM's names, so `DDPM` knows them first and gives them here. Their names say what weights do not: an `edm_`
teacher, a `cd_` distilled with 40 noise levels, a `ct_` trained with 201 (ImageNet) or 151 (LSUN).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.denoiser import as_log_level_thousandths
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io.families import ddpm
from sfumato.io.families import pixel_unet as unet
from sfumato.io.family import Published
from sfumato.io.pretrained import read_json
from sfumato.model import Model
from sfumato.nets.pixel_unet import PixelUNet, PixelUNetConfig
from sfumato.paths import VarianceExploding

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.002, 80.0, 7.0
ORIGINAL = unet.Original(axes=2)


class Consistency:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = ("ConsistencyModelPipeline",)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        said = read_json(shared.part_of(folder, "scheduler") / "scheduler_config.json")
        if said.get("s_noise", 1.0) != 1.0:
            seen = f"s_noise {said['s_noise']}"
            raise CheckpointError("more noise than there should be", where=str(folder), seen=seen, fix="s_noise 1")
        config, net = ddpm.read_unet(shared.part_of(folder, "unet"))
        section = _section(
            config,
            float(said.get("sigma_data", SIGMA_DATA)),
            float(said.get("sigma_min", SIGMA_MIN)),
            float(said.get("sigma_max", SIGMA_MAX)),
        )
        sampling = {"steps": 1, "guidance": 1.0, **shared.recommended({"_class_name": SCHEDULER, **said})}
        files = ddpm.labels_of(config)
        return Published(section, shared.pair(config.size), sampling, net, files, shared.facts_of(folder, index))

    def owns(self, model: Model) -> bool:
        denoiser = model.denoiser
        told = denoiser.time_input is as_log_level_thousandths and _slot(model, "scale_input").get("kind") == SCALE
        known = isinstance(denoiser.path, VarianceExploding) and _slot(model, "prediction").get("kind") == "edm"
        return told and known and ddpm.is_of_pixels(model)

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, path = model.net, model.denoiser.path
        assert isinstance(net, PixelUNet) and isinstance(path, VarianceExploding)
        if "endpoint" not in model.answers:
            seen = f"answers {', '.join(model.answers)}"
            what = "diffusers has no pipeline of an EDM on pixels"
            raise ConfigError(what, where="--to diffusers", seen=seen, fix="--to single-file")
        parts = {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", "UNet2DModel"]}
        shared.write_index(place, self.pipelines[0], parts, model)
        shared.write_json(place / "scheduler" / "scheduler_config.json", _scheduler(model, path))
        ddpm.write_unet(place / "unet", net, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return False  # shapes tell, and `DDPM` sees them

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        return read_original(state, unet.seen_in(state, "original", str(file)), file, ddpm.flags_of(file))

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net, path = model.net, model.denoiser.path
        assert isinstance(net, PixelUNet) and isinstance(path, VarianceExploding)
        said = _slot(model, "prediction")
        wanted = {"sigma_data": SIGMA_DATA, "sigma_min": SIGMA_MIN if "endpoint" in model.answers else 0.0}
        found = {"sigma_data": float(said.get("sigma_data", 0.5)), "sigma_min": float(said.get("sigma_min", 0.0))}
        if found != wanted or path.sigma_max != SIGMA_MAX:
            seen = f"{found}, sigma_max {path.sigma_max:g}"
            what = "OpenAI's consistency models have other noise levels"
            raise ConfigError(what, where="--to single-file", seen=seen, fix="--to diffusers")
        return ddpm.write_original(net, ORIGINAL)


SCHEDULER, SCALE = "CMStochasticIterativeScheduler", "unit_variance"


def _slot(model: Model, name: str) -> Mapping[str, Any]:
    return shared.slot_of(model.spec["model"][name])


def _section(config: PixelUNetConfig, sigma_data: float, sigma_min: float, sigma_max: float) -> dict[str, Any]:
    """The model section. sigma_min: of the boundary; 0 for an EDM, which has none."""
    boundary = {"sigma_min": sigma_min} if sigma_min else {}
    return {
        "path": {"kind": "variance_exploding", "sigma_max": sigma_max},
        "prediction": {"kind": "edm", "sigma_data": sigma_data, **boundary},
        "time_input": "log_level_thousandths",
        "scale_input": {"kind": SCALE, "sigma_data": sigma_data},
        **ddpm.section_of(config),
        "answers": ["endpoint"] if sigma_min else ["x0"],
    }


def _scheduler(model: Model, path: VarianceExploding) -> dict[str, Any]:
    said, (sampler, grid) = _slot(model, "prediction"), shared.slots_of(model.spec["sampling"])
    of_grid = grid if grid.get("kind") == "consistency" else {}
    # There the boundary is the lowest level too. Of a student that began as an EDM it is at the data, which its answers
    # differ from by less than a step of 8 bits (Geng et al. 2024 train by the one and sample by the other).
    return {
        "_class_name": SCHEDULER,
        "clip_denoised": sampler.get("clip") is not None,
        "num_train_timesteps": int(of_grid.get("of", 40)),
        "rho": float(of_grid.get("rho", RHO)),
        "s_noise": 1.0,
        "sigma_data": float(said.get("sigma_data", SIGMA_DATA)),
        "sigma_max": path.sigma_max,
        "sigma_min": float(said.get("sigma_min") or of_grid.get("sigma_min", SIGMA_MIN)),
    }


def read_original(state: Mapping[str, Tensor], seen: unet.Seen, file: Path, flags: Mapping[str, Any]) -> Published:
    """An original file, of which `seen` is what the weights tell."""
    ddpm.check_channels(seen.in_channels, str(file))
    config, net = ddpm.read_original(state, seen, ORIGINAL, flags, str(file))
    teacher = flags.get("training_mode", "edm" if file.name.startswith("edm") else "") == "edm"
    if teacher:
        sampling = {"sampler": {"kind": "heun"}, "grid": {"kind": "karras"}, "steps": 40, "guidance": 1.0}
    else:
        trained = 201 if seen.channels == ddpm.COSINE else 151
        of = int(flags.get("steps", trained if file.name.startswith("ct") else 40))
        sampler = {"kind": "consistency", "sigma_min": SIGMA_MIN, "clip": 1.0}
        sampling = {"sampler": sampler, "grid": {"kind": "consistency", "of": of}, "steps": 1, "guidance": 1.0}
    section = _section(config, SIGMA_DATA, 0.0 if teacher else SIGMA_MIN, SIGMA_MAX)
    facts = {"from": file.name, "pipeline": "EDM" if teacher else "consistency model"}
    return Published(section, shared.pair(config.size), sampling, net, ddpm.labels_of(config), facts)
