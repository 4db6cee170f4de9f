"""On an accelerator: published networks at their full sizes against diffusers' own, and a step of training DiT-XL/2.

    python benchmarks/device.py --json
    python benchmarks/device.py --only flux sdxl --compile

Each pair has one architecture, random weights in bfloat16 and the same inputs, and is timed in turns by the device's
own clock; the numbers are milliseconds of one forward pass, the middle one of several. Training is the whole step that
`sfumato train` makes (loss, backward pass, clipping, optimizer, average) on a batch that lies ready.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor, nn

from sfumato.catalogue import build
from sfumato.data.loader import Batch
from sfumato.files import write_atomic
from sfumato.model import build_model, compile_net, pick_device
from sfumato.nets import dit, flux, mmdit, stable_unet
from sfumato.overlay import load_config, resolved
from sfumato.train.ema import EMA
from sfumato.train.optim import build_optimizer
from sfumato.train.step import Stepper

HERE = Path(__file__).parent
KIND = torch.bfloat16
LATENT = 4  # channels of the latents that training is timed on
Pass = Callable[[], Any]
Pair = tuple[nn.Module, Pass, nn.Module, Pass]


def filled(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A network of random weights, made on the device at once."""
    with torch.device("meta"):
        net = make()
    net = net.to_empty(device=device).to(KIND).eval()
    rng = torch.Generator(device).manual_seed(0)
    for one in (*net.parameters(), *net.buffers()):
        if one.is_floating_point():
            one.data.normal_(0, 0.02, generator=rng)
    return net


def flux_dev(device: torch.device) -> Pair:
    """FLUX.1 dev: 1024 pixels, 512 tokens of text, one picture."""
    import diffusers

    ours = filled(lambda: flux.Flux(flux.preset("dev")), device)
    theirs = filled(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), device)
    x, context, pooled = (draw(device, *shape) for shape in ((1, 16, 128, 128), (1, 512, 4096), (1, 768)))
    t, scale = torch.full((1,), 0.5, device=device), torch.full((1,), 3.5, device=device)
    tokens, places = draw(device, 1, 4096, 64), torch.zeros(4096, 3, device=device)
    places[:, 1], places[:, 2] = torch.arange(4096, device=device) // 64, torch.arange(4096, device=device) % 64
    words = torch.zeros(512, 3, device=device)
    said = {"encoder_hidden_states": context, "pooled_projections": pooled, "img_ids": places, "txt_ids": words}
    return (
        ours,
        lambda: ours(x, 1000 * t, context=context, pooled=pooled, guidance=scale),
        theirs,
        lambda: theirs(tokens, timestep=t, guidance=scale, **said).sample,
    )


def sd3(device: torch.device) -> Pair:
    """Stable Diffusion 3 medium: 1024 pixels, 154 tokens of text, one picture with guidance."""
    import diffusers

    ours = filled(lambda: mmdit.MMDiT(mmdit.preset("sd3-medium")), device)
    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    theirs = filled(lambda: diffusers.SD3Transformer2DModel(**sizes), device)
    x, context, pooled = (draw(device, *shape) for shape in ((2, 16, 128, 128), (2, 154, 4096), (2, 2048)))
    t = torch.full((2,), 500.0, device=device)
    return (
        ours,
        lambda: ours(x, t, context=context, pooled=pooled),
        theirs,
        lambda: theirs(x, context, pooled, t).sample,
    )


def sdxl(device: torch.device) -> Pair:
    """Stable Diffusion XL: 1024 pixels, 77 tokens of text, one picture with guidance."""
    import diffusers

    ours = filled(lambda: stable_unet.StableUNet(stable_unet.preset("sdxl")), device)
    down, up = ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]
    sizes = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": down,
        "up_block_types": up,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    theirs = filled(lambda: diffusers.UNet2DConditionModel(**sizes), device)
    x, context, pooled = (draw(device, *shape) for shape in ((2, 4, 128, 128), (2, 77, 2048), (2, 2816)))
    t = torch.full((2,), 500.0, device=device)
    added = {"text_embeds": pooled[:, :1280].contiguous(), "time_ids": torch.full((2, 6), 1024.0, device=device)}
    return (
        ours,
        lambda: ours(x, t, context=context, pooled=pooled),
        theirs,
        lambda: theirs(x, t, context, added_cond_kwargs=added).sample,
    )


