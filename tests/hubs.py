"""What tests of the hub share: a cache as its library lays it out, a hub that answers, and one that refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

SHA = "0123456789abcdef0123456789abcdef01234567"


def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and an empty folder to be in."""
    place = tmp_path / "home" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return place


def cached(cache: Path, repo: str, files: Callable[[Path], None], revision: str = "main") -> Path:
    """A repository in the cache as the library lays it out: refs, blobs, and a snapshot of links to them."""
    home = cache / f"models--{repo.replace('/', '--')}"
    made = cache.parent / "made"
    made.mkdir(parents=True)
    files(made)
    for path in sorted(made.rglob("*")):
        if path.is_file():
            name = path.relative_to(made)
            blob, link = home / "blobs" / "-".join(name.parts), home / "snapshots" / SHA / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, blob)
            link.symlink_to(blob)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / revision).write_text(SHA)
    shutil.rmtree(made)
    return home / "snapshots" / SHA


class Online:
    """A hub with one repository; what is fetched is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> None:
        self.snapshot, self.fetched = snapshot, list[str]()
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def model_info(self, repo: str, revision: str | None = None) -> Any:
        names = [one.relative_to(self.snapshot).as_posix() for one in self.snapshot.rglob("*") if one.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in sorted(names)])

    def download(self, repo: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        self.fetched += allow_patterns
        return str(self.snapshot)


def refusing(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        response = SimpleNamespace(headers={}, request=None, status_code=401)
        raise kind("no", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("no")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def small(seed: int = 0) -> Any:
    from sfumato.model import build_model

    section = {
        "path": "linear",
        "prediction": "velocity",
        "time_input": "thousandths",
        "scale_input": None,
        "net": {"kind": "dit", "patch": 8, "dim": 16, "depth": 1, "heads": 2},
        "codec": "pixels",
        "conditioner": {"kind": "labels", "classes": 4},
    }
    torch.manual_seed(seed)
    made = build_model({"model": section, "size": [16, 16], "sampling": {"sampler": "ddim", "steps": 2}})
    with torch.no_grad():
        for weight in made.net.parameters():
            weight.normal_(0, 0.3)
    return made


def unpacked(made: Path) -> None:
    """Puts what lies in the only folder of a folder where that is."""
    for path in list((made / "x").iterdir()):
        shutil.move(path, made / path.name)
    (made / "x").rmdir()
