"""From names in a config to objects, without importing anything until it is needed.

A *slot* of a config is a name, or a mapping `{kind: NAME, option: value, ...}`; the kind is looked up in a table of
targets, or is itself a target, "module:Name", so that a user's own class stands wherever one of ours does. A class is
called with the options; a function keeps them for later (`partial`); "module:name()" calls a function that makes what
is wanted; any other value is taken as it is. Options are read from the source (see `sfumato.signatures`), so a mistyped
one is reported before torch is imported.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_type_hints

from sfumato.errors import ConfigError, MachineError, SfumatoError, nearest
from sfumato.signatures import Option as Option
from sfumato.signatures import exists, here, is_ours
from sfumato.signatures import options_of as options_of

Table = Mapping[str, str]
Kinds = Mapping[str, Table]  # from the name of a type, as annotations write it, to the table of what it can be


class Problem(NamedTuple):
    """Something wrong with a config: at which dotted key, what, what was seen, and what to write instead."""

    where: str
    what: str
    seen: str = ""
    fix: str = ""


def resolve(target: str) -> Any:
    """The object that "module:Name" names. The current directory can be imported from.

    ConfigError if there is none or its module cannot be imported; MachineError if that needs a library that is missing.
    """
    module, _, name = target.removesuffix("()").partition(":")
    try:
        with here(module):
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise MachineError(
                "a library is missing",
                where=target,
                seen=str(error),
                fix="install it, or run where it is",
            ) from error
        raise ConfigError(
            "a module cannot be found", where=target, seen=str(error), fix="a module that can be imported from here"
        ) from None
    except Exception as error:
        if is_ours(module) or isinstance(error, SfumatoError):
            raise
        seen = f"{type(error).__name__}: {error}"
        raise ConfigError("a module cannot be imported", where=target, seen=seen) from error
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


def build(slot: Any, kind_of: str, kinds: Kinds) -> Any:
    """The object that a slot describes. `kind_of` names the table, as annotations do: "Path", "Weight"."""
    if slot is None or not isinstance(slot, (str, Mapping)):
        return slot
    given = {"kind": slot} if isinstance(slot, str) else dict(slot)
    kind = str(given.pop("kind", ""))
    target = target_of(kind, kinds[kind_of])
    if target is None:
        raise ConfigError(
            f"unknown {kind_of.lower()}", where=kind_of.lower(), seen=kind, fix=nearest(kind, kinds[kind_of])
        )
    found, known = resolve(target), options_of(target)
    known = _of_object(found) if known is None else known
    options = {name: _value(value, known.get(name), kinds) for name, value in given.items()}
    return _made(found, options, called=target.endswith("()"))


def _of_object(found: Any) -> dict[str, Option]:
    """The options of what its source alone does not tell of, one's own class above which stands one of ours, say."""
    try:
        told = (inspect.isclass(found) and _config_class(found)) or found
        parameters = inspect.signature(told).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {one.name: Option(one.name, inspect.formatannotation(one.annotation), False) for one in parameters}


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
    """The table that an option is a slot of: that whose name its annotation mentions, unless it is `pathlib.Path`."""
    names = (dotted.rpartition(".") for dotted in re.findall(r"[\w.]+", annotation))
    mentioned = {name for home, _, name in names if home.partition(".")[0] not in sys.stdlib_module_names}
    return next((kind for kind in kinds if kind in mentioned), None)


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
        fix = f"{where}={next(iter(kinds[kind_of]), 'module:Name')}"
        if isinstance(given, Mapping) and any(str(key).startswith("kind:") for key in given):
            fix = "kind: NAME, with a space after the colon"
        yield Problem(where, "names something to use, alone or as `kind` with options", repr(slot), fix)
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
        others = {other: target for other, target in kinds[kind_of].items() if other != kind}
        yield from _check_options(given, known, kinds, where, others)


def _check_options(
    given: Mapping[str, Any], known: Mapping[str, Option], kinds: Kinds, where: str, others: Table
) -> Iterator[Problem]:
    kind = given["kind"]
    for name, value in given.items():
        if name == "kind":
            continue
        if name not in known:
            homes = [other for other, target in others.items() if name in (options_of(target) or {})]
            hint = f"{where}.kind={homes[0]}, which has it" if homes else nearest(name, known) if known else "remove it"
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
