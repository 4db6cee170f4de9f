"""The scenes suite, judged itself: by a pipeline that paints what it is told, or something else, on purpose."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from sfumato.conditioners import Labels
from sfumato.data.scenes import TASKS, Scene, Scenes, parse, prompts
from sfumato.data.scenes.draw import arranged
from sfumato.errors import ConfigError, DataError
from sfumato.image_conditions import Inpainting
from sfumato.metrics.intervals import mean_of_shares, wilson
from sfumato.metrics.scenes import HIT, MISS, Report, evaluate
from sfumato.pipeline import Samples
from sfumato.prompts import Prompts


class Taught(Prompts):
    """A conditioner that knows the words of scenes."""

    def __init__(self) -> None:
        super().__init__(dim=4, heads=1, depth=1, length=16)
        self.prepare(Scenes())


class Painter:
    """A pipeline that paints each prompt, or what `instead` makes of it."""

    def __init__(
        self, instead: Callable[[str], str | None] = lambda text: text, size: tuple[int, int] = (32, 32)
    ) -> None:
        self.instead, self.asked = instead, list[tuple[str, int]]()
        self.given: dict[str, Any] = {}

        class Model:
            conditioner: Any = Taught()

        self.model: Any = Model()
        self.model.size = size

    def sample(
        self, texts: Sequence[str], *, seeds: Sequence[int], batch: int, progress: Any, **settings: Any
    ) -> Samples:
        self.asked = list(zip(texts, seeds, strict=True))
        self.given = {"batch": batch, "progress": progress, **settings}
        images = np.stack([self._painted(text, seed) for text, seed in self.asked])
        said = [{"prompt": text, "seed": seed, "negative": None, "steps": 3, **settings} for text, seed in self.asked]
        return Samples(images, said)

    def _painted(self, text: str, seed: int) -> np.ndarray:
        shown = self.instead(text)
        height, width = self.model.size
        things = () if shown is None else arranged(Random(seed), parse(shown), height, width)
        return Scene(things, height, width, 40).paint()


def judged(painter: Painter, **options: Any) -> Report:
    return evaluate(painter, **{"per_task": 8, "held_out": 3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_who_paints_what_is_said_hits_always(size: tuple[int, int]) -> None:
    scores = judged(Painter(size=size)).as_dict()
    assert scores["suite"] == "scenes"
    assert list(scores["tasks"]) == list(scores["held_out"]["tasks"]) == list(TASKS)
    low, high = wilson(8, 8)
    for one in scores["tasks"].values():
        assert one == {"score": 1.0, "low": round(low, 4), "high": round(high, 4), "n": 8}
    assert (scores["overall"], scores["high"], scores["held_out"]["overall"]) == (1.0, 1.0, 1.0)
    assert scores["low"] == round(mean_of_shares([(8, 8)] * 6)[0], 4)
    assert scores["held_out"]["low"] == round(mean_of_shares([(3, 3)] * 6)[0], 4)
    assert scores["images"] == 6 * 11


def swapped(text: str) -> str:
    """The colours of a binding exchanged, the sides of a relation exchanged, one object more of a count."""
    caption = parse(text)
    if caption.task == "binding":
        a, b = (phrase.text.split() for phrase in caption.phrases)
        if a[-1] != b[-1]:  # of two circles it would say the same
            return " ".join(["a", b[1], a[2], "and", "a", a[1], b[2]])
    if caption.task == "position":
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return text.replace(f" {caption.relation} ", f" {other[str(caption.relation)]} ")
    if caption.task == "counting":
        more = {"two": "three", "three": "four", "four": "three"}
        return " ".join([more[text.split()[0]], *text.split()[1:]])
    return text


def test_the_nearly_right_is_wrong_in_its_own_task() -> None:
    report = judged(Painter(swapped))
    scores = report.as_dict()["tasks"]
    assert {task: scores[task]["score"] for task in ("single", "colours", "two")} == dict.fromkeys(
        ("single", "colours", "two"), 1.0
    )
    assert scores["counting"]["score"] == scores["position"]["score"] == 0.0
    alike = [
        one
        for one in report.judged
        if one.caption.task == "binding" and one.caption.phrases[0].shape == one.caption.phrases[1].shape
    ]
    assert all(one.hit == (one in alike) for one in report.judged if one.caption.task == "binding")


def test_empty_pictures_miss_always() -> None:
    scores = judged(Painter(lambda text: None)).as_dict()
    assert {one["score"] for one in scores["tasks"].values()} == {0.0}
    assert (scores["overall"], scores["low"]) == (0.0, 0.0)


def test_scores_count_hits_and_overall_is_the_mean_of_tasks() -> None:
    """Every other prompt of two tasks is painted, all of a third, none of the others."""
    turn = iter(range(10_000))

    def some(text: str) -> str | None:
        task = parse(text).task
        return text if task == "two" or (task in ("single", "colours") and next(turn) % 2 == 0) else None

    scores = judged(Painter(some), held_out=0).as_dict()
    assert {task: one["score"] for task, one in scores["tasks"].items()} == {
        "single": 0.5, "two": 1.0, "counting": 0.0, "colours": 0.5, "position": 0.0, "binding": 0.0
    }  # fmt: skip
    assert scores["overall"] == round(2 / 6, 4)
    assert (scores["low"], scores["high"]) == tuple(
        round(end, 4) for end in mean_of_shares([(4, 8), (8, 8), (0, 8), (4, 8), (0, 8), (0, 8)])
    )
    assert scores["held_out"] == {"overall": None, "tasks": {}}


def test_a_model_that_reads_the_kind_of_scene_is_told_it() -> None:
    painter = Painter(lambda said: said["caption"])  # type: ignore[index]
    painter.model.conditioner.fields = ("label", "caption")
    assert judged(painter, held_out=0).as_dict()["overall"] == 1.0
    assert [said["label"] for said, _ in painter.asked[::8]] == list(TASKS)  # type: ignore[index]
    assert "fields" not in judged(painter).settings


def test_a_model_that_takes_no_prompts_draws_whole_things_or_not(tmp_path: Path) -> None:
    """Anything that a scene can hold is a hit; nothing at all and what is no shape are misses."""
    turn = iter(range(10_000))

    class Free(Painter):
        def _painted(self, text: str, seed: int) -> np.ndarray:
            assert text is None
            picture = Scenes(seed=5)[seed].image.copy()
            kind = next(turn) % 4
            if kind == 1:
                picture[:] = 40
            elif kind == 2:
                picture[4:28, 10:12] = picture[14:16, 2:30] = (220, 40, 40)  # a thin cross over whatever is there
            return picture

    painter = Free()
    painter.model.conditioner = None
    report = judged(painter)
    scores = report.as_dict()
    assert scores["tasks"].keys() == {"whole"} and scores["tasks"]["whole"]["n"] == 48
    assert scores["overall"] == 0.5 and scores["held_out"]["overall"] is None and "placed" not in scores
    assert [path.name for path in report.sheets(tmp_path)] == ["whole.png"]


@pytest.mark.parametrize("size", [(32, 32), (64, 64)])
def test_things_of_a_layout_are_looked_for_where_it_has_them(size: tuple[int, int]) -> None:
    """Who paints the layout's things in any colours places all and hits few; who paints the words, the other way."""

    class Shown(Painter):
        def _painted(self, said: Any, seed: int) -> np.ndarray:
            assert np.asarray(said["layout"]).shape == (*self.model.size, 3)
            if self.instead("") == "layout":
                return np.where(said["layout"].max(2, keepdims=True) > 127, said["layout"], 40).astype(np.uint8)
            return Scene(arranged(Random(seed + 1), parse(said["caption"]), *size), *size, 40).paint()

    followed, ignored = Shown(lambda _: "layout", size), Shown(lambda _: "words", size)
    for painter in (followed, ignored):
        painter.model.conditioner.fields = ("caption", "layout")
    placed, said = judged(followed).as_dict(), judged(ignored).as_dict()
    assert placed["placed"]["score"] == 1.0 and placed["overall"] < 0.5 and placed["settings"]["layout"] == "places"
    assert said["placed"]["score"] < 0.2 and said["overall"] == 1.0
    assert said["placed"]["n"] == sum(sum(p.count for p in parse(s["caption"]).phrases) for s, _ in ignored.asked[:48])  # type: ignore[index]
    assert (
        "placed" not in judged(Painter(lambda t: t["caption"] if isinstance(t, dict) else t), layout="none").as_dict()
    )


