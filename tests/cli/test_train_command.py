"""`sfumato train`: a folder of one's own, runs that exist, stop, break and go on, and all that can be mistyped."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from commands import QUICK, Command, told
from PIL import Image as Pillow

from sfumato import overlay


def content(folder: Path) -> dict[str, str]:
    """A digest of every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_twenty_pictures_made_by_hand(sfumato: Command, pictures: Path, tmp_path: Path) -> None:
    """The README's own-data command, on a smaller network: nothing but the folder is told."""
    outcome = sfumato("train", "tiny", "data.kind=folder", f"data.path={pictures}", *QUICK[:5], "name=mine")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "runs/mine/model\n"
    assert "20 pictures of 32x32" in outcome.err
    assert "holding out 2 pictures, not 64: there are 20" in outcome.err
    assert 'next: sfumato sample runs/mine "a prompt"' in outcome.err and "eval" not in outcome.err
    run = tmp_path / "runs" / "mine"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "log.txt", "loss.png", "checkpoints", "model", "samples"} <= names
    sheet = Pillow.open(run / "samples" / "00000002.png")
    assert min(sheet.size) > 100


def test_results_for_programs(sfumato: Command, tmp_path: Path) -> None:
    outcome = sfumato("train", "tiny", *QUICK, "name=a", "--json")
    assert outcome.code == 0 and outcome.data == {"run": "runs/a", "model": "runs/a/model"}
    assert "step 2/2" in outcome.err
    elsewhere = sfumato("train", "tiny", *QUICK, "--run", tmp_path / "else where", "--json").data
    assert elsewhere["run"] == str(tmp_path / "else where") and Path(elsewhere["model"], "model.json").is_file()


def test_scenes_are_evaluated_next(sfumato: Command) -> None:
    assert "sfumato eval runs/tiny --suite scenes" in sfumato("train", "tiny", *QUICK).err


def test_a_run_that_exists_is_never_touched(sfumato: Command, tmp_path: Path) -> None:
    assert sfumato("train", "tiny", *QUICK).code == 0
    before = content(tmp_path / "runs")
    told(sfumato("train", "tiny", *QUICK), 2, "exists already", "where  runs/tiny", "sfumato train --resume runs/tiny")
    told(sfumato("train", "runs/tiny"), 2, "exists already", "sfumato train --resume runs/tiny")
    assert content(tmp_path / "runs") == before


