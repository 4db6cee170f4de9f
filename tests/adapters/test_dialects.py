"""Every dialect that one finds, on Stable Diffusion's names: what it says, and what is wrong with it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.tuned import random_adapter, same
from torch import Tensor

from sfumato.adapters import parts as parts_module
from sfumato.adapters.factors import Factors
from sfumato.adapters.parts import Architecture, Part, net_part, text_part
from sfumato.adapters.reading import Adapter, read_adapter, recognised
from sfumato.adapters.targets import DEFAULT, chosen
from sfumato.adapters.writing import write_adapter
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig

BLOCK = "down.0.transformer.blocks.0"
THERE = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = THERE.replace(".", "_")


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    """A U-Net of SD 1's kind, whose transformers are entered by convolutions elsewhere, and a text encoder."""
    config = StableUNetConfig(size=8, channels=(16, 32), depths=(1, 0), heads=(2, 4), groups=8, context_dim=12)
    text = {f"encoder.layers.0.{name}": (12, 12) for name in ("self_attn.q_proj", "self_attn.out_proj")}
    net = net_part(StableUNet(config), "stable_unet")
    return [net, text_part("conditioner.encoder", "text_encoder", None, {**text, "encoder.layers.0.mlp.fc1": (24, 12)})]


def factors(out: int, *inside: int, alpha: float | None = None) -> Factors:
    rng = torch.Generator().manual_seed(out)
    down, up = torch.randn(2, *inside, generator=rng), torch.randn(out, 2, generator=rng)
    return Factors(down, up, 2.0 if alpha is None else alpha)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Mapping[str, Tensor]], Path]:
    def save(state: Mapping[str, Tensor]) -> Path:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, tmp_path / "some.safetensors")
        return tmp_path / "some.safetensors"

    return save


