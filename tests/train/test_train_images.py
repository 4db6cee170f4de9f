"""Training with pictures as conditions: layouts, super-resolution, inpainting and vectors of a picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import kept, rows_of, stopped

from sfumato import load, train
from sfumato.config import Config
from sfumato.data.scenes import Scenes

Small = Callable[..., Config]
WORDS = "{kind: prompts, dim: 16, depth: 1, heads: 2, length: 12}"
KINDS = {
    "layout": (f"model.conditioner={{kind: joined, parts: [{WORDS}, {{kind: image, field: layout}}]}}",),
    "super_resolution": ("model.conditioner={kind: image, shrink: 4}", "model.net.text=joint"),
    "inpainting": (f"model.conditioner={{kind: joined, parts: [{WORDS}, {{kind: inpainting}}]}}",),
    "tokens": (
        f"model.conditioner={{kind: joined, contexts: sequence, parts: [{WORDS}, "
        "{kind: image_tokens, field: layout, side: 32, patch: 8, dim: 16, depth: 1, heads: 2}]}",
    ),
}
ON = ("data.layout=places", "steps=4", "checkpoint.every=2", "sampling.steps=2", "samples={every: 4, count: 2}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_pictures_stops_and_goes_on_bit_for_bit(kind: str, small: Small, tmp_path: Path) -> None:
    config = small(*ON, *KINDS[kind], "validate={every: 4, batches: 1, holdout: 8}")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 2)
    train(config, run=tmp_path / "parts", resume=True)
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "whole") if "loss" in row)
    assert list((tmp_path / "whole" / "samples").iterdir())
    pipeline, data = load(tmp_path / "whole"), Scenes(layout="places")[0]
    image = data.image
    asked = {
        "layout": {"caption": "a circle", "layout": data.fields["layout"]},
        "super_resolution": {"image": image[::4, ::4]},
        "inpainting": {"image": image, "mask": np.full((32, 32), 255, np.uint8)},
        "tokens": {"caption": "a circle", "layout": data.fields["layout"]},
    }[kind]
    assert pipeline.sample(asked).images.shape == (1, 32, 32, 3)
