"""From names in a config to objects, without importing anything until it is needed.

A *slot* of a config is a name, or a mapping `{kind: NAME, option: value, ...}`; the kind is looked up in a table of
targets, or is itself a target, "module:Name", so that a user's own class stands wherever one of ours does. A class is
called with the options; a function keeps them for later (`partial`); "module:name()" calls a function that makes what
is wanted; any other value is taken as it is. Options are read from the source by `ast`, so a mistyped one is reported
before torch is imported.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from sfumato.errors import ConfigError, nearest

Table = Mapping[str, str]
Kinds = Mapping[str, Table]  # from the name of a type, as annotations write it, to the table of what it can be


class Option(NamedTuple):
    """One option of a target: its annotation as written, and whether it must be given."""

    name: str
    annotation: str
    required: bool


class Problem(NamedTuple):
    """Something wrong with a config: at which dotted key, what, what was seen, and what to write instead."""

    where: str
    what: str
    seen: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Source:
    """The syntax tree of the module a target lives in, and the node that defines it."""

    tree: ast.Module
    node: ast.stmt | None


def resolve(target: str) -> Any:
    """The object that "module:Name" names; ConfigError if there is none. The current directory can be imported from."""
    module, _, name = target.removesuffix("()").partition(":")
    with _here():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(
                "a module cannot be found", where=target, seen=str(error), fix="a module that can be imported from here"
            ) from None
    if not hasattr(found, name):
        raise ConfigError(
            "a module lacks what was asked of it",
            where=target,
            seen=name,
            fix=nearest(name, [n for n in dir(found) if n[0] != "_"]),
        )
    return getattr(found, name)


def target_of(kind: str, table: Table) -> str | None:
    """The target that a kind stands for, or None if it is neither in the table nor "module:Name"."""
    return table.get(kind) or (kind if re.fullmatch(r"[\w.]+:\w+(\(\))?", kind) else None)


def options_of(target: str) -> dict[str, Option] | None:
    """The options of a target, read from its source; None where that cannot tell (then nothing is checked)."""
    source = _source(target)
    if source is None or source.node is None:
        return None
    node = source.node
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, every=target.endswith("()"))
    if isinstance(node, ast.ClassDef):
        return _of_class(node, source.tree)
    return {}


def exists(target: str) -> bool:
    """Whether the source of a target is there and defines it."""
    source = _source(target)
    return source is not None and source.node is not None


def build(slot: Any, kind_of: str, kinds: Kinds) -> Any:
    """The object that a slot describes. `kind_of` names the table, as annotations do: "Path", "Weight"."""
    if slot is None or not isinstance(slot, (str, Mapping)):
        return slot
    given = {"kind": slot} if isinstance(slot, str) else dict(slot)
    kind = str(given.pop("kind"))
    target = target_of(kind, kinds[kind_of])
    if target is None:
        raise ConfigError(
            f"unknown {kind_of.lower()}", where=kind_of.lower(), seen=kind, fix=nearest(kind, kinds[kind_of])
        )
    known = options_of(target) or {}
    options = {name: _value(value, known.get(name), kinds) for name, value in given.items()}
    return _made(resolve(target), options, called=target.endswith("()"))


def _made(found: Any, options: dict[str, Any], called: bool) -> Any:
    if inspect.isclass(found):
        config = _config_class(found)
        make: Callable[..., Any] = found
        return make(config(**options)) if config is not None else make(**options)
    if called:
        return found(**options)
    return functools.partial(found, **options) if options else found


def _value(value: Any, option: Option | None, kinds: Kinds) -> Any:
    kind_of = _slot_kind(option.annotation, kinds) if option else None
    if kind_of and isinstance(value, list):
        return [build(one, kind_of, kinds) for one in value]
    if kind_of:
        return build(value, kind_of, kinds)
    return _tupled(value)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value


def _slot_kind(annotation: str, kinds: Kinds) -> str | None:
    """The table that an option is a slot of: that whose name its annotation mentions."""
    return next((kind for kind in kinds if re.search(rf"\b{kind}\b", annotation)), None)


def _config_class(found: type) -> Any:
    parameter = inspect.signature(found).parameters.get("config")
    if parameter is None:
        return None
    hint = get_type_hints(found.__init__).get("config")  # type: ignore[misc]
    return hint if is_dataclass(hint) else None


def check(slot: Any, kind_of: str, kinds: Kinds, where: str) -> Iterator[Problem]:
    """Everything that is wrong with a slot: its kind, and its options' names, presence and simple types."""
    given = {"kind": slot} if isinstance(slot, str) else slot
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        yield Problem(
            where,
            "names something to use, alone or as `kind` with options",
            repr(slot),
            f"{where}={next(iter(kinds[kind_of]))}",
        )
        return
    kind = given["kind"]
    target = target_of(kind, kinds[kind_of])
    if target is None:
        yield Problem(where, "is not known", kind, f"{nearest(kind, kinds[kind_of])}, or your own module:Name")
        return
    if not exists(target):
        if target == kind:
            yield Problem(where, "cannot be found from here", kind, "a module and a name in it, as in schedules:Mine")
        return
    known = options_of(target)
    if known is not None:
        yield from _check_options(given, known, kinds, where, kind)


