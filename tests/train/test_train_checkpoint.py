"""Checkpoints under everything that disks and people do to them: nothing else than what was saved is ever loaded."""

import errno
import json
import os
import random
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import files
from sfumato.errors import CheckpointError, MachineError, SfumatoError
from sfumato.train import checkpoint
from sfumato.train.checkpoint import State
from sfumato.train.muon import Muon

SYSTEM_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")


def state(step: int) -> State:
    """A state that no other step has."""
    rng = torch.Generator().manual_seed(step)
    model = {"net.a": torch.randn(3, 5, generator=rng), "net.b": torch.randn(4, generator=rng).bfloat16()}
    optim = {"net.a|first": torch.randn(3, 5, generator=rng), "net.a|step": torch.tensor(float(step))}
    plain = {"step": step, "losses": [0.1 * step, 1e-300]}
    average = {name: value + 1 for name, value in model.items()}
    return State({"model": model, "ema-0": average, "optim": optim}, plain, {"words.json": b'{"a": %d}' % step})


def same(a: State, b: State) -> bool:
    def tensors(one: State) -> dict[tuple[str, str], Tensor]:
        return {(group, name): value for group, some in one.tensors.items() for name, value in some.items()}

    left, right = tensors(a), tensors(b)
    return (
        left.keys() == right.keys()
        and all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)
        and a.plain == b.plain
        and a.files == b.files
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path / "checkpoints", step, state(step), 2)
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded(saved: Path) -> None:
    assert names(saved) == ["step-00000010", "step-00000020"]
    assert all(same(checkpoint.load(saved / f"step-000000{step}"), state(step)) for step in (10, 20))
    assert names(saved / "step-00000020") == [
        *(
            "MANIFEST.json",
            "ema-0.safetensors",
            "kept-words.json",
            "model.safetensors",
            "optim.safetensors",
            "state.json",
        ),
    ]


def test_tied_weights_are_saved_twice_and_files_are_for_all_who_may_read_others(tmp_path: Path) -> None:
    tied = torch.randn(3, 3)
    place = checkpoint.save(tmp_path, 1, State({"model": {"a": tied, "b": tied, "c": tied.T}}, {"step": 1}), 1)
    loaded = checkpoint.load(place).tensors["model"]
    assert torch.equal(loaded["a"], tied) and torch.equal(loaded["b"], tied) and torch.equal(loaded["c"], tied.T)
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {usual}


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):  # as text, the last of these comes first
        checkpoint.save(tmp_path, step, state(step), 2)
    (tmp_path / "step-by-step").mkdir()  # not one of ours
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-100000000", "step-99999999"]
    assert checkpoint.newest(tmp_path, print)[1].plain["step"] == 100_000_000
    assert (tmp_path / "step-by-step").exists()


def test_damaged_newer_ones_take_nobodys_place(tmp_path: Path) -> None:
    """After a fall-back to step 10, saving 11 and 12 must leave both, though a broken 20 and 30 are there."""
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), 3)
    for step in (11, 12):
        checkpoint.save(tmp_path, step, state(step), 2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (11, 12, 20, 30)]
    checkpoint.save(tmp_path, 20, state(20), 2)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (12, 20, 30)]


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 16] = bytes(len(data[at : at + 16]))
    path.write_bytes(data)


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(20)))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def swap(path: Path, rng: random.Random) -> None:
    shutil.copy(path.parent.with_name("step-00000010") / path.name, path)


def swap_inside(path: Path, rng: random.Random) -> None:
    other = path.with_name("ema-0.safetensors" if path.name != "ema-0.safetensors" else "optim.safetensors")
    shutil.copy(other, path)


@pytest.mark.parametrize("harm", [flip, cut, zero, append, remove, empty, swap, swap_inside])
def test_no_mutation_is_loaded_as_something_else(saved: Path, harm: Callable[[Path, random.Random], None]) -> None:
    """120 of each kind, over all files: refused by the file's name, or else (white space of a manifest) harmless."""
    rng, place, whole = random.Random(0), saved / "step-00000020", saved.with_name("whole")
    shutil.copytree(place, whole)
    refused, total = 0, 0
    for name in names(whole):
        if (harm is swap_inside and not name.endswith(".safetensors")) or (harm is swap and name == "MANIFEST.json"):
            continue
        for _ in range(20):
            harm(place / name, rng)
            changed = not (place / name).exists() or (place / name).read_bytes() != (whole / name).read_bytes()
            total += changed
            try:
                assert same(checkpoint.load(place), state(20)), name
            except CheckpointError as error:
                refused += changed
                assert name in str(error) or name == "MANIFEST.json"
            shutil.copy(whole / name, place / name)
    assert total >= 50 and refused >= total - 2
    assert same(checkpoint.load(place), state(20))


