"""Prompts learned from nothing: a vocabulary of the captions' words and a small transformer, trained with the network.

No published encoder has to be there, and on small vocabularies none is better: the words are those of the data, each
with a vector of its own, read together by a few blocks. What was trained on them travels in the model directory.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sfumato.conditioners import Conditioner, Raw, Source, captions_of, told_of_cuts
from sfumato.denoiser import Cond
from sfumato.errors import CheckpointError, ConfigError, DataError, nearest
from sfumato.nets.layers import Attention, FeedForward

PAD, UNKNOWN = "[pad]", "[unknown]"


class Prompts(Conditioner):
    """Captions through a word-level tokenizer and a small transformer, learned with the network from nothing.

    Cond: context (B, length, dim), one vector a word, and pooled (B, dim), the mean over them. Shorter captions are
    filled with a padding word that is attended to like any other, so there is no mask and shapes never change; the null
    condition is nothing but padding. length: words read; vocabulary: most words kept, the most frequent ones (two
    places go to padding and to unknown words).
    """

    def __init__(
        self,
        dim: int = 256,
        depth: int = 2,
        heads: int = 4,
        length: int = 16,
        vocabulary: int = 8192,
        pooled: bool = True,
        field: str = "caption",
    ) -> None:
        super().__init__()
        least = {"dim": (dim, 1), "heads": (heads, 1), "length": (length, 1), "vocabulary": (vocabulary, 3)}
        for name, (given, low) in least.items():
            if given < low:
                raise ConfigError(f"{name} is at least {low}", where=f"model.conditioner.{name}", seen=str(given))
        if dim % heads:
            raise ConfigError(
                "the width does not divide into the heads",
                where="model.conditioner.heads",
                seen=f"dim {dim}, heads {heads}",
            )
        self.fields, self.field, self.length, self.vocabulary = (field,), field, length, vocabulary
        self.context_dim, self.pooled_dim = dim, dim if pooled else 0
        self.words: dict[str, int] = {}
        self.tokenizer = _tokenizer({PAD: 0, UNKNOWN: 1})
        self.table = nn.Embedding(2, dim)
        # as loud as the words: order tells what is left of what
        self.place = nn.Parameter(torch.randn(length, dim) / 2)
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, raw: Sequence[Raw]) -> Cond:
        x = self.table(self.tokens(raw)) + self.place
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"context": x, "pooled": x.mean(1)} if self.pooled_dim else {"context": x}

    def tokens(self, raw: Sequence[Raw]) -> Tensor:
        """Word numbers (B, length), padded with 0, on the conditioner's device."""
        texts = [str(one.get(self.field) or "") for one in raw]
        rows = [encoded.ids[: self.length] for encoded in self.tokenizer.encode_batch(texts)]
        padded = [row + [0] * (self.length - len(row)) for row in rows]
        return torch.tensor(padded, device=self.table.weight.device)

    def check(self, raw: Sequence[Raw]) -> None:
        for text in captions_of(raw, self.field):
            encoded = self.tokenizer.encode(text)
            for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
                if number == 1:
                    word = text[start:end]
                    raise DataError(
                        "a word this model has never seen",
                        where=f"prompt {text!r}",
                        seen=word,
                        fix=nearest(word, self.words.keys() - {PAD, UNKNOWN}),
                    )
            if len(encoded.ids) > self.length:
                raise DataError(
                    "a prompt longer than this model reads",
                    where=f"prompt {text!r}",
                    seen=f"{len(encoded.ids)} words",
                    fix=f"at most {self.length} words",
                )

    def prepare(self, source: Source) -> None:
        splitter, counts, lengths = _tokenizer({PAD: 0, UNKNOWN: 1}), Counter[str](), Counter[int]()
        for caption in source.captions():
            text = splitter.normalizer.normalize_str(caption)
            words = [word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text)]
            counts.update(words)
            lengths[len(words)] += 1
        if not counts:
            raise DataError(
                "the data has no captions to learn words from",
                where="model.conditioner",
                seen=type(source).__name__,
                fix="put a picture.txt beside every picture.png",
            )
        by_count = sorted(counts, key=lambda word: (-counts[word], word))  # of equals, not whichever came first
        kept = sorted(by_count[: self.vocabulary - 2])
        self.notes = told_of_cuts(lengths, self.length)
        if dropped := len(counts) - len(kept):
            rare = f"the {dropped:,} rarest words are unknown to this model"
            self.notes += (f"{rare}; to keep more: model.conditioner.vocabulary",)
        self._adopt({PAD: 0, UNKNOWN: 1} | {word: i + 2 for i, word in enumerate(kept)})

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer.to_str(pretty=True).encode()}

    def restore(self, files: Mapping[str, bytes]) -> None:
        from tokenizers import Tokenizer

        kept = files["tokenizer.json"]
        try:
            words = Tokenizer.from_str(kept.decode()).get_vocab()
        except Exception as error:  # the library's own word for what it cannot read
            raise CheckpointError("a vocabulary cannot be read", where="tokenizer.json", seen=str(error)) from None
        if sorted(words.values()) != list(range(len(words))) or (words.get(PAD), words.get(UNKNOWN)) != (0, 1):
            raise CheckpointError(
                "a vocabulary does not count its words from 0",
                where="tokenizer.json",
                seen=f"{len(words)} words",
                fix=f"{PAD} is 0, {UNKNOWN} is 1, and no number is left out",
            )
        self._adopt(words)

    def _adopt(self, words: dict[str, int]) -> None:
        self.words, self.tokenizer = words, _tokenizer(words)
        self.table = nn.Embedding(len(words), self.context_dim, device=self.table.weight.device)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block over (B, L, dim), with a short convolution before it: an adjective stands beside its
    noun, and a model should not have to discover that.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.nearby = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.feed = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.nearby(x.mT).mT
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed(self.norm2(x))
        return out


def _tokenizer(words: dict[str, int]):  # type: ignore[no-untyped-def]  # the library is typed, its attributes are not
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import NFKC, Lowercase, Sequence
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = Sequence([NFKC(), Lowercase()])
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer
