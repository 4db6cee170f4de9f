"""What plain attention saves over the fused kernel when a network learns on a CPU, by precision and sequence length.

    python benchmarks/attention.py --json

`sfumato.nets.layers.attended` writes the attention of short sequences out as three operations where a CPU with
bfloat16 arithmetic learns in it, and calls the fused kernel elsewhere. Both are timed here on the same tensors, laid
out as `Attention` has them, forward with backward and forward alone, in turns (A, B, A, B, ...), so that whatever else
the machine does falls on both. Times are milliseconds of the process's CPU, medians over the turns; below a ratio of 1
plain is faster. On an AVX2 CPU without such arithmetic (torch 2.13, one thread) training's ratio was 0.9 to 1.3 in
float32 and 2.1 to 2.7 in bfloat16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.nets.layers import BF16_ARITHMETIC, attended_plainly

TOKENS = 2432  # in one call, whatever the length: a batch of 32 pictures of 76 tokens each
HEADS, CHANNELS = 3, 64
LENGTHS = (16, 76, 128, 256, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


WAYS: dict[str, Attention] = {"plain": attended_plainly, "fused": F.scaled_dot_product_attention}


def spent(attention: Attention, parts: list[Tensor], gradient: Tensor | None) -> float:
    """CPU milliseconds of one call, forward and, given the answer's gradient, backward."""
    start = time.process_time()
    with torch.set_grad_enabled(gradient is not None):
        y = attention(parts[0], parts[1], parts[2])
    if gradient is not None:
        torch.autograd.grad(y, parts, gradient)
    return 1e3 * (time.process_time() - start)


def compared(length: int, dtype: torch.dtype, learning: bool, turns: int) -> dict[str, float]:
    """Median milliseconds of both ways, and the median of their ratio within a turn: plain over fused."""
    rng = torch.Generator().manual_seed(length)
    shape = (max(1, TOKENS // length), length, HEADS, CHANNELS)
    made = [torch.randn(shape, generator=rng).to(dtype).transpose(1, 2) for _ in range(4)]
    parts, gradient = [part.requires_grad_(learning) for part in made[:3]], made[3] if learning else None
    for way in WAYS.values():
        spent(way, parts, gradient)
    rows = [{name: spent(way, parts, gradient) for name, way in WAYS.items()} for _ in range(turns)]
    medians = {name: statistics.median(row[name] for row in rows) for name in WAYS}
    return {**medians, "ratio": statistics.median(row["plain"] / row["fused"] for row in rows)}


def measured(turns: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each case's name and its numbers."""
    for kind, learning in (("training", True), ("sampling", False)):
        for name, dtype in DTYPES.items():
            for length in LENGTHS:
                yield f"{kind} {name} {length}", compared(length, dtype, learning, turns)


def main() -> None:
    options = argparse.ArgumentParser(description="Plain attention against the fused kernel, on a CPU.")
    options.add_argument("--turns", type=int, default=15, help="times that each way is measured")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    cpu = {"instructions": torch.backends.cpu.get_cpu_capability(), "bf16_arithmetic": BF16_ARITHMETIC}
    rows: dict[str, dict[str, float]] = {}
    for name, row in measured(chosen.turns):
        rows[name] = row
        if not chosen.json:
            print(f"{name:<18} " + "  ".join(f"{part} {value:6.2f}" for part, value in row.items()), flush=True)
    if chosen.json:
        setting = {"tokens": TOKENS, "heads": HEADS, "channels": CHANNELS, "threads": chosen.threads}
        print(json.dumps({"benchmark": "attention", **setting, **cpu, "milliseconds": rows}))


if __name__ == "__main__":
    main()
