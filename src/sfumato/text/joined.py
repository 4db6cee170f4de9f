"""Several text encoders at once, put together as published models do.

SDXL sets the states of two CLIPs side by side in channels and is told the second's pooled state (Podell et al. 2024);
Stable Diffusion 3 fills those up to T5's width, lets T5's states follow them, and pools both CLIPs (Esser et al. 2024);
FLUX attends to T5 and is told CLIP's pooled state. SDXL is also told how large the picture was before it was made
smaller, where it was cut, and how large it is to be: six numbers, each as a sinusoid behind the pooled states, so that
small and badly cut pictures could be trained on without being imitated. Its refiner is told an aesthetic score in place
of the size to be: a high one of what is asked for, a low one of what is steered away from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.conditioners import SIZE, Conditioner, Raw, Source, captions_of, pair_of
from sfumato.denoiser import MASK, Cond
from sfumato.errors import ConfigError, DataError
from sfumato.nets.layers import sinusoid
from sfumato.text.encoder import Text, too_long

ORIGINAL, CROP, TARGET, SCORE = SIZE, "crop", "target_size", "aesthetic_score"
SIZES = (ORIGINAL, CROP, TARGET)
SCORED = (ORIGINAL, CROP, SCORE)
HIGH, LOW = 6.0, 2.5  # the scores of what is asked for and of what is steered away from, unless they are said
WAVES = 256  # the width of one number's sinusoid
WORDS = 256  # pieces that Stable Diffusion 3 has from T5


class Texts(Conditioner):
    """Captions through several text encoders. Cond: context (B, words, width), pooled (B, width).

    parts: the encoders, in the model's own order. weights: a folder of diffusers for all of those that name none.
    join: "channels", the states side by side in channels, pooled that of the last that has one (SDXL);
    "sd3", those of two CLIPs in channels, filled up with zeros to the width of the third's, which follow in sequence,
    and pooled of both; without a third, zeros (256, width) follow. "apart", the states of the last and pooled of the
    first (FLUX). width: of the states where there is no third encoder to tell.
    zeros: the null condition is nothing but zeros, rather than the empty prompt; one that is said is still read.
    sizes: pooled is followed by sinusoids of original_size (height, width), crop (top, left) and target_size (height,
    width) in pixels, raw fields all of them, which default to an uncut picture of the model's size; waves: the width of
    one number's sinusoid. score: aesthetic_score stands in target_size's place, a number from 0 to 10 or so: 6 unless
    it is said, and 2.5 where no prompt is, or one to steer away from (SDXL's refiner).
    A prompt may be longer than some encoders read, which then read its beginning, but not longer than all do.
    """

    def __init__(
        self,
        *,
        parts: Sequence[Conditioner],
        join: Literal["channels", "sd3", "apart"] = "channels",
        weights: str | None = None,
        width: int = 4096,
        zeros: bool = False,
        sizes: bool = False,
        score: bool = False,
        waves: int = WAVES,
    ) -> None:
        super().__init__()
        texts = [part for part in parts if isinstance(part, Text)]
        _checked(parts, texts, join)
        if score and not sizes:
            fix = "model.conditioner.sizes=true"
            raise ConfigError("a score stands behind sizes", where="model.conditioner.score", seen="none", fix=fix)
        self.parts = nn.ModuleList(texts)
        self.join, self.weights, self.width, self.zeros, self.sizes = join, weights, width, zeros, sizes
        self.score = score
        self.numbers: tuple[str, ...] = (SCORED if score else SIZES) if sizes else ()
        self.fields = tuple(dict.fromkeys(field for part in texts for field in part.fields)) + self.numbers
        self.kept = tuple(name for name in self.numbers if name != SCORE)
        self.against = {SCORE: LOW} if score else {}
        self.waves, self.size = waves, (0, 0)

    def forward(self, raw: Sequence[Raw]) -> Cond:
        conds = [part(raw) for part in self.texts]
        cond = {"channels": self._channels, "sd3": self._sd3, "apart": self._apart}[self.join](conds)
        if self.zeros:
            said = [any(part.said(one) is not None for part in self.texts) for one in raw]
            cond = {name: _emptied(value, said) for name, value in cond.items()}
        if self.sizes:
            pooled = cond["pooled"]
            numbers = torch.tensor([self._numbers(one) for one in raw], device=pooled.device)
            told = sinusoid(numbers.flatten(), self.waves).to(pooled.dtype)
            cond["pooled"] = torch.cat([pooled, told.view(len(raw), -1)], 1)
        return cond

    @property
    def texts(self) -> list[Text]:
        """The encoders."""
        return [part for part in self.parts if isinstance(part, Text)]

    @property
    def length(self) -> int:
        """How many vectors of context a prompt has."""
        each = [part.length for part in self.texts]
        follow = each[2] if len(each) > 2 else WORDS
        return {"channels": each[0], "sd3": each[0] + follow, "apart": each[-1]}[self.join]

    def _channels(self, conds: Sequence[Cond]) -> dict[str, Tensor]:
        found = {"context": torch.cat([cond["context"] for cond in conds], -1)} | _mask(conds[-1])
        return found | ({"pooled": self._last(conds)} if self.pooled_dim else {})

    def _last(self, conds: Sequence[Cond]) -> Tensor:
        return [cond["pooled"] for cond in conds if "pooled" in cond][-1]

    def _sd3(self, conds: Sequence[Cond]) -> dict[str, Tensor]:
        clips = torch.cat([cond["context"] for cond in conds[:2]], -1)
        follow = conds[2]["context"] if len(conds) > 2 else clips.new_zeros(len(clips), WORDS, self.context_dim)
        filled = F.pad(clips, (0, follow.shape[-1] - clips.shape[-1]))
        pooled = torch.cat([cond["pooled"] for cond in conds[:2]], -1)
        return {"context": torch.cat([filled, follow.to(filled.dtype)], 1), "pooled": pooled}

    def _apart(self, conds: Sequence[Cond]) -> dict[str, Tensor]:
        return {"context": conds[-1]["context"], "pooled": conds[0]["pooled"]} | _mask(conds[-1])

    def _numbers(self, raw: Raw) -> list[float]:
        """The original size, the corner and the size to be, six numbers; or five, with a score."""
        defaults = {ORIGINAL: self.size, CROP: (0, 0), TARGET: self.size}
        pairs = [name for name in self.numbers if name != SCORE]
        found = [float(n) for name in pairs for n in pair_of(raw.get(name) or defaults[name], name)]
        return [*found, self._score(raw)] if SCORE in self.numbers else found

    def _score(self, raw: Raw) -> float:
        told = raw.get(SCORE)
        if told is None:
            return HIGH if any(part.said(raw) is not None for part in self.texts) else LOW
        try:
            score = float(str(told))  # the command line gives text
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError("a score is a number", where=SCORE, seen=repr(told), fix=str(HIGH))
        return score

    def sized(self, raw: Sequence[Raw], size: tuple[int, int]) -> list[Raw]:
        told = {name: size for name in (ORIGINAL, TARGET) if name in self.numbers}
        return [{**told, **one} for one in raw]

    def change(self, **options: Any) -> None:
        if options.get("chunks") not in (None, 1) and self.join != "channels":
            fix = "length=512, where the model reads that much"
            raise ConfigError("T5 reads long prompts in one window", where="text.chunks", seen=self.join, fix=fix)
        clips = [one for one in self.texts if one.is_clip]
        for name, value in options.items():
            if name == "length":  # CLIP's is its own
                reading = [one for one in self.texts if one not in clips] or clips
            else:
                reading = self.texts if name == "emphasis" else clips
            if not reading:
                raise ConfigError("only CLIP's encoders can do that", where=f"text.{name}", seen=repr(value))
            for part in reading:
                part.change(**{name: value})

    def of_size(self, size: tuple[int, int]) -> None:
        self.size = size

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            self._check(one)
        for one in raw if self.sizes else ():
            self._numbers(one)

    def _check(self, one: Raw) -> None:
        """That each prompt is read whole by one at least of the encoders that read it."""
        reading: dict[str, list[Text]] = {}
        for part in self.texts:
            for text in captions_of([{part.field: part.said(one)}], part.field):
                reading.setdefault(text, []).append(part)
        for text, parts in reading.items():
            if all(part.counted(text) > part.most for part in parts):
                longest = max(parts, key=lambda part: part.most)
                raise too_long(text, longest.counted(text), longest.most)

    def prepare(self, source: Source) -> None:
        for part in self.texts:
            part.weights = part.weights or self.weights
            part.prepare(source)
        self.notes = max(self.texts, key=lambda part: part.length).notes
        self._fit()

    def files(self) -> dict[str, bytes]:
        return {name: data for part in self.texts for name, data in part.files().items()}

    def restore(self, files: Mapping[str, bytes]) -> None:
        for part in self.texts:
            part.restore(files)
        self._fit()

    def _fit(self) -> None:
        """The widths of the answers, which are known with the encoders."""
        widths, pooled = [one.context_dim for one in self.texts], [one.pooled_dim for one in self.texts]
        if self.join == "channels":
            self.context_dim, self.pooled_dim = sum(widths), ([0] + [one for one in pooled if one])[-1]
        elif self.join == "sd3":
            self.context_dim, self.pooled_dim = widths[2] if len(widths) > 2 else self.width, sum(pooled[:2])
        else:
            self.context_dim, self.pooled_dim = widths[-1], pooled[0]
        if self.join == "sd3" and sum(widths[:2]) > self.context_dim:
            seen = f"{widths[0]} and {widths[1]} into {self.context_dim}"
            raise ConfigError("two encoders are wider than the third", where="model.conditioner.width", seen=seen)
        self.pooled_dim += (2 * len(self.numbers) - (SCORE in self.numbers)) * self.waves


def _emptied(value: Tensor, said: Sequence[bool]) -> Tensor:
    """Zeros in the rows of which nothing was said."""
    rows = torch.tensor(said, device=value.device).view(-1, *[1] * (value.ndim - 1))
    return torch.where(rows, value, torch.zeros_like(value))


def _mask(cond: Cond) -> dict[str, Tensor]:
    return {MASK: cond[MASK]} if MASK in cond else {}


def _checked(parts: Sequence[Conditioner], texts: Sequence[Text], join: str) -> None:
    where = "model.conditioner.parts"
    if odd := [type(part).__name__ for part in parts if not isinstance(part, Text)]:
        raise ConfigError("only text encoders are joined so", where=where, seen=odd[0], fix="conditioner.kind=joined")
    if join not in ("channels", "sd3", "apart"):
        raise ConfigError("no such way to join", where="model.conditioner.join", seen=join, fix="channels, sd3, apart")
    most = {"channels": len(texts), "sd3": 3, "apart": 2}[join]
    if not {"channels": 1, "sd3": 2, "apart": 2}[join] <= len(texts) <= most:
        raise ConfigError(f"{join} joins another number of encoders", where=where, seen=str(len(texts)))
    if len({part.part for part in texts}) < len(texts):
        seen = ", ".join(part.part for part in texts)
        raise ConfigError("two encoders are the same part", where=where, seen=seen, fix="part: text_encoder_2")
    silent = {"sd3": texts[:2], "apart": texts[:1]}.get(join, [])
    if lacking := [part.part for part in silent if not part.has_pooled]:
        raise ConfigError(f"{join} needs a pooled state", where=where, seen=lacking[0], fix="pooled: true")
