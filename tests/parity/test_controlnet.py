"""ControlNet: diffusers' own module and pipeline, small and with every weight random, both ways."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from test_stable_diffusion import KINDS, SMALL, heads_of, pipeline_of
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.catalogue import build
from sfumato.cli import main
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import write_weights
from sfumato.io.families.controlnet import config_of, lines, original, read_control, write_control
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.controlled import Controlled
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.stable_unet import PRESETS, StableUNet, StableUNetConfig

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HINT = (4, 6, 10, 14)
OPTIONS = {key: value for key, value in SMALL.items() if key not in ("sample_size", "up_block_types")}
OWN: dict[str, dict[str, Any]] = {
    **{kind: KINDS[kind] for kind in ("sd15", "sd21", "sdxl")},
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "grey": {"conditioning_channels": 1},
}


def their_control(kind: str, seed: int = 1) -> Any:
    options = {k: v for k, v in {**OPTIONS, **OWN[kind]}.items() if k != "up_block_types"}
    return randomised(diffusers.ControlNetModel(**options, conditioning_embedding_out_channels=HINT), seed)


@pytest.fixture(scope="module", params=OWN)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return their_control(kind)


def ours_of(peer: Any) -> ControlNet:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", {**peer.config, "attention_head_dim": heads_of(peer)})
    made = ControlNet(config).eval()
    made.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    return made


def answers(peer: Any, ours: ControlNet, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    rng = torch.Generator().manual_seed(5)
    x, t, context = (
        torch.randn(2, 4, 8, 12, generator=rng),
        torch.tensor([981, 3]),
        torch.randn(2, 7, 12, generator=rng),
    )
    hint = torch.rand(2, ours.config.colours, 64, 96, generator=rng)
    told: dict[str, Any] = {}
    own: dict[str, Tensor] = {}
    if kind == "sdxl":
        text, sizes = torch.randn(2, 10, generator=rng), torch.tensor([[64.0, 96, 0, 4, 64, 96]] * 2)
        told["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
        own["pooled"] = torch.cat([text, peer.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
    with torch.no_grad():
        said = peer(x, t, context, hint, **told)
        return [*said.down_block_res_samples, said.mid_block_res_sample], ours(
            x, t.float(), hint=hint, context=context, **own
        )


def same(here: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(here) == len(theirs) == 10
    for a, b in zip(here, theirs, strict=True):
        assert float(b.abs().max()) > 0.1
        torch.testing.assert_close(a, b, **CLOSE)


def test_the_control_of_diffusers_answers_the_same_here(peer: Any, kind: str) -> None:
    theirs, here = answers(peer, ours_of(peer), kind)
    same(here, theirs)


def test_our_control_answers_the_same_in_diffusers(peer: Any, kind: str) -> None:
    ours = ours_of(peer)
    randomised(ours, 2)
    fresh = diffusers.ControlNetModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(ours.config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours, kind)
    same(here, theirs)


def test_the_original_layout_is_that_which_diffusers_converts(peer: Any, kind: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    state, ours = peer.state_dict(), ours_of(peer)
    made = original(ours)
    plain = {key.removeprefix("control_model."): value for key, value in made.items()}
    told = {**peer.config, "attention_head_dim": heads_of(peer)}
    assert config_of(plain, ORIGINAL, "here", told) == ours.config
    back = renamed(plain, lines(ours.config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    theirs = convert_controlnet_checkpoint(dict(made), {**peer.config})
    added = {key for key in state if key.startswith("add_embedding")}  # of which they know nothing here
    assert theirs.keys() == state.keys() - added and (kind == "sdxl") == bool(added)
    assert all(torch.equal(value, state[key]) for key, value in theirs.items())


@pytest.mark.parametrize(("name", "count"), [("sd15", 361_279_120), ("sd21", None), ("sdxl", None)])
def test_names_shapes_and_counts_at_full_size(name: str, count: int | None) -> None:
    config = PRESETS[name]
    options: dict[str, Any] = {
        "block_out_channels": config.channels,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": list(config.heads),
        "use_linear_projection": config.linear,
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in config.depths],
        "transformer_layers_per_block": [depth or 1 for depth in config.depths],
    }
    if config.pooled_dim:
        options |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        options["projection_class_embeddings_input_dim"] = config.pooled_dim
    with torch.device("meta"):
        ours, theirs = ControlNet(ControlNetConfig(config)), diffusers.ControlNetModel(**options)
    state = renamed(ours.state_dict(), lines(ours.config), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    if count is not None:
        assert sum(p.numel() for p in ours.parameters()) == count


# Whole pipelines

SIZE = (16, 24)


def picture(seed: int) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any], Path]:
    """A pipeline of diffusers in a folder, and two controls beside it."""
    folder = tmp_path_factory.mktemp("controlnet")
    pipe = pipeline_of(folder, "epsilon")
    options = {key: value for key, value in OPTIONS.items() if key != "up_block_types"}
    nets = [
        randomised(diffusers.ControlNetModel(**options, conditioning_embedding_out_channels=widths), seed)
        for widths, seed in (((4, 6), 6), ((8, 5), 7))
    ]
    for i, net in enumerate(nets):
        with torch.no_grad():  # the picture is to be seen in what is drawn
            net.controlnet_cond_embedding.conv_out.weight *= 200
            net.controlnet_down_blocks[0].weight *= 4
        net.save_pretrained(folder / f"control-{i}")
    return pipe, nets, folder


def drawn(pipe: Any, control: Any, images: Any, **options: Any) -> np.ndarray[Any, Any]:
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    made = diffusers.StableDiffusionControlNetPipeline(
        **{**parts, "safety_checker": None}, controlnet=control, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    told = made(
        "a red circle",
        image=images,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **options,
    )
    return np.asarray(told.images[0])


OURS_OPTIONS: dict[str, Any] = {"steps": 8, "seeds": 7, "size": SIZE}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_control_draws_the_same_picture(whole: tuple[Any, list[Any], Path], guidance: float) -> None:
    pipe, nets, folder = whole
    theirs = drawn(pipe, nets[0], picture(0), guidance_scale=guidance, controlnet_conditioning_scale=0.7)
    pipeline = load(folder / "whole", "cpu")
    name = str(folder / "control-0")
    asked = {name: {"image": picture(0), "scale": 0.7}}
    white = Pillow.new("RGB", SIZE[::-1], "white")
    ours = pipeline.sample("a red circle", control=asked, guidance=guidance, **OURS_OPTIONS).images[0]
    assert np.abs(ours / 255 - theirs).max() < 1.01 / 255
    plain = pipeline.sample("a red circle", guidance=guidance, **OURS_OPTIONS).images[0]
    other = pipeline.sample("a red circle", control={name: white}, guidance=guidance, **OURS_OPTIONS).images[0]
    off = {name: {"image": picture(0), "scale": 0}}
    without = pipeline.sample("a red circle", control=off, guidance=guidance, **OURS_OPTIONS).images[0]
    assert np.abs(plain.astype(float) - ours).max() > 10 and np.abs(other.astype(float) - ours).max() > 3
    assert (without == plain).all()


def test_several_controls_within_intervals_draw_the_same_picture(whole: tuple[Any, list[Any], Path]) -> None:
    pipe, nets, folder = whole
    theirs = drawn(
        pipe,
        list(nets),
        [picture(0), picture(1)],
        guidance_scale=3.0,
        controlnet_conditioning_scale=[0.6, 0.8],
        control_guidance_start=[0.0, 0.5],
        control_guidance_end=[0.5, 1.0],
    )
    pipeline = load(folder / "whole", "cpu")
    path = pipeline.model.denoiser.path
    times = build(pipeline.settings().grid, "Grid")(path, 8)
    between = (times[3] + times[4]) / 2  # after half of the steps
    middle = float(path.sigma(between) / path.alpha(between))
    pipeline.controls = {"places": read_control(folder / "control-0")}
    asked = {
        "places": {"image": picture(0), "scale": 0.6, "interval": (middle, None)},
        str(folder / "control-1"): {"image": [picture(1)], "scale": 0.8, "interval": (0, middle)},
    }
    ours = pipeline.sample("a red circle", control=asked, guidance=3.0, **OURS_OPTIONS)
    assert np.abs(ours.images[0] / 255 - theirs).max() < 1.01 / 255
    said = ours.settings[0]["control"]
    assert [one["model"] for one in said] == ["places", str(folder / "control-1")]
    assert said[0]["image"].startswith("sha256:") and said[1]["interval"] == [0, middle]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def converted(source: Path, target: Path, to: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(target), "--to", to])
    assert left.value.code == 0
    return target


def test_a_folder_with_a_control_goes_there_and_back(whole: tuple[Any, list[Any], Path], tmp_path: Path) -> None:
    pipe, nets, _ = whole
    parts = {**pipe.components, "safety_checker": None}
    made = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=nets[0], requires_safety_checker=False)
    made.save_pretrained(tmp_path / "theirs")
    theirs = drawn(pipe, nets[0], picture(0), guidance_scale=3.0)
    ours = converted(tmp_path / "theirs", tmp_path / "a", "sfumato")
    back = converted(ours, tmp_path / "b", "diffusers")
    assert contents(converted(back, tmp_path / "c", "sfumato")) == contents(ours)
    assert contents(converted(tmp_path / "c", tmp_path / "d", "diffusers")) == contents(back)
    for folder in (tmp_path / "theirs", ours, back):
        asked = {"caption": "a red circle", "control": picture(0)}
        image = load(folder, "cpu").sample(asked, guidance=3.0, **OURS_OPTIONS).images[0]
        assert np.abs(image / 255 - theirs).max() < 1.01 / 255
        control = read_control(folder)  # of the model's folder its own control can be used with another model
        assert all(torch.equal(a, b) for a, b in zip(control.parameters(), ours_of(nets[0]).parameters(), strict=True))
    again = diffusers.ControlNetModel.from_pretrained(back / "controlnet")
    assert np.abs(drawn(pipe, again, picture(0), guidance_scale=3.0) - theirs).max() < 1e-4


def test_controls_are_read_from_files_of_both_layouts(tmp_path: Path) -> None:
    shape = StableUNetConfig(channels=(32, 64), blocks=1, depths=(1, 0), context_dim=6, heads=(8, 8))
    net = ControlNet(ControlNetConfig(shape, hint=(4, 6)))
    randomised(net)
    write_control(tmp_path / "folder", net, torch.float32)
    state = original(net)
    write_weights(tmp_path / "original.safetensors", {**state, "model.diffusion_model.out.0.weight": torch.ones(1)})
    write_weights(tmp_path / "bare.safetensors", {k.removeprefix("control_model."): v for k, v in state.items()})
    plain = renamed(net.state_dict(), lines(net.config), OURS, DIFFUSERS, "here")
    write_weights(tmp_path / "diffusers.safetensors", plain)
    for name in ("folder", "original.safetensors", "bare.safetensors", "diffusers.safetensors"):
        read = read_control(tmp_path / name)
        assert read.config.hint == (4, 6)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), net.parameters(), strict=True))


def test_what_is_no_control_is_named(whole: tuple[Any, list[Any], Path], tmp_path: Path) -> None:
    pipeline, name = load(whole[2] / "whole", "cpu"), str(whole[2] / "control-0")
    for path in (tmp_path, tmp_path / "none", whole[2] / "whole" / "unet"):
        with pytest.raises(CheckpointError):
            read_control(path)
    for wrong in ({"picture": 3}, {"image": None}, {"image": picture(0), "scale": "much"}, {"image": [picture(0)] * 2}):
        with pytest.raises(ConfigError):
            pipeline.sample("a red circle", control={name: wrong}, **OURS_OPTIONS)
    with pytest.raises(CheckpointError, match="no such control"):
        pipeline.sample("a red circle", control={"edges": picture(0)}, **OURS_OPTIONS)
    other = StableUNetConfig(channels=(8,), depths=(1,), heads=(2,), groups=4)
    with pytest.raises(ConfigError, match="another kind of model"):
        Controlled(StableUNet(other), [read_control(Path(name))])


def test_the_command_line_takes_controls(
    whole: tuple[Any, list[Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(tmp_path / "edges.png")
    words = ["sample", str(whole[2] / "whole"), "a red circle", "--steps", "2", "--size", "16x24", "--device", "cpu"]
    words += ["--out", str(tmp_path / "out"), "--json"]
    asked = f"{whole[2] / 'control-0'}:{tmp_path / 'edges.png'}"
    for given, scale in ((f"{asked}:0.5", 0.5), (asked, 1.0)):
        with pytest.raises(SystemExit) as left:
            main([*words, "--control", given])
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        control = json.loads(said.out)["pictures"][0]["control"]
        assert control[0]["scale"] == scale and control[0]["image"] == str(tmp_path / "edges.png")
    with pytest.raises(SystemExit) as left:
        main([*words, "--control", "edges.png"])
    assert left.value.code == 2 and "MODEL:PICTURE" in capsys.readouterr().err
