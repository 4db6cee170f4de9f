"""Samplers are coroutines: written as the paper writes them, and where the paper evaluates the model they ask.

A sampler is a generator function `fn(path, x, times, *, options)`. It yields an `Ask` for E[x0 | x_t], or a `Draw` for
a random state, is sent the answer, and returns the state at the last time. It holds no network, no condition, no device
and no random state, and it never enters `no_grad`: all that belongs to whoever drives it. So `sample` shows every step,
`drive_many` answers any number of running samplers with one forward, and a test answers with an exact solution.
"""

from sfumato.samplers.core import Ask, Draw, Noise, SamplerFn, SeededNoise, Step, Table
from sfumato.samplers.drive import Job, Together, drive, drive_many, sample

__all__ = [
    "Ask",
    "Draw",
    "Job",
    "Noise",
    "SamplerFn",
    "SeededNoise",
    "Step",
    "Table",
    "Together",
    "drive",
    "drive_many",
    "sample",
]
