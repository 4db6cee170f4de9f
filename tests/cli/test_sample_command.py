"""`sfumato sample`: prompts from anywhere, pictures that say how they were made, and nothing overwritten."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, Command, told
from PIL import Image as Pillow

from sfumato.io.pictures import read_settings

FAST = ("--steps", "1", "--device", "cpu")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to write into."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    return Path("runs/tiny")


def test_pictures_of_a_prompt_and_a_sheet(sfumato: Command, run: Path) -> None:
    prompt = "a red circle left of a blue square"
    outcome = sfumato("sample", run, prompt, "--n", "3", "--steps", "2", "--device", "cpu", "--grid")
    assert outcome.code == 0, outcome.err
    paths = [Path(one) for one in outcome.out.splitlines()]
    stem = "a-red-circle-left-of-a-blue-square"
    assert paths == [run / "pictures" / f"{stem}-{i:04}.png" for i in range(3)] + [run / "pictures" / "grid-0000.png"]
    assert "3 pictures in runs/tiny/pictures" in outcome.err
    said = [read_settings(path) for path in paths[:3]]
    assert [one["seed"] for one in said] == [0, 1, 2]
    assert all(one["prompt"] == prompt and one["steps"] == 2 and one["guidance"] == 3.0 for one in said)
    images = [np.asarray(Pillow.open(path)) for path in paths[:3]]
    assert all(image.shape == (32, 32, 3) for image in images) and not np.array_equal(images[0], images[1])
    assert Pillow.open(paths[3]).width > 3 * 128


def test_nothing_is_overwritten_and_a_seed_gives_its_picture_again(sfumato: Command, run: Path) -> None:
    first = Path(sfumato("sample", run, "a cross", "--seed", "5", *FAST).out.strip())
    second = Path(sfumato("sample", run, "a cross", "--seed", "4", "--n", "2", *FAST).out.splitlines()[1])
    assert [first.name, second.name] == ["a-cross-0000.png", "a-cross-0002.png"]
    assert read_settings(second)["seed"] == 5
    assert np.array_equal(np.asarray(Pillow.open(first)), np.asarray(Pillow.open(second)))


def test_prompts_come_from_a_file_too(sfumato: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa red circle\n\n# a comment\n  two crosses  \n", encoding="utf-8")
    outcome = sfumato("sample", run, "a square", "--prompts", "prompts.txt", "--json", *FAST)
    assert [one["prompt"] for one in outcome.data["pictures"]] == ["a square", "a red circle", "two crosses"]
    assert outcome.data["grid"] is None


def test_results_for_programs_are_what_the_pictures_say(sfumato: Command, run: Path, tmp_path: Path) -> None:
    words = (
        "--sampler",
        "ddim",
        "--times",
        "karras",
        "--guidance",
        "2",
        "--negative",
        "a blue square",
        "--precision",
        "bf16",
    )
    outcome = sfumato("sample", run, "a cross", *words, "--out", "else/where", "--grid", "--json", *FAST)
    [one], grid = outcome.data["pictures"], outcome.data["grid"]
    assert grid == "else/where/grid-0000.png" and (tmp_path / grid).is_file()
    path = one.pop("path")
    assert path.startswith("else/where/") and read_settings(Path(path)) == one
    assert (one["sampler"], one["grid"], one["guidance"], one["negative"]) == ("ddim", "karras", 2.0, "a blue square")
    assert one["precision"] == "bf16" and one["model"]["run"] == "tiny"


def test_without_a_prompt_without_a_condition(sfumato: Command, run: Path) -> None:
    outcome = sfumato("sample", run, *FAST)
    assert outcome.code == 0 and outcome.out == "runs/tiny/pictures/picture-0000.png\n"
    assert "1 picture in" in outcome.err


def test_what_is_drawn_with_a_runs_model_goes_to_the_run(sfumato: Command, run: Path) -> None:
    """Its `model/` is rewritten by training, and takes with it what lies within."""
    assert sfumato("sample", run / "model", "a cross", *FAST).out == "runs/tiny/pictures/a-cross-0000.png\n"
    shutil.copytree(run / "model", "elsewhere")
    assert sfumato("sample", "elsewhere", "a cross", *FAST).out == "elsewhere/pictures/a-cross-0000.png\n"


def test_one_s_own_sampler(sfumato: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "my_samplers.py").write_text(
        "from sfumato.samplers.ddim import ddim\n\n\ndef mine(path, x, times):\n    return ddim(path, x, times)\n"
    )
    outcome = sfumato("sample", run, "a cross", "--sampler", "my_samplers:mine", "--json", *FAST)
    assert outcome.data["pictures"][0]["sampler"] == "my_samplers:mine"


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["a mauve circle"], 4, ["a word this model has never seen", "seen   mauve"]),
        (["a red circle " * 5], 4, ["longer than this model reads"]),
        (["a cross", "--negative", "fog"], 4, ["seen   fog"]),
        (["--prompts", "nope.txt"], 4, ["cannot be read", "where  nope.txt", "No such file"]),
        (["--prompts", "empty.txt"], 4, ["holds no prompts", "where  empty.txt"]),
        (["--prompts", "latin.txt"], 4, ["is not text", "UTF-8"]),
        (["a cross", "--sampler", "ddmi"], 2, ["sampler is not known", "seen   ddmi", "ddim"]),
        (["a cross", "--times", "karas"], 2, ["seen   karas", "karras"]),
        (["a cross", "--steps", "0"], 2, ["steps", "seen   0"]),
        (["a cross", "--guidance", "-1"], 2, ["guidance", "seen   -1"]),
        (["a cross", "--size", "32"], 2, ["HEIGHTxWIDTH", "seen   32"]),
        (["a cross", "--size", "0x32"], 2, ["size"]),
        (["a cross", "--size", "33x33"], 2, ["size", "33"]),
        (["a cross", "--device", "abacus"], 2, ["abacus", "device=cpu"]),
        (["a cross", "--precision", "fp8"], 2, ["fp8", "fp16"]),
        (["a cross", "--out", "a_file"], 3, ["where  a_file"]),
        (["a cross", "--out", "a_file/in"], 3, ["where  a_file/in"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) and value[0][0] in "a-" else None,
)
def test_what_cannot_be_drawn(
    sfumato: Command, run: Path, tmp_path: Path, words: list[str], code: int, parts: list[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    (tmp_path / "a_file").touch()
    told(sfumato("sample", run, *words), code, *parts)
    assert not (run / "pictures").exists() or not list((run / "pictures").iterdir())


def test_models_that_are_not_there_or_damaged(sfumato: Command, run: Path) -> None:
    told(sfumato("sample", "runs/nope", "a cross"), 4, "no such run or model", "where  runs/nope", "fix    runs/tiny")
    told(sfumato("sample", "runs", "a cross"), 4, "no model directory", "where  runs\n")
    (run / "model" / "tokenizer.json").unlink()
    told(sfumato("sample", run, "a cross"), 4, "a file is missing", "tokenizer.json")
    (run / "model" / "MANIFEST.json").unlink()
    told(sfumato("sample", run, "a cross"), 4, "never finished", "MANIFEST.json")


def test_a_model_that_draws_no_numbers_is_told(sfumato: Command, run: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from sfumato import files

    weights = load_file(run / "model" / "model.safetensors")
    save_file(
        {name: torch.full_like(value, 1e38) for name, value in weights.items()},
        run / "model" / "model.safetensors",
    )
    files.seal(run / "model")
    told(sfumato("sample", run, "a cross", *FAST), 4, "not finite numbers")
    told(sfumato("eval", run, "--per-task", "1", "--held-out", "0", *FAST), 4, "not finite numbers")


def test_a_recommended_strength_goes_from_the_configuration_into_the_picture(sfumato: Command) -> None:
    told(sfumato("train", "tiny", *QUICK, "sampling.strength=1.5"), 2, "sampling.strength")
    assert sfumato("train", "tiny", *QUICK, "sampling.strength=0.25", "--run", "own").code == 0
    Pillow.new("RGB", (32, 32), "white").save("white.png")
    how = ("sample", "own", "a cross", "--image", "white.png", "--steps", "4", "--device", "cpu", "--json")
    said = [sfumato(*how, *more).data["pictures"][0]["strength"] for more in ((), ("--strength", "0.75"))]
    assert said == [0.25, 0.75]
    assert sfumato("inspect", "own", "--json").data["sampling"]["strength"] == 0.25
    assert '"strength": 0.25' in sfumato("inspect", "own").out


def test_conditions_beside_the_prompt(sfumato: Command, tmp_path: Path) -> None:
    words, layout = "{kind: prompts, dim: 16, depth: 1, heads: 1}", "{kind: image, field: layout}"
    both = f"model.conditioner={{kind: joined, parts: [{words}, {layout}]}}"
    quick = [word for word in QUICK if not word.startswith("model.conditioner")]
    assert sfumato("train", "tiny", *quick, "data.layout=places", both).code == 0
    Pillow.new("RGB", (32, 32), "white").save("white.png")
    first, other = (
        sfumato("sample", "runs/tiny", "a red circle", "--condition", f"layout={name}", *FAST, "--json")
        for name in ("white.png", "gone.png")
    )
    said = first.data["pictures"][0]
    assert said["prompt"] == "a red circle" and said["fields"] == {"caption": "a red circle", "layout": "white.png"}
    told(other, 4, "gone.png", "no such picture")
    told(sfumato("sample", "runs/tiny", "--condition", "layout", *FAST), 2, "FIELD=VALUE")
    told(sfumato("sample", "runs/tiny", "--condition", "lay=white.png", *FAST), 4, "layout")
