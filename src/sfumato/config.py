"""The configuration of a run: one schema, checked whole, before torch is imported.

What is pluggable is a slot (see `sfumato.registry`): a name, a mapping with `kind` and options, or the user's own
"module:Name". Numbers of steps count optimizer steps, `batch` counts pictures a forward pass, so an optimizer step
sees batch * accumulate.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from sfumato.catalogue import METHODS, Method


def _slot(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _rising(interval: tuple[float, float | None]) -> tuple[float, float | None]:
    if interval[1] is not None and not interval[0] < interval[1]:
        raise ValueError("should go from a lower to a higher noise level, or to null for no end")
    return interval


Slot = Annotated[dict[str, Any], BeforeValidator(_slot), PlainSerializer(lambda value: dict(value))]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Annotated[float, Field(ge=0)], float | None], AfterValidator(_rising)]

CACHE = "cache"  # of data: not the source's, whatever it is
# A network's options that are known from what stands beside it.
FILLED_IN = ("in_channels", "context_dim", "pooled_dim", "classes")


class Section(BaseModel):
    """A part of the configuration; what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """What is trained: a path, a prediction, a network, and what stands at both ends of it.

    net: null trains the codec alone, an autoencoder, by the objective of that name.
    answers: what it can be asked for, see `sfumato.denoiser.Denoise`. With "x0_variance" the network gives a share of
    the log variance of each step beside its prediction, in as many channels again. With "jump" it is told
    where a jump ends.
    """

    path: Slot = {"kind": "linear"}
    prediction: Slot = {"kind": "velocity"}
    time_input: Slot = {"kind": "thousandths"}
    scale_input: Slot | None = None
    net: Slot | None
    codec: Slot = {"kind": "pixels"}
    conditioner: Slot | None = {"kind": "prompts"}
    answers: Annotated[list[Literal["x0", "x0_variance", "endpoint", "jump"]], Field(min_length=1)] = ["x0"]


class OptimSection(Section):
    """How weights move.

    The learning rate rises over `warmup` steps, and falls over the last `decay_fraction` of all. cycles: it does so
    anew in each of so many equal parts of the run (Loshchilov & Hutter 2017), as rounds of distillation want it.
    critic_lr: of what learns beside the model and is not kept, a critic or a discriminator, by the same schedule; `lr`
    unless said.
    """

    kind: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    critic_lr: Annotated[float, Field(gt=0)] | None = None
    warmup: Natural = 100
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_fraction: Share = 1.0
    cycles: Positive = 1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    options: dict[str, Any] = {}


