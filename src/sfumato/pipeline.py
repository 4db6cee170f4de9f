"""Pipelines: from prompts to pictures, with a model, a sampler, a grid, guidance and seeds.

Each picture draws its noise from its own generator, so it depends on its seed and its prompt, and not on what shares
its batch. Rows of one batch go through the network together, all branches of the guidance at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import __version__
from sfumato.adapters.lora import Living
from sfumato.catalogue import build
from sfumato.conditioners import Raw
from sfumato.controls import controls_of
from sfumato.data.picture import Image
from sfumato.errors import ConfigError, DataError, nearest
from sfumato.forwards import Forwards
from sfumato.guidance import Guidance, guided, started
from sfumato.hub import located
from sfumato.io.families.controlnet import read_control
from sfumato.io.models import model_folder, read_model
from sfumato.io.tuned import read_tuned
from sfumato.model import Model, compile_net, pick_device
from sfumato.names import TUNED, spelled_out
from sfumato.nets.controlled import Control as AnyControl
from sfumato.orders import Order, Prompt, begun, order_of, raw_of, raws_of, size_of
from sfumato.paths import noised, spread
from sfumato.reader import Reader, home
from sfumato.samplers import Job, SeededNoise, Step, Together, sample
from sfumato.samples import Samples
from sfumato.settings import Interval, Settings, fitted_grid, fitted_guidance, is_whole
from sfumato.starts import begin, known_where

Progress = Callable[[int, int], None]  # steps done, of how many

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pipeline:
    """A model on a device, ready to draw.

    precision: "fp32", or "bf16" or "fp16" for the network's products (autocast); the sampler's state is float32 always.
    compile: compiles the network, which pays from the second batch on. text_device: where text encoders lie and work,
    if not with the network; "offload" lets them lie in main memory and work where the network is.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "auto",
        *,
        precision: str = "fp32",
        compile: bool = False,
        text_device: str | None = None,
    ) -> None:
        kind = _dtype(precision)
        self.device = pick_device(device) if isinstance(device, str) else device
        conditioner, model.conditioner = model.conditioner, None  # it goes its own way, and perhaps never there
        self.model = model.to(self.device).eval()
        self.model.conditioner = conditioner
        self.reader = Reader(self.model, self.device, kind, text_device)
        self.text: dict[str, Any] = {}  # options of the text encoders that were changed
        self.precision = precision
        self.forwards = Forwards(self.model, self.device, kind)
        self.controls: dict[str, AnyControl] = {}  # by name; a path is a name too, and is read when it is asked for
        self.tuned: dict[int, dict[str, Any]] = {}  # slots of samplers made for this model, by number of steps
        self._loras: Living | None = None
        if compile:
            compile_net(self.model.net, self.device)

    def settings(self, **changes: Any) -> Settings:
        """The model's recommended settings, with changes; None changes nothing. ConfigError for what cannot be."""
        known = spelled_out({field: value for field, value in self.model.spec["sampling"].items() if value is not None})
        changes = spelled_out({name: value for name, value in changes.items() if value is not None})
        if unknown := changes.keys() - Settings.__dataclass_fields__.keys():
            name = min(unknown)
            raise ConfigError(
                "no such setting", where="sampling", seen=name, fix=nearest(name, Settings.__dataclass_fields__)
            )
        if "guidance" in changes:
            changes["guidance"] = fitted_guidance(changes["guidance"], known.get("guidance"))
        return Settings(**{**known, **self._fitted(known, changes), **changes})

    def _fitted(self, known: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """The slots of a sampler tuned for so many steps: where nothing else is asked for, or by the name "tuned"."""
        by_name = changes.get("sampler") == TUNED
        if by_name:
            del changes["sampler"]
        steps = changes.get("steps", known.get("steps"))
        if not by_name and (steps not in self.tuned or changes.keys() & {"sampler", "grid"}):
            return {}
        if steps not in self.tuned:
            there = ", ".join(map(str, sorted(self.tuned))) or "none"
            fix = f"sfumato tune-sampler RUN --steps {steps}"
            raise ConfigError(
                "no sampler was tuned for so many steps", where="steps", seen=f"{steps}; there are {there}", fix=fix
            )
        return self.tuned[steps]

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Puts an adapter of any dialect (see `sfumato.adapters`) beside those that are there; its name, the file's
        unless said. CheckpointError for one of another model.
        """
        return self.loras.load(path, scale, name)

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Which adapters are at work, each with its scale; the others rest. Nothing is loaded anew."""
        self.loras.set(scales)

    def unload_lora(self, name: str | None = None) -> None:
        """Takes an adapter away, or all; the model is then what it was."""
        for one in [name] if name is not None else list(self.loras.scales):
            self.loras.remove(one)

    @property
    def loras(self) -> Living:
        """The adapters in use: their scales, and merging them into the weights and taking them out again."""
        if self._loras is None:
            self._loras = Living(self.model)
        self.forwards.forget()
        return self._loras

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt] = None,
        *,
        steps: int | None = None,
        sampler: str | Mapping[str, Any] | None = None,
        grid: str | Mapping[str, Any] | None = None,
        guidance: float | str | Mapping[str, Any] | None = None,
        interval: Interval | None = None,
        rescale: float | None = None,
        negative: Prompt = None,
        seeds: int | Sequence[int] | None = None,
        size: int | tuple[int, int] | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        control: Mapping[str, Any] | None = None,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> Samples:
        """One picture for each prompt. Everything left out is what the model recommends.

        prompts: texts, labels, or raw fields like {"label": 3}; None draws without a condition. seeds: one for each
        picture, or a first one to count from (0). size: (height, width), where the network can. batch: pictures at a
        time. negative: what to steer away from. interval: noise levels (low, high] within which to guide; (0, None) is
        all. image, strength, mask: a picture to start from, the share of the steps to make, and what of it may change
        (white), see `sfumato.starts.begin`, which also takes encoded pictures and a `Step` of another model; a model
        made for inpainting is told picture and mask.
        control: by name or path of a ControlNet its picture, or {"image": ..., "scale": 1.0, "interval": (0, None),
        "mode": ...}, an interval of noise levels, and of a control of several kinds which; see `controls`.
        progress: called with the steps done, and all.
        Raises DataError for words that the model does not know, ConfigError for settings that cannot be.
        """
        changes = {
            "steps": steps,
            "sampler": sampler,
            "grid": grid,
            "guidance": guidance,
            "interval": interval,
            "rescale": rescale,
        }
        order = self.order(prompts, seeds, size, negative, changes)
        order = begun(order, image, mask, strength, self.model)
        order = replace(order, controls=controls_of(control, len(order.raw), order.size))
        if not (is_whole(batch) and batch >= 1):
            raise ConfigError("a batch holds at least one picture", where="batch", seen=repr(batch), fix="batch=64")
        images, n, each = [], len(order.raw), int(order.settings.steps)
        rounds = -(-n // batch)
        for i in range(rounds):
            tell = None if progress is None else _telling(progress, i * each, rounds * each, each)
            part = order.part(i * batch, (i + 1) * batch)
            drawn = self.pictures(self._drawn(part, tell))
            images.append(drawn if part.begin is None else part.begin.restored(drawn))
        return Samples(np.concatenate(images), [self._said(order, i) for i in range(n)])

    def steps(
        self,
        prompts: Prompt | Sequence[Prompt] = None,
        *,
        negative: Prompt = None,
        seeds: int | Sequence[int] | None = None,
        size: int | tuple[int, int] | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """`sample` in one batch, step by step; `pictures(step.x0)` shows what it is at, and stopping costs nothing.

        settings: as of `sample`. Each `Step` has the time, the state and the current guess of the result, encoded.
        """
        begin(None, None, settings.get("strength"), 1, self.model.size)  # which says that a strength needs a picture
        order = self.order(prompts, seeds, size, negative, settings)
        return self._walk(order, self._times(order))

    def encode(self, prompts: Prompt | Sequence[Prompt], *, size: int | tuple[int, int] | None = None) -> list[Raw]:
        """Prompts with what the text encoders say of them, which `sample` takes in their place. They are on the CPU.

        size: (height, width) of the pictures, for models that are told it.
        """
        raw = raws_of(prompts, self.reader)
        if self.model.conditioner is not None:
            self.model.conditioner.check(raw)
        return self.reader.encode(raw, size_of(size, self.model.size))

    def change_text(self, **options: Any) -> None:
        """Other options of the text encoders from now on: emphasis, chunks, skip, length; see `sfumato.text.Text`."""
        if self.model.conditioner is None:
            raise ConfigError("this model has no text encoder", where="text", seen=", ".join(options))
        self.model.conditioner.change(**options)
        self.text |= options

    def release_text(self) -> None:
        """Lets go of the text encoders and their memory. Only prompts that were encoded can be drawn from then on."""
        self.reader.release()

    def pictures(self, x: Tensor) -> Image:
        """Encoded results as (B, H, W, 3) uint8. DataError if they hold numbers that are not finite."""
        with torch.inference_mode():
            decoded = self.model.codec.decode(x.float())
            if not bool(decoded.isfinite().all()):
                seen = f"{self.precision}, {int((~decoded.isfinite()).flatten(1).any(1).sum())} of {len(x)} pictures"
                fix = "precision=fp32" if self.precision == "fp16" else "an earlier checkpoint, or less guidance"
                raise DataError("the model's answers are not finite numbers", where="sampling", seen=seen, fix=fix)
            pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _drawn(self, order: Order, tell: Callable[[int], None] | None) -> Tensor:
        times = self._times(order)
        last: Step | None = None
        for last in self._walk(order, times):
            if tell is not None:
                tell(int((times > last.t).sum()))
        assert last is not None  # a walk yields its result at least
        return last.x

    def _times(self, order: Order) -> Tensor:
        n = int(order.settings.steps)
        _, height, width = self.model.codec.shape(*order.size)
        patch = int(getattr(getattr(self.model.net, "config", None), "patch", 1))
        grid = fitted_grid(order.settings.grid, height, width, patch)
        times: Tensor = build(grid, "Grid")(self.model.denoiser.path, n)
        return times if order.begin is None else order.begin.times(times)

    def _walk(self, order: Order, times: Tensor) -> Iterator[Step]:
        """The sampling of one batch."""
        noise, path = SeededNoise.of(order.seeds), self.model.denoiser.path
        forward, guide = self.forwards.own, self.guide(order)
        if order.controls:
            nets = [self._control(one.name) for one in order.controls]
            forward, guide = self.forwards.steered(order.controls, nets, guide)
        denoise = guided(forward, path, guide, times, self.forwards.variant, self.model.answers)
        x, known = self._start(order, times, noise)
        if known is not None and order.begin is not None:
            free = order.begin.free(known)
            denoise = denoise if free is None else known_where(denoise, known, free)
        running = build(order.settings.sampler, "Sampler")(path, x, times)
        walk = sample(running, denoise, noise)
        while True:
            with torch.inference_mode():  # entered anew for each step: a context left open in a generator leaks
                step = next(walk, None)
            if step is None:
                return
            yield step

    def guide(self, order: Order) -> Guidance:
        """The guidance of an order, with its prompts read."""
        read, raw, size = self.reader, order.raw, order.size
        with read.working():
            return order.settings.guide(
                read.cond(raw, size),
                lambda: read.instead(raw, order.negative or {}, size),
                lambda prompt: read.instead(raw, raw_of(prompt, self.reader), size),
            )

    def job(self, order: Order, guide: Guidance) -> Job:
        """The sampling of an order among others, see `together`.

        guide: of `guide`, which is worth keeping where many orders have the same prompts. Its pictures are not masked.
        """
        times, noise, path = self._times(order), SeededNoise.of(order.seeds), self.model.denoiser.path
        x, _ = self._start(order, times, noise)
        running = build(order.settings.sampler, "Sampler")(path, x, times)
        return Job(running, path, started(guide, times), noise)

    def together(self) -> Together:
        """Where jobs of this pipeline run, answered by its network in its precision."""
        return Together(self.forwards.own, self.forwards.variant, self.model.answers)

    def _start(self, order: Order, times: Tensor, noise: SeededNoise) -> tuple[Tensor, Tensor | None]:
        """The state that sampling starts from, and the encoded pictures where it starts from such."""
        x = noise(torch.empty(len(order.raw), *self.model.codec.shape(*order.size), device=self.device))
        path = self.model.denoiser.path
        if order.begin is None or order.begin.from_noise:
            return x * spread(path, times[0]), None
        with torch.inference_mode():
            known = order.begin.encoded(self.model.codec, self.device)
            if known.shape != x.shape:
                seen = f"{list(known.shape)}, where this model's are {list(x.shape)}"
                raise ConfigError("encoded pictures of another shape", where="image", seen=seen, fix="size=(H, W)")
            if order.begin.time is not None:
                return known, known
            return noised(path, known, x, times[0].to("cpu", torch.float64)).to(x), known

    def _control(self, name: str) -> AnyControl:
        if name not in self.controls:
            self.controls[name] = read_control(name)
        return self.controls[name].to(self.device)

    def order(
        self,
        prompts: Prompt | Sequence[Prompt],
        seeds: int | Sequence[int] | None,
        size: int | tuple[int, int] | None,
        negative: Prompt,
        changes: Mapping[str, Any],
    ) -> Order:
        """Everything that was asked for, checked before anything is computed."""
        settings, asked = self.settings(**changes), changes.get("guidance")
        return order_of(self.reader, settings, prompts, seeds, size, negative, asked)

    def _said(self, order: Order, i: int) -> dict[str, Any]:
        """All there is to know of picture i."""
        loras = [] if self._loras is None else self._loras.at_work
        said = order.said(i, text=self.text, loras=loras, conditional=self.model.conditioner is not None)
        facts = {"model": self.model.facts} if self.model.facts else {}
        return {**said, "precision": self.precision, **facts, "version": __version__}


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    *,
    precision: str = "fp32",
    compile: bool = False,
    trust: bool = False,
    parts: str | Path | None = None,
    text: Mapping[str, Any] | None = None,
    text_device: str | None = None,
) -> Pipeline:
    """The pipeline of a model directory, of a run, whose newest `model/` it takes, of a folder of diffusers, of an
    original file, or of a repository of the hub that is one of these (`owner/name`, see `sfumato.hub`).
    CheckpointError if it is damaged.

    precision, compile, text_device: as of `Pipeline`; in half precision weights take half the memory too. trust: as of
    `sfumato.io.directory.load_model`. parts: for a single file, a folder of diffusers with what it lacks.
    text: options of the text encoders, as of `Pipeline.change_text`.
    """
    folder = model_folder(path)
    if not folder.exists():
        near = sorted(p.parent.parent.as_posix() for p in Path("runs").glob("*/model/model.json"))
        raise DataError(
            "there is no such run or model",
            where=str(path),
            seen="no such path",
            fix=", ".join(near) or "sfumato train quickstart",
        )
    kind = _dtype(precision)
    place = pick_device(device) if isinstance(device, str) else device
    straight: dict[str, Any] = {
        "device": place,
        "text_device": home(text_device, place),
        "matrices": None if kind == torch.float32 else kind,
    }
    model = read_model(folder, trust=trust, parts=None if parts is None else located(parts), **straight)
    pipeline = Pipeline(model, place, precision=precision, compile=compile, text_device=text_device)
    if text:
        pipeline.change_text(**text)
    pipeline.tuned = read_tuned(folder)
    return pipeline


def _dtype(precision: str) -> torch.dtype:
    if precision not in DTYPES:
        raise ConfigError("no such precision", where="precision", seen=precision, fix=nearest(precision, DTYPES))
    return DTYPES[precision]


def _telling(progress: Progress, before: int, whole: int, each: int) -> Callable[[int], None]:
    """Progress over one batch as progress over all; a sampler that asks twice a step tells twice."""
    return lambda done: progress(before + min(done, each), whole)
