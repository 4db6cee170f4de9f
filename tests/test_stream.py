"""Streams: each picture is that of its frame alone, whatever is under way beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato import Pipeline, Stream, load
from sfumato.data.picture import Image
from sfumato.errors import ConfigError, DataError

LCM = {"sampler": {"kind": "lcm", "to": "x0"}, "grid": "linear"}


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> Pipeline:
    return load(tiny_run, "cpu")


def frames(n: int) -> list[Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(n)]


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 4, "strength": 0.75, "guidance": 1.0, **LCM},
        {"steps": 3, "strength": 1.0, "guidance": 2.5, **LCM},
        {"steps": 2, "strength": 0.3, "guidance": {"kind": "apg", "scale": 3.0}, **LCM},
        {"steps": 3, "strength": 1.0, "sampler": "heun", "negative": "a blue circle"},
        {"steps": 3, "strength": 1.0, "sampler": "ddim", "guidance": {"kind": "cfg_plus_plus"}},
    ],
    ids=["lcm", "guided", "apg", "heun", "cfg++"],
)
def test_a_picture_is_that_of_its_frame_alone(pipeline: Pipeline, how: dict[str, Any], at_once: int) -> None:
    given = frames(7)
    drawn = list(Stream(pipeline, "a red square", seed=5, at_once=at_once, **how)(iter(given)))
    assert len(drawn) == 7
    for frame, picture in zip(given, drawn, strict=True):
        alone = pipeline.sample("a red square", seeds=5, image=frame, **how).images[0]
        assert abs(picture.astype(int) - alone).max() <= 1
    if how["strength"] < 0.5:  # else nothing of the frame is left in its noise
        assert abs(drawn[0].astype(int) - drawn[1]).max() > 10


def test_frames_at_different_steps_share_a_forward(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With n steps a frame, n frames are under way, and each round takes one in and gives one out."""
    seen: list[list[float]] = []
    plain = pipeline.forwards.own

    def noting(x: torch.Tensor, t: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append(t.tolist())
        return plain(x, t, *rest, **more)

    monkeypatch.setattr(pipeline.forwards, "own", noting)
    fetched: list[int] = []

    def camera() -> Iterator[Image]:
        for i, frame in enumerate(frames(5)):
            assert not torch.is_inference_mode_enabled()
            fetched.append(i)
            yield frame

    out = []
    for _ in Stream(pipeline, "a red square", steps=4, strength=0.75, guidance=1.0, **LCM)(camera()):
        assert not torch.is_inference_mode_enabled()
        out.append(len(fetched))
    assert out == [3, 4, 5, 5, 5] and len(seen) == 7
    assert seen[2] == pytest.approx([0.25, 0.5, 0.75]) and [len(t) for t in seen] == [1, 2, 3, 3, 3, 2, 1]


def test_an_endless_stream_may_be_left(pipeline: Pipeline) -> None:
    def camera() -> Iterator[Image]:
        while True:
            yield from frames(2)

    walk = Stream(pipeline, "a red square", steps=1, guidance=1.0, **LCM)(camera())
    assert [next(walk).shape for _ in range(3)] == [(32, 32, 3)] * 3
    assert list(Stream(pipeline, "a red square", steps=2, **LCM)([])) == []


def test_the_prompt_is_read_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    plain = pipeline.reader.cond
    monkeypatch.setattr(pipeline.reader, "cond", lambda *told: reads.append(told) or plain(*told))
    list(Stream(pipeline, "a red square", steps=2, guidance=2.0, **LCM)(frames(4)))
    assert len(reads) == 2  # and its absence


def test_what_cannot_be_is_told_before_any_frame(pipeline: Pipeline) -> None:
    for wrong in ({"strength": 0.0}, {"at_once": 0}, {"sampler": "nosuch"}, {"stepps": 3}):
        with pytest.raises(ConfigError):
            Stream(pipeline, "a red square", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one prompt"):
        Stream(pipeline, ["a red square", "a blue circle"])  # type: ignore[arg-type]
    with pytest.raises(DataError):
        Stream(pipeline, "a xylophone")
