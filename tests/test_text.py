"""Prompts through a published text encoder: what is read, what is refused, and what travels."""

import json
from pathlib import Path

import pytest
import torch
from tests.clip import encoder, tokenizer

from sfumato.errors import CheckpointError, ConfigError, DataError, MachineError
from sfumato.text import Text, files_of

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers, as far as its text goes."""
    place = tmp_path_factory.mktemp("text")
    encoder(layers=3).save_pretrained(place / "text_encoder")
    tokenizer(place / "made").save_pretrained(place / "tokenizer")
    return place


class Nothing:
    """A data source without captions."""

    def captions(self) -> list[str]:
        return []


def text(folder: Path, **options: object) -> Text:
    made = Text(weights=str(folder), **{"length": 16, **options})  # type: ignore[arg-type]
    made.prepare(Nothing())
    return made


@torch.no_grad()
def test_it_is_what_the_library_answers(folder: Path) -> None:
    made, words = text(folder, pooled=True), transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    peer = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = words(["a red circle", ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    told = peer(input_ids=ids, output_hidden_states=True)
    cond = made([{"caption": "a red circle"}, {}])
    assert torch.equal(made.tokens([{"caption": "a red circle"}, {}]), ids)
    torch.testing.assert_close(cond["context"], told.last_hidden_state)
    torch.testing.assert_close(cond["pooled"], told.pooler_output)
    torch.testing.assert_close(made.null(2)["context"][0], cond["context"][1])
    assert (made.context_dim, made.pooled_dim) == (12, 12)


@torch.no_grad()
def test_earlier_layers_with_and_without_the_last_norm(folder: Path) -> None:
    peer = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    said = [{"caption": "a blue square"}]
    made = text(folder, skip=1)
    told = peer(input_ids=made.tokens(said), output_hidden_states=True).hidden_states[-2]
    norm = getattr(peer, "text_model", peer).final_layer_norm
    torch.testing.assert_close(made(said)["context"], norm(told))
    torch.testing.assert_close(text(folder, skip=1, normed=False)(said)["context"], told)


@torch.no_grad()
def test_it_travels(folder: Path) -> None:
    made = text(folder)
    again = Text(length=16)
    again.restore(made.files())
    assert again.files() == made.files() == files_of(folder)
    again.load_state_dict(made.state_dict())
    said = [{"caption": "a red circle left of a square"}]
    assert torch.equal(again(said)["context"], made(said)["context"])


def test_it_is_frozen(folder: Path) -> None:
    made = text(folder).train()
    assert not made.training and not any(p.requires_grad for p in made.parameters())


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    made = text(folder)
    made.check([{"caption": "a red circle"}, {}])
    with pytest.raises(DataError, match="longer than this model reads"):
        made.check([{"caption": "a red circle " * 8}])
    with pytest.raises(DataError, match="must be text"):
        made.check([{"caption": 3}])


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="comes from a checkpoint"):
        Text().prepare(Nothing())
    with pytest.raises(CheckpointError, match="tokenizer"):
        text(tmp_path)
    files = files_of(folder)
    with pytest.raises(CheckpointError, match="config is missing"):
        Text().restore({})
    other = {**files, "text.config.json": json.dumps({"architectures": ["T5EncoderModel"]}).encode()}
    with pytest.raises(CheckpointError, match="T5EncoderModel"):
        Text().restore(other)
    for option, value in (("length", 2), ("skip", -1)):
        with pytest.raises(ConfigError, match=option):
            Text(**{option: value})  # type: ignore[arg-type]
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MachineError, match="pip install transformers"):
        Text().restore(files)


def test_a_run_with_it_leaves_a_model_that_needs_no_other_folder(folder: Path, tmp_path: Path) -> None:
    import shutil

    from sfumato import load, load_config, train

    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    how = [f"model.conditioner={{kind: text, weights: {copy}, length: 9}}", "steps=2", "batch=2", "sampling.steps=2"]
    train(load_config("tiny", [*how, "checkpoint.every=2"]).config, run=tmp_path / "run")
    shutil.rmtree(copy)
    pipeline = load(tmp_path / "run", "cpu")
    assert isinstance(pipeline.model.conditioner, Text)
    there = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    here = pipeline.model.conditioner.encoder.state_dict()
    for key, value in getattr(there, "text_model", there).state_dict().items():
        assert torch.equal(here[key], value), key  # frozen, bit for bit
    assert pipeline.sample("a circle").images.shape == (1, 32, 32, 3)


def test_captions_that_are_cut_are_told_of(folder: Path) -> None:
    class Long:
        def captions(self) -> list[str]:
            return ["a red circle", "a red circle left of a blue square"]

    made = Text(weights=str(folder), length=6)
    made.prepare(Long())
    assert len(made.notes) == 1 and made.notes[0].startswith("1 of 2 captions are cut after 6")
    assert made.notes[0].endswith("model.conditioner.length=10")
