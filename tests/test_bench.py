"""The bench: it measures the orders that theory knows, counts what a step does, and takes the user's own sampler."""

from pathlib import Path

import pytest
import torch

from sfumato import bench
from sfumato.catalogue import SAMPLERS, Sampler, build
from sfumato.errors import ConfigError

OWN = """
import torch
from sfumato.samplers import Ask
from sfumato.samplers.core import Table, ddim_step

def mine(path, x, times):
    table = Table.of(path, times)
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        x = ddim_step(x, x0, table, i, i + 1)
        x.sum().item()
    return x
"""


@pytest.mark.parametrize(("name", "order"), [("ddim", 1.0), ("heun", 2.0), ("rk4", 4.0)])
def test_orders_are_those_of_theory(name: str, order: float) -> None:
    found = bench.order_of(SAMPLERS[name], build("variance_preserving", "Path"))
    assert found is not None and abs(found - order) < 0.25


def test_more_calls_mean_less_error() -> None:
    found = bench.errors(SAMPLERS["ipndm"], build("linear", "Path"))
    assert found["50"] < found["10"] < found["5"]


def test_a_step_of_ddim_is_two_operations_and_no_wait() -> None:
    us, operations, waits = bench.overhead(SAMPLERS["ddim"])
    assert operations <= 2.5 and waits == 0 and us > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_waits_for_the_device(name: str) -> None:
    if SAMPLERS[name].adaptive:
        pytest.skip("it must look at its error to choose a step")
    assert bench.overhead(SAMPLERS[name], steps=6, rounds=1)[2] == 0


def test_your_own_sampler_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    row = bench.samplers(None, "bench_own:mine", paths=["linear"])["bench_own:mine"]
    assert row.nominal is None and row.syncs == 30  # its .item(), once a step
    assert row.order["linear"] is not None and abs(row.order["linear"] - 1) < 0.25
    assert row.error["linear"]["50"] < row.error["linear"]["5"]


def test_unknown_samplers_are_named() -> None:
    with pytest.raises(ConfigError, match="no such sampler"):
        bench.samplers(["nothing"])


def test_a_stochastic_sampler_has_no_order() -> None:
    row = bench.measured(Sampler(SAMPLERS["ddpm"].target, order=1, stochastic=True), ["linear"])
    assert row.order == {"linear": None} and row.error == {}


def test_the_learned_path_has_room_for_the_order_and_is_the_same_each_time() -> None:
    before = torch.get_rng_state()
    one, two = (bench.path_named("learned") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    assert torch.equal(one.alpha(t), two.alpha(t))
    for name in ("ddim", "dpmpp_2m"):
        order = bench.samplers([name], paths=["learned"])[name].order["learned"]
        assert order is not None and abs(order - SAMPLERS[name].order) < 0.25
