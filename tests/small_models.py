"""A small model of pictures whose every weight does something, and what tests of its pipeline share."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.model import Model, build_model
from sfumato.pipeline import Pipeline

BOTH = {
    "kind": "joined",
    "parts": [{"kind": "labels"}, {"kind": "prompts", "dim": 8, "depth": 1, "heads": 2, "length": 4}],
}
PROMPTS = ("a red circle", {"label": "dog"}, None, {"label": 0, "caption": "two blue squares"})


class Data:
    """Words, and classes that have names."""

    classes = ("cat", "dog")

    def captions(self) -> Iterator[str]:
        yield "a red circle"
        yield "two blue squares"


def made(**model: Any) -> Model:
    """A model of pictures of 8 by 12 whose every weight does something."""
    section = {
        "path": {"kind": "linear"},
        "prediction": {"kind": "velocity"},
        "time_input": {"kind": "thousandths"},
        "scale_input": None,
        "net": {"kind": "dit", "patch": 4, "dim": 16, "depth": 2, "heads": 2},
        "codec": {"kind": "pixels"},
        "conditioner": BOTH,
    }
    sampling = {"sampler": {"kind": "ddim"}, "grid": {"kind": "linear"}, "steps": 4, "guidance": 2.0}
    spec = {"model": section | model, "size": [8, 12], "sampling": {**sampling, "interval": None, "rescale": 0.0}}
    torch.manual_seed(0)
    model_ = build_model(spec, Data())
    with torch.no_grad():
        for p in model_.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model_


def drawn(pipe: Pipeline, prompts: Any, **options: Any) -> Tensor:
    """The encoded pictures, before they are rounded."""
    return list(pipe.steps(prompts, **options))[-1].x


def rows(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of the network has, from now on."""
    seen, forward = list[int](), pipe.model.forward

    def counted(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen.append(len(x))
        return forward(x, t, cond)

    monkeypatch.setattr(pipe.model, "forward", counted)
    return seen
