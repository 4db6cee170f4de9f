"""Frames a second of a stream against image-to-image of one frame after another, with a model of few steps.

    python benchmarks/stream.py runs/lcm --steps 4 --strength 0.75 --frames 64 --out benchmarks/results/stream.json

The same frames, prompt, seed and settings; the two are timed in turns, so that what else the machine does falls on
both. The pictures are compared, too: they are the same but for rounding. What counts is the ratio of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine

from sfumato import Stream, load
from sfumato.data.scenes import Scenes
from sfumato.files import write_atomic
from sfumato.model import pick_device


def measured(args: argparse.Namespace) -> dict[str, object]:
    pipeline = load(args.model, args.device, precision=args.precision)
    height, width = pipeline.model.size
    scenes = Scenes(size=(height, width), seed=9)
    frames = list(scenes.batch(list(range(args.frames)))[0])
    how = {"steps": args.steps, "strength": args.strength, "guidance": args.guidance}
    stream = Stream(pipeline, args.prompt, seed=args.seed, at_once=args.at_once, **how)
    apart, together = [], []
    far = 0
    for turn in range(args.turns + 1):  # the first warms up
        begun = time.perf_counter()
        alone = [pipeline.sample(args.prompt, image=one, seeds=args.seed, **how).images[0] for one in frames]
        middle = time.perf_counter()
        streamed = list(stream(iter(frames)))
        ended = time.perf_counter()
        far = max(far, int(np.abs(np.stack(alone).astype(int) - np.stack(streamed)).max()))
        if turn:
            apart.append(args.frames / (middle - begun))
            together.append(args.frames / (ended - middle))
    one, many = statistics.median(apart), statistics.median(together)
    said = {"one_by_one": round(one, 2), "stream": round(many, 2), "ratio": round(many / one, 2), "differ_by": far}
    used = {name: getattr(args, name) for name in ("frames", "turns", "at_once", "precision")}
    return {"model": args.model.name, **said, **how, **used}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--strength", type=float, default=0.75)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="where to write the numbers, as JSON")
    args = parser.parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    here = {"machine": machine(pick_device(args.device)), "threads": torch.get_num_threads()}
    text = json.dumps({"benchmark": "stream", **measured(args), **here}, indent=1) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
