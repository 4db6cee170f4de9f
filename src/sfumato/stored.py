"""How the weights of a folder are stored: in which file, in which shards, and which of several copies is read.

diffusers and transformers keep the same weights under a few names, whole or in shards with an index, in full precision
and as the variants fp16 and bf16. One is read: the first of `NAMES`, in full precision if that is there. Whoever
fetches a folder fetches the same one.
"""

import re
from collections.abc import Collection

NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weights in a folder, before .safetensors and so on
VARIANTS = ("", ".fp16", ".bf16")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FILES = (*PICKLES, ".safetensors", ".sft")  # of weights
LORAS = ("pytorch_lora_weights.safetensors", "lora.safetensors", "pytorch_lora_weights.bin")  # of adapters in folders
PEFT = "adapter_config.json"  # of peft's folders, and beside it
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def chosen(names: Collection[str]) -> str | None:
    """Of the names of a folder's files the one to read: of weights, or of the index of their shards."""
    for name in NAMES:
        for variant in VARIANTS:
            for one in (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors"):
                if one in names:
                    return one
        if f"{name}.bin" in names:
            return f"{name}.bin"
    return None


def is_index(name: str) -> bool:
    """Whether a file is the index of shards."""
    return ".safetensors.index" in name and name.endswith(".json")


def shards(index: str, names: Collection[str]) -> list[str]:
    """Of the names of a folder's files the shards that an index is of, by their names alone."""
    stem, variant = index.removesuffix(".json").split(".safetensors.index")
    number = r"-\d+-of-\d+"
    known = (f"{re.escape(stem + variant)}{number}", f"{re.escape(stem)}{number}{re.escape(variant)}")
    return [one for one in names if any(re.fullmatch(f"{pattern}\\.safetensors", one) for pattern in known)]


def copies(names: Collection[str]) -> list[str]:
    """Of the names of a folder's files all that hold its weights, in whatever copy."""
    found = []
    for name in NAMES:
        plain = [f"{name}{end}" for end in (*(f"{one}.safetensors" for one in VARIANTS), ".bin")]
        indices = [f"{name}.safetensors.index{variant}.json" for variant in VARIANTS]
        found += [one for one in (*plain, *indices) if one in names]
        found += [one for index in indices for one in shards(index, names)]
    return list(dict.fromkeys(found))
