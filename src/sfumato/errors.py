"""What can go wrong, said so that it can be put right.

Every error that a user can cause is a `SfumatoError`: it says *what* went wrong, *where*, what was *seen*, and one
*fix* to paste. The class decides the exit code of the command line, so that scripts can tell a typing slip (2) from
a missing library (3), bad data (4), a full memory (5) and a run that was interrupted and can be resumed (6).
"""

from collections.abc import Iterable
from difflib import get_close_matches

MOST = 40  # names in one sentence; a vocabulary has thousands


class SfumatoError(Exception):
    """An error with a remedy. Its text is several lines: what, then where, seen and fix where they are known."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, seen: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.seen, self.fix = what, where, seen, fix
        details = (("where", where), ("seen", seen), ("fix", fix))
        super().__init__("\n".join([what, *(f"  {name:<5}  {text}" for name, text in details if text)]))


class ConfigError(SfumatoError):
    """A command, config or option that cannot be meant."""

    exit_code = 2


class MachineError(SfumatoError):
    """The machine lacks something: a library, a device, disk space."""

    exit_code = 3


class DataError(SfumatoError):
    """Pictures, captions, prompts or stored artefacts that cannot be used."""

    exit_code = 4


class CheckpointError(DataError):
    """A checkpoint or model file that is missing, truncated or altered."""


class MemoryShortage(SfumatoError):
    """The device or the host ran out of memory."""

    exit_code = 5


class Interrupted(SfumatoError):
    """The run was stopped and can be resumed."""

    exit_code = 6


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The known names most like `name`, ready for a sentence: "ddim, ddpm" or, when none is like it, all of them, as
    far as one wants to read.
    """
    known = sorted(known)
    some = get_close_matches(str(name), known, n, 0.5) or (known if len(known) <= MOST else [*known[:MOST], "..."])
    return ", ".join(some)