def test_a_model_that_is_told_the_kind_alone() -> None:
    """Any scene of the kind is a hit, of whatever colour and place; of another kind, or with one thing more, a miss."""

    class Kinds(Painter):
        def _painted(self, said: Any, seed: int) -> np.ndarray:
            assert said.keys() == {"label"}
            text = self.instead(prompts(said["label"], 1, seed=seed)[0].text)
            return Scene(arranged(Random(seed), parse(str(text)), 32, 32), 32, 32, 40).paint()

    def told(painter: Painter) -> dict[str, Any]:
        painter.model.conditioner = Labels()
        painter.model.conditioner.prepare(Scenes())
        return judged(painter).as_dict()

    scores = told(Kinds())
    assert scores["overall"] == 1.0 and scores["held_out"]["overall"] is None and scores["images"] == 48
    others = told(Kinds(lambda text: "three red crosses"))["tasks"]
    assert {name: one["score"] for name, one in others.items()} == dict.fromkeys(TASKS, 0.0) | {"counting": 1.0}
    alike = told(Kinds(lambda text: "a red circle and a blue circle"))["tasks"]
    assert {name: one["score"] for name, one in alike.items() if one["score"]} == {"counting": 1.0, "binding": 1.0}


def test_layouts_that_do_not_exist_or_are_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such layout"):
        judged(Painter(), layout="place")
    with pytest.raises(ConfigError, match="reads no layout"):
        judged(Painter(), layout="places")


