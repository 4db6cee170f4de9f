"""Pictures as conditions: what they say, where they stand, and that they travel through training and sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from sfumato import load
from sfumato.codecs import Latents, Pixels
from sfumato.conditioners import Conditioner, Joined, Labels
from sfumato.denoiser import CONCAT, MASK, Denoiser, joined
from sfumato.errors import ConfigError, DataError
from sfumato.image_conditions import ImageMap, ImageTokens, Inpainting
from sfumato.io.directory import save_model
from sfumato.io.pictures import read_settings
from sfumato.model import Model, build_model
from sfumato.paths import Linear
from sfumato.pipeline import Pipeline
from sfumato.predictions import VELOCITY
from sfumato.prompts import Prompts


def picture(seed: int = 0, size: tuple[int, int] = (16, 24)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def placed(conditioner: Conditioner, size: tuple[int, int] = (16, 24), codec: Any = None) -> Any:
    conditioner.of_size(size)
    conditioner.of_codec(codec or Pixels())
    return conditioner


def latents() -> Latents:
    torch.manual_seed(0)
    return Latents(channels=(8, 16), latent=4, blocks=1, groups=4)


# Beside x_t


def test_a_picture_stands_beside_x_as_it_is() -> None:
    image = picture()
    cond = placed(ImageMap(field="layout"))([{"layout": image}, {}])
    assert cond.keys() == {CONCAT} and cond[CONCAT].shape == (2, 3, 16, 24)
    expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(cond[CONCAT][0], expected, rtol=0, atol=1e-6)
    assert float(cond[CONCAT][1].abs().max()) == 0


def test_a_picture_is_encoded_as_the_models_own() -> None:
    codec, image = latents(), picture()
    encoded = codec.encode((torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1)[None])
    one = placed(ImageMap(), codec=codec)
    assert one.channels == 4
    torch.testing.assert_close(one([{"image": image}])[CONCAT], encoded)
    colours = placed(ImageMap(through="pixels"), codec=codec)
    assert colours.channels == 3 and colours([{"image": image}])[CONCAT].shape == (1, 3, 8, 12)
    assert not list(one.state_dict())  # the autoencoder's weights are the model's


def test_a_path_a_pillow_picture_and_an_array_are_one(tmp_path: Path) -> None:
    image, one = picture(), placed(ImageMap())
    Pillow.fromarray(image).save(tmp_path / "p.png")
    said = [{"image": value} for value in (image, Pillow.fromarray(image), tmp_path / "p.png", str(tmp_path / "p.png"))]
    rows = one(one.sized(said, (16, 24)))[CONCAT]
    assert all(torch.equal(row, rows[0]) for row in rows[1:])
    assert torch.equal(one(said)[CONCAT], rows)


def test_super_resolution_sees_the_picture_small() -> None:
    one = placed(ImageMap(shrink=4))
    assert one.kept == ("image",)
    whole = np.zeros((16, 24, 3), np.uint8)
    whole[:, 12:] = 255
    made = one.examples(whole[None], [{"caption": "x"}], torch.Generator())[0]
    assert made["caption"] == "x" and made["image"].shape == (4, 6, 3)
    cond = one([made])[CONCAT]
    assert cond.shape == (1, 3, 16, 24) and float(cond[..., :8].max()) < -0.9 and float(cond[..., -8:].min()) > 0.9
    assert torch.equal(one(one.sized([made], (16, 24)))[CONCAT], cond)
    own = picture(1, (4, 6))
    assert one.examples(whole[None], [{"image": own}], torch.Generator())[0]["image"] is own
    with pytest.raises(ConfigError, match="whole pixels"):
        placed(ImageMap(shrink=5))


def test_inpainting_is_told_the_mask_then_the_rest_of_the_picture() -> None:
    codec, image, one = latents(), picture(), placed(Inpainting(), codec=latents())
    mask = np.zeros((16, 24, 3), np.uint8)
    mask[:, 12:] = 255
    cond = one([{"image": image, "mask": mask}])[CONCAT]
    assert one.channels == 5 and cond.shape == (1, 5, 8, 12)
    assert torch.equal(cond[:, 0], torch.from_numpy(mask[::2, ::2, 0] / 255).float()[None])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    pixels[..., 12:] = 0
    torch.testing.assert_close(cond[:, 1:], codec.encode(pixels))
    # nothing is known where there is no picture, at any size
    grey = codec.encode(torch.zeros(1, 3, 8, 8))
    null = one(one.sized([{}], (8, 8)))[CONCAT]
    assert float(null[:, 0].min()) == 1
    torch.testing.assert_close(null[:, 1:], grey)


def test_inpainting_masks_what_it_learns_from() -> None:
    one, images = placed(Inpainting()), np.stack([picture(i) for i in range(64)])
    made = one.examples(images, [{} for _ in images], torch.Generator().manual_seed(0))
    shares = np.array([np.mean(raw["mask"] == 255) for raw in made])
    assert all(raw["image"] is not None and set(np.unique(raw["mask"])) <= {0, 255} for raw in made)
    assert 0.1 < (shares == 1).mean() < 0.4 and (shares > 0).all() and len(set(shares.tolist())) > 30
    again = one.examples(images, [{} for _ in images], torch.Generator().manual_seed(0))
    assert all((a["mask"] == b["mask"]).all() for a, b in zip(made, again, strict=True))


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    one = placed(ImageMap(field="layout"))
    for value in (str(tmp_path / "none.png"), str(tmp_path / "text.png"), np.zeros((3, 4, 5, 6)), 7):
        with pytest.raises(DataError):
            one.check([{"layout": value}])
    with pytest.raises(DataError, match="a picture and a mask"):
        placed(Inpainting()).check([{"image": picture()}])
    with pytest.raises(DataError, match="one size"):
        one([{"layout": picture()}, {"layout": picture(size=(8, 8))}])
    with pytest.raises(ConfigError, match="a model around it"):
        ImageMap()([{"image": picture()}])
    for options in ({"shrink": 0}, {"through": "air"}):
        with pytest.raises(ConfigError):
            ImageMap(**options)  # type: ignore[arg-type]
    for tokens in ({"patch": 7}, {"heads": 3, "dim": 8}):
        with pytest.raises(ConfigError):
            ImageTokens(**tokens)  # type: ignore[arg-type]


# The denoiser


class Seen(torch.nn.Module):
    """A network that keeps what it is given, and answers with the first channels."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        self.x, self.cond = x, cond
        return x[:, :3]


