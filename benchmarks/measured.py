"""What `sfumato recipes` tells of a recipe that was really trained: one file, and one that writes it."""

import json
from typing import Any

from sfumato.files import write_atomic
from sfumato.overlay import MEASURED


def write_measured(recipe: str, entry: dict[str, Any]) -> None:
    """Puts an entry beside the recipe, in place of any before. entry: score, low, high, images, machine, and where they
    are known held_out, steps, seconds, and metric, what the score is a share of where it is not the scene score.
    """
    kept = json.loads(MEASURED.read_text(encoding="utf-8"))
    kept[recipe] = entry
    write_atomic(MEASURED, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
