"""Models onto the hub: what is sent, with a card, in one commit.

A model goes as it lies, or is first written in another layout. In a repository that is there already, files of a model
that would be read but are not among those that are sent are removed in the same commit: weights of yesterday beside a
description of today are a broken model. A card that somebody has written there stays.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato import hub, stored
from sfumato.adapters.parts import parts_of
from sfumato.adapters.reading import read_adapter, read_raw, recognised
from sfumato.adapters.writing import write_adapter
from sfumato.cards import card
from sfumato.errors import CheckpointError, ConfigError, MachineError, nearest
from sfumato.io.directory import load_autoencoder, save_model
from sfumato.io.inspect import inspected
from sfumato.io.models import model_folder
from sfumato.io.published import save_published
from sfumato.model import Trainable
from sfumato.pipeline import load

LAYOUTS = ("sfumato", "diffusers")
CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What is sent: by its name in the repository a file of this machine, and the card; `layout` is one of "sfumato",
    "diffusers" and "lora". own_card: somebody has written the card, so it replaces any other.
    """

    files: Mapping[str, Path]
    card: str
    layout: str
    own_card: bool = False

    def sizes(self) -> dict[str, int]:
        """Bytes, by name in the repository."""
        return {CARD: len(self.card.encode()), **{name: path.stat().st_size for name, path in self.files.items()}}


@contextmanager
def packed(
    source: str | Path,
    repo: str,
    *,
    to: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    license: str | None = None,
) -> Iterator[Parcel]:
    """What of a run, a model directory, a folder of diffusers, or an adapter is sent; it lives as long as the context.

    to: the layout, "sfumato" or "diffusers"; as it is if not said. dtype: of weights that are written anew. base: the
    model that an adapter is for, or what was trained further. ConfigError for a name that is none, and for models that
    have no such form.
    """
    if hub.place_of(f"hf://{repo}") != hub.Place(repo):
        raise ConfigError("a repository is OWNER/NAME", where="REPO", seen=repo, fix="me/my-model")
    if to is not None and to not in LAYOUTS:
        raise ConfigError("no such layout on the hub", where="--to", seen=to, fix=nearest(to, LAYOUTS))
    folder = model_folder(source)
    if not folder.exists():
        raise CheckpointError("there is nothing to push", where=str(source), seen="no such path")
    with tempfile.TemporaryDirectory() as place:
        if _is_adapter(folder):
            files, layout = _adapter(folder, Path(place), to, dtype, base), "lora"
        else:
            files, layout = _model(folder, Path(place) / "made", to, dtype)
        said = inspected(next(iter(files.values())) if layout == "lora" else _root(files))
        own = folder / CARD if folder.is_dir() else folder.with_name(CARD)
        if folder.is_dir() and own.is_file():
            yield Parcel(files, own.read_text(encoding="utf-8"), layout, own_card=True)
        else:
            yield Parcel(files, card(repo, said, layout, base, license), layout)


def _root(files: Mapping[str, Path]) -> Path:
    """The folder in which a model lies: that of its description."""
    name = next(one for one in (hub.INDEX, hub.OWN, hub.CONFIG) if one in files)
    return files[name].parent


def _is_adapter(path: Path) -> bool:
    if path.is_dir():
        return not (path / hub.OWN).is_file() and any((path / one).is_file() for one in (*stored.LORAS, stored.PEFT))
    return path.suffix in stored.FILES and inspected(path)["kind"] == "LoRA"


def _adapter(path: Path, place: Path, to: str | None, dtype: torch.dtype, base: str | None) -> dict[str, Path]:
    """An adapter in the file that others look for first; as it is, it keeps its dialect."""
    if to == "sfumato":
        raise ConfigError("adapters have no layout of ours", where="--to", seen=to, fix="--to diffusers")
    if to is None:
        if path.is_file():
            return {stored.LORAS[0] if path.suffix == ".safetensors" else path.name: path}
        names = [one.name for one in sorted(path.iterdir()) if one.is_file() and one.name != CARD]
        return {name: path / name for name in names if name in (*stored.LORAS, *stored.ADAPTERS, stored.PEFT)}
    base = base or read_raw(path).metadata.get("sfumato.base")
    parts: Any
    try:
        adapter, found = recognised(path)
        parts = found.parts
    except CheckpointError:
        if base is None:
            raise
        parts = parts_of(load(base, "cpu").model)
        adapter = read_adapter(path, parts)
    made = write_adapter(place / stored.LORAS[0], adapter, parts, "diffusers", dtype=dtype, base=base)
    return {made.name: made}


