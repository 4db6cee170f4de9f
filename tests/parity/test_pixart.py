"""PixArt-alpha and Sigma: diffusers' transformer and pipelines and the original names, every weight random."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import t5
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import save_model
from sfumato.io.families.pixart import config_of, lines
from sfumato.io.inspect import inspected
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.published import load_published, save_file, save_published
from sfumato.nets.dit import DiT, DiTConfig, positions, preset
from sfumato.nets.layers import sinusoid

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CONFIG = DiTConfig(
    size=8,
    dim=24,
    depth=2,
    heads=3,
    in_channels=4,
    out_channels=8,
    context_dim=32,
    text="cross",
    adaln="shared",
    span=8.0,
)
KINDS = {"plain": CONFIG, "sizes": replace(CONFIG, sizes=True, span=4.0)}


def peer_of(config: DiTConfig, seed: int = 1, size: int | None = None) -> Any:
    size = size or int(config.size)  # type: ignore[arg-type]
    made = diffusers.PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        cross_attention_dim=config.dim,
        sample_size=size,
        patch_size=config.patch,
        caption_channels=config.context_dim,
        interpolation_scale=size / config.patch / config.span,
        use_additional_conditions=config.sizes,
    )
    return randomised(made, seed)


def given(size: tuple[int, int]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    return {
        "x": torch.randn(2, 4, *size, generator=rng),
        "t": torch.tensor([981, 3]),
        "context": torch.randn(2, 7, 32, generator=rng),
        "context_mask": mask,
        "sizes": torch.tensor([[64.0, 96.0, 2 / 3], [50.0, 40.0, 1.25]]),
    }


def answers(peer: Any, ours: DiT, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    told = given(size)
    with torch.no_grad():
        want = peer(
            told["x"],
            encoder_hidden_states=told["context"],
            timestep=told["t"],
            added_cond_kwargs={"resolution": told["sizes"][:, :2], "aspect_ratio": told["sizes"][:, 2:]},
            encoder_attention_mask=told["context_mask"].long(),
        ).sample
        return want, ours(told.pop("x"), told.pop("t").float(), **told)


# The network


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_with_diffusers(kind: str) -> None:
    """At its own size and at others, over which positions span the same."""
    config, peer = KINDS[kind], peer_of(KINDS[kind])
    state = peer.state_dict()
    assert config_of(state, DIFFUSERS, "x", heads=3, size=8, span=config.span) == config
    ours = DiT(config).eval()
    ours.load_state_dict(renamed(state, lines(config), DIFFUSERS, OURS, "x"))
    for size in ((8, 8), (8, 12), (16, 4)):
        want, got = answers(peer, ours, size)
        torch.testing.assert_close(got, want, **CLOSE)
    randomised(ours, 2)
    peer.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "x"))
    want, got = answers(peer, ours)
    torch.testing.assert_close(want, got, **CLOSE)


@pytest.mark.parametrize(
    ("name", "size", "scale", "count"),
    [
        ("pixart-256", 32, 0.5, 610_856_096),
        ("pixart-512", 64, None, 610_856_096),
        ("pixart-1024", 128, None, 611_349_152),
        ("pixart-sigma", 128, 2, 610_856_096),
        ("pixart-sigma-2048", 256, 4, 610_856_096),
    ],
)
def test_names_shapes_and_counts_at_full_size(name: str, size: int, scale: float | None, count: int) -> None:
    config = preset(name)
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(
            sample_size=size,
            caption_channels=4096,
            interpolation_scale=scale,
            use_additional_conditions=config.sizes,
        )
        ours = DiT(config)
    state = renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "x")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
    assert config_of(state, DIFFUSERS, "x", size=size, span=config.span) == config
    made = diffusers.models.embeddings.PatchEmbed(
        height=size, width=size, patch_size=2, in_channels=4, embed_dim=24, interpolation_scale=size / 2 / config.span
    )
    small = replace(config, dim=24)
    torch.testing.assert_close(positions(small, (size // 2, size // 2)), made.pos_embed[0], rtol=0, atol=1e-5)


def reference(state: dict[str, Tensor], told: dict[str, Tensor], heads: int) -> Tensor:
    """The original's forward, from the papers' formulas and its names, with patches of 2."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def embedded(name: str, numbers: Tensor) -> Tensor:
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", sinusoid(numbers, 256))))

    def split(h: Tensor) -> Tensor:
        return h.unflatten(-1, (heads, -1)).transpose(1, 2)

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift

    x, words = told["x"], told["context"]
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    rows, columns = tokens.shape[-2:]
    tokens = tokens.flatten(2).mT + state["pos_embed"]
    time = embedded("t_embedder", told["t"].float())
    if "csize_embedder.mlp.0.weight" in state:
        sides = embedded("csize_embedder", told["sizes"][:, :2].flatten()).view(len(x), -1)
        time = time + torch.cat([sides, embedded("ar_embedder", told["sizes"][:, 2])], 1)
    six = linear("t_block.1", F.silu(time)).unflatten(1, (6, -1))
    words = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", words), approximate="tanh"))
    hidden = torch.zeros(told["context_mask"].shape).masked_fill(~told["context_mask"], -torch.inf)[:, None, None]
    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        name = f"blocks.{i}"
        own = (state[f"{name}.scale_shift_table"] + six).unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in own)
        q, k, v = (split(part) for part in linear(f"{name}.attn.qkv", modulated(tokens, shift1, scale1)).chunk(3, -1))
        seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", seen.transpose(1, 2).flatten(2))
        q = split(linear(f"{name}.cross_attn.q_linear", tokens))
        k, v = (split(part) for part in linear(f"{name}.cross_attn.kv_linear", words).chunk(2, -1))
        seen = (q @ k.mT / q.shape[-1] ** 0.5 + hidden).softmax(-1) @ v
        tokens = tokens + linear(f"{name}.cross_attn.proj", seen.transpose(1, 2).flatten(2))
        h = linear(f"{name}.mlp.fc1", modulated(tokens, shift2, scale2))
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", F.gelu(h, approximate="tanh"))
    shift, scale = (state["final_layer.scale_shift_table"] + time[:, None]).chunk(2, 1)
    out = linear("final_layer.linear", modulated(tokens, shift, scale)).unflatten(1, (rows, columns))
    out = torch.einsum("nhwpqc->nchpwq", out.unflatten(3, (2, 2, -1)))
    return out.reshape(len(x), -1, 2 * rows, 2 * columns)


