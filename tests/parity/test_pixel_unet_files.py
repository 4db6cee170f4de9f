"""Original files of ADM and of consistency models: small ones of every kind, and published shapes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pixel_unets import load_safetensors
from tests.clip import randomised

from sfumato.conditioners import Labels
from sfumato.errors import ConfigError
from sfumato.io.families import ddpm
from sfumato.io.families.pixel_unet import Original, is_of_two_axes, lines, seen_in
from sfumato.io.keymap import ORIGINAL, OURS, renamed
from sfumato.io.published import load_published, save_file, save_published
from sfumato.model import Model, build_model
from sfumato.nets.pixel_unet import PRESETS, PixelUNet, preset
from sfumato.pipeline import Pipeline


def model_of(name: str, **changes: object) -> Model:
    """A model of a published kind, small, with random weights."""
    shape = replace(preset(name), channels=(32, 64), blocks=1, heads=(0, 1), middle=1, size=64, dropout=0.0, classes=0)
    shape = replace(shape, **changes)  # type: ignore[arg-type]
    consistency = name.startswith("consistency")
    classes = 5 if preset(name).classes else 0
    section: dict[str, Any] = {
        "path": {"kind": "variance_exploding", "sigma_max": 80.0} if consistency else ddpm.table(name == "cosine"),
        "prediction": {"kind": "edm", "sigma_data": 0.5, "sigma_min": 0.002} if consistency else "eps",
        "time_input": "log_level_thousandths" if consistency else "index",
        "scale_input": {"kind": "unit_variance", "sigma_data": 0.5} if consistency else None,
        **ddpm.section_of(replace(shape, classes=classes)),
        "answers": ["endpoint"] if consistency else ["x0", "x0_variance"],
    }
    sampler = {"kind": "consistency", "sigma_min": 0.002, "clip": 1.0}
    sampling = {"sampler": sampler, "grid": {"kind": "consistency", "of": 40}, "steps": 1, "guidance": 1.0}
    spec = {"model": section, "size": [64, 64], "sampling": sampling if consistency else ddpm.SAMPLING}
    model = build_model(spec, files=Labels(classes).files())
    randomised(model.net, 4)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("adm-256", "256x256_diffusion.pt"),
        ("adm-256-unconditional", "lsun_bedroom.pt"),
        ("consistency-64", "cd_imagenet64_l2.safetensors"),
        ("consistency-256", "ct_bedroom256.safetensors"),
    ],
)
def test_original_files_there_and_back(name: str, file: str, tmp_path: Path) -> None:
    model = model_of(name)
    save_file(tmp_path / "made.safetensors", model)
    state = load_safetensors(tmp_path / "made.safetensors")
    if file.endswith(".pt"):
        torch.save(state, tmp_path / file)
    else:
        shutil.copy(tmp_path / "made.safetensors", tmp_path / file)
    again = load_published(tmp_path / file)
    assert again.net.config == model.net.config and again.answers == model.answers
    assert all(torch.equal(value, model.weights()[key]) for key, value in again.weights().items())
    assert "middle_block.1.qkv.weight" in state and state["middle_block.1.qkv.weight"].ndim == (
        4 if name.startswith("consistency") else 3
    )
    label = 2 if model.conditioner is not None else None
    told = {"steps": 2, "grid": model.spec["sampling"]["grid"]}
    one, two = (Pipeline(one, "cpu").sample(label, **told).images for one in (model, again))
    assert (one == two).all() and one.std() > 5
    if name == "consistency-256":
        assert again.spec["sampling"]["grid"]["of"] == 151
    save_file(tmp_path / "again.safetensors", again)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()


def test_flags_beside_a_file_say_what_weights_do_not(tmp_path: Path) -> None:
    model = model_of("adm-256-unconditional")
    file = tmp_path / "mine.safetensors"
    save_file(file, model)
    flags = {"noise_schedule": "cosine", "use_new_attention_order": True, "num_heads": 2, "image_size": 32}
    file.with_suffix(".json").write_text(json.dumps(flags))
    found = load_published(file)
    assert found.spec["model"]["path"]["betas"] == "cosine" and found.spec["size"] == [32, 32]
    assert found.net.config.heads == (0, 2) and found.net.config.middle == 2
    ours, theirs = (one.net.state_dict()["middle.layer.attention.q.weight"] for one in (model, found))
    assert torch.equal(ours, theirs)  # a model of one head has one order
    teacher = model_of("consistency-256")
    save_file(tmp_path / "edm_cat256_ema.safetensors", teacher)
    edm = load_published(tmp_path / "edm_cat256_ema.safetensors")
    assert edm.answers == ("x0",) and edm.denoiser.prediction.name == "edm(0.5)"
    assert Pipeline(edm, "cpu").sample(steps=2).images.shape == (1, 64, 64, 3)


def test_the_model_of_64_pixels_is_known_by_its_widths(tmp_path: Path) -> None:
    """Its betas lie on a cosine and its queries stand before the heads; that of 128 has 4 heads a level."""
    for name, betas, early in (("adm-64", "cosine", True), ("adm-128", "linear", False)):
        config = replace(preset(name), blocks=1)
        with torch.device("meta"):
            net = PixelUNet(config)
        kept = Original(1, not early)
        state = renamed(net.state_dict(), lines(config, kept), OURS, ORIGINAL, "here")
        found = ddpm.DDPM().read_file(state, tmp_path / f"{name}.pt", None)
        assert found.section["path"]["betas"] == betas and found.size == [config.size] * 2
        built = ddpm.slot_of(config)
        assert found.section["net"] == built
        seen = seen_in(state, ORIGINAL, "here")
        assert (seen.classes, seen.blocks, seen.resamples, seen.scales) == (1000, 1, True, True)


@pytest.mark.parametrize("name", ["adm-64", "adm-128", "adm-256", "adm-512", "consistency-64", "consistency-256"])
def test_shapes_of_published_files(name: str, tmp_path: Path) -> None:
    """Of the whole network, without memory: what a file's shapes tell is the preset."""
    config = PRESETS[name]
    with torch.device("meta"):
        net = PixelUNet(config)
    kept = Original(2) if name.startswith("consistency") else Original(1, name != "adm-64")
    state = renamed(net.state_dict(), lines(config, kept), OURS, ORIGINAL, "here")
    found = ddpm.DDPM().read_file(state, tmp_path / f"{name}.pt", None)
    assert found.section["net"] == ddpm.slot_of(config)
    assert found.state.keys() == {f"net.{key}" for key in net.state_dict()}
    assert is_of_two_axes({key: value.shape for key, value in state.items()}) == name.startswith("consistency")