Q, OUT, KEY = factors(16, 16), factors(16, 16), factors(16, 12)
DIALECTS: dict[str, tuple[dict[str, str], str]] = {
    "diffusers": ({"q": f"unet.{THERE}.attn1.to_q.lora_A.weight"}, "lora_B"),
    "with the adapter's name": ({"q": f"unet.{THERE}.attn1.to_q.lora_A.default.weight"}, "lora_B"),
    "without a prefix": ({"q": f"{THERE}.attn1.to_q.lora_A.weight"}, "lora_B"),
    "peft": ({"q": f"base_model.model.{THERE}.attn1.to_q.lora_A.weight"}, "lora_B"),
    "old": ({"q": f"unet.{THERE}.attn1.to_q.lora.down.weight"}, "lora.up"),
    "processors": (
        {
            "q": f"unet.{THERE}.attn1.processor.to_q_lora.down.weight",
            "out": f"unet.{THERE}.attn1.processor.to_out_lora.down.weight",
        },
        "_lora.up",
    ),
    "kohya": ({"q": f"lora_unet_{FLAT}_attn1_to_q.lora_down.weight"}, "lora_up"),
    "kohya by the original's": (
        {"q": "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight"},
        "lora_up",
    ),
    "ComfyUI": ({"q": "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight"}, "lora_B"),
    "OneTrainer": ({"q": f"lora_transformer_{FLAT}_attn1_to_q.lora_down.weight"}, "lora_up"),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_says_the_same(parts: list[Part], saved: Callable[..., Path], name: str) -> None:
    keys, up = DIALECTS[name]
    down = next(end for end in ("lora_A", "lora_down", "_lora.down", "lora.down") if end in keys["q"])
    state = {}
    for one, key in keys.items():
        value = {"q": Q, "out": OUT}[one]
        state |= {key: value.down, key.replace(down, up): value.up}
    adapter = read_adapter(saved(state), parts)
    wanted = {f"net.{BLOCK}.attention.{one}": {"q": Q, "out": OUT}[one] for one in keys}
    same(adapter, Adapter(wanted))
    assert all(one.alpha == one.rank for one in adapter.changes.values())  # nothing else is said


TEXT = {
    "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "kohya, first of several": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "of transformers 5": "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "old": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
    "processors": "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
    "ComfyUI": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "peft": "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders_in_each(parts: list[Part], saved: Callable[..., Path], name: str) -> None:
    one, key = factors(12, 12), TEXT[name]
    up = key.replace("lora_A", "lora_B").replace("down", "up")
    adapter = read_adapter(saved({key: one.down, up: one.up}), parts)
    same(adapter, Adapter({"conditioner.encoder.encoder.layers.0.self_attn.q_proj": one}))


def test_alpha_kernels_and_lengths_of_kohyas(parts: list[Part], saved: Callable[..., Path]) -> None:
    """A convolution of 3x3, one with the kernel between two of 1x1, and DoRA."""
    conv, inner = factors(16, 16, 3, 3, alpha=1.0), factors(16, 16)
    mid, length = torch.randn(2, 2, 3, 3), torch.rand(16) + 0.5
    start = "lora_unet_down_blocks_0_resnets_0_conv"
    state = {
        f"{start}1.lora_down.weight": conv.down,
        f"{start}1.lora_up.weight": conv.up[:, :, None, None],
        f"{start}1.alpha": torch.tensor(1.0),
        f"{start}1.dora_scale": length[:, None, None, None],
        f"{start}2.lora_down.weight": inner.down[:, :, None, None],
        f"{start}2.lora_mid.weight": mid,
        f"{start}2.lora_up.weight": inner.up[:, :, None, None],
    }
    found = read_adapter(saved(state), parts).changes
    one, two = found["net.down.0.residual.conv1"], found["net.down.0.residual.conv2"]
    torch.testing.assert_close(one.product(), conv.product())
    assert one.scale == 0.5 and one.magnitude is not None and torch.equal(one.magnitude, length)
    x = torch.randn(1, 16, 5, 5)
    step = torch.nn.functional.conv2d(x, inner.down[:, :, None, None])
    step = torch.nn.functional.conv2d(torch.nn.functional.conv2d(step, mid, padding=1), inner.up[:, :, None, None])
    torch.testing.assert_close(torch.nn.functional.conv2d(x, two.product(), padding=1), step, rtol=1e-4, atol=1e-4)
    state[f"{start}1.dora_scale"] = torch.ones(1, 16, 1, 1)
    with pytest.raises(CheckpointError, match="lengths are those of columns"):
        read_adapter(saved(state), parts)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_is_read_again(parts: list[Part], tmp_path: Path, dialect: str, dora: bool) -> None:
    adapter = random_adapter(parts, dora=dora)
    path = write_adapter(tmp_path / ("x" if dialect == "peft" else "x.safetensors"), adapter, parts, dialect)
    again = read_adapter(path, parts)
    same(again, adapter)
    assert all(again.changes[name].alpha == one.alpha for name, one in adapter.changes.items())
    assert again.dialect == dialect


def test_linear_layers_that_are_convolutions_elsewhere_are_written_so(parts: list[Part], tmp_path: Path) -> None:
    adapter = random_adapter(parts)
    state = load_file(write_adapter(tmp_path / "x.safetensors", adapter, parts))
    assert state["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].ndim == 4
    assert state["unet.down_blocks.0.attentions.0.proj_in.lora_B.weight"].shape[2:] == (1, 1)
    assert state[f"unet.{THERE}.attn1.to_q.lora_A.weight"].ndim == 2


def test_what_fits_nothing_is_named(parts: list[Part], saved: Callable[..., Path], tmp_path: Path) -> None:
    good = {f"unet.{THERE}.attn1.to_q.lora_A.weight": Q.down, f"unet.{THERE}.attn1.to_q.lora_B.weight": Q.up}

    def refused(state: dict[str, Tensor], *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            read_adapter(saved(state), parts)
        assert all(word in str(caught.value) for word in words), caught.value

    other = {"unet.here.to_q.lora_A.weight": Q.down, "unet.here.to_q.lora_B.weight": Q.up}
    refused(other, "another model", "no layer of it is known", "unet.here.to_q")
    refused({**good, **other}, "another model", "1 of 2 layers are not known", "unet.here.to_q")
    refused({**good, "unet.some.bias": Q.up}, "1 keys are none of an adapter", "unet.some.bias")
    refused({"unet.some.bias": Q.up}, "none of an adapter")
    refused({f"unet.{THERE}.attn1.to_q.lora_A.weight": Q.down}, "a half of an adapter's layer is missing", "no up")
    wide = {f"unet.{THERE}.attn2.to_k.lora_A.weight": Q.down, f"unet.{THERE}.attn2.to_k.lora_B.weight": Q.up}
    refused({**good, **wide}, "no place in this network", "attn2.to_k", "(16, 12)")
    mixed = {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.lora_A.weight": Q.down}
    mixed |= {key.replace("lora_A", "lora_B"): Q.up for key in mixed}
    refused({**good, **mixed}, "names of several layouts")
    with pytest.raises(CheckpointError, match="no such adapter"):
        read_adapter(tmp_path / "nothing", parts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter(tmp_path / "empty", parts)
    with pytest.raises(ConfigError, match=r"no such dialect[\s\S]*kohya"):
        write_adapter(tmp_path / "x", Adapter({}), parts, "kohia")


def test_names_flattened_are_those_of_one_layer(parts: list[Part]) -> None:
    """Underscores for dots lose nothing, in any layout of any published size."""
    published = [part for one in parts_module.architectures() for part in one.parts]
    for part in [*parts, *published]:
        for layout in part.layouts:
            names = [name for line in part.lines for name in line.names.get(layout, ())]
            assert len({name.replace(".", "_") for name in names}) == len(names)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_architecture_is_told_by_names_and_shapes(tmp_path: Path, name: str) -> None:
    """At full size: of the words' width, which is SD 1's, 2's or XL's alone."""
    made: Architecture = next(one for one in parts_module.architectures() if one.name == f"stable_unet {name}")
    net = made.parts[0]
    changes = {}
    for layer in [key for key in net.shapes if key.endswith("cross.k")][::9]:
        out, inside = net.shapes[layer]
        changes[f"net.{layer}"] = Factors(torch.ones(1, inside), torch.ones(out, 1), 1.0)
    for dialect in ("kohya", "diffusers"):
        file = write_adapter(tmp_path / f"{dialect}.safetensors", Adapter(changes), made.parts, dialect)
        found, architecture = recognised(file)
        same(found, Adapter(changes))
        assert architecture.name == f"stable_unet {name}"
    flat = "lora_unet_input_blocks_" if name == "sdxl" else "lora_unet_down_blocks_"
    assert any(key.startswith(flat) for key in load_file(tmp_path / "kohya.safetensors"))


def test_every_line_of_a_table_has_a_place_in_each_dialect(parts: list[Part]) -> None:
    net = parts[0]
    assert {one for line in net.lines for one in line.names[OURS]} == set(net.shapes)
    assert all({DIFFUSERS, ORIGINAL} <= line.names.keys() for line in net.lines)


def test_targets_are_groups_ends_of_names_and_patterns(parts: list[Part]) -> None:
    net = parts[0]
    usual = chosen(net, DEFAULT)
    assert {name.rpartition(".")[2] for name in usual} == {"q", "k", "v", "out", "gated", "last"}
    assert set(chosen(net, ["to_q"])) == {name for name in usual if name.endswith(".q")} == set(chosen(net, ["q"]))
    assert all(".cross." in name for name in chosen(net, ["*.attn2.to_*"]))
    assert set(chosen(net, ["linear", "conv"])) == set(net.shapes)
    assert all(len(net.shapes[name]) == 4 for name in chosen(net, ["conv"]))
    with pytest.raises(ConfigError, match=r"to_qu[\s\S]*to_q"):
        chosen(net, ["to_qu"])
