"""DDPM, ADM and consistency models: diffusers' networks and pipelines, small and with every weight random, both ways;
the original layout by a network written from its description.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.cli import main
from sfumato.conditioners import Labels
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.io.directory import load_model
from sfumato.io.families import ddpm
from sfumato.io.families.autoencoder import modern
from sfumato.io.families.pixel_unet import Heads, Original, is_of_two_axes, lines, seen_in
from sfumato.io.inspect import inspected
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.published import load_published, save_file, save_published
from sfumato.model import Model, build_model
from sfumato.nets.pixel_unet import PRESETS, PixelUNet, PixelUNetConfig, preset
from sfumato.pipeline import Pipeline

diffusers = pytest.importorskip("diffusers")

ORDERS = [Original(1), Original(1, True), Original(2)]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESAMPLES: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 4,
}
GOOGLE: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SCALED: dict[str, Any] = {**RESAMPLES, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}
KINDS: dict[str, dict[str, Any]] = {
    "ddpm": GOOGLE,
    "plain": {"attention_head_dim": 8, "layers_per_block": 1},
    "adm": {**SCALED, "out_channels": 6, "num_class_embeds": 7},
    "consistency-64": {**SCALED, "num_class_embeds": 7},
    "consistency-256": RESAMPLES,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return unet(kind)


def unet(kind: str, seed: int = 1) -> Any:
    return randomised(diffusers.UNet2DModel(**{**SMALL, **KINDS[kind]}), seed)


def config_of(peer: Any, kind: str) -> PixelUNetConfig:
    said = peer.config
    return seen_in(peer.state_dict(), DIFFUSERS, "here").config(
        Heads(channels=said.attention_head_dim or 0),
        size=16,
        groups=4,
        eps=said.norm_eps,
        pad_after=kind == "ddpm",
        sines_first=kind == "ddpm",
        include_end=kind == "ddpm",
    )


def answers(peer: Any, ours: PixelUNet) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 3, 16, 20, generator=rng), torch.tensor([981.0, 3.0])
    label = torch.tensor([6, 2]) if ours.config.classes else None
    with torch.no_grad():
        return peer(x, t, class_labels=label).sample, ours(x, t, label=label)


# The network


def test_the_network_of_diffusers_answers_the_same_here(peer: Any, kind: str) -> None:
    config = config_of(peer, kind)
    ours = PixelUNet(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any, kind: str) -> None:
    config = config_of(peer, kind)
    ours = PixelUNet(config)
    randomised(ours, 2)
    fresh = diffusers.UNet2DModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours)
    torch.testing.assert_close(theirs, here, **CLOSE)


@pytest.mark.parametrize("kept", ORDERS, ids=["early", "by head", "two axes"])
def test_the_original_layout_holds_the_same_weights(peer: Any, kind: str, kept: Original) -> None:
    state, config = peer.state_dict(), config_of(peer, kind)
    original = renamed(state, lines(config, kept), DIFFUSERS, ORIGINAL, "here")
    seen = seen_in(original, ORIGINAL, "here")
    assert seen.axes == kept.axes
    known = {
        name: getattr(config, name) for name in ("size", "groups", "eps", "pad_after", "sines_first", "include_end")
    }
    heads = Heads(channels=peer.config.attention_head_dim or 0)
    assert seen.config(heads, **known) == config
    back = renamed(original, lines(config, kept), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


GOOGLE_256 = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
GOOGLE_32 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
OPENAI: dict[str, Any] = {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 64}
DOWN, UP, LOW, HIGH = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
IMAGENET_64 = {
    **OPENAI,
    "sample_size": 64,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": (DOWN, LOW, LOW, LOW),
    "up_block_types": (HIGH, HIGH, HIGH, UP),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}
LSUN = {
    **OPENAI,
    "sample_size": 256,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": (DOWN, DOWN, DOWN, LOW, LOW, LOW),
    "up_block_types": (HIGH, HIGH, HIGH, UP, UP, UP),
}
ADM_256 = {**LSUN, "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "ddpm-32": ({**GOOGLE, **GOOGLE_32}, 35_746_307),
    "ddpm-256": ({**GOOGLE, **GOOGLE_256}, 113_673_219),
    "adm-64": ({**IMAGENET_64, "out_channels": 6}, 295_904_454),
    "adm-256": ({**ADM_256, "num_class_embeds": 1000}, 553_838_086),
    "adm-256-unconditional": (ADM_256, 552_814_086),
    "consistency-64": (IMAGENET_64, 295_899_267),
    "consistency-256": (LSUN, 526_304_771),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_at_full_size(name: str) -> None:
    options, count = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = PixelUNet(PRESETS[name]), diffusers.UNet2DModel(**options)
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == count


# The original layout, by a network written from its description, which reads nothing but the names in a file


def attended_as_adm(qkv: Tensor, heads: int, by_head: bool) -> Tensor:
    """Attention of rows (B, 3 C, L), one head at a time: which rows are which is all that the two orders differ in."""
    width = qkv.shape[1] // 3
    each = width // heads
    out = []
    for head in range(heads):
        if by_head:  # the rows of a head stand together: its queries, its keys, its values
            q, k, v = (qkv[:, (3 * head + i) * each : (3 * head + i + 1) * each] for i in range(3))
        else:  # all queries, all keys, all values
            q, k, v = (qkv[:, i * width + head * each : i * width + (head + 1) * each] for i in range(3))
        weights = torch.softmax(q.mT @ k / math.sqrt(each), -1)
        out.append(v @ weights.mT)
    return torch.cat(out, 1)


class ByHand:
    """A network of an original file: 2 residual blocks a level, 4 groups a norm, 4 channels a head."""

    def __init__(self, state: dict[str, Tensor], by_head: bool) -> None:
        self.state, self.by_head = state, by_head
        self.summary = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        half = self.state["time_embed.0.weight"].shape[1] // 2
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.summary = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
        self.summary = self.linear("time_embed.2", F.silu(self.summary))
        if label is not None:
            self.summary = self.summary + self.state["label_emb.weight"][label]
        kept, h, n = [], x, 0
        while self.has(f"input_blocks.{n}.0"):
            alone = n > 0 and n % 3 == 0
            h = self.entry(f"input_blocks.{n}", h, "down" if alone else None)
            kept.append(h)
            n += 1
        h, n = self.entry("middle_block", h, None), 0
        while self.has(f"output_blocks.{n}.0"):
            h = self.entry(f"output_blocks.{n}", torch.cat([h, kept.pop()], 1), "up")
            n += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), 1)

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.state)

    def entry(self, name: str, h: Tensor, way: str | None) -> Tensor:
        """The layers of a step, by what each of them is made of. On the way up, only the last may change the size."""
        i = 0
        while self.has(f"{name}.{i}"):
            layer = f"{name}.{i}"
            if f"{layer}.in_layers.0.weight" in self.state:
                h = self.residual(layer, h, way if way == "down" or i > 0 else None)
            elif f"{layer}.qkv.weight" in self.state:
                h = self.attention(layer, h)
            elif f"{layer}.op.weight" in self.state:
                h = self.conv(f"{layer}.op", h, 1, stride=2)
            elif f"{layer}.conv.weight" in self.state:
                h = self.conv(f"{layer}.conv", doubled(h), 1)
            else:
                h = self.conv(layer, h, 1)
            i += 1
            way = None if name == "middle_block" else way
        return h

    def residual(self, name: str, x: Tensor, way: str | None) -> Tensor:
        change = {None: lambda y: y, "down": lambda y: F.avg_pool2d(y, 2), "up": doubled}[way]
        h = self.conv(f"{name}.in_layers.2", change(F.silu(self.norm(f"{name}.in_layers.0", x))), 1)
        told = self.linear(f"{name}.emb_layers.1", F.silu(self.summary))[:, :, None, None]
        if told.shape[1] == 2 * h.shape[1]:
            scale, shift = told.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), 1)
        x = change(x)
        return h + (self.conv(f"{name}.skip_connection", x, 0) if self.has(f"{name}.skip_connection") else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        def product(part: str, h: Tensor) -> Tensor:
            return self.state[f"{name}.{part}.weight"].flatten(1) @ h + self.state[f"{name}.{part}.bias"][:, None]

        qkv = product("qkv", self.norm(f"{name}.norm", x).flatten(2))
        h = product("proj_out", attended_as_adm(qkv, x.shape[1] // 4, self.by_head))
        return x + h.unflatten(2, x.shape[2:])

    def linear(self, name: str, h: Tensor) -> Tensor:
        return F.linear(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name: str, h: Tensor, padding: int, stride: int = 1) -> Tensor:
        return F.conv2d(h, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=padding, stride=stride)

    def norm(self, name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 4, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)


def doubled(h: Tensor) -> Tensor:
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("kept", ORDERS, ids=["early", "by head", "two axes"])
@pytest.mark.parametrize("resample", ["block", "convolution"])
@pytest.mark.parametrize("modulation", ["scale", "add"])
def test_an_original_file_is_the_network_of_its_names(kept: Original, resample: Any, modulation: Any) -> None:
    config = replace(config_of(unet("adm"), "adm"), resample=resample, modulation=modulation)
    net = PixelUNet(config).eval()
    randomised(net, 3)
    state = renamed(net.state_dict(), lines(config, kept), OURS, ORIGINAL, "here")
    rng = torch.Generator().manual_seed(5)
    x, t, label = torch.randn(2, 3, 16, 20, generator=rng), torch.tensor([981.0, 3.0]), torch.tensor([6, 2])
    with torch.no_grad():
        want = ByHand(state, kept.by_head)(x, t, label)
        torch.testing.assert_close(net(x, t, label=label), want, rtol=1e-4, atol=3e-4)
        wrong = ByHand(state, not kept.by_head)(x, t, label)
    assert (wrong - want).abs().max() > 0.01  # the other order would be another network


# Whole pipelines

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PIPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "google": ("ddpm", lambda: diffusers.DDPMScheduler(**BETAS, variance_type="fixed_large"), {}),
    "small": ("plain", lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False), {}),
    "v": ("plain", lambda: diffusers.DDPMScheduler(**BETAS, prediction_type="v_prediction"), {}),
    "learned": ("variance", lambda: diffusers.DDPMScheduler(**BETAS, variance_type="learned_range"), {}),
    "ddim": ("ddpm", lambda: diffusers.DDIMScheduler(**BETAS), {}),
    "ddim-unclipped": ("ddpm", lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False), {}),
}
KINDS_OF_PIPES = {"variance": {"attention_head_dim": 8, "layers_per_block": 1, "out_channels": 6}}


def saved(folder: Path, name: str) -> Any:
    """A pipeline of diffusers, and the folder that it is saved in."""
    kind, scheduler, _ = PIPES[name]
    net = randomised(diffusers.UNet2DModel(**{**SMALL, **{**KINDS, **KINDS_OF_PIPES}[kind]}), 5)
    maker = diffusers.DDIMPipeline if name.startswith("ddim") else diffusers.DDPMPipeline
    made = maker(net, scheduler())
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=PIPES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("ddpm") / request.param
    return saved(folder, request.param), folder


def close(ours: Any, theirs: Any) -> bool:
    return float((torch.from_numpy(ours) / 255 - torch.as_tensor(theirs)).abs().max()) < 1.01 / 255


def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path]) -> None:
    """From the same steps and seed, with the sampler and grid that the folder recommends."""
    pipe, folder = whole
    pipeline = load(folder, "cpu")
    assert pipeline.settings().steps == (50 if "ddim" in folder.name else 1000)
    for seed in (7, 8):
        rng = torch.Generator().manual_seed(seed)
        told = pipe(num_inference_steps=10, generator=rng, output_type="np").images
        ours = pipeline.sample(steps=10, seeds=seed).images
        assert close(ours[0], told[0])
        assert told.std() > 0.02  # the picture is no flat grey, nor all at the ends


def test_diffusers_draws_the_same_from_what_we_write(whole: tuple[Any, Path], tmp_path: Path) -> None:
    save_published(tmp_path / "mine", load(whole[1], "cpu").model)
    again = type(whole[0]).from_pretrained(tmp_path / "mine")
    drawn = []
    for pipe in (whole[0], again):
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(3)
        drawn.append(torch.as_tensor(pipe(num_inference_steps=7, generator=rng, output_type="np").images))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(source: Path, target: Path, to: str, *more: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(target), "--to", to, *more])
    assert left.value.code == 0
    return target


def test_converting_there_and_back_gives_the_same_bytes(whole: tuple[Any, Path], tmp_path: Path) -> None:
    ours = convert(whole[1], tmp_path / "a", "sfumato")
    theirs = convert(ours, tmp_path / "b", "diffusers")
    assert contents(convert(theirs, tmp_path / "c", "sfumato")) == contents(ours)
    assert contents(convert(tmp_path / "c", tmp_path / "d", "diffusers")) == contents(theirs)


def test_parts_in_the_folder_itself_and_old_names_are_googles(tmp_path: Path) -> None:
    """Google's DDPMs have no subfolders, and attention of names before diffusers 0.17."""
    saved(tmp_path / "new", "google")
    old = tmp_path / "old"
    old.mkdir()
    for part in ("unet", "scheduler"):
        for one in (tmp_path / "new" / part).iterdir():
            shutil.copy(one, old / one.name)
    shutil.copy(tmp_path / "new" / "model_index.json", old)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_safetensors(old / "diffusion_pytorch_model.safetensors")
    renamed_state = {}
    for key, value in state.items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.") if ".attentions." in key else key
        renamed_state[key] = value
    assert renamed_state.keys() != state.keys() and modern(renamed_state).keys() == state.keys()
    (old / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(renamed_state, old / "diffusion_pytorch_model.bin")
    one, two = (load(folder, "cpu").sample(steps=4).images for folder in (old, tmp_path / "new"))
    assert (one == two).all()
    found = inspected(old)
    assert found["family"] == "ddpm" and found["missing"] == [] and found["scheduler"] == "DDPMScheduler"
    assert found["parts"]["unet"]["parameters"] == sum(value.numel() for value in state.values())


def load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"in_channels": 6}, "6 channels"),
        ({"freq_shift": 2}, "freq_shift 2"),
        ({"sample_size": None}, "sample_size"),
        ({**SCALED, "attn_norm_num_groups": None}, "no norm"),
        ({"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}, "up_blocks.0.attentions"),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D", "DownBlock2D")}, "down_blocks.0"),
    ],
)
def test_networks_of_another_kind_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    net = diffusers.UNet2DModel(**{**SMALL, "attention_head_dim": 4, **changes})
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "odd", "cpu")


