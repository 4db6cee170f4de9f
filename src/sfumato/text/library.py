"""Text encoders as `transformers` builds, reads and names them.

A folder of diffusers keeps an encoder in `text_encoder`, a second one in `text_encoder_2`, and their tokenizers in
`tokenizer`, `tokenizer_2`. What of it travels with a model are the encoder's config and its tokenizer's files, by names
that say whose they are. Of a model of `transformers` only the part that reads text is kept, under that part's names.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError, MachineError

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
UNSAVED = ("architectures", "torch_dtype", "dtype")  # of a config: what does not decide the shape


# The files that travel


def config_name(part: str) -> str:
    """The travelling name of the config of `part`: "text_encoder", "text_encoder_2" and so on."""
    return f"{_stem(part)}.config.json"


def tokenizer_prefix(part: str) -> str:
    """What the travelling names of the files of the tokenizer of `part` begin with."""
    return f"{_stem(part)}.tokenizer."


def files_of(folder: Path, part: str = "text_encoder") -> dict[str, bytes]:
    """What of an encoder in a folder of diffusers travels: its config, and the files of its tokenizer."""
    try:
        return {config_name(part): (folder / part / "config.json").read_bytes(), **tokenizer_files(folder, part)}
    except OSError as error:
        raise CheckpointError(
            "a text encoder or its tokenizer is missing",
            where=str(folder),
            seen=str(error),
            fix=f"a folder with {part}/ and {tokenizer_of(part)}/",
        ) from None


def tokenizer_files(folder: Path, part: str = "text_encoder") -> dict[str, bytes]:
    """The files of the tokenizer of `part`, by their travelling names. OSError where there is none."""
    there = [path for path in sorted((folder / tokenizer_of(part)).iterdir()) if path.is_file()]
    return {f"{tokenizer_prefix(part)}{path.name}": path.read_bytes() for path in there}


def in_folder(files: Mapping[str, bytes], part: str = "text_encoder") -> dict[str, bytes]:
    """The inverse of `files_of`: by their paths in a folder of diffusers, those files that are of `part`."""
    head = tokenizer_prefix(part)
    out = {
        f"{tokenizer_of(part)}/{name.removeprefix(head)}": data for name, data in files.items() if name.startswith(head)
    }
    return {f"{part}/config.json": files[config_name(part)], **out}


def _stem(part: str) -> str:
    return part.replace("text_encoder", "text")


def tokenizer_of(part: str) -> str:
    """The folder of the tokenizer of `part`."""
    return part.replace("text_encoder", "tokenizer")


# Encoders


def kind_of(files: Mapping[str, bytes], part: str) -> str:
    """The class of `transformers` that the config of `part` names."""
    said = _config(files, part)
    known = {"clip_text_model": CLIP, "t5": T5}
    found = str((said.get("architectures") or [known.get(str(said.get("model_type")))])[0])
    return CLIP if found == "CLIPModel" else found


def built(files: Mapping[str, bytes], part: str) -> tuple[str, Any]:
    """The encoder that a config describes, with weights of no meaning: its class, and the part that reads text."""
    kind, said = kind_of(files, part), _plain(_config(files, part))
    if kind in (CLIP, PROJECTED):
        return kind, inside(library(kind)(library("CLIPTextConfig")(**_text_only(said))), kind)
    try:
        config = library("AutoConfig").for_model(said.pop("model_type", ""), **said)
        if kind.endswith("EncoderModel"):
            return kind, inside(library(kind)(config), kind)
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        config.use_cache = False
        return kind, inside(library("AutoModel").from_config(config), kind)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        seen = f"{kind}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        fix = f"{CLIP}, {PROJECTED}, {T5}, or another model of this version of transformers"
        raise CheckpointError(
            "a text encoder that is not known here", where=config_name(part), seen=seen, fix=fix
        ) from None


def _config(files: Mapping[str, bytes], part: str) -> dict[str, Any]:
    try:
        said = json.loads(files[config_name(part)])
        if not isinstance(said, dict):
            raise ValueError(type(said).__name__)
    except (KeyError, ValueError) as error:
        raise CheckpointError("a text encoder's config is missing", where=config_name(part), seen=str(error)) from None
    return said


def _plain(said: Any) -> Any:
    """A config without what does not decide the shape, at every depth."""
    if isinstance(said, dict):
        return {key: _plain(value) for key, value in said.items() if key not in UNSAVED}
    return said


def _text_only(said: dict[str, Any]) -> dict[str, Any]:
    """The text half of a config of both of CLIP's towers."""
    both = said.get("text_config")
    return {"projection_dim": said.get("projection_dim", 512), **both} if isinstance(both, dict) else said


