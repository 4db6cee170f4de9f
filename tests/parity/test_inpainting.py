"""Stable Diffusion for inpainting: diffusers' own pipeline with nine channels, small and with every weight random."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from test_stable_diffusion import SMALL
from tests.clip import encoder, randomised, tokenizer

from sfumato import load
from sfumato.cli import main
from sfumato.io.published import save_published
from sfumato.nets.stable_unet import StableUNet

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("inpainting")
    vae = randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.7,
        ),
        3,
    )
    with torch.no_grad():  # their pipeline draws from the latents' distribution, ours takes its mean: make it narrow
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -40
    unet = randomised(diffusers.UNet2DConditionModel(**SMALL, in_channels=9), 5)
    with torch.no_grad():  # what is concatenated is to be seen in the picture
        unet.conv_in.weight[:, 4:] *= 30
    scheduler = diffusers.DDIMScheduler(
        beta_start=8.5e-4,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    made = diffusers.StableDiffusionInpaintPipeline(
        vae,
        randomised(encoder(), 4),
        tokenizer(folder / "made"),
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "whole")
    made.set_progress_bar_config(disable=True)
    return made, folder / "whole"


def known(size: tuple[int, int] = (16, 24)) -> tuple[Pillow.Image, Pillow.Image]:
    """A picture, and a mask with an edge that does not follow the latents' grid."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[3:11, 5:20] = 255
    return Pillow.fromarray(image), Pillow.fromarray(mask)


@pytest.mark.parametrize(("guidance", "strength"), [(1.0, 1.0), (4.0, 1.0), (4.0, 0.5)])
def test_a_folder_of_diffusers_fills_in_the_same(whole: tuple[Any, Path], guidance: float, strength: float) -> None:
    pipe, folder = whole
    image, mask = known()
    given: dict[str, Any] = {"image": image}
    if strength < 1:  # their encoder draws from the generator before the noise does, unless it has nothing to do
        pixels = pipe.image_processor.preprocess(image)
        rest = pixels * (pipe.mask_processor.preprocess(mask) < 0.5)
        latents = [pipe.vae.encode(one).latent_dist.mode().detach() * 0.7 for one in (pixels, rest)]
        given = {"image": latents[0], "masked_image_latents": latents[1]}
    told = pipe(
        "a red circle",
        **given,
        mask_image=mask,
        height=16,
        width=24,
        num_inference_steps=8,
        guidance_scale=guidance,
        strength=strength,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    pipeline = load(folder, "cpu")
    options: dict[str, Any] = {"steps": 8, "guidance": guidance, "seeds": 7, "size": (16, 24)}
    free = np.asarray(mask) > 127
    drawn = pipeline.sample("a red circle", image=image, mask=mask, strength=strength, **options).images[0]
    assert np.abs(drawn / 255 - told)[free].max() < 1.01 / 255
    assert (drawn[~free] == np.asarray(image)[~free]).all()
    if strength == 1:
        asked = {"caption": "a red circle", "image": image, "mask": mask}
        raw = pipeline.sample(asked, **options).images[0]
        assert np.abs(raw / 255 - told).max() < 1.01 / 255
        other = pipeline.sample({**asked, "image": Pillow.new("RGB", (24, 16))}, **options).images[0]
        assert np.abs(other.astype(float) - raw).max() > 5


def test_it_goes_back_without_a_changed_bit(whole: tuple[Any, Path], tmp_path: Path) -> None:
    def convert(source: Path, target: str, to: str) -> dict[str, bytes]:
        with pytest.raises(SystemExit) as left:
            main(["convert", str(source), str(tmp_path / target), "--to", to])
        assert left.value.code == 0
        files = sorted(path for path in (tmp_path / target).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / target)): path.read_bytes() for path in files}

    ours = convert(whole[1], "a", "sfumato")
    theirs = convert(tmp_path / "a", "b", "diffusers")
    assert convert(tmp_path / "b", "c", "sfumato") == ours
    assert convert(tmp_path / "c", "d", "diffusers") == theirs


def test_diffusers_fills_in_the_same_from_what_we_write(whole: tuple[Any, Path], tmp_path: Path) -> None:
    model = load(whole[1], "cpu").model
    assert isinstance(model.net, StableUNet) and model.net.config.in_channels == 9
    save_published(tmp_path / "mine", model)
    again = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "mine", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    image, mask = known()
    drawn = [
        pipe(
            "a blue square",
            image=image,
            mask_image=mask,
            height=16,
            width=24,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images
        for pipe in (whole[0], again)
    ]
    np.testing.assert_allclose(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)


def test_the_command_line_fills_in(whole: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, mask = known((16, 16))
    image.save(tmp_path / "picture.png")
    mask.resize((16, 16)).save(tmp_path / "mask.png")
    words = [
        str(whole[1]),
        "a red circle",
        "--image",
        str(tmp_path / "picture.png"),
        "--mask",
        str(tmp_path / "mask.png"),
    ]
    with pytest.raises(SystemExit) as left:
        main(["sample", *words, "--steps", "2", "--size", "16x16", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert left.value.code == 0, capsys.readouterr().err
    from sfumato.io.pictures import read_settings

    said = read_settings(next((tmp_path / "out").glob("*.png")))
    assert said["masked"] and said["fields"]["mask"] == str(tmp_path / "mask.png")
