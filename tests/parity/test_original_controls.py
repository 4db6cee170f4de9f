"""Original single files of controls: Stability AI's of Stable Diffusion 3.5 Large, and XLabs' of FLUX.1.

The files are written here from diffusers' weights by what the publishers' own code reads
(Stability-AI/sd3.5: sd3_impls.py, sd3_infer.py, dit_embedder.py; XLabs-AI/x-flux: src/flux/controlnet.py).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_flux import pipeline_of as flux_pipeline
from test_sd3_pipeline import made as sd3_pipeline
from test_transformer_controls import FLUX, KINDS, SD3, answers, picture, same
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.cli import main
from sfumato.codecs import Latents
from sfumato.controls import controls_of
from sfumato.errors import CheckpointError, ConfigError
from sfumato.image_conditions import Hint
from sfumato.io.controls import is_control
from sfumato.io.families import transformer_controls
from sfumato.io.families.controlnet import hint_of, original, read_control, write_control
from sfumato.io.inspect import inspected
from sfumato.io.parts import write_json
from sfumato.io.pretrained import read_json
from sfumato.io.published import save_file as save_single
from sfumato.nets.control_flux import FluxControl, FluxControlConfig
from sfumato.nets.control_mmdit import MMDiTControl, MMDiTControlConfig
from sfumato.nets.flux import PRESETS as FLUX_PRESETS
from sfumato.nets.mmdit import PRESETS as MMDIT_PRESETS

diffusers = pytest.importorskip("diffusers")

LARGE = {
    **SD3,
    "joint_attention_dim": None,
    "use_pos_embed": False,
    "force_zeros_for_pooled_projection": False,
    "qk_norm": None,
}
ADDED = "add_q_proj add_k_proj add_v_proj to_add_out norm_added_q norm_added_k"
PIXELS = {**FLUX, "num_single_layers": 0, "num_layers": 2, "patch_size": 2, "conditioning_embedding_channels": 5}


def parts(state: dict[str, Tensor], head: str, names: str) -> Tensor:
    return torch.cat([state[f"{head}.{name}"] for name in names.split()])


def of_stability(state: dict[str, Tensor], kind: int) -> dict[str, Tensor]:
    """Their names of the embeddings are diffusers'; blocks are those of one stream of the MMDiT."""
    out = {key: value for key, value in state.items() if not key.startswith("transformer_blocks.")}
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for leaf in ("weight", "bias"):
            out[f"{block}.attn.qkv.{leaf}"] = parts(state, f"{block}.attn", f"to_q.{leaf} to_k.{leaf} to_v.{leaf}")
            for theirs, name in (
                ("attn.proj", "attn.to_out.0"),
                ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"),
                ("adaLN_modulation.1", "norm1.linear"),
            ):
                out[f"{block}.{theirs}.{leaf}"] = state[f"{block}.{name}.{leaf}"]
    return out | {"control_type": torch.tensor([kind], dtype=torch.int32)}


def of_xlabs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BFL's names of what is FLUX's; the convolutions stand in one list with activations between them."""
    whole = {"x_embedder": "img_in", "context_embedder": "txt_in", "controlnet_x_embedder": "pos_embed_input"}
    for theirs, name in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for i, layer in ((1, "in"), (2, "out")):
            whole[f"time_text_embed.{theirs}_embedder.linear_{i}"] = f"{name}_in.{layer}_layer"
    convs = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    whole |= {f"input_hint_block.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(convs)}
    whole |= {f"controlnet_blocks.{i}": f"controlnet_blocks.{i}" for i in range(2)}
    out = {f"{new}.{leaf}": state[f"{old}.{leaf}"] for old, new in whole.items() for leaf in ("weight", "bias")}
    for i in range(2):
        block, there = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, norm, feed, names in (
            ("img", "norm1", "ff", "to_q to_k to_v to_out.0 norm_q norm_k"),
            ("txt", "norm1_context", "ff_context", ADDED),
        ):
            q, k, v, back, norm_q, norm_k = names.split()
            for leaf in ("weight", "bias"):
                qkv = parts(state, f"{block}.attn", f"{q}.{leaf} {k}.{leaf} {v}.{leaf}")
                out[f"{there}.{stream}_attn.qkv.{leaf}"] = qkv
                out[f"{there}.{stream}_attn.proj.{leaf}"] = state[f"{block}.attn.{back}.{leaf}"]
                out[f"{there}.{stream}_mod.lin.{leaf}"] = state[f"{block}.{norm}.linear.{leaf}"]
                out[f"{there}.{stream}_mlp.0.{leaf}"] = state[f"{block}.{feed}.net.0.proj.{leaf}"]
                out[f"{there}.{stream}_mlp.2.{leaf}"] = state[f"{block}.{feed}.net.2.{leaf}"]
            out[f"{there}.{stream}_attn.norm.query_norm.scale"] = state[f"{block}.attn.{norm_q}.weight"]
            out[f"{there}.{stream}_attn.norm.key_norm.scale"] = state[f"{block}.attn.{norm_k}.weight"]
    return out


def their(name: str) -> Any:
    if name == "stability":
        return randomised(diffusers.SD3ControlNetModel(**LARGE), 1).eval()
    made = diffusers.FluxControlNetModel(**PIXELS)
    hint = diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding(5, block_out_channels=(16,) * 4)
    made.input_hint_block = hint  # XLabs' widths, which diffusers' own config has no word for
    return randomised(made, 1).eval()


@pytest.fixture(params=["stability", "xlabs"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(name: str, theirs: Any, place: Path, kind: int = 0) -> Path:
    state = theirs.state_dict()
    file = place / f"{name}.safetensors"
    contents = of_stability(state, kind) if name == "stability" else of_xlabs(state)
    save_file({key: value.clone() for key, value in contents.items()}, file)
    return file


@pytest.fixture(autouse=True)
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published heads are 64 wide and turn by their own axes, which no weight tells."""
    monkeypatch.setattr(transformer_controls.sd3, "HEAD", SD3["attention_head_dim"])


