"""sfumato: train, fine-tune, sample and evaluate diffusion models.

`import sfumato` is cheap; the names below load what they need, torch included, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfumato.overlay import load_config as load_config
    from sfumato.pipeline import Pipeline as Pipeline
    from sfumato.pipeline import Samples as Samples
    from sfumato.pipeline import load as load
    from sfumato.stream import Stream as Stream
    from sfumato.train import train as train

_HOMES = {
    "Pipeline": "sfumato.pipeline",
    "Samples": "sfumato.pipeline",
    "Stream": "sfumato.stream",
    "load": "sfumato.pipeline",
    "load_config": "sfumato.overlay",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("sfumato.train")  # a package, and a function: what the import itself leaves here
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, "train", "__version__"])