def test_a_run_stops_and_goes_on(sfumato: Command, tmp_path: Path) -> None:
    stopped = sfumato("train", "tiny", *QUICK, "name=a", "--stop-after", "1", "--json")
    told(stopped, 6, "■ stopped, and saved", "where  step 1 of 2", "fix    sfumato train --resume runs/a\n")
    resumed = sfumato("train", "--resume", "runs/a", "--json")
    assert resumed.code == 0 and "resumed from step-00000001" in resumed.err and resumed.data["run"] == "runs/a"
    assert sfumato("train", "tiny", *QUICK, "name=b").code == 0
    weights = [tmp_path / "runs" / name / "model" / "model.safetensors" for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # as if it had never stopped
    further = sfumato("train", "--resume", "runs/a", "steps=3")
    assert further.code == 0 and "12 images in 3 steps" in further.err


def test_resuming_by_the_recipes_name(sfumato: Command) -> None:
    told(sfumato("train", "tiny", *QUICK, "--stop-after", "1"), 6, "where  step 1 of 2")
    assert "resumed from step-00000001" in sfumato("train", "tiny", *QUICK, "--resume").err


@pytest.mark.parametrize("word", ["runs/nope", "mine", "."])
def test_a_run_that_is_not_there_cannot_be_resumed(sfumato: Command, word: str) -> None:
    assert sfumato("train", "tiny", *QUICK, "name=mine").code == 0
    told(
        sfumato("train", "--resume", word),
        2,
        "there is no run to resume",
        f"where  {word}\n",
        "sfumato train --resume runs/mine",
    )


def test_resuming_what_was_never_begun(sfumato: Command) -> None:
    told(
        sfumato("train", "tiny", *QUICK, "--resume"),
        2,
        "there is no run to resume",
        "no checkpoints",
        "leave --resume out",
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(sfumato: Command, tmp_path: Path) -> None:
    assert sfumato("train", "tiny", *QUICK, "name=a").code == 0
    first, second = sorted((tmp_path / "runs/a/checkpoints").iterdir())
    with (second / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    outcome = sfumato("train", "--resume", "runs/a")
    assert outcome.code == 0
    assert "step-00000002 is not used" in outcome.err and "model.safetensors" in outcome.err
    assert "resumed from step-00000001" in outcome.err
    for folder in (tmp_path / "runs/a/checkpoints").iterdir():
        (folder / "MANIFEST.json").unlink()
    told(sfumato("train", "--resume", "runs/a"), 4, "nothing whole to resume from", "step-00000001")
    assert first.is_dir()


def test_a_disk_without_room_loses_nothing(sfumato: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(sfumato("train", "tiny", *QUICK, "name=a", "--stop-after", "1"), 6, "step 1 of 2")
    before = content(tmp_path / "runs/a/checkpoints") | content(tmp_path / "runs/a/model")
    room = os.fsync

    def full(descriptor: int) -> None:
        if "step-00000002" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    told(sfumato("train", "--resume", "runs/a"), 3, "the disk is full", "MiB free", "--resume")
    assert content(tmp_path / "runs/a/checkpoints") | content(tmp_path / "runs/a/model") == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "resumed from step-00000001" in sfumato("train", "--resume", "runs/a").err


def test_too_little_memory_says_what_to_halve(sfumato: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sfumato.train.step import Stepper

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Stepper, "gradients", out_of_memory)
    told(sfumato("train", "tiny", *QUICK), 5, "too little memory", "batch=2 accumulate=2", "Tried to allocate")


# what is mistyped, before anything is made


def test_all_faults_at_once_and_no_run_is_made(sfumato: Command, tmp_path: Path) -> None:
    words = ("stps=3", "optim.lr=fast", "batch=-1", "model.net=ditt", "data.siz=3", "name=x")
    told(
        sfumato("train", "tiny", *words),
        2,
        "5 faults in the configuration",
        "stps is no key of the configuration (seen: 3, from the command line)\n      try: steps",
        "optim.lr should be a number (seen: 'fast'",
        "batch should be at least 1 (seen: -1",
        "model.net is not known (seen: ditt",
        "data.siz is no option of scenes (seen: 3, from the command line)\n      try: size",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["tinny"], ["no such recipe or file", "fix    tiny"]),
        (["nope.yaml"], ["no such configuration", "nope.yaml"]),
        (["tiny", "steps"], ["an override is key=value", "seen   steps"]),
        (["tiny", "steps=["], ["not YAML", "where  steps=["]),
        (["tiny", "data.path=pictures"], ["data.path is no option of scenes", "try: data.kind=folder, which has it"]),
        (["tiny", "name=../up"], ["no path"]),
        (["tiny", "model.net=my_nets:Net"], ["model.net cannot be found from here", "my_nets:Net"]),
        (["tiny", "data.size=31"], ["32 to 512 px", "data.size"]),
        (["tiny", "data.size=4096"], ["32 to 512 px", "data.size"]),
        (["tiny", "data.size=36"], ["not a whole number of patches"]),
        (["tiny", "device=abacus"], ["device", "abacus", "device=cpu"]),
    ],
    ids=lambda value: " ".join(value) if value and " " not in value[0] else None,
)
def test_what_cannot_be_meant(sfumato: Command, words: list[str], parts: list[str]) -> None:
    told(sfumato("train", *words), 2, *parts)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        ("nothing", ["there is no such folder", "seen   pictures"]),
        ("empty", ["holds no pictures", "an empty folder"]),
        ("broken", ["1 of 1 pictures cannot be used", "a.png: the file is empty"]),
        ("no captions", ["no captions", "picture.txt"]),
    ],
)
def test_folders_that_cannot_be_used(sfumato: Command, tmp_path: Path, make: str, parts: list[str]) -> None:
    if make != "nothing":
        (tmp_path / "pictures").mkdir()
    if make == "broken":
        (tmp_path / "pictures" / "a.png").touch()
    if make == "no captions":
        Pillow.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    told(sfumato("train", "tiny", *QUICK, "data.kind=folder", "data.path=pictures"), 4, *parts)


def test_prompts_with_unknown_words_are_found_before_the_first_step(sfumato: Command) -> None:
    outcome = sfumato("train", "tiny", *QUICK, "samples={every: 2, prompts: [a mauve circle]}")
    told(outcome, 4, "a word this model has never seen", "seen   mauve", "'a mauve circle'")
    assert "step" not in outcome.err


# the configuration itself


def test_an_objective_for_other_models_is_refused_before_the_first_step(sfumato: Command, tmp_path: Path) -> None:
    told(sfumato("train", "tiny", *QUICK, "objective=hybrid"), 2, "variance", "model.answers=[x0,x0_variance]")
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == [".lock"]


def test_the_printed_configuration_is_one(sfumato: Command, tmp_path: Path) -> None:
    outcome = sfumato("train", "tiny", "steps=7", "optim.lr=1e-7", "--print-config")
    assert outcome.code == 0
    assert "# steps: the command line" in outcome.err and "# batch: recipe tiny" in outcome.err
    assert "# everything else: default" in outcome.err
    (tmp_path / "copy.yaml").write_text(outcome.out)
    config = overlay.load_config("copy.yaml").config
    assert config == overlay.load_config("tiny", ["steps=7", "optim.lr=1e-7"]).config
    as_json = sfumato("train", "copy.yaml", "--print-config", "--json")
    assert as_json.data == overlay.resolved(config) and as_json.err == ""
    assert not (tmp_path / "runs").exists()


def test_a_long_value_is_not_broken_into_lines(sfumato: Command, tmp_path: Path) -> None:
    text = "a red circle " * 30 + "x" * 200
    (tmp_path / "copy.yaml").write_text(sfumato("train", "tiny", f"samples.prompts=['{text}']", "--print-config").out)
    assert overlay.load_config("copy.yaml").config.samples.prompts == [text]


def test_the_configuration_of_a_run_can_be_printed_and_begun_again(sfumato: Command) -> None:
    assert sfumato("train", "tiny", *QUICK, "name=a").code == 0
    printed = sfumato("train", "runs/a", "--print-config")
    assert printed.code == 0 and "name: a" in printed.out
    again = sfumato("train", "runs/a/config.yaml", "name=b", "--json")
    assert again.code == 0 and again.data["run"] == "runs/b"
