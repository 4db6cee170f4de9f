"""What training took: how long, and on which machine. It lies beside a run's metrics, which are the same to the last
bit whenever and wherever the run is made, and has a line for each time that the run was begun or gone on with.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from sfumato import files

FILE = "timing.json"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What numbers of speed hang on. device: what was computed on; any GPU that there is unless said."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "cpu": f"{said.get('model name', platform.processor())} family {said.get('cpu family', '?')}",
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in said.get("flags", "").split(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch": torch.__version__,
    }


class Timing:
    """The time of a run from now on; what it took before is in its folder.

    step: the one that it goes on from. Everything counts: pairs that are made first, validation, pictures, saving.
    """

    def __init__(self, run: Path, step: int, device: torch.device, precision: str) -> None:
        self._file, self._before = run / FILE, timing(run) if step else []
        self._line = {"from": step, "machine": machine(device), "threads": torch.get_num_threads()}
        self._line["precision"] = precision
        self._started = time.perf_counter()

    def write(self, step: int) -> None:
        """Keeps what has been taken up to this step."""
        now = {**self._line, "to": step, "seconds": round(time.perf_counter() - self._started, 1)}
        files.write_atomic(self._file, json.dumps([*self._before, now], indent=1) + "\n")


def timing(run: str | Path) -> list[dict[str, Any]]:
    """What a run took, a line each time that it was begun or gone on with: from and to which step, seconds, machine,
    threads and precision. Steps that were lost and done again count twice. Empty where nothing is known.
    """
    file = Path(run) / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []
