"""DiT and SiT: diffusers' transformer and pipeline and the original names, small and with every weight random."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.io.directory import save_model
from sfumato.io.families.dit import config_of, lines
from sfumato.io.inspect import inspected
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.published import load_published, save_file, save_published
from sfumato.nets.dit import DiT, DiTConfig, preset

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CONFIG = DiTConfig(
    size=8, patch=2, dim=24, depth=2, heads=3, mlp_ratio=4.0, in_channels=4, out_channels=8, classes=1000
)
COPIED = "norm1.emb."


def peer_of(config: DiTConfig, seed: int = 1) -> Any:
    """diffusers' transformer, random, with one embedding for all blocks, and as DiT has it.

    Its frequencies of time fall from 1 to 1/10000 over 127 intervals, DiT's over 128: a fault of diffusers, which its
    own PixArt has not. Published weights know DiT's, which are set here, as is the floor under its second norm.
    """
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.size,
        patch_size=config.patch,
        num_embeds_ada_norm=config.classes,
        norm_eps=1e-6,
    )
    randomised(made, seed)
    first = made.transformer_blocks[0].norm1.emb
    for block in made.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    return as_published(made)


def as_published(transformer: Any) -> Any:
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer


def once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if COPIED not in key or "blocks.0." in key}


def given(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, *size, generator=rng), torch.tensor([981, 3]), torch.tensor([7, 1000])


# The network


@pytest.mark.parametrize("out", [4, 8])
def test_both_ways_with_diffusers(out: int) -> None:
    config = replace(CONFIG, out_channels=out)
    peer = peer_of(config)
    state = once(peer.state_dict())
    assert config_of(state, DIFFUSERS, "x", heads=3, size=8) == config
    ours = DiT(config).eval()
    ours.load_state_dict(renamed(state, lines(config), DIFFUSERS, OURS, "x"))
    x, t, label = given()
    with torch.no_grad():
        want, got = peer(x, t, label).sample, ours(x, t.float(), label=label)
    torch.testing.assert_close(got, want, **CLOSE)

    randomised(ours, 2)
    there = renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "x")
    whole = {key: there[key if key in there else key.replace("blocks.1.", "blocks.0.")] for key in peer.state_dict()}
    peer.load_state_dict(whole)
    with torch.no_grad():
        torch.testing.assert_close(peer(x, t, label).sample, ours(x, t.float(), label=label), **CLOSE)


def test_diffusers_tells_the_time_otherwise_unless_it_is_set_right() -> None:
    """DiT's sinusoid by its formula: ours has it, diffusers' class as it comes has not."""
    from sfumato.nets.layers import sinusoid

    t = torch.tensor([981.0, 3.0])
    want = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    torch.testing.assert_close(sinusoid(t, 256), torch.cat([want.cos(), want.sin()], 1))
    embedding = peer_of(CONFIG).transformer_blocks[0].norm1.emb.time_proj
    torch.testing.assert_close(embedding(t), sinusoid(t, 256), rtol=1e-3, atol=1e-3)
    embedding.downscale_freq_shift = 1
    assert (embedding(t) - sinusoid(t, 256)).abs().max() > 0.5


def reference(state: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor, heads: int, patch: int) -> Tensor:
    """The original's forward, from the paper's formulas and its names; out channels first."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    rows, columns = tokens.shape[-2:]
    tokens = tokens.flatten(2).mT + state["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    told = F.silu(time + state["y_embedder.embedding_table.weight"][label])
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", told).chunk(6, 1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(tokens, shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        tokens = tokens + gate1[:, None] * linear(f"blocks.{i}.attn.proj", seen.transpose(1, 2).flatten(2))
        h = linear(f"blocks.{i}.mlp.fc1", modulated(tokens, shift2, scale2))
        tokens = tokens + gate2[:, None] * linear(f"blocks.{i}.mlp.fc2", F.gelu(h, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", told).chunk(2, 1)
    out = linear("final_layer.linear", modulated(tokens, shift, scale))
    out = out.unflatten(1, (rows, columns)).unflatten(3, (patch, patch, -1))
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, rows * patch, columns * patch)


def table_of(side: int, dim: int) -> Tensor:
    """DiT's positions: half of the channels for the column, half for the row, sines before cosines."""
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    return (
        torch.cat([one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)], -1).flatten(0, 1)[None].float()
    )


def test_the_original_layout_is_its_formula() -> None:
    """And a direct way leads from there to diffusers and back."""
    peer = peer_of(CONFIG)
    state = once(peer.state_dict())
    original = renamed(state, lines(CONFIG), DIFFUSERS, ORIGINAL, "x")
    assert original["blocks.1.attn.qkv.weight"].shape == (72, 24)
    assert original["x_embedder.proj.weight"].shape == (24, 4, 2, 2)
    assert config_of(original, ORIGINAL, "x", heads=3, size=8) == CONFIG
    back = renamed(original, lines(CONFIG), ORIGINAL, DIFFUSERS, "x")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    x, t, label = given()
    with torch.no_grad():
        got = reference({**original, "pos_embed": table_of(4, 24)}, x, t.float(), label, 3, 2)
        torch.testing.assert_close(got, peer(x, t, label).sample, **CLOSE)


def test_names_shapes_and_counts_at_full_size() -> None:
    """675.1 million parameters, 749.8 with diffusers' copies."""
    config = preset("XL/2", size=32, in_channels=4, out_channels=8, classes=1000)
    with torch.device("meta"):
        ours, theirs = DiT(config), diffusers.DiTTransformer2DModel(out_channels=8)
    state = renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "x")
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in once(theirs.state_dict()).items()
    }
    positions = 256 * 1152  # a frozen parameter of the original, computed here
    assert sum(p.numel() for p in ours.parameters()) + positions == 675_129_632
    original = renamed(ours.state_dict(), lines(config), OURS, ORIGINAL, "x")
    assert original["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert config_of(original, ORIGINAL, "x") == config


# Whole pipelines

NAMES = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "999": "toilet tissue"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("dit") / "whole"
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    made = diffusers.DiTPipeline(peer_of(CONFIG), randomised(vae, 3), scheduler, id2label=NAMES)
    made.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": NAMES}))
    made.set_progress_bar_config(disable=True)
    return made, folder


def drawn_by(pipe: Any, label: int, steps: int, guidance: float, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    told = pipe([label], num_inference_steps=steps, guidance_scale=guidance, generator=rng, output_type="np")
    return torch.from_numpy(told.images[0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path], guidance: float) -> None:
    """From the same class, steps and seed; the class by its number or by any of its names."""
    pipe, folder = whole
    want, ours = drawn_by(pipe, 1, 8, guidance, 7), load(folder, "cpu")
    drawn = ours.sample([1, "Carassius auratus"], steps=8, guidance=guidance, seeds=[7, 7])
    for image in drawn.images:
        assert float((torch.from_numpy(image) / 255 - want).abs().max()) < 1.01 / 255
    settings = ours.settings()
    assert settings.sampler == {"kind": "ddim"} and settings.grid == {"kind": "leading", "offset": 0}
    assert (settings.steps, settings.guidance) == (50, 4.0)
    with pytest.raises(DataError, match="goldfish"):
        ours.sample("goldfsh", steps=2)


def test_a_learned_variance_is_sampled(whole: tuple[Any, Path]) -> None:
    """DDPM with the variance that the network says, which diffusers' pipeline throws away: another picture."""
    ours = load(whole[1], "cpu")
    assert ours.model.answers == ("x0", "x0_variance")
    one, two = (
        ours.sample(1, steps=6, sampler={"kind": "ddpm", "variance": variance}, grid="linspace", seeds=3).images
        for variance in ("learned", "small")
    )
    assert (one != two).any()


def test_guiding_three_channels_leaves_the_fourth_alone(whole: tuple[Any, Path]) -> None:
    ours = load(whole[1], "cpu")
    slots: list[Any] = [1.0, {"kind": "cfg", "scale": 4.0}, {"kind": "cfg", "scale": 4.0, "channels": 3}]
    plain, all_, three = (next(ours.steps(1, steps=2, guidance=slot, seeds=3)).x0 for slot in slots)
    torch.testing.assert_close(three[:, :3], all_[:, :3])
    torch.testing.assert_close(three[:, 3:], plain[:, 3:])
    assert not torch.allclose(three[:, 3:], all_[:, 3:])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_there_and_back_gives_the_same_bytes_and_pictures(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """diffusers' folder, ours, the original file, and each again."""
    pipe, folder = whole
    model = load_published(folder)
    save_model(tmp_path / "a", model, model.facts)
    save_published(tmp_path / "b", load(tmp_path / "a", "cpu").model)
    again = load_published(tmp_path / "b")
    save_model(tmp_path / "c", again, again.facts)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    save_published(tmp_path / "d", again)
    assert contents(tmp_path / "b") == contents(tmp_path / "d")
    theirs = diffusers.DiTPipeline.from_pretrained(tmp_path / "b")
    theirs.set_progress_bar_config(disable=True)
    as_published(theirs.transformer)
    torch.testing.assert_close(drawn_by(theirs, 5, 4, 3.0, 2), drawn_by(pipe, 5, 4, 3.0, 2), rtol=1e-5, atol=1e-5)
    assert theirs.labels["Tinca tinca"] == 0 and theirs.labels["toilet tissue"] == 999


def test_embeddings_that_differ_between_blocks_are_named(whole: tuple[Any, Path], tmp_path: Path) -> None:
    peer = peer_of(CONFIG)
    with torch.no_grad():
        peer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    peer.save_pretrained(tmp_path / "transformer")
    for name in ("vae", "scheduler"):
        (tmp_path / name).symlink_to(whole[1] / name)
    (tmp_path / "model_index.json").write_bytes((whole[1] / "model_index.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"(?s)differ from the first's.*transformer_blocks\.1"):
        load(tmp_path, "cpu")


# Original single files


WIDE = replace(CONFIG, dim=128, heads=2)


def original_of(config: DiTConfig, seed: int = 4) -> dict[str, Tensor]:
    state = renamed(randomised(DiT(config), seed).state_dict(), lines(config), OURS, ORIGINAL, "x")
    return {**state, "pos_embed": table_of(4, config.dim)}


def test_an_original_file_is_a_model_and_comes_back(whole: tuple[Any, Path], tmp_path: Path) -> None:
    state, file = original_of(WIDE), tmp_path / "DiT.pt"
    torch.save(state, file)
    assert inspected(file)["family"] == "dit"
    with pytest.raises(CheckpointError, match="--parts"):
        load(file, "cpu")
    pipeline = load(file, "cpu", parts=whole[1])
    assert pipeline.model.answers == ("x0", "x0_variance")
    assert pipeline.settings().sampler == {"kind": "ddpm", "variance": "learned"}
    x, t, label = given()
    with torch.no_grad():
        want = reference(state, x, t.float(), label, 2, 2)
        torch.testing.assert_close(pipeline.model.net(x, t.float(), label=label), want, **CLOSE)
        path = pipeline.model.denoiser.path
        eps, share = want.chunk(2, 1)
        time = path.at(t)  # type: ignore[union-attr]
        alpha, sigma = (part.float()[:, None, None, None] for part in (path.alpha(time), path.sigma(time)))
        got = pipeline.model(x, time.float(), {"label": label}, to="x0_variance")
        torch.testing.assert_close(got[:, 4:], share, **CLOSE)
        torch.testing.assert_close(got[:, :4] * alpha, x - sigma * eps, **CLOSE)
    assert pipeline.sample("goldfish", steps=3).images.shape == (1, 16, 16, 3)
    save_model(tmp_path / "ours", pipeline.model, pipeline.model.facts)
    save_file(tmp_path / "back.safetensors", load(tmp_path / "ours", "cpu").model)
    back = load_published(tmp_path / "back.safetensors", whole[1])
    save_file(tmp_path / "again.safetensors", back)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "back.safetensors").read_bytes()
    from safetensors.torch import load_file

    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())


def test_a_file_of_sit_is_turned_round(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """There t = 1 is data and v = data - noise (Ma et al. 2024); x_t = t data + (1 - t) noise."""
    state, file = original_of(WIDE), tmp_path / "SiT.pt"
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name].unflatten(0, (4, 8))[:, 4:] = 0  # channels of a variance that was never learned
    torch.save(state, file)
    pipeline = load(file, "cpu", parts=whole[1])
    assert pipeline.model.answers == ("x0",) and pipeline.model.facts["pipeline"] == "SiT"
    x, _, label = given()
    theirs = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        velocity = reference(state, x, theirs, label, 2, 2)[:, :4]
        data = x + (1 - theirs[:, None, None, None]) * velocity
        torch.testing.assert_close(pipeline.model(x, 1 - theirs, {"label": label}), data, **CLOSE)
    # Euler's method from noise to data, and the same by ours
    rng = torch.Generator().manual_seed(9)
    z = torch.randn(1, 4, 8, 8, generator=rng)
    with torch.no_grad():
        for i in range(4):
            z = z + reference(state, z, torch.tensor([i / 4]), torch.tensor([5]), 2, 2)[:, :4] / 4
    steps = list(pipeline.steps(5, steps=4, sampler="euler", grid="linear", guidance=1.0, seeds=9))
    torch.testing.assert_close(steps[-1].x, z, rtol=1e-3, atol=1e-3)
    save_file(tmp_path / "back.safetensors", pipeline.model)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())
    with pytest.raises(ConfigError, match="no SiT"):
        save_published(tmp_path / "folder", pipeline.model)


def test_what_a_layout_cannot_say_is_refused(whole: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "DiT.pt"
    torch.save({**original_of(WIDE), "pos_embed": table_of(4, 128).flip(1)}, file)
    with pytest.raises(CheckpointError, match="positions"):
        load(file, "cpu", parts=whole[1])
    torch.save({**original_of(WIDE), "odd.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"odd\.weight"):
        load(file, "cpu", parts=whole[1])
    torch.save(original_of(replace(WIDE, classes=10)), file)
    few = load(file, "cpu", parts=whole[1]).model
    with pytest.raises(ConfigError, match="class 1000 for none"):
        save_published(tmp_path / "few", few)