def dit_xl(device: torch.device) -> Pair:
    """DiT-XL/2: 256 pixels, eight pictures with guidance."""
    import diffusers

    ours = filled(lambda: dit.DiT(dit.preset("XL/2", size=32, in_channels=4, classes=1000)), device)
    theirs = filled(lambda: diffusers.DiTTransformer2DModel(sample_size=32, norm_eps=1e-6), device)
    x, t = draw(device, 16, 4, 32, 32), torch.full((16,), 500.0, device=device)
    label = torch.arange(16, device=device)
    return (
        ours,
        lambda: ours(x, t, label=label),
        theirs,
        lambda: theirs(x, timestep=t.long(), class_labels=label).sample,
    )


PAIRS = {"flux": flux_dev, "sd3": sd3, "sdxl": sdxl, "dit": dit_xl}


def draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(KIND)


def timed(run: Pass, rounds: int) -> list[float]:
    """Milliseconds of each call, by the device's clock."""
    spent = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return spent


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def compared(name: str, device: torch.device, rounds: int, compiled: bool) -> dict[str, float]:
    """Middle times of both, and their ratio: below 1 is ours being faster."""
    ours, first, _, second = PAIRS[name](device)
    with torch.no_grad():
        for run in (first, second):
            timed(run, 3)
        spent = [timed(first, rounds), timed(second, rounds), timed(first, rounds), timed(second, rounds)]
        own, other = middle(spent[0] + spent[2]), middle(spent[1] + spent[3])
        row = {"ms": round(own, 3), "diffusers_ms": round(other, 3), "ratio": round(own / other, 3)}
        if compiled:
            compile_net(ours, device)
            timed(first, 3)
            row["compiled_ms"] = round(middle(timed(first, rounds)), 3)
    return row


def emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def training(device: torch.device, batch: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Pictures a second of DiT-XL/2 at 256 pixels, from latents that lie ready; 3 x 237 GFLOP a picture."""
    over = [f"batch={batch}", "accumulate=1", "checkpointing=false", "precision=bf16"]
    config = load_config("dit-xl-2-256", over).config
    section = {**resolved(config)["model"], "codec": "pixels", "conditioner": None}  # what lies ready is all it sees
    section["net"] = {**section["net"], "in_channels": LATENT, "out_channels": 2 * LATENT}
    model = build_model({"model": section, "size": [32, 32], "sampling": {}}, None).to(device).train()
    optimizer = build_optimizer(model, config)
    stepper = Stepper(model, build(config.objective, "Objective"), optimizer, config, device)
    average = EMA(model.trained(), config.ema[0])
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((batch, 2, LATENT, 32, 32), dtype=np.float32)
    ready = Batch(None, [{} for _ in range(batch)], np.arange(batch), batch, moments)
    if compiled:
        compile_net(model.net, device, dynamic=False)

    def step() -> None:
        stepper.gradients([ready], 0)
        stepper.update(1e-4)
        average.update(list(model.trained().values()), 0)

    timed(step, 3)
    ms = middle(timed(step, rounds))
    rate = batch / ms * 1e3
    row = {"batch": batch, "ms": round(ms, 2), "images_per_s": round(rate, 1), "tflops": round(rate * 3 * 0.237, 1)}
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return row


def main() -> None:
    options = argparse.ArgumentParser(description="Full-size networks on an accelerator.")
    options.add_argument("--only", nargs="*", default=[*PAIRS, "training"])
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--batch", type=int, default=64, help="of training")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--results", type=Path, default=HERE / "results" / "device.json")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    device = pick_device("cuda")
    kept = json.loads(chosen.results.read_text(encoding="utf-8")) if chosen.results.is_file() else {}
    kept |= {"benchmark": "device", "machine": machine()}
    for name in chosen.only:
        if name == "training":
            row = training(device, chosen.batch, chosen.rounds, chosen.compile)
        else:
            row = compared(name, device, chosen.rounds, chosen.compile)
        emptied()
        kept.setdefault("networks", {})[name + (" compiled" if chosen.compile else "")] = row
        print(name, row, flush=True)
        write_atomic(chosen.results, json.dumps(kept, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(kept))


if __name__ == "__main__":
    main()
