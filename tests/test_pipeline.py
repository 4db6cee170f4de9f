"""Pipelines: pictures that depend on their seed, their prompt and their settings, and on nothing else."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import ConfigError, DataError, MemoryShortage
from sfumato.pipeline import Pipeline, Settings
from sfumato.samplers import SeededNoise
from small_models import PROMPTS, drawn, made, rows

SAMPLERS = ("ddim", "euler", "heun", "dpmpp_2m", "ddpm", {"kind": "ddim", "eta": 1.0}, {"kind": "heun", "churn": 10.0})


# What a picture depends on


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_picture_does_not_depend_on_its_batch(doubles: Pipeline, sampler: Any) -> None:
    seeds = [3, 5, 7, 11]
    whole = drawn(doubles, PROMPTS, seeds=seeds, sampler=sampler)
    assert whole.dtype == torch.float64
    for i, prompt in enumerate(PROMPTS):
        alone = drawn(doubles, prompt, seeds=[seeds[i]], sampler=sampler)
        torch.testing.assert_close(whole[i], alone[0], rtol=0, atol=1e-12)
    backwards = drawn(doubles, PROMPTS[::-1], seeds=seeds[::-1], sampler=sampler)
    torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=1e-12)
    assert (whole[0] - drawn(doubles, PROMPTS[0], seeds=[4], sampler=sampler)[0]).abs().max() > 0.1
    assert (whole[0] - drawn(doubles, "two circle", seeds=[3], sampler=sampler)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_in_single_precision_too(pipe: Pipeline, sampler: str) -> None:
    whole = drawn(pipe, PROMPTS, seeds=9, sampler=sampler)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(whole[i], drawn(pipe, prompt, seeds=9 + i, sampler=sampler)[0], rtol=0, atol=1e-5)


def test_splitting_into_batches_changes_nothing(doubles: Pipeline) -> None:
    prompts = [*PROMPTS, "a", "red"]
    whole = doubles.sample(prompts, seeds=2, sampler="ddpm")
    for batch in (1, 2, 4, 5):
        split = doubles.sample(prompts, seeds=2, sampler="ddpm", batch=batch)
        assert np.array_equal(split.images, whole.images) and split.settings == whole.settings


def test_the_first_state_is_the_seeds_noise(pipe: Pipeline) -> None:
    first = next(pipe.steps([None, None], seeds=[4, 6]))
    assert first.t == 1.0 and first.x.dtype == torch.float32
    assert torch.equal(first.x, SeededNoise.of([4, 6])(torch.empty(2, 3, 8, 12)))


def test_the_global_generator_is_left_alone(pipe: Pipeline) -> None:
    torch.manual_seed(1)
    want = torch.rand(2)
    torch.manual_seed(1)
    pipe.sample("a", sampler="ddpm")
    assert torch.equal(torch.rand(2), want)


# Steps


def test_stopping_costs_nothing(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rows(pipe, monkeypatch)
    walk = pipe.steps(["a", "red"], steps=10)
    assert seen == []
    steps = list(islice(walk, 3))
    assert [step.t for step in steps] == pytest.approx([1.0, 0.9, 0.8]) and seen == [4, 4, 4]
    assert pipe.pictures(steps[-1].x0).shape == (2, 8, 12, 3)


def test_steps_end_in_what_is_sampled(pipe: Pipeline) -> None:
    for sampler in ("ddim", "heun", "ddpm"):
        steps = list(pipe.steps(["a", "red"], seeds=5, sampler=sampler))
        assert steps[-1].t == 0.0
        assert np.array_equal(pipe.pictures(steps[-1].x), pipe.sample(["a", "red"], seeds=5, sampler=sampler).images)


def test_between_steps_the_caller_is_undisturbed(pipe: Pipeline) -> None:
    """No mode leaks out of a walk, several walks do not meet, and its tensors can be looked at."""
    one, two = pipe.steps("a", seeds=1), pipe.steps("red", seeds=2)
    apart = [[step.x for step in pipe.steps(prompt, seeds=seed)] for prompt, seed in (("a", 1), ("red", 2))]
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.equal(a.x, apart[0][i]) and torch.equal(b.x, apart[1][i])
        weight = torch.ones(1, requires_grad=True)
        (weight * a.x.clone()).sum().backward()
        assert weight.grad is not None


def test_progress_counts_to_the_end(pipe: Pipeline) -> None:
    for sampler in ("ddim", "heun"):  # which asks twice a step
        told: list[tuple[int, int]] = []
        pipe.sample(["a"] * 5, sampler=sampler, batch=2, progress=lambda done, whole: told.append((done, whole)))
        assert {whole for _, whole in told} == {12} and told[-1] == (12, 12)
        done = [one for one, _ in told]
        assert done == sorted(done) and set(done) >= set(range(1, 13))


# Sizes, prompts, settings


def test_other_sizes(pipe: Pipeline) -> None:
    assert pipe.sample(["a"]).images.shape == (1, 8, 12, 3)
    assert pipe.sample(["a"], size=(12, 4)).images.shape == (1, 12, 4, 3)
    square = pipe.sample(["a"], size=8)
    assert square.images.shape == (1, 8, 8, 3) and square.settings[0]["size"] == [8, 8]


@pytest.mark.parametrize("size", [(8, 9), 6, 0, -4, (8,), (8, 8, 8), (8.0, 8), "8x8", [None, 8]])
def test_sizes_that_cannot_be_are_named(pipe: Pipeline, size: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        pipe.sample("a", size=size)
    assert caught.value.where == "size" and caught.value.fix


def test_a_size_that_only_the_network_finds_wrong_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline(made(), "cpu")

    def stubborn(x: Tensor, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pipe.model.net, "forward", stubborn)
    with pytest.raises(ConfigError, match=r"size=\(8, 12\)"):
        pipe.sample("a", size=(8, 8))
    with pytest.raises(RuntimeError, match="mat1"):  # at its own size it is a bug, and shown as one
        pipe.sample("a")


def test_too_little_memory_is_explained(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(pipe.model.net, "forward", hungry)
    with pytest.raises(MemoryShortage) as caught:
        pipe.sample(["a", "red"])
    assert caught.value.where == "batch" and str(caught.value.seen).startswith("4 rows")


def test_the_ways_to_say_a_prompt(pipe: Pipeline) -> None:
    """Text is a caption, a number a label, a mapping itself, nothing the null condition."""
    same = (
        ("a red circle", {"caption": "a red circle"}),
        (1, {"label": "dog"}),
        (np.int64(1), {"label": 1}),
        (None, {}),
        (None, {"caption": None, "label": None}),
    )
    for one, other in same:
        assert torch.equal(drawn(pipe, one), drawn(pipe, [other]))


def test_names_of_classes_are_prompts_where_there_are_no_captions() -> None:
    pipe = Pipeline(made(conditioner={"kind": "labels"}), "cpu")
    assert torch.equal(drawn(pipe, "dog"), drawn(pipe, 1))
    assert pipe.sample("dog").settings[0]["prompt"] == "dog"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"prompts": "a zebra"}, "prompt 'a zebra'"),
        ({"prompts": ["a", 7]}, "label"),
        ({"prompts": "a", "negative": "zebra"}, "prompt 'zebra'"),
        ({"prompts": {"colour": "red"}}, "prompts"),
        ({"prompts": [1.5]}, "prompts"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_before_anything_runs(
    pipe: Pipeline, options: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rows(pipe, monkeypatch)
    with pytest.raises(DataError) as caught:
        pipe.sample(**options)
    assert caught.value.where == where and seen == []


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"prompts": []}, "prompts"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"rescale": 2}, "rescale"),
        ({"interval": (3, 1)}, "interval"),
        ({"interval": "all"}, "interval"),
        ({"sampler": "ddmi"}, "sampler"),
        ({"sampler": {"kind": "ddim", "eat": 1}}, "sampler.eat"),
        ({"grid": {"kind": "karras", "rho": "much"}}, "grid.rho"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [0.5]}, "seeds"),
        ({"batch": 0}, "batch"),
        ({"negative": "a", "guidance": 1}, "negative"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(
    pipe: Pipeline, options: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rows(pipe, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        pipe.sample(**{"prompts": "a", **options})
    assert caught.value.where == where and seen == []


def test_a_setting_that_is_none_of_ours_is_named(pipe: Pipeline) -> None:
    with pytest.raises(ConfigError) as caught:
        pipe.steps("a", guidnace=3)
    assert (caught.value.seen, caught.value.fix) == ("guidnace", "guidance, grid")


def test_what_the_model_recommends_is_used_and_can_be_changed(pipe: Pipeline) -> None:
    assert pipe.settings() == Settings({"kind": "ddim"}, {"kind": "linear"}, 4, 2.0, None, 0.0)
    assert pipe.settings(steps=9, guidance=None) == Settings({"kind": "ddim"}, {"kind": "linear"}, 9, 2.0, None, 0.0)
    assert torch.equal(drawn(pipe, "a"), drawn(pipe, "a", sampler="ddim", grid="linear", steps=4, guidance=2))


def test_a_model_without_conditions_takes_none() -> None:
    pipe = Pipeline(made(conditioner=None), "cpu")
    said = pipe.sample([None, None]).settings
    assert [one["seed"] for one in said] == [0, 1] and said[0]["prompt"] is None
    with pytest.raises(DataError, match="no conditions"):
        pipe.sample("a")
    with pytest.raises(ConfigError) as caught:
        pipe.sample(guidance=3)
    assert caught.value.where == "guidance"


# Numbers and precision


def test_pictures_are_rounded_and_kept_in_range(pipe: Pipeline) -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 126.6 / 127.5 - 1]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert pipe.pictures(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 127]  # 127.5 rounds to even


def test_answers_that_are_no_numbers_are_refused(pipe: Pipeline) -> None:
    x = torch.zeros(3, 3, 8, 12)
    x[1, 0, 2, 2] = float("nan")
    with pytest.raises(DataError) as caught:
        pipe.pictures(x)
    assert caught.value.seen == "fp32, 1 of 3 pictures"


def test_half_precision_is_the_networks_alone(pipe: Pipeline) -> None:
    half = Pipeline(made(), "cpu", precision="bf16")
    for one, other in zip(half.steps("a red circle"), pipe.steps("a red circle"), strict=True):
        assert one.x.dtype == torch.float32
        assert (one.x - other.x).abs().max() < 0.1
    with pytest.raises(ConfigError) as caught:
        Pipeline(made(), "cpu", precision="fp8")
    assert caught.value.where == "precision"


# Settings that depend on the model


def test_a_grid_that_depends_on_tokens_is_told_those_of_the_picture() -> None:
    """4 x 4 pixels are a token of this network; what a slot says itself stays."""
    grid = {"kind": "dynamic_shift", "fewest": 2, "most": 12, "low": 0.1, "high": 1.3}
    pipe = Pipeline(made(), "cpu")
    for size, tokens in (((8, 12), 6), ((16, 12), 12)):
        drawn = pipe.sample("a red circle", grid=grid, size=size).images
        said = pipe.sample("a red circle", grid={**grid, "tokens": tokens}, size=size).images
        other = pipe.sample("a red circle", grid={**grid, "tokens": tokens - 3}, size=size).images
        assert (drawn == said).all() and (drawn != other).any()


def test_a_grid_that_depends_on_pixels_is_told_those_of_what_is_diffused() -> None:
    pipe = Pipeline(made(), "cpu")
    drawn, said, other = (
        pipe.sample("a red circle", grid={"kind": "fitted", **told}, size=(8, 12)).images
        for told in ({}, {"pixels": 96}, {"pixels": 4096})
    )
    assert (drawn == said).all() and (drawn != other).any()


def test_a_number_is_the_scale_of_the_guidance_that_a_model_has() -> None:
    model = made(net={"kind": "flux", "patch": 4, "dim": 16, "double": 1, "single": 1, "heads": 2, "guidance": True})
    model.spec["sampling"]["guidance"] = {"kind": "distilled", "scale": 3.5}
    pipe = Pipeline(model, "cpu")
    assert pipe.settings(guidance=2).guidance == {"kind": "distilled", "scale": 2.0}
    assert pipe.settings(guidance=1).guidance == 1 and pipe.settings(guidance="cfg").guidance == "cfg"
    one, two, own = (pipe.sample("a red circle", guidance=scale).images for scale in (1, 2, None))
    assert (one != two).any() and (two != own).any()
    assert (pipe.sample("a red circle", guidance=3.5).images == own).all()
    with pytest.raises(ConfigError, match="negative"):
        pipe.sample("a red circle", negative="two blue squares")
    cfg = pipe.sample("a red circle", guidance={"kind": "cfg", "scale": 2.0}, negative="two blue squares").images
    assert (cfg != pipe.sample("a red circle", guidance={"kind": "cfg", "scale": 2.0}).images).any()
