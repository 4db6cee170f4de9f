"""Prompts as diffusers' own pipelines encode them: SDXL, Stable Diffusion 3, FLUX and PixArt, with tiny encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import clip, t5
from torch import Tensor

from sfumato.conditioners import Conditioner
from sfumato.io.text_parts import read_text, write_text
from sfumato.text import Text, Texts

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red circle left of a blue square", "of"]
CLIP = {"kind": "text", "skip": 1, "normed": False, "pooled": True, "length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CLIPs and a T5, as Stable Diffusion 3 keeps them."""
    place = tmp_path_factory.mktemp("texts")
    clip.encoder(3, projected=7, seed=4).save_pretrained(place / "text_encoder")
    clip.encoder(4, projected=10, width=15, seed=6, hidden_act="gelu").save_pretrained(place / "text_encoder_2")
    t5.encoder().save_pretrained(place / "text_encoder_3")
    for name in ("tokenizer", "tokenizer_2"):
        clip.tokenizer(place / name).save_pretrained(place / name)
    t5.tokenizer(place / "tokenizer_3")
    return place


def clip_of(folder: Path, part: str, kind: str = "CLIPTextModelWithProjection") -> tuple[Any, Any]:
    words = transformers.CLIPTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    found = getattr(transformers, kind).from_pretrained(folder / part, dtype=torch.float32)
    return found.eval(), words


def t5_of(folder: Path) -> tuple[Any, Any]:
    found = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=torch.float32)
    return found.eval(), transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3")


def loaded(made: Any, folder: Path, *parts: str) -> Any:
    """A conditioner with what `read_text` finds in a folder."""
    state, files = read_text(folder, parts)
    made.restore(files)
    made.load_state_dict({key.removeprefix("conditioner."): value for key, value in state.items()})
    return made


def same(ours: Mapping[str, Tensor], **theirs: Tensor) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.to(ours[name].dtype), rtol=1e-5, atol=1e-5)


def raws() -> list[dict[str, object]]:
    return [{"caption": prompt} for prompt in PROMPTS]


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl(folder: Path, tmp_path: Path, zeros: bool) -> None:
    first = clip.encoder(3, seed=9)
    first.save_pretrained(tmp_path / "text_encoder")
    for name in ("tokenizer", "tokenizer_2", "text_encoder_2"):
        (tmp_path / name).symlink_to(folder / name)
    (one, words), (two, words2) = clip_of(tmp_path, "text_encoder", "CLIPTextModel"), clip_of(folder, "text_encoder_2")
    peer = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=words,
        tokenizer_2=words2,
        unet=None,
        scheduler=diffusers.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=zeros,
    )
    context, null, pooled, null_pooled = peer.encode_prompt(PROMPTS, device="cpu")
    parts = [
        Text(skip=1, normed=False, length=16),
        Text(part="text_encoder_2", skip=1, normed=False, pooled=True, length=16),
    ]
    made = loaded(Texts(parts=parts, zeros=zeros), tmp_path, "text_encoder", "text_encoder_2")
    same(made(raws()), context=context, pooled=pooled)
    same(made([{}, {}]), context=null, pooled=null_pooled)
    _, said, _, said_pooled = peer.encode_prompt(PROMPTS, device="cpu", negative_prompt=["", "a square"])
    same(made([{"caption": ""}, {"caption": "a square"}]), context=said, pooled=said_pooled)
    assert (made.context_dim, made.pooled_dim, made.length) == (27, 10, 16)


@torch.no_grad()
def test_sdxl_is_told_sizes(folder: Path) -> None:
    from diffusers.models.embeddings import Timesteps

    made = Texts(parts=[Text(part="text_encoder_2", skip=1, normed=False, pooled=True, length=16)], sizes=True)
    files = read_text(folder, ["text_encoder_2"])[1]
    made.restore(files)
    made.of_size((1024, 768))
    said = {"caption": "a", "original_size": [512, 640], "crop": (3, 70), "target_size": (896, 1152)}
    cond = made([said, {"caption": "a"}])
    numbers = torch.tensor([[512.0, 640, 3, 70, 896, 1152], [1024, 768, 0, 0, 1024, 768]])
    waves = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(numbers.flatten()).reshape(2, -1)
    torch.testing.assert_close(cond["pooled"][:, 10:], waves, rtol=1e-5, atol=1e-4)
    assert made.pooled_dim == cond["pooled"].shape[1] == 10 + 6 * 256
    sized = made.sized([{"caption": "a"}, said], (64, 32))
    assert sized[0]["target_size"] == sized[0]["original_size"] == (64, 32) and sized[1] == said


