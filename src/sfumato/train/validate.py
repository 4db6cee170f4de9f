"""Validation: the same pictures, times and noise every time, so that two numbers of two moments can be compared."""

from collections.abc import Sequence

import torch

from sfumato.data.loader import Batch
from sfumato.train.step import Stepper

BINS = 10


class Validation:
    """Some batches that training never sees, and what the objective says of them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    @torch.no_grad()
    def __call__(self, stepper: Stepper) -> tuple[float, list[tuple[float, float]]]:
        """The loss, and the network's unweighted square error in ten bins of time: pairs (middle of the bin, mean);
        none where nothing is noised.
        """
        losses, sizes, times, errors = [], [], [], []
        for i, batch in enumerate(self.batches):
            loss = stepper.judged(batch, "validation", i)
            losses.append(float(loss.value))
            sizes.append(len(batch.indices))
            if loss.t is not None:
                times += loss.t.tolist()
                errors += loss.each.tolist()
        bins: list[list[float]] = [[] for _ in range(BINS)]
        for t, error in zip(times, errors, strict=True):
            bins[min(int(t * BINS), BINS - 1)].append(error)
        by_noise = [((i + 0.5) / BINS, sum(one) / len(one)) for i, one in enumerate(bins) if one]
        return sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / sum(sizes), by_noise
