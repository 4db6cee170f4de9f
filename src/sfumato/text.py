"""Prompts through a published text encoder: CLIP's, by the `transformers` library, as Stable Diffusion reads them.

The prompt is cut into pieces of words, filled up to a fixed length, and read by a frozen transformer; the states of its
last layer, or of one before it, are what the network attends to. Nothing is masked, for the published models never did.
The encoder's config and its tokenizer's files travel in the model directory, so a model needs no other folder.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import Conditioner, Raw, Source, captions_of, told_of_cuts
from sfumato.denoiser import Cond
from sfumato.errors import CheckpointError, ConfigError, DataError, MachineError

CONFIG, TOKENIZER = "text.config.json", "text.tokenizer."  # of the files that travel
KNOWN = ("CLIPTextModel",)


class Text(Conditioner):
    """Captions through a CLIP text encoder. Cond: context (B, length, width); pooled (B, width) where it is asked for.

    weights: a folder of diffusers with `text_encoder` and `tokenizer`, to train with; a published model brings its own.
    length: pieces of words read, begin and end included. skip: layers before the last whose states are taken; their
    final norm is applied if `normed`. The null condition is the empty prompt.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        length: int = 77,
        skip: int = 0,
        normed: bool = True,
        pooled: bool = False,
        field: str = "caption",
    ) -> None:
        super().__init__()
        if length < 3:
            raise ConfigError(
                "a prompt has a begin, a word and an end", where="model.conditioner.length", seen=str(length)
            )
        if skip < 0:
            raise ConfigError("layers are skipped from the last", where="model.conditioner.skip", seen=str(skip))
        self.weights, self.length, self.skip, self.normed, self.field = weights, length, skip, normed, field
        self.fields, self.has_pooled = (field,), pooled
        self.encoder: Any = None
        self.tokenizer: Any = None
        self._files: dict[str, bytes] = {}

    def forward(self, raw: Sequence[Raw]) -> Cond:
        said = self.encoder(input_ids=self.tokens(raw), output_hidden_states=self.skip > 0)
        states = said.hidden_states[-1 - self.skip] if self.skip else said.last_hidden_state
        if self.skip and self.normed:
            states = self.encoder.final_layer_norm(states)
        return {"context": states} | ({"pooled": said.pooler_output} if self.has_pooled else {})

    def tokens(self, raw: Sequence[Raw]) -> Tensor:
        """Numbers of pieces (B, length), on the encoder's device."""
        texts = [str(one.get(self.field) or "") for one in raw]
        told = self.tokenizer(texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        ids: Tensor = told.input_ids
        return ids.to(self.encoder.embeddings.token_embedding.weight.device)

    def check(self, raw: Sequence[Raw]) -> None:
        for text in captions_of(raw, self.field):
            pieces = len(self.tokenizer(text).input_ids)
            if pieces > self.length:
                raise DataError(
                    "a prompt longer than this model reads",
                    where=f"prompt {text[:60]!r}",
                    seen=f"{pieces} pieces of words, begin and end included",
                    fix=f"at most {self.length}",
                )

    def prepare(self, source: Source) -> None:
        """Reads the encoder that `weights` names. Its vocabulary is its own; of the captions only the lengths count."""
        if self.weights is None:
            raise ConfigError(
                "a text encoder comes from a checkpoint",
                where="model.conditioner.weights",
                seen="nothing",
                fix="model.conditioner.weights=FOLDER, one of diffusers",
            )
        folder = Path(self.weights).expanduser()
        self.restore(files_of(folder))
        found = _library("CLIPTextModel").from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.encoder.load_state_dict(_inside(found).state_dict())
        lengths = Counter(len(self.tokenizer(caption).input_ids) for caption in source.captions())
        self.notes = told_of_cuts(lengths, self.length)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def restore(self, files: Mapping[str, bytes]) -> None:
        try:
            config = json.loads(files[CONFIG])
            kind = (config.get("architectures") or KNOWN)[0]
        except (KeyError, ValueError, AttributeError) as error:
            raise CheckpointError("a text encoder's config is missing", where=CONFIG, seen=str(error)) from None
        if kind not in KNOWN:
            raise CheckpointError(
                "a text encoder that is not known here", where=CONFIG, seen=kind, fix=", ".join(KNOWN)
            )
        own = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype", "dtype")}
        made = _library("CLIPTextModel")(_library("CLIPTextConfig")(**own))
        self.encoder = _inside(made).requires_grad_(False).eval()
        self.tokenizer = _tokenizer(files)
        self._files = dict(files)
        self.context_dim = int(made.config.hidden_size)
        self.pooled_dim = self.context_dim if self.has_pooled else 0

    def train(self, mode: bool = True) -> "Text":
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)


def files_of(folder: Path) -> dict[str, bytes]:
    """What of a folder of diffusers travels: the encoder's config and the tokenizer's files."""
    config, tokenizer = folder / "text_encoder" / "config.json", folder / "tokenizer"
    try:
        kept = {f"{TOKENIZER}{path.name}": path.read_bytes() for path in sorted(tokenizer.iterdir()) if path.is_file()}
        return {CONFIG: config.read_bytes(), **kept}
    except OSError as error:
        raise CheckpointError(
            "a text encoder or its tokenizer is missing",
            where=str(folder),
            seen=str(error),
            fix="a folder with text_encoder/ and tokenizer/",
        ) from None


def _tokenizer(files: Mapping[str, bytes]) -> Any:
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            if name.startswith(TOKENIZER):
                (Path(place) / name.removeprefix(TOKENIZER)).write_bytes(data)
        try:
            return _library("CLIPTokenizer").from_pretrained(place)
        except (OSError, ValueError, TypeError) as error:
            seen = str(error).splitlines()[0]
            raise CheckpointError("a tokenizer cannot be read", where=f"{TOKENIZER}*", seen=seen) from None


def _inside(model: Any) -> Any:
    """The transformer itself: older versions of the library wrap it once more."""
    return getattr(model, "text_model", model)


def _library(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MachineError(
            "a text encoder needs the library transformers",
            where="model.conditioner",
            seen=str(error),
            fix="pip install transformers",
        ) from None
    return getattr(transformers, name)