class EMASection(Section):
    """An average of the weights. With warm-up it forgets fast at first: decay = min(decay, (1 + n) / (10 + n)).

    The first of several is validated, shown and written to `model/`; the others to `model-1/`, `model-2/`.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    warmup: bool = True


class GuardSection(Section):
    """What to do about gradients that are not finite, and about losses far out of line.

    nonfinite_limit: the run ends when so many steps in a row are skipped, for either reason. threshold: deviations
    above the median of the last losses that make a spike.
    """

    nonfinite_limit: Positive = 20
    spikes: Literal["off", "warn", "skip", "rollback"] = "warn"
    threshold: Annotated[float, Field(gt=0)] = 12.0


class ValidateSection(Section):
    """The loss on pictures that training never sees, at fixed times and noise."""

    every: Natural = 0
    batches: Positive = 4
    holdout: Natural = 0


class SamplesSection(Section):
    """Pictures drawn while training. No prompts: the first captions of the held-out data, or of the data."""

    every: Natural = 0
    prompts: list[str] = []
    count: Positive = 8
    at_start: bool = False


class CheckpointSection(Section):
    """How often the run is saved, in steps, and how many of its checkpoints are kept."""

    every: Positive = 1000
    keep: Positive = 2


class LogSection(Section):
    """How often the loss is written down, in steps."""

    every: Positive = 50


class SamplingSection(Section):
    """How the model likes to be sampled; kept with it, and used unless told otherwise.

    guidance: a scale, of which 1 is off, or a slot, as {kind: distilled} of a network that is told the scale. interval:
    noise levels (low, high] within which to guide; no high is no end. strength: of a picture to start from, the share
    of the steps that is made; 0.6, and 1 with a mask, unless said.
    """

    sampler: Slot = {"kind": "exp_abm"}
    grid: Slot = {"kind": "fitted"}
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] | Slot = 3.0
    interval: Interval | None = None
    rescale: Share = 0.0
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


class LoraSection(Section):
    """Train a low-rank change of the model that `start` names, and leave the model as it is.

    alpha: the change is multiplied by alpha / rank; the rank unless said. dora: rows also have a length of their own.
    targets: layers by group (attention, feedforward, linear, conv), or by the end of their name in any layout: to_q.
    text: the text encoder too.
    """

    rank: Positive
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dora: bool = False
    targets: Annotated[list[str], Field(min_length=1)] = ["attention", "feedforward"]
    text: bool = False


class ControlSection(Section):
    """Train a ControlNet of the model that `start` names, and leave the model as it is.

    field: of the data, the picture that it reads. weights: a control to begin with, in place of a copy of the model's
    own network. hint: of a U-Net's control, widths of the convolutions that read the picture, each after the first
    halves it; those of the published controls, as many as the model's codec asks for, unless said. blocks: of a
    transformer's, how many of its blocks are copied: [12] of an MMDiT, double and single ones [4, 10] of FLUX.
    """

    field: str = "control"
    weights: str | None = None
    hint: Annotated[list[Positive], Field(min_length=1)] | None = None
    blocks: Annotated[list[Natural], Field(min_length=1, max_length=2)] | None = None


class PairsSection(Section):
    """What a method of pairs learns from in place of data: noise, and where the teacher's flow takes it.

    count: of pairs, which are made once. sampler, grid, steps: how the flow is solved; the sampler must draw no noise.
    batch: of the teacher's. folder: where pairs are kept; the run's own unless said.
    """

    count: Positive = 16384
    sampler: Slot = {"kind": "exp_abm"}
    grid: Slot = {"kind": "fitted"}
    steps: Positive = 20
    batch: Positive = 128
    folder: str | None = None


class ReparameteriseSection(Section):
    """Make the DiT that `start` names over into the network that `model` says, with one modulation for all blocks.

    time: at which it then answers as before, from 0 at the data to 1, noise. See `sfumato.train.reparameterise`.
    """

    time: Annotated[float, Field(gt=0, le=1)] = 0.5


class Config(Section):
    """Everything a run is determined by.

    start: a run, a model directory, a folder of diffusers, a file or a name of the hub, whose model is trained further;
    it takes the place of `model`, and of `sampling` unless that is said. With `reparameterise` its network is made over
    into that of `model`. teacher: likewise, a model to learn from, by an objective of `METHODS`; without a `model` of
    its own the student starts from it. teacher_guidance: how the teacher is guided, a scale or a slot; its own
    recommendation unless said. pairs: of a method that learns from the teacher's flow.
    """

    name: str = Field(pattern=r"^[\w][\w .-]*$", coerce_numbers_to_str=True)
    seed: Natural = 0
    data: Slot
    model: ModelSection | None = None
    start: str | None = None
    teacher: str | None = None
    teacher_guidance: Annotated[float, Field(ge=0)] | Slot | None = None
    pairs: PairsSection | None = None
    lora: LoraSection | None = None
    control: ControlSection | None = None
    reparameterise: ReparameteriseSection | None = None
    objective: Slot = {"kind": "denoising"}
    optim: OptimSection = OptimSection()
    steps: Positive
    batch: Positive = 32
    accumulate: Positive = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # auto: bf16 where the device has its arithmetic
    device: str = "auto"
    compile: bool = False
    checkpointing: bool = False
    condition_dropout: Share = 0.1
    ema: Annotated[list[EMASection], Field(min_length=1)] = [EMASection()]
    guard: GuardSection = GuardSection()
    validate_: ValidateSection = Field(ValidateSection(), alias="validate")
    samples: SamplesSection = SamplesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    workers: Natural = 1
    threads: Positive | None = None
    sampling: SamplingSection = SamplingSection()

    @model_validator(mode="before")
    @classmethod
    def _begun(cls, raw: Any) -> Any:
        """A student without a model of its own starts from its teacher; a method of pairs has some."""
        if isinstance(raw, dict) and raw.get("teacher") and raw.get("model") is None and raw.get("start") is None:
            raw = {**raw, "start": raw["teacher"]}
        if isinstance(raw, dict) and raw.get("pairs") is None and (method := _method_of(raw)) and method.pairs:
            raw = {**raw, "pairs": {}}
        return raw

    @property
    def start_key(self) -> str:
        """The key by which people named the model to start from: a student starts from its teacher."""
        return "teacher" if self.start == self.teacher else "start"

    @property
    def method(self) -> Method | None:
        """The line of `METHODS` of its objective; None for one that makes no student."""
        return METHODS.get(str(self.objective["kind"]))

    @property
    def source(self) -> dict[str, Any]:
        """The slot of the data source."""
        return source_of(self.data)

    @property
    def cache(self) -> str | bool | None:
        """Where latents and states of texts are kept: a folder, true for the usual one, or nowhere."""
        said: str | bool | None = self.data.get(CACHE)
        return said


def _method_of(raw: dict[str, Any]) -> Method | None:
    """The line of `METHODS` of a raw configuration."""
    return METHODS.get(objective_of(raw))


def objective_of(raw: dict[str, Any]) -> str:
    """The name of the objective of a raw configuration."""
    said = raw.get("objective", "denoising")
    return str(said.get("kind") if isinstance(said, dict) else said)


def source_of(slot: dict[str, Any]) -> dict[str, Any]:
    """Of `data`, what the source is built from: `cache` is a matter of the run."""
    return {name: value for name, value in slot.items() if name != CACHE}
