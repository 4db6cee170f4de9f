"""One published text encoder as a conditioner: CLIP's, T5's, or any language model's hidden states.

The prompt is cut into pieces of words, filled up to a fixed length, and read by a frozen transformer; the states of its
last layer, or of some before it, are what the network attends to. Stable Diffusion takes CLIP's (Rombach et al. 2022),
the last ones or those of the layer before; Imagen showed that a text-only T5 does as well (Saharia et al. 2022); newer
models read several layers of a language model at once. Published models that mask nothing attend to the filling, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import Conditioner, Raw, Source, captions_of, told_of_cuts
from sfumato.denoiser import MASK, Cond
from sfumato.errors import ConfigError, DataError
from sfumato.text import library
from sfumato.text.library import CLIP, PROJECTED


class Text(Conditioner):
    """Captions through a text encoder. Cond: context (B, length, width); pooled (B, width) and context_mask (B, length)
    where they are asked for. The null condition is the empty prompt.

    weights: a folder of diffusers with the encoder and its tokenizer, to train with; a published model brings its own.
    part: which of its encoders: "text_encoder" with "tokenizer", "text_encoder_2" with "tokenizer_2", and so on.
    length: pieces of words given to the network, begin and end included.
    skip: of CLIP, layers before the last whose states are taken; their final norm is applied if `normed`.
    layers: the hidden states to take instead, side by side in channels; 0 is the embedding, -1 the last layer.
    pooled: also gives CLIP's state at the end of the prompt, projected where the encoder has a projection.
    masked: what fills up is hidden from the encoder, and from the network by `context_mask`.
    template: what the prompt is put into, at "{}"; drop: its first pieces, read but not given to the network.
    lower: in lower case, without space at either end. field: the raw field that is read.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        part: str = "text_encoder",
        length: int = 77,
        skip: int = 0,
        normed: bool = True,
        layers: tuple[int, ...] = (),
        pooled: bool = False,
        masked: bool = False,
        template: str = "{}",
        drop: int = 0,
        lower: bool = False,
        field: str = "caption",
    ) -> None:
        super().__init__()
        _checked(length, skip, layers, template, drop)
        self.weights, self.part, self.length, self.field = weights, part, length, field
        self.skip, self.normed, self.layers = skip, normed, tuple(layers)
        self.masked, self.template, self.drop, self.lower = masked, template, drop, lower
        self.fields, self.has_pooled = (field,), pooled
        self.kind = ""  # the class of transformers
        self.encoder: Any = None
        self.tokenizer: Any = None
        self._files: dict[str, bytes] = {}

    def forward(self, raw: Sequence[Raw]) -> Cond:
        ids, mask = self._pieces(raw)
        deep = bool(self.skip or self.layers)
        said = self.encoder(input_ids=ids, attention_mask=mask if self.masked else None, output_hidden_states=deep)
        cond = {"context": self._states(said)[:, self.drop :]}
        if self.has_pooled:
            cond["pooled"] = said.text_embeds if self.kind == PROJECTED else said.pooler_output
        return cond | ({MASK: mask[:, self.drop :].bool()} if self.masked else {})

    def _states(self, said: Any) -> Tensor:
        """What the network attends to, of all that the encoder said."""
        if self.layers:
            return torch.cat([said.hidden_states[i] for i in self.layers], -1)
        states: Tensor = said.hidden_states[-1 - self.skip] if self.skip else said.last_hidden_state
        if self.skip and self.normed:
            whole = self.encoder.text_model if self.kind == PROJECTED else self.encoder
            states = whole.final_layer_norm(states)
        return states

    def tokens(self, raw: Sequence[Raw]) -> Tensor:
        """Numbers of pieces (B, drop + length), on the encoder's device."""
        return self._pieces(raw)[0]

    def _pieces(self, raw: Sequence[Raw]) -> tuple[Tensor, Tensor]:
        """The numbers of pieces, and which of them are of the prompt."""
        texts = [self._told(str(one.get(self.field) or "")) for one in raw]
        most = self.drop + self.length
        told = self.tokenizer(texts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        return told.input_ids.to(device), told.attention_mask.to(device)

    def _told(self, text: str) -> str:
        """The prompt as the tokenizer gets it."""
        return self.template.replace("{}", text.lower().strip() if self.lower else text)

    def counted(self, text: str) -> int:
        """The pieces of a prompt that the network would be given if there were room for all."""
        return len(self.tokenizer(self._told(text)).input_ids) - self.drop

    def check(self, raw: Sequence[Raw]) -> None:
        for text in captions_of(raw, self.field):
            if (pieces := self.counted(text)) > self.length:
                raise too_long(text, pieces, self.length)

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
        self.restore(library.files_of(folder, self.part))
        self.encoder.load_state_dict(library.pretrained(folder, self.part, self.kind))
        self.notes = told_of_cuts(Counter(self.counted(caption) for caption in source.captions()), self.length)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Takes its own of files that may be those of several encoders."""
        mine = (library.config_name(self.part), library.tokenizer_prefix(self.part))
        self.kind, made = library.built(files, self.part)
        if self.kind not in (CLIP, PROJECTED) and (self.has_pooled or self.skip):
            seen = f"{self.kind}, asked for {'pooled' if self.has_pooled else 'skip'}"
            fix = "layers=[-2] takes earlier layers of any"
            raise ConfigError("only CLIP's encoders can do that", where="model.conditioner", seen=seen, fix=fix)
        self.encoder = made.requires_grad_(False).eval()
        self.tokenizer = library.tokenizer(files, self.part, self.kind)
        if self.drop:
            self.tokenizer.padding_side = "right"
        self._files = {name: data for name, data in files.items() if name.startswith(mine)}
        config = made.config
        self.context_dim = int(config.hidden_size) * max(1, len(self.layers))
        wide = config.projection_dim if self.kind == PROJECTED else config.hidden_size
        self.pooled_dim = int(wide) if self.has_pooled else 0

    def train(self, mode: bool = True) -> "Text":
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)


def too_long(text: str, pieces: int, most: int) -> DataError:
    """What to raise for a prompt that would be cut."""
    return DataError(
        "a prompt longer than this model reads",
        where=f"prompt {text[:60]!r}",
        seen=f"{pieces} pieces of words, begin and end included",
        fix=f"at most {most}",
    )


def _checked(length: int, skip: int, layers: Sequence[int], template: str, drop: int) -> None:
    where = "model.conditioner"
    if length < 3:
        raise ConfigError("a prompt has a begin, a word and an end", where=f"{where}.length", seen=str(length))
    if skip < 0:
        raise ConfigError("layers are skipped from the last", where=f"{where}.skip", seen=str(skip))
    if skip and layers:
        raise ConfigError(
            "either some layers, or the one before the last", where=f"{where}.layers", seen=f"skip {skip}"
        )
    if template.count("{}") != 1:
        raise ConfigError("a template has one place for the prompt", where=f"{where}.template", seen=template, fix="{}")
    if drop < 0:
        raise ConfigError("a number of pieces is not negative", where=f"{where}.drop", seen=str(drop))
