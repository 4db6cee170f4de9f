"""What a run keeps: checkpoints, from which it goes on, and its model directories, which are what it was for.

Its state is weights, averages, optimizer and a few counters; data and randomness are addressed, and need nothing kept.
A run that trains an adapter has the adapter's weights in its checkpoints, and whole models beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import files
from sfumato.adapters import training as adapters
from sfumato.adapters.parts import parts_of
from sfumato.adapters.writing import write_adapter
from sfumato.config import Config
from sfumato.errors import CheckpointError, ConfigError, DataError, MachineError
from sfumato.io.directory import save_model
from sfumato.model import AutoencoderModel, Model
from sfumato.train import checkpoint
from sfumato.train.checkpoint import State
from sfumato.train.ema import EMA
from sfumato.train.guard import Guard
from sfumato.train.step import Stepper

FACTS = ("start", "teacher", "lora", "control", "reparameterise")  # of the configuration, that a model keeps
MEASURED = 512  # pictures by which the scale of an autoencoder's latents is measured


@dataclass(frozen=True)
class Keeping:
    """What of a run is kept, and where.

    section: the configuration, resolved. weights: those that learn, by name. averaged: those of them that belong to the
    model, and have averages.
    """

    config: Config
    section: Mapping[str, Any]
    folder: Path
    stepper: Stepper
    weights: Mapping[str, nn.Parameter]
    averaged: Mapping[str, nn.Parameter]
    averages: Sequence[EMA]
    guard: Guard

    def save(self, counts: Mapping[str, Any], some: Callable[[int], Iterator[Tensor]]) -> None:
        """A checkpoint and the model directories. DataError, before anything is written, for weights that are lost.

        counts: what the run counts, its step among it. some: so many pictures as training sees them, in batches.
        """
        if not bool(torch.stack([value.isfinite().all() for value in self.weights.values()]).all()):
            raise DataError(
                "the weights are not finite, and not saved",
                where=f"step {counts['step']}",
                fix="a smaller optim.lr; the last checkpoint is intact",
            )
        place, keep = self.folder / checkpoint.FOLDER, self.config.checkpoint.keep
        checkpoint.save(place, counts["step"], self.state(counts), keep)
        self.save_models(counts, some)

    def state(self, counts: Mapping[str, Any]) -> State:
        """All that a resumed run needs."""
        averages = {f"ema-{i}": average.state() for i, average in enumerate(self.averages)}
        model = self.stepper.model
        optim = checkpoint.optimizer_state(self.stepper.optimizer, model)
        plain = {
            **counts,
            "guard": self.guard.state(),
            "scaler": self.stepper.scaler.state_dict(),
            "model": self.section["model"],
            "optimizer": self.config.optim.kind,
            "numerics": checkpoint.numerics(self.stepper.device),
        }
        return State({"model": self._kept(), **averages, "optim": optim}, plain, model.files())

    def _kept(self) -> dict[str, Tensor]:
        """What a checkpoint has of the weights: all of them, or the adapter's, and those of an adapter that follows."""
        model = self.stepper.model
        return model.weights() if self.config.lora is None else model.moving()

    def save_models(self, counts: Mapping[str, Any], some: Callable[[int], Iterator[Tensor]]) -> None:
        """A model directory for each average: `model/` for the first, `model-1/`, `model-2/` for others; an adapter
        lies beside it, and is in it.
        """
        model, objective = self.stepper.model, self.stepper.objective
        for i, (average, section) in enumerate(zip(self.averages, self.section["ema"], strict=True)):
            counted = {"steps": counts["step"], "images": counts["images"]}
            facts = {"run": self.config.name, **counted, "seed": self.config.seed}
            more = {name: self.section[name] for name in FACTS if self.section[name] is not None}
            if self.config.method is not None:
                more["method"] = self.section["objective"]["kind"]
            end = f"-{i}" if i else ""
            if isinstance(model, AutoencoderModel):
                with average.applied(list(self.averaged.values())):
                    model.measure(some(MEASURED), getattr(objective, "latents", "one"))
            if self.config.lora is not None:
                weights = self._merged(average, end)
            else:
                kept = {name: value for name, value in model.weights().items() if model.is_kept(name)}
                weights = kept | average.state()
            save_model(self.folder / f"model{end}", model, facts | {"ema": section, **more}, weights)

    def _merged(self, average: EMA, end: str) -> dict[str, Tensor]:
        """The weights with an average of the adapter in them; the adapter itself is written."""
        model = self.stepper.model
        assert isinstance(model, Model)
        with average.applied(list(self.averaged.values())):
            adapter, weights = adapters.trained_adapter(model), adapters.merged_weights(model)
        file = self.folder / f"lora{end}.safetensors"
        write_adapter(file, adapter, parts_of(model), base=self.config.start)
        return {name: value for name, value in weights.items() if model.is_kept(name)}

    def restore(self, path: Path, state: State) -> list[str]:
        """Takes up a checkpoint, all of it but what the run counts; what there is to tell of it."""
        for name, own in (("model", self.section["model"]), ("optimizer", self.config.optim.kind)):
            if state.plain[name] != own:
                raise ConfigError(
                    f"a run cannot go on with another {name}",
                    where="optim.kind" if name == "optimizer" else name,
                    seen=f"not that of {path}",
                    fix="name=ANOTHER, without --resume",
                )
        self.adopt(state)
        plain = state.plain
        self.guard.restore(plain["guard"])
        if plain["scaler"] and self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(dict(plain["scaler"]))
        before, here = plain["numerics"], checkpoint.numerics(self.stepper.device)
        changed = [f"{name} was {before.get(name)}, is {now}" for name, now in here.items() if before.get(name) != now]
        return [f"resumed from {path.name}", *(f"it continues, but not bit for bit: {one}" for one in changed)]

    def adopt(self, state: State) -> None:
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
        checkpoint.restore_optimizer(self.stepper.optimizer, self.stepper.model, state.tensors["optim"])

    def check_room(self) -> None:
        """MachineError if the disk has no room for one checkpoint and the model directories."""
        kept, whole = (
            sum(value.nbytes for value in weights.values()) for weights in (self._kept(), self.stepper.model.weights())
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