# Consistency models

CONSISTENT = ("consistency-64", "consistency-256")


@pytest.fixture(scope="module", params=CONSISTENT)
def jumps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("consistency") / request.param
    made = diffusers.ConsistencyModelPipeline(unet(request.param, 6), diffusers.CMStochasticIterativeScheduler())
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made, folder


def label_of(folder: Path) -> int | None:
    return 4 if folder.name == "consistency-64" else None


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_a_consistency_model_draws_the_same_picture(jumps: tuple[Any, Path], steps: int) -> None:
    pipe, folder = jumps
    label, rng = label_of(folder), torch.Generator().manual_seed(7)
    told = pipe(class_labels=label, num_inference_steps=steps, generator=rng, output_type="np").images
    pipeline = load(folder, "cpu")
    assert pipeline.settings().steps == 1
    assert close(pipeline.sample(label, steps=steps, seeds=7).images[0], told[0])
    assert told.std() > 0.02


def test_levels_can_be_chosen(jumps: tuple[Any, Path]) -> None:
    """Those of the paper's two steps on ImageNet; theirs are counted from the data's end and reversed."""
    pipe, folder = jumps
    label, rng = label_of(folder), torch.Generator().manual_seed(7)
    told = pipe(class_labels=label, num_inference_steps=None, timesteps=[22, 0], generator=rng, output_type="np").images
    grid = {"kind": "consistency", "levels": [0, 22]}
    assert close(load(folder, "cpu").sample(label, steps=2, grid=grid, seeds=7).images[0], told[0])