def inside(model: Any, kind: str) -> Any:
    """The part of a model that reads text; older versions of the library wrap CLIP's once more."""
    if kind == CLIP:
        return getattr(model, "text_model", model)
    if kind.endswith("EncoderModel"):
        return model.encoder
    return getattr(model, "language_model", model)


def pretrained(folder: Path, part: str, kind: str) -> dict[str, Tensor]:
    """The weights of an encoder in a folder, by our names and in float32, read by `transformers` itself."""
    wanted = kind if kind in (CLIP, PROJECTED) or kind.endswith("EncoderModel") else "AutoModel"
    try:
        model, told = library(wanted).from_pretrained(folder / part, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        seen = str(error).splitlines()[0]
        raise CheckpointError("a text encoder cannot be read", where=str(folder / part), seen=seen) from None
    if missing := sorted(str(key) for key in told["missing_keys"]):
        raise CheckpointError("a text encoder lacks weights", where=str(folder / part), seen=", ".join(missing[:8]))
    return dict(inside(model, kind).state_dict())


def read(folder: Path, part: str, files: Mapping[str, bytes], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an encoder, as its file in a folder of diffusers names them, by our names.

    files: as of `files_of`. state: the tensors of that file; it is emptied. Models that are neither CLIP nor an
    "...EncoderModel" have many layouts, which `transformers` knows: it reads those again itself.
    """
    kind = kind_of(files, part)
    if kind not in (CLIP, PROJECTED) and not kind.endswith("EncoderModel"):
        state.clear()
        return pretrained(folder, part, kind)
    return own_names(state, kind)


def own_names(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Weights of CLIP, or of an "...EncoderModel", from the names of their files to ours; `state` is emptied."""
    kept: dict[str, Tensor] = {}
    for key in list(state):
        value = state.pop(key)
        if not key.endswith("position_ids") and not key.startswith(("vision_model.", "visual_projection.", "decoder.")):
            kept[_ours(key, kind)] = value
    return kept


def _ours(key: str, kind: str) -> str:
    if kind == CLIP:
        return key.removeprefix("text_model.")
    if kind == PROJECTED:
        return key
    return "embed_tokens.weight" if key == "shared.weight" else key.removeprefix("encoder.")


def published(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The inverse of `read`, for a class of `transformers`. ConfigError for those of which only a part is kept."""
    if kind == CLIP:
        return {f"text_model.{key}": value for key, value in state.items()}
    if kind.endswith("EncoderModel"):
        names = {key: "shared.weight" if key == "embed_tokens.weight" else f"encoder.{key}" for key in state}
        return {names[key]: value for key, value in state.items()}
    if kind == PROJECTED:
        return dict(state)
    fix = "--to sfumato"
    raise ConfigError("only the reading part of this text encoder is here", where="--to", seen=kind, fix=fix)


# Tokenizers


def tokenizer(files: Mapping[str, bytes], part: str, kind: str) -> Any:
    """The tokenizer of `part`, as its files describe it."""
    head = tokenizer_prefix(part)
    wanted = "CLIPTokenizerFast" if kind in (CLIP, PROJECTED) else "AutoTokenizer"
    if kind == T5:
        wanted = "T5TokenizerFast"
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            if name.startswith(head):
                (Path(place) / name.removeprefix(head)).write_bytes(data)
        try:
            found = library(wanted).from_pretrained(place)
        except (OSError, ValueError, TypeError, KeyError) as error:
            seen = str(error).splitlines()[0]
            raise CheckpointError("a tokenizer cannot be read", where=f"{head}*", seen=seen) from None
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def library(name: str) -> Any:
    """Something of `transformers`. MachineError where that is not installed, ConfigError where it has no such class."""
    try:
        import transformers
    except ImportError as error:
        raise MachineError(
            "a text encoder needs the library transformers",
            where="model.conditioner",
            seen=str(error),
            fix="pip install transformers",
        ) from None
    found = getattr(transformers, name, None)
    if found is None:
        seen = f"{name}, of transformers {transformers.__version__}"
        raise ConfigError("transformers has no such model", where="model.conditioner", seen=seen)
    return found
