"""LoRA of FLUX and Stable Diffusion 3, whose originals fuse what diffusers keeps apart: against it, both ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.tuned import random_adapter, same
from tests.clip import randomised
from tests.parity import test_flux, test_pixart, test_sd3
from torch import Tensor

from sfumato.adapters.factors import Factors
from sfumato.adapters.lora import inject
from sfumato.adapters.moving import moved
from sfumato.adapters.parts import Part, net_part
from sfumato.adapters.reading import Adapter, read_adapter
from sfumato.adapters.writing import write_adapter
from sfumato.io.families import flux, pixart, sd3
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.nets.dit import DiT
from sfumato.nets.flux import PRESETS, Flux
from sfumato.nets.mmdit import MMDiT

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def small_flux() -> tuple[Any, Flux, Any]:
    peer = randomised(diffusers.FluxTransformer2DModel(**{**test_flux.SMALL, "guidance_embeds": True}))
    config = test_flux.shape_of(peer.state_dict())
    ours = Flux(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), flux.lines(config), DIFFUSERS, OURS, "here"))
    return peer, ours, test_flux.answers


def small_sd3() -> tuple[Any, MMDiT, Any]:
    kind = test_sd3.KINDS["sd3.5-medium"]
    peer = test_sd3.stirred(diffusers.SD3Transformer2DModel(**{**test_sd3.SMALL, **kind}))
    config = sd3.config_of(peer.state_dict(), DIFFUSERS, "here", size=8, head=8)
    ours = MMDiT(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), sd3.lines(config), DIFFUSERS, OURS, "here"))
    return peer, ours, test_sd3.answers


def small_pixart() -> tuple[Any, DiT, Any]:
    """Ours fuses keys and values, of which the others keep each apart, or all three together."""
    config = test_pixart.KINDS["sizes"]
    peer = test_pixart.peer_of(config)
    ours = DiT(config).eval()
    state = {key: value for key, value in peer.state_dict().items() if key != "pos_embed.pos_embed"}
    ours.load_state_dict(renamed(state, pixart.lines(config), DIFFUSERS, OURS, "here"))
    return peer, ours, test_pixart.answers


LOADED = {"flux": small_flux, "mmdit": small_sd3}  # diffusers has no loader for PixArt's
MADE = {**LOADED, "dit": small_pixart}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LOADED)
def test_what_we_write_has_the_same_effect_in_diffusers(kind: str, dora: bool, tmp_path: Path) -> None:
    """Every layer, of several ranks and alphas."""
    peer, ours, answers = MADE[kind]()
    part = net_part(ours, kind)
    adapter = random_adapter([part], dora=dora)
    peer.load_lora_adapter(tmp_path, weight_name=write_adapter(tmp_path / "x.safetensors", adapter, [part]).name)
    theirs, plain = answers(peer, ours)
    assert float((theirs - plain).abs().max()) > 0.05
    inject(ours, "ours", read_adapter(tmp_path / "x.safetensors", [part]).of("net"))
    for module in ours.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(["ours_dora" if dora else "ours"])
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


@pytest.mark.parametrize("kind", LOADED)
def test_what_diffusers_writes_has_the_same_effect_here(kind: str, tmp_path: Path) -> None:
    peer, ours, answers = MADE[kind]()
    peer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "add_v_proj", "proj_out", "linear"]))
    stir(peer)
    peer.save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path, [net_part(ours, kind)])
    assert {one.scale for one in adapter.changes.values()} == {1.5}
    inject(ours, "theirs", adapter.of("net"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def stir(peer: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.3)


def test_pefts_folders_of_pixart_both_ways(tmp_path: Path) -> None:
    """Keys and values are one layer here and two there; both with one A, and with an A for each."""
    peer, ours, answers = small_pixart()
    part = net_part(ours, "dit")
    adapter = random_adapter([part])
    write_adapter(tmp_path / "ours", adapter, [part], "peft")
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    before = answers(peer, ours)[1]
    inject(ours, "a", adapter.of("net"))
    told_, here = answers(theirs, ours)
    torch.testing.assert_close(here, told_, **CLOSE)
    assert float((here - before).abs().max()) > 0.05
    peer, ours, _ = small_pixart()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj"])
    theirs = peft.get_peft_model(peer, config)
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", [net_part(ours, "dit")])
    assert {one.rank for name, one in adapter.changes.items() if name.endswith("kv")} == {4}
    inject(ours, "a", adapter.of("net"))
    told_, here = answers(theirs.eval(), ours)
    torch.testing.assert_close(here, told_, **CLOSE)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_files_are_read_again_layer_by_layer(kind: str, dialect: str, dora: bool, tmp_path: Path) -> None:
    """Of parts that the original fuses, joined and taken apart, the ranks come back too."""
    _, ours, _ = MADE[kind]()
    part = net_part(ours, kind)
    adapter = random_adapter([part], dora=dora)
    file = write_adapter(tmp_path / ("x" if dialect == "peft" else "x.safetensors"), adapter, [part], dialect)
    again = read_adapter(file, [part])
    same(again, adapter)
    assert all(again.changes[name].rank == one.rank for name, one in adapter.changes.items())
    original = moved(adapter.of("net"), part, OURS, ORIGINAL, "here")
    assert len(original) < len(adapter.changes)


def test_a_change_of_queries_alone_goes_through_the_fused_layer(tmp_path: Path) -> None:
    _, ours, _ = small_flux()
    part = net_part(ours, "flux")
    adapter = random_adapter([part])
    some = Adapter({name: one for name, one in adapter.changes.items() if name.endswith((".q", ".v"))})
    same(read_adapter(write_adapter(tmp_path / "x.safetensors", some, [part], "kohya"), [part]), some)


# What is written of FLUX.1 by others: its real width, for their converters know no other


@pytest.fixture(scope="module")
def wide() -> Part:
    with torch.device("meta"):
        return net_part(Flux(replace(PRESETS["dev"], double=1, single=2)), "flux")


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each layer of a file of diffusers' adds to a vector."""
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            x = torch.linspace(-1, 1, down.shape[1])
            up = state[key.replace("lora_A", "lora_B")]
            found[key.removeprefix("transformer.").removesuffix(".lora_A.weight")] = up @ (down @ x)
    return found


