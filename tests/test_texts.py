"""Several encoders joined, any model's hidden states, what is told of sizes: options, refusals, and the pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import clip, t5

from sfumato.conditioners import Joined, Labels, dropped, silent
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.text import Text, Texts
from sfumato.text.library import files_of, own_names, published

transformers = pytest.importorskip("transformers")


class Nothing:
    """A data source without captions."""

    def captions(self) -> list[str]:
        return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and a T5."""
    place = tmp_path_factory.mktemp("texts")
    clip.encoder(3, projected=7).save_pretrained(place / "text_encoder")
    clip.tokenizer(place / "tokenizer").save_pretrained(place / "tokenizer")
    t5.encoder().save_pretrained(place / "text_encoder_2")
    t5.tokenizer(place / "tokenizer_2")
    return place


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, as newer pipelines have one for their prompts."""
    place = tmp_path_factory.mktemp("language")
    config = transformers.Qwen2Config(
        vocab_size=100,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    clip.randomised(transformers.Qwen2ForCausalLM(config), 7).save_pretrained(place / "text_encoder")
    t5.tokenizer(place / "tokenizer")
    return place


def prepared(made: Any) -> Any:
    made.prepare(Nothing())
    return made


@torch.no_grad()
def test_hidden_layers_of_any_model_side_by_side_behind_a_template(language: Path) -> None:
    template = "a of {} square"
    made = prepared(Text(weights=str(language), length=10, layers=(1, -2), masked=True, template=template, drop=2))
    peer = transformers.Qwen2ForCausalLM.from_pretrained(language / "text_encoder", dtype=torch.float32).eval()
    words = transformers.T5TokenizerFast.from_pretrained(language / "tokenizer")
    told = words([template.format("red")], padding="max_length", max_length=12, return_tensors="pt")
    layers = peer(**told, output_hidden_states=True).hidden_states
    cond = made([{"caption": "red"}])
    torch.testing.assert_close(cond["context"], torch.cat([layers[1], layers[-2]], -1)[:, 2:])
    assert torch.equal(cond["context_mask"], told.attention_mask[:, 2:].bool())
    assert made.context_dim == 24 and made.counted("red") == len(words(template.format("red")).input_ids) - 2


@torch.no_grad()
def test_of_what_is_not_said_no_word_counts_if_silence_is_told(language: Path) -> None:
    """An empty prompt that is said has its end, as ever."""
    said = [{"caption": "red"}, {"caption": ""}, {}]
    quiet, plain = (
        prepared(Text(weights=str(language), length=10, layers=(-1,), masked=True, silent=silent))(said)
        for silent in (True, False)
    )
    assert torch.equal(quiet["context"], plain["context"])
    assert torch.equal(quiet["context_mask"][:2], plain["context_mask"][:2])
    assert not quiet["context_mask"][2].any() and torch.equal(plain["context_mask"][2], plain["context_mask"][1])
    with pytest.raises(ConfigError, match="told by the mask"):
        Text(silent=True)


@torch.no_grad()
def test_a_language_model_travels(language: Path) -> None:
    made = prepared(Text(weights=str(language), length=10))
    again = Text(length=10)
    again.restore(made.files())
    again.load_state_dict(made.state_dict())
    said = [{"caption": "a red circle"}]
    assert torch.equal(again(said)["context"], made(said)["context"])
    assert not any("lm_head" in key for key in made.state_dict())  # only what reads
    with pytest.raises(ConfigError, match="reading part"):
        published(made.encoder.state_dict(), made.kind)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer_2")
    (tmp_path / "text_encoder").mkdir()
    config = (folder / "text_encoder_2" / "config.json").read_bytes()
    (tmp_path / "text_encoder" / "config.json").write_bytes(config)
    state = load_file(folder / "text_encoder_2" / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="final_layer_norm"):
        prepared(Text(weights=str(tmp_path)))


def test_names_go_there_and_back(folder: Path) -> None:
    for kind, model in (("T5EncoderModel", t5.encoder()), ("CLIPTextModelWithProjection", clip.encoder(projected=5))):
        state = {key: value for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
        back = published(own_names(dict(state), kind), kind)
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def two(folder: Path, **options: Any) -> Texts:
    parts = [Text(pooled=True, length=16), Text(part="text_encoder_2", length=20)]
    return prepared(Texts(**{"parts": parts, "join": "apart", "weights": str(folder), **options}))


@torch.no_grad()
def test_several_travel_together(folder: Path) -> None:
    made = two(folder)
    again = Texts(parts=[Text(pooled=True, length=16), Text(part="text_encoder_2", length=20)], join="apart")
    again.restore(made.files())
    again.load_state_dict(made.state_dict())
    said = [{"caption": "a red circle left of a square"}]
    assert again.files() == made.files() == files_of(folder) | files_of(folder, "text_encoder_2")
    assert all(torch.equal(value, made(said)[name]) for name, value in again(said).items())
    assert (again.context_dim, again.pooled_dim, again.fields) == (32, 7, ("caption",))


@torch.no_grad()
def test_only_rows_of_which_nothing_was_said_are_zeros(folder: Path) -> None:
    plain, made = two(folder), two(folder, zeros=True)
    raw = [{"caption": "red"}, {}, {"caption": ""}, {"caption": None}]
    there, here = plain(raw), made(raw)
    for name in ("context", "pooled"):
        assert not here[name][1].any() and not here[name][3].any()
        assert torch.equal(here[name][[0, 2]], there[name][[0, 2]])


def test_a_prompt_may_be_longer_than_some_encoders_read_but_not_than_all(folder: Path) -> None:
    made = two(folder)
    made.check([{"caption": "red of " * 8}])
    with pytest.raises(DataError, match="longer than this model reads"):
        made.check([{"caption": "red of " * 12}])


def test_what_cannot_be_joined_is_refused(folder: Path) -> None:
    one, other = Text(pooled=True), Text(part="text_encoder_2")
    for parts, join, what in (
        ([one, Labels(3)], "channels", "Labels"),
        ([one, other], "beside", "no such way"),
        ([one], "apart", "another number"),
        ([one, Text(pooled=True)], "apart", "same part"),
        ([other, one], "apart", "pooled"),
        ([one, other], "sd3", "pooled"),
        ([], "channels", "another number"),
    ):
        with pytest.raises(ConfigError, match=what):
            Texts(parts=parts, join=join)  # type: ignore[arg-type]
    narrow = Texts(parts=[Text(pooled=True, length=16), Text(part="text_encoder_2", pooled=True)], join="sd3", width=8)
    with pytest.raises(ConfigError, match="only CLIP"):
        narrow.restore(files_of(folder) | files_of(folder, "text_encoder_2"))
    for options in ({"layers": (1,), "skip": 1}, {"template": "of"}, {"drop": -1}):
        with pytest.raises(ConfigError, match=r"model\.conditioner"):
            Text(**options)  # type: ignore[arg-type]


def test_a_model_that_transformers_does_not_know_is_named(folder: Path) -> None:
    files = files_of(folder)
    said = json.dumps({"architectures": ["FutureModel"], "model_type": "future"}).encode()
    with pytest.raises(CheckpointError, match="FutureModel"):
        Text().restore({**files, "text.config.json": said})


SIZED: dict[str, Any] = {"join": "channels", "sizes": True, "waves": 4}


@torch.no_grad()
def test_sizes_stay_where_nothing_is_said(folder: Path) -> None:
    made = prepared(Texts(parts=[Text(pooled=True, length=16)], weights=str(folder), **SIZED))
    made.of_size((32, 48))
    said = {"caption": "red", "original_size": (100, 50)}
    assert made.pooled_dim == 7 + 6 * 4 and made.kept == ("original_size", "crop", "target_size")
    null = made([silent(said, made.kept)])["pooled"]
    assert torch.equal(null[:, 7:], made([said])["pooled"][:, 7:])
    assert not torch.equal(null[:, 7:], made([{}])["pooled"][:, 7:])
    rows = dropped([said] * 8, 0.5, torch.Generator().manual_seed(1), made.kept)
    assert {tuple(row) for row in rows} == {("caption", "original_size"), ("original_size",)}
    with pytest.raises(DataError, match="crop"):
        made.check([{"caption": "red", "crop": "left"}])
    joined = Joined([made, Labels(3)])
    joined.of_size((8, 8))
    assert made.size == (8, 8) and joined.kept == made.kept
    assert joined.sized([{"label": 1}], (4, 2)) == [{"label": 1, "original_size": (4, 2), "target_size": (4, 2)}]


def test_a_pipeline_tells_the_size_it_draws(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato import load, load_config, train

    slot = (
        f"{{kind: texts, weights: {folder}, sizes: true, waves: 4, parts: [{{kind: text, pooled: true, length: 16}}]}}"
    )
    how = [f"model.conditioner={slot}", "steps=1", "batch=2", "sampling.steps=1", "checkpoint.every=1"]
    train(load_config("tiny", how).config, run=tmp_path / "run")
    pipeline = load(tmp_path / "run", "cpu")
    conditioner = pipeline.model.conditioner
    assert isinstance(conditioner, Texts) and conditioner.size == (32, 32)
    told: list[dict[str, Any]] = []
    read = Texts.forward
    monkeypatch.setattr(Texts, "forward", lambda self, raw: told.extend(map(dict, raw)) or read(self, raw))
    pipeline.sample({"caption": "red", "crop": (1, 2)}, size=(16, 24), guidance=2.0, steps=1)
    assert told == [
        {"caption": "red", "crop": (1, 2), "original_size": (16, 24), "target_size": (16, 24)},
        {"crop": (1, 2), "original_size": (16, 24), "target_size": (16, 24)},
    ]
