"""Conditioners: from what people say to what networks take.

A raw condition is a mapping from field names to values ({"caption": "a red circle"}, {"label": 3}), one a picture;
a conditioner turns a list of them into the network's keyword arguments. A field that is missing or None is the null
condition: what classifier-free guidance compares with, and what training must show now and then (`dropped`). Some have
weights and learn with the network, some have files of their own (a vocabulary), which travel in the model directory.
"""

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from sfumato.codecs import Codec
from sfumato.data.picture import Image
from sfumato.denoiser import CONCAT, MASK, Cond
from sfumato.errors import ConfigError, DataError, nearest

Raw = Mapping[str, object]
SIZE = "original_size"  # the raw field that tells how large a picture was


@runtime_checkable
class Source(Protocol):
    """What a conditioner may learn from before training: every caption, and the names of the classes, if any."""

    def captions(self) -> Iterable[str]: ...


class Conditioner(nn.Module):
    """The base of all conditioners.

    fields: the raw fields it reads. context_dim, pooled_dim, classes: what its answers hold, 0 where they do not;
    channels: of maps that stand beside x_t. pictures: those of the fields that hold pictures.
    unlabelled: whether "no class" is one, too, where there are classes.
    kept: those of the fields that tell of the picture and not of what it shows, and so stay where nothing is said.
    against: fields that are usual in what is steered away from, where a prompt for that is said.
    notes: what a person should know of the data that it was prepared for.
    """

    fields: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    against: Mapping[str, object] = {}
    context_dim = pooled_dim = classes = channels = 0
    unlabelled = True

    def forward(self, raw: Sequence[Raw]) -> Cond:
        raise NotImplementedError

    def null(self, n: int) -> Cond:
        """The absence of a condition, n times."""
        cond: Cond = self([{}] * n)
        return cond

    def of_size(self, size: tuple[int, int]) -> None:
        """Told the height and width of the model's pictures, when the model is built."""

    def of_codec(self, codec: Codec) -> None:
        """Told what encodes the model's pictures, when the model is built."""

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> list[Raw]:
        """The raw conditions of pictures (B, H, W, 3) to train on, with what is made of the pictures themselves.

        No images where training has their latents alone; ConfigError where something would have to be made of them.
        """
        return list(raw)

    def sized(self, raw: Sequence[Raw], size: tuple[int, int]) -> list[Raw]:
        """The raw conditions of pictures of another (height, width) than the model's, where that has to be told."""
        return list(raw)

    def change(self, **options: Any) -> None:
        """Other options for as long as the model is loaded. ConfigError for those that it has not."""
        if options:
            seen = ", ".join(sorted(options))
            raise ConfigError("this model has no text encoder of that kind", where="text", seen=seen, fix="text=None")

    def check(self, raw: Sequence[Raw]) -> None:
        """Raises DataError for what could not be understood, naming it. Called before anything is computed."""

    def prepare(self, source: Source) -> None:
        """Looks at the data once, before training: to build a vocabulary, to count classes."""

    def files(self) -> dict[str, bytes]:
        """What, beside weights, must be kept with the model."""
        return {}

    def restore(self, files: Mapping[str, bytes]) -> None:
        """The inverse of `files`; called before weights are loaded."""


def captions_of(raw: Sequence[Raw], field: str) -> Iterator[str]:
    """The captions that are there. DataError for what is no text."""
    for one in raw:
        text = one.get(field)
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError("a caption must be text", where=field, seen=repr(text))
        yield text


def told_of_cuts(lengths: Mapping[int, int], most: int) -> tuple[str, ...]:
    """What to say where captions are longer than is read. lengths: how many there are of each length."""
    longer = sum(n for length, n in lengths.items() if length > most)
    if not longer:
        return ()
    share = f"{longer:,} of {sum(lengths.values()):,} captions are cut after {most} words"
    return (f"{share}; to read all: model.conditioner.length={max(lengths)}",)