def _check_options(
    given: Mapping[str, Any], known: Mapping[str, Option], kinds: Kinds, where: str, kind: str
) -> Iterator[Problem]:
    for name, value in given.items():
        if name == "kind":
            continue
        if name not in known:
            hint = nearest(name, known) if known else "remove it"
            yield Problem(f"{where}.{name}", f"is no option of {kind}", repr(value), hint)
            continue
        annotation = known[name].annotation
        nested = _slot_kind(annotation, kinds)
        if nested and value is not None:
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                yield from check(one, nested, kinds, f"{where}.{name}" + (f".{i}" if isinstance(value, list) else ""))
        elif not nested and not fits(value, annotation):
            yield Problem(f"{where}.{name}", f"should be {annotation}", repr(value))
    for name, option in known.items():
        if option.required and name not in given:
            yield Problem(
                f"{where}.{name}", f"is needed by {kind}", "nothing", f"{where}.{name}=..., {option.annotation}"
            )


def fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value can be meant for an annotation; what is not a simple type is not judged."""
    try:
        node = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return True
    return _fits(value, node)


SIMPLE: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
}


def _fits(value: Any, node: ast.expr) -> bool:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return fits(value, text)
        case ast.Name(id=name):
            return name not in SIMPLE or SIMPLE[name](value)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            allowed = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return value in [one.value for one in allowed if isinstance(one, ast.Constant)]
        case ast.Subscript(value=ast.Name(id="tuple" | "list" | "Sequence" as outer), slice=inner):
            return isinstance(value, (list, tuple)) and _fits_each(value, outer, inner)
        case ast.Subscript(value=ast.Name(id="Mapping" | "dict")):
            return isinstance(value, Mapping)
    return True


def _fits_each(value: Any, outer: str, inner: ast.expr) -> bool:
    if outer != "tuple" or not isinstance(inner, ast.Tuple):
        return all(_fits(one, inner) for one in value)
    if isinstance(inner.elts[-1], ast.Constant) and inner.elts[-1].value is ...:
        return all(_fits(one, inner.elts[0]) for one in value)
    return len(value) == len(inner.elts) and all(_fits(one, node) for one, node in zip(value, inner.elts, strict=True))


def _of_function(node: ast.FunctionDef, every: bool) -> dict[str, Option]:
    found, args = {}, node.args
    if every:
        first = len(args.args) - len(args.defaults)
        found = {
            arg.arg: Option(arg.arg, _text(arg.annotation), i < first)
            for i, arg in enumerate(args.args)
            if arg.arg not in ("self", "cls")
        }
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found[arg.arg] = Option(arg.arg, _text(arg.annotation), default is None)
    return found


def _of_class(node: ast.ClassDef, tree: ast.Module) -> dict[str, Option] | None:
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return _of_dataclass(node)
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if init is None:
        return {} if not node.bases else None
    known = _of_function(init, every=True)
    if "config" in known:
        config = _defined(tree, known["config"].annotation)
        return _of_dataclass(config) if isinstance(config, ast.ClassDef) else None
    return None if init.args.kwarg else known


def _of_dataclass(node: ast.ClassDef) -> dict[str, Option]:
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    return {
        one.target.id: Option(one.target.id, _text(one.annotation), one.value is None)
        for one in fields
        if isinstance(one.target, ast.Name) and "ClassVar" not in _text(one.annotation)
    }


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "" if node is None else ast.unparse(node)


@functools.lru_cache(maxsize=256)
def _source(target: str) -> Source | None:
    module, _, name = target.removesuffix("()").partition(":")
    path = _file(module)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return Source(tree, _defined(tree, name))


def _defined(tree: ast.Module, name: str) -> ast.stmt | None:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return node
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            return node  # defined elsewhere: known to exist, its options are not read
    return None


def _file(module: str) -> Path | None:
    """The file of a module, found without importing its packages."""
    top, *rest = module.split(".")
    with _here():
        try:
            spec = importlib.util.find_spec(top)
        except ValueError:
            return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    for part in rest:
        folder = path.parent / part
        path = folder / "__init__.py" if folder.is_dir() else path.parent / f"{part}.py"
    return path if path.is_file() else None


class _here:
    """The current directory, importable for a while."""

    def __enter__(self) -> None:
        self.added = str(Path.cwd())
        sys.path.insert(0, self.added)
        importlib.invalidate_caches()

    def __exit__(self, *_: object) -> None:
        if self.added in sys.path:
            sys.path.remove(self.added)
