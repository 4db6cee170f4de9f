"""Derivatives in training by half precision: everything inside of one is float32, and attention is written out."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import derivatives
from sfumato.catalogue import METHODS
from sfumato.config import Config
from sfumato.denoiser import Denoiser
from sfumato.nets import layers
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.objectives.meanflow import change
from sfumato.paths import Linear
from sfumato.predictions import VELOCITY
from sfumato.train.run import Run
from sfumato.train.start import read_start, with_start
from sfumato.train.teaching import as_student

JUMPS = ("model.answers=[jump]", "model.time_input=time", "model.net.told=[until]")
OBJECTIVES = {
    "continuous_consistency": ("objective={kind: continuous_consistency, warmup: 0}",),
    "meanflow": (*JUMPS, "objective={kind: meanflow, still: 0.5}"),
    "improved_meanflow": (*JUMPS, "objective={kind: improved_meanflow, scales: [1, 4], head: auxiliary}"),
}
NETS = {
    "dit": (),
    "unet": ("model.net={kind: unet, patch: 4, channels: [8, 16], blocks: 1, attention: [1, 1]}",),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")),
]


def test_all_methods_that_take_derivatives_are_looked_at() -> None:
    assert {name for name, line in METHODS.items() if line.derivative} == OBJECTIVES.keys()


class Watch:
    """What modules say while a derivative is taken and while none is, and what a derivative answers: types."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.outside, self.answers = (set[torch.dtype]() for _ in range(3))
        self.fused, self.plain = 0, 0
        for module in model.modules():
            module.register_forward_hook(self._heard)
        attention, jvp = layers.F.scaled_dot_product_attention, torch.func.jvp

        def fused(*given: Any, **more: Any) -> Tensor:
            assert not derivatives.is_taken()
            self.fused += 1
            return attention(*given, **more)

        def watched(*given: Any, **more: Any) -> Any:
            said = jvp(*given, **more)
            self.answers |= {one.dtype for one in said}
            return said

        written_out = layers.attended_plainly

        def plainly(*given: Any, **more: Any) -> Tensor:
            self.plain += derivatives.is_taken()
            return written_out(*given, **more)

        monkeypatch.setattr(layers.F, "scaled_dot_product_attention", fused)
        monkeypatch.setattr(layers, "attended_plainly", plainly)
        monkeypatch.setattr(torch.func, "jvp", watched)

    def _heard(self, module: nn.Module, given: object, said: object) -> None:
        if isinstance(said, Tensor) and said.is_floating_point():
            (self.inside if derivatives.is_taken() else self.outside).add(said.dtype)


@contextlib.contextmanager
def begun(config: Config, folder: Path) -> Iterator[Run]:
    """A run that has made no step."""
    folder.mkdir()
    start = read_start(config.start) if config.start is not None else None
    config, start = as_student(config if start is None else with_start(config, start), start)
    run = Run(config, folder, False, start)
    try:
        yield run
    finally:
        run.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_tangents_are_float32_where_training_is_not(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, net: str, device: str
) -> None:
    """With the conditions that a run computes, in half precision too."""
    config = small(*NETS[net], *OBJECTIVES[name], "precision=bf16", f"device={device}", "steps=3")
    with begun(config, tmp_path / "run") as run:
        with torch.no_grad():  # gates and last layers begin at zero, and hide what stands before them
            for i, p in enumerate(run.model.parameters()):
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
        seen = Watch(run.model.net, monkeypatch)
        before = {key: value.clone() for key, value in run.weights.items()}
        for _ in range(2):
            run._advance()
        assert run.guard.skipped == 0
    assert seen.inside == seen.answers == {torch.float32}
    assert torch.bfloat16 in seen.outside
    assert seen.plain > 0
    assert any(not torch.equal(value, before[key]) for key, value in run.weights.items())


@pytest.mark.parametrize("difference", [0.0, 0.03])
def test_the_target_is_that_of_single_precision(difference: float) -> None:
    """Of jumps that have a length: what autocast does to the network's own answer is all that half precision does."""
    net = DiT(DiTConfig(size=8, patch=4, dim=32, depth=1, heads=2, qk_norm=True, told=("until",), pooled_dim=6))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    student = Denoiser(net, Linear(), VELOCITY, answers=("jump",))
    x, velocity = (torch.randn(4, 3, 8, 8, generator=rng) for _ in range(2))
    t, until = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.1, 0.0, 0.3, 0.1])
    pooled = torch.randn(4, 6, generator=rng).bfloat16()  # as an encoder's projection gives it then
    with torch.no_grad():
        plain = change(student, x, t, until, velocity, {"pooled": pooled.float()}, difference)
        with torch.autocast("cpu", torch.bfloat16):
            assert student.net(x, t, pooled=pooled).dtype == torch.bfloat16
            half = change(student, x, t, until, velocity, {"pooled": pooled}, difference)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0)


def test_autocast_is_put_off_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device: here one that every build of torch has."""
    put_off: list[tuple[str, bool]] = []

    @contextlib.contextmanager
    def autocast(device: str, *rest: object, enabled: bool = True) -> Iterator[None]:
        put_off.append((device, enabled))
        yield

    monkeypatch.setattr(torch, "autocast", autocast)
    x = torch.ones(2, 3, device="meta", dtype=torch.bfloat16)
    value, slope = derivatives.along_direction(lambda x: x.sin(), (x,), (x,))
    assert put_off == [("meta", False)] and value.device.type == slope.device.type == "meta"
    assert value.dtype == slope.dtype == torch.float32
