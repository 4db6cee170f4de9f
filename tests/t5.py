"""A T5 encoder of a few weights, and a tokenizer of its kind that knows letters and some words."""

from pathlib import Path
from typing import Any

from tests.clip import WORDS, randomised


def tokenizer(folder: Path) -> Any:
    """A tokenizer of T5's kind, as it comes back from its folder."""
    import transformers

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("().:,0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0 - i / 8) for i, word in enumerate(WORDS) if len(word) > 1]
    pieces += [(letter, -5.0 - i / 64) for i, letter in enumerate(letters)]
    transformers.T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return transformers.T5TokenizerFast.from_pretrained(folder)


def encoder(width: int = 32, seed: int = 5, distance: int = 12) -> Any:
    """An encoder for that tokenizer, every weight random."""
    import transformers

    config = transformers.T5Config(
        vocab_size=100,
        d_model=width,
        d_kv=5,
        d_ff=24,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=distance,
        feed_forward_proj="gated-gelu",
    )
    return randomised(transformers.T5EncoderModel(config), seed)
