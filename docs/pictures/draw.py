"""Draws the pictures of the documentation that follow from the library alone: python docs/pictures/draw.py"""

from pathlib import Path as File

import torch

from sfumato.catalogue import build
from sfumato.data.scenes import Scenes
from sfumato.data.sheet import sheet
from sfumato.paths import log_snr
from sfumato.train.curves import Curve, plot

HERE = File(__file__).parent
SHOWN = {
    "linear": "linear",
    "cosine": "cosine",
    "variance_preserving": "variance preserving",
    "variance_exploding": "variance exploding",
}


def scenes() -> None:
    """Twelve scenes with their captions, two of each task."""
    data, kept = Scenes(size=32, seed=1), dict[str, list[int]]()
    for index in range(200):
        kept.setdefault(str(data[index].fields["task"]), []).append(index)
    shown = [data[index] for task in sorted(kept) for index in kept[task][:2]]
    captions = [str(one.fields["caption"]) for one in shown]
    sheet([one.image for one in shown], captions, columns=6).save(HERE / "scenes.png", optimize=True)


def paths() -> None:
    """log_snr over time."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    curves = [Curve(said, t.tolist(), log_snr(build(name, "Path"), t).tolist()) for name, said in SHOWN.items()]
    plot(HERE / "paths.png", "log_snr = log(alpha^2 / sigma^2)", curves, "time (0 data, 1 noise)")


if __name__ == "__main__":
    scenes()
    paths()
