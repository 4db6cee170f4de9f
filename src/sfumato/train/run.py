"""A run: its parts, its steps, what it shows of itself, and what it keeps.

Its state is weights, averages, optimizer and a few counters; all randomness is addressed by step
(`sfumato.train.keys`) and the data by position. So a run that was stopped continues bit for bit, and a step that was
skipped stays skipped.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.catalogue import build
from sfumato.conditioners import Raw
from sfumato.config import Config
from sfumato.data.loader import Batch, Loader
from sfumato.errors import CheckpointError, ConfigError, DataError, Interrupted, MachineError
from sfumato.io.directory import save_model
from sfumato.model import build_model, pick_device
from sfumato.overlay import resolved
from sfumato.train import checkpoint
from sfumato.train.checkpoint import State
from sfumato.train.ema import EMA
from sfumato.train.guard import Guard
from sfumato.train.keys import key
from sfumato.train.log import Log
from sfumato.train.optim import build_optimizer, learning_rate
from sfumato.train.preview import preview
from sfumato.train.step import Stepper
from sfumato.train.validate import Validation

ROLLBACKS = 5  # more of them, and somebody should look at the run


class Run:
    """A run of a configuration in a folder, from its beginning or from its newest whole checkpoint."""

    def __init__(self, config: Config, folder: Path, resume: bool) -> None:
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device, self.section = pick_device(config.device), resolved(config)
        self.dataset = build(config.data, "Data")
        torch.manual_seed(key(config.seed, "weights"))
        spec = {"model": self.section["model"], "size": list(self.dataset.shape), "sampling": self.section["sampling"]}
        self.model = build_model(spec, self.dataset).to(self.device).train()
        self.weights = self.model.trained()
        self.optimizer = build_optimizer(self.model, config)
        self.stepper = Stepper(self.model, build(config.objective, "Objective"), self.optimizer, config, self.device)
        self.averages = [EMA(self.weights, section) for section in config.ema]
        self.guard = Guard(config.guard)
        self.step = self.updates = self.images = 0
        told = self._restore() if resume else []
        self.loader = Loader(
            self.dataset,
            config.batch,
            config.seed,
            position=self.images,
            workers=config.workers,
            holdout=config.validate_.holdout,
        )
        self.validation = self._validation()
        if hasattr(self.model.net, "checkpointing"):
            self.model.net.checkpointing = config.checkpointing  # type: ignore[assignment]
        if config.compile:
            _compile(self.model.net, self.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder, self.step, config.steps)
        self._greet(told)

    @contextmanager
    def loader_closed(self) -> Iterator[None]:
        """The threads that fetch data end with this context."""
        try:
            yield
        finally:
            self.loader.close()

    def go(self, stopping: Callable[[], bool], stop_after: int | None) -> Path:
        """Steps until the end, or until told to stop; returns the model directory."""
        config, last = self.config, self.step + stop_after if stop_after else None
        with self.log:
            if self.step == 0 and config.samples.every and config.samples.at_start:
                self._look()
            losses: list[float] = []
            while self.step < config.steps:
                losses += self._advance()
                losses = self._report(losses)
                over = self.step == config.steps
                if not over and (stopping() or self.step == last):
                    self._save()
                    fix = f"sfumato train --resume {self.folder}"
                    raise Interrupted("stopped, and saved", where=f"step {self.step} of {config.steps}", fix=fix)
                if over or self.step % config.checkpoint.every == 0:
                    self._save()
            self.log.draw()
            self.log.say(f"{self.images:,} images in {self.step:,} steps; the model is in {self.folder / 'model'}")
        return self.folder / "model"

    def _advance(self) -> list[float]:
        """One step; its loss, or nothing where it was skipped."""
        batches = [next(self.loader) for _ in range(self.config.accumulate)]
        outcome = self.stepper.gradients(batches, self.step)
        fresh = sum(len(batch.images) for batch in batches)
        self.step, self.images = self.step + 1, self.images + fresh
        self.log.stepped(self.step, fresh)
        if not (np.isfinite(outcome.loss) and np.isfinite(outcome.norm)):
            self.stepper.skip()
            seen = f"loss {outcome.loss:g}, gradient norm {outcome.norm:g}"
            self.log.say(f"step {self.step}: skipped, {seen}")
            self.guard.nonfinite(self.step, seen)
            return []
        score = self.guard.score(outcome.loss)
        if self.guard.spiked(outcome.loss) and not self._accepts(outcome.loss, score):
            return []
        self.stepper.update(learning_rate(self.updates, self.config))
        for average in self.averages:
            average.update(list(self.weights.values()), self.updates)
        self.updates += 1
        self.guard.passed()
        return [outcome.loss]

    def _accepts(self, loss: float, score: float) -> bool:
        """What the configuration wants done about a spike; True if the step is made all the same."""
        action = self.config.guard.spikes
        self.log.say(f"step {self.step}: loss {loss:.4g} lies {score:.0f} deviations above the last ones ({action})")
        if action == "warn":
            return True
        self.stepper.skip()
        if action == "rollback":
            self._roll_back()
        return False

    def _roll_back(self) -> None:
        """Weights, averages and optimizer as in the last checkpoint; the data goes on."""
        self.guard.rollbacks += 1
        if self.guard.rollbacks > ROLLBACKS:
            raise DataError(
                f"the loss still jumps after {ROLLBACKS} rollbacks", where=f"step {self.step}", fix="a smaller optim.lr"
            )
        path, state = checkpoint.newest(self.folder / "checkpoints", self.log.say)
        self._adopt(state)
        self.updates = int(state.plain["updates"])
        self.log.say(f"rolled back to {path.name}")

    def _report(self, losses: list[float]) -> list[float]:
        """Metrics, validation and pictures, each when it is due. Returns the losses that were not reported yet."""
        config, over = self.config, self.step == self.config.steps
        if losses and (over or self.step % config.log.every == 0):
            rate = learning_rate(max(self.updates - 1, 0), config)
            counts = {"skipped": self.guard.skipped, "spikes": self.guard.spikes}
            loss = sum(losses) / len(losses)
            self.log.row({"step": self.step, "images": self.images, "loss": loss, "lr": rate, **counts})
            losses = []
        if self.validation and config.validate_.every and (over or self.step % config.validate_.every == 0):
            with self._average_weights():
                loss, by_noise = self.validation(self.stepper)
            self.log.row({"step": self.step, "validation": loss, "by_noise": by_noise}, shown=False)
            self.log.say(f"step {self.step}: validation {loss:.4f}")
            self.log.draw()
        if config.samples.every and (over or self.step % config.samples.every == 0):
            self._look()
        return losses

    def _look(self) -> None:
        """A sheet of pictures, for the configured prompts or the first captions of the data."""
        samples = self.config.samples
        raw: list[Raw] = [{"caption": text} for text in samples.prompts]
        if not raw:
            raw = list(self.dataset.batch(range(min(samples.count, len(self.dataset))))[1])
        with self._average_weights():
            preview(self.model, self.device, self.config, raw, self.folder / "samples" / f"{self.step:08d}.png")

    @contextmanager
    def _average_weights(self) -> Iterator[None]:
        """The first average in place of the weights, in evaluation mode, uncompiled: other shapes would
        compile anew.
        """
        started = time.perf_counter()
        self.model.eval()
        with self.averages[0].applied(list(self.weights.values())), torch.compiler.set_stance("force_eager"):
            yield
        self.model.train()
        self.log.paused(time.perf_counter() - started)

    def _save(self) -> None:
        """A checkpoint and the model directory."""
        started = time.perf_counter()
        averages = {f"ema-{i}": average.state() for i, average in enumerate(self.averages)}
        optim = checkpoint.optimizer_state(self.optimizer, self.model)
        plain = {
            "step": self.step,
            "updates": self.updates,
            "images": self.images,
            "guard": self.guard.state(),
            "scaler": self.stepper.scaler.state_dict(),
            "model": self.section["model"],
        }
        state = State({"model": self.model.weights(), **averages, "optim": optim}, plain)
        checkpoint.save(self.folder / "checkpoints", self.step, state, self.config.checkpoint.keep)
        facts = {"run": self.config.name, "steps": self.step, "images": self.images, "seed": self.config.seed}
        save_model(self.folder / "model", self.model, facts, self.model.weights() | self.averages[0].state())
        self.log.paused(time.perf_counter() - started)

    def _restore(self) -> list[str]:
        """Takes up the newest whole checkpoint; what there is to tell of others."""
        told: list[str] = []
        path, state = checkpoint.newest(self.folder / "checkpoints", told.append)
        if state.plain["model"] != self.section["model"]:
            raise ConfigError(
                "a run cannot go on with another model",
                where="model",
                seen=str(path),
                fix="name=ANOTHER, without --resume",
            )
        self._adopt(state)
        self.step, self.updates, self.images = (int(state.plain[name]) for name in ("step", "updates", "images"))
        self.guard.restore(dict(state.plain["guard"]))
        self.stepper.scaler.load_state_dict(dict(state.plain["scaler"]))
        return [*told, f"resumed from {path.name}"]

    def _adopt(self, state: State) -> None:
        """Weights, averages and optimizer of a checkpoint."""
        own, kept = self.model.weights(), state.tensors["model"]
        if own.keys() != kept.keys() or any(own[name].shape != kept[name].shape for name in own):
            raise CheckpointError(
                "a checkpoint does not fit the model", where=str(self.folder), seen="other weights", fix="name=ANOTHER"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(kept[name])
        for i, average in enumerate(self.averages):
            if f"ema-{i}" in state.tensors:
                average.restore(state.tensors[f"ema-{i}"])
        checkpoint.restore_optimizer(self.optimizer, self.model, state.tensors["optim"])

    def _validation(self) -> Validation | None:
        held = self.loader.held_out().tolist()
        batch, config = self.config.batch, self.config.validate_
        if not held or not config.every:
            return None
        parts = [held[i : i + batch] for i in range(0, min(len(held), batch * config.batches), batch)]
        batches = [self._batch(part) for part in parts]
        return Validation(batches, self.config.seed)

    def _batch(self, part: list[int]) -> Batch:
        images, fields = self.dataset.batch(part)
        return Batch(images, fields, np.array(part), 0)

    def _greet(self, told: list[str]) -> None:
        for line in told:
            self.log.say(line)
        millions = sum(p.numel() for p in self.weights.values()) / 1e6
        data = f"{len(self.dataset):,} pictures of {self.dataset.shape[1]}x{self.dataset.shape[0]}"
        self.log.say(
            f"{self.config.name}: {millions:.1f}M weights, {data}, on {self.device} in {self.config.precision}"
        )


def _compile(net: Any, device: torch.device) -> None:
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise MachineError(
            "compiling for a CPU needs a C++ compiler", where="compile=true", seen="no g++", fix="compile=false"
        )
    net.compile(dynamic=False)
