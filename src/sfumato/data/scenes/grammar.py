"""The grammar of `scenes`: what can be said, what must then be in the picture, and what is kept out of training.

Six tasks, those by which text-to-image models are judged (Ghosh et al. 2023, "GenEval"): one object, colours, counting,
two objects, position, and the binding of colours to shapes. Some combinations of each are never drawn in training, so
that what a model has understood can be told from what it has seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from random import Random

from sfumato.errors import ConfigError, DataError, nearest

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single", "two", "counting", "colours", "position", "binding")
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
WEIGHTS = {"single": 0.08, "colours": 0.10, "counting": 0.22, "two": 0.16, "position": 0.26, "binding": 0.18}
VOCABULARY = tuple(
    sorted({"a", "an", "and", "left", "right", "of", "above", "below", *COUNTS, *COLOURS, *SIZES, *SHAPES, *PLURALS})
)

# Kept out of training.
HIDDEN_COLOURS = frozenset({("orange", "circle"), ("cyan", "square"), ("yellow", "triangle"), ("purple", "cross")})
HIDDEN_COUNTS = frozenset({(3, "triangle"), (4, "square")})
HIDDEN_PLACES = frozenset(
    {("circle", "left of", "cross"), ("square", "above", "circle"), ("triangle", "left of", "square")}
)
HIDDEN_PAIR = frozenset({"triangle", "cross"})
HIDDEN_SIZE = ("small", "cross")


@dataclass(frozen=True)
class Thing:
    """One object in a picture: what it is, its centre (cy, cx) and its extent, in pixels. "unknown" is allowed."""

    shape: str
    colour: str
    size: str
    cy: float
    cx: float
    extent: float

    @property
    def known(self) -> bool:
        """Whether it is of a shape, a colour and a size that scenes have."""
        return "unknown" not in (self.shape, self.colour, self.size)


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one shape, of a colour and a size if they are named."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None

    @property
    def text(self) -> str:
        plural = {one: many for many, one in PLURALS.items()}
        words = [self.size, self.colour, self.shape if self.count == 1 else plural[self.shape]]
        said = [word for word in words if word]
        number = next((word for word, n in COUNTS.items() if n == self.count), None)
        return " ".join([number or ("an" if said[0][0] in "aeiou" else "a"), *said])

    def fits(self, thing: Thing) -> bool:
        """Whether a thing is one of those meant."""
        return (
            thing.shape == self.shape
            and self.colour in (None, thing.colour)
            and self.size in (None, thing.size)
            and thing.known
        )


@dataclass(frozen=True)
class Caption:
    """What a picture shall show: the phrases, and how the first lies to the second where `relation` says so."""

    task: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        return f" {self.relation or 'and'} ".join(phrase.text for phrase in self.phrases)

    def matches(self, things: Sequence[Thing]) -> bool:
        """Whether a picture of these things shows exactly what is said: no thing missing and none too many."""
        wanted = [phrase for phrase in self.phrases for _ in range(phrase.count)]
        if len(wanted) != len(things):
            return False
        for order in permutations(things):
            fits = all(phrase.fits(thing) for phrase, thing in zip(wanted, order, strict=True))
            if fits and (self.relation is None or lies(order[0], self.relation, order[1])):
                return True
        return False

    @property
    def hidden(self) -> frozenset[str]:
        """The tasks whose held-out combinations this caption speaks of: none, for what training may show."""
        return _hidden(self)


def lies(a: Thing, relation: str, b: Thing) -> bool:
    """Whether a is left of, right of, above or below b, and more so than it lies to any other side."""
    dy, dx = b.cy - a.cy, b.cx - a.cx
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > abs(across)


def parse(text: str) -> Caption:
    """The caption that a text is. DataError for words that the grammar lacks and for sentences it cannot say."""
    words = text.lower().split()
    for word in words:
        if word not in VOCABULARY:
            raise DataError(
                "scenes has no such word", where=f"caption {text!r}", seen=word, fix=nearest(word, VOCABULARY)
            )
    joined, relation = " ".join(words), None
    parts = joined.split(" and ")
    for one in RELATIONS:
        if f" {one} " in joined:
            relation, parts = one, joined.split(f" {one} ")
    phrases = tuple(_phrase(part.split(), text) for part in parts)
    if relation and len(phrases) != 2:
        raise DataError("a relation is between two objects", where=f"caption {text!r}", seen=f"{len(phrases)} objects")
    if relation and any(phrase.count != 1 for phrase in phrases):
        many = next(phrase.text for phrase in phrases if phrase.count != 1)
        raise DataError("a relation is between one object and another", where=f"caption {text!r}", seen=many)
    return Caption(_task(phrases, relation), phrases, relation)


def _phrase(words: list[str], text: str) -> Phrase:
    broken = DataError(
        "scenes cannot say this",
        where=f"caption {text!r}",
        seen=" ".join(words),
        fix="a red circle left of a blue square",
    )
    if len(words) < 2 or (words[0] not in COUNTS and words[0] not in ("a", "an")):
        raise broken
    count, rest = COUNTS.get(words[0], 1), words[1:]
    size = rest.pop(0) if rest[0] in SIZES else None
    colour = rest.pop(0) if rest and rest[0] in COLOURS else None
    if len(rest) != 1 or rest[0] not in (SHAPES if count == 1 else PLURALS):
        raise broken
    return Phrase(count, PLURALS.get(rest[0], rest[0]), colour, size)


def _task(phrases: tuple[Phrase, ...], relation: str | None) -> str:
    if relation:
        return "position"
    if len(phrases) == 1:
        return "counting" if phrases[0].count > 1 else "colours" if phrases[0].colour else "single"
    if len(phrases) == 2 and all(p.count == 1 and not p.size for p in phrases):
        if all(p.colour for p in phrases) and phrases[0].colour != phrases[1].colour:
            return "binding"
        if not any(p.colour for p in phrases) and phrases[0].shape != phrases[1].shape:
            return "two"
    return "rich"


@lru_cache(maxsize=65536)
def _hidden(caption: Caption) -> frozenset[str]:
    phrases, found = caption.phrases, set[str]()
    if any((p.colour, p.shape) in HIDDEN_COLOURS for p in phrases):
        found.add("colours")
    if caption.task == "counting" and (phrases[0].count, phrases[0].shape) in HIDDEN_COUNTS:
        found.add("counting")
    if caption.task == "single" and (phrases[0].size, phrases[0].shape) == HIDDEN_SIZE:
        found.add("single")
    if len(phrases) == 2 and phrases[0].count == phrases[1].count == 1:
        if {p.shape for p in phrases} == HIDDEN_PAIR:
            found.add("two")
        if caption.relation and _one_way(phrases[0].shape, caption.relation, phrases[1].shape) in HIDDEN_PLACES:
            found.add("position")
        bound = caption.relation is None and all(p.colour for p in phrases) and phrases[0].colour != phrases[1].colour
        if bound and _tenth(sorted(f"{p.colour} {p.shape}" for p in phrases)):
            found.add("binding")
    return frozenset(found)


def _one_way(first: str, relation: str, second: str) -> tuple[str, str, str]:
    """A circle right of a square is a square left of a circle: both are one place."""
    turned = {"right of": "left of", "below": "above"}
    return (second, turned[relation], first) if relation in turned else (first, relation, second)


def _tenth(names: Sequence[str]) -> bool:
    """True for a fixed tenth of all names, spread evenly."""
    total = 0
    for letter in "+".join(names):
        total = (total * 131 + ord(letter)) % 1_000_003
    return total % 10 == 0


def spoken(rng: Random, task: str) -> Caption:
    """Any caption of a task, held out or not."""
    return _SPEAKERS[task](rng)


def prompts(task: str, n: int, *, held_out: bool = False, seed: int = 0) -> list[Caption]:
    """n captions to evaluate a task with, distinct as long as there are enough; held out for this task alone,
    or not at all.
    """
    if task not in TASKS:
        raise ConfigError("scenes has no such task", where="task", seen=task, fix=nearest(task, TASKS))
    rng, wanted = Random(f"{seed} {task} {held_out}"), frozenset({task}) if held_out else frozenset()
    seen: dict[str, Caption] = {}
    for _ in range(200 * n + 2000):
        if len(seen) >= n:
            break
        caption = spoken(rng, task)
        if caption.hidden == wanted:
            seen.setdefault(caption.text, caption)
    distinct = list(seen.values())
    return [distinct[i % len(distinct)] for i in range(n)]


def pick(rng: Random, options: Sequence[str]) -> str:
    """One of some words."""
    return options[int(rng.random() * len(options))]


def _two_of(rng: Random, options: Sequence[str]) -> tuple[str, str]:
    first = pick(rng, options)
    second = pick(rng, options)
    while second == first:
        second = pick(rng, options)
    return first, second


def _single(rng: Random) -> Caption:
    size = pick(rng, SIZES) if rng.random() < 0.4 else None
    return Caption("single", (Phrase(1, pick(rng, SHAPES), size=size),))


def _colours(rng: Random) -> Caption:
    size = pick(rng, SIZES) if rng.random() < 0.25 else None
    return Caption("colours", (Phrase(1, pick(rng, SHAPES), pick(rng, COLOURS), size),))


def _counting(rng: Random) -> Caption:
    colour = pick(rng, COLOURS) if rng.random() < 0.5 else None
    return Caption("counting", (Phrase(2 + int(rng.random() * 3), pick(rng, SHAPES), colour),))


def _two(rng: Random) -> Caption:
    first, second = _two_of(rng, SHAPES)
    return Caption("two", (Phrase(1, first), Phrase(1, second)))


def _position(rng: Random) -> Caption:
    first, second = _two_of(rng, SHAPES)
    colours: tuple[str | None, str | None] = _two_of(rng, COLOURS) if rng.random() < 0.5 else (None, None)
    return Caption("position", (Phrase(1, first, colours[0]), Phrase(1, second, colours[1])), pick(rng, RELATIONS))


def _binding(rng: Random) -> Caption:
    colours = _two_of(rng, COLOURS)
    return Caption("binding", tuple(Phrase(1, pick(rng, SHAPES), colour) for colour in colours))


def _rich(rng: Random) -> Caption:
    phrases: list[Phrase] = []
    left = 4
    while left and (not phrases or (len(phrases) < 3 and rng.random() < 0.6)):
        count = 1 + int(rng.random() * min(left, 2))
        phrases.append(Phrase(count, pick(rng, SHAPES), pick(rng, COLOURS), pick(rng, SIZES)))
        left -= count
    return Caption("rich", tuple(phrases))


_SPEAKERS = {
    "single": _single,
    "colours": _colours,
    "counting": _counting,
    "two": _two,
    "position": _position,
    "binding": _binding,
    "rich": _rich,
}


def every_word() -> Iterator[str]:
    """Texts that hold the whole vocabulary, a word each."""
    yield from VOCABULARY
