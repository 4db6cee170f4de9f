"""SDXL and its refiner as diffusers keeps them: U-Nets told prompts, a pooled state, and numbers (Podell et al. 2024).

The base model reads two CLIPs and is told six sizes. The refiner was trained on little noise alone, reads the second
CLIP only, and is told an aesthetic score in place of the last size; it goes on where the base model stops.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import stable_files
from sfumato.io.families.stable_diffusion import read_unet, write_unet
from sfumato.io.family import Published
from sfumato.io.pretrained import read_json
from sfumato.model import Model
from sfumato.nets.stable_unet import StableUNet
from sfumato.paths import Tabulated
from sfumato.text import Texts

ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
SCORED = "requires_aesthetics_score"
SAMPLING: dict[str, Any] = {"steps": 50, "guidance": 5.0}


class SDXL:
    """The base model's family. See `sfumato.io.family.Family`."""

    pipelines: tuple[str, ...] = ("StableDiffusionXLPipeline",)
    kind = "xl"  # of its single files
    encoders: tuple[str, ...] = ENCODERS
    sampling: Mapping[str, Any] = SAMPLING

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        found = [part for part in ENCODERS if any(index.get(part) or [None])]
        if ENCODERS[-1] not in found:
            raise CheckpointError("this pipeline lacks its text encoder", where=str(folder), seen=ENCODERS[-1])
        path, prediction, sampling = shared.read_table(folder)
        net_slot, net = read_unet(folder / "unet")
        codec, autoencoder, factor = shared.read_vae(folder / "vae")
        text, files = text_parts.read_text(folder, found, joined=True)
        section = {
            "path": path,
            "prediction": prediction,
            "time_input": "index",
            "scale_input": None,
            "net": net_slot,
            "codec": codec,
            "conditioner": conditioner(found, folder, index),
        }
        size = [int(side) * factor for side in shared.pair(net_slot["size"])]
        state = net | autoencoder | text
        return Published(section, size, {**self.sampling, **sampling}, state, files, shared.facts_of(folder, index))

    def owns(self, model: Model) -> bool:
        text = model.conditioner
        return (
            isinstance(model.net, StableUNet)
            and isinstance(model.codec, Latents)
            and isinstance(text, Texts)
            and text.join == "channels"
            and self._reads(text)
            and isinstance(model.denoiser.path, Tabulated)
        )

    def _reads(self, text: Texts) -> bool:
        return len(text.texts) == 2 and not text.score

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, codec, text, path = model.net, model.codec, model.conditioner, model.denoiser.path
        assert isinstance(net, StableUNet) and isinstance(codec, Latents)
        assert isinstance(text, Texts) and isinstance(path, Tabulated)
        shared.write_index(place, self.pipelines[0], INDEX | self._index(text), model)
        shared.write_table(place, path, model.spec["model"]["prediction"])
        write_unet(place / "unet", net, dtype)
        shared.write_vae(place, codec, dtype)
        text_parts.write_text(place, text, dtype)

    def _index(self, text: Texts) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": text.zeros}

    def knows(self, keys: Collection[str]) -> bool:
        told = stable_files.ENTRY in keys and stable_files.TOLD_XL in keys
        return told and (stable_files.FOURTH in keys) == (self.kind == "refiner")

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        index = parts / shared.INDEX if parts is not None else None
        told = read_json(index) if index is not None and index.is_file() else {}
        usual = {"force_zeros_for_empty_prompt": self.kind == "xl", SCORED: self.kind == "refiner"}
        slot = conditioner(self.encoders, parts, usual | told)
        return stable_files.read(state, file, parts, slot, dict(self.sampling))

    def write_file(self, model: Model) -> dict[str, Tensor]:
        return stable_files.write(model, self.kind)


class SDXLRefiner(SDXL):
    """The refiner's family, and whatever else is told an aesthetic score."""

    pipelines = ("StableDiffusionXLImg2ImgPipeline",)
    kind = "refiner"
    encoders = ENCODERS[1:]
    sampling: Mapping[str, Any] = {**SAMPLING, "strength": 0.3}  # it knows little noise alone

    def _reads(self, text: Texts) -> bool:
        return text.sizes and (text.score or len(text.texts) == 1)

    def _index(self, text: Texts) -> dict[str, Any]:
        there = {one.part for one in text.texts}
        gone = {name: [None, None] for part in set(ENCODERS) - there for name in (part, TOKENIZERS[part])}
        return super()._index(text) | gone | {SCORED: text.score}


INDEX: dict[str, Any] = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def conditioner(found: Sequence[str], folder: Path | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """The slot: the states of the layer before the last of all, without its norm, and the second's pooled state.

    found: the encoders. folder: with their tokenizers, if there is one. index: what model_index.json says.
    """
    parts: list[dict[str, Any]] = []
    for part in found:
        length = 77 if folder is None else text_parts.tokenizer_length(folder, TOKENIZERS[part])
        own = {"part": part, "pooled": True, "apart": "prompt_2"} if part == ENCODERS[1] else {}
        parts.append({"kind": "text", "skip": 1, "normed": False, "length": length, **own})
    zeros, score = bool(index.get("force_zeros_for_empty_prompt", True)), bool(index.get(SCORED))
    slot = {"kind": "texts", "join": "channels", "zeros": zeros, "sizes": True, "parts": parts}
    return slot | ({"score": True} if score else {})
