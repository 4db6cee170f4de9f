"""A CLIP text encoder of a few weights, and a tokenizer of its kind that knows letters and some words."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "red", "circle", "left", "of", "blue", "square"]


def tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP's kind that knows letters and a few words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    pieces, merges = list(dict.fromkeys(pieces)), list(dict.fromkeys(merges))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    import transformers

    made = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    return made


def encoder(layers: int = 2, *, projected: int = 0, width: int = 12, seed: int = 4, **options: Any) -> Any:
    """A text encoder for that tokenizer, every weight random. projected: the width of its projection, if any."""
    import transformers

    words = 2 * 26 + 2 + len({piece for word in WORDS for piece in _prefixes(word)})
    said = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "max_position_embeddings": 16,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
        "projection_dim": projected or 512,
    }
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomised(kind(transformers.CLIPTextConfig(**{**said, **options})), seed)


def _prefixes(word: str) -> list[str]:
    parts = [*word[:-1], f"{word[-1]}</w>"]
    return ["".join(parts[: i + 1]) for i in range(1, len(parts))]


def randomised(net: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.15 if p.ndim > 1 else 0.4))
    return net.eval()