def original_of(config: DiTConfig, seed: int = 4) -> dict[str, Tensor]:
    side = int(config.size) // config.patch  # type: ignore[arg-type]
    state = renamed(randomised(DiT(config), seed).state_dict(), lines(config), OURS, ORIGINAL, "x")
    return {**state, "pos_embed": positions(config, (side, side))[None]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_layout_is_its_formula(kind: str) -> None:
    config, peer = KINDS[kind], peer_of(KINDS[kind])
    state = peer.state_dict()
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "x")
    assert original["blocks.1.cross_attn.kv_linear.weight"].shape == (48, 24)
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "x")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    original["pos_embed"] = peer.pos_embed.pos_embed
    assert config_of(original, ORIGINAL, "x", heads=3) == config
    told = given((8, 8))
    ours = DiT(config).eval()
    ours.load_state_dict(renamed(state, lines(config), DIFFUSERS, OURS, "x"))
    want, _ = answers(peer, ours)
    with torch.no_grad():
        torch.testing.assert_close(reference(original, told, 3), want, **CLOSE)


# Whole pipelines


def folder_of(place: Path, kind: str) -> Any:
    """A pipeline of diffusers. Alpha's is told sizes where its network's `sample_size` is 128, and there alone."""
    words = t5.tokenizer(place / "made")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    transformer = peer_of(KINDS["sizes"], size=128) if kind == "alpha-1024" else peer_of(CONFIG)
    chosen = diffusers.PixArtSigmaPipeline if kind == "sigma" else diffusers.PixArtAlphaPipeline
    made = chosen(
        tokenizer=words, text_encoder=t5.encoder(), vae=randomised(vae, 3), transformer=transformer, scheduler=scheduler
    )
    made.save_pretrained(place / "whole")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=["alpha", "alpha-1024", "sigma"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    place = tmp_path_factory.mktemp(request.param)
    return folder_of(place, request.param), place / "whole", request.param


def drawn_by(pipe: Any, prompt: str, steps: int, guidance: float, seed: int, **more: Any) -> Tensor:
    told = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        height=16,
        width=16,
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
        **more,
    )
    return torch.from_numpy(told.images[0])


def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path, str]) -> None:
    """From the same prompts, steps and seed, guided or not, away from a negative prompt or from none."""
    pipe, folder, kind = whole
    ours = load(folder, "cpu")
    for guidance, negative in ((1.0, None), (4.5, None), (3.0, "blue square")):
        more = {} if negative is None else {"negative_prompt": negative}
        want = drawn_by(pipe, " A red Circle", 6, guidance, 7, **more)
        drawn = ours.sample(" A red Circle", steps=6, guidance=guidance, negative=negative, seeds=7, size=16)
        assert float((torch.from_numpy(drawn.images[0]) / 255 - want).abs().max()) < 1.01 / 255
    settings = ours.settings()
    assert settings.sampler == {"kind": "dpmpp_2m", "form": "midpoint"}
    assert settings.grid == {"kind": "linspace", "spare": True}
    assert (settings.steps, settings.guidance) == (20, 4.5) and ours.model.answers == ("x0", "x0_variance")
    length = ours.model.cond([{}])["context"].shape[1]
    assert length == (300 if kind == "sigma" else 120)


