"""Sampling on a device: no step waits for it, every sampler gives the CPU's numbers, and pictures are the CPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as Folder

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato import load
from sfumato.catalogue import SAMPLERS
from sfumato.denoiser import Bound, Denoiser
from sfumato.paths import Linear
from sfumato.predictions import VELOCITY
from sfumato.samplers import SeededNoise, drive
from sfumato.times import linear

PATH = Linear()
PLAIN = [name for name, line in SAMPLERS.items() if not line.adaptive and not line.inverse and line.asks == "x0"]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shrinking(x: Tensor, t: float | Tensor) -> Tensor:
    """A denoiser that is its formula."""
    return 0.9 * x / (1 + x.square().mean(dim=(1, 2, 3), keepdim=True))


def begin(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)


def end_of(name: str, x: Tensor, steps: int = 6) -> Tensor:
    running = SAMPLERS[name].fn(PATH, x, linear(PATH, steps))
    return drive(running, Bound(PATH, shrinking), SeededNoise.of([1, 2]))


@pytest.mark.parametrize("name", PLAIN)
def test_no_step_waits_for_the_device(name: str, gpu: torch.device) -> None:
    x = begin(gpu, torch.float32)
    end_of(name, x)  # what is made once is made now
    with no_waiting():
        found = end_of(name, x)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", PLAIN)
def test_a_sampler_gives_the_numbers_of_the_cpu(name: str, gpu: torch.device) -> None:
    found, expected = (end_of(name, begin(one, torch.float64)) for one in (gpu, torch.device("cpu")))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


def test_a_denoiser_waits_for_nothing(gpu: torch.device) -> None:
    net = torch.nn.Conv2d(3, 3, 3, padding=1, device=gpu)
    denoiser = Denoiser(lambda x, t: net(x), PATH, VELOCITY)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8, 8, device=gpu)
    with torch.no_grad():
        drive(SAMPLERS["ddim"].fn(PATH, x, linear(PATH, 4)), denoiser)
        with no_waiting():
            drive(SAMPLERS["ddim"].fn(PATH, x, linear(PATH, 4)), denoiser)


def test_pictures_are_those_of_the_cpu(gpu_teacher: Folder) -> None:
    prompts = ["a red circle", "two blue squares"]
    there, here = (
        load(gpu_teacher, device, precision="fp32").sample(prompts, seeds=[3, 4], steps=8).images
        for device in ("cuda", "cpu")
    )
    apart = np.abs(np.stack(there).astype(int) - np.stack(here))
    assert apart.mean() < 0.5 and apart.max() <= 8


def test_a_picture_does_not_depend_on_its_batch(gpu_teacher: Folder) -> None:
    pipeline = load(gpu_teacher, "cuda", precision="fp32")
    many = pipeline.sample(["a red circle"] * 4, seeds=[1, 2, 3, 4], steps=8).images
    one = pipeline.sample("a red circle", seeds=3, steps=8).images[0]
    assert np.abs(np.asarray(many[2]).astype(int) - np.asarray(one)).max() <= 4


def test_a_compiled_model_draws_the_same(gpu_teacher: Folder) -> None:
    plain, fast = (load(gpu_teacher, "cuda", precision="fp32", compile=compiled) for compiled in (False, True))
    first, second = (
        np.asarray(one.sample("a red circle", seeds=3, steps=4).images[0]).astype(int) for one in (plain, fast)
    )
    assert np.abs(first - second).max() <= 4