def test_a_manifest_from_elsewhere_is_refused(saved: Path) -> None:
    """Files and manifest of step 10 under the name of step 20 are whole, but not what they are called."""
    shutil.rmtree(saved / "step-00000020")
    shutil.copytree(saved / "step-00000010", saved / "step-00000020")
    with pytest.raises(CheckpointError, match="another step's name"):
        checkpoint.load(saved / "step-00000020")
    told: list[str] = []
    path, found = checkpoint.newest(saved, told.append)
    assert path.name == "step-00000010" and same(found, state(10)) and "step-00000020 is not used" in told[0]


def test_another_version_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint.load(saved / "step-00000020")


@pytest.mark.parametrize(
    ("text", "what"), [("{", "cannot be read"), ("[]", "another version"), ("{}", "another version")]
)
def test_a_state_that_is_none_is_refused(saved: Path, text: str, what: str) -> None:
    (saved / "step-00000020/state.json").write_text(text)
    files.seal(saved / "step-00000020")
    with pytest.raises(CheckpointError, match=what):
        checkpoint.load(saved / "step-00000020")


def test_files_that_the_manifest_does_not_list_are_not_read(saved: Path) -> None:
    shutil.copy(saved / "step-00000010/model.safetensors", saved / "step-00000020/ema-1.safetensors")
    assert same(checkpoint.load(saved / "step-00000020"), state(20))


def test_a_manifest_with_an_entry_less_is_refused(saved: Path) -> None:
    path = saved / "step-00000020/MANIFEST.json"
    said = json.loads(path.read_text())
    del said["files"]["ema-0.safetensors"]
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="a manifest was altered"):
        checkpoint.load(saved / "step-00000020")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\xff"]
)
def test_a_manifest_that_is_none_is_refused(saved: Path, text: str) -> None:
    (saved / "step-00000020/MANIFEST.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoint.load(saved / "step-00000020")


def test_a_disk_that_cannot_be_read_is_a_damaged_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "digest", broken)
    with pytest.raises(CheckpointError, match="Input/output") as caught:
        checkpoint.load(saved / "step-00000020")
    assert ".safetensors" in str(caught.value.where)


def calls_of(action: Callable[[], Any]) -> list[str]:
    """The system calls that an action makes, in order."""
    made: list[str] = []
    with hooked(lambda name: made.append(name)):
        action()
    return made


