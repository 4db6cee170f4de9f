"""What a run tells: rows for programs, lines for people, curves for both."""

import errno
import io
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from sfumato.config import Config
from sfumato.errors import MachineError
from sfumato.train import train
from sfumato.train.curves import COLOURS, Curve, plot, smoothed
from sfumato.train.log import SETTLING, Log, read_rows

ROW = {"step": 1, "images": 4, "loss": 0.5, "lr": 0.1}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(log: Log) -> str:
    assert isinstance(log.console.file, io.StringIO)
    return log.console.file.getvalue()


def test_rows_are_written_at_once_and_come_back(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 10, silent())
    rows = [ROW, {"step": 2, "validation": 0.25, "by_noise": [(0.05, 1.5), (0.15, 2.0)]}]
    for row in rows:
        log.row(row)
    assert read_rows(tmp_path / "metrics.jsonl") == json.loads(json.dumps(rows))


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 10, silent())
    log.row({"step": 1, "validation": float("nan"), "by_noise": [(0.05, float("inf")), (0.15, 2.0)]})
    log.row({**ROW, "step": 2})
    text = (tmp_path / "metrics.jsonl").read_text()
    first = json.loads(text.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert first == {"step": 1, "validation": None, "by_noise": [[0.05, None], [0.15, 2.0]]}
    again = Log(tmp_path, 2, 10, silent())
    again.draw()
    assert (tmp_path / "loss.png").exists() and (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("rest", ['{"step": 2, "lo', "\x00\x00", '{"step": "2"}', "[2]", "2", "\n"])
def test_lines_that_were_cut_off_are_left_out(tmp_path: Path, rest: str) -> None:
    line = json.dumps(ROW) + "\n"
    (tmp_path / "metrics.jsonl").write_bytes((line + rest).encode() + b"\xff")
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW]
    log = Log(tmp_path, 1, 10, silent())
    log.row({**ROW, "step": 2})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().startswith(line)


def test_a_broken_line_does_not_hide_what_follows(tmp_path: Path) -> None:
    lines = [json.dumps({**ROW, "step": step}) for step in range(1, 5)]
    lines[1] = lines[1][:9]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3, 4]


def test_rows_of_steps_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 10, silent())
    for step in range(1, 6):
        log.row({**ROW, "step": step})
    assert [row["step"] for row in Log(tmp_path, 3, 10, silent()).rows] == [1, 2, 3]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_rows_survive_a_disk_that_is_full_when_the_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Log(tmp_path, 0, 10, silent()).row(ROW)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        Log(tmp_path, 1, 10, silent())
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_full_disk_is_told_as_such(tmp_path: Path, name: str) -> None:
    log = Log(tmp_path, 0, 10, silent())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(MachineError, match="the disk is full") as caught:
        log.row(ROW)
    assert name in str(caught.value.where)


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 10, silent())
    with log:
        for step in range(1, 7):
            log.stepped(step, 4)
        log.row({**ROW, "step": 6, "images": 24})
        log.say("[bold]not markup[/bold] 1/2")
    lines = said(log).splitlines()
    assert lines[0].startswith("step 6/10  loss 0.5000  ") and " images/s  0:0" in lines[0] and "left" in lines[0]
    assert lines[1:] == ["[bold]not markup[/bold] 1/2"]
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in kept] == lines and kept[0][:2] == "20" and kept[0][10] == " "


def test_a_terminal_has_a_progress_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    log = Log(tmp_path / "", 0, 10, console)
    with log:
        for step in range(1, 7):
            log.stepped(step, 4)
        log.row({**ROW, "step": 6, "images": 24})
        log._progress.refresh()
    shown = said(log)
    assert "6/10" in shown and "loss 0.5000" in shown and "images/s" in shown and "step 6/10  loss" not in shown
    assert "step 6/10  loss 0.5000" in (tmp_path / "log.txt").read_text()


