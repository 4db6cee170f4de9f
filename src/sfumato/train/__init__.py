"""Training: `train(config, run=...)` makes a run directory that is complete, explains itself, and can be
resumed bit for bit.

`sfumato.train(...)` is the same: this package can be called, because Python puts it where the function would be.
"""

import sys
from types import ModuleType
from typing import Any

from sfumato.train.loop import train

__all__ = ["train"]


class _Callable(ModuleType):
    """A package that is called like the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