def test_a_file_answers_as_diffusers_does(name: str, tmp_path: Path) -> None:
    theirs = their(name)
    ours = read_control(written(name, theirs, tmp_path))
    assert isinstance(ours, MMDiTControl if name == "stability" else FluxControl)
    if isinstance(ours, FluxControl):  # of a size that was never published
        ours = with_axes(ours)
    same(*answers("sd3.5 large" if name == "stability" else "flux pixels", theirs, ours))


def with_axes(ours: FluxControl) -> FluxControl:
    made = FluxControl(replace(ours.config, net=replace(ours.config.net, axes=(4, 8, 8)))).eval()
    made.load_state_dict(ours.state_dict())
    return made


def test_there_and_back(name: str, tmp_path: Path) -> None:
    file = written(name, their(name), tmp_path, kind=1)
    ours = read_control(file)
    state, again = load_file(file), original(ours)
    assert again.keys() == state.keys() and all(torch.equal(again[key], value) for key, value in state.items())
    write_control(tmp_path / "folder", ours, torch.float32)
    back = read_control(tmp_path / "folder")
    assert back.config == ours.config or name == "xlabs"  # a folder says its axes, which are the same here
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in back.state_dict().items())
    said = inspected(file)
    assert said["kind"] == "ControlNet" and said["family"] is None and said["parts"].keys() == {"control"}


def test_what_the_file_has_and_its_own_code_leaves_alone(tmp_path: Path) -> None:
    theirs = their("stability")
    unused = {"pos_embed.proj.weight": torch.randn(24, 4, 2, 2), "pos_embed.proj.bias": torch.randn(24)}
    state = of_stability(theirs.state_dict(), 0) | unused
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "blur.safetensors")
    ours = read_control(tmp_path / "blur.safetensors")
    assert isinstance(ours, MMDiTControl) and ours.config.shares and not ours.config.stretched
    same(*answers("sd3.5 large", theirs, ours))


def test_the_control_for_edges_stretches_its_picture(tmp_path: Path) -> None:
    """As sd3_infer.py does: 255 / 2 of the picture, and a half more."""
    theirs = their("stability")
    plain = read_control(written("stability", theirs, tmp_path, kind=2))
    edges = read_control(written("stability", theirs, tmp_path, kind=1))
    assert isinstance(edges, MMDiTControl) and edges.config.stretched
    codec = Latents(latent=4, channels=(8, 16), blocks=1, groups=4, scale=1.5, shift=0.06)
    randomised(codec, 3)
    (control,) = controls_of({"edges": picture()}, 1, (16, 24))
    pixels = torch.from_numpy(control.images).permute(0, 3, 1, 2).float() / 255
    cpu = torch.device("cpu")
    with torch.no_grad():
        torch.testing.assert_close(control.hint(edges, cpu, codec), codec.encode(pixels * 255 * 0.5 + 0.5))
        torch.testing.assert_close(control.hint(plain, cpu, codec), codec.encode(2 * pixels - 1))
    slot = hint_of(edges.config)
    reading = Hint(field="control", through=slot["through"])
    reading.of_codec(codec)
    with torch.no_grad():
        told = reading([{"control": np.asarray(picture())}])["hint"]
    torch.testing.assert_close(told, control.hint(edges, cpu, codec))


