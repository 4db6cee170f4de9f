"""What others call the tensors of an adapter: from the keys of a file to layers with their factors.

A key is the name of a layer and what of it a tensor is. Dialects differ in both: `lora_A` and `lora_B` (peft),
`lora.down` and `lora.up` or `processor.to_q_lora.down` (diffusers before), `lora_down`, `lora_up`, `alpha` and
`dora_scale` after a name with underscores (kohya), `processor.qkv_lora1.down` (XLabs), `hada_` and `lokr_` (LyCORIS).
Here the second half is understood; whose names the first half are is for the tables to say (`adapters.reading`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters import lycoris
from sfumato.adapters.factors import Factors
from sfumato.errors import CheckpointError
from sfumato.io.keymap import some

PEFT = "base_model.model."
HEADER = "lora_adapter_metadata"  # where diffusers keeps what is in peft's adapter_config.json

# What a tensor is, by how its key ends; the rest is the layer. Tried in this order.
_ENDS = (
    (r"\.lora_A(?:\.[^.]+)?\.weight", "down"),
    (r"\.lora_B(?:\.[^.]+)?\.weight", "up"),
    (r"\.lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?", "magnitude"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|\.lora_linear_layer)?\.down\.weight", "down"),
    (r"(?:\.lora|\.lora_linear_layer)?\.up\.weight", "up"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.alpha", "alpha"),
    *((rf"\.{name}", name) for name in lycoris.LEAVES),
)
_KEY = [(re.compile(f"(.+?){end}"), leaf) for end, leaf in _ENDS]
# Layers by the names of diffusers' attention processors, as they were: attn1.processor.to_out_lora is attn1.to_out.0
_PROCESSOR = re.compile(r"(.+)\.processor\.((?:to|add)_\w+?)_lora")
_SELF_ATTENTION = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)_lora")
# XLabs': layers of the original FLUX, but for the fused ones of single blocks, of which they are a part
_XLABS = re.compile(r"(?:diffusion_model\.)?((double|single)_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)")

Layers = dict[str, dict[str, Tensor]]


def layers_in(state: Mapping[str, Tensor], where: str) -> Layers:
    """The tensors of a file by layer, and by what they are. CheckpointError lists keys that are none of an adapter."""
    found: Layers = {}
    odd = []
    for key, value in state.items():
        for pattern, leaf in _KEY:
            if match := pattern.fullmatch(key):
                found.setdefault(_modern(match[1].removeprefix(PEFT)), {})[leaf] = value
                break
        else:
            odd.append(key)
    if odd or not found:
        what = f"{len(odd)} keys are none of an adapter" if odd else "no adapter"
        fix = "a LoRA, LoHa or LoKr of a network or a text encoder"
        raise CheckpointError(what, where=where, seen=some(odd) or "nothing", fix=fix)
    return found


def _modern(layer: str) -> str:
    """A layer's name without what was said of the module that once did the adapter's work."""
    if match := _PROCESSOR.fullmatch(layer):
        return f"{match[1]}.{'to_out.0' if match[2] == 'to_out' else match[2]}"
    if match := _SELF_ATTENTION.fullmatch(layer):
        return f"{match[1]}.{match[2]}_proj"
    return layer


def of_xlabs(layer: str) -> str | None:
    """The layer of the original that one of XLabs' is, or is the first rows of; None for names of others."""
    match = _XLABS.fullmatch(layer)
    if match is None:
        return None
    block, kind, what, stream = match.groups()
    if kind == "single":
        return f"{block}.linear1" if what == "qkv" else f"{block}.linear2"
    return f"{block}.{'txt' if stream == '2' else 'img'}_attn.{what}"


def factors_of(leaves: Mapping[str, Tensor], shape: tuple[int, ...], alpha: float | None, where: str) -> Factors:
    """The factors of one layer. shape: of its weight. alpha: of a description, where the file has no tensor of it."""
    if any(name in leaves for name in lycoris.LEAVES):
        return lycoris.factors_of({**leaves, **_length(leaves, where)}, shape, where)
    if missing := [name for name in ("down", "up") if name not in leaves]:
        seen = f"{', '.join(sorted(leaves))}, and no {' and no '.join(missing)}"
        raise CheckpointError("a half of an adapter's layer is missing", where=where, seen=seen, fix="a whole file")
    down, up = leaves["down"], leaves["up"].flatten(1)
    if "mid" in leaves:  # LoCon's: the kernel between two convolutions of 1x1
        down = torch.einsum("ij...,jk->ik...", leaves["mid"], down.flatten(1))
    if "alpha" in leaves:
        alpha = float(leaves["alpha"])
    length = _length(leaves, where)
    return Factors(down, up, float(len(down)) if alpha is None else alpha, length.get("magnitude"))


def _length(leaves: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """DoRA's magnitude, one number a row: peft's (out,) or (1, out, 1, 1), kohya's (out, 1) or (out, 1, 1, 1)."""
    if "magnitude" in leaves:
        return {"magnitude": leaves["magnitude"].flatten()}
    if "dora_scale" not in leaves:
        return {}
    lengths = leaves["dora_scale"]
    if lengths.shape[0] != lengths.numel():
        what, fix = "a DoRA whose lengths are those of columns", "one with a length for each output (wd_on_out)"
        raise CheckpointError(what, where=where, seen=str(tuple(lengths.shape)), fix=fix)
    return {"magnitude": lengths.flatten()}


def alphas(config: Mapping[str, Any], layers: Iterable[str], ranks: Mapping[str, int]) -> dict[str, float]:
    """The alpha of each layer that peft's description gives. A rank-stabilised one (rsLoRA) is said in plain terms."""
    found = {}
    for layer in layers:
        patterns = dict(config.get("alpha_pattern") or {})
        key = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", layer)), None)
        alpha = patterns[key] if key is not None else config.get("lora_alpha")
        if alpha is not None:
            found[layer] = float(alpha) * (ranks[layer] ** 0.5 if config.get("use_rslora") else 1.0)
    return found


def dialect_of(keys: Iterable[str]) -> str:
    """What the names of a file's tensors are called, for people."""
    known = list(keys)

    def some_are(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in known)

    marks = (
        ("LyCORIS", r"\.(hada|lokr)_|\.diff$"),
        ("XLabs", r"\.processor\.(qkv|proj)_lora[12]?\."),
        ("peft", rf"^{re.escape(PEFT)}"),
        ("OneTrainer", r"^lora_transformer_|^lora_prior_unet_"),
        ("kohya", r"^lora_(unet|te\d?|net|conditioner)_"),
        ("ComfyUI", r"^(diffusion_model|text_encoders)\."),
        ("diffusers, old", r"\.lora\.down\.|_lora\.down\.|lora_linear_layer"),
        ("diffusers", r"\.lora_A\."),
    )
    return next((name for name, pattern in marks if some_are(pattern)), "unknown")
