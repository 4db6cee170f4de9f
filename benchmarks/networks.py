"""Networks against diffusers' own, with the same weights: time forward and back, peak memory, and loading.

    python benchmarks/networks.py --json
    python benchmarks/networks.py --only ddpm

Each pair has the same weights, written by us in diffusers' layout, and is timed in turns, so that both see the same
machine; a ratio below 1 is ours being faster. Memory is the most that a process of its own ever held beyond what it had
before. Loading is of a model directory of two gigabytes, against the size of its file. With --only, what is not
measured stays in the results as it was; every network's row says how many threads it had.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn

from sfumato.files import write_atomic
from sfumato.io.directory import save_model
from sfumato.io.families import dit as dit_family
from sfumato.io.families import pixel_unet, stable
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.model import build_model
from sfumato.nets.dit import DiT, preset
from sfumato.nets.pixel_unet import PixelUNet
from sfumato.nets.pixel_unet import preset as pixel_preset
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Pass = Callable[[], Tensor]


def dit_s2() -> tuple[Pass, Pass, nn.Module, nn.Module]:
    """DiT-S/2 at 256 pixels: 32x32 latents, 256 tokens, a batch of 2."""
    import diffusers

    config = preset("S/2", size=32, in_channels=4, classes=1000)
    ours = _stirred(DiT(config))
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=12, sample_size=32, norm_eps=1e-6
    )
    state = renamed(ours.state_dict(), dit_family.lines(config), OURS, DIFFUSERS, "here")
    _filled(theirs, state)
    for module in theirs.modules():  # it divides frequencies by 127 where the published weights were trained with 128
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
        if hasattr(module, "token_drop"):  # in training it hides labels by itself
            module.dropout_prob = 0
    x, t, label = torch.randn(2, 4, 32, 32), torch.tensor([900.0, 10.0]), torch.tensor([3, 999])
    return (
        lambda: ours(x.to(_kind(ours)), t, label=label),
        lambda: theirs(x.to(_kind(theirs)), timestep=t.long(), class_labels=label).sample,
        ours,
        theirs,
    )


def unet() -> tuple[Pass, Pass, nn.Module, nn.Module]:
    """A Stable Diffusion U-Net of a quarter of the published width: 32x32 latents, 77 words, a batch of 2."""
    import diffusers

    config = StableUNetConfig(size=32, channels=(96, 192, 384, 384), heads=(4, 4, 4, 4), context_dim=256)
    ours = _stirred(StableUNet(config))
    theirs = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=config.channels, attention_head_dim=4, cross_attention_dim=256
    )
    _filled(theirs, renamed(ours.state_dict(), stable.lines(config), OURS, DIFFUSERS, "here"))
    x, t, context = torch.randn(2, 4, 32, 32), torch.tensor([900.0, 10.0]), torch.randn(2, 77, 256)
    return (
        lambda: ours(x.to(_kind(ours)), t, context=context.to(_kind(ours))),
        lambda: theirs(x.to(_kind(theirs)), t, context.to(_kind(theirs))).sample,
        ours,
        theirs,
    )


def ddpm() -> tuple[Pass, Pass, nn.Module, nn.Module]:
    """The U-Net of google/ddpm-cifar10-32 as published: 32x32 pixels, a batch of 2."""
    import diffusers

    config = pixel_preset("ddpm-32")
    ours = _stirred(PixelUNet(config))
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=config.eps,
    )
    _filled(theirs, renamed(ours.state_dict(), pixel_unet.lines(config), OURS, DIFFUSERS, "here"))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([900.0, 10.0])
    return (
        lambda: ours(x.to(_kind(ours)), t),
        lambda: theirs(x.to(_kind(theirs)), t).sample,
        ours,
        theirs,
    )


PAIRS = {"dit-s/2": dit_s2, "unet": unet, "ddpm": ddpm}
LOADING = "loading"
PROCESSES = 5  # whose peaks are measured, one after the other


def _kind(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def _stirred(net: nn.Module) -> nn.Module:
    """Every parameter random: what starts at zero would cost nothing, and hide swapped weights."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.03)
    return net


def _filled(theirs: nn.Module, state: dict[str, Tensor]) -> None:
    """Our weights in their module; DiT's embeddings once more for every block, as there."""
    own = theirs.state_dict()
    for key in own:
        if key not in state:
            first = key.replace(f"transformer_blocks.{key.split('.')[1]}.", "transformer_blocks.0.")
            state[key] = state.get(first, own[key])
    theirs.load_state_dict(state)