def test_sizes_are_told(tmp_path: Path) -> None:
    """That of the picture to draw, unless another is asked for."""
    folder_of(tmp_path, "alpha-1024")
    ours = load(tmp_path / "whole", "cpu")
    one, same, other = (
        ours.sample({"caption": "a red circle", **raw}, steps=3, seeds=7, size=16).images
        for raw in ({}, {"original_size": [16, 16]}, {"original_size": [900, 300]})
    )
    assert (one == same).all() and (one != other).any()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_there_and_back_gives_the_same_bytes_and_pictures(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    pipe, folder, _ = whole
    model = load_published(folder)
    save_model(tmp_path / "a", model, model.facts)
    save_published(tmp_path / "b", load(tmp_path / "a", "cpu").model)
    again = load_published(tmp_path / "b")
    save_model(tmp_path / "c", again, again.facts)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    save_published(tmp_path / "d", again)
    assert contents(tmp_path / "b") == contents(tmp_path / "d")
    theirs = type(pipe).from_pretrained(tmp_path / "b")
    theirs.set_progress_bar_config(disable=True)
    for part in ("transformer", "vae", "text_encoder"):
        before, after = (getattr(one, part).state_dict() for one in (pipe, theirs))
        assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    drawn = [drawn_by(one, "a blue square", 4, 3.0, 2) for one in (theirs, pipe)]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)


# Original single files

WIDE = replace(CONFIG, dim=192, heads=3, unsaid=120)


def test_an_original_file_is_a_model_and_comes_back(tmp_path: Path) -> None:
    config = replace(WIDE, sizes=True)
    folder_of(tmp_path, "alpha")
    state, file = original_of(config), tmp_path / "PixArt.pth"
    torch.save({"state_dict": state}, file)
    assert inspected(file)["family"] == "pixart"
    with pytest.raises(CheckpointError, match="--parts"):
        load(file, "cpu")
    pipeline = load(file, "cpu", parts=tmp_path / "whole")
    net = pipeline.model.net
    assert isinstance(net, DiT) and replace(net.config, size=8) == config
    told = given((8, 8))
    with torch.no_grad():
        want = reference(state, told, 3)
        rest = {name: value for name, value in told.items() if name not in ("x", "t")}
        torch.testing.assert_close(net(told["x"], told["t"].float(), **rest), want, **CLOSE)
    # What is not said is the caption of its own, all words of which count
    absent = pipeline.model.cond([{}])
    assert not absent["context_mask"].any()
    told = {"x": told["x"][:1], "t": told["t"][:1], "sizes": absent["sizes"]}
    told |= {"context": state["y_embedder.y_embedding"][None], "context_mask": torch.ones(1, 120, dtype=torch.bool)}
    with torch.no_grad():
        got = net(told["x"], told["t"].float(), **absent)
        torch.testing.assert_close(got, reference(state, told, 3), **CLOSE)
    assert pipeline.sample("a red circle", steps=2).images.shape == (1, 16, 16, 3)
    save_model(tmp_path / "ours", pipeline.model, pipeline.model.facts)
    save_file(tmp_path / "back.safetensors", load(tmp_path / "ours", "cpu").model)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())
    again = load_published(tmp_path / "back.safetensors", tmp_path / "whole")
    save_file(tmp_path / "again.safetensors", again)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "back.safetensors").read_bytes()


def test_a_file_of_sigma_reads_300_pieces(tmp_path: Path) -> None:
    """Its positions may be missing: they are those of 1024 pixels then."""
    folder_of(tmp_path, "sigma")
    state = original_of(replace(WIDE, unsaid=300))
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "Sigma.pth")
    model = load_published(tmp_path / "Sigma.pth", tmp_path / "whole")
    assert model.spec["model"]["conditioner"]["length"] == 300
    assert model.spec["model"]["net"]["size"] == 128 and model.spec["model"]["net"]["span"] == 32
    save_published(tmp_path / "theirs", model)
    assert json.loads((tmp_path / "theirs" / "model_index.json").read_text())["_class_name"] == "PixArtSigmaPipeline"


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "alpha")
    model = load_published(tmp_path / "whole")
    with pytest.raises(ConfigError, match="a caption for none"):
        save_file(tmp_path / "file.safetensors", model)
    model.conditioner.length = 77  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="120 or 300"):
        save_published(tmp_path / "folder", model)
    torch.save({**original_of(WIDE), "odd.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.weight"):
        load_published(tmp_path / "odd.pth", tmp_path / "whole")
