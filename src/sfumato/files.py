"""Writing that is never half done.

A file appears under its name only when it is whole and on the disk (temporary neighbour, fsync, rename); a folder
likewise, with a manifest of its files' sizes and SHA-256 digests written last, so what is truncated or altered is
found by name.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from sfumato.errors import CheckpointError, ConfigError, MachineError

MANIFEST = "MANIFEST.json"


def write_atomic(path: Path, data: bytes | str) -> None:
    """The file holds either what it held before, or all of `data`. MachineError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with _explained(path):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def publish(final: Path, fill: Callable[[Path], None], *, replace: bool = False) -> None:
    """A folder that appears whole: `fill` writes into a hidden neighbour, which is then sealed and renamed.

    replace: an older folder of that name gives way; without it, its presence is a ConfigError.
    """
    final = Path(final)
    if final.exists() and not replace:
        raise ConfigError("this folder exists already", where=str(final), fix="choose another name, or move it away")
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    with _explained(final):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            seal(temporary)
            old = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            _sync(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Puts every file of a folder on the disk and writes the manifest of them."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            entries[path.relative_to(folder).as_posix()] = {"sha256": digest(path), "size": path.stat().st_size}
            _sync(path)
    write_atomic(folder / MANIFEST, json.dumps({"files": entries}, indent=1))


def verify(folder: Path) -> None:
    """CheckpointError, naming the file, if anything in a published folder is missing, truncated or altered."""
    manifest = Path(folder) / MANIFEST
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(
            "a folder was never finished", where=str(folder), seen=f"no {MANIFEST}", fix="use an earlier one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "a manifest cannot be read", where=str(manifest), seen=str(error), fix="use an earlier one"
        ) from None
    for name, entry in entries.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError("a file is missing", where=str(path), seen="nothing", fix="use an earlier one")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                "a file is truncated",
                where=str(path),
                seen=f"{path.stat().st_size} bytes of {entry['size']}",
                fix="use an earlier one",
            )
        if (seen := digest(path)) != entry["sha256"]:
            raise CheckpointError(
                "a file was altered",
                where=str(path),
                seen=f"sha256 {seen[:16]}, not {entry['sha256'][:16]}",
                fix="use an earlier one",
            )


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Held while a run writes into its folder; ConfigError if another process holds it. Gone with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another process is training in this folder",
                where=str(folder),
                fix="wait for it, or choose another name",
            ) from None
        yield


def free_space(path: Path) -> int:
    """Bytes that may still be written where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system says about a disk, in words that help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_space(path) / 2**20
            raise MachineError(
                "the disk is full",
                where=str(path),
                seen=f"{free:.0f} MiB free",
                fix="free some space and run the same command with --resume",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EIO):
            raise MachineError("cannot write here", where=str(path), seen=error.strerror or str(error)) from error
        raise
