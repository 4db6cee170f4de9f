"""Configurations are laid over each other: a recipe over what it extends, the command line over all.

A mapping is merged key by key, anything else replaces. In a slot, another `kind` drops those inherited options which
the new kind does not have, so that `data.kind=folder data.path=DIR` keeps a recipe's size. Where each value came from
is remembered, so that an error can say it.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sfumato.catalogue import KINDS, build
from sfumato.config import Config, source_of
from sfumato.errors import ConfigError, nearest
from sfumato.names import spelled_out
from sfumato.problems import SLOTS, slot_problems, start_problems
from sfumato.registry import Problem, options_of, target_of

RECIPES = Path(__file__).parent / "recipes"
MEASURED = RECIPES / "measured.json"  # written by benchmarks/measured.py, for quickstart.py and fewstep.py


class Recipe(NamedTuple):
    """A configuration that comes with the library: its name, its file, and its first line of comment.

    measured: what came of training it once, with the machine; None where nobody has. "score" is that of the scenes
    suite; of a student in 4 steps, and "steps" has those of 1, 2 and 4.
    """

    name: str
    path: Path
    summary: str
    measured: Mapping[str, Any] | None = None


class Loaded(NamedTuple):
    """A checked configuration, and for every dotted key of it that was set, by what."""

    config: Config
    origins: dict[str, str]


def recipes() -> list[Recipe]:
    """The recipes of the library, by name."""
    measured: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found.append(Recipe(path.stem, path, first.lstrip("# ").strip(), measured.get(path.stem)))
    return found


def load_config(source: str, overrides: Iterable[str] = ()) -> Loaded:
    """The configuration of a recipe or a YAML file with `key=value` laid over it. One ConfigError names all faults."""
    origins: dict[str, str] = {}
    raw = _laid(source, overrides, origins)
    here = leaves(raw)  # what another kind dropped was set by nobody any more
    kept = {key: by for key, by in origins.items() if any(one == key or one.startswith(f"{key}.") for one in here)}
    return Loaded(_checked(raw, source, kept), kept)


def unchecked(source: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The same as plain data, as it was said: nothing is looked at, and no default is in it."""
    return _laid(source, overrides, {})


def resolved(config: Config) -> dict[str, Any]:
    """The whole configuration with all defaults, as plain data: it loads again to the same."""
    return config.model_dump(mode="json", by_alias=True)


def from_resolved(raw: Mapping[str, Any], source: str) -> Config:
    """The configuration that `resolved` wrote."""
    return _checked(dict(raw), source, {})


def run_data(run: Path) -> Any:
    """The data source of a run, or of the run that a model directory lies in; None where there is no config.yaml."""
    said = run_config(run)
    return None if said is None else build(source_of(said["data"]), "Data")


def run_config(run: Path) -> dict[str, Any] | None:
    """What is in the config.yaml of a run, or of the run that a model directory lies in; None where there is none."""
    config = next((one for one in (Path(run) / "config.yaml", Path(run) / "../config.yaml") if one.is_file()), None)
    return None if config is None else parse_yaml(config.read_text(encoding="utf-8"), str(config))


def _laid(source: str, overrides: Iterable[str], origins: dict[str, str]) -> dict[str, Any]:
    raw = _read(source, origins, ())
    raw.setdefault("name", Path(source).stem)
    for override in overrides:
        over = _spelled(_parsed(override))
        raw = cast(dict[str, Any], merged(raw, over))
        _note(origins, leaves(over), "the command line")
    return raw


def _read(source: str, origins: dict[str, str], above: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(source, above)
    if path in above:
        raise ConfigError(
            "configurations extend each other in a circle",
            where=str(path),
            seen=" -> ".join(p.name for p in (*above, path)),
            fix=f"leave extends out of {path.name}",
        )
    raw = parse_yaml(_text(path), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            "a configuration is a mapping of names to values",
            where=str(path),
            seen="an empty file" if raw is None else type(raw).__name__,
            fix="extends: quickstart",
        )
    raw = _spelled(raw)
    below = raw.pop("extends", None)
    base = _read(str(below), origins, (*above, path)) if below else {}
    base.pop("name", None)
    known = {recipe.path for recipe in recipes()}
    _note(origins, leaves(raw), f"recipe {path.stem}" if path in known else str(path))
    return merged(base, raw)


def _spelled(raw: dict[str, Any]) -> dict[str, Any]:
    """A layer in which the sampler and the grid have the catalogue's names; a wrong name stays, to be told of later."""
    if isinstance(raw.get("sampling"), dict):
        with suppress(ConfigError):
            raw["sampling"] = spelled_out(raw["sampling"])
    return raw


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        seen = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "a configuration cannot be read", where=str(path), seen=seen, fix="a file of text in UTF-8"
        ) from None


def _note(origins: dict[str, str], keys: Iterable[str], by: str) -> None:
    """Remembers who set some keys; what was set last stands last."""
    for key in keys:
        origins.pop(key, None)
        origins[key] = by