def test_published_sizes() -> None:
    """The keys and shapes that the publishers' modules have, at full width."""
    large = replace(MMDIT_PRESETS["sd3.5-large"], depth=19, context_dim=0, qk_norm=False, dual=())
    with torch.device("meta"):
        ours = MMDiTControl(MMDiTControlConfig(large, shares=True))
    state = original(ours)
    assert state["transformer_blocks.18.attn.qkv.weight"].shape == (3 * 2432, 2432)
    assert state["time_text_embed.text_embedder.linear_1.weight"].shape == (2432, 2048)
    assert state["pos_embed_input.proj.weight"].shape == (2432, 16, 2, 2)
    assert len(state) == 19 * (10 + 2) + 8 + 2 + 1
    shape = replace(FLUX_PRESETS["dev"], double=2, single=0)
    with torch.device("meta"):
        xlabs = original(FluxControl(FluxControlConfig(shape, hint=(16,) * 4)))
    assert xlabs["pos_embed_input.weight"].shape == (3072, 64) and xlabs["img_in.weight"].shape == (3072, 64)
    assert xlabs["input_hint_block.14.weight"].shape == (16, 16, 3, 3)
    assert len(xlabs) == 2 * (2 * (10 + 2) + 2) + 2 * (3 + 6 + 8)


def converted(source: Path, target: Path, to: str, *more: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(target), "--to", to, *more])
    assert left.value.code == 0
    return target


def same_files(one: Path, other: Path) -> None:
    names = [sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file()) for place in (one, other)]
    assert names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def file_of(kind: str, place: Path) -> Path:
    """A publisher's file of a control; of a U-Net's with 8 heads and groups of 32, which such a file does not tell."""
    if kind in ("stability", "xlabs"):
        return written(kind, their(kind), place, kind=1)
    words = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    told = {"block_out_channels": (32, 64), "cross_attention_dim": 12, "layers_per_block": 1, "attention_head_dim": 8}
    if kind == "xl":  # whose heads are 64 wide
        words = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        told |= {"block_out_channels": (64, 128), "attention_head_dim": [1, 2], "transformer_layers_per_block": (1, 2)}
        told |= {"use_linear_projection": True, "addition_embed_type": "text_time"}
        told |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 10 + 6 * 256}
    control = diffusers.ControlNetModel(**words, **told, conditioning_embedding_out_channels=(4, 6, 10, 14))
    randomised(control, 1).save_pretrained(place / "theirs")
    file = place / f"{kind}.safetensors"
    save_file(original(read_control(place / "theirs")), file)
    return file


@pytest.mark.parametrize("kind", ["stability", "xlabs", "sd", "xl"])
def test_the_command_writes_each_layout_and_goes_back(kind: str, tmp_path: Path) -> None:
    """From the publisher's file the same bytes in the end, and diffusers' own modules from its folder."""
    file = file_of(kind, tmp_path)
    state = read_control(file).state_dict()
    ours = converted(file, tmp_path / "ours", "sfumato")
    folder = converted(ours, tmp_path / "folder", "diffusers")
    again = converted(folder, tmp_path / "again.safetensors", "single-file")
    there, back = load_file(file), load_file(again)
    assert there.keys() == back.keys() and all(torch.equal(back[key], value) for key, value in there.items())
    same_files(converted(folder, tmp_path / "a", "sfumato"), ours)
    same_files(converted(file, tmp_path / "b", "diffusers"), folder)
    assert converted(ours, tmp_path / "c.safetensors", "single-file").read_bytes() == again.read_bytes()
    for place in (ours, folder, again):
        control = read_control(place)
        assert all(torch.equal(value, state[key]) for key, value in control.state_dict().items())
    config = read_json(folder / "config.json")
    made = getattr(diffusers, config["_class_name"])
    if kind != "xlabs":  # whose widths of the picture's convolutions diffusers' config has no word for
        expected = made.from_pretrained(folder).state_dict()
        assert expected.keys() == load_file(folder / "diffusion_pytorch_model.safetensors").keys()
    said = inspected(ours)
    assert said["kind"] == "ControlNet" and said["parts"]["control"]["parameters"] == sum(
        v.numel() for v in state.values()
    )
    half = converted(ours, tmp_path / "half.safetensors", "single-file", "--dtype", "fp16")
    kinds = {value.dtype for value in load_file(half).values()}
    assert kinds == {torch.float16} | ({torch.int32} if kind == "stability" else set())