def sd3_pipeline(folder: Path, with_t5: bool) -> Any:
    (one, words), (two, words2) = clip_of(folder, "text_encoder"), clip_of(folder, "text_encoder_2")
    three, words3 = t5_of(folder) if with_t5 else (None, None)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        caption_projection_dim=4,
        joint_attention_dim=48,
        pooled_projection_dim=17,
        out_channels=4,
        pos_embed_max_size=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words2,
        text_encoder_3=three,
        tokenizer_3=words3,
    )


def sd3(with_t5: bool) -> tuple[Texts, list[str]]:
    names = ["text_encoder", "text_encoder_2"] + (["text_encoder_3"] if with_t5 else [])
    options: dict[str, Any] = {"skip": 1, "normed": False, "pooled": True, "length": 16}
    parts: list[Conditioner] = [Text(part=name, **options) for name in names[:2]]
    parts += [Text(part=names[2], length=19)] if with_t5 else []
    return Texts(parts=parts, join="sd3", width=48), names


@torch.no_grad()
@pytest.mark.parametrize("with_t5", [True, False])
def test_stable_diffusion_3(folder: Path, with_t5: bool) -> None:
    peer = sd3_pipeline(folder, with_t5)
    told = peer.encode_prompt(PROMPTS, None, None, device="cpu", max_sequence_length=19 if with_t5 else 256)
    made, names = sd3(with_t5)
    made = loaded(made, folder, *names)
    same(made(raws()), context=told[0], pooled=told[2])
    same(made.null(2), context=told[1], pooled=told[3])
    assert (made.context_dim, made.pooled_dim) == (32 if with_t5 else 48, 17)
    assert told[0].shape == (2, 16 + (19 if with_t5 else 256), made.context_dim) == (2, made.length, made.context_dim)


@torch.no_grad()
def test_flux(folder: Path, tmp_path: Path) -> None:
    clip.encoder(3, seed=9).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    for name in ("tokenizer", "text_encoder"):
        (tmp_path / f"{name}_2").symlink_to(folder / f"{name}_3")
    one, words = clip_of(tmp_path, "text_encoder", "CLIPTextModel")
    two, words2 = t5_of(folder)
    peer = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words2,
        transformer=None,
    )
    context, pooled, _ = peer.encode_prompt(PROMPTS, device="cpu", max_sequence_length=23)
    parts = [Text(pooled=True, length=16), Text(part="text_encoder_2", length=23)]
    made = loaded(Texts(parts=parts, join="apart"), tmp_path, "text_encoder", "text_encoder_2")
    same(made(raws()), context=context, pooled=pooled)
    assert (made.context_dim, made.pooled_dim, made.length) == (32, 12, 23)
    made.check([{"caption": "a red circle left of a blue square of a red circle of a red"}])  # CLIP reads its beginning


@torch.no_grad()
def test_pixart(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "text_encoder"):
        (tmp_path / name).symlink_to(folder / f"{name}_3")
    encoder, words = t5_of(folder)
    peer = diffusers.PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=None,
        transformer=None,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    prompts = [" A red Circle ", "of"]
    context, mask, null, null_mask = peer.encode_prompt(prompts, device="cpu", max_sequence_length=14)
    made = loaded(Text(length=14, masked=True, lower=True), tmp_path, "text_encoder")
    same(made([{"caption": prompt} for prompt in prompts]), context=context, context_mask=mask)
    same(made.null(2), context=null, context_mask=null_mask)
    assert 0 < int(mask.sum()) < mask.numel()


@torch.no_grad()
def test_the_original_way_of_finding_the_end(tmp_path: Path) -> None:
    """Configs of before 2023 say that the end is piece 2; then it is the one with the highest number."""
    clip.encoder(2, projected=7, eos_token_id=2).save_pretrained(tmp_path / "text_encoder")
    clip.tokenizer(tmp_path / "tokenizer").save_pretrained(tmp_path / "tokenizer")
    made = loaded(Text(pooled=True, length=16), tmp_path, "text_encoder")
    peer, words = clip_of(tmp_path, "text_encoder")
    ids = words(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    told = peer(input_ids=ids)
    same(made(raws()), context=told.last_hidden_state, pooled=told.text_embeds)
    states, end = told.last_hidden_state, ids.argmax(1)
    expected = states[torch.arange(2), end] @ peer.text_projection.weight.T
    torch.testing.assert_close(made(raws())["pooled"], expected)


@torch.no_grad()
def test_what_is_written_is_read_by_transformers_and_again_here(folder: Path, tmp_path: Path) -> None:
    made, names = sd3(True)
    made = loaded(made, folder, *names)
    write_text(tmp_path, made, torch.float32)
    for name in names[:2]:
        one, two = clip_of(folder, name)[0].state_dict(), clip_of(tmp_path, name)[0].state_dict()
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    one, two = t5_of(folder)[0].state_dict(), t5_of(tmp_path)[0].state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    again = loaded(sd3(True)[0], tmp_path, *names)
    same(again(raws()), **made(raws()))
    assert again.files() == made.files()