def _find(source: str, above: tuple[Path, ...]) -> Path:
    """The file of a recipe's name or a path; what a file extends is looked for beside it first."""
    by_name = {recipe.name: recipe.path for recipe in recipes()}
    if source in by_name:
        return by_name[source]
    path = Path(source).expanduser()
    for place in [*(file.parent for file in above[-1:]), Path.cwd()]:
        if (place / path).is_file():
            return (place / path).resolve()
    said = f", extended by {above[-1]}" if above else ""
    if path.suffix in (".yaml", ".yml"):
        seen = f"no file {path.absolute()}"
        raise ConfigError("there is no such configuration", where=f"{source}{said}", seen=seen, fix="sfumato recipes")
    raise ConfigError(
        "no such recipe or file", where=f"{source}{said}", fix=f"{nearest(source, by_name)} (see: sfumato recipes)"
    )


class _Loader(yaml.SafeLoader):
    """YAML as everybody expects it: 1e-3 is a number, off and no are words, a date is text, a key given twice is an
    error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        value: float = self.construct_yaml_float(node)
        return int(value) if "." not in node.value and value.is_integer() else value  # 1e6 counts pictures


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads as the same: a run named 1e3 stands in quotes."""


_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_TRUTH = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_Loader.yaml_implicit_resolvers = {
    first: [one for one in known if one[0] not in (f"{_TAG}bool", f"{_TAG}timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)
_Loader.add_implicit_resolver(f"{_TAG}bool", _TRUTH, list("tTfF"))


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


def as_yaml(raw: Mapping[str, Any]) -> str:
    """Plain data as YAML that `parse_yaml` reads as the same."""
    text: str = yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _parsed(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError("an override is key=value", where="the command line", seen=override, fix="optim.lr=1e-3")
    try:
        value = parse_yaml(text, override) if text else None
    except ConfigError as error:
        raise ConfigError(
            "the value of an override is not YAML", where=override, seen=error.seen, fix=f"'{key}=\"{text}\"'"
        ) from None
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
    if where == "optim" and "kind" in above and above["kind"] != below.get("kind"):  # its options lie apart
        options = below.get("options")
        kept = _surviving(options, above["kind"], "Optimizer") if isinstance(options, Mapping) else options
        below = {**below, **({"options": kept} if options is not None else {})}
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
    problems, config = [*slot_problems(raw), *start_problems(raw)], None
    if raw.get("start") is not None and raw.get("reparameterise") is None:
        said = [key for key, by in origins.items() if key.startswith("model.") and by == "the command line"]
        problems += [Problem(key, "is that of the model to start from", "", "leave it out") for key in said]
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
        fix="sfumato train quickstart --print-config shows every key",
    )


def _line(problem: Problem, origins: dict[str, str]) -> str:
    origin = _origin(problem.where, origins)
    said = f", from {origin}" if origin else ""
    seen = f" (seen: {problem.seen}{said})" if problem.seen else f" ({said.removeprefix(', ')})" if said else ""
    return f"  {problem.where} {problem.what}{seen}" + (f"\n      try: {problem.fix}" if problem.fix else "")


def _origin(where: str, origins: dict[str, str]) -> str | None:
    """Who set a key: itself, its kind, the last of what is in it, or else what it is in."""
    own = [key for key in origins if key in (where, f"{where}.kind")]
    inside = [key for key in origins if key.startswith(f"{where}.")]
    around = [key for key in origins if where.startswith(f"{key}.")]
    keys = own or inside or around
    return origins[keys[-1]] if keys else None


# What pydantic says, as we say it.
_WORDS = {
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_type": "should be text",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a name, or a mapping with kind and options",
    "model_type": "should be a mapping of names to values",
    "too_short": "should not be empty",
    "missing": "is missing",
    "value_error": "{error}",
    "greater_than": "should be more than {gt:g}",
    "greater_than_equal": "should be at least {ge:g}",
    "less_than": "should be less than {lt:g}",
    "less_than_equal": "should be at most {le:g}",
    "literal_error": "should be one of {expected}",
    "string_pattern_mismatch": "should be letters, digits, spaces, dots and dashes, and no path",
}


def _problem(error: Any) -> Problem:
    where, seen = ".".join(str(part) for part in error["loc"]), repr(error["input"])
    if error["type"] == "extra_forbidden":
        return Problem(where, "is no key of the configuration", seen, _nearest_key(error["loc"]))
    ours = _WORDS.get(error["type"])
    words = ours.format(**error.get("ctx", {})) if ours else error["msg"][0].lower() + error["msg"][1:]
    return Problem(where, words, "" if error["type"] == "missing" else seen)


def _nearest_key(place: tuple[Any, ...]) -> str:
    model: type[BaseModel] = Config
    for part in place[:-1]:
        if isinstance(part, int):
            continue
        field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
        inner = _section(field.annotation) if field else None
        if inner is None:
            return "remove it"
        model = inner
    return nearest(str(place[-1]), [f.alias or n for n, f in model.model_fields.items()])


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation speaks of: itself, or what a list is of."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None
