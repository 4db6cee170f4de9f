"""Text encoders inside original single files: diffusers' own conversion is the oracle, and every layout goes back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import clip, t5
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.families import encoders
from sfumato.io.families.encoders import FLUX, SD1, SD2, SD3, SDXL, SDXL_REFINER, Place
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, renamed
from sfumato.io.text_parts import read_text_file, text_for_file
from sfumato.text import CLIP, PROJECTED, T5, Text, Texts, published

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDE = {"width": 128, "num_attention_heads": 2}  # heads as wide as in published encoders
CLIPS = [place for place in (*SD1, *SD2, *SDXL, *SDXL_REFINER, *SD3[:2]) if place.kind != T5]


def encoder_of(place: Place) -> Any:
    """A small encoder of the class that lies in such a place."""
    act = "gelu"  # what is inferred for any width but that of OpenAI's
    return clip.encoder(3, projected=128 if place.kind == PROJECTED else 0, hidden_act=act, **WIDE)


def weights_of(encoder: Any) -> dict[str, Tensor]:
    """As `transformers` writes them."""
    state = encoder.state_dict()
    return state if any(key.startswith("text_") for key in state) else published(state, CLIP)


@pytest.mark.parametrize("place", CLIPS, ids=lambda place: place.prefix)
def test_diffusers_reads_what_is_written(place: Place, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    encoder = encoder_of(place)
    encoder.save_pretrained(tmp_path / "text_encoder")
    file = encoders.write(weights_of(encoder), place)
    assert all(key.startswith(place.prefix) for key in file)
    theirs = create_diffusers_clip_model_from_ldm(
        type(encoder), dict(file), "text_encoder", config=str(tmp_path), local_files_only=True
    ).state_dict()
    for key, value in encoder.state_dict().items():
        projection = "clip_l" in place.prefix and key == "text_projection.weight"  # which diffusers does not read
        assert projection or torch.equal(theirs[key], value), key


@pytest.mark.parametrize("place", CLIPS, ids=lambda place: place.prefix)
def test_what_is_written_is_read(place: Place) -> None:
    weights = weights_of(encoder_of(place))
    config, back = encoders.read(encoders.write(weights, place), place, "a file")
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)
    made = clip_model(config)
    made.load_state_dict(own(back, made))


def clip_model(config: dict[str, Any]) -> Any:
    kind = config["architectures"][0]
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def own(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The names that this version of transformers has."""
    plain = "text_model." not in " ".join(model.state_dict())
    return {key.removeprefix("text_model.") if plain else key: value for key, value in state.items()}


def test_every_line_counts() -> None:
    """Two entries of the same shape that trade places give other weights."""
    weights = weights_of(encoder_of(SDXL[1]))
    table = list(encoders.lines(3))
    right = renamed(weights, table, DIFFUSERS, ORIGINAL, "a file")
    same = [one for one in table if one.names[ORIGINAL][0].endswith(("ln_1", "ln_2"))]
    one, other = table.index(same[0]), table.index(same[1])
    swapped = {**same[0].names, ORIGINAL: same[1].names[ORIGINAL]}, {**same[1].names, ORIGINAL: same[0].names[ORIGINAL]}
    table[one], table[other] = replace(same[0], names=swapped[0]), replace(same[1], names=swapped[1])
    wrong = renamed(weights, table, DIFFUSERS, ORIGINAL, "a file")
    assert wrong.keys() == right.keys() and any(not torch.equal(wrong[key], right[key]) for key in right)


def test_the_layer_that_stable_diffusion_2_never_reads() -> None:
    place = replace(SD2[0], layers=2)
    file = encoders.write(weights_of(encoder_of(place)), place) | {
        f"{place.prefix}logit_scale": torch.tensor(4.6),
        f"{place.prefix}text_projection": torch.randn(128, 128),
    }
    config, weights = encoders.read(file, place, "a file")
    assert config["num_hidden_layers"] == 2 and not any("layers.2" in key or "projection" in key for key in weights)
    left = encoders.unread(file, place)
    assert len(left) == 12 + 2 and set(left).isdisjoint(encoders.write(weights, place))  # a layer, and the two
    assert set(left) | set(encoders.write(weights, place)) == set(file)


def test_a_first_clip_of_stable_diffusion_3_without_a_projection_has_one_that_does_nothing() -> None:
    file = encoders.write(weights_of(clip.encoder(2, **WIDE)), SD3[0])
    _, weights = encoders.read(file, SD3[0], "a file")
    assert torch.equal(weights["text_projection.weight"], torch.eye(128))


