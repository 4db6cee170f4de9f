"""A run: its parts, its steps, what it shows of itself, and what it keeps.

Its state is weights, averages, optimizer and a few counters; all randomness is addressed by step
(`sfumato.train.keys`) and the data by position. So a run that was stopped continues bit for bit, and a step that was
skipped stays skipped.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import files
from sfumato.adapters import training as adapters
from sfumato.adapters.parts import parts_of
from sfumato.adapters.writing import write_adapter
from sfumato.catalogue import build
from sfumato.config import Config
from sfumato.data.loader import Batch, Loader
from sfumato.data.order import indices
from sfumato.errors import CheckpointError, ConfigError, DataError, Interrupted, MachineError
from sfumato.io.directory import save_model
from sfumato.model import AutoencoderModel, Model, build_model, compile_net, pick_device
from sfumato.objectives.denoising import Phased
from sfumato.overlay import resolved
from sfumato.train import checkpoint
from sfumato.train.cache import cache_for
from sfumato.train.checkpoint import State
from sfumato.train.control import freeze
from sfumato.train.ema import EMA
from sfumato.train.guard import Guard
from sfumato.train.keys import key
from sfumato.train.log import Log
from sfumato.train.optim import build_optimizer, learning_rate
from sfumato.train.pairs import pairs_for
from sfumato.train.pixels import pixels
from sfumato.train.preview import preview, reconstructions, wanted
from sfumato.train.reparameterise import reparameterise
from sfumato.train.start import FOLDER, Start, model_of, read_start
from sfumato.train.step import Outcome, Stepper
from sfumato.train.teaching import Student, student_of
from sfumato.train.timing import Timing
from sfumato.train.trainable import trainable
from sfumato.train.validate import Validation

ROLLBACKS = 5  # more of them, and somebody should look at the run
NAMED = 8  # pictures of a step that was skipped
FACTS = ("start", "teacher", "lora", "control", "reparameterise")  # of the configuration, that a model keeps
MEASURED = 512  # pictures by which the scale of an autoencoder's latents is measured


class Run:
    """A run of a configuration in a folder, from its beginning or from its newest whole checkpoint.

    start: the model to begin with, where the configuration names one and the run is new. stopping: whether to stop,
    asked while pairs are made.
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
    ) -> None:
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device, self.section = pick_device(config.device), resolved(config)
        told: list[str] = []
        kept = checkpoint.newest(self.checkpoints, told.append) if resume else None
        self.dataset = build(config.source, "Data")
        self._build(kept[1] if kept else None, start)
        self.step = self.updates = self.images = 0
        self.pending: list[dict[str, float]] = []
        if kept is not None:
            told += self._restore(*kept)
        self._check_room()
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
        return self.folder / "checkpoints"

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
                self._save_models()
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

    def _build(self, state: State | None, start: Start | None) -> None:
        """The parts, freshly initialised; a conditioner's vocabulary is that of the checkpoint, if there is one."""
        config = self.config
        torch.manual_seed(key(config.seed, "weights"))
        objective = build(config.objective, "Objective")
        files_ = None if state is None else state.files
        if config.start is None or config.reparameterise is not None:
            self.model = trainable(self.section, self.dataset, objective, files_)
            if config.reparameterise is not None and start is not None:
                assert isinstance(self.model, Model)
                reparameterise(self.model, start, config.reparameterise.time)
        else:
            self.model = self._further(files_, start)
        self.model.to(self.device)
        if config.method is not None:
            self.model = student_of(self.model, config, objective, self.device).to(self.device)
        self.model.train()
        self.weights = self.model.trained()
        self.averaged = {name: p for name, p in self.weights.items() if self.model.is_kept(name)}
        self.optimizer = build_optimizer(self.model, config)
        self.stepper = Stepper(self.model, objective, self.optimizer, config, self.device)
        self.averages = [EMA(self.averaged, section) for section in config.ema]
        self.guard = Guard(config.guard)
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

    def _further(self, kept: Mapping[str, bytes] | None, start: Start | None) -> Model:
        """The model to begin with, and perhaps a new adapter of it. A run that trains one keeps the model beside its
        checkpoints, which lack it; of any other they have all weights. kept: the conditioner's files, of a checkpoint.
        """
        size, lora, place = self.dataset.shape, self.config.lora, self.folder / FOLDER
        spec = {"model": self.section["model"], "size": list(size), "sampling": self.section["sampling"]}
        fresh = start is None and lora is None
        model = build_model(spec, None, kept) if fresh else model_of(start or read_start(place), spec)
        if self.config.control is not None:
            freeze(model)
        if lora is not None:
            if start is not None:
                save_model(place, model, {"start": start.where})
            adapters.begin(model, lora)
        return model

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
        self._adopt(state)
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
        if not bool(torch.stack([value.isfinite().all() for value in self.weights.values()]).all()):
            raise DataError(
                "the weights are not finite, and not saved",
                where=f"step {self.step}",
                fix="a smaller optim.lr; the last checkpoint is intact",
            )
        checkpoint.save(self.checkpoints, self.step, self._state(), self.config.checkpoint.keep)
        self._save_models()
        self.timing.write(self.step)
        self.log.paused(time.perf_counter() - started)

    def _state(self) -> State:
        """All that a resumed run needs."""
        averages = {f"ema-{i}": average.state() for i, average in enumerate(self.averages)}
        optim = checkpoint.optimizer_state(self.optimizer, self.model)
        plain = {
            "step": self.step,
            "updates": self.updates,
            "images": self.images,
            "pending": self.pending,
            "guard": self.guard.state(),
            "scaler": self.stepper.scaler.state_dict(),
            "model": self.section["model"],
            "optimizer": self.config.optim.kind,
            "numerics": checkpoint.numerics(self.device),
        }
        return State({"model": self._kept(), **averages, "optim": optim}, plain, self.model.files())

    def _kept(self) -> dict[str, Tensor]:
        """What a checkpoint has of the weights: all of them, or the adapter's."""
        if self.config.lora is None:
            return self.model.weights()
        return {name: value.detach() for name, value in self.weights.items()}

    def _save_models(self) -> None:
        """A model directory for each average: `model/` for the first, `model-1/`, `model-2/` for others; an adapter
        lies beside it, and is in it.
        """
        for i, (average, section) in enumerate(zip(self.averages, self.section["ema"], strict=True)):
            facts = {"run": self.config.name, "steps": self.step, "images": self.images, "seed": self.config.seed}
            more = {name: self.section[name] for name in FACTS if self.section[name] is not None}
            if self.config.method is not None:
                more["method"] = self.section["objective"]["kind"]
            end = f"-{i}" if i else ""
            if isinstance(self.model, AutoencoderModel):
                with average.applied(list(self.averaged.values())):
                    self.model.measure(self._some(MEASURED), getattr(self.stepper.objective, "latents", "one"))
            if self.config.lora is not None:
                weights = self._merged(average, end)
            else:
                kept = {name: value for name, value in self.model.weights().items() if self.model.is_kept(name)}
                weights = kept | average.state()
            save_model(self.folder / f"model{end}", self.model, facts | {"ema": section, **more}, weights)

    def _merged(self, average: EMA, end: str) -> dict[str, Tensor]:
        """The weights with an average of the adapter in them; the adapter itself is written."""
        assert isinstance(self.model, Model)
        with average.applied(list(self.averaged.values())):
            adapter, weights = adapters.trained_adapter(self.model), adapters.merged_weights(self.model)
        file = self.folder / f"lora{end}.safetensors"
        write_adapter(file, adapter, parts_of(self.model), base=self.config.start)
        return {name: value for name, value in weights.items() if self.model.is_kept(name)}

    def _some(self, n: int) -> Iterator[torch.Tensor]:
        """The first pictures that training sees, in batches."""
        n = min(n, self.loader.n)
        index = self.loader.places(indices(0, n, self.loader.n, self.config.seed)).tolist()
        for start in range(0, n, self.config.batch):
            yield pixels(self.dataset.batch(index[start : start + self.config.batch])[0], self.device)

    def _restore(self, path: Path, state: State) -> list[str]:
        """Takes up a checkpoint; what there is to tell of it."""
        for name, own in (("model", self.section["model"]), ("optimizer", self.config.optim.kind)):
            if state.plain[name] != own:
                raise ConfigError(
                    f"a run cannot go on with another {name}",
                    where="optim.kind" if name == "optimizer" else name,
                    seen=f"not that of {path}",
                    fix="name=ANOTHER, without --resume",
                )
        self._adopt(state)
        plain = state.plain
        self.step, self.updates, self.images = (int(plain[name]) for name in ("step", "updates", "images"))
        self.pending = [dict(one) for one in plain["pending"]]
        self.guard.restore(plain["guard"])
        if plain["scaler"] and self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(dict(plain["scaler"]))
        before, here = plain["numerics"], checkpoint.numerics(self.device)
        changed = [f"{name} was {before.get(name)}, is {now}" for name, now in here.items() if before.get(name) != now]
        return [f"resumed from {path.name}", *(f"it continues, but not bit for bit: {one}" for one in changed)]

    def _adopt(self, state: State) -> None:
        """Weights, averages and optimizer of a checkpoint; an average that it does not have begins with the weights."""
        own, kept = self._kept(), state.tensors["model"]
        if own.keys() != kept.keys() or any(own[name].shape != kept[name].shape for name in own):
            raise CheckpointError(
                "a checkpoint does not fit the model", where=str(self.folder), seen="other weights", fix="name=ANOTHER"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(kept[name])
        for i, average in enumerate(self.averages):
            average.restore(state.tensors.get(f"ema-{i}", self.averaged))
        checkpoint.restore_optimizer(self.optimizer, self.model, state.tensors["optim"])

    def _check_room(self) -> None:
        """MachineError if the disk has no room for one checkpoint and the model directories."""
        kept, whole = (
            sum(value.nbytes for value in weights.values()) for weights in (self._kept(), self.model.weights())
        )
        n = len(self.averages)
        needed, free = kept * (3 + n) + whole * n, files.free_space(self.folder)
        if free < needed:
            raise MachineError(
                "the disk has no room for a checkpoint",
                where=str(self.folder),
                seen=f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB needed",
                fix="free some space, or --run FOLDER on another disk",
            )

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
