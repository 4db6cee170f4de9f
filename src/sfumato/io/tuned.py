"""Samplers that were tuned for a model, as small files beside it: `samplers/8.json` holds that of 8 steps.

They belong to the weights they were tuned for: training on writes the model directory anew, without them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato import files
from sfumato.errors import CheckpointError

FORMAT, VERSION = "sfumato-sampler", 1


def save_tuned(folder: Path, steps: int, slots: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Writes the sampler of so many steps into a model directory, over an older one; the path.

    slots: `sampler` and `grid`, as in a configuration. facts: what is known of it, kept as it is.
    """
    place = Path(folder) / "samplers"
    place.mkdir(exist_ok=True)
    path = place / f"{steps}.json"
    said = {"format": FORMAT, "version": VERSION, "steps": steps, **slots, "facts": dict(facts)}
    files.write_atomic(path, json.dumps(said, indent=1) + "\n")
    return path


def read_tuned(folder: Path) -> dict[int, dict[str, Any]]:
    """The slots of a model directory's tuned samplers, by number of steps. CheckpointError for one that is none."""
    found = {}
    for path in sorted((Path(folder) / "samplers").glob("*.json")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if (said["format"], said["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {said['format']!r}, version {said['version']!r}")
            found[int(said["steps"])] = {"sampler": said["sampler"], "grid": said["grid"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "a tuned sampler cannot be read", where=str(path), seen=str(error), fix=f"rm {path}"
            ) from None
    return found