PUBLISHED: dict[str, tuple[Place, dict[str, Any], int]] = {
    "clip-l": (SD1[0], {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                        "num_attention_heads": 12, "hidden_act": "quick_gelu"}, 123_060_480),
    "clip-h": (SD2[0], {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                        "num_attention_heads": 16, "hidden_act": "gelu"}, 340_387_840),
    "clip-g": (SDXL[1], {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                         "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280}, 694_659_840),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_encoders_are_told_by_their_weights(name: str) -> None:
    place, said, count = PUBLISHED[name]
    with torch.device("meta"):
        model = clip_model({"vocab_size": 49_408, "max_position_embeddings": 77, **said, "architectures": [place.kind]})
    assert sum(p.numel() for p in model.parameters()) == count
    config = encoders.clip_config(weights_of(model), place)
    assert {key: config[key] for key in said} == said
    assert config["vocab_size"] == 49_408 and config["max_position_embeddings"] == 77


def test_t5_xxl_is_told_by_its_weights() -> None:
    said = {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64, "vocab_size": 32_128}
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**said, feed_forward_proj="gated-gelu"))
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    config = encoders.t5_config(model.state_dict())
    assert {key: config[key] for key in said} == said and config["feed_forward_proj"] == "gated-gelu"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizers")
    for name in ("tokenizer", "tokenizer_2"):
        clip.tokenizer(place / name).save_pretrained(place / name)
    t5.tokenizer(place / "tokenizer_3")
    return place


@torch.no_grad()
def test_a_whole_file_of_stable_diffusion_3(tokenizers: Path) -> None:
    first, second = (clip.encoder(2, projected=128, seed=seed, hidden_act="gelu", **WIDE) for seed in (1, 2))
    third = t5.encoder(260, distance=128)  # as always, for no weight tells it
    file = encoders.write(weights_of(first), SD3[0]) | encoders.write(weights_of(second), SD3[1])
    file |= {f"{SD3[2].prefix}{key}": value for key, value in third.state_dict().items()}
    file["model.diffusion_model.x_embedder.proj.weight"] = torch.zeros(1)
    state, files = read_text_file(file, SD3, tokenizers, "a file")
    options: dict[str, Any] = {"skip": 1, "normed": False, "pooled": True, "length": 16}
    parts = [Text(part="text_encoder", **options), Text(part="text_encoder_2", **options)]
    made = Texts(parts=[*parts, Text(part="text_encoder_3", length=12)], join="sd3")
    made.restore(files)
    made.load_state_dict({key.removeprefix("conditioner."): value for key, value in state.items()})
    cond = made([{"caption": "a red circle"}])
    ids = made.texts[1].tokens([{"caption": "a red circle"}])
    told = second(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(cond["pooled"][:, 128:], told.text_embeds)
    torch.testing.assert_close(cond["context"][:, :16, 128:256], told.hidden_states[-2])
    ids = made.texts[2].tokens([{"caption": "a red circle"}])
    torch.testing.assert_close(cond["context"][:, 16:], third(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    back = text_for_file(made, SD3)
    assert all(torch.equal(value, file[key]) for key, value in back.items())
    assert {key for key in file if key not in back} <= {
        "model.diffusion_model.x_embedder.proj.weight",
        f"{SD3[2].prefix}encoder.embed_tokens.weight",
    }


def test_what_a_file_lacks_is_in_a_folder_or_named(tokenizers: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no text encoder"):
        read_text_file({}, SD1, None, "a file")
    file = encoders.write(weights_of(clip.encoder(2, **WIDE)), FLUX[0])
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_text_file(file, FLUX, None, "a file")
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        read_text_file(file, FLUX, tmp_path, "a file")
    for name, there in (("tokenizer", "tokenizer"), ("tokenizer_2", "tokenizer_3")):
        (tmp_path / name).symlink_to(tokenizers / there)
    t5.encoder().save_pretrained(tmp_path / "text_encoder_2")
    state, files = read_text_file(file, FLUX, tmp_path, "a file")
    assert "conditioner.parts.0.encoder.final_layer_norm.weight" in state
    assert "conditioner.parts.1.encoder.embed_tokens.weight" in state and "text_2.config.json" in files
    del file[f"{FLUX[0].prefix}text_model.final_layer_norm.weight"]
    broken = {key: value for key, value in file.items() if "token_embedding" not in key}
    with pytest.raises(CheckpointError, match="token_embedding"):
        read_text_file(broken, FLUX, tmp_path, "a file")


def test_odd_weights_are_named() -> None:
    file = encoders.write(weights_of(encoder_of(SDXL[1])), SDXL[1])
    file[f"{SDXL[1].prefix}visual.proj"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        encoders.read(file, SDXL[1], "a file")