def test_a_row_that_fits_in_part_is_an_error_and_is_left_out_later(tmp_path: Path) -> None:
    """The system writes what it can, and says only the next time that there is no room."""
    log = Log(tmp_path, 0, 10, silent())
    log.row({"step": 1, "validation": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, before[1]))
        with pytest.raises(MachineError, match="the disk is full"):
            log.row({"step": 2, "validation": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in Log(tmp_path, 5, 10, silent()).rows] == [1]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "2026-01-01 00:00:00"


def test_the_rate_leaves_out_settling_and_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation takes 50 s, a picture 20 s, a step of 8 images 2 s: 4 images a second, and 2 s for 8 more."""
    clock = Clock()
    monkeypatch.setattr("sfumato.train.log.time", clock)
    log = Log(tmp_path, 10, 100, silent())
    for step in range(11, 11 + SETTLING):
        clock.now += 50 if step == 11 else 2
        log.stepped(step, 8)
    assert log.rate == pytest.approx(24 / 54)  # as long as nothing better is known
    for step in range(11 + SETTLING, 21):
        clock.now += 2
        log.stepped(step, 8)
        clock.now += 20
        log.paused(20)
    assert log.rate == pytest.approx(4)
    log.row({**ROW, "step": 20, "images": 160})
    assert said(log) == "step 20/100  loss 0.5000  4 images/s  2:40 left\n"
    log.row({**ROW, "step": 20, "images": 160 * 200})
    assert said(log).endswith("8:53:20 left\n")


def pixels(path: Path, colour: tuple[int, int, int], near: int = 60) -> NDArray[np.int64]:
    """The places (row, column) of about a colour (thin lines overshoot when scaled), without the legend's corner."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    found = np.abs(image - np.array(colour)).max(2) < near
    found[: image.shape[0] // 4, image.shape[1] * 2 // 3 :] = False
    return np.argwhere(found)


def test_a_rising_line_is_drawn_from_corner_to_corner(tmp_path: Path) -> None:
    plot(tmp_path / "a.png", "title", [Curve("up", range(50), [3 * x for x in range(50)])], "x")
    found = pixels(tmp_path / "a.png", COLOURS[0])
    rows, columns = found[(found[:, 0] > 70) | (found[:, 1] > 360)].T  # but for the legend
    assert len(rows) > 300 and np.corrcoef(rows, columns)[0, 1] < -0.999
    height, width = np.asarray(Image.open(tmp_path / "a.png")).shape[:2]
    assert (width, height) == (720, 420)
    assert columns.min() < 0.15 * width and rows.max() > 0.85 * height and rows.min() < 0.35 * height


def test_the_legend_stands_beside_curves_that_cross_every_corner(tmp_path: Path) -> None:
    crossed = [Curve("up", [0, 1], [0, 1]), Curve("down", [0, 1], [1, 0])]
    plot(tmp_path / "a.png", "", crossed, "x")
    image = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert image.shape[0] == 420 and image.shape[1] > 740
    assert (image[:400, 710:] < 120).sum() > 50  # the names, right of the plot


@pytest.mark.parametrize(("slope", "left"), [(3, True), (-3, False)])
def test_the_legend_is_where_no_curve_is(tmp_path: Path, slope: int, left: bool) -> None:
    plot(tmp_path / "a.png", "", [Curve("line", range(50), [slope * x for x in range(50)])], "x")
    written = np.asarray(Image.open(tmp_path / "a.png").convert("L"))[46:64] < 120  # the first line of either corner
    half = written.shape[1] // 2
    by_side = written[:, 80:half].sum(), written[:, half:-30].sum()
    assert (by_side[0] > by_side[1]) == left and max(by_side) > 50 > min(by_side)


def test_an_exponential_is_straight_on_a_logarithmic_axis(tmp_path: Path) -> None:
    curve = [Curve("down", range(100), [10 ** (-x / 25) for x in range(100)])]
    for name, log_y, straight in (("log", True, True), ("plain", False, False)):
        plot(tmp_path / f"{name}.png", "", curve, "x", log_y=log_y)
        rows, columns = pixels(tmp_path / f"{name}.png", COLOURS[0]).T
        assert (np.corrcoef(rows, columns)[0, 1] > 0.999) == straight


def test_curves_have_colours_and_a_legend_of_their_own(tmp_path: Path) -> None:
    raw = Curve("each", range(20), [5.0 if x < 10 else 7.0 for x in range(20)], faint=True)
    some = [raw, Curve("first", range(20), [1.0] * 20), Curve("second", range(20), [3.0] * 20), Curve("empty", [], [])]
    plot(tmp_path / "a.png", "", some, "x")
    first, second = (pixels(tmp_path / "a.png", colour) for colour in COLOURS[:2])
    assert len(first) > 300 and len(second) > 300 and len(pixels(tmp_path / "a.png", COLOURS[2], 25)) == 0
    assert np.median(second[:, 0]) < np.median(first[:, 0])  # 3 lies above 1
    pale = tuple((c + 2 * 255) // 3 for c in COLOURS[0])
    assert len(pixels(tmp_path / "a.png", pale, 40)) > 300  # type: ignore[arg-type]
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    legend = image[46:90]
    assert [int((np.abs(legend - np.array(c)).max(2) < 25).sum()) > 20 for c in COLOURS[:3]] == [True, True, False]


def test_points_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    broken = [Curve("a", range(9), [1, nan, 2, inf, 3, -inf, 4, 0, -1])]
    clean = [Curve("a", [0, 2, 4, 6], [1, 2, 3, 4])]
    plot(tmp_path / "broken.png", "", broken, "x", log_y=True)
    plot(tmp_path / "clean.png", "", clean, "x", log_y=True)
    assert (tmp_path / "broken.png").read_bytes() == (tmp_path / "clean.png").read_bytes()
    plot(tmp_path / "none.png", "", [Curve("a", [1], [nan]), Curve("b", [], [])], "x")
    assert not (tmp_path / "none.png").exists()


HARD = [
    *(([5], [0.0]), ([5], [2.0]), ([0, 1], [0.0, 0.0]), ([0, 1], [-3.0, -3.0])),
    *(([1, 10**9], [1e-12, 1e12]), ([0, 1], [1.0, 1 + 1e-9])),
]


@pytest.mark.parametrize(("x", "y"), HARD)
@pytest.mark.parametrize("log_y", [False, True])
def test_hard_ranges_are_drawn(tmp_path: Path, x: list[int], y: list[float], log_y: bool) -> None:
    plot(tmp_path / "a.png", "", [Curve("a", x, y)], "x", log_y=log_y)
    if not log_y or min(y) > 0:
        assert len(pixels(tmp_path / "a.png", COLOURS[0])) > 5


def test_smoothing_takes_means_of_the_last_values() -> None:
    assert smoothed([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]
    assert smoothed([1, 2, 3], 10) == [1, 1.5, 2] and smoothed([], 3) == [] and smoothed([4, 2], 1) == [4, 2]


def test_a_picture_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone may look at it while it is written: it is renamed into place."""
    plot(tmp_path / "a.png", "", [Curve("a", [0, 1], [0, 1])], "x")
    before = (tmp_path / "a.png").read_bytes()

    def cut(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(MachineError):
        plot(tmp_path / "a.png", "", [Curve("a", [0, 1], [1, 0])], "x")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_run_has_its_curves(tiny_run: Path) -> None:
    rows = read_rows(tiny_run / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if "validation" in row] == [10, 20]
    assert {"images", "gradient_norm", "lr", "skipped", "spikes"} <= rows[0].keys()
    for name in ("loss.png", "loss_by_noise.png"):
        assert len(pixels(tiny_run / name, COLOURS[0])) > 50 and len(pixels(tiny_run / name, COLOURS[1])) > 50
    assert "160 images in 20 steps" in (tiny_run / "log.txt").read_text()


def test_the_curve_is_there_while_the_run_goes_on(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.train.run import Run

    seen: list[bool] = []
    advance = Run._advance
    monkeypatch.setattr(Run, "_advance", lambda self: (seen.append((self.folder / "loss.png").exists()), advance(self)))
    train(small("steps=4", "validate={every: 2, batches: 1, holdout: 4}"), run=tmp_path / "run")
    assert seen == [False, False, True, True]