class Labels(Conditioner):
    """A class for each picture: {"label": 3}, or by name when the data has names. Cond: label (B,) int64.

    classes: how many; 0 asks the data. The null label is `classes`, the network's last embedding. A name with commas
    is known by each of its parts, too, as ImageNet's are ("goldfish, Carassius auratus"). unlabelled: whether pictures
    without a class are known; ADM and the published consistency models have no such label.
    """

    fields = ("label",)

    def __init__(self, classes: int = 0, unlabelled: bool = True) -> None:
        super().__init__()
        if classes < 0:
            raise ConfigError(
                "a number of classes is not negative", where="model.conditioner.classes", seen=str(classes)
            )
        self.classes, self.unlabelled, self.names = classes, unlabelled, tuple[str, ...]()
        self.device_of: Tensor
        self.register_buffer("device_of", torch.empty(0), persistent=False)

    def forward(self, raw: Sequence[Raw]) -> Cond:
        labels = [self._index(one.get("label")) for one in raw]
        return {"label": torch.tensor(labels).to(self.device_of.device)}

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            self._index(one.get("label"))

    def prepare(self, source: Source) -> None:
        names = tuple(getattr(source, "classes", ()))
        if not self.classes and not names:
            raise DataError(
                "the data has no classes",
                where="model.conditioner",
                seen=type(source).__name__,
                fix="model.conditioner.classes=10",
            )
        if self.classes and names and self.classes != len(names):
            raise DataError(
                "the data has another number of classes",
                where="model.conditioner.classes",
                seen=f"{self.classes}, the data {len(names)}",
                fix=f"model.conditioner.classes={len(names)}",
            )
        self.names, self.classes = names, self.classes or len(names)

    def files(self) -> dict[str, bytes]:
        return {"labels.json": json.dumps({"classes": self.classes, "names": self.names}, indent=1).encode()}

    def restore(self, files: Mapping[str, bytes]) -> None:
        kept = json.loads(files["labels.json"])
        self.classes, self.names = kept["classes"], tuple(kept["names"])

    def _index(self, label: object) -> int:
        if label is None and self.unlabelled:
            return self.classes
        if label is None:
            what = "this model knows no picture without a class"
            raise DataError(what, where="label", fix="a class, guidance=1, and in training condition_dropout=0")
        if isinstance(label, str) and (named := self._named(label)) is not None:
            return named
        try:
            index = int(label) if isinstance(label, str) else operator.index(label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < self.classes:
            numbers = f"0 to {self.classes - 1}"
            known = [part for name in self.names for part in _parts(name)]
            fix = nearest(label, known) if isinstance(label, str) and known else numbers
            raise DataError("no such class", where="label", seen=str(label), fix=fix)
        return index

    def _named(self, label: str) -> int | None:
        """The first class of this name, or of one of which this is a part."""
        if label and label in self.names:
            return self.names.index(label)
        return next((i for i, name in enumerate(self.names) if label in _parts(name)), None)


def _parts(name: str) -> list[str]:
    """The names that a name with commas lists."""
    return [part for part in (one.strip() for one in name.split(",")) if part]


class Sizes(Conditioner):
    """How large a picture was before it was made smaller (PixArt-alpha).

    Cond: sizes (B, 3) float32: height and width in pixels, and the one over the other. Raw field original_size,
    (height, width); where it is missing, the size that is drawn.
    """

    fields = kept = (SIZE,)

    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)
        self.device_of: Tensor
        self.register_buffer("device_of", torch.empty(0), persistent=False)

    def forward(self, raw: Sequence[Raw]) -> Cond:
        pairs = [pair_of(one.get(SIZE) or self.size, SIZE) for one in raw]
        rows = [(height, width, height / max(width, 1)) for height, width in pairs]
        return {"sizes": torch.tensor(rows, dtype=torch.float32).to(self.device_of.device)}

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            if one.get(SIZE) is not None:
                pair_of(one[SIZE], SIZE)

    def of_size(self, size: tuple[int, int]) -> None:
        self.size = size

    def sized(self, raw: Sequence[Raw], size: tuple[int, int]) -> list[Raw]:
        return [{SIZE: size, **one} for one in raw]


def pair_of(value: object, name: str) -> tuple[float, float]:
    """Height and width, or top and left. DataError for what is no pair of numbers from 0."""
    pair = list(value) if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or not all(isinstance(n, (int, float)) and not isinstance(n, bool) and n >= 0 for n in pair):
        raise DataError("a size is two numbers of pixels", where=name, seen=repr(value), fix="[1024, 1024]")
    return pair[0], pair[1]


