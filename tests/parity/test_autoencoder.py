"""The autoencoder of latent diffusion: diffusers' own, and the original layout, both ways, every weight random."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.catalogue import build
from sfumato.codecs import Latents
from sfumato.errors import CheckpointError
from sfumato.io.directory import load_autoencoder
from sfumato.io.families.autoencoder import config_of, lines, modern
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.io.published import save_file as save_model_file
from sfumato.io.published import save_published
from sfumato.nets.autoencoder import PRESETS, Autoencoder
from sfumato.overlay import load_config
from sfumato.train import train

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 0.7,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sd3": {"latent_channels": 6, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.3},
    "plain": {"mid_block_add_attention": False},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.2 if p.ndim > 1 else 0.5))
    return net.eval()


@pytest.fixture(scope="module", params=KINDS)
def peer(request: pytest.FixtureRequest) -> Any:
    return randomised(diffusers.AutoencoderKL(**{**SMALL, **KINDS[request.param]}))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def from_folder(folder: Path | str) -> Latents:
    slot, state = codec_from({"kind": "latents", "weights": str(folder)})
    codec = build(slot, "Codec")
    fill_codec(codec, state)
    assert isinstance(codec, Latents)
    return codec


@torch.no_grad()
def test_a_folder_of_diffusers_gives_its_latents_and_its_pictures(peer: Any, images: Tensor, tmp_path: Path) -> None:
    peer.save_pretrained(tmp_path / "vae")
    codec = from_folder(tmp_path)
    z = peer.encode(images).latent_dist
    scale, shift = peer.config.scaling_factor, peer.config.shift_factor or 0.0
    torch.testing.assert_close(codec.encode(images), (z.mode() - shift) * scale, **CLOSE)
    posterior = codec.autoencoder.encode(images)
    torch.testing.assert_close(posterior.logvar, z.logvar, **CLOSE)
    torch.testing.assert_close(posterior.kl(), z.kl(), **CLOSE)
    torch.testing.assert_close(codec.autoencoder.decode(z.mode()), peer.decode(z.mode()).sample, **CLOSE)
    assert codec.shape(32, 24) == tuple(codec.encode(images).shape[1:])


def test_what_we_write_loads_in_diffusers(peer: Any, images: Tensor) -> None:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", groups=4)
    ours = randomised(Autoencoder(config))
    state = renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here")
    fresh = diffusers.AutoencoderKL(**peer.config).eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(fresh.encode(images).latent_dist.mode(), ours.encode(images).mean, **CLOSE)
    back = renamed(state, lines(config), DIFFUSERS, OURS, "here")
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())


def test_the_original_layout_is_that_which_diffusers_converts(peer: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = peer.state_dict()
    config = config_of(state, DIFFUSERS, "here", groups=4)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    told = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{key}": value for key, value in original.items()}, peer.config
    )
    assert told.keys() == state.keys()
    assert all(torch.equal(told[key], value) for key, value in state.items())
    assert config_of(original, ORIGINAL, "here", groups=4) == config
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "here")
    assert all(torch.equal(back[key], value) for key, value in state.items())


@torch.no_grad()
def test_single_files_old_pickles_and_shards(images: Tensor, tmp_path: Path) -> None:
    peer = randomised(diffusers.AutoencoderKL(**{**SMALL, "norm_num_groups": 8}))
    config = config_of(peer.state_dict(), DIFFUSERS, "here", groups=8)
    original = renamed(peer.state_dict(), lines(config), DIFFUSERS, ORIGINAL, "here")
    whole = {f"first_stage_model.{key}": value for key, value in original.items()}
    whole["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)
    save_file(whole, tmp_path / "model.safetensors")
    torch.save({"state_dict": whole}, tmp_path / "model.ckpt")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    truth = peer.encode(images).latent_dist.mode()
    for name in ("model.safetensors", "model.ckpt", "shards"):
        slot, state = codec_from({"kind": "latents", "weights": str(tmp_path / name), "groups": 8, "scale": 1.0})
        codec = build(slot, "Codec")
        fill_codec(codec, state)
        torch.testing.assert_close(codec.encode(images), truth, **CLOSE)


def test_names_from_before_diffusers_0_17(peer: Any) -> None:
    state = {}
    for key, value in peer.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if ".attentions." in key and f".{new}." in key:
                key = key.replace(f".{new}.", f".{old}.")
                value = value[:, :, None, None] if value.ndim == 2 else value
        state[key] = value
    told = modern(state)
    assert told.keys() == peer.state_dict().keys()
    assert all(torch.equal(told[key], value) for key, value in peer.state_dict().items())


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_names_and_shapes_at_full_size(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        ours = Autoencoder(config)
        theirs = diffusers.AutoencoderKL(
            block_out_channels=config.channels,
            layers_per_block=config.blocks,
            latent_channels=config.latent,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=config.quant,
            use_post_quant_conv=config.quant,
        )
    state = renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == {"sd": 83_653_863, "flux": 83_819_683}[name]


def test_what_is_no_autoencoder_or_not_a_whole_one_is_named(tmp_path: Path) -> None:
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"something\.weight"):
        codec_from({"kind": "latents", "weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(CheckpointError, match="no such file"):
        codec_from({"kind": "latents", "weights": str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        codec_from({"kind": "latents", "weights": str(tmp_path / "empty")})
    (tmp_path / "code.ckpt").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(CheckpointError, match="never run"):
        codec_from({"kind": "latents", "weights": str(tmp_path / "code.ckpt")})
    state = diffusers.AutoencoderKL(**SMALL).state_dict()
    save_file({**state, "decoder.odd.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.odd\.weight"):
        codec_from({"kind": "latents", "weights": str(tmp_path / "more.safetensors")})
    less = {key: value for key, value in state.items() if "mid_block.resnets.1.conv2" not in key}
    save_file(less, tmp_path / "less.safetensors")
    slot, found = codec_from({"kind": "latents", "weights": str(tmp_path / "less.safetensors"), "groups": 4})
    with pytest.raises(CheckpointError, match=r"lacks weights[\s\S]*middle\.second\.conv2"):
        fill_codec(build(slot, "Codec"), found)
    state["encoder.conv_in.bias"] = state["encoder.conv_in.bias"] * float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    slot, found = codec_from({"kind": "latents", "weights": str(tmp_path / "nan.safetensors"), "groups": 4})
    with pytest.raises(CheckpointError, match=r"not finite[\s\S]*encoder\.entry\.bias"):
        fill_codec(build(slot, "Codec"), found)


def test_a_config_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    diffusers.AutoencoderKL(**SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="no mapping"):
        codec_from({"kind": "latents", "weights": str(tmp_path)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder that was trained here for three steps, whose groups and scale are not the usual ones."""
    codec = "model.codec={kind: latents, channels: [8, 16], latent: 3, blocks: 1, groups: 4}"
    changes = ("model.net=null", "model.conditioner=null", codec, "objective=autoencoder", "steps=3", "device=cpu")
    quiet = ("samples.every=0", "validate={every: 0, holdout: 0}", "data.count=40", "optim.clip=1.0")
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("tiny", [*changes, *quiet]).config, run=folder)
    return folder


