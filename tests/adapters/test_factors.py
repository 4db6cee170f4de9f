"""Changes of weights: their sum with the weight, and moving them between layouts that fuse and that do not."""

import pytest
import torch
from torch import Tensor, nn

from sfumato.adapters import lycoris
from sfumato.adapters.factors import Factors, joined, merged, split
from sfumato.adapters.lora import inject, unwrap
from sfumato.errors import CheckpointError

peft = pytest.importorskip("peft")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(out: int, inside: tuple[int, ...], rank: int, alpha: float, seed: int = 0) -> Factors:
    return Factors(normal(rank, *inside, seed=seed), normal(out, rank, seed=seed + 1), alpha)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, -0.6])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_change_is_that_which_peft_makes(kind: str, dora: bool, scale: float) -> None:
    layer = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(5, 7, 3, padding=1)
    one = factors(7, tuple(layer.weight.shape[1:]), 2, 3.0)
    one = Factors(one.down, one.up, one.alpha, torch.rand(7) + 0.5 if dora else None)
    holder = nn.ModuleDict({"inner": nn.ModuleDict({"layer": layer})})
    x = normal(3, 5) if kind == "linear" else normal(3, 5, 4, 6)
    with torch.no_grad():
        weight, bias = merged(layer.weight, [(one, scale)]), layer.bias
        assert bias is not None
        wanted = (
            nn.functional.linear(x, weight, bias)
            if kind == "linear"
            else nn.functional.conv2d(x, weight, bias, padding=1)
        )
        (name,) = inject(holder, "some", {"inner.layer": one})
        wrapped = holder.get_submodule("inner.layer")
        wrapped.set_adapter([name])  # type: ignore[operator]
        wrapped.set_scale(name, scale)  # type: ignore[operator]
        close(wrapped(x), wanted)
        wrapped.delete_adapter(name)  # type: ignore[operator]
    unwrap(holder)
    assert holder.get_submodule("inner.layer") is layer


def test_at_scale_zero_nothing_changes_of_a_dora_either() -> None:
    one = Factors(normal(2, 5), normal(7, 2), 1.0, torch.ones(7))
    assert torch.equal(merged(normal(7, 5), [(one, 0.0)]), normal(7, 5))


@pytest.mark.parametrize("alphas", [(2.0, 2.0, 2.0), (2.0, 1.0, 5.0)])
def test_changes_of_parts_joined_are_the_change_of_the_whole_and_come_apart_again(alphas: tuple[float, ...]) -> None:
    rows = [4, 6, 2]
    parts = [factors(n, (5,), r, a, seed=n) for n, r, a in zip(rows, (2, 3, 2), alphas, strict=True)]
    whole = joined(parts, rows, "here")
    assert whole.rank == 7
    close(whole.product(), torch.cat([part.product() for part in parts]))
    for part, again in zip(parts, split(whole, rows), strict=True):
        assert again is not None and again.rank == part.rank
        close(again.product(), part.product())


def test_the_change_of_a_whole_split_shares_a_and_joins_to_the_same() -> None:
    whole = factors(12, (5,), 3, 2.0)
    parts = split(whole, [4, 6, 2])
    assert all(part is not None and torch.equal(part.down, whole.down) for part in parts)
    again = joined(parts, [4, 6, 2], "here")
    assert torch.equal(again.up, whole.up) and torch.equal(again.down, whole.down) and again.alpha == whole.alpha


def test_parts_that_are_not_changed_stay_so() -> None:
    one = factors(4, (5,), 2, 1.0)
    whole = joined([one, None, None], [4, 6, 2], "here")
    assert not whole.product()[4:].any()
    first, second, third = split(whole, [4, 6, 2])
    assert first is not None and second is None and third is None
    close(first.product(), one.product())


def test_a_dora_of_a_part_has_no_whole() -> None:
    one = Factors(normal(2, 5), normal(4, 2), 1.0, torch.ones(4))
    with pytest.raises(CheckpointError, match="DoRA of a part"):
        joined([one, None], [4, 3], "here")
    whole = joined([one, one], [4, 4], "here")
    assert whole.magnitude is not None and len(whole.magnitude) == 8


# LyCORIS

HADA = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 30), "hada_w2_a": (12, 2), "hada_w2_b": (2, 30)}


def made(shapes: dict[str, tuple[int, ...]], **more: float) -> dict[str, Tensor]:
    found = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return found | {name: torch.tensor(value) for name, value in more.items()}


@pytest.mark.parametrize("rank", [2, 5])
def test_loha_is_the_product_number_by_number(rank: int) -> None:
    """As a low-rank change where that is smaller, else whole."""
    leaves = made({name: tuple(rank if n == 2 else n for n in shape) for name, shape in HADA.items()}, alpha=3.0)
    found = lycoris.factors_of(leaves, (12, 30), "here")
    a, b, c, d = (leaves[name] for name in HADA)
    close(found.product(), (a @ b) * (c @ d) * (3 / rank))
    assert found.rank == (4 if rank == 2 else 12)


@pytest.mark.parametrize("whole", [(), ("w1",), ("w1", "w2")])
def test_lokr_is_krons_product(whole: tuple[str, ...]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in {"w1": (4, 3), "w2": (5, 10)}.items():
        halves = {f"lokr_{name}_a": (rows, 2), f"lokr_{name}_b": (2, columns)}
        shapes |= {f"lokr_{name}": (rows, columns)} if name in whole else halves
    leaves = made(shapes, alpha=1.0)
    found = lycoris.factors_of(leaves, (20, 30), "here")
    one, two = (
        leaves[f"lokr_{n}"] if n in whole else leaves[f"lokr_{n}_a"] @ leaves[f"lokr_{n}_b"] for n in ("w1", "w2")
    )
    close(found.product(), torch.kron(one, two) * (1.0 if len(whole) == 2 else 0.5))
    assert found.rank == {0: 4, 1: 6, 2: 20}[len(whole)]


def test_a_full_change_and_kernels() -> None:
    change = normal(6, 2, 3, 3)
    found = lycoris.factors_of({"diff": change}, (6, 2, 3, 3), "here")
    close(found.product(), change)
    leaves = made({"lokr_w1": (2, 2), "lokr_w2": (3, 1, 3, 3)})
    found = lycoris.factors_of(leaves, (6, 2, 3, 3), "here")
    close(found.product(), torch.kron(leaves["lokr_w1"][:, :, None, None], leaves["lokr_w2"]))


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_pefts_own_make_the_same_change(kind: str) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(20, 12)})
    config = getattr(peft, kind)(r=2, alpha=3, target_modules=["layer"], init_weights=False)
    peft.inject_adapter_in_model(config, holder)
    layer = holder["layer"]
    leaves = {
        name.split(".")[0]: value.detach()
        for name, value in layer.named_parameters()
        if name.startswith(("hada", "lokr"))
    }
    found = lycoris.factors_of({**leaves, "alpha": torch.tensor(3.0)}, (12, 20), "here")
    close(found.product(), layer.get_delta_weight("default").detach())  # type: ignore[operator]


def test_half_a_layer_is_named() -> None:
    with pytest.raises(CheckpointError, match="LyCORIS cannot be read"):
        lycoris.factors_of(made({"hada_w1_a": (12, 2)}), (12, 30), "here")
