"""One published text encoder as a conditioner: CLIP's, T5's, or any language model's hidden states.

The prompt is cut into pieces of words, filled up to a fixed length, and read by a frozen transformer; the states of its
last layer, or of some before it, are what the network attends to. Stable Diffusion takes CLIP's (Rombach et al. 2022),
the last ones or those of the layer before; Imagen showed that a text-only T5 does as well (Saharia et al. 2022); newer
models read several layers of a language model at once. Published models that mask nothing attend to the filling, too.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import Conditioner, Raw, Source, captions_of, told_of_cuts
from sfumato.denoiser import MASK, Cond
from sfumato.errors import ConfigError, DataError, nearest
from sfumato.hub import located
from sfumato.text import library
from sfumato.text.emphasis import emphasised, of_pieces, weighed
from sfumato.text.library import CLIP, PROJECTED

CHANGES = ("emphasis", "chunks", "skip", "length")  # options that may be others at each loading


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
    silent: with `masked`, of a prompt that is not said no word counts, rather than the end of the empty one; for
    networks with a caption of their own for that.
    template: what the prompt is put into, at "{}"; drop: its first pieces, read but not given to the network.
    lower: in lower case, without space at either end. field: the raw field that is read. apart: a field that is read in
    its place where it is there: a prompt for this one of several encoders.
    emphasis: whether `(word:1.2)` and `[word]` weigh words, see `sfumato.text.emphasis`, or are read as they stand.
    chunks: of CLIP, the most windows of `length` that a long prompt is cut into; their states follow one another, and
    context_mask tells the windows that there are (begin and end in each; pooled is the first one's).
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
        silent: bool = False,
        template: str = "{}",
        drop: int = 0,
        lower: bool = False,
        field: str = "caption",
        apart: str | None = None,
        emphasis: bool = False,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        _checked(length, skip, layers, template, drop, chunks)
        self.weights, self.part, self.length, self.field, self.apart = weights, part, length, field, apart
        self.skip, self.normed, self.layers = skip, normed, tuple(layers)
        self.masked, self.template, self.drop, self.lower = masked, template, drop, lower
        if silent and not masked:
            fix = "model.conditioner.masked=true"
            raise ConfigError("silence is told by the mask", where="model.conditioner.silent", seen="no mask", fix=fix)
        self.silent = silent
        self.fields = (field,) if apart is None else (field, apart)
        self.has_pooled, self.emphasis, self.chunks = pooled, emphasis, chunks
        self.kind = ""  # the class of transformers
        self.encoder: Any = None
        self.tokenizer: Any = None
        self._files: dict[str, bytes] = {}

    def forward(self, raw: Sequence[Raw]) -> Cond:
        read = self._read(raw)
        deep = bool(self.skip or self.layers)
        mask = read.mask if self.masked else None
        with self._arithmetic():
            said = self.encoder(input_ids=read.ids, attention_mask=mask, output_hidden_states=deep)
            states = self._states(said)[:, self.drop :]
        if read.weights is not None:
            states = emphasised(states, read.weights[:, self.drop :])
        cond = {"context": states.unflatten(0, (-1, self.chunks)).flatten(1, 2)}
        if self.has_pooled:
            cond["pooled"] = (said.text_embeds if self.kind == PROJECTED else said.pooler_output)[:: self.chunks]
        if self.chunks > 1:
            cond[MASK] = read.there.repeat_interleave(self.length, 1)
        elif self.masked:
            cond[MASK] = read.mask[:, self.drop :].bool()
            if self.silent:
                said_ = [self.said(one) is not None for one in raw]
                cond[MASK] = cond[MASK] & torch.tensor(said_, device=read.mask.device)[:, None]
        return cond

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """All but CLIP's overflow in fp16; bf16 has the range."""
        device = next(self.encoder.parameters()).device.type
        if self.is_clip or not torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        if torch.get_autocast_dtype(device) != torch.float16:
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

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
        """Numbers of pieces (B * chunks, drop + length), on the encoder's device."""
        return self._read(raw).ids

    def _read(self, raw: Sequence[Raw]) -> "Read":
        texts, weights = [], []
        for one in raw:
            text, each = self._told(str(self.said(one) or ""))
            texts.append(text)
            weights.append(each)
        options: dict[str, Any] = {"return_offsets_mapping": True} if self.emphasis else {}
        if self.chunks > 1:
            told = self._windows(self.tokenizer(texts, add_special_tokens=False, verbose=False, **options))
        else:
            most = self.drop + self.length
            told = dict(self.tokenizer(texts, padding="max_length", max_length=most, truncation=True, **options))
        scales = None
        if self.emphasis:
            shift, n = self.template.index("{}"), self.chunks
            scales = [of_pieces(spans, weights[i // n], shift) for i, spans in enumerate(told["offset_mapping"])]
        device = next(self.encoder.parameters()).device
        there = torch.tensor(told.get("there", [[True]] * len(raw)), device=device)
        ids, mask = (torch.tensor(told[name], device=device) for name in ("input_ids", "attention_mask"))
        return Read(ids, mask, there, None if scales is None else torch.tensor(scales, device=device))

    def _windows(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """The pieces of prompts dealt out to `chunks` windows each, with a begin and an end in every one."""
        inside, words = self.length - 2, self.tokenizer
        out: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "offset_mapping": [], "there": []}
        for row, ids in enumerate(told["input_ids"]):
            spans = told["offset_mapping"][row] if self.emphasis else [(0, 0)] * len(ids)
            count = min(self.chunks, max(1, -(-len(ids) // inside)))
            out["there"].append([i < count for i in range(self.chunks)])
            for i in range(self.chunks):
                cut = slice(i * inside, (i + 1) * inside)
                kept, rest = ids[cut], inside - len(ids[cut])
                out["input_ids"].append([words.bos_token_id, *kept, words.eos_token_id] + [words.pad_token_id] * rest)
                out["attention_mask"].append([1] * (len(kept) + 2) + [0] * rest)
                out["offset_mapping"].append([(0, 0), *spans[cut], (0, 0)] + [(0, 0)] * rest)
        return out

    def _told(self, text: str) -> tuple[str, list[float]]:
        """The prompt as the tokenizer gets it, and the weights of the prompt's characters."""
        text = text.lower().strip() if self.lower else text
        text, weights = weighed(text) if self.emphasis else (text, [])
        return self.template.replace("{}", text), weights

    def counted(self, text: str) -> int:
        """The pieces of a prompt that the network would be given if there were room for all."""
        return len(self.tokenizer(self._told(text)[0], verbose=False).input_ids) - self.drop

    @property
    def most(self) -> int:
        """How many pieces of a prompt there is room for, one begin and one end included."""
        return self.length if self.chunks == 1 else self.chunks * (self.length - 2) + 2

    def change(self, **options: Any) -> None:
        """Other options than it was made with: emphasis, chunks, skip, length. ConfigError for others, and for what
        this encoder has not.
        """
        if unknown := sorted(options.keys() - set(CHANGES)):
            raise ConfigError("no such option", where="text", seen=unknown[0], fix=nearest(unknown[0], CHANGES))
        new = {name: getattr(self, name) for name in CHANGES} | options
        if odd := [name for name, value in new.items() if not is_of(value, bool if name == "emphasis" else int)]:
            raise ConfigError("an option of another kind", where=f"text.{odd[0]}", seen=repr(new[odd[0]]))
        _checked(new["length"], new["skip"], self.layers, self.template, self.drop, new["chunks"])
        self._fits(new["skip"], new["chunks"], new["length"])
        for name, value in options.items():
            setattr(self, name, value)

    def _fits(self, skip: int, chunks: int, length: int) -> None:
        """Raises ConfigError for what only CLIP can, and for what this one cannot."""
        clip, config = self.is_clip, self.encoder.config
        asked = {"pooled": self.has_pooled, "skip": skip, "chunks": chunks > 1}
        if not clip and any(asked.values()):
            seen = f"{self.kind}, asked for {next(name for name, wanted in asked.items() if wanted)}"
            fix = "layers=[-2] takes earlier layers of any, and length=512 more words"
            raise ConfigError("only CLIP's encoders can do that", where="model.conditioner", seen=seen, fix=fix)
        if clip and (length > config.max_position_embeddings or skip >= config.num_hidden_layers):
            seen = f"length {length} of {config.max_position_embeddings}, skip {skip} of {config.num_hidden_layers}"
            raise ConfigError("a text encoder has no more than it has", where="model.conditioner", seen=seen)

    def said(self, one: Raw) -> Any:
        """What it reads of a raw condition; None where nothing is said."""
        told = None if self.apart is None else one.get(self.apart)
        return one.get(self.field) if told is None else told

    @property
    def is_clip(self) -> bool:
        """Whether it is one of CLIP's, with or without a projection."""
        return self.kind in (CLIP, PROJECTED)

    def check(self, raw: Sequence[Raw]) -> None:
        for text in captions_of([{self.field: self.said(one)} for one in raw], self.field):
            if (pieces := self.counted(text)) > self.most:
                raise too_long(text, pieces, self.most)

    def prepare(self, source: Source) -> None:
        """Reads the encoder that `weights` names. Its vocabulary is its own; of the captions only the lengths count."""
        if self.weights is None:
            raise ConfigError(
                "a text encoder comes from a checkpoint",
                where="model.conditioner.weights",
                seen="nothing",
                fix="model.conditioner.weights=FOLDER, one of diffusers",
            )
        folder = located(self.weights, (self.part, library.tokenizer_of(self.part)))
        self.restore(library.files_of(folder, self.part))
        self.encoder.load_state_dict(library.pretrained(folder, self.part, self.kind))
        self.notes = told_of_cuts(Counter(self.counted(caption) for caption in source.captions()), self.most)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Takes its own of files that may be those of several encoders."""
        mine = (library.config_name(self.part), library.tokenizer_prefix(self.part))
        self.kind, made = library.built(files, self.part)
        self.encoder = made.requires_grad_(False).eval()
        self._fits(self.skip, self.chunks, self.length)
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


@dataclass(frozen=True)
class Read:
    """Prompts cut into pieces, a window a row: numbers, which of them are the prompt's, which windows are there (B,
    chunks), and how much each piece weighs, if that is told.
    """

    ids: Tensor
    mask: Tensor
    there: Tensor
    weights: Tensor | None


def is_of(value: object, kind: type) -> bool:
    """Whether a value is of a kind, where a truth is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _checked(length: int, skip: int, layers: Sequence[int], template: str, drop: int, chunks: int) -> None:
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
    if chunks < 1:
        raise ConfigError("a prompt has at least one window", where=f"{where}.chunks", seen=str(chunks), fix="chunks=1")
    if chunks > 1 and (drop or template != "{}"):
        raise ConfigError("a template has one window", where=f"{where}.chunks", seen=str(chunks), fix="chunks=1")
    if drop < 0:
        raise ConfigError("a number of pieces is not negative", where=f"{where}.drop", seen=str(drop))
