"""What latents save: the same U-Net on pictures of 64 pixels and on their latents, in the same run.

    python benchmarks/latent.py --json

The network, the text and the batch are those of the recipe `stable-diffusion-scenes`, the autoencoder is that of
`autoencoder-scenes`; the U-Net on pixels differs by its first and last layer alone. Weights are random: neither time
nor memory depends on them. Measured are, in turns (A, B, A, B, ...), so that whatever else the machine does falls on
both:

- a training step, forward and backward: on pixels; on latents that are encoded in the step; on latents from a cache;
- the drawing of a batch by some steps of a sampler, the decoding included;
- the bytes of activations that a training step keeps for its backward pass, counted by torch's hooks, which is the same
  on every device, and on a GPU the height of the allocated memory.

Times are milliseconds of wall clock, medians over the turns, with the ratio within a turn: above 1 latents are cheaper.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import machine
from torch import Tensor

from sfumato.catalogue import build
from sfumato.codecs import Latents
from sfumato.data.scenes import Scenes
from sfumato.guidance import Unguided, guided
from sfumato.model import Model, build_model
from sfumato.objectives import Objective
from sfumato.overlay import load_config, resolved
from sfumato.samplers import SeededNoise, sample

DRAWN = 4  # steps of the sampler


class Side:
    """A model on pixels or on latents, and its batch."""

    def __init__(self, codec: dict[str, Any], batch: int, device: torch.device) -> None:
        config = load_config("stable-diffusion-scenes").config
        section = resolved(config)["model"] | {"codec": codec}
        data = Scenes(size=64, seed=1)
        torch.manual_seed(0)
        spec = {"model": section, "size": [64, 64], "sampling": {}}
        spec["model"]["net"] = {**section["net"], "out_channels": 3 if codec["kind"] == "pixels" else 4}
        self.model: Model = build_model(spec, data).to(device).train()
        self.objective: Objective = build(config.objective, "Objective")
        images, fields = data.batch(range(batch))
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous().to(device)
        self.raw = self.model.known(fields)
        with torch.no_grad():
            self.kept: Tensor = self.model.codec.encode(self.images)

    def step(self, cached: bool) -> None:
        """A training step without its update."""
        with torch.no_grad():
            x0 = self.kept if cached else self.model.codec.encode(self.images)
        loss = self.objective(self.model.denoiser, x0, self.model.cond(self.raw), torch.Generator().manual_seed(0))
        loss.value.backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def draw(self) -> None:
        """A batch of pictures."""
        path, cond = self.model.denoiser.path, self.model.cond(self.raw)
        times = build("trailing", "Grid")(path, DRAWN)
        noise = SeededNoise.of(range(len(self.kept)))
        x = noise(torch.empty_like(self.kept)) * float(path.sigma(times[:1].cpu().double()))
        walk = sample(build("ddim", "Sampler")(path, x, times), guided(self.model, path, Unguided(cond), times), noise)
        for last in walk:
            pass
        self.model.codec.decode(last.x)

    def activations(self) -> int:
        """Bytes that a training step keeps."""
        seen: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            if not isinstance(value, torch.nn.Parameter):
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            x0, rng = self.kept, torch.Generator().manual_seed(0)
            loss = self.objective(self.model.denoiser, x0, self.model.cond(self.raw), rng)
        loss.value.backward()
        self.model.zero_grad(set_to_none=True)
        return sum(seen.values())


def spent(work: Callable[[], None], device: torch.device) -> float:
    """Milliseconds."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def height(work: Callable[[], None], device: torch.device) -> int | None:
    """The most memory that was allocated meanwhile, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def measured(batch: int, turns: int, device: torch.device) -> dict[str, Any]:
    """Every number."""
    shape = resolved(load_config("autoencoder-scenes").config)["model"]["codec"]
    pixels, latents = Side({"kind": "pixels"}, batch, device), Side({**shape, "scale": 1.0}, batch, device)
    assert isinstance(latents.model.codec, Latents)
    works: dict[str, Callable[[], None]] = {
        "train pixels": lambda: pixels.step(True),
        "train latents": lambda: latents.step(False),
        "train cached latents": lambda: latents.step(True),
        "draw pixels": pixels.draw,
        "draw latents": latents.draw,
    }
    for work in works.values():
        spent(work, device)
    rows = [{name: spent(work, device) for name, work in works.items()} for _ in range(turns)]
    times = {name: statistics.median(row[name] for row in rows) for name in works}
    ratios = {
        name: statistics.median(row[f"{name.split()[0]} pixels"] / row[name] for row in rows)
        for name in works
        if not name.endswith(" pixels")
    }
    kept = {"pixels": pixels.activations(), "latents": latents.activations()}
    peaks = {name: height(works[name], device) for name in ("train pixels", "train latents")}
    return {
        "milliseconds": times,
        "times as fast": ratios,
        "bytes of activations": kept,
        "times less memory": kept["pixels"] / kept["latents"],
        "peak bytes": peaks,
    }


def main() -> None:
    options = argparse.ArgumentParser(description="The same U-Net on pixels and on latents.")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--turns", type=int, default=7, help="times that each side is measured")
    options.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it as it is")
    options.add_argument("--device", default="cpu")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    found = measured(chosen.batch, chosen.turns, torch.device(chosen.device))
    setting = {"batch": chosen.batch, "turns": chosen.turns, "threads": torch.get_num_threads(), "drawn": DRAWN}
    if chosen.json:
        print(json.dumps({"benchmark": "latent", **setting, "machine": machine(), **found}))
        return
    for name, value in found["milliseconds"].items():
        ratio = found["times as fast"].get(name)
        print(f"{name:<22} {value:8.1f} ms" + (f"  {ratio:.2f} times as fast" if ratio else ""))
    print(f"activations: {found['times less memory']:.2f} times less")


if __name__ == "__main__":
    main()
