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

    order: of convergence in the step, for the default options but where they ask for chance, and a start that does not
    cap it; the weak order if it draws; 0 is no solver, or one with errors that a finer grid leaves.
    calls: of the model, a step; fewer in one that begins at pure noise or ends at the data. extra: calls more, at the
    start. stochastic: draws noise. adaptive: chooses its steps, within tolerances. inverse: runs from the data to the
    noise. asks: for what, see `Denoise`.
    """

    target: str
    order: int
    calls: int = 1
    stochastic: bool = False
    extra: int = 0
    adaptive: bool = False
    inverse: bool = False
    asks: str = "x0"

    @property
    def fn(self) -> Any:
        """The sampler itself; importing it imports torch."""
        return registry.resolve(self.target)


@dataclass(frozen=True)
class Method:
    """What an objective asks of those who take part, where it makes a student: see `sfumato.objectives.teaching`.

    about: in a few words. teacher: "needed", "optional" or "none". answers: what its student can be asked for then, see
    `Denoise`. slow: it has a copy that follows the student: "needed", or "spared" where the student is a low-rank
    change, which then stands in for it; "" for none. critic: it has one, which learns beside the student,
    made of the "teacher" (of the student where there is no teacher) or of the "student"; "" for none.
    derivative: it takes forward-mode derivatives of the network. pairs: it learns from noise and where the teacher's
    flow takes it, in place of data. boundary: its student says x itself at the data: a prediction of x0 becomes
    `sfumato.predictions.bounded`. begins: it asks where there may be only noise, so the prediction must say something
    of the data there: not noise or a score on a path that ends in pure noise. features: it hears what a network says
    inside, "needed" or "optional". told: numbers that its student's network is told, by layers of their own, so it is
    no low-rank change. scales: nor with this option, by which it is told the scale of guidance.

    Any path will do for all of them, teacher and student may have two, and any prediction otherwise; a teacher says
    E[x0 | x_t]. `sfumato.train.possible` refuses what cannot be, before a run has a folder.
    """

    about: str
    teacher: str = "needed"
    answers: tuple[str, ...] = ("x0",)
    slow: str = ""
    critic: str = ""
    derivative: bool = False
    pairs: bool = False
    boundary: bool = False
    begins: bool = False
    features: str = ""
    told: tuple[str, ...] = ()
    scales: bool = False


PATHS = {
    "linear": "sfumato.paths:Linear",
    "cosine": "sfumato.paths:Cosine",
    "optimal_transport": "sfumato.paths:OptimalTransport",
    "variance_preserving": "sfumato.paths:VariancePreserving",
    "sub_variance_preserving": "sfumato.paths:SubVariancePreserving",
    "variance_exploding": "sfumato.paths:VarianceExploding",
    "tabulated": "sfumato.paths:Tabulated",
    "learned": "sfumato.learned:Learned",
}
PREDICTIONS = {
    "x0": "sfumato.predictions:X0",
    "eps": "sfumato.predictions:EPS",
    "v": "sfumato.predictions:V",
    "velocity": "sfumato.predictions:VELOCITY",
    "score": "sfumato.predictions:SCORE",
    "edm": "sfumato.predictions:edm()",
    "bounded": "sfumato.predictions:bounded()",
}
TIME_INPUTS = {
    "time": "sfumato.denoiser:as_time",
    "reversed": "sfumato.denoiser:as_reversed",
    "thousandths": "sfumato.denoiser:as_thousandths",
    "index": "sfumato.denoiser:as_index",
    "log_level": "sfumato.denoiser:as_log_level",
    "log_level_thousandths": "sfumato.denoiser:as_log_level_thousandths",
}
SCALE_INPUTS = {"unit_variance": "sfumato.denoiser:unit_variance()"}
DENSITIES = {
    "uniform": "sfumato.times:Uniform",
    "stratified": "sfumato.times:Stratified",
    "logit_normal": "sfumato.times:LogitNormal",
    "log_normal": "sfumato.times:LogNormal",
    "u_shaped": "sfumato.times:UShaped",
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
COUPLINGS = {
    "independent": "sfumato.objectives.couplings:Independent",
    "optimal_transport": "sfumato.objectives.couplings:OptimalTransport",
    "schroedinger_bridge": "sfumato.objectives.couplings:SchroedingerBridge",
}
OBJECTIVES = {
    "denoising": "sfumato.objectives.denoising:Denoising",
    "hybrid": "sfumato.objectives.hybrid:Hybrid",
    "vdm": "sfumato.objectives.vdm:VDM",
    "autoencoder": "sfumato.objectives.autoencoding:Autoencoding",
    "guidance": "sfumato.objectives.guidance:GuidanceDistillation",
    "reflow": "sfumato.objectives.reflow:Reflow",
    "latent_consistency": "sfumato.objectives.latent_consistency:LatentConsistency",
    "progressive": "sfumato.objectives.progressive:Progressive",
    "consistency_distillation": "sfumato.objectives.consistency:ConsistencyDistillation",
    "consistency_training": "sfumato.objectives.consistency:ConsistencyTraining",
    "improved_consistency_training": "sfumato.objectives.improved_consistency:ImprovedConsistencyTraining",
    "easy_consistency_training": "sfumato.objectives.improved_consistency:EasyConsistencyTraining",
    "continuous_consistency": "sfumato.objectives.continuous_consistency:ContinuousConsistency",
    "distribution_matching": "sfumato.objectives.distribution:DistributionMatching",
    "meanflow": "sfumato.objectives.meanflow:MeanFlow",
    "improved_meanflow": "sfumato.objectives.meanflow:ImprovedMeanFlow",
    "shortcut": "sfumato.objectives.shortcut:Shortcut",
    "adversarial": "sfumato.objectives.adversarial:Adversarial",
}
# What makes a student of a model: the objectives of these names are called with a `Lesson`.
METHODS = {
    "guidance": Method(
        "the guided answer of the teacher in one call, for one scale or any that it is told", scales=True
    ),
    "reflow": Method("straight flows, from pairs of noise and of where the teacher takes it", pairs=True, begins=True),
    "latent_consistency": Method(
        "where the guided flow ends, for any data (LCM, LCM-LoRA)",
        answers=("endpoint",),
        slow="spared",
        begins=True,
        scales=True,
    ),
    "progressive": Method("two steps of the teacher in one, again and again", slow="needed", begins=True, scales=True),
    "consistency_distillation": Method(
        "where the teacher's guided flow ends, from steps of a solver (CD)",
        answers=("endpoint",),
        slow="spared",
        boundary=True,
        begins=True,
    ),
    "consistency_training": Method(
        "where the flow ends, from data alone (CT)",
        "none",
        answers=("endpoint",),
        slow="spared",
        boundary=True,
        begins=True,
    ),
    "improved_consistency_training": Method(
        "where the flow ends, from data alone, without a slow copy (iCT)",
        "none",
        answers=("endpoint",),
        boundary=True,
        begins=True,
    ),
    "easy_consistency_training": Method(
        "where the flow ends, from data, going on from a diffusion model (ECT)",
        "none",
        answers=("endpoint",),
        boundary=True,
    ),
    "continuous_consistency": Method(
        "where the flow ends, in continuous time, of a teacher or of data alone (sCD, sCT)",
        teacher="optional",
        answers=("endpoint",),
        critic="student",
        derivative=True,
        boundary=True,
    ),
    "distribution_matching": Method(
        "the teacher's guided distribution in a few steps, by a score of the student's own (DMD2)",
        answers=("endpoint",),
        critic="teacher",
        begins=True,
        features="optional",
    ),
    "meanflow": Method(
        "jumps of any length, by how they change along the flow",
        "optional",
        answers=("jump",),
        derivative=True,
        told=("until",),
    ),
    "improved_meanflow": Method(
        "the same as a regression of velocities, with the guidance told",
        "optional",
        answers=("jump",),
        critic="student",
        derivative=True,
        told=("until",),
        scales=True,
        features="optional",
    ),
    "shortcut": Method(
        "jumps of any length, each from two of half",
        "optional",
        answers=("jump",),
        slow="spared",
        begins=True,
        told=("until",),
    ),
    "adversarial": Method(
        "pictures in a few steps that heads on the teacher's features take for real (ADD, LADD)",
        answers=("endpoint",),
        critic="teacher",
        begins=True,
        features="needed",
    ),
}
DISTANCES = {
    "laplacian": "sfumato.objectives.distances:Laplacian",
    "ssim": "sfumato.objectives.distances:StructuralSimilarity",
}
DISCRIMINATORS = {"patch": "sfumato.nets.discriminator:PatchDiscriminator"}
HEADS = {"features": "sfumato.nets.features:on_features"}
GRIDS = {
    "logistic": "sfumato.grids:logistic",
    "fitted": "sfumato.grids:fitted",
    "explicit": "sfumato.grids:explicit",
    "linear": "sfumato.grids:linear",
    "karras": "sfumato.grids:karras",
    "exponential": "sfumato.grids:uniform_log_snr",
    "polyexponential": "sfumato.grids:polyexponential",
    "uniform_log_snr": "sfumato.grids:uniform_log_snr",
    "kl_optimal": "sfumato.grids:kl_optimal",
    "ays": "sfumato.grids:ays",
    "beta_sigma": "sfumato.grids:beta_sigma",
    "beta_time": "sfumato.grids:beta_time",
    "trailing": "sfumato.grids:trailing",
    "leading": "sfumato.grids:leading",
    "linspace": "sfumato.grids:linspace",
    "lcm": "sfumato.grids:lcm",
    "consistency": "sfumato.grids:consistency",
    "shifted": "sfumato.grids:shifted",
    "dynamic_shift": "sfumato.grids:dynamic_shift",
    "ending": "sfumato.grids:ending",
}
GUIDANCES = {
    "unguided": "sfumato.guidance:Unguided",
    "cfg": "sfumato.guidance:CFG",
    "cfg_plus_plus": "sfumato.guidance:CFGPlusPlus",
    "cfg_zero": "sfumato.guidance:CFGZero",
    "apg": "sfumato.guidance:APG",
    "weighted": "sfumato.guidance:Weighted",
    "autoguidance": "sfumato.guidance:Autoguidance",
    "perturbed_attention": "sfumato.guidance:PerturbedAttention",
    "skip_layers": "sfumato.guidance:SkipLayers",
    "classifier": "sfumato.guidance:Classifier",
    "distilled": "sfumato.guidance:Distilled",
    "rescaled": "sfumato.guidance:Rescaled",
    "thresholded": "sfumato.guidance:Thresholded",
    "within": "sfumato.guidance:Within",
}
SAMPLERS = {
    "ddpm": Sampler("sfumato.samplers.ddpm:ddpm", order=1, stochastic=True),
    "euler_ancestral": Sampler("sfumato.samplers.ancestral:euler_ancestral", order=1, stochastic=True),
    "dpm_2_ancestral": Sampler("sfumato.samplers.ancestral:dpm_2_ancestral", order=1, calls=2, stochastic=True),
    "dpmpp_2s_ancestral": Sampler("sfumato.samplers.ancestral:dpmpp_2s_ancestral", order=1, calls=2, stochastic=True),
    "dpmpp_sde": Sampler("sfumato.samplers.ancestral:dpmpp_sde", order=1, calls=2, stochastic=True),
    "sde_dpmpp": Sampler("sfumato.samplers.sde_dpm_solver:sde_dpmpp", order=2, stochastic=True),
    "sde_em": Sampler("sfumato.samplers.sde:sde_em", order=1, stochastic=True),
    "sde_heun": Sampler("sfumato.samplers.sde:sde_heun", order=2, calls=2, stochastic=True),
    "reverse_diffusion": Sampler("sfumato.samplers.langevin:reverse_diffusion", order=1, stochastic=True),
    "predictor_corrector": Sampler("sfumato.samplers.langevin:predictor_corrector", order=0, calls=2, stochastic=True),
    "restart": Sampler("sfumato.samplers.restart:restart", order=0, calls=2, stochastic=True),
    "consistency": Sampler("sfumato.samplers.consistency:consistency", order=0, stochastic=True, asks="endpoint"),
    "lcm": Sampler("sfumato.samplers.consistency:lcm", order=0, stochastic=True, asks="endpoint"),
    "jump": Sampler("sfumato.samplers.jump:jump", order=0, asks="jump"),
    "ddim": Sampler("sfumato.samplers.ddim:ddim", order=1),
    "euler": Sampler("sfumato.samplers.runge_kutta:euler", order=1),
    "heun": Sampler("sfumato.samplers.heun:heun", order=2, calls=2),
    "dpm_1": Sampler("sfumato.samplers.dpm_solver:dpm_1", order=1),
    "dpm_2": Sampler("sfumato.samplers.dpm_solver:dpm_2", order=2, calls=2),
    "dpm_3": Sampler("sfumato.samplers.dpm_solver:dpm_3", order=3, calls=3),
    "dpmpp_2s": Sampler("sfumato.samplers.dpm_solver:dpmpp_2s", order=2, calls=2),
    "dpmpp_2m": Sampler("sfumato.samplers.dpm_solver:dpmpp_2m", order=2),
    "dpmpp_3m": Sampler("sfumato.samplers.dpm_solver:dpmpp_3m", order=3),
    "exp_ab": Sampler("sfumato.samplers.adams:exp_ab", order=3),
    "deis": Sampler("sfumato.samplers.adams:deis", order=3),
    "lms": Sampler("sfumato.samplers.adams:lms", order=4),
    "ipndm": Sampler("sfumato.samplers.adams:ipndm", order=4),
    "unipc": Sampler("sfumato.samplers.unipc:unipc", order=3),
    "exp_abm": Sampler("sfumato.samplers.adams_moulton:exp_abm", order=3),
    "pndm": Sampler("sfumato.samplers.pndm:pndm", order=2, extra=1),
    "rk4": Sampler("sfumato.samplers.runge_kutta:rk4", order=4, calls=4),
    "dopri5": Sampler("sfumato.samplers.runge_kutta:dopri5", order=5, calls=6, adaptive=True),
    "learned": Sampler("sfumato.samplers.learned:learned", order=1),
    "initial_noise": Sampler("sfumato.samplers.ddim:initial_noise", order=0),
    "ddim_inversion": Sampler("sfumato.samplers.ddim:ddim_inversion", order=1, inverse=True),
}
NETS = {
    "unet": "sfumato.nets.unet:UNet",
    "dit": "sfumato.nets.dit:DiT",
    "mmdit": "sfumato.nets.mmdit:MMDiT",
    "stable_unet": "sfumato.nets.stable_unet:StableUNet",
    "pixel_unet": "sfumato.nets.pixel_unet:PixelUNet",
    "flux": "sfumato.nets.flux:Flux",
    "controlled": "sfumato.nets.controlled:controlled()",
}
CODECS = {
    "pixels": "sfumato.codecs:Pixels",
    "latents": "sfumato.codecs:Latents",
    "tiny_latents": "sfumato.codecs:TinyLatents",
}
CONDITIONERS = {
    "labels": "sfumato.conditioners:Labels",
    "sizes": "sfumato.conditioners:Sizes",
    "prompts": "sfumato.prompts:Prompts",
    "joined": "sfumato.conditioners:Joined",
    "text": "sfumato.text:Text",
    "texts": "sfumato.text:Texts",
    "image": "sfumato.image_conditions:ImageMap",
    "inpainting": "sfumato.image_conditions:Inpainting",
    "image_tokens": "sfumato.image_conditions:ImageTokens",
    "vision": "sfumato.vision:Vision",
    "hint": "sfumato.image_conditions:Hint",
}
FAMILIES = {
    "stable_diffusion": "sfumato.io.families.stable_diffusion:StableDiffusion",
    "flux": "sfumato.io.families.flux1:Flux1",
    "sdxl": "sfumato.io.families.sdxl:SDXL",
    "sdxl_refiner": "sfumato.io.families.sdxl:SDXLRefiner",
    "stable_diffusion_3": "sfumato.io.families.stable_diffusion_3:StableDiffusion3",
    "dit": "sfumato.io.families.dit_sit:DiTFamily",
    "pixart": "sfumato.io.families.pixart:PixArt",
    "ddpm": "sfumato.io.families.ddpm:DDPM",
    "consistency": "sfumato.io.families.consistency:Consistency",
}
# The names of a network's weights elsewhere, by its kind: functions of its config, of which the first that has a line
# for every layer counts; for adapters (`sfumato.adapters`)
NAME_TABLES = {
    "stable_unet": ("sfumato.io.families.stable:lines",),
    "flux": ("sfumato.io.families.flux:lines",),
    "mmdit": ("sfumato.io.families.sd3:lines",),
    "dit": ("sfumato.io.families.dit:lines", "sfumato.io.families.pixart:lines"),
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
    "Coupling": COUPLINGS,
    "Objective": OBJECTIVES,
    "Distance": DISTANCES,
    "Discriminator": DISCRIMINATORS,
    "Heads": HEADS,
    "Grid": GRIDS,
    "Guidance": GUIDANCES,
    "LogProb": {},  # the user's own
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
