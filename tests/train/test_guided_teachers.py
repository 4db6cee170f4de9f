"""Teachers answer under every guidance as sampling would: of each row at its time, of variants, and in pairs."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from sfumato.denoiser import Cond, Denoiser, on_path
from sfumato.errors import ConfigError
from sfumato.guidance import (
    APG,
    CFG,
    Autoguidance,
    CFGPlusPlus,
    CFGZero,
    Classifier,
    Guidance,
    PerturbedAttention,
    Rescaled,
    SkipLayers,
    Thresholded,
    Unguided,
    Weighted,
    Within,
    all_within,
    given,
    guided,
    models_of,
)
from sfumato.guidance.core import Forward, within
from sfumato.io.directory import save_model
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.variants import variant
from sfumato.objectives.teaching import Teacher
from sfumato.paths import Cosine, Linear, VarianceExploding, VariancePreserving
from sfumato.paths import Path as NoisePath
from sfumato.pipeline import Pipeline
from sfumato.predictions import VELOCITY, X0
from sfumato.train.teaching import Student
from small_models import made

SHAPE = DiTConfig(size=8, patch=4, dim=16, depth=2, heads=2, in_channels=2, classes=4)


def bright(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return -(x - 1).square().flatten(1).sum(1) / 8


GUIDANCES: tuple[Guidance, ...] = (
    Unguided(),
    CFG(scale=3.0),
    CFG(scale=0.5),
    CFG(scale=3.0, interval=(0.3, 3.0)),
    CFG(scale=3.0, interval=(0.7, None)),
    CFG(scale=3.0, interval=(50.0, 60.0)),
    CFG(scale=3.0, rescale=0.7),
    CFG(scale=3.0, interval=(0.3, 3.0), channels=1),
    CFGZero(scale=2.0),
    APG(scale=4.0),
    Weighted(scale=2.0),
    Rescaled(of=CFG(scale=4.0)),
    Thresholded(of=CFG(scale=4.0)),
    Within(of=APG(scale=4.0), interval=(0.3, 3.0)),
    Classifier(log_prob=bright, of=CFG(scale=2.0)),
    SkipLayers(blocks=(0,)),
    SkipLayers(interval=(0.3, 3.0), of=CFG(scale=3.0, interval=(0.7, None))),
    PerturbedAttention(blocks=(1,), of=CFG(scale=2.0)),
    Within(of=SkipLayers(blocks=(1,), of=PerturbedAttention()), interval=(0.3, 3.0)),
    Autoguidance(model="weak"),
    Autoguidance(model="weak", of=APG(scale=4.0)),
)


class Double(nn.Module):
    """A small random network with classes, in float64."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = DiT(SHAPE).double()
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.net(x, t, **cond)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(Double(), VariancePreserving(), VELOCITY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def variants(denoiser: Denoiser) -> Callable[[str], Denoiser]:
    weak = Denoiser(Double(4), VariancePreserving(), VELOCITY).eval().requires_grad_(False)
    return lambda name: weak if name == "model:weak" else variant(denoiser, name)


def rows() -> tuple[Tensor, Tensor, Cond, Callable[[], Cond]]:
    x = torch.randn(4, 2, 8, 8, generator=Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.35, 0.5, 0.9], dtype=torch.float64)
    return x, t, {"label": torch.arange(4)}, lambda: {"label": torch.full((4,), SHAPE.classes)}


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_a_teacher_answers_each_row_as_sampling_would(
    denoiser: Denoiser, variants: Callable[[str], Denoiser], guidance: Guidance
) -> None:
    x, t, cond, null = rows()
    teacher = Teacher(denoiser, cond, null, guidance, variants=variants)
    said = teacher(x, t)
    for i, time in enumerate(t.tolist()):
        own, none = ({name: value[i : i + 1] for name, value in one.items()} for one in (cond, null()))
        filled = given(guidance, own, lambda none=none: none)
        alone = guided(denoiser, denoiser.path, filled, variants=variants)(x[i : i + 1], time)
        torch.testing.assert_close(said[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(teacher.bound()(x, t), said, rtol=0, atol=0)


def test_each_network_is_called_once(denoiser: Denoiser, variants: Callable[[str], Denoiser]) -> None:
    """Whatever rows want: here the network for its four rows and three null ones, its variant for two."""
    x, t, cond, null = rows()
    seen: dict[str, list[int]] = {}

    def noting(name: str, forward: Forward) -> Forward:
        def noted(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            seen.setdefault(name, []).append(len(x))
            return forward(x, t, cond)

        return noted

    class Noting(nn.Module):
        path = denoiser.path

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return noting("itself", denoiser)(x, t, cond)

    levels = (denoiser.path.sigma(t) / denoiser.path.alpha(t)).tolist()
    low, middle = sum(levels[:2]) / 2, sum(levels[1:3]) / 2
    guidance = SkipLayers(blocks=(0,), interval=(middle, None), of=CFG(scale=3.0, interval=(low, None)))
    whole = Teacher(Noting(), cond, null, guidance, variants=lambda name: noting(name, variants(name)))  # type: ignore[arg-type]
    whole(x, t)
    assert seen == {"itself": [7], "skip:0": [2]}


def test_a_scale_stands_in_for_the_guidance(denoiser: Denoiser) -> None:
    """One for all, or one a row; by rows and by scale alike."""
    x, t, cond, null = rows()
    teacher = Teacher(denoiser, cond, null, APG(scale=4.0))
    scales = torch.tensor([1.0, 2.0, 3.5, 0.0], dtype=torch.float64)
    said = teacher(x, t, scales)
    for i, scale in enumerate(scales.tolist()):
        plain = Teacher(denoiser, cond, null, CFG(scale=scale))
        torch.testing.assert_close(said[i], plain(x, t)[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(plain._by_rows(x, t)[i], said[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(teacher(x, t, scale)[i], said[i], rtol=1e-9, atol=1e-9)
    assert torch.equal(teacher(x, t, 1.0), Teacher(denoiser, cond, null, Unguided())(x, t))


def test_a_teacher_is_asked_on_its_students_path(denoiser: Denoiser, variants: Callable[[str], Denoiser]) -> None:
    x, t, cond, null = rows()
    for guidance in (CFG(scale=2.0), CFG(scale=2.0, interval=(0.7, None)), SkipLayers(interval=(0.7, None))):
        for path in (Linear(), Cosine()):
            teacher = Teacher(denoiser, cond, null, guidance, path, variants)
            own = Teacher(denoiser, cond, null, guidance, variants=variants)
            assert teacher.path == path and own.path == denoiser.path
            torch.testing.assert_close(teacher(x, t), on_path(own.bound(), path)(x, t), rtol=1e-9, atol=1e-9)


# guidance that is on in an interval of noise


class Reads(nn.Module):
    """x0-hat under texts (B, L, 2) of unequal length, where a mask says what counts; it notes how many rows it had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, *, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        self.seen.append(len(x))
        counts = torch.ones(context.shape[:2]) if context_mask is None else context_mask.float()
        meant = (context * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        return torch.tanh(x * (1 + t[:, None]) + meant)


@pytest.mark.parametrize("path", [Linear(), VariancePreserving(), VarianceExploding()], ids=str)
@pytest.mark.parametrize(
    "interval", [(0.05, None), (0.7, None), (0.2, 0.7), (0.0, 3.0), (1e8, None), (0.0, 1e-9), (0.1, float("inf"))]
)
def test_in_an_interval_all_rows_are_one_forward(path: NoisePath, interval: tuple[float, float | None]) -> None:
    """Those outside do not ask what there is without the condition; all answers are those of row by row."""
    rng, n = Generator().manual_seed(0), 40
    t = torch.cat([torch.rand(n - 2, generator=rng), torch.tensor([0.0, 1.0])])
    x, cond = torch.randn(n, 2, generator=rng), {"context": torch.randn(n, 5, 2, generator=rng)}
    asked: list[int] = []

    def null() -> Cond:
        asked.append(1)
        return {"context": torch.full((n, 3, 2), -0.5)}

    net = Reads()
    teacher = Teacher(Denoiser(net, path, X0), cond, null, CFG(scale=3.5, interval=interval))
    said = teacher(x, t)
    on = [i for i, time in enumerate(t.tolist()) if within(interval, path, time)]
    assert net.seen == [n + len(on)] and len(asked) == (1 if on else 0)
    assert all_within(interval, path, t.double()).nonzero()[:, 0].tolist() == on
    torch.testing.assert_close(said, teacher._by_rows(x, t), rtol=1e-6, atol=1e-6)
    assert net.seen[1] == n + len(on)


def test_where_a_scale_of_one_is_within_an_interval_nothing_more_is_asked(denoiser: Denoiser) -> None:
    x, t, cond, null = rows()
    teacher = Teacher(denoiser, cond, null, CFG(scale=1.0, interval=(0.3, 3.0)))
    assert torch.equal(teacher(x, t), Teacher(denoiser, cond, null, Unguided())(x, t))


# teachers of students


SAID: tuple[Guidance, ...] = (
    CFG(scale=3.0, interval=(0.7, None)),
    APG(scale=4.0, momentum=0.0),
    SkipLayers(blocks=(1,), scale=4.0),
    PerturbedAttention(of=CFG(scale=3.0)),
    Autoguidance(model="weak", of=CFG(scale=2.0, interval=(0.7, None))),
    Autoguidance(model="curved"),
)
SLOTS = (
    {"kind": "cfg", "scale": 3.0, "interval": [0.7, None]},
    {"kind": "apg", "scale": 4.0, "momentum": 0.0},
    {"kind": "skip_layers", "blocks": [1], "scale": 4.0},
    {"kind": "perturbed_attention", "of": {"kind": "cfg", "scale": 3.0}},
    {"kind": "autoguidance", "model": "weak", "of": {"kind": "cfg", "scale": 2.0, "interval": [0.7, None]}},
    {"kind": "autoguidance", "model": "curved"},
)


@pytest.fixture
def weaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weaker models in the folder where we are: one of the same path, one of another."""
    monkeypatch.chdir(tmp_path)
    for name, more in (("weak", {}), ("curved", {"path": {"kind": "cosine"}})):
        other = made(**more)
        with torch.no_grad():
            for p in other.net.parameters():
                p.mul_(0.9)
        save_model(tmp_path / name, other, {})


@pytest.mark.parametrize(("guidance", "slot"), list(zip(SAID, SLOTS, strict=True)), ids=str)
def test_a_student_hears_what_the_teachers_pipeline_answers(
    doubles: Pipeline, weaker: None, guidance: Guidance, slot: dict[str, object]
) -> None:
    """At every state and time of a drawing: the network, its variants, and other models, also of other paths."""
    raw = [{"caption": "a red circle"}, {"label": 1}, {"label": 0, "caption": "two blue squares"}]
    student = Student(made(), 3)
    student.taught_by(made().eval(), guidance)
    teacher = student.bound(raw)
    assert teacher is not None
    plain = 0.0
    for step in islice(doubles.steps(raw, guidance=slot, seeds=2), 4):
        torch.testing.assert_close(teacher(step.x, step.t), step.x0, rtol=0, atol=1e-6)
        plain = max(plain, float((teacher(step.x, step.t, 1.0) - step.x0).abs().max()))
    assert plain > 1e-3  # there was guidance
    again = student.bound(raw)
    assert again is not None and again.variants is teacher.variants  # each variant is made once


def test_what_a_teacher_cannot_be_asked_is_named(denoiser: Denoiser) -> None:
    x, t, cond, null = rows()
    with pytest.raises(ConfigError, match="has no variants"):
        Teacher(denoiser, cond, null, SkipLayers(blocks=(0,)))(x, t)
    with pytest.raises(ConfigError, match=r"no such blocks[\s\S]*skip:7"):
        Teacher(denoiser, cond, null, SkipLayers(blocks=(7,)), variants=lambda name: variant(denoiser, name))(x, t)
    with pytest.raises(ConfigError, match=r"CFG\+\+[\s\S]*no grid"):
        Teacher(denoiser, cond, null, CFGPlusPlus())(x, t)


def test_weaker_models_are_found_in_what_is_wrapped() -> None:
    one = Autoguidance(model="a", of=Rescaled(of=Autoguidance(model="b", of=CFG())))
    assert models_of(Within(of=one)) == ["a", "b"] and models_of(CFG()) == models_of(SkipLayers(of=APG())) == []