def test_any_network_is_given_the_maps_after_its_own_input() -> None:
    net = Seen()
    model = Denoiser(net, Linear(), VELOCITY, scale_input=lambda path, t: 0.5 + 0 * t)
    x, maps = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    model(x, 0.3, {CONCAT: maps, "pooled": torch.ones(2, 1)})
    assert torch.equal(net.x, torch.cat([x * 0.5, maps], 1)) and net.cond.keys() == {"pooled"}
    model(x, 0.3, {CONCAT: maps[:, :, :1, :1]})
    assert torch.equal(net.x[:, 3:], maps[:, :, :1, :1].expand(2, 2, 4, 4))
    with pytest.raises(ConfigError, match="another size"):
        model(x, 0.3, {CONCAT: maps[:, :, :2]})


def test_a_batch_holds_pictures_and_their_absence() -> None:
    maps, none = torch.randn(2, 3, 4, 6), torch.zeros(1, 3, 1, 1)
    both = joined([{CONCAT: maps}, {CONCAT: none}])[CONCAT]
    assert torch.equal(both, torch.cat([maps, torch.zeros(1, 3, 4, 6)]))


# In the context


def test_patches_are_attended_to_like_words() -> None:
    torch.manual_seed(0)
    one = ImageTokens(side=16, patch=4, dim=8, depth=1, heads=2)
    image = picture(size=(16, 16))
    cond = one([{"image": image}, {}, {"image": picture(1)}])["context"]
    assert cond.shape == (3, 16, 8)
    assert torch.equal(cond[1], one.absent.expand(16, 8))
    torch.testing.assert_close(cond[:1], one([{"image": image}])["context"])
    moved = np.roll(image, 4, 1)
    assert not torch.allclose(one([{"image": moved}])["context"], cond[:1], atol=1e-3)


def test_contexts_stand_in_sequence_where_that_is_said() -> None:
    torch.manual_seed(0)
    words, patches = Prompts(dim=8, depth=1, heads=2, length=4), ImageTokens(side=8, patch=4, dim=8, depth=1, heads=2)
    said = [{"caption": "a", "image": picture()}, {}]
    with pytest.raises(ConfigError) as caught:
        Joined([words, patches])(said)
    assert caught.value.fix == "contexts=sequence"
    both = Joined([words, patches], contexts="sequence")
    cond = both(said)
    assert torch.equal(cond["context"], torch.cat([words(said)["context"], patches(said)["context"]], 1))
    assert cond.keys() == {"context", "pooled"}

    class Masked(ImageTokens):
        def forward(self, raw: Any) -> Any:
            found = super().forward(raw)
            return {**found, MASK: torch.zeros(found["context"].shape[:2], dtype=torch.bool)}

    hidden = Masked(side=8, patch=4, dim=8, depth=1, heads=2)
    mask = Joined([words, hidden], contexts="sequence")(said)[MASK]
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 2
    with pytest.raises(ConfigError, match="one width"):
        Joined([words, ImageTokens(side=8, patch=4, dim=12)], contexts="sequence")(said)
    with pytest.raises(ConfigError, match="no such way"):
        Joined([words], contexts="both")  # type: ignore[arg-type]


# Whole models


NETS: dict[str, dict[str, Any]] = {
    "dit": {"kind": "dit", "patch": 4, "dim": 16, "depth": 2, "heads": 2, "skips": False},
    "unet": {"kind": "unet", "channels": [8, 16], "blocks": 1, "attention": [0, 1], "head": 8},
}


