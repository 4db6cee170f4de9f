"""Writing that is never half done: what a full disk, a broken one, a crash and a meddler leave behind."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato import files
from sfumato.errors import CheckpointError, ConfigError, MachineError
from sfumato.files import MANIFEST, digest, publish, seal, sweep, verify, write_atomic

FULL, BROKEN, READ_ONLY = errno.ENOSPC, errno.EIO, errno.EROFS


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


# one file


@pytest.mark.parametrize("data", [b"\x00\xff\r\n", b"", "plain", "Zürich\nand more\n"])
def test_a_file_holds_what_was_written_to_the_byte(tmp_path: Path, data: bytes | str) -> None:
    write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
    write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def told_fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        said.append(f"sync {'folder' if place.is_dir() else f'{place.stat().st_size} bytes'}")
        fsync(descriptor)

    def told_replace(self: Path, target: Path) -> Path:
        said.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(Path, "replace", told_replace)
    write_atomic(tmp_path / "a", b"12345")
    assert said == ["sync 5 bytes", "rename", "sync folder"]


@pytest.mark.parametrize(
    ("code", "what"), [(FULL, "disk is full"), (BROKEN, "cannot write"), (READ_ONLY, "cannot write")]
)
@pytest.mark.parametrize("before", [None, "old"])
def test_a_disk_that_fails_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, code: int, what: str
) -> None:
    if before is not None:
        (tmp_path / "a").write_text(before)
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(MachineError, match=what) as caught:
        write_atomic(tmp_path / "a", "new")
    assert caught.value.where == str(tmp_path / "a") and caught.value.exit_code == 3
    assert names(tmp_path) == ([] if before is None else ["a"])
    assert before is None or (tmp_path / "a").read_text() == before


def test_a_disk_that_fills_while_writing_says_how_full_it_is(tmp_path: Path) -> None:
    """The real thing: a device that takes nothing."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(MachineError, match="disk is full") as caught,
        files.explained(tmp_path / "a"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"data")
    assert str(caught.value.seen).endswith("MiB free") and "--resume" in str(caught.value.fix)


def test_a_rename_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(Path, "replace", failing(errno.EACCES))
    with pytest.raises(MachineError, match="cannot write"):
        write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_an_interruption_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == []


def test_what_is_no_trouble_of_the_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "a", "new")


# folders


def filled(place: Path) -> None:
    (place / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (place / "state.json").write_text("{}")
    (place / "deep").mkdir()
    (place / "deep" / "words.txt").write_text("a red circle")


def test_a_folder_appears_whole_and_sealed(tmp_path: Path) -> None:
    seen: list[tuple[bool, list[str]]] = []

    def fill(place: Path) -> None:
        filled(place)
        seen.append((place.name.startswith("."), names(tmp_path)))

    publish(tmp_path / "deeper" / "one", fill)
    publish(tmp_path / "two", fill)
    assert [hidden for hidden, _ in seen] == [True, True] and "two" not in seen[1][1]
    verify(tmp_path / "deeper" / "one")
    verify(tmp_path / "two")
    assert names(tmp_path) == ["deeper", "two"]


def test_a_manifest_says_size_and_digest_of_every_file(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    said = json.loads((tmp_path / "one" / MANIFEST).read_text())["files"]
    assert set(said) == {"weights.bin", "state.json", "deep/words.txt"}
    assert said["state.json"] == {  # sha256 of "{}": a known constant
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    assert said == files.manifest(tmp_path / "one")
    assert digest(tmp_path / "one" / "weights.bin") == said["weights.bin"]["sha256"]


def test_sealing_puts_files_and_folders_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    synced: set[Path] = set()
    fsync = os.fsync

    def told(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    seal(tmp_path)
    assert {tmp_path, tmp_path / "deep", *(p for p in tmp_path.rglob("*") if p.name != MANIFEST)} <= synced


def test_a_sealed_folder_may_lie_in_another(tmp_path: Path) -> None:
    """The inner manifest is a file like any other to the outer one."""

    def fill(place: Path) -> None:
        filled(place)
        seal(place / "deep")

    publish(tmp_path / "one", fill)
    verify(tmp_path / "one")
    verify(tmp_path / "one" / "deep")
    inner = tmp_path / "one" / "deep" / MANIFEST
    inner.write_text(inner.read_text().replace("words", "lords"))
    with pytest.raises(CheckpointError, match="altered") as caught:
        verify(tmp_path / "one")
    assert caught.value.where == str(inner)


def test_sealing_again_takes_in_what_is_new(tmp_path: Path) -> None:
    filled(tmp_path)
    seal(tmp_path)
    (tmp_path / "more").write_text("more")
    seal(tmp_path)
    assert "more" in files.manifest(tmp_path) and MANIFEST not in files.manifest(tmp_path)
    verify(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(FULL, "No space left on device")])
def test_a_folder_that_could_not_be_filled_does_not_appear(tmp_path: Path, error: BaseException) -> None:
    def fill(place: Path) -> None:
        filled(place)
        raise error

    expected = MachineError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        publish(tmp_path / "one", fill)
    assert names(tmp_path) == []


def test_a_name_in_use_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    with pytest.raises(ConfigError, match="exists already") as caught:
        publish(tmp_path / "one", filled)
    assert caught.value.where == str(tmp_path / "one")
    publish(tmp_path / "one", lambda place: (place / "new").write_text("new") and None, replace=True)
    verify(tmp_path / "one")
    assert names(tmp_path / "one") == [MANIFEST, "new"] and names(tmp_path) == ["one"]


def test_what_was_to_be_replaced_stays_when_the_new_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "one", filled)

    def fill(place: Path) -> None:
        (place / "new").write_text("new")
        monkeypatch.setattr(os, "fsync", failing(FULL))

    with pytest.raises(MachineError, match="disk is full"):
        publish(tmp_path / "one", fill, replace=True)
    monkeypatch.undo()
    verify(tmp_path / "one")
    assert names(tmp_path) == ["one"] and "new" not in names(tmp_path / "one")


def test_what_was_to_be_replaced_comes_back_when_the_new_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "one", filled)
    rename = Path.rename

    def sometimes(self: Path, target: Path) -> Path:
        if Path(target).name == "one" and ".old-" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(MachineError):
        publish(tmp_path / "one", lambda place: (place / "new").write_text("new") and None, replace=True)
    verify(tmp_path / "one")
    assert names(tmp_path) == ["one"] and "weights.bin" in names(tmp_path / "one")


# damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit, and the old time of change: nothing but the content tells."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "said"),
    [(Path.unlink, "missing"), (cut, "truncated"), (flip, "altered")],
    ids=["missing", "truncated", "altered"],
)
@pytest.mark.parametrize("name", ["weights.bin", "state.json", "deep/words.txt"])
def test_damage_is_found_and_the_file_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    publish(tmp_path / "one", filled)
    damage(tmp_path / "one" / name)
    with pytest.raises(CheckpointError, match=said) as caught:
        verify(tmp_path / "one")
    assert caught.value.where == str(tmp_path / "one" / name) and caught.value.exit_code == 4


