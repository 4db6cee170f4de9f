"""The Hugging Face Hub as a place of models: `owner/name` stands wherever a path does.

A path that is there is that path. A name `owner/name`, perhaps with `@revision` and a path within, is fetched into the
hub's own cache and read from there; without a network what the cache has is read. Only what a model is read from is
fetched: descriptions, tokenizers, and of weights the copy that is chosen in `sfumato.stored`. `hf://owner/name` always
means the hub. Nothing here needs torch.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sfumato import stored
from sfumato.errors import CheckpointError, ConfigError, MachineError, SfumatoError

SCHEME = re.compile(r"hf:/{1,2}")  # a pathlib.Path has made one slash of two
NAME = r"[A-Za-z0-9][\w.-]{0,95}"
PLACE = re.compile(rf"(?P<repo>{NAME}/{NAME})(@(?P<revision>[^/@]+))?(/(?P<inside>.+))?")
HERE = ("runs", "models")  # where people keep theirs: a name that begins so is one of a folder
OWN, INDEX, CONFIG = "model.json", "model_index.json", "config.json"
DESCRIPTIONS = (OWN, INDEX, CONFIG, "sfumato.json", stored.PEFT, "scheduler_config.json")  # of the models themselves
KEPT = (".json", ".txt", ".model")  # beside weights: descriptions, and tokenizers
UNREAD = ("safety_checker",)  # parts of pipelines that nothing here reads
UNSEEN = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".md")
LOGIN = "hf auth login"


@dataclass(frozen=True)
class Place:
    """A repository of the hub, its revision, and perhaps a file or folder in it."""

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        end = f"/{self.inside}" if self.inside else ""
        return self.repo + (f"@{self.revision}" if self.revision else "") + end


def place_of(path: str | Path) -> Place | None:
    """The place of the hub that a path means; None for one of this machine."""
    text = str(path)
    begun = SCHEME.match(text)
    if begun is None and (Path(text).expanduser().exists() or not _foreign(text)):
        return None
    found = PLACE.fullmatch(text[begun.end() if begun else 0 :].rstrip("/"))
    if found is None and begun is not None:
        what = "this is no name of the hub"
        raise ConfigError(what, where=text, fix="hf://owner/name, hf://owner/name@revision or hf://owner/name/FILE")
    if found is None or ".." in text:
        return None
    revision = found["revision"]
    return Place(found["repo"], unquote(revision) if revision else None, found["inside"] or "")


def _foreign(text: str) -> bool:
    """Whether a path that is not there may be a name of the hub: what begins with a folder that is there is a slip."""
    first = text.partition("/")[0]
    return first not in HERE and not Path(first).exists()


def located(path: str | Path, parts: Collection[str] = ()) -> Path:
    """Where a model lies on this machine: the path itself, or of a name of the hub the folder or file in its cache.

    parts: of a pipeline of diffusers, those that are wanted; all if none are said. Raises CheckpointError for
    repositories that are not there or not open to one, MachineError without a network for what the cache has not, or
    without the library, ConfigError where one of several files has to be named.
    """
    place = place_of(path)
    if place is None:
        return Path(path).expanduser()
    library = library_for(place)
    listed = _listed(place, library)
    if isinstance(listed, Exception):
        return _cached(place, library, listed)
    wanted = _beneath(place, listed)
    root = _fetch(place, _above(place, needed(wanted, _index(place, wanted, library), str(place), parts)), library)
    return _entry(root, place, wanted)


def _listed(place: Place, library: Any) -> list[str] | Exception:
    """The files of a repository, or why the hub could not be asked."""
    try:
        said = library.HfApi().model_info(place.repo, revision=place.revision)
    except Exception as error:  # which ones depends on the library's version, and on its own libraries
        if (ours := _refusal(place, error, library)) is not None:
            raise ours from None
        return error
    return [one.rfilename for one in said.siblings or ()]


def _index(place: Place, wanted: Collection[str], library: Any) -> dict[str, Any] | None:
    if INDEX not in wanted:
        return None
    inside = f"{place.inside}/{INDEX}" if place.inside else INDEX
    return _json(_fetch(place, [inside], library) / inside)


@contextlib.contextmanager
def sketched(path: str | Path) -> Iterator[tuple[Path, bool]]:
    """As `located`, without fetching a weight: the file or folder, and whether it is a sketch.

    In a sketch descriptions are what they are, and a file of weights is what its header says, as JSON: names with
    `dtype` and `shape`, and `__metadata__`; of pickles, which have no header, nothing. Other files are there and empty.
    What cannot be asked for is read from the cache, where it is whole. A sketch is gone when the context is left.
    """
    place = place_of(path)
    if place is None:
        yield Path(path).expanduser(), False
        return
    library = library_for(place)
    listed = _listed(place, library)
    if isinstance(listed, Exception):
        yield _cached(place, library, listed), False
        return
    wanted = _beneath(place, listed)
    names = _above(place, needed(wanted, _index(place, wanted, library), str(place)))
    said = [name for name in names if name.rpartition("/")[2] in DESCRIPTIONS or stored.is_index(name)]
    root = _fetch(place, said, library) if said else None
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            there = Path(folder) / name
            there.parent.mkdir(parents=True, exist_ok=True)
            if name in said and root is not None:
                shutil.copyfile(root / name, there)
            elif name.endswith(stored.FILES):
                told = {} if name.endswith(stored.PICKLES) else _header(place, name, library)
                there.write_text(json.dumps(told), encoding="utf-8")
            else:
                there.touch()
        yield _entry(Path(folder), place, wanted), True


def _header(place: Place, name: str, library: Any) -> dict[str, Any]:
    """What a file of safetensors says of itself at its beginning, which is all that is fetched."""
    try:
        found = library.HfApi().parse_safetensors_file_metadata(place.repo, name, revision=place.revision)
    except Exception as error:
        if (ours := _refusal(place, error, library)) is not None:
            raise ours from None
        seen = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if isinstance(error, library.errors.SafetensorsParsingError):
            raise CheckpointError("weights cannot be read", where=f"{place.repo}/{name}", seen=seen) from None
        what, fix = "the hub cannot be reached any more", f"hf download {place.repo}"
        raise MachineError(what, where=f"{place.repo}/{name}", seen=seen, fix=fix) from None
    told = {key: {"dtype": str(one.dtype), "shape": list(one.shape)} for key, one in found.tensors.items()}
    return {"__metadata__": dict(found.metadata or {}), **told}


def library_for(place: Place) -> Any:
    """The library that speaks with the hub. MachineError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        what = "nothing of this name is here, and reading from the hub needs the library huggingface_hub"
        raise MachineError(what, where=str(place), seen=str(error), fix="pip install 'sfumato[hub]'") from None
    return huggingface_hub