def _model(folder: Path, place: Path, to: str | None, dtype: torch.dtype) -> tuple[dict[str, Path], str]:
    """The files of a model in a layout, and the layout."""
    ours = (folder / hub.OWN).is_file()
    if not ours and not (folder / hub.INDEX).is_file() and not (folder / hub.CONFIG).is_file():
        fix = "--to diffusers" if folder.is_file() and to is None else "a run, a model, a folder of diffusers, a LoRA"
        if not folder.is_file() or to is None:
            what = "a single file has no description" if folder.is_file() else "nothing that is known here"
            raise CheckpointError(what, where=str(folder), fix=fix)
    now = "sfumato" if ours else "diffusers"
    if to in (None, now) and not folder.is_file():
        names = [one.relative_to(folder).as_posix() for one in sorted(folder.rglob("*")) if one.is_file()]
        names = [one for one in names if one != CARD and not one.startswith(".")]
        return {name: folder / name for name in names}, now
    model: Trainable = (load_autoencoder(folder) if ours else None) or load(folder, "cpu").model
    if to == "sfumato":
        save_model(place, model, model.facts, dtype=dtype)
    else:
        save_published(place, model, dtype=dtype)
        place = place if (place / hub.INDEX).is_file() else place / "vae"
    names = [one.relative_to(place).as_posix() for one in sorted(place.rglob("*")) if one.is_file()]
    return {name: place / name for name in names}, str(to)


# Sending


def push(
    parcel: Parcel, repo: str, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Sends a parcel into a repository, which is made where there is none; the address of what is there then.

    MachineError without a network, without the library, or where the hub does not know who is asking.
    """
    library: Any = hub.library_for(hub.Place(repo))
    api = library.HfApi(library_name="sfumato")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = list(api.list_repo_files(repo, revision=revision)) if _has(api, repo, revision) else []
        done = api.create_commit(
            repo,
            _operations(parcel, there, library),
            commit_message=message or f"A model of sfumato in the layout of {parcel.layout}",
            revision=revision,
        )
        return str(getattr(done, "commit_url", None) or f"https://huggingface.co/{repo}")
    except Exception as error:  # which ones depends on the library's version, and on its own libraries
        raise _refused(error, repo, library) from error


def _has(api: Any, repo: str, revision: str | None) -> bool:
    return revision is None or bool(api.revision_exists(repo, revision))


def _operations(parcel: Parcel, there: list[str], library: Any) -> list[Any]:
    """The files, the card unless there is one, and the removal of what would be read and is none of this model."""
    files: dict[str, Any] = dict(parcel.files)
    if parcel.own_card or CARD not in there:
        files[CARD] = parcel.card.encode()
    made = [library.CommitOperationAdd(name, str(one) if isinstance(one, Path) else one) for name, one in files.items()]
    return made + [library.CommitOperationDelete(name) for name in stale(parcel, there)]


def stale(parcel: Parcel, there: list[str]) -> list[str]:
    """Files of a repository that belong to another model than that which is sent."""
    if parcel.layout == "lora":
        return []
    found = [name for name in there if name in (hub.OWN, hub.INDEX) or name.startswith("samplers/")]
    for start in ("", *{f"{name.partition('/')[0]}/" for name in parcel.files if "/" in name}):
        inner = [name.removeprefix(start) for name in there if name.startswith(start)]
        found += [start + name for name in stored.copies(inner)]
    return [name for name in found if name not in parcel.files]


def _refused(error: Exception, repo: str, library: Any) -> Exception:
    errors, first = library.errors, next(iter(str(error).splitlines()), "")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return MachineError("the hub does not know who is asking", where=repo, seen=first, fix=hub.LOGIN)
    if status == 403:
        fix = f"a token that may write, or another owner: {hub.LOGIN}"
        return MachineError("you may not write into this repository", where=repo, seen=first, fix=fix)
    if isinstance(error, errors.HFValidationError):
        return ConfigError("the hub knows no such names", where=repo, seen=first)
    seen = f"{type(error).__name__}: {first}"
    return MachineError("the hub cannot be reached, or refuses", where=repo, seen=seen, fix="the same command again")