class Joined(Conditioner):
    """Several conditioners side by side: a class and a prompt, say. Their answers must not overlap.

    contexts: "one", or "sequence", where the vectors that several give (a prompt's words and a picture's patches, say)
    stand one after the other, the first part's first. They need one width.
    """

    def __init__(self, parts: Sequence[Conditioner], *, contexts: Literal["one", "sequence"] = "one") -> None:
        super().__init__()
        if contexts not in ("one", "sequence"):
            where = "model.conditioner.contexts"
            raise ConfigError("contexts are joined in no such way", where=where, seen=contexts, fix="sequence")
        self.parts, self.contexts = nn.ModuleList(parts), contexts

    fields = property(lambda self: tuple(field for part in self.parts for field in part.fields))  # type: ignore[assignment]
    kept = property(lambda self: tuple(field for part in self.parts for field in part.kept))  # type: ignore[assignment]
    pictures = property(lambda self: tuple(field for part in self.parts for field in part.pictures))  # type: ignore[assignment]
    channels = property(lambda self: sum(part.channels for part in self.parts))  # type: ignore[assignment]
    context_dim = property(lambda self: max(part.context_dim for part in self.parts))  # type: ignore[assignment]
    pooled_dim = property(lambda self: max(part.pooled_dim for part in self.parts))  # type: ignore[assignment]
    against = property(lambda self: {k: v for part in self.parts for k, v in part.against.items()})  # type: ignore[assignment]
    classes = property(lambda self: max(part.classes for part in self.parts))  # type: ignore[assignment]
    unlabelled = property(lambda self: all(part.unlabelled for part in self.parts))  # type: ignore[assignment]
    notes = property(lambda self: tuple(note for part in self.parts for note in part.notes))  # type: ignore[assignment]

    def forward(self, raw: Sequence[Raw]) -> Cond:
        answers: dict[str, Tensor] = {}
        words: list[Cond] = []
        maps: list[Tensor] = []
        for part in self.parts:
            cond = dict(part(raw))
            if CONCAT in cond:
                maps.append(cond.pop(CONCAT))
            if self.contexts == "sequence" and "context" in cond:
                words.append({key: cond.pop(key) for key in ("context", MASK) if key in cond})
            if twice := answers.keys() & cond.keys():
                raise ConfigError(
                    "two conditioners give the same thing",
                    where="model.conditioner.parts",
                    seen=", ".join(sorted(twice)),
                    fix="contexts=sequence" if "context" in twice else None,
                )
            answers |= cond
        return answers | (in_sequence(words) if words else {}) | ({CONCAT: side_by_side(maps)} if maps else {})

    def change(self, **options: Any) -> None:
        able = [part for part in self._parts() if type(part).change is not Conditioner.change]
        for part in able or self._parts():
            part.change(**options)

    def of_size(self, size: tuple[int, int]) -> None:
        for part in self._parts():
            part.of_size(size)

    def of_codec(self, codec: Codec) -> None:
        for part in self._parts():
            part.of_codec(codec)

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> list[Raw]:
        for part in self._parts():
            raw = part.examples(images, raw, rng)
        return list(raw)

    def sized(self, raw: Sequence[Raw], size: tuple[int, int]) -> list[Raw]:
        for part in self._parts():
            raw = part.sized(raw, size)
        return list(raw)

    def check(self, raw: Sequence[Raw]) -> None:
        for part in self._parts():
            part.check(raw)

    def prepare(self, source: Source) -> None:
        for part in self._parts():
            part.prepare(source)

    def files(self) -> dict[str, bytes]:
        return {f"{i}.{name}": data for i, part in enumerate(self._parts()) for name, data in part.files().items()}

    def restore(self, files: Mapping[str, bytes]) -> None:
        for i, part in enumerate(self._parts()):
            head = f"{i}."
            part.restore({name.removeprefix(head): data for name, data in files.items() if name.startswith(head)})

    def _parts(self) -> list[Conditioner]:
        return [part for part in self.parts if isinstance(part, Conditioner)]


def in_sequence(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Contexts (B, L, D) one after the other, and their masks where any has one. ConfigError for several widths."""
    widths = [cond["context"].shape[-1] for cond in conds]
    if len(set(widths)) > 1:
        seen = ", ".join(map(str, widths))
        raise ConfigError("contexts in sequence need one width", where="model.conditioner.parts", seen=seen)
    context = torch.cat([cond["context"] for cond in conds], 1)
    if not any(MASK in cond for cond in conds):
        return {"context": context}
    whole = [cond["context"].new_ones(cond["context"].shape[:2], dtype=torch.bool) for cond in conds]
    masks = [cond.get(MASK, one) for cond, one in zip(conds, whole, strict=True)]
    return {"context": context, MASK: torch.cat(masks, 1)}


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, h, w) as one, along the channels; those of one place, (B, C, 1, 1), are spread out."""
    size = max((one.shape[2:] for one in maps), key=torch.Size.numel)
    return torch.cat([one.expand(-1, -1, *size) if one.shape[2:].numel() == 1 else one for one in maps], 1)


def dropped(raw: Sequence[Raw], rate: float, rng: Generator, kept: Sequence[str] = ()) -> list[Raw]:
    """The raw conditions, each replaced by the null condition with probability `rate` (Ho & Salimans 2022).

    kept: a conditioner's fields that stay.
    """
    keep = torch.rand(len(raw), generator=rng, dtype=torch.float64) >= rate
    return [one if stays else silent(one, kept) for one, stays in zip(raw, keep.tolist(), strict=True)]


def silent(raw: Raw, kept: Sequence[str]) -> dict[str, object]:
    """The null condition of one picture: of its fields those that are kept."""
    return {name: raw[name] for name in kept if name in raw}
