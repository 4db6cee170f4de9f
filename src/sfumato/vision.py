"""Pictures through a published image encoder: CLIP's, SigLIP's, DINOv2's, any of the `transformers` library's that
gives a sequence of vectors. It is frozen; a projection to the width of the network's context learns with the network,
as in IP-Adapter (Ye et al. 2023). Its config travels in the model directory, so a model needs no other folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sfumato.conditioners import Raw, Source
from sfumato.data.given import given
from sfumato.denoiser import Cond
from sfumato.errors import CheckpointError, ConfigError
from sfumato.hub import located
from sfumato.image_conditions import OfPictures, Size
from sfumato.text.library import library

CONFIG, PROCESSOR = "vision.config.json", "vision.preprocessor.json"  # of the files that travel
USUAL = {  # mean and standard deviation of the colours, where no preprocessor says them: by the model's kind
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Vision(OfPictures):
    """Pictures through a frozen image encoder. Cond: context (B, L, dim), a vector a patch, and where the encoder has
    one, that of the whole picture first.

    weights: a folder of `transformers`, or of diffusers with `image_encoder`, to train with. skip: layers before the
    last whose states are taken. dim: of a learned projection, with a norm; 0 gives the encoder's own states. The null
    condition is one learned vector in every place.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        field: str = "image",
        skip: int = 0,
        dim: int = 0,
        kept: bool = False,
    ) -> None:
        super().__init__(field, kept=kept)
        for name, value in (("skip", skip), ("dim", dim)):
            if value < 0:
                raise ConfigError("a number is not negative", where=f"model.conditioner.{name}", seen=str(value))
        self.weights, self.field, self.skip, self.dim = weights, field, skip, dim
        self.side, self.length = 224, 0
        self.encoder: Any = None
        self.project: nn.Module = nn.Identity()
        self.absent = nn.Parameter(torch.zeros(0))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self._files: dict[str, bytes] = {}

    def seen_at(self, size: Size) -> Size:
        return self.side, self.side

    def forward(self, raw: Sequence[Raw]) -> Cond:
        found = [None if image is None else given(image, (self.side,) * 2) for image in self.read(raw, self.field)]
        there = [image for image in found if image is not None]
        context = self.absent.expand(len(raw), self.length, -1)
        if not there:
            return {"context": context}
        pixels = (self.stacked(there, self.field) - self.mean) / self.std
        with torch.no_grad():
            said = self.encoder(pixel_values=pixels, output_hidden_states=self.skip > 0)
        states = self.project(said.hidden_states[-1 - self.skip] if self.skip else said.last_hidden_state)
        if len(there) == len(raw):
            return {"context": states}
        out = context.to(states.dtype).clone()
        out[[i for i, image in enumerate(found) if image is not None]] = states
        return {"context": out}

    def prepare(self, source: Source) -> None:
        """Reads the encoder that `weights` names."""
        if self.weights is None:
            fix = "model.conditioner.weights=FOLDER, one of transformers"
            what = "an image encoder comes from a checkpoint"
            raise ConfigError(what, where="model.conditioner.weights", seen="nothing", fix=fix)
        folder = located(self.weights, ("image_encoder", "feature_extractor"))
        folder = folder / "image_encoder" if (folder / "image_encoder").is_dir() else folder
        self.restore(files_of(folder))
        try:
            read = _seeing(library("AutoModel").from_pretrained(folder, dtype=torch.float32))
        except (OSError, ValueError) as error:
            seen = str(error).splitlines()[0]
            raise CheckpointError("an image encoder cannot be read", where=str(folder), seen=seen) from None
        self.encoder.load_state_dict(read.state_dict())

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def restore(self, files: Mapping[str, bytes]) -> None:
        try:
            told = json.loads(files[CONFIG])
            config = library("AutoConfig").for_model(told.pop("model_type", ""), **told)
            made = _seeing(library("AutoModel").from_config(config))
            side = made.config.image_size
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError("an image encoder that is not known here", where=CONFIG, seen=str(error)) from None
        self.encoder = made.requires_grad_(False).eval()
        self.side = int(side if isinstance(side, int) else side[0])
        width = int(made.config.hidden_size)
        self.context_dim = self.dim or width
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.side, self.side, device=self.here.device)
            weight = next(self.encoder.parameters())
            self.length = _length(made.config) if weight.is_meta else self.encoder(blank).last_hidden_state.shape[1]
        self.project = nn.Sequential(nn.Linear(width, self.dim), nn.LayerNorm(self.dim)) if self.dim else nn.Identity()
        self.absent = nn.Parameter(torch.randn(self.context_dim) / self.context_dim**0.5)
        for name, numbers in zip(("mean", "std"), _colours(files, str(made.config.model_type)), strict=True):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32)[:, None, None], persistent=False)
        self._files = {name: files[name] for name in (CONFIG, PROCESSOR) if name in files}

    def train(self, mode: bool = True) -> "Vision":
        """The encoder stays in evaluation mode: it is frozen."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self


def files_of(folder: Path) -> dict[str, bytes]:
    """What of an image encoder's folder travels: its config, and what its pictures are scaled by, if that is there."""
    try:
        kept = {CONFIG: (folder / "config.json").read_bytes()}
    except OSError as error:
        raise CheckpointError("an image encoder is missing", where=str(folder), seen=str(error)) from None
    for place in (folder, folder.parent / "feature_extractor"):
        if (path := place / "preprocessor_config.json").is_file():
            return kept | {PROCESSOR: path.read_bytes()}
    return kept


def _seeing(model: Any) -> Any:
    """The part of a model that sees."""
    return getattr(model, "vision_model", model)


def _length(config: Any) -> int:
    """How many vectors an encoder gives: its patches, and one of the whole in all but SigLIP's."""
    patches = (int(config.image_size) // int(config.patch_size)) ** 2
    return patches + (0 if "siglip" in str(config.model_type) else 1)


def _colours(files: Mapping[str, bytes], kind: str) -> tuple[Sequence[float], Sequence[float]]:
    said = json.loads(files[PROCESSOR]) if PROCESSOR in files else {}
    mean, std = next(pair for name, pair in USUAL.items() if kind.startswith(name))
    found = said.get("image_mean", mean), said.get("image_std", std)
    if any(len(numbers) != 3 for numbers in found) or not all(np.isfinite([*found[0], *found[1]])):
        raise CheckpointError("an image encoder's colours are not three", where=PROCESSOR, seen=str(found))
    return found
