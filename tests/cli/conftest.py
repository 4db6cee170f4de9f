"""The command line, run in this process, in a folder of its own."""

from pathlib import Path

import pytest
from commands import Command, Outcome
from PIL import Image as Pillow
from PIL import ImageDraw

from sfumato.cli import main


@pytest.fixture
def sfumato(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `sfumato WORDS...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFUMATO_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty captioned pictures made by hand, of several sizes, no two the same."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        colour, shape = ("red", "green", "blue")[i % 3], ("circle", "square")[i % 2]
        image = Pillow.new("RGB", (40 + i, 64), (i, 20, 20))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((10, 10, 30, 30), fill=colour)
        image.save(folder / f"p{i:02}.png")
        (folder / f"p{i:02}.txt").write_text(f"a {colour} {shape}\n")
    return folder
