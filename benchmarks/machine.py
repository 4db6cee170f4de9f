"""Where a benchmark's numbers come from, to be kept beside them."""

from sfumato.train.timing import machine

__all__ = ["machine"]
