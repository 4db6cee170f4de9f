"""Guidance: closed forms on Gaussians, what is off at 1, and the identities between the kinds."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sfumato.catalogue import GUIDANCES, build
from sfumato.denoiser import Bound, Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.exact import Gaussian
from sfumato.grids import linear
from sfumato.guidance import (
    APG,
    CFG,
    Autoguidance,
    CFGPlusPlus,
    CFGZero,
    Classifier,
    Distilled,
    PerturbedAttention,
    Rescaled,
    SkipLayers,
    Thresholded,
    Unguided,
    Weighted,
    Within,
    from_weight,
    given,
    guided,
    log_snr_interval,
)
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.variants import variant
from sfumato.paths import Cosine, Linear, VarianceExploding, VariancePreserving, log_snr
from sfumato.predictions import EPS, X0, V
from sfumato.samplers import drive
from sfumato.samplers.ddim import ddim

PATHS = [Linear(), Cosine(), VariancePreserving(), VarianceExploding(10.0)]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
RNG = torch.Generator().manual_seed(0)
X = torch.randn(5, 6, generator=RNG, dtype=torch.float64)
ONE = torch.full((6,), 1.0, dtype=torch.float64)
MEANS = {"cond": 1.0, "null": -0.5, "third": 2.0}


def cond(name: str) -> Cond:
    return {"mean": torch.full((5,), MEANS[name], dtype=torch.float64)}


def answering(path: object):  # type: ignore[no-untyped-def]
    """A model of Gaussians of one variance, whose mean is the condition."""

    def forward(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return Gaussian(cond["mean"][:, None] * ONE, 0.7 * ONE).x0(path, x, t)  # type: ignore[arg-type]

    return forward


@paths
def test_guided_gaussians_move_their_mean(path) -> None:  # type: ignore[no-untyped-def]
    """p(x | c)^s p(x)^(1 - s) of equal variances is a Gaussian at null + s (cond - null)."""
    for scale in (0.0, 0.5, 2.5):
        found = guided(answering(path), path, CFG(cond("cond"), cond("null"), scale))(X, 0.6)
        mean = (-0.5 + scale * 1.5) * ONE
        torch.testing.assert_close(found, Gaussian(mean, 0.7 * ONE).x0(path, X, 0.6))
    assert from_weight(1.5) == 2.5


OFF = [
    CFG(scale=1.0),
    CFGZero(scale=1.0, zero_above=math.inf),
    APG(scale=1.0),
    Weighted(scale=1.0),
    SkipLayers(scale=1.0),
    PerturbedAttention(scale=1.0),
    Autoguidance(scale=1.0, model="x"),
    Classifier(scale=1.0, log_prob=lambda x, t, c: x.sum(1)),
    Rescaled(of=CFG(scale=1.0)),
    Within(of=CFG(scale=3.0), interval=(100.0, 200.0)),
]


@pytest.mark.parametrize("guidance", OFF, ids=lambda one: type(one).__name__)
@paths
def test_one_is_off_bit_for_bit(path, guidance) -> None:  # type: ignore[no-untyped-def]
    filled = given(guidance, cond("cond"), lambda: cond("null"))
    assert torch.equal(
        guided(answering(path), path, filled)(X, 0.4), guided(answering(path), path, Unguided(cond("cond")))(X, 0.4)
    )


def test_an_interval_is_of_noise_and_skips_the_null_branch() -> None:
    path, low, high = Linear(), 0.5, 2.0
    guidance = CFG(cond("cond"), cond("null"), 3.0, (low, high))
    on = [
        len(guidance.branches(path, t)) == 2 for t in (0.3, 0.34, 0.6, 0.66, 0.7, 1.0)
    ]  # levels .43 .52 1.5 1.94 2.3 inf
    assert on == [False, True, True, True, False, False]
    assert len(CFG(cond("cond"), cond("null"), 3.0).branches(path, 1.0)) == 2  # no end: pure noise too
    said = log_snr_interval(-2 * math.log(high), -2 * math.log(low))
    assert said == pytest.approx((low, high))
    wrapped = Within(of=CFG(cond("cond"), cond("null"), 3.0), log_snr=(-2 * math.log(high), -2 * math.log(low)))
    assert [len(wrapped.branches(path, t)) == 2 for t in (0.3, 0.6, 0.7)] == [False, True, False]


def test_channels_that_are_not_guided_are_the_conditional_answers() -> None:
    path = Linear()
    plain, all_, some = (
        guided(answering(path), path, given(guidance, cond("cond"), lambda: cond("null")))(X, 0.4)
        for guidance in (Unguided(), CFG(scale=3.0), CFG(scale=3.0, channels=4))
    )
    assert torch.equal(some, torch.cat([all_[:, :4], plain[:, 4:]], 1))
    with pytest.raises(ConfigError, match="at least one channel"):
        CFG(channels=0)


@paths
def test_weighted_prompts_are_linear(path) -> None:  # type: ignore[no-untyped-def]
    guidance = given(
        Weighted(scale=2.0, also=(("third", -0.5),)), cond("cond"), lambda: cond("null"), lambda name: cond(str(name))
    )
    mean = -0.5 + 2.0 * (1.5 - 0.5 * 2.5)
    torch.testing.assert_close(
        guided(answering(path), path, guidance)(X, 0.5), Gaussian(mean * ONE, 0.7 * ONE).x0(path, X, 0.5)
    )
    with pytest.raises(ConfigError, match="further prompts"):
        given(Weighted(also=(("third", 1.0),)), cond("cond"), lambda: cond("null"))


@paths
def test_cfg_plus_plus_is_its_definition(path) -> None:  # type: ignore[no-untyped-def]
    """x0 of the guided answer, noise of the null one (algorithms, D2), step by step with DDIM."""
    start = float(linear(path, 5)[0]) if path.alpha(torch.ones(())) > 0 else 0.95
    times = linear(path, 5, start=start)
    x = X * float(path.sigma(times[0]))
    denoise = guided(answering(path), path, CFGPlusPlus(cond("cond"), cond("null"), 0.6), times)
    state = x
    for t, s in pairwise(times):
        pc, pu = (answering(path)(state, t, cond(name)) for name in ("cond", "null"))
        eps = (state - path.alpha(t) * pu) / path.sigma(t)
        state = path.alpha(s) * (pu + 0.6 * (pc - pu)) + path.sigma(s) * eps
    torch.testing.assert_close(drive(ddim(path, x, times), denoise), state, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="where a step ends"):
        guided(answering(path), path, CFGPlusPlus(cond("cond"), cond("null")))(X, 0.5)


def test_apg_without_its_changes_is_cfg_and_its_projection_is_orthogonal() -> None:
    path, a, b = Linear(), X, torch.randn(5, 6, generator=RNG, dtype=torch.float64)
    plain = APG(cond("cond"), cond("null"), 4.0, parallel=1.0, limit=None, momentum=0.0)
    torch.testing.assert_close(plain.combine(path, X, 0.5, [a, b]), b + 4.0 * (a - b))
    orthogonal = APG(cond("cond"), cond("null"), 4.0, parallel=0.0, limit=None, momentum=0.0)
    added = orthogonal.combine(path, X, 0.5, [a, b]) - a
    torch.testing.assert_close((added * a).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    short = APG(cond("cond"), cond("null"), 4.0, parallel=1.0, limit=0.1, momentum=0.0)
    size = (short.combine(path, X, 0.5, [a, b]) - a).norm(dim=1)
    torch.testing.assert_close(size, torch.full((5,), 0.3, dtype=torch.float64))  # (scale - 1) * 0.1


def test_cfg_zero_scales_the_null_answer_to_fit_and_stands_still_at_first() -> None:
    path = Linear()
    zero = CFGZero(cond("cond"), cond("null"), 3.0)
    stood = zero.combine(path, X, 1.0, [X])
    torch.testing.assert_close(stood, X)  # velocity 0 on the linear path: x0 = x_t
    model = answering(path)
    pc, pu = (model(X, torch.full((5,), 0.5, dtype=torch.float64), cond(name)) for name in ("cond", "null"))
    vc, vu = ((X - one) / 0.5 for one in (pc, pu))
    fit = (vc * vu).sum(1, keepdim=True) / (vu * vu).sum(1, keepdim=True)
    want = X - 0.5 * (fit * vu + 3.0 * (vc - fit * vu))
    torch.testing.assert_close(zero.combine(path, X, 0.5, [pc, pu]), want)


@pytest.mark.parametrize("space", [X0, EPS, V], ids=lambda one: one.name)
def test_rescaling_wholly_gives_the_conditional_deviation(space) -> None:  # type: ignore[no-untyped-def]
    path = VariancePreserving()
    t, other = torch.tensor(0.5, dtype=torch.float64), torch.randn(5, 6, generator=RNG, dtype=torch.float64)
    plain, whole = (CFG(cond("cond"), cond("null"), 5.0, rescale=by, space=space) for by in (0.0, 1.0))
    found = whole.combine(path, X, 0.5, [0.3 * X + other, other])
    stds = [space.answer(path, one, X, t).std(1) for one in (found, 0.3 * X + other)]
    torch.testing.assert_close(stds[0], stds[1])
    assert not torch.allclose(plain.combine(path, X, 0.5, [0.3 * X + other, other]), found)
    wrapped = Rescaled(of=CFG(cond("cond"), cond("null"), 5.0), by=1.0, space=space)
    torch.testing.assert_close(wrapped.combine(path, X, 0.5, [0.3 * X + other, other]), found)


def test_dynamic_thresholding_cuts_at_a_quantile_and_divides() -> None:
    x0 = torch.tensor([[0.2, -0.4, 3.0, 0.1, -2.0], [0.1, 0.2, -0.3, 0.4, 0.5]], dtype=torch.float64)
    found = Thresholded(of=Unguided({}), quantile=0.75).combine(Linear(), x0, 0.5, [x0])
    torch.testing.assert_close(found[0], torch.tensor([0.1, -0.2, 1.0, 0.05, -1.0], dtype=torch.float64))
    torch.testing.assert_close(found[1], x0[1])  # within [-1, 1]: the floor


@paths
def test_a_classifiers_gradient_is_bayes_rule(path) -> None:  # type: ignore[no-untyped-def]
    """p(x0 | y) of a Gaussian prior and a Gaussian measurement y = x0 + noise of variance r, in closed form."""
    prior, y, r = Gaussian(0.3 * ONE, 0.7 * ONE), torch.full((5, 6), 1.1, dtype=torch.float64), 0.4

    def log_prob(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        left = (0.7**2 * sigma**2) / (alpha**2 * 0.7**2 + sigma**2)  # Var[x0 | x_t]
        return -((y - prior.x0(path, x, t)) ** 2 / (2 * (left + r))).sum(1)

    post = 1 / (1 / 0.49 + 1 / r)
    truth = Gaussian(post * (0.3 / 0.49 + 1.1 / r) * ONE, post**0.5 * ONE)
    model = guided(lambda x, t, cond: prior.x0(path, x, t), path, Classifier({}, log_prob, scale=2.0))
    for t in (0.2, 0.7):
        with torch.inference_mode():
            torch.testing.assert_close(model(X, t), truth.x0(path, X, t), rtol=1e-7, atol=1e-7)


def test_the_distilled_scale_is_told_in_either_convention() -> None:
    for told, value in (("scale", 4.0), ("weight", 3.0)):
        (branch,) = Distilled(cond("cond"), 4.0, told=told).branches(Linear(), 0.5)  # type: ignore[arg-type]
        assert branch.cond["guidance"].tolist() == [value] * 5


def test_away_from_a_weaker_answer() -> None:
    path, weak = Linear(), answering(Linear())
    guidance = Autoguidance(cond("cond"), 2.5, model="weak")
    found = guided(answering(path), path, guidance, variants=lambda name: lambda x, t, c: weak(x, t, cond("null")))(
        X, 0.5
    )
    good, bad = (answering(path)(X, torch.tensor(0.5, dtype=torch.float64), cond(one)) for one in ("cond", "null"))
    torch.testing.assert_close(found, bad + 2.5 * (good - bad))
    with pytest.raises(ConfigError, match="no variants"):
        guided(answering(path), path, guidance)(X, 0.5)
    with pytest.raises(ConfigError, match="second, weaker model"):
        Autoguidance()


def test_layers_are_skipped_and_attention_perturbed_in_a_real_network() -> None:
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=8, patch=2, dim=16, depth=3, heads=2))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model = Denoiser(net, Linear(), V)
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 0.5)
    for guidance in (SkipLayers({}, 2.0, blocks=(1,)), PerturbedAttention({}, 2.0, blocks=(0, 2))):
        weaker = variant(model, guidance.variant)
        found = guided(model, Linear(), guidance, variants=lambda name: variant(model, name))(x, 0.5)
        good, bad = model(x, t), weaker(x, t)
        assert not torch.allclose(good, bad)
        torch.testing.assert_close(found, bad + 2.0 * (good - bad))
    assert isinstance(model.net, nn.Module) and torch.equal(model(x, t), good)  # the network itself is as it was


@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_kind_can_be_named(kind: str) -> None:
    needs = {"autoguidance": {"model": "runs/x"}, "classifier": {"log_prob": "math:fsum"}}
    built = build({"kind": kind, **needs.get(kind, {})}, "Guidance")
    filled = given(built, cond("cond"), lambda: cond("null"))
    assert torch.equal(filled.branches(Linear(), 0.5)[0].cond["mean"], cond("cond")["mean"])


def test_a_guidance_acts_on_a_bound_denoiser_of_one_row_as_of_many() -> None:
    path = Linear()
    whole = guided(answering(path), path, CFG(cond("cond"), cond("null"), 3.0))(X, 0.5)
    first = {name: {"mean": cond(name)["mean"][:1]} for name in ("cond", "null")}
    one = guided(answering(path), path, CFG(first["cond"], first["null"], 3.0))
    assert isinstance(one, Bound)
    torch.testing.assert_close(one(X[:1], 0.5), whole[:1], rtol=0, atol=1e-12)
    assert float(log_snr(path, torch.tensor(0.5))) == pytest.approx(0)