def test_held_out_combinations_are_scored_apart() -> None:
    hidden = {caption.text for task in TASKS for caption in prompts(task, 3, held_out=True)}
    scores = judged(Painter(lambda text: None if text in hidden else text)).as_dict()
    assert (scores["overall"], scores["held_out"]["overall"]) == (1.0, 0.0)
    report = judged(Painter())
    assert all(bool(one.caption.hidden) == one.held_out for one in report.judged)


def test_each_picture_has_a_seed_of_its_own_and_settings_are_passed_on() -> None:
    painter = Painter()
    report = judged(painter, seed=2, batch=7, guidance=2.5, steps=4, progress=print)
    assert len({seed for _, seed in painter.asked}) == len(painter.asked) == 66
    assert painter.given == {"batch": 7, "progress": print, "guidance": 2.5, "steps": 4}
    said = report.as_dict()["settings"]
    assert said == {"guidance": 2.5, "steps": 4, "seed": 2, "per_task": 8, "held_out": 3}
    other = Painter()
    judged(other, seed=3)
    assert not {seed for _, seed in other.asked} & {seed for _, seed in painter.asked}
    assert [text for text, _ in other.asked] != [text for text, _ in painter.asked]


def test_sheets_show_hits_and_misses(tmp_path: Path) -> None:
    turn = iter(range(10_000))
    report = judged(Painter(lambda text: text if next(turn) % 2 else None))
    paths = report.sheets(tmp_path / "in" / "sheets", each=3)
    assert [path.name for path in paths] == [f"{task}.png" for task in TASKS]
    for path in paths:
        pixels = np.asarray(Pillow.open(path)).reshape(-1, 3)
        for colour in (HIT, MISS):
            assert (pixels == colour).all(1).any()
    clean = judged(Painter()).sheets(tmp_path / "all", each=3)
    assert not any((np.asarray(Pillow.open(path)) == MISS).all(2).any() for path in clean)


def test_a_report_is_plain_data() -> None:
    plain = json.loads(json.dumps(judged(Painter()).as_dict()))
    assert {"suite", "overall", "low", "high", "tasks", "held_out"} <= plain.keys()


def test_models_that_cannot_be_asked_are_refused() -> None:
    for conditioner, seen in ((Labels(3), "single"), (Inpainting(), "image, mask")):
        painter = Painter()
        painter.model.conditioner = conditioner
        with pytest.raises(DataError) as caught:
            judged(painter)
        assert caught.value.seen == seen and painter.asked == []
    stranger = Painter()
    stranger.model.conditioner = Prompts(dim=4, heads=1, depth=1)
    with pytest.raises(DataError, match="does not know the words"):
        judged(stranger)


@pytest.mark.parametrize("size", [(16, 32), (32, 640)])
def test_sizes_that_scenes_do_not_have_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="32 to 512"):
        judged(Painter(size=size))


@pytest.mark.parametrize("options", [{"per_task": 0}, {"held_out": -1}])
def test_counts_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        judged(Painter(), **options)


def test_a_real_pipeline_is_judged(tmp_path: Path) -> None:
    """A network of chance: whatever it scores, the suite runs over all of the pipeline, and twice alike."""
    from sfumato.model import build_model
    from sfumato.pipeline import Pipeline

    section = {
        "path": {"kind": "linear"}, "prediction": {"kind": "velocity"}, "time_input": {"kind": "thousandths"},
        "scale_input": None, "codec": {"kind": "pixels"},
        "net": {"kind": "dit", "patch": 16, "dim": 8, "depth": 1, "heads": 1},
        "conditioner": {"kind": "prompts", "dim": 8, "depth": 1, "heads": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    sampling = {"sampler": {"kind": "ddim"}, "grid": {"kind": "linear"}, "steps": 1, "guidance": 2.0}
    model = build_model({"model": section, "size": [32, 32], "sampling": sampling}, Scenes())
    told: list[tuple[int, int]] = []
    scores = [
        evaluate(
            Pipeline(model, "cpu"), per_task=2, held_out=1, batch=5, progress=lambda *step: told.append(step)
        ).as_dict()
        for _ in range(2)
    ]
    once = told[: len(told) // 2]
    assert once + once == told and once == sorted(once)
    assert once[-1] == (4, 4)  # 18 pictures, five at a time, one step each
    assert {**scores[0], "seconds": 0} == {**scores[1], "seconds": 0}
    assert scores[0]["settings"]["guidance"] == 2.0
