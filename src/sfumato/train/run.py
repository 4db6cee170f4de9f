"""A run: its parts, its steps, and what it shows of itself; `sfumato.train.keeping` is what it keeps.

Its state is weights, averages, optimizer and a few counters; all randomness is addressed by step
(`sfumato.train.keys`) and the data by position. So a run that was stopped continues bit for bit, and a step that was
skipped stays skipped.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.catalogue import build
from sfumato.config import Config
from sfumato.data.loader import Batch, Loader
from sfumato.data.order import indices
from sfumato.errors import ConfigError, DataError, Interrupted
from sfumato.model import AutoencoderModel, Model, compile_net, pick_device
from sfumato.objectives.denoising import Particular, Phased
from sfumato.overlay import resolved
from sfumato.train import checkpoint
from sfumato.train.cache import cache_for
from sfumato.train.checkpoint import State
from sfumato.train.ema import EMA
from sfumato.train.guard import Guard
from sfumato.train.keeping import Keeping
from sfumato.train.keys import key
from sfumato.train.log import Log
from sfumato.train.optim import build_optimizer, learning_rate
from sfumato.train.pairs import pairs_for
from sfumato.train.pixels import pixels
from sfumato.train.preview import preview, reconstructions, wanted
from sfumato.train.start import Start
from sfumato.train.step import Outcome, Stepper
from sfumato.train.teaching import Student, student_of
from sfumato.train.timing import Timing
from sfumato.train.trainable import to_train
from sfumato.train.validate import Validation

ROLLBACKS = 5  # more of them, and somebody should look at the run
NAMED = 8  # pictures of a step that was skipped


class Run:
    """A run of a configuration in a folder, from its beginning or from its newest whole checkpoint.

    start: the model to begin with, where the configuration names one and the run is new. stopping: whether to stop,
    asked while pairs are made. teacher: of a student, where it was read already.
    step counts the steps, made or skipped, updates those that were made, images the pictures seen. pending: loss,
    gradient norm and what else the objective tells of the steps since the last row of metrics. shown: the conditions
    that are drawn on the way, or of an autoencoder's run the pictures that are reconstructed.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        resume: bool,
        start: Start | None = None,
        stopping: Callable[[], bool] = lambda: False,
        teacher: Model | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device, self.section = pick_device(config.device), resolved(config)
        told: list[str] = []
        kept = checkpoint.newest(self.checkpoints, told.append) if resume else None
        self.dataset = build(config.source, "Data")
        self._build(kept[1] if kept else None, start, teacher)
        self.step = self.updates = self.images = 0
        self.pending: list[dict[str, float]] = []
        if kept is not None:
            told += self.keeping.restore(*kept)
            plain = kept[1].plain
            self.step, self.updates, self.images = (int(plain[name]) for name in ("step", "updates", "images"))
            self.pending = [dict(one) for one in plain["pending"]]
        self.keeping.check_room()
        self.timing = Timing(folder, self.step, self.device, config.precision)
        self.stepper.cache = cache = cache_for(config, self.model, self.dataset)
        if isinstance(self.model, Student) and cache is not None and cache.states is not None:
            self.model.stored = partial(cache.cond, device=self.device)
        self.log = Log(folder, self.step, config.steps)
        pairs = None
        if isinstance(self.model, Student) and config.method is not None and config.method.pairs:
            pairs, self.dataset = pairs_for(
                config, self.model.eval(), self.dataset, folder, self.device, self.log.say, stopping
            )
            self.model.train()
        self.loader = Loader(
            self.dataset,
            config.batch,
            config.seed,
            position=self.images,
            workers=config.workers,
            holdout=config.validate_.holdout,
            latents=self.stepper.cache.latents if self.stepper.cache else None,
            pairs=pairs,
        )
        with self._loader_closed_on_error():
            held = self.loader.held_out().tolist()
            self.validation = self._validation(held)
            drawing = config.samples.every or config.samples.at_start
            self.shown: Sequence[Any] = self._wanted(held) if drawing else []
            self._greet(told)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / checkpoint.FOLDER

    def close(self) -> None:
        """Ends the threads that fetch data."""
        self.loader.close()

    def go(self, stopping: Callable[[], bool], stop_after: int | None) -> Path:
        """Steps until the end, or until told to stop; returns the model directory."""
        config, last = self.config, None if stop_after is None else self.step + stop_after
        with self.log:
            if self.step == 0 and config.samples.at_start:
                self._look()
            if self.step >= config.steps:  # resumed at its end; perhaps it was killed before it wrote the model
                self.keeping.save_models(self._counts(), self._some)
            while self.step < config.steps:
                self._advance()
                self._report()
                over = self.step == config.steps
                if not over and (stopping() or self.step == last):
                    self._save()
                    fix = f"sfumato train --resume {shlex.quote(str(self.folder))}"
                    raise Interrupted("stopped, and saved", where=f"step {self.step} of {config.steps}", fix=fix)
                if over or self.step % config.checkpoint.every == 0:
                    self._save()
            self.log.draw()
            self.log.say(f"{self.images:,} images in {self.step:,} steps; the model is in {self.folder / 'model'}")
        return self.folder / "model"

    def _build(self, state: State | None, start: Start | None, teacher: Model | None) -> None:
        """The parts, freshly initialised; a conditioner's vocabulary is that of the checkpoint, if there is one."""
        config = self.config
        torch.manual_seed(key(config.seed, "weights"))
        objective = build(config.objective, "Objective")
        files_ = None if state is None else state.files
        self.model = to_train(config, self.section, self.dataset, objective, self.folder, files_, start)
        if isinstance(objective, Particular) and isinstance(self.model, Model):
            objective.check(self.model.denoiser)
        self.model.to(self.device)
        if config.method is not None:
            self.model = student_of(self.model, config, objective, self.device, teacher).to(self.device)
        self.model.train()
        self.weights = self.model.trained()
        self.averaged = {name: p for name, p in self.weights.items() if self.model.is_kept(name)}
        self.optimizer = build_optimizer(self.model, config)
        self.stepper = Stepper(self.model, objective, self.optimizer, config, self.device)
        self.averages = [EMA(self.averaged, section) for section in config.ema]
        self.guard = Guard(config.guard)
        parts = (self.stepper, self.weights, self.averaged, self.averages, self.guard)
        self.keeping = Keeping(config, self.section, self.folder, *parts)
        if config.checkpointing and not hasattr(self.model.net, "checkpointing"):
            seen = type(self.model.net).__name__
            raise ConfigError(
                "this network has no gradient checkpointing",
                where="checkpointing",
                seen=seen,
                fix="checkpointing=false",
            )
        if config.checkpointing:
            self.model.net.checkpointing = True  # type: ignore[assignment]
        if config.compile:
            for part in self.model.compiled():
                compile_net(part, self.device, dynamic=False)

    def _advance(self) -> None:
        """One step: made, or skipped and counted."""
        batches = [next(self.loader) for _ in range(self.config.accumulate)]
        outcome = self.stepper.gradients(batches, self.step, self.updates)
        fresh = sum(len(batch.indices) for batch in batches)
        self.step, self.images = self.step + 1, self.images + fresh
        self.log.stepped(self.step, fresh)
        if not self._usable(outcome, batches):
            return
        self.stepper.update(learning_rate(self.updates, self.config))
        for average in self.averages:
            average.update(list(self.averaged.values()), self.updates)
        self.model.learned(self.updates, self.config.steps)
        self.updates += 1
        self.guard.made()
        self.pending.append({"loss": outcome.loss, "gradient_norm": outcome.norm, **outcome.parts})

    def _usable(self, outcome: Outcome, batches: Sequence[Batch]) -> bool:
        """Whether a step is to be made; what is wrong with it is told, and done about."""
        if not (np.isfinite(outcome.loss) and np.isfinite(outcome.norm)):
            why = f"loss {outcome.loss:g}, gradient norm {outcome.norm:g}"
            self._skip("not finite: " + why, batches)
            return False
        if isinstance(self.stepper.objective, Phased):
            self.guard.entered(self.stepper.objective.phase(self.updates, self.config.steps))
        score = self.guard.spike(outcome.loss)
        if score is None:
            return True
        action = self.config.guard.spikes
        why = f"loss {outcome.loss:.4g} lies {score:.0f} deviations above the last ones"
        if action == "warn":
            self.log.say(f"step {self.step}: {why}")
            return True
        self._skip(why, batches)
        if action == "rollback":
            self._roll_back()
        return False

    def _skip(self, why: str, batches: Sequence[Batch]) -> None:
        """Neither weights nor averages nor learning rate move; DataError when too many steps in a row are skipped."""
        self.stepper.skip()
        indices = [int(index) for batch in batches for index in batch.indices]
        more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
        self.log.say(f"step {self.step} is skipped: {why}; pictures {' '.join(map(str, indices[:NAMED]))}{more}")
        self.guard.missed(self.step, why)

    def _roll_back(self) -> None:
        """Weights, averages and optimizer as in the last checkpoint; the data goes on."""
        if not checkpoint.found(self.checkpoints):
            self.log.say("there is no checkpoint yet to roll back to")
            return
        self.guard.rollbacks += 1
        if self.guard.rollbacks > ROLLBACKS:
            raise DataError(
                f"the loss still jumps after {ROLLBACKS} rollbacks", where=f"step {self.step}", fix="a smaller optim.lr"
            )
        path, state = checkpoint.newest(self.checkpoints, self.log.say)
        self.keeping.adopt(state)
        self.updates = int(state.plain["updates"])
        self.log.say(f"rolled back to {path.name}")

    def _report(self) -> None:
        """Metrics, validation and pictures, each when it is due."""
        config, over = self.config, self.step == self.config.steps
        if self.pending and (over or self.step % config.log.every == 0):
            names = dict.fromkeys(name for one in self.pending for name in one)
            seen = {name: [one[name] for one in self.pending if name in one] for name in names}
            means = {name: sum(one) / len(one) for name, one in seen.items()}
            rate = {"lr": learning_rate(self.updates - 1, config)}
            counts = {"skipped": self.guard.skipped, "spikes": self.guard.spikes}
            self.log.row({"step": self.step, "images": self.images} | means | rate | counts)
            self.pending.clear()
        if self.validation and (over or self.step % config.validate_.every == 0):
            with self._average_weights():
                loss, by_noise = self.validation(self.stepper)
            self.log.row({"step": self.step, "validation": loss, "by_noise": by_noise})
            self.log.say(f"step {self.step}: validation {loss:.4f}")
            self.log.draw()
        if config.samples.every and (over or self.step % config.samples.every == 0):
            self._look()

    def _look(self) -> None:
        """A sheet of pictures, for the configured prompts or the first captions of the data."""
        if not self.shown:
            return
        path = self.folder / "samples" / f"{self.step:08d}.png"
        with self._average_weights():
            try:
                if isinstance(self.model, Model):
                    preview(self.model, self.device, self.config.precision, self.shown, path)
                elif isinstance(self.model, AutoencoderModel):
                    reconstructions(self.model, self.device, np.stack(self.shown), path)
            except DataError as error:
                self.log.say(f"step {self.step}: no pictures, {error.what} ({error.seen})")

    @contextmanager
    def _average_weights(self) -> Iterator[None]:
        """The first average in place of the weights, in evaluation mode, uncompiled: other shapes would
        compile anew.
        """
        started = time.perf_counter()
        self.model.eval()
        try:
            with self.averages[0].applied(list(self.averaged.values())), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train()
            self.log.paused(time.perf_counter() - started)

    def _save(self) -> None:
        """A checkpoint and the model directories. DataError, before anything is written, for weights that are lost."""
        started = time.perf_counter()
        self.keeping.save(self._counts(), self._some)
        self.timing.write(self.step)
        self.log.paused(time.perf_counter() - started)

    def _counts(self) -> dict[str, Any]:
        """How far it is, which a checkpoint knows beside what learns."""
        return {"step": self.step, "updates": self.updates, "images": self.images, "pending": self.pending}

    def _some(self, n: int) -> Iterator[torch.Tensor]:
        """The first pictures that training sees, in batches."""
        n = min(n, self.loader.n)
        index = self.loader.places(indices(0, n, self.loader.n, self.config.seed)).tolist()
        for start in range(0, n, self.config.batch):
            yield pixels(self.dataset.batch(index[start : start + self.config.batch])[0], self.device)

    def _wanted(self, held: Sequence[int]) -> Sequence[Any]:
        """What is shown on the way."""
        if isinstance(self.model, Model):
            return wanted(self.model, self.dataset, self.config, held)
        count = min(self.config.samples.count, len(self.dataset))
        places = list(held[:count]) or list(range(count))
        return list(self.dataset.batch(places)[0])

    def _validation(self, held: Sequence[int]) -> Validation | None:
        batch, config = self.config.batch, self.config.validate_
        if not held or not config.every:
            return None
        parts = [held[i : i + batch] for i in range(0, min(len(held), batch * config.batches), batch)]
        return Validation([self.loader.fetched(np.array(part)) for part in parts])

    @contextmanager
    def _loader_closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _greet(self, told: Sequence[str]) -> None:
        for line in told:
            self.log.say(line)
        millions = sum(p.numel() for p in self.weights.values()) / 1e6
        data = f"{len(self.dataset):,} pictures of {self.dataset.shape[1]}x{self.dataset.shape[0]}"
        of = "weights" if self.config.start is None else f"weights that learn, of those of {self.config.start}"
        self.log.say(f"{self.config.name}: {millions:.1f}M {of}, {data}, on {self.device} in {self.config.precision}")
        conditional = getattr(self.model, "conditioner", None) is not None
        more = getattr(self.stepper.objective, "notes", None)
        for note in (*self.model.notes(), *(() if more is None else more(conditional))):
            self.log.say(note)
        if self.loader.holdout < (asked := self.config.validate_.holdout):
            self.log.say(f"holding out {self.loader.holdout} pictures, not {asked}: there are {len(self.dataset)}")
        if self.config.validate_.every and self.validation is None:
            self.log.say("no validation: no pictures are held out, see validate.holdout")
        if self.config.samples.every and not self.shown:
            self.log.say("no pictures while it trains: the model reads none of the first captions whole")
