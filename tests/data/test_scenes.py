"""What scenes promises: the same picture for the same index, and captions that are true of their pictures."""

from itertools import combinations

import numpy as np
import pytest

from sfumato.data.scenes import LAYOUTS, SIZES, TASKS, VOCABULARY, Scenes, parse, recognise
from sfumato.data.scenes.draw import extents
from sfumato.errors import ConfigError

SHAPES_OF_PICTURES = [32, 64, (32, 64), (96, 48)]


def test_a_picture_is_a_function_of_seed_and_index() -> None:
    first, again = Scenes(seed=5), Scenes(seed=5)
    again.batch([9, 3])  # what was drawn before makes no difference
    for index in (0, 7, 999_999):
        assert np.array_equal(first[index].image, again[index].image)
        assert first[index].fields == again[index].fields


def test_seeds_splits_and_indices_give_different_pictures() -> None:
    images = [
        Scenes(seed=seed, split=split)[i].image
        for seed in (0, 1)
        for split in ("train", "validation")
        for i in (0, 1, 2)
    ]
    assert all(not np.array_equal(a, b) for a, b in combinations(images, 2))


def test_few_pictures_repeat() -> None:
    images, _ = Scenes(seed=2).batch(range(1000))
    assert len({image.tobytes() for image in images}) == 1000


@pytest.mark.parametrize("size", SHAPES_OF_PICTURES)
def test_a_batch_is_its_pictures(size: int | tuple[int, int]) -> None:
    data = Scenes(size=size, seed=1)
    images, fields = data.batch([4, 0, 4])
    assert images.shape == (3, *data.shape, 3)
    assert images.dtype == np.uint8
    for image, field, index in zip(images, fields, (4, 0, 4), strict=True):
        assert np.array_equal(image, data[index].image)
        assert field == data[index].fields


def test_an_index_past_the_end_is_refused() -> None:
    data = Scenes(count=10)
    assert len(data) == 10
    assert np.array_equal(data[-1].image, data[9].image)
    for index in (10, -11):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("size", SHAPES_OF_PICTURES)
def test_things_lie_inside_and_apart(size: int | tuple[int, int]) -> None:
    data = Scenes(size=size, seed=3, rich=0.3)
    (height, width), measures = data.shape, extents(*data.shape)
    for index in range(400):
        scene, _ = data.scene(index)
        assert 1 <= len(scene.things) <= 4
        for thing in scene.things:
            half = thing.extent / 2
            assert thing.extent == measures[thing.size]
            assert half <= thing.cy <= height - half
            assert half <= thing.cx <= width - half
        for a, b in combinations(scene.things, 2):
            gap = max(abs(a.cy - b.cy), abs(a.cx - b.cx)) - (a.extent + b.extent) / 2
            assert gap >= 2


def test_small_and_large_are_7_and_11_pixels_of_32() -> None:
    assert extents(32, 32) == {"small": 7, "large": 11} == dict(zip(SIZES, (7, 11), strict=True))


def test_a_relation_is_beyond_doubt() -> None:
    data = Scenes(seed=4, tasks={"position": 1})
    axes = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
    for index in range(400):
        scene, caption = data.scene(index)
        a, b = scene.things
        assert caption.relation is not None
        y, x = axes[caption.relation]
        along = y * (b.cy - a.cy) + x * (b.cx - a.cx)
        across = abs(b.cx - a.cx) if y else abs(b.cy - a.cy)
        assert along >= (a.extent + b.extent) / 2
        assert along > across


@pytest.mark.parametrize("size", SHAPES_OF_PICTURES)
def test_captions_are_true_of_what_is_read(size: int | tuple[int, int]) -> None:
    data = Scenes(size=size, seed=6, rich=0.2)
    for index in range(200):
        image, fields = data[index]
        assert parse(str(fields["caption"])).matches(recognise(image)), fields


def test_captions_are_false_of_other_pictures() -> None:
    data = Scenes(seed=6, tasks={"binding": 1})
    said, things = zip(*((caption, scene.things) for scene, caption in map(data.scene, range(200))), strict=True)
    for i in range(200):
        other = parse(said[(i + 1) % 200].text)
        assert other.matches(things[i]) == (
            sorted(p.text for p in other.phrases) == sorted(p.text for p in said[i].phrases)
        )


def test_the_ground_is_dark_and_not_always_the_same() -> None:
    grounds = {data.background for data, _ in map(Scenes(seed=1).scene, range(300))}
    assert len(grounds) > 20
    assert max(grounds) < 64


def test_only_tasks_that_are_asked_for_come_and_in_about_their_shares() -> None:
    data = Scenes(seed=7, tasks={"single": 1, "position": 3})
    tasks = [data.scene(i)[1].task for i in range(2000)]
    assert set(tasks) == {"single", "position"}
    assert (
        1.5 < tasks.count("position") / tasks.count("single") < 4
    )  # held-out captions are drawn again, and differ in number


def test_every_task_is_spoken_of_by_default_and_rich_only_when_asked() -> None:
    assert {Scenes().scene(i)[1].task for i in range(400)} == set(TASKS)
    assert "rich" in {Scenes(rich=0.5).scene(i)[1].task for i in range(40)}


def test_the_vocabulary_is_all_that_is_said() -> None:
    data = Scenes(rich=0.3)
    said = {word for i in range(3000) for word in str(data.scene(i)[1].text).split()}
    assert said == set(VOCABULARY)
    assert set(" ".join(data.captions()).split()) == set(VOCABULARY)
    assert tuple(sorted(set(VOCABULARY))) == VOCABULARY


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"size": 31}, "data.size"),
        ({"size": (32, 513)}, "data.size"),
        ({"count": 0}, "data.count"),
        ({"split": "test"}, "data.split"),
        ({"rich": 1.5}, "data.rich"),
        ({"tasks": {"colour": 1}}, "data.tasks"),
        ({"tasks": {"two": 0}}, "data.tasks"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scenes(**options)  # type: ignore[arg-type]
    assert caught.value.where == where


@pytest.mark.parametrize("size", SHAPES_OF_PICTURES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_shows_the_same_things_in_its_own_colours(size: int | tuple[int, int], kind: str) -> None:
    data, plain = Scenes(size=size, seed=2, layout=kind), Scenes(size=size, seed=2)  # type: ignore[arg-type]
    for index in range(40):
        picture, things = data[index], recognise(plain[index].image)
        assert np.array_equal(picture.image, plain[index].image)
        layout = picture.fields["layout"]
        assert isinstance(layout, np.ndarray) and layout.shape == picture.image.shape
        said = {name: value for name, value in picture.fields.items() if name != "layout"}
        assert said == plain[index].fields
        found = recognise(layout)
        where = [sorted((t.shape, t.size, round(t.cy), round(t.cx)) for t in seen) for seen in (things, found)]
        assert [one[:2] for one in where[0]] == [one[:2] for one in where[1]]
        for a, b in zip(*where, strict=True):
            assert abs(a[2] - b[2]) <= 1 and abs(a[3] - b[3]) <= 1
        assert all(thing.colour == LAYOUTS[kind][thing.shape] for thing in found)


def test_layouts_that_do_not_exist_are_named() -> None:
    with pytest.raises(ConfigError, match="places"):
        Scenes(layout="place")  # type: ignore[arg-type]
