"""What must be quick is: importing the library, help, listings and mistakes never load torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL")
# Runs the command line as it is run, and says at the very end, on stderr, what it had loaded.
RUN = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
from sfumato.cli import main
main(sys.argv[1:])
"""


def run(folder: Path, script: str, *words: str) -> tuple[int, str, str, set[str]]:
    """Exit code, stdout, stderr and what heavy libraries were loaded."""
    env = {name: value for name, value in os.environ.items() if name != "SFUMATO_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said, _, loaded = done.stderr.rpartition("loaded:")
    return done.returncode, done.stdout, said, set(loaded.split())


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["--help"], 0, "train", ""),
        (["train", "--help"], 0, "RECIPE", ""),
        (["sample", "--help"], 0, "--steps", ""),
        (["recipes"], 0, "quickstart", ""),
        (["train", "quickstart", "--print-config"], 0, "name: quickstart", ""),
        (["train", "nosuch"], 2, "", "no such recipe or file"),
        (["train", "quickstart", "steps=abc"], 2, "", "steps"),
        (["train", "quickstart", "model.net.dimm=3", "batch=0"], 2, "", "2 faults"),
        (["train", "quickstart", "model.net=mine:Net"], 2, "", "mine:Net"),
        (["nosuch"], 2, "", "nosuch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_torch_for_help_listings_and_mistakes(
    tmp_path: Path, words: list[str], code: int, out: str, err: str
) -> None:
    returned, stdout, stderr, loaded = run(tmp_path, RUN, *words)
    assert (returned, loaded & {"torch", "transformers", "tokenizers"}) == (code, set()), stderr
    assert out in stdout and err in stderr and "Traceback" not in stderr
    assert code == 0 or stdout == ""  # mistakes are talk, not results
    assert list(tmp_path.iterdir()) == []


def test_importing_the_library_loads_nothing_heavy(tmp_path: Path) -> None:
    script = f"import sys, sfumato; print(*[name for name in {HEAVY!r} if name in sys.modules], sfumato.__version__)"
    code, stdout, stderr, _ = run(tmp_path, script)
    assert code == 0, stderr
    assert len(stdout.split()) == 1  # the version alone


def test_what_knows_names_and_configs_needs_no_torch(tmp_path: Path) -> None:
    script = """
import sys
import sfumato.catalogue, sfumato.config, sfumato.data.folder, sfumato.data.scenes, sfumato.errors, sfumato.files
import sfumato.overlay, sfumato.registry
for name, table in sfumato.catalogue.KINDS.items():
    for kind in table:
        list(sfumato.registry.check(kind, name, sfumato.catalogue.KINDS, name))
sfumato.load_config("quickstart")
print("torch" in sys.modules)
"""
    code, stdout, stderr, _ = run(tmp_path, script)
    assert (code, stdout) == (0, "False\n"), stderr


def test_the_librarys_names_are_the_same_however_they_are_reached(tmp_path: Path) -> None:
    """`sfumato.train` is a package and a function: before and after it is loaded, both ways of writing it work."""
    script = """
import sfumato
first, again = sfumato.train, sfumato.train
from sfumato import train
assert first is again is train and callable(train), (first, again, train)
import sfumato.train.loop
assert sfumato.train is first and sfumato.train.loop.train is not None
assert set(dir(sfumato)) >= {"Pipeline", "Samples", "load", "load_config", "train", "__version__"}
from sfumato import Pipeline, Samples, load, load_config
from sfumato.pipeline import load as same
assert load is same
try:
    sfumato.nosuch
except AttributeError as error:
    assert "nosuch" in str(error)
else:
    raise AssertionError
try:
    sfumato.train()
except TypeError as error:
    assert "config" in str(error), error
else:
    raise AssertionError
"""
    code, _, stderr, _ = run(tmp_path, script)
    assert code == 0, stderr
