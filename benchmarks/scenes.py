"""How fast scenes are drawn and read on one core, and how exactly they are read back.

    python benchmarks/scenes.py --json

A picture counts as exact when the recogniser returns just its things: the same shapes, colours and sizes,
each centre within a pixel. It is asked about the picture as drawn, and with Gaussian noise of standard
deviation 6 (of 255).
"""

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sfumato.data.scenes import Scenes, Thing, recognise

SIDES = (32, 64, 128)
NOISE = 6.0


def exact(told: Sequence[Thing], read: Sequence[Thing]) -> bool:
    """Whether the same things were read, at the same places within a pixel."""
    left = list(read)
    for thing in told:
        for other in left:
            kinds = (thing.shape, thing.colour, thing.size) == (other.shape, other.colour, other.size)
            if kinds and max(abs(thing.cy - other.cy), abs(thing.cx - other.cx)) <= 1:
                left.remove(other)
                break
        else:
            return False
    return not left


def drawing_rate(side: int, pictures: int) -> float:
    """Pictures a second through `Scenes.batch`, captions included: the best of three."""
    data, best = Scenes(size=side), 0.0
    data.batch(range(64))
    for turn in range(3):
        start = time.perf_counter()
        data.batch(range(turn * pictures, (turn + 1) * pictures))
        best = max(best, pictures / (time.perf_counter() - start))
    return best


def reading(side: int, pictures: int) -> dict[str, float]:
    """The shares read exactly, clean and with noise, and with a true caption; and pictures read a second."""
    data, rng, spent = Scenes(size=side, seed=1, rich=0.1), np.random.default_rng(0), 0.0
    clean = noisy = true = 0
    recognise(data[0].image)
    for index in range(pictures):
        scene, caption = data.scene(index)
        image = scene.paint()
        start = time.perf_counter()
        read = recognise(image)
        spent += time.perf_counter() - start
        clean += exact(scene.things, read)
        true += caption.matches(read)
        noisy += exact(scene.things, recognise(_with_noise(image, rng)))
    return {
        "read_exactly": clean / pictures,
        "read_exactly_with_noise": noisy / pictures,
        "caption_holds": true / pictures,
        "read_per_second": pictures / spent,
    }


def _with_noise(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.clip(np.rint(image + rng.normal(0, NOISE, image.shape)), 0, 255).astype(np.uint8)


def main() -> None:
    options = argparse.ArgumentParser(description="Rates and exactness of the embedded scenes.")
    options.add_argument("--pictures", type=int, default=10_000, help="pictures read for each size")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    rows = {
        str(side): {"drawn_per_second": drawing_rate(side, 2000), **reading(side, chosen.pictures)} for side in SIDES
    }
    if chosen.json:
        print(json.dumps({"benchmark": "scenes", "pictures": chosen.pictures, "noise_std": NOISE, "sides": rows}))
        return
    for side, row in rows.items():
        print(f"{side:>4} px  " + "  ".join(f"{name} {value:,.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
