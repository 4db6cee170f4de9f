"""Which layers an adapter is trained on: attention and feed-forward layers unless said, by name in any layout."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sfumato.adapters.parts import Part
from sfumato.errors import ConfigError, nearest
from sfumato.io.keymap import OURS, some

# The last part of a layer's name, ours and transformers'
ATTENTION = {"q", "k", "v", "kv", "qkv", "extra", "out", "o", "q_proj", "k_proj", "v_proj", "out_proj"}
FEED = {"up", "down", "gated", "last", "fc1", "fc2", "wi", "wi_0", "wi_1", "wo"}
GROUPS = ("attention", "feedforward", "linear", "conv")
DEFAULT = ("attention", "feedforward")
# What is called like a layer of a block, and stands at an end of the network
ENDS = ("head.", "exit", "entry")


def chosen(part: Part, patterns: Sequence[str]) -> list[str]:
    """Our names of the layers of a part that any of the patterns means.

    A pattern is a group ("attention", "feedforward", "linear", "conv"), the end of a name in any layout ("to_q",
    "cross.k"), or such a name with "*" in it ("*.attn2.to_*"). Each must mean a layer: ConfigError.
    """
    found: list[str] = []
    names = _names(part)
    for pattern in patterns:
        here = [name for name in part.shapes if _meant(name, names[name], part.shapes[name], pattern)]
        if not here and pattern not in GROUPS:
            ends = {name.rpartition(".")[2] for every in names.values() for name in every}
            raise ConfigError(
                f"no layer of {part.home} has such a name",
                where="lora.targets",
                seen=pattern,
                fix=f"{nearest(pattern, ends)}, or {', '.join(GROUPS)}",
            )
        found += here
    if not found:
        raise ConfigError(
            f"nothing of {part.home} is to be trained",
            where="lora.targets",
            seen=some(patterns),
            fix="lora.targets=[linear]",
        )
    return list(dict.fromkeys(found))


def _names(part: Part) -> dict[str, list[str]]:
    """What each layer is called in all layouts."""
    names = {name: [name] for name in part.shapes}
    for line in part.lines:
        for layout, theirs in line.names.items():
            own = line.names[OURS]
            if layout != OURS and len(theirs) == len(own):
                for name, there in zip(own, theirs, strict=True):
                    names[name].append(there)
    return names


def _meant(name: str, names: Iterable[str], shape: tuple[int, ...], pattern: str) -> bool:
    last, linear = name.rpartition(".")[2], len(shape) == 2
    if pattern == "linear":
        return linear
    if pattern == "conv":
        return not linear
    if pattern in GROUPS:
        inner = linear and "." in name and not name.startswith(ENDS)
        return inner and last in (ATTENTION if pattern == "attention" else FEED)
    if "*" in pattern:
        return any(fnmatchcase(one, pattern) for one in names)
    return any(one == pattern or one.endswith(f".{pattern}") for one in names)