def test_consistency_models_there_and_back(jumps: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = jumps
    ours = convert(folder, tmp_path / "a", "sfumato")
    theirs = convert(ours, tmp_path / "b", "diffusers")
    assert contents(convert(theirs, tmp_path / "c", "sfumato")) == contents(ours)
    again = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "b")
    again.set_progress_bar_config(disable=True)
    one, two = (
        torch.as_tensor(
            p(
                class_labels=label_of(folder),
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(2),
                output_type="np",
            ).images
        )
        for p in (pipe, again)
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    kept = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert kept["num_train_timesteps"] == 40 and kept["clip_denoised"] is True


def test_a_consistency_model_is_no_denoiser(jumps: tuple[Any, Path]) -> None:
    pipeline = load(jumps[1], "cpu")
    with pytest.raises(ConfigError, match="endpoint"):
        pipeline.sample(label_of(jumps[1]), sampler="euler", grid="karras", steps=3)


def test_a_class_must_be_told_where_none_is_no_class(jumps: tuple[Any, Path]) -> None:
    pipeline = load(jumps[1], "cpu")
    if label_of(jumps[1]) is None:
        assert pipeline.sample(steps=1).images.shape == (1, 16, 16, 3)
        return
    for given, said in ((None, "without a class"), (7, "no such class")):
        with pytest.raises(DataError, match=said):
            pipeline.sample(given, steps=1)


# Original files


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


def test_what_is_saved_as_ours_draws_the_same(jumps: tuple[Any, Path], tmp_path: Path) -> None:
    convert(jumps[1], tmp_path / "mine", "sfumato")
    assert load_model(tmp_path / "mine").answers == ("endpoint",)
    one, two = (load(p, "cpu").sample(label_of(jumps[1]), steps=2).images for p in (jumps[1], tmp_path / "mine"))
    assert (one == two).all()