class hooked:  # noqa: N801 - reads as a verb
    """Every system call that changes the disk is announced first."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce, self.real = announce, {name: getattr(os, name) for name in SYSTEM_CALLS}

    def __enter__(self) -> None:
        def watched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                self.announce(name)
                return self.real[name](*args, **options)

            return call

        for name in SYSTEM_CALLS:
            setattr(os, name, watched(name))

    def __exit__(self, *_: object) -> None:
        for name, call in self.real.items():
            setattr(os, name, call)


def third(folder: Path) -> Callable[[], Any]:
    return lambda: checkpoint.save(folder, 30, state(30), 2)


def fault_points(tmp_path: Path) -> int:
    for step in (10, 20):
        checkpoint.save(tmp_path / "count", step, state(step), 2)
    return len(calls_of(third(tmp_path / "count")))


def whole_after(folder: Path) -> list[int]:
    """The steps that can be loaded after a fault and what follows it; each must be what it was."""
    files.sweep(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    found, state_of = [], checkpoint.newest(folder, print)
    for path in checkpoint.found(folder):
        step = int(path.name.removeprefix("step-"))
        try:
            loaded = checkpoint.load(path)
        except CheckpointError:
            continue  # one that was being removed
        assert same(loaded, state(step))
        found.append(step)
    assert state_of[1].plain["step"] == max(found)
    return found


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_system_call_loses_nothing(tmp_path: Path, error: int) -> None:
    for point in range(fault_points(tmp_path)):
        folder = tmp_path / f"{error}-{point}"
        for step in (10, 20):
            checkpoint.save(folder, step, state(step), 2)
        left = point

        def struck(name: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(error, os.strerror(error))

        failed = None
        with hooked(struck):
            try:
                third(folder)()
            except SfumatoError as caught:
                failed = caught
        assert failed is None or (isinstance(failed, MachineError) and "step-00000030" in str(failed.where)), point
        found = whole_after(folder)
        assert 20 in found and (30 in found or failed is not None), point
        third(folder)()
        assert whole_after(folder) == [30, 20]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
def test_death_at_any_system_call_loses_nothing(tmp_path: Path) -> None:
    for point in range(fault_points(tmp_path)):
        folder = tmp_path / str(point)
        for step in (10, 20):
            checkpoint.save(folder, step, state(step), 2)
        if (child := os.fork()) == 0:
            die_at(point, third(folder))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
        assert 20 in whole_after(folder), point
        third(folder)()
        assert whole_after(folder) == [30, 20]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
def test_death_while_a_step_is_written_anew_keeps_one_of_both(tmp_path: Path) -> None:
    """Replacing takes two renames; dead between them, the older one lies hidden, and is put back."""
    checkpoint.save(tmp_path / "count", 20, state(20), 2)
    points = len(calls_of(lambda: checkpoint.save(tmp_path / "count", 20, state(20), 2)))
    for point in range(points):
        folder = tmp_path / str(point)
        checkpoint.save(folder, 20, state(20), 2)
        if (child := os.fork()) == 0:
            die_at(point, lambda: checkpoint.save(folder, 20, state(20), 2))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
        assert whole_after(folder) == [20], point


def die_at(point: int, action: Callable[[], Any]) -> None:
    """In a child: ends it, as kill -9 does, before system call number `point`."""
    left = point

    def struck(name: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            os._exit(137)

    try:
        with hooked(struck):
            action()
    finally:
        os._exit(1)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """Each file is synced, the manifest is renamed into place, the folder synced and renamed, its parent synced."""
    made = calls_of(lambda: checkpoint.save(tmp_path / "c", 1, state(1), 1))
    final = len(made) - 1 - made[::-1].index("rename")
    assert made[:final].count("fsync") == 5 + 2  # five files; the manifest and its folder
    assert "fsync" in made[final:]
    assert made[:final].count("replace") == 1


def test_a_file_that_grows_too_large_for_the_system_is_a_clear_error(saved: Path) -> None:
    """The tensors are written by a library of another language; its errors are the system's all the same."""
    big = State({"model": {"a": torch.zeros(300_000)}}, {"step": 30})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        with pytest.raises(MachineError, match="File too large"):
            checkpoint.save(saved, 30, big, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert whole_after(saved) == [20, 10] and names(saved) == ["step-00000010", "step-00000020"]


@pytest.fixture
def trained() -> Iterator[tuple[nn.Module, Muon]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "orthogonal": True}]
    groups += [{"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = Muon(groups, 0.1)
    step(model, optimizer)
    yield model, optimizer


def step(model: nn.Module, optimizer: Muon) -> None:
    optimizer.zero_grad()
    (model(torch.ones(2, 4)) * model.scale).square().sum().backward()
    optimizer.step()


def test_an_optimizers_state_comes_back(trained: tuple[nn.Module, Muon]) -> None:
    model, optimizer = trained
    kept = {key: value.clone() for key, value in checkpoint.optimizer_state(optimizer, model).items()}
    assert {key for key in kept if key.startswith(("0.weight", "scale"))} == {
        *("0.weight|momentum", "scale|first", "scale|second", "scale|step"),
    }
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    checkpoint.restore_optimizer(optimizer, model, kept)
    step(model, optimizer)
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())


def test_an_optimizers_state_of_another_model_is_refused(trained: tuple[nn.Module, Muon]) -> None:
    model, optimizer = trained
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.restore_optimizer(optimizer, model, {"7.weight|momentum": torch.zeros(1)})
