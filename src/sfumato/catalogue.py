"""The table of contents of the library: every name that a config may use, and where it lives.

Only strings, so that help, recipes and config errors need no torch. To add a sampler, a network, a weight: write the
file, add its line here; the tests then drive it by what the line says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato import registry


@dataclass(frozen=True)
class Sampler:
    """A sampler's line, which is also its test's specification.

    order: of convergence in the step, for deterministic options; calls: of the model, a step; stochastic: draws noise.
    """

    target: str
    order: int
    calls: int = 1
    stochastic: bool = False

    @property
    def fn(self) -> Any:
        """The sampler itself; importing it imports torch."""
        return registry.resolve(self.target)


PATHS = {
    "linear": "sfumato.paths:Linear",
    "cosine": "sfumato.paths:Cosine",
    "variance_preserving": "sfumato.paths:VariancePreserving",
    "variance_exploding": "sfumato.paths:VarianceExploding",
    "tabulated": "sfumato.paths:Tabulated",
}
PREDICTIONS = {
    "x0": "sfumato.predictions:X0",
    "eps": "sfumato.predictions:EPS",
    "v": "sfumato.predictions:V",
    "velocity": "sfumato.predictions:VELOCITY",
    "score": "sfumato.predictions:SCORE",
    "edm": "sfumato.predictions:edm()",
}
TIME_INPUTS = {
    "time": "sfumato.denoiser:as_time",
    "thousandths": "sfumato.denoiser:as_thousandths",
    "index": "sfumato.denoiser:as_index",
    "log_level": "sfumato.denoiser:as_log_level",
}
SCALE_INPUTS = {"unit_variance": "sfumato.denoiser:unit_variance()"}
DENSITIES = {
    "uniform": "sfumato.times:Uniform",
    "stratified": "sfumato.times:Stratified",
    "logit_normal": "sfumato.times:LogitNormal",
    "log_normal": "sfumato.times:LogNormal",
}
WEIGHTS = {
    "flat": "sfumato.objectives.weights:Flat",
    "min_snr": "sfumato.objectives.weights:MinSNR",
    "soft_min_snr": "sfumato.objectives.weights:SoftMinSNR",
    "truncated_snr": "sfumato.objectives.weights:TruncatedSNR",
    "snr_plus_one": "sfumato.objectives.weights:SNRPlusOne",
    "edm": "sfumato.objectives.weights:EDM",
    "p2": "sfumato.objectives.weights:P2",
    "elbo": "sfumato.objectives.weights:ELBO",
    "sigmoid": "sfumato.objectives.weights:Sigmoid",
}
OBJECTIVES = {"denoising": "sfumato.objectives.denoising:Denoising"}
GRIDS = {
    "linear": "sfumato.times:linear",
    "karras": "sfumato.times:karras",
    "uniform_log_snr": "sfumato.times:uniform_log_snr",
    "trailing": "sfumato.times:trailing",
    "leading": "sfumato.times:leading",
    "linspace": "sfumato.times:linspace",
    "shifted": "sfumato.times:shifted",
}
SAMPLERS = {
    "ddpm": Sampler("sfumato.samplers.ddpm:ddpm", order=1, stochastic=True),
    "ddim": Sampler("sfumato.samplers.ddim:ddim", order=1),
    "euler": Sampler("sfumato.samplers.ddim:euler", order=1),
    "heun": Sampler("sfumato.samplers.heun:heun", order=2, calls=2),
    "dpmpp_2m": Sampler("sfumato.samplers.dpm_solver:dpmpp_2m", order=2),
}
NETS = {"unet": "sfumato.nets.unet:UNet", "dit": "sfumato.nets.dit:DiT"}
CODECS = {"pixels": "sfumato.codecs:Pixels"}
CONDITIONERS = {
    "labels": "sfumato.conditioners:Labels",
    "prompts": "sfumato.conditioners:Prompts",
    "joined": "sfumato.conditioners:Joined",
}
DATA = {"scenes": "sfumato.data.scenes:Scenes", "folder": "sfumato.data.folder:Folder"}
OPTIMIZERS = {"adamw": "sfumato.train.optim:adamw", "muon": "sfumato.train.optim:muon"}

# Keyed by the type that annotations name: an option annotated `Weight` is a slot of WEIGHTS, and may be nested.
KINDS: Mapping[str, Mapping[str, str]] = {
    "Path": PATHS,
    "Prediction": PREDICTIONS,
    "TimeInput": TIME_INPUTS,
    "ScaleInput": SCALE_INPUTS,
    "Density": DENSITIES,
    "Uniform": DENSITIES,  # `Stratified.of` takes only some densities, and names them
    "Weight": WEIGHTS,
    "Objective": OBJECTIVES,
    "Grid": GRIDS,
    "Sampler": {name: line.target for name, line in SAMPLERS.items()},
    "Net": NETS,
    "Codec": CODECS,
    "Conditioner": CONDITIONERS,
    "Data": DATA,
    "Optimizer": OPTIMIZERS,
}


def build(slot: Any, kind_of: str) -> Any:
    """The object that a slot describes, e.g. build({"kind": "min_snr", "gamma": 5}, "Weight"). None stays None."""
    return registry.build(slot, kind_of, KINDS)
