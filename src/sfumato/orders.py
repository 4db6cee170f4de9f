"""What is asked of a pipeline, checked before anything is computed: prompts, seeds, a size, and what goes with them.

A prompt is a text, a label, or the raw fields of a conditioner; everything here turns one into such fields or says what
is wrong with it. An order can say what was asked for each picture, which is what a picture keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from sfumato.conditioners import Raw
from sfumato.controls import Control
from sfumato.data.given import recorded
from sfumato.errors import ConfigError, DataError, nearest
from sfumato.image_conditions import Inpainting
from sfumato.model import Model
from sfumato.reader import ENCODED, Reader, released
from sfumato.reader import said as spoken
from sfumato.settings import Settings, is_whole
from sfumato.starts import Begin, begin, one_each

Prompt = str | int | Raw | None  # text, a label, the raw fields of a conditioner, or nothing


@dataclass(frozen=True)
class Order:
    """What is to be drawn, checked: raw conditions and as many seeds, all by the same settings."""

    raw: Sequence[Raw]
    seeds: Sequence[int]
    settings: Settings
    size: tuple[int, int]
    negative: Raw | None
    begin: Begin | None = None
    controls: Sequence[Control] = ()

    def part(self, start: int, stop: int) -> "Order":
        """Pictures `start` to `stop` of it."""
        begun = None if self.begin is None else self.begin.part(start, stop)
        controls = [one.part(start, stop) for one in self.controls]
        raw, seeds = self.raw[start:stop], self.seeds[start:stop]
        return replace(self, raw=raw, seeds=seeds, begin=begun, controls=controls)

    def said(
        self, i: int, *, text: Mapping[str, Any], loras: Sequence[Mapping[str, Any]], conditional: bool
    ) -> dict[str, Any]:
        """All there is to know of picture i before it is drawn, as plain data.

        text: options of the text encoders that were changed. loras: adapters at work. conditional: whether the model is
        told anything.
        """
        said = {"prompt": text_of(self.raw[i]), "seed": self.seeds[i], **self.settings.plain()}
        fields = {name: recorded(value) for name, value in spoken(self.raw[i]).items()}
        if fields.keys() - {"caption"}:
            said["fields"] = fields
        if text:
            said["text"] = dict(text)
        if not conditional and ENCODED not in self.raw[i]:
            said["guidance"] = 1.0  # whatever is recommended: there was nothing to guide by
        if self.negative is not None and spoken(self.negative).keys() - {"caption"}:
            said["negative_fields"] = {name: recorded(value) for name, value in spoken(self.negative).items()}
        if self.begin is not None:
            gone_on = self.begin.time is not None
            said |= {"begun_at": self.begin.time} if gone_on else {"strength": self.begin.strength}
            said |= {"masked": self.begin.mask is not None}
        if self.controls:
            said["control"] = [one.plain(i) for one in self.controls]
        if loras:
            said["loras"] = list(loras)
        negative = None if self.negative is None else text_of(self.negative)
        return {**said, "negative": negative, "size": list(self.size)}


def order_of(
    reader: Reader,
    settings: Settings,
    prompts: Prompt | Sequence[Prompt],
    seeds: int | Sequence[int] | None,
    size: int | tuple[int, int] | None,
    negative: Prompt,
    asked: Any,
) -> Order:
    """Everything that was asked for, with the model's settings changed. asked: the guidance, where one was asked for.

    ConfigError or DataError for what cannot be.
    """
    model = reader.model
    raw = raws_of(prompts, reader)
    against = None if negative is None else raw_of(negative, reader)
    if model.conditioner is not None:
        if against and ENCODED not in against:
            against = {**model.conditioner.against, **against}
        model.conditioner.check(raw if against is None else [*raw, against])
    elif asked not in (None, 1) and not any(ENCODED in one for one in raw):
        what = "a model without conditions has nothing to be guided by"
        raise ConfigError(what, where="guidance", seen=str(asked), fix="guidance=1")
    if against is not None and not settings.steers:
        raise ConfigError(
            "a negative prompt says nothing without guidance",
            where="negative",
            seen=f"guidance {settings.guidance}",
            fix="guidance=3" if settings.guidance == 1 else "guidance={'kind': 'cfg', 'scale': 3}",
        )
    return Order(raw, seeds_of(seeds, len(raw)), settings, size_of(size, model.size), against)


def begun(order: Order, image: Any, mask: Any, strength: float | None, model: Model) -> Order:
    """An order with a picture to start from; a model made for inpainting is told it, and the mask."""
    start = begin(image, mask, strength, len(order.raw), order.size, order.settings.strength)
    inside = next((one for one in model.modules() if isinstance(one, Inpainting)), None)
    if start is None or start.mask is None or inside is None:
        return replace(order, begin=start)
    if any(ENCODED in one for one in order.raw):
        what, fix = "an encoded prompt has its picture in it", 'encode({"caption": ..., "image": ..., "mask": ...})'
        raise ConfigError(what, where="mask", seen="a mask beside it", fix=fix)
    each = [{inside.image: one, inside.mask: mask} for one in one_each(image, len(order.raw))]
    raw = [{**one, **own} for one, own in zip(order.raw, each, strict=True)]
    return replace(order, raw=raw, begin=replace(start, told=True))


def raws_of(prompts: Prompt | Sequence[Prompt], reader: Reader) -> list[Raw]:
    """One prompt or several as raw fields."""
    single = prompts is None or isinstance(prompts, (str, Mapping, Integral))
    raw = [raw_of(one, reader) for one in ([prompts] if single else list(prompts))]  # type: ignore[arg-type]
    if not raw:
        raise ConfigError(
            "nothing to draw", where="prompts", seen="an empty list", fix="prompts=[None] draws without a condition"
        )
    return raw


def raw_of(prompt: Any, reader: Reader) -> Raw:
    """A prompt as the raw fields that a model's conditioner reads. DataError for what it cannot take, ConfigError where
    the text encoders were released.
    """
    conditioner = reader.model.conditioner
    fields: tuple[str, ...] = tuple(getattr(conditioner, "fields", ()))
    if prompt is None or (isinstance(prompt, Mapping) and not prompt):
        return {}
    if isinstance(prompt, Mapping) and ENCODED in prompt:
        return prompt
    if reader.released:
        raise released(prompt)
    if conditioner is None:
        raise DataError("this model takes no conditions", where="prompts", seen=str(prompt), fix="leave the prompt out")
    if isinstance(prompt, Mapping):
        if fields and (unknown := sorted(str(name) for name in prompt.keys() - set(fields))):
            raise DataError(
                "this model reads no such field", where="prompts", seen=unknown[0], fix=nearest(unknown[0], fields)
            )
        return prompt
    if not isinstance(prompt, (str, Integral)):
        raise DataError(
            "a prompt is text, or a mapping of raw fields", where="prompts", seen=repr(prompt), fix=str(fields)
        )
    usual = "caption" if isinstance(prompt, str) else "label"
    return {usual if usual in fields or not fields else fields[0]: prompt}


def size_of(size: Any, usual: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels, the usual ones unless said. ConfigError for what is no size."""
    if size is None:
        return usual
    pair = [size, size] if is_whole(size) else list(size) if isinstance(size, (tuple, list)) else []
    if len(pair) != 2 or not all(is_whole(one) and one >= 1 for one in pair):
        raise ConfigError("a size is a height and a width, from 1", where="size", seen=repr(size), fix=f"size={usual}")
    return int(pair[0]), int(pair[1])


def seeds_of(seeds: Any, n: int) -> list[int]:
    """A seed for each of n pictures, counted up from one or given one by one. ConfigError for another number."""
    if seeds is None or is_whole(seeds):
        return [int(seeds or 0) + i for i in range(n)]
    given = list(seeds)
    if len(given) != n:
        raise ConfigError(
            "one seed a picture is needed",
            where="seeds",
            seen=f"{len(given)} seeds for {n} pictures",
            fix="seeds=0 counts from 0",
        )
    if wrong := [seed for seed in given if not is_whole(seed)]:
        raise ConfigError("a seed is a whole number", where="seeds", seen=repr(wrong[0]), fix="seeds=0 counts from 0")
    return [int(seed) for seed in given]


def text_of(raw: Raw) -> Any:
    """What was asked for, in a word or a sentence."""
    plain = [value for value in spoken(raw).values() if isinstance(value, (str, Integral))]
    return raw.get("caption", next(iter(plain), None))
