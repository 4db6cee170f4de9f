"""Pipelines: from prompts to pictures, with a model, a sampler, a grid, guidance and seeds.

Each picture draws its noise from its own generator, so it depends on its seed and its prompt, and not on what shares its batch. Rows of
one batch go through the network together, all branches of the guidance at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from sfumato import __version__
from sfumato.catalogue import KINDS, build
from sfumato.conditioners import Raw
from sfumato.data.picture import Image
from sfumato.data.sheet import sheet
from sfumato.denoiser import Cond
from sfumato.errors import ConfigError, DataError
from sfumato.guidance import CFG, Guidance, Unguided, guided
from sfumato.io.directory import load_model
from sfumato.io.pictures import save_png, slug, unused
from sfumato.model import Model, pick_device
from sfumato.registry import check
from sfumato.samplers import SeededNoise, Step, sample

Prompt = str | Raw | None  # text, the raw fields of a conditioner, or nothing
Progress = Callable[[int, int], None]  # network evaluations' steps done, of how many


@dataclass(frozen=True)
class Settings:
    """How to sample. sampler, grid: names or slots. guidance: 1 is off. interval: noise levels (low, high]."""

    sampler: Any
    grid: Any
    steps: int
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("sampling takes at least one step", where="steps", seen=str(self.steps), fix="steps=20")
        if not 0 <= self.guidance < float("inf"):
            raise ConfigError("a guidance scale is not negative; 1 is off", where="guidance", seen=str(self.guidance), fix="guidance=3")
        for slot, kind in ((self.sampler, "Sampler"), (self.grid, "Grid")):
            for problem in check(slot, kind, KINDS, kind.lower()):
                raise ConfigError(f"{problem.where} {problem.what}", where=problem.where, seen=problem.seen, fix=problem.fix)

    def guide(self, cond: Cond, null: Callable[[], Cond]) -> Guidance:
        """The guidance for a condition."""
        if self.guidance == 1 or not cond:
            return Unguided(cond)
        return CFG(cond, null(), self.guidance, self.interval or (0.0, float("inf")), self.rescale)


class Samples(NamedTuple):
    """Pictures (N, H, W, 3) uint8, and for each all that is needed to draw it again."""

    images: Image
    settings: list[dict[str, Any]]

    def save(self, folder: str | Path) -> list[Path]:
        """Writes each as a PNG named after its prompt, overwriting nothing; the paths."""
        place, paths = Path(folder), []
        place.mkdir(parents=True, exist_ok=True)
        for image, settings in zip(self.images, self.settings, strict=True):
            paths.append(unused(place, slug(str(settings.get("prompt") or "picture"))))
            save_png(paths[-1], image, settings)
        return paths

    def grid(self, columns: int | None = None) -> Pillow.Image:
        """All of them on one sheet, with their prompts."""
        return sheet(list(self.images), [str(one.get("prompt") or "") for one in self.settings], columns=columns)


class Pipeline:
    """A model on a device, ready to draw."""

    def __init__(self, model: Model, device: str | torch.device = "auto", *, precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16", "fp16"):
            raise ConfigError("no such precision", where="precision", seen=precision, fix="precision=bf16")
        self.device = pick_device(device) if isinstance(device, str) else device
        self.model = model.to(self.device).eval()
        self.precision = precision

    def settings(self, **changes: Any) -> Settings:
        """The model's recommended settings, with changes; None changes nothing."""
        recommended = self.model.spec["sampling"]
        return Settings(**{**recommended, **{name: value for name, value in changes.items() if value is not None}})

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt] = None,
        *,
        steps: int | None = None,
        sampler: Any = None,
        grid: Any = None,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        negative: str | None = None,
        seeds: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> Samples:
        """One picture for each prompt. Everything left out is what the model recommends.

        prompts: texts, or raw fields like {"label": 3}. seeds: one for each picture, or a first one to count from (0).
        size: (height, width), where the network can. batch: pictures at a time. negative: what to steer away from.
        Raises DataError for words that the model does not know, ConfigError for settings that cannot be.
        """
        settings = self.settings(steps=steps, sampler=sampler, grid=grid, guidance=guidance, interval=interval, rescale=rescale)
        raw, numbers = self._raw(prompts), self._seeds(seeds, prompts)
        if batch < 1:
            raise ConfigError("a batch holds at least one picture", where="batch", seen=str(batch), fix="batch=64")
        images, rounds = [], -(-len(raw) // batch)
        for i in range(rounds):
            part = slice(i * batch, (i + 1) * batch)
            last: Step | None = None
            for done, last in enumerate(self.steps(raw[part], settings, numbers[part], size, negative)):
                if progress is not None:
                    progress(i * settings.steps + min(done, settings.steps), rounds * settings.steps)
            assert last is not None  # `steps` yields the result at least
            images.append(self.pictures(last.x0))
        height, width = size or self.model.size
        shared = {**vars(settings), "negative": negative, "size": [height, width], "precision": self.precision, "version": __version__}
        return Samples(np.concatenate(images), [self._said(one, n, shared) for one, n in zip(raw, numbers, strict=True)])

    def steps(
        self,
        raw: Sequence[Raw],
        settings: Settings,
        seeds: Sequence[int],
        size: tuple[int, int] | None = None,
        negative: str | None = None,
    ) -> Iterator[Step]:
        """The sampling of one batch, step by step: each has the state and the current guess of the result, encoded."""
        height, width = size or self.model.size
        shape = self.model.codec.shape(height, width)
        noise = SeededNoise.of(seeds)
        path = self.model.denoiser.path
        with torch.inference_mode(), self._autocast():
            cond = self.model.cond(raw)
            guide = settings.guide(cond, lambda: self._null(len(raw), negative))
        times = build(settings.grid, "Grid")(path, settings.steps)
        top = times[:1].to(torch.float64)
        x = noise(torch.empty(len(raw), *shape, device=self.device)) * float(path.sigma(top))
        running = build(settings.sampler, "Sampler")(path, x, times, noise)
        walk = sample(running, guided(self._forward, path, guide))
        while True:
            with torch.inference_mode():  # entered anew for each step: a context left open in a generator leaks
                step = next(walk, None)
            if step is None:
                return
            yield step

    def pictures(self, x: Tensor) -> Image:
        """Encoded results as (B, H, W, 3) uint8."""
        with torch.inference_mode():
            decoded = self.model.codec.decode(x.float()).clamp(-1, 1)
            return ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self._autocast():
            x0: Tensor = self.model(x, t, cond)
        return x0

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def _null(self, n: int, negative: str | None) -> Cond:
        assert self.model.conditioner is not None  # there is a condition, or this would not be asked
        if negative is None:
            return self.model.conditioner.null(n)
        raw = self._raw([negative])
        return self.model.cond(raw * n)

    def _raw(self, prompts: Prompt | Sequence[Prompt]) -> list[Raw]:
        many = [prompts] if prompts is None or isinstance(prompts, (str, Mapping)) else list(prompts)
        if not many:
            raise ConfigError("nothing to draw", where="prompts", seen="an empty list")
        field = next(iter(getattr(self.model.conditioner, "fields", ())), "caption")
        raw = [one if isinstance(one, Mapping) else {} if one is None else {field: one} for one in many]
        if self.model.conditioner is None and any(raw):
            raise DataError("this model takes no conditions", where="prompts", seen=str(many[0]), fix="leave the prompt out")
        if self.model.conditioner is not None:
            self.model.conditioner.check(raw)
        return raw

    def _seeds(self, seeds: int | Sequence[int] | None, prompts: Any) -> list[int]:
        n = 1 if prompts is None or isinstance(prompts, (str, Mapping)) else len(prompts)
        if seeds is None or isinstance(seeds, int):
            return [(seeds or 0) + i for i in range(n)]
        if len(seeds) != n:
            raise ConfigError("one seed a picture is needed", where="seeds", seen=f"{len(seeds)} seeds for {n} prompts")
        return [int(seed) for seed in seeds]

    def _said(self, raw: Raw, seed: int, shared: Mapping[str, Any]) -> dict[str, Any]:
        prompt = raw.get("caption", next(iter(raw.values()), None))
        return {"prompt": prompt, "seed": seed, **shared}


def load(path: str | Path, device: str | torch.device = "auto", *, precision: str = "fp32") -> Pipeline:
    """The pipeline of a model directory, or of a run, whose newest `model/` it takes. CheckpointError if it is damaged."""
    folder = Path(path).expanduser()
    if (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    if not folder.exists():
        near = sorted(p.parent.parent.as_posix() for p in Path("runs").glob("*/model/model.json"))
        raise DataError("there is no such run or model", where=str(path), seen="no folder", fix=", ".join(near) or "sfumato train quickstart")
    return Pipeline(load_model(folder), device, precision=precision)