def model_of(net: str, conditioner: Any) -> Model:
    torch.manual_seed(0)
    section = {
        "path": "linear",
        "prediction": "velocity",
        "time_input": "thousandths",
        "scale_input": None,
        "net": NETS[net],
        "codec": "pixels",
        "conditioner": conditioner,
    }
    sampling = {"sampler": "euler", "grid": "linear", "steps": 3, "guidance": 2.0}
    made = build_model({"model": section, "size": [16, 16], "sampling": sampling})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


LABELLED = {"kind": "joined", "parts": [{"kind": "labels", "classes": 3}, {"kind": "image", "field": "layout"}]}


@pytest.mark.parametrize("net", NETS)
def test_every_network_takes_a_picture_beside_a_class(net: str, tmp_path: Path) -> None:
    pipeline = Pipeline(model_of(net, LABELLED), "cpu")
    one, other = picture(0, (16, 16)), picture(1, (16, 16))
    Pillow.fromarray(one).save(tmp_path / "layout.png")
    asked = [{"label": 1, "layout": one}, {"label": 1, "layout": other}, {"label": 1}, {"layout": one}]
    drawn = pipeline.sample(asked, seeds=[4] * 4)
    assert len({image.tobytes() for image in drawn.images}) == 4
    apart = pipeline.sample(asked, seeds=[4] * 4, batch=1)
    assert int(np.abs(apart.images.astype(int) - drawn.images).max()) <= 1
    by_path = pipeline.sample({"label": 1, "layout": tmp_path / "layout.png"}, seeds=4)
    assert int(np.abs(by_path.images[0].astype(int) - drawn.images[0]).max()) <= 1
    save_model(tmp_path / "model", pipeline.model, {})
    again = load(tmp_path / "model", "cpu").sample(asked, seeds=[4] * 4)
    assert (again.images == drawn.images).all()


def test_records_name_pictures_and_do_not_hold_them(tmp_path: Path) -> None:
    pipeline = Pipeline(model_of("dit", LABELLED), "cpu")
    Pillow.fromarray(picture()).save(tmp_path / "layout.png")
    asked = [{"label": 2, "layout": picture(1)}, {"layout": tmp_path / "layout.png"}]
    paths = pipeline.sample(asked, steps=1).save(tmp_path / "out")
    first, second = (read_settings(path) for path in paths)
    assert first["prompt"] == 2 and first["fields"]["layout"].startswith("sha256:")
    assert second["prompt"] is None and second["fields"] == {"layout": str(tmp_path / "layout.png")}
    assert paths[1].name == "picture-0000.png"
    other = pipeline.sample({"layout": picture(2)}, steps=1).settings[0]["fields"]["layout"]
    assert other.startswith("sha256:") and other != first["fields"]["layout"]


def test_another_size_is_drawn_with_the_picture_in_that_size() -> None:
    pipeline = Pipeline(model_of("unet", {"kind": "image", "field": "layout"}), "cpu")
    assert pipeline.sample({"layout": picture()}, size=(24, 32), steps=2).images.shape == (1, 24, 32, 3)
    assert pipeline.sample([{"layout": picture()}, None], size=(24, 32), steps=2).images.shape == (2, 24, 32, 3)


def test_what_is_kept_is_told_to_both_branches() -> None:
    """With a kept picture and nothing else said, guidance changes nothing; with one that is not kept it does."""
    asked = {"layout": picture(0, (16, 16))}
    for kept in (True, False):
        pipeline = Pipeline(model_of("dit", {"kind": "image", "field": "layout", "kept": kept}), "cpu")
        one, two = (pipeline.sample(asked, guidance=scale).images for scale in (1.0, 6.0))
        assert (int(np.abs(one.astype(int) - two).max()) <= 1) == kept


def test_a_mask_is_told_to_a_model_for_inpainting() -> None:
    pipeline = Pipeline(model_of("unet", {"kind": "inpainting"}), "cpu")
    image, mask = picture(0, (16, 16)), np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    drawn = pipeline.sample(image=image, mask=mask, seeds=3)
    raw = pipeline.sample({"image": image, "mask": mask}, seeds=3)
    assert (drawn.images[0, :, :8] == image[:, :8]).all()
    assert (drawn.images[0, :, 8:] == raw.images[0, :, 8:]).all() and (raw.images[0, :, :8] != image[:, :8]).any()
    part = pipeline.sample(image=image, mask=mask, seeds=3, strength=0.5)
    assert (part.images != drawn.images).any() and (part.images[0, :, :8] == image[:, :8]).all()
    assert drawn.settings[0]["masked"] and drawn.settings[0]["fields"]["mask"].startswith("sha256:")
    several = pipeline.sample([None, None], image=[image, picture(1, (16, 16))], mask=mask, seeds=[3, 3])
    assert (several.images[0] == drawn.images[0]).all() and (several.images[1] != drawn.images[0]).any()


def test_labels_stay_labels() -> None:
    both = Joined([Labels(3), ImageMap()])
    assert (both.fields, both.pictures, both.channels, both.kept) == (("label", "image"), ("image",), 3, ())