# What is fetched


def needed(
    names: Collection[str], index: Mapping[str, Any] | None = None, where: str = "", only: Collection[str] = ()
) -> list[str]:
    """Of the files of a repository those that a model is read from.

    names: with folders before them. index: what model_index.json says, of a pipeline of diffusers. where: for errors.
    only: the parts of a pipeline that are wanted, if not all. ConfigError where there are several models in it.
    """
    root = [name for name in names if "/" not in name]
    if OWN in root:
        mine = [name for name in names if "/" not in name or name.startswith("samplers/")]
        return [name for name in mine if not name.startswith(".git") and not name.lower().endswith(UNSEEN)]
    if index is not None:
        parts = [name for name, said in index.items() if isinstance(said, list) and any(said) and name not in UNREAD]
        parts = [name for name in parts if not only or name in only]
        return [*_folder(names, ""), *(name for part in parts for name in _folder(names, f"{part}/"))]
    tuned = [name for name in names if name.endswith(f"/{stored.PEFT}")]
    if tuned:
        return [one for name in tuned for one in _folder(names, name.removesuffix(stored.PEFT))]
    return _folder(names, "") if _whole(root) else [_single(root, where)]


def _folder(names: Collection[str], start: str) -> list[str]:
    """Of one folder: its descriptions, and its weights once."""
    inner = [name.removeprefix(start) for name in names if name.startswith(start)]
    inner = [name for name in inner if "/" not in name]
    found = [name for name in inner if name.endswith(KEPT) and not stored.is_index(name)]
    weights = stored.chosen(inner)
    if weights is None:
        weights = next((name for name in (*stored.LORAS, *stored.ADAPTERS) if name in inner), None)
    if weights is not None:
        found += [weights, *(stored.shards(weights, inner) if stored.is_index(weights) else ())]
    return [start + name for name in found]


