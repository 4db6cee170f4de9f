"""Sampling that starts from a picture: strengths, masks, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.denoiser import Bound
from sfumato.errors import ConfigError, DataError
from sfumato.grids import linear
from sfumato.paths import Linear, VariancePreserving, noised
from sfumato.pipeline import Pipeline
from sfumato.samplers import SeededNoise, drive, sample
from sfumato.samplers.adams import ipndm
from sfumato.samplers.ddim import ddim
from sfumato.samplers.ddpm import ddpm
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.unipc import unipc
from sfumato.starts import begin, known_where
from sfumato.stream import Stream
from small_models import made

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
HALF = np.repeat((np.arange(12) >= 8)[None, :, None], 8, 0).repeat(3, 2).astype(np.uint8) * 255  # the right third


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(made(), "cpu")


@pytest.mark.parametrize("fn", [ddim, dpmpp_2m, ipndm, unipc, ddpm], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=["linear", "vp"])
def test_the_known_region_carries_the_noise_of_each_time_and_ends_as_it_was(fn, path) -> None:  # type: ignore[no-untyped-def]
    known = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    free[..., 2] = 1
    model = known_where(Bound(path, lambda x, t: 0.1 * x), known, free)
    times, noise = linear(path, 6), SeededNoise.of(range(4))
    x = noised(path, known, noise(known), times[0])
    steps = list(sample(fn(path, x, times), model, noise))
    # exact for methods that keep x0 as it is; iPNDM's polynomial in the angle is only as good as its steps are short
    allowed = 0.05 if fn is ipndm else 1e-9
    torch.testing.assert_close(steps[-1].x[..., :2], known[..., :2], rtol=0, atol=allowed)
    for step in steps[1:-1]:
        t = torch.tensor(step.t, dtype=torch.float64)
        eps = (step.x - path.alpha(t) * known)[..., :2] / path.sigma(t)
        assert 0.4 < float(eps.std()) < 1.7  # 16 numbers: three standard errors about 1


def test_strength_is_the_share_of_the_steps(pipe: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe.sample("a red circle", image=PICTURE, strength=0.5, steps=8, progress=lambda *one: told.append(one))
    full = pipe.sample("a red circle", steps=8, seeds=3).images
    one = pipe.sample("a red circle", image=PICTURE, strength=1.0, steps=8, seeds=3).images
    little = pipe.sample("a red circle", image=PICTURE, strength=0.125, steps=8, seeds=3).images
    assert np.array_equal(one, full)  # on the linear path pure noise holds nothing of the picture
    far, near = (np.abs(images[0].astype(int) - PICTURE).mean() for images in (one, little))
    assert near < far


def test_what_a_model_recommends_is_the_strength_where_none_is_asked_for(pipe: Pipeline) -> None:
    model = made()
    model.spec["sampling"]["strength"] = 0.25
    own, asked = Pipeline(model, "cpu"), {"image": PICTURE, "steps": 8, "seeds": 3}
    drawn = own.sample("a red circle", **asked)
    assert drawn.settings[0]["strength"] == 0.25
    assert np.array_equal(drawn.images, pipe.sample("a red circle", strength=0.25, **asked).images)
    for how in ({"strength": 0.75}, {"strength": 1}, {"strength": 0.75, "mask": HALF}):
        said, same = (one.sample("a red circle", **asked, **how) for one in (own, pipe))
        assert said.settings[0]["strength"] == how["strength"] and np.array_equal(said.images, same.images)
    assert own.sample("a red circle", mask=HALF, **asked).settings[0]["strength"] == 0.25
    step = next(own.steps("a red circle", steps=8))
    assert "strength" not in own.sample("a red circle", image=step, steps=8).settings[0]  # a step says where to begin
    assert "strength" not in own.sample("a red circle", steps=2).settings[0]
    assert pipe.sample("a red circle", **asked).settings[0]["strength"] == 0.6
    assert pipe.sample("a red circle", mask=HALF, **asked).settings[0]["strength"] == 1
    (streamed,) = Stream(own, "a red circle", seed=3, steps=8)([PICTURE])
    assert np.abs(streamed.astype(int) - drawn.images[0]).max() <= 1
    model.spec["sampling"]["strength"] = 1.5
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        own.sample("a red circle")


def test_pixels_outside_the_mask_are_kept_exactly(pipe: Pipeline) -> None:
    drawn = pipe.sample(["a red circle", None], image=PICTURE, mask=HALF, steps=4).images
    for image in drawn:
        assert np.array_equal(image[:, :8], PICTURE[:, :8])
        assert not np.array_equal(image[:, 8:], PICTURE[:, 8:])


def test_pictures_come_as_paths_arrays_or_pillow_and_are_fitted(pipe: Pipeline, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    ways = [PICTURE, Image.fromarray(PICTURE), tmp_path / "a.png", str(tmp_path / "a.png")]
    drawn = [pipe.sample("a red circle", image=way, steps=4).images for way in ways]
    assert all(np.array_equal(one, drawn[0]) for one in drawn)
    Image.fromarray(PICTURE).resize((48, 32)).save(tmp_path / "big.png")
    assert pipe.sample(None, image=tmp_path / "big.png", steps=2).images.shape == (1, 8, 12, 3)


def test_each_prompt_may_have_its_own_picture_in_any_batch(pipe: Pipeline) -> None:
    others = [PICTURE, 255 - PICTURE, PICTURE // 2]
    whole = pipe.sample([None] * 3, image=others, steps=4, seeds=0).images
    parts = pipe.sample([None] * 3, image=others, steps=4, seeds=0, batch=1).images
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1


def test_from_a_step_of_its_own_walk_a_model_ends_where_it_would_have(pipe: Pipeline) -> None:
    """Of several pictures, from every step but the last; the prompt may change on the way."""
    settings = {"sampler": "ddim", "steps": 6, "seeds": 3}
    prompts = ["a red circle", None]
    *steps, last = pipe.steps(prompts, **settings)
    whole = pipe.sample(prompts, **settings).images
    for step in steps:
        drawn = pipe.sample(prompts, image=step, batch=1, **settings)
        assert np.abs(drawn.images.astype(int) - whole).max() <= 1
        assert drawn.settings[0]["begun_at"] == step.t
    other = pipe.sample(prompts[::-1], image=steps[1], **settings).images
    assert (other != whole).any()
    with pytest.raises(ConfigError, match="nothing follows"):
        pipe.sample(prompts, image=last, **settings)
    with pytest.raises(ConfigError, match="says where to begin"):
        pipe.sample(prompts, image=steps[1], strength=0.5, **settings)


def test_encoded_pictures_are_what_their_pictures_are(pipe: Pipeline) -> None:
    x0 = pipe.model.codec.encode(torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float() / 127.5 - 1)
    settings = {"strength": 0.5, "steps": 4, "seeds": 3}
    one, two = (pipe.sample(["a red circle"] * 2, image=image, **settings).images for image in (PICTURE, x0))
    assert np.abs(one.astype(int) - two).max() <= 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"strength": 0.5}, ConfigError, "need a picture"),
        ({"mask": HALF}, ConfigError, "need a picture"),
        ({"image": PICTURE, "strength": 0}, ConfigError, "above 0"),
        ({"image": PICTURE, "strength": 1.5}, ConfigError, "above 0"),
        ({"image": [PICTURE, PICTURE]}, ConfigError, "one for each prompt"),
        ({"image": "nowhere.png"}, DataError, "no such picture"),
        ({"image": PICTURE, "mask": np.zeros_like(PICTURE)}, DataError, "nothing to draw"),
    ],
)
def test_what_cannot_be_is_refused(pipe: Pipeline, options, error, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=said):
        pipe.sample("a red circle", **options)


def test_steps_alone_have_no_picture_for_a_strength(pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match="need a picture"):
        pipe.steps("a red circle", strength=0.5)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="no picture that can be read"):
        begin(tmp_path / "a.png", None, None, 1, (8, 8))


def test_without_a_picture_there_is_nothing_to_begin_from() -> None:
    assert begin(None, None, None, 1, (8, 8)) is None


def test_a_picture_says_that_it_began_from_another(pipe: Pipeline, tmp_path: Path) -> None:
    from sfumato.io.pictures import parameters, read_settings

    (path,) = pipe.sample("a red circle", image=PICTURE, mask=HALF, strength=0.5, steps=4).save(tmp_path)
    said = read_settings(path)
    assert (said["strength"], said["masked"]) == (0.5, True)
    assert "Denoising strength: 0.5" in parameters(said)
    assert "strength" not in pipe.sample("a red circle", steps=2).settings[0]


def test_drive_with_a_mask_is_the_model_where_all_is_free() -> None:
    path, model = Linear(), Bound(Linear(), lambda x, t: 0.3 * x)
    x, known = torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    free = known_where(model, known, torch.ones(2, 3, dtype=torch.float64))
    times = linear(path, 5)
    torch.testing.assert_close(drive(ddim(path, x, times), free), drive(ddim(path, x, times), model))