def test_a_file_too_long_is_found_too(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    with (tmp_path / "one" / "state.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path / "one")
    assert caught.value.seen == "3 bytes of 2"


def test_a_folder_that_was_never_sealed_is_not_trusted(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(CheckpointError, match="never finished") as caught:
        verify(tmp_path)
    assert caught.value.where == str(tmp_path)
    with pytest.raises(CheckpointError):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"files": 3}',
        '{"files": []}',
        '{"files": {"a": 3}}',
        '{"files": {"a": {"size": 3}}}',
        "\0",
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_text("abc")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="manifest") as caught:
        verify(tmp_path)
    assert caught.value.where == str(tmp_path / MANIFEST)


def test_a_manifest_that_forgets_a_file_is_found_out(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    path = tmp_path / "one" / MANIFEST
    said = json.loads(path.read_text())
    del said["files"]["state.json"]
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="manifest was altered"):
        verify(tmp_path / "one")


# what a killed process leaves


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    (tmp_path / ".two.0123abcd").mkdir()
    (tmp_path / ".two.0123abcd" / "half").write_text("half")
    (tmp_path / ".config.yaml.89abcdef").write_text("half")
    (tmp_path / ".one.old-01234567").mkdir()  # had been replaced, and not yet removed
    for kept in (".hidden", ".lock", ".one.txt", "two.0123abcd"):
        (tmp_path / kept).write_text("mine")
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", ".lock", ".one.txt", "one", "two.0123abcd"]
    verify(tmp_path / "one")


def test_what_was_being_replaced_when_the_process_was_killed_is_put_back(tmp_path: Path) -> None:
    publish(tmp_path / "one", filled)
    (tmp_path / "one").rename(tmp_path / ".one.old-01234567")
    (tmp_path / ".one.89abcdef").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["one"]
    verify(tmp_path / "one")


def test_a_process_killed_while_publishing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Killed for real, at each of its renames in turn."""
    script = """
import os, sys
from pathlib import Path
from sfumato.files import publish
left, rename = int(sys.argv[2]), Path.rename
def counted(self, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return rename(self, target)
Path.rename = counted
publish(Path(sys.argv[1]), lambda place: (place / "new").write_text("new") and None, replace=True)
os._exit(0)
"""
    for step, code, kept in ((0, 9, "weights.bin"), (1, 9, "weights.bin"), (2, 0, "new")):
        place = tmp_path / str(step)
        publish(place / "one", filled)
        done = subprocess.run([sys.executable, "-c", script, str(place / "one"), str(step)], check=False)
        assert done.returncode == code
        sweep(place)
        verify(place / "one")
        assert names(place) == ["one"] and kept in names(place / "one")
