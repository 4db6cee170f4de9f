"""The tensors of a safetensors file, each read into memory of its own.

The library maps the file instead: its tensors are views of the file, which are not aligned as torch aligns memory (so
the last bits of products differ), keep every page that was touched until the last of them is gone, and fail when the
file is cut. Here a file's tensors take its size once, and it may go. The library still checks the header.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file. OSError and SafetensorError as of the library; ValueError for a kind torch lacks."""
    with safe_open(path, framework="pt"):  # type: ignore[no-untyped-call]
        pass  # it has checked that header and data fit
    out = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if said["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of kind {said['dtype']}")
            begin, end = said["data_offsets"]
            raw = torch.empty(end - begin, dtype=torch.uint8)
            file.seek(8 + length + begin)
            if file.readinto(raw.numpy().data) != end - begin:
                raise OSError(f"{name} ends before it should")
            out[name] = raw.view(DTYPES[said["dtype"]]).view(said["shape"])
    return out
