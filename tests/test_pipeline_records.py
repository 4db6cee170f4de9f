"""Pictures that say how they were made: what they keep draws them again, and what is saved overwrites nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.errors import MachineError
from sfumato.io.directory import save_model
from sfumato.io.pictures import read_settings
from sfumato.pipeline import Pipeline, load
from small_models import PROMPTS, made


def again(pipe: Pipeline, said: Mapping[str, Any]) -> Any:
    """The picture of some settings, drawn anew."""
    names = ("steps", "sampler", "grid", "guidance", "interval", "rescale", "size")
    prompt, negative = (
        said.get(fields, said[text]) for fields, text in (("fields", "prompt"), ("negative_fields", "negative"))
    )
    options = {name: said[name] for name in names}
    return pipe.sample([prompt], seeds=[said["seed"]], negative=negative, **options).images[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 1, "size": (4, 8)},
        {"sampler": {"kind": "ddim", "eta": 0.7}, "grid": {"kind": "karras", "rho": 5.0}, "steps": 5},
        {"negative": "two squares", "interval": (0.3, 4.0), "rescale": 0.5, "sampler": "ddpm"},
        {"negative": {"label": "cat"}, "interval": (0.3, None), "guidance": 4.5},
        {"negative": {"label": "cat", "caption": "two"}},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_settings_in_a_png_draw_the_same_picture(doubles: Pipeline, options: dict[str, Any], tmp_path: Path) -> None:
    samples = doubles.sample(PROMPTS, seeds=20, **options)
    paths = samples.save(tmp_path)
    for path, image, said in zip(paths, samples.images, samples.settings, strict=True):
        kept = read_settings(path)
        assert kept == said
        assert np.array_equal(again(doubles, kept), image)
    assert len({image.tobytes() for image in samples.images}) == len(PROMPTS)
    assert ((samples.images > 0) & (samples.images < 255)).mean() > 0.02


def test_settings_of_a_model_without_conditions_draw_the_same_picture() -> None:
    pipe = Pipeline(made(conditioner=None), "cpu")
    samples = pipe.sample([None], seeds=3)
    assert np.array_equal(again(pipe, samples.settings[0]), samples.images[0])


def test_a_loaded_model_draws_the_same_and_says_where_it_is_from(pipe: Pipeline, tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "model", pipe.model, {"run": "tiny", "steps": 7})
    loaded = load(tmp_path / "run", "cpu")
    samples, want = loaded.sample(PROMPTS, seeds=3), pipe.sample(PROMPTS, seeds=3)
    assert np.array_equal(samples.images, want.images)
    assert samples.settings[0]["model"] == {"run": "tiny", "steps": 7} and "model" not in want.settings[0]


def test_saving_overwrites_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    samples = pipe.sample(["a red circle", "a red circle", None], seeds=[1, 2, 3])
    first, second = samples.save(tmp_path / "new" / "folder"), samples.save(tmp_path / "new" / "folder")
    assert [path.name for path in first] == ["a-red-circle-0000.png", "a-red-circle-0001.png", "picture-0000.png"]
    assert [path.name for path in second] == ["a-red-circle-0002.png", "a-red-circle-0003.png", "picture-0001.png"]
    assert [read_settings(path)["seed"] for path in (*first, *second)] == [1, 2, 3, 1, 2, 3]
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        samples.save(tmp_path / "file" / "folder")


def test_a_sheet_holds_all(pipe: Pipeline) -> None:
    sheet = pipe.sample(["a", "red", None], seeds=0).grid(columns=2)
    assert sheet.width >= 2 * 12 and sheet.height >= 2 * 8
