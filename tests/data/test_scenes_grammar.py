"""What can be said, what it means, and what training is never shown."""

from random import Random

import pytest

from sfumato.data.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    TASKS,
    Caption,
    Phrase,
    Scenes,
    Thing,
    parse,
    prompts,
)
from sfumato.data.scenes.grammar import (
    HIDDEN_COLOURS,
    HIDDEN_COUNTS,
    HIDDEN_PAIR,
    HIDDEN_PLACES,
    HIDDEN_SIZE,
    lies,
    spoken,
)
from sfumato.errors import ConfigError, DataError

HELD_OUT = {
    "single": ["a small cross"],
    "two": ["a triangle and a cross", "a cross and a triangle"],
    "counting": ["three triangles", "four red squares"],
    "colours": ["an orange circle", "a large cyan square", "a small yellow triangle", "a purple cross"],
    "position": ["a circle left of a cross", "a red cross right of a blue circle", "a square above a circle"],
}
SHOWN = [
    "a large cross",
    "a circle and a cross",
    "three squares",
    "an orange square",
    "a cross left of a circle",
]


def thing(shape: str, colour: str = "red", size: str = "small", at: tuple[float, float] = (8, 8)) -> Thing:
    return Thing(shape, colour, size, *at, 7)


@pytest.mark.parametrize("task", [*TASKS, "rich"])
def test_what_is_said_is_understood(task: str) -> None:
    rng = Random(1)
    for _ in range(1000):
        caption = spoken(rng, task)
        heard = parse(caption.text)
        assert heard.text == caption.text
        assert (heard.phrases, heard.relation) == (caption.phrases, caption.relation)
        assert task in (heard.task, "rich")


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a circle", Caption("single", (Phrase(1, "circle"),))),
        ("an orange cross", Caption("colours", (Phrase(1, "cross", "orange"),))),
        ("three crosses", Caption("counting", (Phrase(3, "cross"),))),
        ("a circle and a square", Caption("two", (Phrase(1, "circle"), Phrase(1, "square")))),
        (
            "A circle  above a square",
            Caption("position", (Phrase(1, "circle"), Phrase(1, "square")), "above"),
        ),
        (
            "a red circle and a blue circle",
            Caption("binding", (Phrase(1, "circle", "red"), Phrase(1, "circle", "blue"))),
        ),
        (
            "two red circles and a large blue square",
            Caption("rich", (Phrase(2, "circle", "red"), Phrase(1, "square", "blue", "large"))),
        ),
    ],
)
def test_each_task_is_known_by_its_words(text: str, caption: Caption) -> None:
    assert parse(text) == caption


@pytest.mark.parametrize(
    ("text", "seen", "fix"),
    [
        ("a rad circle", "rad", "red"),
        ("a circle beside a square", "beside", ""),
        ("two cirles", "cirles", "circles"),
    ],
)
def test_an_unknown_word_is_named_with_its_neighbours(text: str, seen: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(text)
    assert caught.value.seen == seen
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "circle",
        "a red",
        "a circles",
        "two circle",
        "a circle and",
        "a red small circle",
        "a circle left a square",
        "a circle left of a square above a cross",
    ],
)
def test_what_is_no_sentence_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "things", "holds"),
    [
        ("a circle", [thing("circle", "blue", "large")], True),
        ("a small circle", [thing("circle", size="large")], False),
        ("a red circle", [thing("circle", "orange")], False),
        ("a red circle", [thing("circle", "unknown")], False),
        ("a circle", [thing("circle", "unknown")], False),
        ("a circle", [thing("unknown")], False),
        ("a circle", [], False),
        ("a circle", [thing("circle"), thing("circle")], False),
        ("two circles", [thing("circle", "red"), thing("circle", "blue")], True),
        ("two red circles", [thing("circle", "red"), thing("circle", "blue")], False),
        ("two circles", [thing("circle")] * 3, False),
        ("a circle and a square", [thing("square"), thing("circle")], True),
        ("a red circle and a blue square", [thing("circle", "blue"), thing("square", "red")], False),
        # The first phrase fits both circles; only one assignment leaves the second its own.
        ("a circle and a red circle", [thing("circle", "red"), thing("circle", "blue")], True),
    ],
)
def test_a_caption_matches_exactly_what_it_describes(text: str, things: list[Thing], holds: bool) -> None:
    assert parse(text).matches(things) is holds


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_holds_one_way_only(relation: str) -> None:
    places = {"left of": (0, -10), "right of": (0, 10), "above": (-10, 0), "below": (10, 0)}
    for name, (dy, dx) in places.items():
        things = [thing("square", at=(20, 20)), thing("circle", at=(20 + dy, 20 + dx))]
        assert parse(f"a circle {relation} a square").matches(things) is (name == relation)