def test_a_control_of_ours_guides_as_its_file(tmp_path: Path) -> None:
    theirs = their("stability")
    ours = converted(written("stability", theirs, tmp_path), tmp_path / "ours", "sfumato")
    same(*answers("sd3.5 large", theirs, read_control(ours)))
    with pytest.raises(CheckpointError, match="which draws nothing alone"):
        load(ours, "cpu")
    weights = ours / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(CheckpointError):
        read_control(ours)


def test_the_model_around_a_control_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of("sd", tmp_path)
    extra = {"model.diffusion_model.out.2.weight": torch.ones(4, 4), "cond_stage_model.a": torch.ones(2)}
    save_file(load_file(file) | extra, tmp_path / "whole.safetensors")
    capsys.readouterr()
    back = converted(tmp_path / "whole.safetensors", tmp_path / "alone.safetensors", "single-file", "--json")
    assert json.loads(capsys.readouterr().out)["left_out"].startswith("2 weights that no control reads (cond_stage_")
    assert load_file(back).keys() == load_file(file).keys()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("flux", {}, "only of those of FLUX.1 that read pixels"),
        ("flux union", {}, "of 7 kinds of pictures, that reads latents"),
        ("sd3", {}, "only of Stable Diffusion 3.5 Large's"),
        ("sd3.5 large", {"force_zeros_for_pooled_projection": True, "qk_norm": None}, "unpooled True"),
        ("unet", {"attention_head_dim": 4}, "heads (4, 4)"),
        ("unet", {"norm_num_groups": 16}, "groups 16"),
        ("unet", {"controlnet_conditioning_channel_order": "bgr"}, "bgr True"),
    ],
)
def test_controls_that_no_file_can_hold_are_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options = KINDS.get(kind) or (
        "ControlNetModel",
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 12,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "attention_head_dim": 8,
        },
    )
    randomised(getattr(diffusers, name)(**{**options, **changes}), 1).save_pretrained(tmp_path / "theirs")
    with pytest.raises(SystemExit) as left:
        main(["convert", str(tmp_path / "theirs"), str(tmp_path / "file.safetensors"), "--to", "single-file"])
    told = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and said in told and "--to diffusers" in told
    assert not (tmp_path / "file.safetensors").exists()
    ours = converted(tmp_path / "theirs", tmp_path / "ours", "sfumato")
    same_files(converted(converted(ours, tmp_path / "a", "diffusers"), tmp_path / "b", "sfumato"), ours)


def test_a_kind_of_control_that_is_not_known_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "odd" / "config.json", {"_class_name": "ControlNetUnionModel"})
    with pytest.raises(CheckpointError, match="a control of a kind that is not known"):
        is_control(tmp_path / "odd")


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_model_under_control_goes_into_no_single_file(family: str, tmp_path: Path) -> None:
    """In which its control would be lost."""
    pipe = sd3_pipeline(tmp_path, True) if family == "sd3" else flux_pipeline(tmp_path, "dev")
    kind = "StableDiffusion3ControlNetPipeline" if family == "sd3" else "FluxControlNetPipeline"
    name, options = KINDS["sd3 without norms" if family == "sd3" else "flux"]
    control = randomised(getattr(diffusers, name)(**options), 1)
    getattr(diffusers, kind)(**pipe.components, controlnet=control).save_pretrained(tmp_path / "controlled")
    with pytest.raises(ConfigError, match="a single file holds no control"):
        save_single(tmp_path / "file.safetensors", load(tmp_path / "controlled", "cpu").model)
    assert not is_control(tmp_path / "controlled") and is_control(tmp_path / "controlled" / "controlnet")


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    theirs = randomised(diffusers.SD3ControlNetModel(**{**LARGE, "pooled_projection_dim": 24}), 1)
    with pytest.raises(CheckpointError, match=r"only controls of Stable Diffusion 3\.5 Large"):
        read_control(written("stability", theirs, tmp_path))
    kind, options = KINDS["flux"]
    randomised(getattr(diffusers, kind)(**options), 1).save_pretrained(tmp_path / "union")
    with pytest.raises(ConfigError, match="no publisher has files"):
        original(read_control(tmp_path / "union"))
    file = written("xlabs", their("xlabs"), tmp_path)
    state = load_file(file)
    del state["pos_embed_input.bias"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"hint\.bias"):
        read_control(file)
