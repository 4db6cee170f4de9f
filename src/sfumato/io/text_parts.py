"""The text encoders of models that are told a prompt, in folders of diffusers and in single files.

A folder has an encoder and its tokenizer in subfolders; a single file has weights alone, and the rest is taken from a
folder. Here they are weights of a conditioner, alone or joined with what gives pictures, and files that travel with it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import text
from sfumato.conditioners import Conditioner, Joined
from sfumato.errors import CheckpointError, ConfigError
from sfumato.image_conditions import Hint, Inpainting
from sfumato.io.families import encoders
from sfumato.io.parts import write_part
from sfumato.io.pretrained import read_json, read_state
from sfumato.text import Text, Texts


def read_text(
    folder: Path, parts: Sequence[str] = ("text_encoder",), *, joined: bool = False
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The text encoders of a folder: their weights, and the files that travel.

    parts: the subfolders. One is read for the conditioner `text`, several, in their order, for `texts`. joined: one is
    for `texts` too.
    """
    state: dict[str, Tensor] = {}
    found: dict[str, bytes] = {}
    for i, part in enumerate(parts):
        files = text.files_of(folder, part)
        weights = text.read(folder, part, files, read_state(folder / part))
        state |= _placed(weights, i, joined or len(parts) > 1)
        found |= files
    return state, found


def _placed(weights: Mapping[str, Tensor], i: int, joined: bool) -> dict[str, Tensor]:
    """The weights of encoder i, alone or joined with others, by their names in a model."""
    head = "conditioner.encoder." if not joined else f"conditioner.parts.{i}.encoder."
    return {f"{head}{key}": value for key, value in weights.items()}


def read_text_file(
    state: Mapping[str, Tensor],
    places: Sequence[encoders.Place],
    folder: Path | None,
    where: str,
    *,
    joined: bool = False,
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """`read_text` of a single file: the weights from there, their tokenizers from a folder of diffusers.

    places: see `sfumato.io.families.encoders`. An encoder that the file lacks is taken from the folder, too, and the
    config of one that it has, if it is there. where: the file, for errors.
    """
    found: dict[str, Tensor] = {}
    files: dict[str, bytes] = {}
    joined = joined or len(places) > 1
    for i, place in enumerate(places):
        if folder is None:
            what = "a single file has no tokenizer" if place.within(state) else "this file has no text encoder"
            raise CheckpointError(what, where=where, seen=place.part, fix="--parts FOLDER, one of diffusers with it")
        if not place.within(state):
            weights, mine = read_text(folder, [place.part])
            head = "conditioner.encoder."
            found |= _placed({key.removeprefix(head): value for key, value in weights.items()}, i, joined)
            files |= mine
            continue
        config, weights = encoders.read(state, place, where)
        found |= _placed(text.own_names(weights, place.kind), i, joined)
        told = folder / place.part / "config.json"  # knows the heads and the activation, which shapes do not tell
        files[text.config_name(place.part)] = (
            told.read_bytes() if told.is_file() else json.dumps(config, indent=2).encode()
        )
        try:
            files |= text.tokenizer_files(folder, place.part)
        except OSError as error:
            raise CheckpointError("a tokenizer is missing", where=str(folder), seen=str(error)) from None
    return found, files


def text_for_file(conditioner: Text | Texts, places: Sequence[encoders.Place]) -> dict[str, Tensor]:
    """The inverse: the weights of text encoders as an original file names them."""
    found = [conditioner] if isinstance(conditioner, Text) else conditioner.texts
    if [one.kind for one in found] != [place.kind for place in places]:
        seen = ", ".join(one.kind for one in found)
        raise ConfigError("the original file has other text encoders", where="--to single-file", seen=seen)
    out: dict[str, Tensor] = {}
    for one, place in zip(found, places, strict=True):
        out |= encoders.write(text.published(one.encoder.state_dict(), one.kind), place)
    return out


def write_text(place: Path, conditioner: Text | Texts, dtype: torch.dtype) -> None:
    """Text encoders and tokenizers, each in its subfolder, as `transformers` and diffusers keep them."""
    for one in [conditioner] if isinstance(conditioner, Text) else conditioner.texts:
        named = text.published(one.encoder.state_dict(), one.kind)
        write_part(place / one.part / "model.safetensors", named, dtype)
        for name, data in text.in_folder(one.files(), one.part).items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)


def join_text(
    text: dict[str, Any], state: Mapping[str, Tensor], files: Mapping[str, bytes], other: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """A prompt's conditioner joined with another that has no weights: the slot, the weights, the files."""
    head = "conditioner."
    moved = {f"{head}parts.0.{key.removeprefix(head)}": value for key, value in state.items()}
    slot = {"kind": "joined", "parts": [text, dict(other)]}
    return slot, moved, {f"0.{name}": data for name, data in files.items()}


def text_of(conditioner: Conditioner | None) -> Text | None:
    """The text encoder of a model that is told a prompt, alone or joined with pictures."""
    found = beside_pictures(conditioner, Inpainting, Hint)[0]
    return found if isinstance(found, Text) else None


def texts_of(conditioner: Conditioner | None, *kinds: type[Conditioner]) -> Texts | None:
    """The text encoders of a model that has several, alone or joined with what gives pictures: a control's, unless
    other kinds are said.
    """
    found = beside_pictures(conditioner, *(kinds or (Hint,)))[0]
    return found if isinstance(found, Texts) else None


def beside_pictures(conditioner: object, *kinds: type[Conditioner]) -> tuple[object, object]:
    """A conditioner and nothing, or of two joined ones the first, and the other, which is of one of some kinds."""
    if isinstance(conditioner, Joined) and len(conditioner.parts) == 2:
        first, other = conditioner.parts
        return (first, other) if isinstance(other, kinds) else (None, None)
    return conditioner, None


def tokenizer_length(folder: Path, part: str = "tokenizer") -> int:
    """How many pieces of words a folder's tokenizer fills up to: 77, unless it says another sensible number."""
    path = folder / part / "tokenizer_config.json"
    longest = read_json(path).get("model_max_length", 77) if path.is_file() else 77
    return int(longest) if isinstance(longest, (int, float)) and 3 <= longest <= 512 else 77
