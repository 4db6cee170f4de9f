"""Guidance in pipelines: its formula, the rows that it costs, and where along the way it counts."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.io.directory import save_model
from sfumato.pipeline import Pipeline
from small_models import drawn, made, rows


def test_guidance_of_one_is_the_conditional_answer(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and the null condition is not even evaluated."""
    seen = rows(pipe, monkeypatch)
    for step in islice(pipe.steps("a red circle", guidance=1), 4):
        with torch.no_grad():
            cond = pipe.model.cond([{"caption": "a red circle"}])
            assert torch.equal(step.x0, pipe.model.denoiser(step.x, step.t, cond))
    assert seen == [1, 1, 1, 1]


def test_guidance_is_its_formula(doubles: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """null + scale (cond - null), the null condition being the negative prompt where there is one."""
    seen = rows(doubles, monkeypatch)
    said = [{"caption": "a red circle"}, {"label": 1}]
    for negative in (None, "two squares", {"label": "cat"}):
        against = [{}] if negative is None else [{"caption": negative}] if isinstance(negative, str) else [negative]
        for step in islice(doubles.steps(said, guidance=3.5, negative=negative), 4):
            with torch.no_grad():
                answers = [
                    doubles.model.denoiser(step.x, step.t, doubles.model.cond(raw)) for raw in (said, against * 2)
                ]
            want = answers[1] + 3.5 * (answers[0] - answers[1])
            torch.testing.assert_close(step.x0, want, rtol=0, atol=1e-12)
    assert seen == [4] * 12  # both branches of both pictures at once


def test_guidance_of_zero_is_no_condition(doubles: Pipeline) -> None:
    none = drawn(doubles, None, seeds=3, guidance=1)
    torch.testing.assert_close(drawn(doubles, "a red circle", seeds=3, guidance=0), none, rtol=0, atol=1e-12)


def test_a_prompt_against_itself_is_unguided(doubles: Pipeline) -> None:
    plain = drawn(doubles, "a red circle", guidance=1)
    torch.testing.assert_close(
        drawn(doubles, "a red circle", negative="a red circle", guidance=7), plain, rtol=0, atol=1e-11
    )


def test_a_negative_prompt_changes_the_picture(pipe: Pipeline) -> None:
    pictures = [drawn(pipe, "a red circle", negative=negative) for negative in (None, "two", {"label": 1})]
    for i in range(3):
        assert (pictures[i] - pictures[i - 1]).abs().max() > 1e-3


def test_an_interval_guides_within_it_only(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear path's noise levels at t = 1, 3/4, 1/2, 1/4 are infinite, 3, 1 and 1/3."""
    seen = rows(pipe, monkeypatch)
    for interval, want in (
        ((0, None), [2, 2, 2, 2]),
        ((0.5, 3), [1, 2, 2, 1]),
        ((1, None), [2, 2, 1, 1]),
        ([0, 0.5], [1, 1, 1, 2]),
    ):
        seen.clear()
        list(pipe.steps("a red circle", interval=interval))
        assert seen == want, interval
    outside = drawn(pipe, "a red circle", interval=(0, 0.1))
    assert torch.equal(outside, drawn(pipe, "a red circle", guidance=1))


def test_rescaling_reaches_the_guidance(pipe: Pipeline) -> None:
    """At 1 the guided answer has the conditional one's standard deviation."""
    for rescale, same in ((0.0, False), (1.0, True)):
        step = next(pipe.steps("a red circle", guidance=5, rescale=rescale))
        with torch.no_grad():
            cond = pipe.model.denoiser(step.x, step.t, pipe.model.cond([{"caption": "a red circle"}]))
        assert bool(torch.isclose(step.x0.std(), cond.std(), rtol=1e-4)) is same


def test_a_weaker_model_or_part_of_this_one_guides(pipe: Pipeline, tmp_path: Path) -> None:
    save_model(tmp_path / "weak", made(), {})
    plain = pipe.sample(["a red circle"], guidance=1).images
    same = pipe.sample(["a red circle"], guidance={"kind": "autoguidance", "model": str(tmp_path / "weak")}).images
    assert np.abs(plain.astype(int) - same.astype(int)).max() <= 1  # the same model is no weaker
    skipped = pipe.sample(["a red circle"], guidance={"kind": "skip_layers", "scale": 4.0, "blocks": [1]}).images
    assert not np.array_equal(skipped, plain)