def test_a_diagonal_is_no_relation() -> None:
    a, b = thing("circle", at=(10, 10)), thing("square", at=(20, 20))
    assert not any(lies(a, relation, b) for relation in RELATIONS)


@pytest.mark.parametrize(("task", "text"), [(task, text) for task, texts in HELD_OUT.items() for text in texts])
def test_held_out_captions_are_known(task: str, text: str) -> None:
    assert task in parse(text).hidden


@pytest.mark.parametrize("text", SHOWN)
def test_their_neighbours_are_shown(text: str) -> None:
    assert not parse(text).hidden


def test_about_a_tenth_of_bindings_and_places_is_held_out() -> None:
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HIDDEN_COLOURS]
    pairs = [(a, b) for a in kinds for b in kinds if a < b and a[0] != b[0]]
    bindings = [Caption("binding", (Phrase(1, a[1], a[0]), Phrase(1, b[1], b[0]))) for a, b in pairs]
    places = [
        Caption("position", (Phrase(1, a), Phrase(1, b)), relation)
        for a in SHAPES
        for b in SHAPES
        for relation in RELATIONS
        if a != b
    ]
    for task, captions in (("binding", bindings), ("position", places)):
        assert 0.07 < sum(task in caption.hidden for caption in captions) / len(captions) < 0.14


def test_what_is_held_out_does_not_hang_on_the_order_of_words() -> None:
    rng = Random(3)
    turned = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for task in ("two", "binding", "position"):
        for _ in range(500):
            caption = spoken(rng, task)
            relation = turned[caption.relation] if caption.relation else None
            assert Caption(task, caption.phrases[::-1], relation).hidden == caption.hidden


def test_training_never_shows_what_is_held_out() -> None:
    data = Scenes(seed=11, rich=0.1)
    for index in range(20_000):
        scene, caption = data.scene(index)
        assert not caption.hidden
        assert not parse(caption.text).hidden or caption.task == "rich"
        assert _seen(caption, scene.things) == []


def _seen(caption: Caption, things: tuple[Thing, ...]) -> list[str]:
    """The held-out combinations in a picture, stated anew: colours and pairs always, others by task."""
    found = [f"{t.colour} {t.shape}" for t in things if (t.colour, t.shape) in HIDDEN_COLOURS]
    if caption.task == "single":
        found += [t.shape for t in things if (t.size, t.shape) == HIDDEN_SIZE]
    if caption.task == "counting" and (len(things), things[0].shape) in HIDDEN_COUNTS:
        found.append("count")
    if len(things) == 2 and {t.shape for t in things} == HIDDEN_PAIR:
        found.append("pair")
    if caption.task == "position":
        for a, b in (things, things[::-1]):
            found += [
                relation
                for relation in RELATIONS
                if (a.shape, relation, b.shape) in HIDDEN_PLACES and lies(a, relation, b)
            ]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_of_the_kind_that_was_asked_for(task: str) -> None:
    assert all(not p.hidden and p.task == task for p in prompts(task, 200))
    assert all(p.hidden == {task} and p.task == task for p in prompts(task, 200, held_out=True))


@pytest.mark.parametrize(
    ("task", "distinct"), [("single", 11), ("two", 10), ("counting", 80), ("colours", 84), ("position", 100)]
)
def test_prompts_are_distinct_as_far_as_they_go(task: str, distinct: int) -> None:
    texts = [p.text for p in prompts(task, 100)]
    assert len(texts) == 100
    assert len(set(texts)) == distinct
    assert texts == [p.text for p in prompts(task, 100)]
    assert texts != [p.text for p in prompts(task, 100, seed=1)]


def test_prompts_of_no_task_are_refused() -> None:
    with pytest.raises(ConfigError, match="binding"):
        prompts("bindings", 3)
