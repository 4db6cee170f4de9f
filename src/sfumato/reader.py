"""The reader of a pipeline: raw conditions into what the network is told, wherever the text encoders lie.

Encoders are often larger than the network, and are needed once a picture. So they may lie and work on another device;
or lie in main memory and visit the network's device while they read; or be released altogether, once the prompts are
encoded: an encoded prompt is a raw condition that brings its answer, and that of saying nothing, with it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sfumato.conditioners import Raw, silent
from sfumato.denoiser import Cond
from sfumato.errors import ConfigError, DataError
from sfumato.model import Model, pick_device

OFFLOAD = "offload"
ENCODED, NULL = "encoded", "null"  # fields of an encoded prompt: its row of the condition, and that of nothing said


def home(place: str | None, device: torch.device) -> torch.device:
    """Where text encoders lie: on the network's device, on the one that `place` names, or, to "offload", on the CPU."""
    return device if place is None else torch.device("cpu") if place == OFFLOAD else pick_device(place)


class Reader:
    """What a pipeline reads prompts with.

    device: the network's. precision: of the products. place: where encoders lie, see `home`; those that are offloaded
    work on the network's device.
    """

    def __init__(self, model: Model, device: torch.device, precision: torch.dtype, place: str | None = None) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.home = home(place, device)
        self.works = device if place == OFFLOAD else self.home
        self.released = False
        self._depth = 0
        if model.conditioner is not None:
            model.conditioner.to(self.home)

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields that stay where nothing is said."""
        return () if self.model.conditioner is None else self.model.conditioner.kept

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The conditioner is where it works; what is read inside moves it once."""
        moves = self.works != self.home and self._depth == 0 and self.model.conditioner is not None
        if moves:
            self._move(self.works)
        self._depth += 1
        try:
            with torch.inference_mode(), self._autocast():
                yield
        finally:
            self._depth -= 1
            if moves:
                self._move(self.home)

    def _move(self, device: torch.device) -> None:
        assert self.model.conditioner is not None
        self.model.conditioner.to(device)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        half = torch.bfloat16 if self.works.type == "cpu" and self.device.type != "cpu" else self.precision
        return torch.autocast(self.works.type, half)

    def cond(self, raw: Sequence[Raw], size: tuple[int, int]) -> Cond:
        """What the network is told of pictures of a (height, width), on its device."""
        if any(ENCODED in one for one in raw):
            return self._stacked([_encoded(one) or self._row(one, size) for one in raw])
        conditioner = self.model.conditioner
        if conditioner is None:
            return {}
        with self.working():
            cond = self.model.cond(conditioner.sized(raw, size))
            return {name: value.to(self.device) for name, value in cond.items()}

    def instead(self, raw: Sequence[Raw], other: Raw, size: tuple[int, int]) -> Cond:
        """Something else said of the same pictures: another raw condition, or with an empty one nothing."""
        if not other and any(NULL in one for one in raw):
            rows = [{ENCODED: one[NULL]} if NULL in one else silent(one, self.kept) for one in raw]
        else:
            rows = [dict(other) if ENCODED in other else {**silent(one, self.kept), **other} for one in raw]
        return self.cond(rows, size)

    def encode(self, raw: Sequence[Raw], size: tuple[int, int]) -> list[Raw]:
        """The raw conditions with what they say, and what saying nothing says, in main memory."""
        with self.working():
            said, nothing = self.cond(raw, size), self.instead(raw, {}, size)
            rows = [{name: value[i].cpu() for name, value in said.items()} for i in range(len(raw))]
            nulls = [{name: value[i].cpu() for name, value in nothing.items()} for i in range(len(raw))]
        return [{**one, ENCODED: row, NULL: null} for one, row, null in zip(raw, rows, nulls, strict=True)]

    def release(self) -> None:
        """Lets go of the conditioner and its memory. Only encoded prompts can be drawn from then on."""
        self.model.conditioner = None
        self.released = True

    def _row(self, one: Raw, size: tuple[int, int]) -> Mapping[str, Tensor]:
        if self.model.conditioner is None:
            raise released(one)
        return {name: value[0] for name, value in self.cond([one], size).items()}

    def _stacked(self, rows: Sequence[Mapping[str, Tensor]]) -> Cond:
        shapes = [{name: tuple(value.shape) for name, value in row.items()} for row in rows]
        if odd := [shape for shape in shapes if shape != shapes[0]]:
            seen = f"{shapes[0]} and {odd[0]}"
            raise DataError("encoded prompts of different shapes", where="prompts", seen=seen, fix="encode them alike")
        return {name: torch.stack([row[name].to(self.device) for row in rows]) for name in rows[0]}


def said(raw: Raw) -> dict[str, object]:
    """The fields of a raw condition that people say."""
    return {name: value for name, value in raw.items() if name not in (ENCODED, NULL)}


def released(prompt: object) -> ConfigError:
    """What to raise where there is nothing left to read with."""
    fix = "encode every prompt, the negative one too, before release_text()"
    return ConfigError("the text encoders were released", where="prompts", seen=repr(prompt), fix=fix)


def _encoded(raw: Raw) -> Mapping[str, Tensor] | None:
    found = raw.get(ENCODED)
    return found if isinstance(found, Mapping) else None