def _whole(root: Collection[str]) -> bool:
    """Whether a folder is read as such, for what its files are called."""
    described = CONFIG in root and stored.chosen(root) is not None
    return described or any(name in root for name in (*stored.LORAS, stored.PEFT))


def _single(root: Collection[str], where: str) -> str:
    """The one file of weights of a repository of single files."""
    files = sorted(name for name in root if name.endswith(stored.FILES))
    safe = [name for name in files if not name.endswith(stored.PICKLES)] or files
    if len(safe) == 1:
        return safe[0]
    if not safe:
        seen = ", ".join(sorted(root)[:5]) or "nothing"
        raise CheckpointError("this repository holds no model that is known here", where=where, seen=seen)
    what = "this repository holds several files of weights"
    raise ConfigError(what, where=where, seen=", ".join(safe[:8]), fix=f"hf://{where}/{safe[0]}")


def _beneath(place: Place, names: Collection[str]) -> list[str]:
    """The files of the folder that is meant, by their names in it; of a file its own name."""
    if not place.inside or place.inside in names:
        return list(names) if not place.inside else [place.inside.rpartition("/")[2]]
    start = f"{place.inside}/"
    found = [name.removeprefix(start) for name in names if name.startswith(start)]
    if not found:
        seen = ", ".join(sorted({name.partition("/")[0] for name in names})[:8])
        raise CheckpointError("there is no such file or folder in this repository", where=str(place), seen=seen)
    return found


def _above(place: Place, names: Collection[str]) -> list[str]:
    """The same by their names in the repository."""
    if place.inside.endswith(stored.FILES):
        return [place.inside]
    return [f"{place.inside}/{name}" if place.inside else name for name in names]


def _entry(root: Path, place: Place, names: Collection[str]) -> Path:
    """What of a snapshot is read: a folder, or a file."""
    inner = root / place.inside if place.inside else root
    if inner.is_file():
        return inner
    top = [name for name in names if "/" not in name]
    folder = OWN in top or INDEX in top or _whole(top) or any(name.endswith(f"/{stored.PEFT}") for name in names)
    return inner if folder else inner / _single(top, str(place))


# The library


def _fetch(place: Place, names: Collection[str], library: Any) -> Path:
    """The snapshot, with these files in it."""
    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
    try:
        return Path(library.snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns))
    except OSError as error:
        if (ours := _refusal(place, error, library)) is not None:
            raise ours from None
        if getattr(error, "errno", None) is not None and not isinstance(error, FileNotFoundError):
            raise  # of this machine: a full disk, say
        return _cached(place, library, error)


def _cached(place: Place, library: Any, why: Exception) -> Path:
    """What the cache has of a repository. MachineError where it has nothing."""
    try:
        root = library.snapshot_download(
            place.repo, revision=place.revision, local_files_only=True, allow_patterns=[]
        )  # what is not asked for cannot be missing
    except OSError:
        first = next(iter(str(why).splitlines()), "")
        raise MachineError(
            "nothing of this name is here or in the hub's cache, and the hub cannot be reached",
            where=str(place),
            seen=f"{type(why).__name__}: {first}",
            fix=f"check the path; or with a network: hf download {place.repo}",
        ) from None
    names = [one.relative_to(root).as_posix() for one in sorted(Path(root).rglob("*")) if one.is_file()]
    return _entry(Path(root), place, _beneath(place, names))


def _refusal(place: Place, error: Exception, library: Any) -> SfumatoError | None:
    """What the hub says no with, as an error of ours; None where it said nothing."""
    errors, where = library.errors, str(place)
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its terms at https://huggingface.co/{place.repo}, then: {LOGIN}"
        return CheckpointError("this repository is open to those who accept its terms", where=where, fix=fix)
    if isinstance(error, errors.RepositoryNotFoundError):
        seen, fix = "no such repository, or a private one", f"check the name; for a private one: {LOGIN}"
        return CheckpointError("nothing of this name is here, nor on the hub", where=where, seen=seen, fix=fix)
    if isinstance(error, errors.RevisionNotFoundError):
        what, fix = "this repository has no such revision", "a branch, a tag or a commit"
        return CheckpointError(what, where=place.repo, seen=str(place.revision), fix=fix)
    if isinstance(error, errors.HFValidationError):
        return ConfigError("the hub knows no such names", where=where, seen=next(iter(str(error).splitlines()), ""))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("a description cannot be read", where=str(path), seen=str(error)) from None
    return said if isinstance(said, dict) else {}
