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
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, ConfigError, MachineError

MANIFEST = "MANIFEST.json"
LEFT_BEHIND = re.compile(r"\.(?P<name>.+?)\.(?P<old>old-)?[0-9a-f]{8}")  # the temporary neighbours' names
REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)


def write_atomic(path: Path, data: bytes | str) -> None:
    """The file holds either what it held before, or all of `data`. MachineError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with explained(path):
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
    with explained(final):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            seal(temporary)
            old = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
            if final.exists():
                final.rename(old)
            try:
                temporary.rename(final)
            except OSError:
                if old.exists():
                    old.rename(final)
                raise
            _sync(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a process that was killed left half-written, and puts back what it was about to replace."""
    for path in folder.glob(".*"):
        left = LEFT_BEHIND.fullmatch(path.name)
        if left is None:
            continue
        final = path.with_name(left["name"])
        if left["old"] and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Puts every file of a folder on the disk and writes the manifest of them."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            entries[path.relative_to(folder).as_posix()] = {"sha256": digest(path), "size": path.stat().st_size}
        if path.exists():  # folders too: the names in them are theirs to keep
            _sync(path)
    write_atomic(folder / MANIFEST, json.dumps({"files": entries, "sha256": _digest_of(entries)}, indent=1))


def verify(folder: Path) -> None:
    """CheckpointError, naming the file, if anything in a published folder is missing, truncated or altered."""
    for name, entry in manifest(folder).items():
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
        if (seen := _digest_or_reason(path)) != entry["sha256"]:
            raise CheckpointError(
                "a file was altered",
                where=str(path),
                seen=f"sha256 {seen:.16}, not {entry['sha256']:.16}",
                fix="use an earlier one",
            )


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a published folder, by its path in it; CheckpointError if unreadable."""
    path = Path(folder) / MANIFEST
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = said["files"]
        whole = said.get("sha256", _digest_of(entries)) == _digest_of(entries)
        sound = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in entries.values())
    except FileNotFoundError:
        raise CheckpointError(
            "a folder was never finished", where=str(folder), seen=f"no {MANIFEST}", fix="use an earlier one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            "a manifest cannot be read", where=str(path), seen=str(error), fix="use an earlier one"
        ) from None
    if not (whole and sound):
        raise CheckpointError("a manifest was altered", where=str(path), seen="other content", fix="use an earlier one")
    return entries


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path, doing: str = "training") -> Iterator[None]:
    """Held while a run writes into its folder; ConfigError if another process holds it. Gone with the process.

    doing: what they do there, for the error.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("a+", encoding="utf-8")
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another process is {doing} in this folder",
                where=str(folder),
                seen=f"process {file.read().strip()}",
                fix="wait for it, or choose another name",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def free_space(path: Path) -> int:
    """Bytes that may still be written where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _digest_or_reason(path: Path) -> str:
    """A file's digest, or why it has none: a broken disk gives no bytes at all."""
    try:
        return digest(path)
    except OSError as error:
        return error.strerror or str(error)


def _digest_of(entries: Any) -> str:
    """The SHA-256 of a manifest's own content."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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
        if error.errno in REFUSALS:
            raise MachineError("cannot write here", where=str(path), seen=error.strerror or str(error)) from error
        raise