@torch.no_grad()
def test_what_is_trained_here_is_diffusers_vae(trained: Path, images: Tensor, tmp_path: Path) -> None:
    model = load_autoencoder(trained / "model")
    assert model is not None
    save_published(tmp_path / "made", model)
    peer = diffusers.AutoencoderKL.from_pretrained(tmp_path / "made" / "vae").eval()
    z = peer.encode(images).latent_dist
    scaled = z.mode() * peer.config.scaling_factor
    torch.testing.assert_close(model.codec.encode(images), scaled, **CLOSE)
    torch.testing.assert_close(model.net.decode(z.mode()), peer.decode(z.mode()).sample, **CLOSE)  # type: ignore[operator]
    back = from_folder(tmp_path / "made")
    assert torch.equal(back.encode(images), model.codec.encode(images)) and torch.equal(back.scale, model.codec.scale)


@torch.no_grad()
def test_what_is_trained_here_is_an_original_file(trained: Path, images: Tensor, tmp_path: Path) -> None:
    model = load_autoencoder(trained / "model")
    assert model is not None
    save_model_file(tmp_path / "vae.safetensors", model)
    slot, state = codec_from({"kind": "latents", "weights": str(tmp_path / "vae.safetensors"), "groups": 4})
    codec = build(slot, "Codec")
    fill_codec(codec, state)
    torch.testing.assert_close(codec.autoencoder.encode(images).mean, model.net.encode(images).mean)  # type: ignore[operator]
