"""What a target "module:Name" may be told, read from its source by `ast`, so that nothing is imported.

The options of a class are the arguments of its `__init__`, or the fields of the dataclass that it is or that its
`config` is; those of a function are its keyword-only arguments, or, if it is called for its result ("module:name()"),
all of them. Names are followed through imports; where the source does not tell, nothing is claimed.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sfumato.errors import ConfigError

EMPTY_BASES = ("Protocol", "Generic", "ABC")  # what a dataclass may inherit from without inheriting fields


class Option(NamedTuple):
    """One option of a target: its annotation as written, and whether it must be given."""

    name: str
    annotation: str
    required: bool


@dataclass(frozen=True)
class Source:
    """The syntax tree of the module a target lives in, and the node that defines it."""

    tree: ast.Module
    node: ast.stmt | None


def options_of(target: str) -> dict[str, Option] | None:
    """The options of a target, read from its source; None where that cannot tell (then nothing is checked)."""
    source = _source(target)
    if source is None or source.node is None:
        return None
    known = _of_node(source.node, source.tree, every=target.endswith("()"))
    return known and {name: option._replace(annotation=_in_full(option, source.tree)) for name, option in known.items()}


def exists(target: str) -> bool:
    """Whether the source of a target is there and defines it."""
    source = _source(target)
    return source is not None and source.node is not None


def _of_node(node: ast.stmt, tree: ast.Module, every: bool) -> dict[str, Option] | None:
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, every)
    if isinstance(node, ast.ClassDef):
        return _of_class(node, tree)
    return None if isinstance(node, ast.ImportFrom) else {}  # a value has no options


def _of_function(node: ast.FunctionDef, every: bool) -> dict[str, Option] | None:
    """The keyword-only arguments; of what is called for its result, `every` argument. None if it takes any at all."""
    found, args = {}, node.args
    if args.kwarg:
        return None
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
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if init is None and _is_dataclass(node):
        return _of_dataclass(node, tree)
    if init is None:
        return {} if not node.bases else None
    known = _of_function(init, every=True)
    if known and "config" in known:
        config = _defined(tree, known["config"].annotation)
        return _of_dataclass(config, tree) if isinstance(config, ast.ClassDef) else None
    return known


def _of_dataclass(node: ast.ClassDef, tree: ast.Module) -> dict[str, Option] | None:
    """The fields of a dataclass and of those above it; None if one of these is defined elsewhere."""
    found: dict[str, Option] = {}
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        if name in EMPTY_BASES:
            continue
        above = _defined(tree, name)
        inherited = _of_dataclass(above, tree) if isinstance(above, ast.ClassDef) else None
        if inherited is None:
            return None
        found |= inherited
    for one in node.body if _is_dataclass(node) else []:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and _is_field(one):
            found[one.target.id] = Option(one.target.id, _text(one.annotation), _is_required(one.value))
    return found


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_field(node: ast.AnnAssign) -> bool:
    """Whether a line of a dataclass is something to be given."""
    hidden = isinstance(node.value, ast.Call) and any(
        word.arg == "init" and ast.unparse(word.value) == "False" for word in node.value.keywords
    )
    return not hidden and not re.search(r"\b(ClassVar|KW_ONLY|FilledIn)\b", _text(node.annotation))


def _is_required(default: ast.expr | None) -> bool:
    if isinstance(default, ast.Call) and ast.unparse(default.func).rpartition(".")[2] == "field":
        return not any(word.arg in ("default", "default_factory") for word in default.keywords)
    return default is None


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "" if node is None else ast.unparse(node)


def _in_full(option: Option, tree: ast.Module) -> str:
    """An annotation with the standard library's Path, which is no noise path, written in full."""
    files = any(
        isinstance(node, ast.ImportFrom) and node.module == "pathlib" and any(one.name == "Path" for one in node.names)
        for node in _statements(tree.body)
    )
    return re.sub(r"(?<![\w.])Path\b", "pathlib.Path", option.annotation) if files else option.annotation


def _source(target: str, depth: int = 8) -> Source | None:
    """Where a target is defined, followed through at most so many imports."""
    module, _, name = target.removesuffix("()").partition(":")
    path = _file(module)
    if path is None:
        return None
    tree = _tree(path, path.stat().st_mtime_ns)
    node = _defined(tree, name)
    if isinstance(node, ast.ImportFrom) and depth:
        there = _source(_imported(node, name, module, path), depth - 1)
        if there is not None and (there.node is not None or node.names[0].name == "*"):
            return there
    return Source(tree, node)


@functools.lru_cache(maxsize=256)
def _tree(path: Path, changed: int) -> ast.Module:
    """A module's syntax; `changed` is when, so that an edited file is read again."""
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}"
        raise ConfigError("a module is not Python", where=where, seen=error.msg, fix="correct that line") from None


def _defined(tree: ast.Module, name: str) -> ast.stmt | None:
    star = None
    for node in _statements(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return node
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            return node
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            star = node
    return star


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])
        if isinstance(node, ast.Try):
            yield from _statements([one for handler in node.handlers for one in handler.body])


def _imported(node: ast.ImportFrom, name: str, module: str, path: Path) -> str:
    """The target that a name stands for, in a module that imports it."""
    original = next((one.name for one in node.names if (one.asname or one.name) == name), name)
    parts = module.split(".")
    kept = len(parts) - node.level + (path.name == "__init__.py") if node.level else 0
    return ".".join([*parts[:kept], *([node.module] if node.module else [])]) + f":{original}"


def _file(module: str) -> Path | None:
    """The file of a module, found without importing its packages."""
    top, *rest = module.split(".")
    try:
        with here(module):
            spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    if spec.origin is None and not folders:
        return None
    path = Path(folders[0]) / "__init__.py" if folders else Path(str(spec.origin))
    for part in rest:
        file, package = path.parent / f"{part}.py", path.parent / part / "__init__.py"
        path = file if file.is_file() and not package.is_file() else package  # or a folder without one, on the way
    return path if path.suffix == ".py" and path.is_file() else None


def is_ours(module: str) -> bool:
    """Whether a module is a part of this library."""
    return module.partition(".")[0] == "sfumato"


@contextlib.contextmanager
def here(module: str) -> Iterator[None]:
    """The current directory, importable for a while; but never for our own modules, nor for what they import."""
    if is_ours(module):
        yield
        return
    added = str(Path.cwd())
    sys.path.insert(0, added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added in sys.path:
            sys.path.remove(added)
