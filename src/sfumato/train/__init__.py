"""Training: `train(config, run=...)` makes a run directory that is complete, explains itself, and can be
resumed bit for bit.
"""

from sfumato.train.loop import train

__all__ = ["train"]