# Learned variances


def test_sampling_an_adm_uses_both_halves_of_what_it_says() -> None:
    """The first half moves the mean, the second the noise: each changes the picture by itself."""
    model = model_of("adm-256-unconditional")
    pipeline = Pipeline(model, "cpu")
    exit_ = model.net.exit
    drawn = [pipeline.sample(steps=4, seeds=1).images.astype(int)]
    with torch.no_grad():
        for half in (slice(0, 3), slice(3, 6)):
            kept = exit_.bias[half].clone()
            exit_.bias[half] += 0.7
            drawn.append(pipeline.sample(steps=4, seeds=1).images.astype(int))
            exit_.bias[half] = kept
    assert abs(drawn[1] - drawn[0]).mean() > 2 and abs(drawn[2] - drawn[0]).mean() > 2
    small = pipeline.sample(steps=4, seeds=1, sampler={"kind": "ddpm", "clip": 1.0}).images.astype(int)
    assert abs(small - drawn[0]).mean() > 2


# What has no such form


def test_what_diffusers_cannot_say_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="told no class"):
        save_published(tmp_path / "a", model_of("adm-256"))
    with pytest.raises(ConfigError, match="waves"):
        save_published(tmp_path / "b", model_of("adm-256-unconditional", frequencies=64))
    with pytest.raises(ConfigError, match="one width"):
        save_published(tmp_path / "c", model_of("adm-256-unconditional", heads=(2, 2), middle=2))
    with pytest.raises(ConfigError, match="no such parts"):
        save_file(tmp_path / "d.safetensors", model_of("adm-256-unconditional", sines_first=True))
