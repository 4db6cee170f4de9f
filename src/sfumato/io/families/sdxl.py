"""SDXL as diffusers keeps it: a U-Net told by two CLIPs, a pooled state, and the picture's sizes (Podell et al.)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError
from sfumato.io import parts as shared
from sfumato.io.families import stable_files
from sfumato.io.families.encoders import SDXL as PLACES
from sfumato.io.families.encoders import SDXL_REFINER
from sfumato.io.families.stable_diffusion import read_unet, write_unet
from sfumato.io.family import Published
from sfumato.io.pretrained import read_json
from sfumato.model import Model
from sfumato.nets.stable_unet import StableUNet
from sfumato.paths import Tabulated
from sfumato.text import Texts

ENCODERS = ("text_encoder", "text_encoder_2")


class SDXL:
    """The family. See `sfumato.io.family.Family`. The refiner, which has other conditions, is refused."""

    pipelines = ("StableDiffusionXLPipeline",)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        if any(not any(index.get(part) or [None]) for part in ENCODERS):
            seen = "one text encoder"
            raise CheckpointError("this is not SDXL's base model (the refiner, say)", where=str(folder), seen=seen)
        path, prediction, sampling = shared.read_table(folder)
        net_slot, net = read_unet(folder / "unet")
        codec, autoencoder, factor = shared.read_vae(folder / "vae")
        text, files = shared.read_text(folder, ENCODERS)
        section = {
            "path": path,
            "prediction": prediction,
            "time_input": "index",
            "scale_input": None,
            "net": net_slot,
            "codec": codec,
            "conditioner": conditioner(
                [shared.tokenizer_length(folder, one) for one in ("tokenizer", "tokenizer_2")],
                zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
            ),
        }
        size = [int(side) * factor for side in shared.pair(net_slot["size"])]
        sampling = {"steps": 50, "guidance": 5.0, **sampling}
        return Published(section, size, sampling, net | autoencoder | text, files, shared.facts_of(folder, index))

    def owns(self, model: Model) -> bool:
        text = model.conditioner
        return (
            isinstance(model.net, StableUNet)
            and isinstance(model.codec, Latents)
            and isinstance(text, Texts)
            and text.join == "channels"
            and len(text.texts) == 2
            and isinstance(model.denoiser.path, Tabulated)
        )

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, codec, text, path = model.net, model.codec, model.conditioner, model.denoiser.path
        assert isinstance(net, StableUNet) and isinstance(codec, Latents)
        assert isinstance(text, Texts) and isinstance(path, Tabulated)
        index = {**INDEX, "force_zeros_for_empty_prompt": text.zeros}
        shared.write_index(place, self.pipelines[0], index, model)
        shared.write_table(place, path, model.spec["model"]["prediction"])
        write_unet(place / "unet", net, dtype)
        shared.write_vae(place, codec, dtype)
        shared.write_text(place, text, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return stable_files.ENTRY in keys and stable_files.TOLD_XL in keys

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        if SDXL_REFINER[0].within(state) and not PLACES[0].within(state):
            raise CheckpointError("this is not SDXL's base model", where=str(file), seen="the refiner's text encoder")
        names = ("tokenizer", "tokenizer_2")
        lengths = [77, 77] if parts is None else [shared.tokenizer_length(parts, one) for one in names]
        index = parts / shared.INDEX if parts is not None else None
        told = read_json(index) if index is not None and index.is_file() else {}
        slot = conditioner(lengths, zeros=bool(told.get("force_zeros_for_empty_prompt", True)))
        return stable_files.read(state, file, parts, slot, {"steps": 50, "guidance": 5.0})

    def write_file(self, model: Model) -> dict[str, Tensor]:
        return stable_files.write(model, "xl")


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


def conditioner(lengths: list[int], zeros: bool) -> dict[str, Any]:
    """The slot: the states of the layer before the last of both, without its norm, and the second's pooled state."""
    first = {"kind": "text", "skip": 1, "normed": False, "length": lengths[0]}
    second = {**first, "part": "text_encoder_2", "pooled": True, "length": lengths[1], "apart": "prompt_2"}
    return {"kind": "texts", "join": "channels", "zeros": zeros, "sizes": True, "parts": [first, second]}