def told(adapter: Adapter, part: Part) -> dict[str, Tensor]:
    changes = moved(adapter.of("net"), part, OURS, DIFFUSERS, "here")
    return {
        name: one.scale * one.up @ (one.down @ torch.linspace(-1, 1, one.down.shape[1]))
        for name, one in changes.items()
    }


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False], ids=["one A for all", "an A for each"])
def test_kohyas_flux_is_what_diffusers_makes_of_it(wide: Part, tmp_path: Path, fused: bool) -> None:
    adapter = random_adapter([wide], ranks=(2,), alphas=(3.0,))
    adapter = Adapter({name: one for name, one in adapter.changes.items() if "_blocks" in name})
    if fused:
        original = moved(adapter.of("net"), wide, OURS, ORIGINAL, "here")
        narrow = {name: Factors(one.down[:2], one.up[:, :2] + 0.1, 3.0) for name, one in original.items()}
        adapter = Adapter({f"net.{name}": one for name, one in moved(narrow, wide, ORIGINAL, OURS, "here").items()})
    file = write_adapter(tmp_path / "x.safetensors", adapter, [wide], "kohya")
    keys = load_file(file).keys()
    assert {"lora_unet_double_blocks_0_img_attn_qkv.alpha", "lora_unet_single_blocks_1_linear1.alpha"} <= keys
    state, _ = diffusers.FluxPipeline.lora_state_dict(tmp_path, weight_name=file.name, return_alphas=True)
    alike(products(state), told(adapter, wide))
    alike(told(read_adapter(file, [wide]), wide), told(adapter, wide))


def test_xlabs_flux_is_what_diffusers_makes_of_it(wide: Part, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(2)
    sizes = {f"double_blocks.0.processor.qkv_lora{i}": (9216, 3072) for i in (1, 2)}
    sizes |= {f"double_blocks.0.processor.proj_lora{i}": (3072, 3072) for i in (1, 2)}
    sizes |= {"single_blocks.1.processor.qkv_lora": (9216, 3072), "single_blocks.1.processor.proj_lora": (3072, 15360)}
    state = {}
    for name, (out, inside) in sizes.items():
        state[f"{name}.down.weight"] = torch.randn(2, inside, generator=rng) * 0.3
        state[f"{name}.up.weight"] = torch.randn(out, 2, generator=rng) * 0.3
    save_file(state, tmp_path / "x.safetensors")
    theirs, _ = diffusers.FluxPipeline.lora_state_dict(tmp_path, weight_name="x.safetensors", return_alphas=True)
    adapter = read_adapter(tmp_path / "x.safetensors", [wide])
    assert adapter.dialect == "XLabs"
    alike(products(theirs), told(adapter, wide))


def test_ai_toolkit_and_comfyui_of_flux(wide: Part, tmp_path: Path) -> None:
    """The former writes diffusers' names, the latter the original's with a prefix."""
    one, qkv = torch.randn(2, 3072), torch.randn(9216, 2)
    state = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": one,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": qkv[:3072],
    }
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors", [wide])
    assert set(found.changes) == {"net.double_blocks.0.image.heads.q"}
    start = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{start}.lora_A.weight": one, f"{start}.lora_B.weight": qkv}, tmp_path / "b.safetensors")
    changes = read_adapter(tmp_path / "b.safetensors", [wide]).changes
    assert set(changes) == {f"net.double_blocks.0.image.heads.{part}" for part in "qkv"}
    for rows, part in zip(qkv.chunk(3), "qkv", strict=True):
        assert torch.equal(changes[f"net.double_blocks.0.image.heads.{part}"].up, rows)