def compared(name: str, kind: str, rounds: int) -> dict[str, float]:
    """Ratios of the middle times, ours to theirs, of a forward pass and of one with its backward pass."""
    first, second, ours, theirs = PAIRS[name]()
    for net in (ours, theirs):
        net.to(DTYPES[kind]).train()
    with torch.no_grad():
        apart = float((first().float() - second().float()).abs().max() / second().float().abs().max())
    spent: dict[str, tuple[list[float], list[float]]] = {"forward": ([], []), "training": ([], [])}
    for _ in range(rounds):
        for i, run in enumerate((first, second)):
            with torch.no_grad():
                spent["forward"][i].append(_timed(run))
            spent["training"][i].append(_timed(lambda run=run: run().float().square().mean().backward()))  # type: ignore[misc]
    middle = {key: [sorted(part)[len(part) // 2] for part in pair] for key, pair in spent.items()}
    return {"difference": apart} | {key: round(pair[0] / pair[1], 3) for key, pair in middle.items()}


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak(name: str, kind: str, which: int) -> float:
    """Megabytes that a training pass needs, beyond a process that has the network."""
    first, second, ours, theirs = PAIRS[name]()
    net, run = ((ours, first), (theirs, second))[which]
    net.to(DTYPES[kind]).train()
    before = _forgotten()
    run().float().square().mean().backward()
    return (_status("VmHWM") - before) / 1e3


def _forgotten() -> float:
    """Kilobytes held now; what was held before is no longer the most that ever was."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what the allocator kept of float32 weights is not in use
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(key: str) -> float:
    """Kilobytes, of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def loading(place: Path) -> dict[str, float]:
    """How much memory loading two gigabytes takes, in sizes of the file."""
    net = {"kind": "dit", "patch": 2, "dim": 1152, "depth": 21, "heads": 16, "classes": 1000}
    section = {"path": "linear", "prediction": "velocity", "time_input": "thousandths", "scale_input": None}
    spec = {"model": {**section, "net": net, "codec": "pixels", "conditioner": None}, "size": [32, 32], "sampling": {}}
    model = build_model(spec)
    save_model(place / "large", model, {})
    size = (place / "large/model.safetensors").stat().st_size
    del model
    grown = _apart("load", str(place / "large"))
    return {"gigabytes": round(size / 1e9, 3), "memory": round(grown * 1e6 / size, 3)}


def load_peak(folder: str) -> float:
    """Megabytes that loading takes at most."""
    from sfumato.io.directory import load_model

    before = _forgotten()
    load_model(Path(folder))
    return (_status("VmHWM") - before) / 1e3


def _middle_peak(name: str, kind: str, which: int) -> float:
    """The middle of several processes' peaks, which differ by what the allocator happens to keep."""
    return sorted(_apart("peak", name, kind, str(which)) for _ in range(PROCESSES))[PROCESSES // 2]


def _apart(*words: str) -> float:
    """A measurement in a process of its own."""
    said = subprocess.run([sys.executable, __file__, "--inside", *words], check=True, capture_output=True, text=True)
    return float(said.stdout.split()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description="Networks against diffusers' own.")
    options.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--only", choices=[*PAIRS, LOADING], nargs="+", default=[*PAIRS, LOADING])
    options.add_argument("--results", type=Path, default=HERE / "results" / "networks.json")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    if chosen.inside:
        what, *rest = chosen.inside
        print(load_peak(*rest) if what == "load" else peak(rest[0], rest[1], int(rest[2])))
        return
    rows: dict[str, Any] = {"machine": machine(), "networks": {}}
    if set(chosen.only) != {*PAIRS, LOADING} and chosen.results.is_file():
        rows = {**json.loads(chosen.results.read_text(encoding="utf-8")), "machine": machine()}
    for name in (one for one in PAIRS if one in chosen.only):
        for kind in DTYPES:
            row: dict[str, Any] = {"threads": torch.get_num_threads(), **compared(name, kind, chosen.rounds)}
            row["memory"] = round(_middle_peak(name, kind, 0) / _middle_peak(name, kind, 1), 3)
            rows["networks"][f"{name} {kind}"] = row
            print(f"{name} {kind}: {row}", file=sys.stderr)
    if LOADING in chosen.only:
        with tempfile.TemporaryDirectory() as place:
            rows["loading"] = loading(Path(place))
    write_atomic(chosen.results, json.dumps(rows, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
