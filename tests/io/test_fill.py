"""Weights read into memory of their own, and moved into models that have none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.errors import CheckpointError
from sfumato.io.directory import read_weights
from sfumato.io.fill import fill_weights, unfilled
from sfumato.io.tensors import DTYPES, tensors_of
from sfumato.model import build_model
from sfumato.pipeline import load

SPEC = {
    "model": {
        "path": "linear",
        "prediction": "velocity",
        "time_input": "thousandths",
        "scale_input": None,
        "net": {"kind": "dit", "patch": 4, "dim": 16, "depth": 1, "heads": 2, "classes": 3},
        "codec": "pixels",
        "conditioner": {"kind": "labels", "classes": 3},
    },
    "size": [8, 8],
    "sampling": {"steps": 3, "guidance": 1.0},
}


def test_every_kind_and_shape_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    kinds = [one for one in DTYPES.values() if one is not torch.complex64]
    state = {f"{i}": (torch.rand(3, 5, generator=rng) * 100).to(kind) for i, kind in enumerate(kinds)}
    state |= {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "odd": torch.randn(7, dtype=torch.float64)}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    ours, theirs = tensors_of(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    (tmp_path / "a.safetensors").unlink()  # the file may go
    for key, value in state.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape
        assert ours[key].data_ptr() % 64 == 0  # as torch's own
        assert torch.equal(ours[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for length in (3, 40, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_weights(tmp_path / "a.safetensors")


def test_modules_without_memory_take_the_tensors_themselves() -> None:
    source = build_model(SPEC)
    state = {name: torch.randn_like(value) for name, value in source.weights().items()}
    with unfilled():
        model = build_model(SPEC)
    assert all(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for p in build_model(SPEC).parameters())  # outside, all is as ever
    kept = {name: (value.data_ptr(), value.clone()) for name, value in state.items()}
    fill_weights(model, state, "here")
    assert state == {}
    for name, value in model.weights().items():
        assert (value.data_ptr(), True) == (kept[name][0], torch.equal(value, kept[name][1]))


def test_tied_weights_stay_tied() -> None:
    with unfilled():
        model = build_model(SPEC)
        first = nn.Linear(4, 4)
        second = nn.Linear(4, 4)
        second.weight = first.weight
        model.net.first, model.net.second = first, second  # type: ignore[assignment]
    state = {name: torch.randn(value.shape) for name, value in model.weights().items()}
    state["net.second.weight"] = state["net.first.weight"]
    fill_weights(model, state, "here")
    assert model.net.first.weight is model.net.second.weight  # type: ignore[union-attr]


def test_half_precision_keeps_half_of_the_matrices(tmp_path: Path) -> None:
    from sfumato.io.directory import save_model

    model = build_model(SPEC)
    save_model(tmp_path / "m", model, {})
    half, whole = load(tmp_path / "m", "cpu", precision="bf16"), load(tmp_path / "m", "cpu")
    for name, p in half.model.net.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32), name
    a, b = (p.sample([{"label": 1}], seeds=1).images.astype(float) for p in (half, whole))
    assert abs(a - b).max() < 12


def test_what_is_not_finite_is_named() -> None:
    model = build_model(SPEC)
    state = dict(model.weights())
    state["net.head.out.bias"] = torch.full_like(state["net.head.out.bias"], torch.inf)
    with pytest.raises(CheckpointError, match=r"(?s)not finite.*net\.head\.out\.bias"):
        fill_weights(model, state, "here")
