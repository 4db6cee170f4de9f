"""Where text encoders lie, prompts encoded before, and options that change: the same pictures in every case."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import clip

from sfumato import Pipeline, load, load_config, train
from sfumato.cli import main
from sfumato.errors import ConfigError, DataError

pytest.importorskip("transformers")

DRAW: dict[str, Any] = {"steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts are read by a CLIP, told sizes."""
    place = tmp_path_factory.mktemp("run")
    clip.encoder(3, projected=7).save_pretrained(place / "text_encoder")
    clip.tokenizer(place / "tokenizer").save_pretrained(place / "tokenizer")
    part = "{kind: text, pooled: true, length: 16}"
    slot = f"{{kind: texts, weights: {place}, sizes: true, waves: 4, parts: [{part}]}}"
    how = [f"model.conditioner={slot}", "steps=1", "batch=2", "sampling.steps=1", "checkpoint.every=1"]
    train(load_config("tiny", how).config, run=place / "run")
    pipeline = load(place / "run", "cpu")
    with torch.no_grad():
        for p in pipeline.model.net.parameters():  # a network that begins by answering zero hears nothing
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    from sfumato.io.directory import save_model

    save_model(place / "model", pipeline.model, {})
    return place / "model"


@pytest.fixture
def pipeline(run: Path) -> Pipeline:
    return load(run, "cpu")


def same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(one.images, other.images))


def test_encoded_prompts_draw_the_same_without_an_encoder(pipeline: Pipeline) -> None:
    prompts, against = ["a red circle", {"caption": "a square", "crop": (2, 3)}], "of"
    plain, negative = pipeline.sample(prompts, **DRAW), pipeline.sample(prompts, negative=against, **DRAW)
    assert not same(plain, negative)
    rows, row = pipeline.encode(prompts), pipeline.encode(against)[0]
    assert rows[0]["caption"] == "a red circle" and same(pipeline.sample(rows, **DRAW), plain)
    mixed = pipeline.sample([rows[0], prompts[1]], **DRAW)
    np.testing.assert_allclose(mixed.images.astype(int), plain.images.astype(int), atol=1)
    pipeline.release_text()
    after = pipeline.sample(rows, **DRAW)
    assert same(after, plain)
    again = pipeline.sample(
        rows, negative=row, **DRAW
    )  # the second is told other sizes: those that `row` was read with
    np.testing.assert_allclose(again.images[0].astype(int), negative.images[0].astype(int), atol=1)
    assert after.settings == plain.settings  # nothing of the states, and the guidance that there was
    with pytest.raises(ConfigError, match="were released"):
        pipeline.sample("a red circle")
    with pytest.raises(ConfigError, match="were released"):
        pipeline.sample(rows, negative="of", **DRAW)


def test_encoded_prompts_of_several_shapes_are_refused(pipeline: Pipeline) -> None:
    row = pipeline.encode("a red circle")
    pipeline.change_text(chunks=2)
    with pytest.raises(DataError, match="different shapes"):
        pipeline.sample([*row, *pipeline.encode("a square")], **DRAW)


def test_where_encoders_lie_changes_no_picture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(run, "cpu").sample("a red circle", **DRAW)
    for place in ("cpu", "offload"):
        assert same(load(run, "cpu", text_device=place).sample("a red circle", **DRAW), plain)


def test_offloaded_encoders_visit_once_a_batch_and_go_back(pipeline: Pipeline) -> None:
    moves: list[torch.device] = []
    reader = pipeline.reader
    reader.works = torch.device("meta")  # another device, as far as moving goes
    reader._move = lambda device: moves.append(device)  # type: ignore[method-assign]
    pipeline.sample("a red circle", **DRAW)  # reads twice: the prompt, and nothing
    assert moves == [torch.device("meta"), torch.device("cpu")]
    with pytest.raises(RuntimeError), reader.working():
        raise RuntimeError("a fault inside")
    assert moves[2:] == [torch.device("meta"), torch.device("cpu")]


def test_encoders_are_never_put_where_they_do_not_work(run: Path) -> None:
    pipeline = load(run, "meta", text_device="cpu")
    kinds = {name: {p.device.type for p in part.parameters()} for name, part in pipeline.model.parts().items()}
    assert kinds["net"] == {"meta"} and kinds["conditioner"] == {"cpu"}
    assert all(value.device.type == "meta" for value in pipeline.reader.cond([{"caption": "red"}], (32, 32)).values())


def test_options_change_what_is_read_and_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load(run, "cpu").sample("a (red:1.8) circle", **DRAW)
    told = load(run, "cpu", text={"emphasis": True}).sample("a (red:1.8) circle", **DRAW)
    assert not same(plain, told) and told.settings[0]["text"] == {"emphasis": True} and "text" not in plain.settings[0]
    words = [
        str(run),
        "a (red:1.8) circle",
        "--steps",
        "2",
        "--guidance",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match="0"):
        main(["sample", *words, "--text", "{emphasis: true}", "--text-device", "offload", "--json"])
    from PIL import Image

    drawn = np.asarray(Image.open(next(tmp_path.glob("*.png"))))
    assert np.array_equal(drawn, told.images[0])
    with pytest.raises(SystemExit, match="2"):
        main(["sample", *words, "--text", "emphasis"])
    assert "options are a mapping" in capsys.readouterr().err


def test_models_without_text_encoders_have_no_such_options(tmp_path: Path) -> None:
    train(load_config("tiny", ["steps=1", "checkpoint.every=1"]).config, run=tmp_path / "run")
    with pytest.raises(ConfigError, match="no text encoder"):
        load(tmp_path / "run", "cpu", text={"emphasis": True})
    assert load(tmp_path / "run", "cpu", text_device="offload").sample("a circle", steps=1).images.shape[0] == 1
