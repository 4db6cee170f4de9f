"""What is measured of flows: which pictures, in which units, and of what kind of model."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from sfumato.codecs import Pixels
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError
from sfumato.exact import Gaussian
from sfumato.metrics import flow
from sfumato.metrics.flow import Examples, judge_likelihood, judge_straightness
from sfumato.paths import Linear

SHAPE = (3, 4, 4)


def pipeline(codec: Any, std: float = 0.4) -> Any:
    """A pipeline whose model knows that a picture's numbers are normal, in the codec's units."""
    scale = getattr(codec, "scale", 1.0)
    exact = Gaussian(torch.zeros(SHAPE), torch.full(SHAPE, std * scale))
    model = SimpleNamespace(codec=codec, size=(4, 4), exact=Bound(Linear(), lambda x, t: exact.x0(Linear(), x, t)))
    return cast(Any, SimpleNamespace(model=model, device=torch.device("cpu")))


@pytest.fixture(autouse=True)
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "bound", lambda pipeline, raw, guidance=None: pipeline.model.exact)


def examples(n: int = 60, std: float = 0.4) -> Examples:
    rng = np.random.default_rng(0)
    drawn = np.clip(np.round((std * rng.standard_normal((n, 4, 4, 3)) + 1) * 127.5), 0, 255).astype(np.uint8)
    return Examples(drawn, [{}] * n, True)


KNOWN = np.log2(0.4 * 127.5 * np.sqrt(2 * np.pi * np.e))  # the entropy of a normal in cells of 1 / 127.5


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("level", [None, 0.005])
def test_bits_are_those_of_the_data_in_any_scale(scale: float, level: float | None) -> None:
    said = judge_likelihood(
        pipeline(Pixels(scale)), examples(), steps=30, level=None if level is None else level * scale, batch=25
    )
    bits = said["bits_per_dim"]
    # clipping moves little; noise of 0.6 of a cell costs a few hundredths of a bit
    assert bits["mean"] == pytest.approx(KNOWN, abs=0.08) and bits["n"] == 60
    assert bits["low"] < bits["mean"] < bits["high"] and said["held_out"] is True and said["calls"] == 120


def test_the_whole_trace_may_be_taken() -> None:
    """Of a diagonal Jacobian random signs have it too, and so both are the same number."""
    exact, probed = (judge_likelihood(pipeline(Pixels()), examples(6), steps=4, probes=one) for one in ("exact", 1))
    assert (exact["probes"], probed["probes"]) == ("exact", 1)
    assert exact["bits_per_dim"]["mean"] == pytest.approx(probed["bits_per_dim"]["mean"], abs=2e-5)


def test_latents_have_other_densities() -> None:
    with pytest.raises(ConfigError, match="models of pixels"):
        judge_likelihood(pipeline(SimpleNamespace(scale=1.0)), examples(4))


def test_straightness_has_a_mean_and_a_curve() -> None:
    told: list[tuple[int, int]] = []
    codec = SimpleNamespace(scale=1.0, shape=lambda height, width: SHAPE)
    said = judge_straightness(
        pipeline(codec), [{}] * 10, steps=20, batch=4, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert said["straightness"]["mean"] == pytest.approx(np.mean(said["curve"]["error"]), rel=0.1)
    assert 0 < said["relative"] < 1 and said["curve"]["t"][0] == 1.0
