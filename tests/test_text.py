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
