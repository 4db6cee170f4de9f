"""Configurations are laid over each other: a recipe over what it extends, the command line over all.

A mapping is merged key by key, anything else replaces. In a slot, another `kind` drops those inherited options which
the new kind does not have, so that `data.kind=folder data.path=DIR` keeps a recipe's size. Where each value came from
is remembered, so that an error can say it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from pydantic import ValidationError

from sfumato.catalogue import KINDS
from sfumato.config import SLOTS, Config, slot_problems
from sfumato.errors import ConfigError, nearest
from sfumato.registry import Problem, options_of, target_of

RECIPES = Path(__file__).parent / "recipes"


class Recipe(NamedTuple):
    """A configuration that comes with the library: its name, its file, and its first line of comment."""

    name: str
    path: Path
    summary: str


class Loaded(NamedTuple):
    """A checked configuration, and for every dotted key of it that was set, by what."""

    config: Config
    origins: dict[str, str]


def recipes() -> list[Recipe]:
    """The recipes of the library, by name."""
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found.append(Recipe(path.stem, path, first.lstrip("# ").strip()))
    return found


def load_config(source: str, overrides: Iterable[str] = ()) -> Loaded:
    """The configuration of a recipe or a YAML file with `key=value` laid over it. One ConfigError names all faults."""
    origins: dict[str, str] = {}
    raw = _read(source, origins, ())
    raw.setdefault("name", Path(source).stem)
    for override in overrides:
        over = _parsed(override)
        raw = cast(dict[str, Any], merged(raw, over))
        origins |= dict.fromkeys(leaves(over), "the command line")
    return Loaded(_checked(raw, source, origins), origins)


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration with all defaults, as plain data: it loads again to the same."""
    return config.model_dump(mode="json", by_alias=True)


def from_resolved(raw: Mapping[str, Any], source: str) -> Config:
    """The configuration that `resolved` wrote."""
    return _checked(dict(raw), source, {})


def _read(source: str, origins: dict[str, str], above: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(source, above[-1].parent if above else Path.cwd())
    if path in above:
        raise ConfigError(
            "configurations extend each other in a circle",
            where=str(path),
            seen=" -> ".join(p.name for p in (*above, path)),
        )
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            "a configuration is a mapping of names to values",
            where=str(path),
            seen=type(raw).__name__,
            fix="steps: 1000",
        )
    below = raw.pop("extends", None)
    base = _read(str(below), origins, (*above, path)) if below else {}
    base.pop("name", None)
    known = {recipe.path for recipe in recipes()}
    origins |= {key: f"recipe {path.stem}" if path in known else str(path) for key in leaves(raw)}
    return merged(base, raw)


def _find(source: str, beside: Path) -> Path:
    by_name = {recipe.name: recipe.path for recipe in recipes()}
    if source in by_name:
        return by_name[source]
    path = Path(source).expanduser()
    path = path if path.is_absolute() or path.exists() else beside / path
    if path.is_file():
        return path.resolve()
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError("there is no such configuration", where=source, seen=f"no file {path}", fix="sfumato recipes")
    raise ConfigError("no such recipe or file", where=source, fix=f"{nearest(source, by_name)} (see: sfumato recipes)")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody expects, and a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_number = __import__("re").compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$")
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _number))


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML text; ConfigError with line and column where it is not YAML."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(
            "this is not YAML",
            where=place,
            seen=str(getattr(error, "problem", error)),
            fix="name: value, with spaces, not tabs",
        ) from None


def _parsed(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError("an override is key=value", where="the command line", seen=override, fix="optim.lr=1e-3")
    value = parse_yaml(text, override) if text else None
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def merged(below: Any, above: Any, where: str = "") -> Any:
    """`above` laid over `below`."""
    if where in SLOTS and isinstance(above, str):
        above = {"kind": above}
    if where in SLOTS and isinstance(below, str):
        below = {"kind": below}
    if not isinstance(above, Mapping) or not isinstance(below, Mapping):
        return above
    if where in SLOTS and "kind" in above and above["kind"] != below.get("kind"):
        below = _surviving(below, above["kind"], SLOTS[where])
    result = dict(below)
    for key, value in above.items():
        inner = f"{where}.{key}" if where else str(key)
        result[key] = merged(below[key], value, inner) if key in below else value
    return result


def _surviving(options: Mapping[str, Any], kind: Any, kind_of: str) -> dict[str, Any]:
    target = target_of(str(kind), KINDS[kind_of])
    known = (options_of(target) if target else None) or {}
    return {name: value for name, value in options.items() if name in known}


def leaves(raw: Any, where: str = "") -> list[str]:
    """The dotted keys of all values of a nested mapping."""
    if isinstance(raw, Mapping) and raw:
        return [leaf for key, value in raw.items() for leaf in leaves(value, f"{where}.{key}" if where else str(key))]
    return [where]


def _checked(raw: dict[str, Any], source: str, origins: dict[str, str]) -> Config:
    problems, config = list(slot_problems(raw)), None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(one) for one in error.errors()]
    if config is not None and not problems:
        return config
    lines, seen = [], set[str]()
    for problem in problems:
        if problem.where not in seen:
            seen.add(problem.where)
            lines.append(_line(problem, origins))
    many = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise ConfigError(
        f"{many} in the configuration\n" + "\n".join(lines),
        where=source,
        fix="sfumato train RECIPE --print-config shows every key",
    )


def _line(problem: Problem, origins: dict[str, str]) -> str:
    keys = [key for key in origins if key == problem.where or key.startswith(f"{problem.where}.")]
    said = f", from {origins[keys[-1]]}" if keys else ""
    seen = f" (seen: {problem.seen}{said})" if problem.seen else said
    return f"  {problem.where} {problem.what}{seen}" + (f"\n      try: {problem.fix}" if problem.fix else "")


def _problem(error: Any) -> Problem:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return Problem(where, "is no key of the configuration", repr(error["input"]), _nearest_key(error["loc"]))
    if error["type"] == "missing":
        return Problem(where, "is missing")
    return Problem(where, error["msg"][0].lower() + error["msg"][1:], repr(error["input"]))


def _nearest_key(place: tuple[Any, ...]) -> str:
    model: Any = Config
    for part in place[:-1]:
        field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
        inner = getattr(field, "annotation", None)
        if not hasattr(inner, "model_fields"):
            return "remove it"
        model = inner
    return nearest(str(place[-1]), [f.alias or n for n, f in model.model_fields.items()])
