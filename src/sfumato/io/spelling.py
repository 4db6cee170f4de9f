"""How a model's section was spelled before it became a folder of diffusers: there and back without a changed byte.

A slot can be written in several ways that mean the same ("eps" and {kind: eps}, an option at its default or left out,
in any order), and a reader of another layout knows one of them. So a folder that is written here keeps the spelling,
with a digest of the descriptions that it stands for: where somebody has changed those, they count and it does not.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.files import MANIFEST, digest
from sfumato.io.parts import INDEX, OWN, read_own, write_json
from sfumato.model import Model

# Slots without weights of their own, which mean the same wherever they are read; of others the reader's count.
PLAIN = ("path", "prediction", "time_input", "scale_input", "net")


def keep_spelling(folder: Path, model: Model) -> None:
    """Adds to what a folder of diffusers holds of ours, once all of its parts are written."""
    if (folder / INDEX).is_file():
        write_json(folder / OWN, {**read_own(folder), "model": model.spec["model"], "stands_for": _described(folder)})


def spelled(folder: Path, own: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """A model's section as it was spelled. own: of `read_own`. section: as a reader of the folder has it."""
    before = own.get("model")
    if not before or own.get("stands_for") != _described(folder) or not section.keys() <= before.keys():
        return dict(section)
    return {
        name: slot if name in PLAIN or _alike(slot, section.get(name, slot)) else section[name]
        for name, slot in before.items()
    }


def _alike(one: Any, other: Any) -> bool:
    """Whether two slots say the same, but for the order of options and for a kind alone."""
    return bool(_whole(one) == _whole(other))


def _whole(slot: Any) -> Any:
    return {"kind": slot} if isinstance(slot, str) else slot


def _described(folder: Path) -> str:
    """A digest of all descriptions in a folder but our own."""
    parts = [path for path in sorted(folder.rglob("*.json")) if path.name not in (OWN, MANIFEST)]
    said = "".join(f"{path.relative_to(folder).as_posix()} {digest(path)}\n" for path in parts)
    return hashlib.sha256(said.encode()).hexdigest()
