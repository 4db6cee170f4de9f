"""Pictures that carry how they were made, under names that cannot hurt."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from sfumato.errors import DataError, MachineError
from sfumato.io import pictures
from sfumato.io.pictures import parameters, png, read_settings, save_png, slug, unused

SAID = {
    "prompt": "a red circle, left of a blue square",
    "negative": "a green triangle",
    "seed": 7,
    "sampler": {"kind": "ddim", "eta": 0.5},
    "grid": "karras",
    "steps": 20,
    "guidance": 3.5,
    "interval": [0.2, None],
    "size": [8, 12],
    "model": {"run": "quickstart", "steps": 100},
    "version": "1.2.3",
}
# How the tools that write and read the `parameters` chunk take its last line apart.
PAIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def image(height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_and_settings_come_back_exactly(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(), SAID)
    assert read_settings(tmp_path / "a.png") == SAID
    assert np.array_equal(np.asarray(Pillow.open(tmp_path / "a.png")), image())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none()
    ),
    st.text(),
)
def test_any_settings_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, object], prompt: str
) -> None:
    path, said = tmp_path_factory.mktemp("any") / "a.png", {**extra, "prompt": prompt}
    said = {
        name: value for name, value in said.items() if name not in ("size", "model")
    }  # these have shapes of their own
    path.write_bytes(png(image(), said))
    assert read_settings(path) == said


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(), {"seed": np.int64(3), "guidance": np.float32(0.5)})
    assert read_settings(tmp_path / "a.png") == {"seed": 3, "guidance": 0.5}


def test_other_tools_find_what_they_look_for(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", image(), SAID)
    prompt, negative, line = Pillow.open(tmp_path / "a.png").text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert prompt == SAID["prompt"]
    assert negative == "Negative prompt: a green triangle"
    assert dict(PAIRS.findall(line)) == {
        "Steps": "20",
        "Sampler": "ddim",
        "Schedule type": "karras",
        "CFG scale": "3.5",
        "Seed": "7",
        "Size": "12x8",
        "Model": "quickstart",
        "RNG": "CPU",
        "Version": "sfumato 1.2.3",
    }


def test_values_with_punctuation_are_quoted() -> None:
    line = parameters({"sampler": "mine:Sampler", "seed": 1}).splitlines()[-1]
    assert json.loads(dict(PAIRS.findall(line))["Sampler"]) == "mine:Sampler"
    assert dict(PAIRS.findall(line))["Seed"] == "1"


def test_a_picture_without_a_prompt_has_an_empty_first_line() -> None:
    assert parameters({"prompt": None, "steps": 3}).startswith("\nSteps: 3")


@given(st.text())
def test_a_slug_is_a_plain_short_name(text: str) -> None:
    name = slug(text)
    assert 0 < len(name.encode()) <= 80
    assert Path(name).name == name and not name.startswith((".", "-")) and "\\" not in name and "\0" not in name
    assert slug(name) == name


def test_slugs_read_like_their_prompts() -> None:
    assert slug("A red Circle, left of\na BLUE square!") == "a-red-circle-left-of-a-blue-square"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == slug("") == "picture"
    assert slug("ein grüner Kreis") == "ein-grüner-kreis"
    assert len(slug("é" * 100).encode()) == 80


def test_names_in_use_are_passed_over(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"a-{number:04d}.png").touch()
    assert unused(tmp_path, "a").name == "a-0002.png"
    assert unused(tmp_path, "a", start=3).name == "a-0004.png"
    assert unused(tmp_path, "a", ".txt").name == "a-0000.txt"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "a.png", image(), SAID)
    assert (tmp_path / "a.png").read_bytes() == b"precious"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise MachineError("the disk is full")

    monkeypatch.setattr(pictures, "write_atomic", full)
    with pytest.raises(MachineError):
        save_png(tmp_path / "a.png", image(), SAID)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        save_png(tmp_path / "nowhere" / "a.png", image(), SAID)
    assert str(caught.value.where).endswith("nowhere/a.png")


def test_what_carries_no_settings_is_named(tmp_path: Path) -> None:
    plain, text, photo, bad = (tmp_path / name for name in ("plain.png", "text.png", "photo.jpg", "bad.png"))
    Pillow.fromarray(image()).save(plain)
    text.write_text("not a picture")
    Pillow.fromarray(image()).save(photo)
    bad.write_bytes(png(image(), SAID)[:60])
    for path in (plain, text, photo, bad, tmp_path / "missing.png"):
        with pytest.raises(DataError) as caught:
            read_settings(path)
        assert caught.value.where == str(path)


def test_settings_that_were_meddled_with_are_refused(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for text in ("{", "3"):
        info = PngInfo()
        info.add_text("sfumato", text)
        Pillow.fromarray(image()).save(tmp_path / "a.png", pnginfo=info)
        with pytest.raises(DataError, match="settings cannot be read"):
            read_settings(tmp_path / "a.png")
