"""The documentation: every command, block, link, picture and name in it is one that exists."""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from sfumato.catalogue import KINDS
from sfumato.cli import app
from sfumato.cli.distill import changes_of
from sfumato.errors import ConfigError
from sfumato.overlay import load_config, recipes

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_DRAWN_YET: set[str] = set()  # must be empty at a release
RECIPES = {recipe.name for recipe in recipes()}
NAMES = RECIPES | {name for table in KINDS.values() for name in table}
PLACES = re.compile(r"(src|tests|docs|benchmarks|scripts|requirements|\.ci)(/[\w.-]+)+/?")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line before it."""

    language: str
    text: str
    before: str


def blocks(text: str) -> list[Block]:
    found = re.findall(r"(?:^|\n)(?:([^\n]*\S[^\n]*)\n)?\n?```(\w*)\n(.*?)\n```", text, re.S)
    return [Block(language, body, before) for before, language, body in found]


def prose(text: str) -> str:
    return re.sub(r"```.*?\n```", "", text, flags=re.S)


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text: str) -> Iterator[str]:
    """Every command line of ours: in shell blocks, and in the prose."""
    for block in blocks(text):
        if block.language in ("sh", "console", "bash"):
            yield from (line.removeprefix("$ ").removeprefix(".venv/bin/") for line in block.text.splitlines())
    yield from (said for said in ticked(text) if re.match(r"sfumato [a-z-]", said))


def fault(line: str) -> str | None:
    """What is wrong with a command line, which is not run."""
    words = [word for word in shlex.split(line, comments=True) if word != "--debug"]
    command, name, words = typer.main.get_command(app), "sfumato", words[1:]
    while words and (inner := getattr(command, "commands", {}).get(words[0])) is not None:
        command, name, words = inner, words[0], words[1:]
    if hasattr(command, "commands"):
        return f"{name} has no command {words[0]}" if words and not words[0].startswith("--") else None
    if not words:
        return None  # spoken of, not to be typed
    try:
        given = command.make_context(name, [*words]).params
    except typer.Exit:
        return None  # --help
    except Exception as error:
        return str(error)
    if name == "distill":
        method = given["method"] if given["method"] in RECIPES else "guidance"
        try:
            return wrong(method, changes_of(method, [one for one in given["overrides"] or [] if one[0] != "["]))
        except ConfigError as error:
            return str(error)
    return wrong(given["source"], given["overrides"]) if "overrides" in given else None


def wrong(source: str, overrides: list[str] | None) -> str | None:
    """What is wrong with changes to a recipe; another configuration is taken for a small one."""
    try:
        load_config(source if source in RECIPES else "tiny", [one for one in overrides or [] if one[0] != "["])
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture
def beside(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that holds the modules which a page has the reader write."""
    for block in blocks(page.read_text()):
        if named := re.search(r"`(\w+\.py)`:$", block.before):
            (tmp_path / named[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pages
def test_commands_are_commands_and_their_changes_are_valid(page: Path, beside: Path) -> None:
    faults = {
        line: said for line in commands(page.read_text()) if line.startswith("sfumato ") and (said := fault(line))
    }
    assert not faults


@pages
def test_configurations_load(page: Path, beside: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "yaml" and "--8<--" not in block.text:
            (beside / "config.yaml").write_text(block.text)
            assert load_config("config.yaml").config.steps > 0


@pages
def test_python_compiles_and_what_it_imports_is_there(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text, str(page))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfumato"):
                    module = importlib.import_module(str(node.module))
                    assert not [one.name for one in node.names if not hasattr(module, one.name)]


@pages
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = prose(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not re.match(r"https?://|#", target):
            place = (page.parent / target.partition("#")[0]).resolve()
            assert place.exists() or str(place.relative_to(ROOT)) in NOT_DRAWN_YET, target


@pages
def test_places_in_the_repository_exist(page: Path) -> None:
    assert not [said for said in ticked(page.read_text()) if PLACES.fullmatch(said) and not (ROOT / said).exists()]


@pages
def test_make_has_what_is_asked_of_it(page: Path) -> None:
    text = page.read_text()
    lines = [line for block in blocks(text) for line in block.text.splitlines()]
    asked = [line.split()[1] for line in [*lines, *ticked(text)] if re.match(r"make [a-z]", line)]
    assert {*asked} <= {*re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)}


def test_pictures_that_are_there_are_not_said_to_be_missing() -> None:
    assert not [picture for picture in NOT_DRAWN_YET if (ROOT / picture).exists()]


def table(page: str, head: str) -> list[list[str]]:
    """The rows of a table, found by the cells of its head."""
    text = (ROOT / page).read_text()
    body = text.partition(f"\n| {head} |\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in body.splitlines()[1:]]


SYSTEMS = table("README.md", "system | what works now | how to run it | where it is tested")


@pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row[0])
def test_the_table_of_systems_speaks_of_what_is_there(row: list[str]) -> None:
    name, works, run, tested = row
    for said in ticked("\n".join(row)):
        if said.startswith("sfumato "):
            assert fault(said) is None
        elif "=" in said:
            assert wrong("quickstart", said.split()) is None
        else:
            assert said in NAMES or PLACES.fullmatch(said), said
    if works.startswith("not yet"):
        assert not run and not tested, f"{name} does not work: there is nothing to run"
    else:
        assert ticked(tested) or tested == "not yet", f"{name} is said to work: where is it tested?"


def test_every_system_of_the_design_has_its_row() -> None:
    said = " ".join(row[0] for row in SYSTEMS)
    for one in ("DDPM", "onditional", "U-Net", "DiT", "low matching", "Stable Diffusion", "MMDiT", "FLUX", "PixArt"):
        assert one in said
    for one in ("onsistency", "ControlNet", "LoRA", "FID", "erving"):
        assert one in said


def test_the_hour_of_reading_is_an_hour_of_files_that_exist() -> None:
    rows = table("README.md", "file | what it says | minutes")
    assert all((ROOT / "src/sfumato" / file).is_file() for row in rows for file in ticked(row[0]))
    assert sum(int(row[2]) for row in rows) == 60


def test_every_line_of_the_catalogue_is_in_the_guide_to_adding() -> None:
    rows = table("CONTRIBUTING.md", "to add | write | its line | what the tests then ask")
    lines = {said for row in rows for said in ticked(row[2])}
    module = ast.parse((ROOT / "src/sfumato/catalogue.py").read_text())
    tables = {one.targets[0].id for one in module.body if isinstance(one, ast.Assign)}  # type: ignore[union-attr]
    assert tables == lines


def test_every_layer_is_explained() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    rows = table("CONTRIBUTING.md", "layer, from above | what")
    named = {said for row in rows for said in ticked(row[0])}
    assert named == {one.strip().removeprefix("sfumato.") for layer in layers for one in layer.split(":")}


@pytest.mark.parametrize(
    "line",
    [
        "sfumato paint runs/quickstart",
        "sfumato sample runs/quickstart --stepps 8",
        "sfumato sample runs/quickstart --steps many",
        "sfumato data chek DIR",
        "sfumato train tiny optim.learning_rate=1",
        "sfumato train tiny model.path=nowhere",
        "sfumato train --run",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    assert fault(line)
