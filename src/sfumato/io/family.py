"""Families of published models: what each has to know, and how the right one is found.

A family is a file of `io/families` and a line of `catalogue.FAMILIES`. It reads diffusers' folder and the original
single file into the terms of this library (a spec, and weights under our names), and writes them back. Nothing else in
the library knows that the model ever had another form.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato import registry
from sfumato.catalogue import FAMILIES
from sfumato.model import Model


@dataclass
class Published:
    """A foreign checkpoint in our terms.

    section: the model section of a spec, with no `weights` left in it. size: (height, width) it was made for.
    sampling: recommended settings. state: every weight, by the name under which a `Model` stores it. files: the
    conditioner's own. facts: what is known of where it is from.
    """

    section: dict[str, Any]
    size: list[int]
    sampling: dict[str, Any]
    state: dict[str, Tensor]
    files: dict[str, bytes] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """One family of published models, in all its layouts."""

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The classes of diffusers that its folders name, the one that is written first."""
        ...

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        """A folder of diffusers, whose model_index.json says `index`. CheckpointError for what is missing or odd."""
        ...

    def owns(self, model: Model) -> bool:
        """Whether a model of ours has a form in this family."""
        ...

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        """Writes diffusers' folder into an empty one. ConfigError for what the layout cannot say."""
        ...

    def knows(self, keys: Collection[str]) -> bool:
        """Whether a single file with these keys is an original of this family."""
        ...

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        """An original file. parts: a folder of diffusers with what such a file lacks: a tokenizer, an autoencoder."""
        ...

    def write_file(self, model: Model) -> dict[str, Tensor]:
        """The weights as the original file names them. ConfigError where there is no such file."""
        ...


def families() -> dict[str, Family]:
    """All of them, by name."""
    return {name: registry.resolve(target)() for name, target in FAMILIES.items()}
