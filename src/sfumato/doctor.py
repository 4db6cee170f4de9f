"""What is wrong, in words that say what to change: with the machine, and with a model that does not do what its
prompts say.

A conditional model fails in three ways that its loss hides: it answers the same with and without the prompt (nothing
was learned from captions), all prompts look alike to it (collapsed embeddings), or guidance pushes it the wrong way
or too far. Each is measured here on a few pictures.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato import files
from sfumato.conditioners import silent
from sfumato.data.order import indices
from sfumato.data.picture import Fields
from sfumato.errors import ConfigError, DataError
from sfumato.metrics.scenes import check, evaluate
from sfumato.model import Model
from sfumato.overlay import run_data
from sfumato.paths import along, noised
from sfumato.pipeline import Pipeline

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
SCALES = (1.0, 2.0, 4.0, 7.0)
EXAMPLES = 64


class Finding(NamedTuple):
    """One thing looked at: how it is, what was seen, and what to change if it is not fine."""

    name: str
    state: Literal["ok", "warning", "fault"]
    seen: str
    advice: str = ""


def environment(folder: Path = Path()) -> list[Finding]:
    """The machine: Python, torch and what it can reach, torchvision, memory, disk, compiler."""
    return [_python(), _torch(), *_devices(), _precision(), _torchvision(), _disk(folder), _compiler()]


def of_run(run: Path, pipeline: Pipeline, *, per_task: int = 10) -> list[Finding]:
    """A model: the response to its condition by noise level, its embeddings, and its response to guidance.

    run: the folder of the run, or its `model/`. Raises DataError where the data of the run cannot be found.
    """
    weights = _weights(pipeline.model)
    if pipeline.model.conditioner is None:
        return [weights, Finding("condition", "ok", "this model takes none")]
    images, fields = _examples(run)
    if weights.state == "fault":
        return [weights]
    findings = [weights, _gap(pipeline, images, fields), _embeddings(pipeline.model, fields)]
    response = _guidance(pipeline, per_task)
    return [*findings, response] if response else findings


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    seen = f"{torch.__version__} ({built}), threads: {torch.get_num_threads()} of {os.cpu_count()} cores"
    if built == "CPU only" and shutil.which("nvidia-smi"):
        advice = "there is an NVIDIA driver, but this build cannot use it: install torch for CUDA (pytorch.org)"
        return Finding("torch", "warning", seen, advice)
    return Finding("torch", "ok", seen)


def _devices() -> list[Finding]:
    if torch.cuda.is_available():
        shown = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [Finding("device", "ok", f"{one.name}, {one.total_memory / 2**30:.0f} GiB") for one in shown]
    if torch.accelerator.is_available():
        return [Finding("device", "ok", str(torch.accelerator.current_accelerator()))]
    advice = "" if torch.version.cuda is None else "torch has CUDA but reaches no GPU: look at the driver (nvidia-smi)"
    return [Finding("device", "warning" if advice else "ok", "cpu only", advice)]


def _precision() -> Finding:
    if torch.cuda.is_available():
        fine = torch.cuda.is_bf16_supported()
        return Finding(
            "bf16", "ok" if fine else "warning", "supported" if fine else "emulated", "" if fine else "precision=fp16"
        )
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    if any(flag in flags for flag in ("avx512_bf16", "amx_bf16")):
        return Finding("bf16", "ok", "in hardware")
    return Finding("bf16", "warning", "this CPU has no bf16 arithmetic", "precision=fp32 is faster here")


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, and not needed")
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # what is found here
    command = [sys.executable, "-c", "import torchvision"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, env=paths)
    if tried.returncode == 0:
        return Finding("torchvision", "ok", "installed, not needed")
    last = tried.stderr.strip().splitlines()[-1] if tried.stderr.strip() else "it fails"
    return Finding(
        "torchvision", "warning", f"broken: {last}", "sfumato never imports it, others may: pip uninstall torchvision"
    )


def _disk(folder: Path) -> Finding:
    free = files.free_space(folder) / 2**30
    return Finding(
        "disk",
        "ok" if free > 5 else "warning",
        f"{free:.0f} GiB free",
        "" if free > 5 else "free some: checkpoints need room",
    )


def _compiler() -> Finding:
    found = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if found or torch.cuda.is_available():
        return Finding("compiler", "ok", f"{found or 'triton'}: compile=true can be used")
    return Finding("compiler", "warning", "no C++ compiler", "compile=false, or install g++")


def _weights(model: Model) -> Finding:
    """Whether every weight is a number."""
    broken = [name for name, value in model.weights().items() if not bool(value.isfinite().all())]
    if broken:
        advice = "an earlier checkpoint, then a smaller optim.lr, or precision=bf16 in place of fp16"
        return Finding("weights", "fault", f"not finite: {', '.join(broken[:3])}, {len(broken)} in all", advice)
    return Finding("weights", "ok", f"{sum(value.numel() for value in model.weights().values()):,}, all finite")


def _examples(run: Path) -> tuple[Tensor, list[Fields]]:
    """Some of the pictures the run was trained on."""
    dataset = run_data(run)
    if dataset is None:
        raise DataError(
            "a model alone does not tell its data",
            where=str(run),
            seen="no config.yaml",
            fix="sfumato doctor RUN, the folder with config.yaml",
        )
    some = indices(0, min(EXAMPLES, len(dataset)), len(dataset), 0)  # from everywhere: folders lie class by class
    images, fields = dataset.batch(some.tolist())
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, list(fields)


def _gap(pipeline: Pipeline, images: Tensor, fields: Sequence[Fields]) -> Finding:
    """How much smaller the error is with the prompt than without, by noise level."""
    shares = _shares(pipeline, images, fields)
    said = ", ".join(f"{round(100 * share)}% at t={time:g}" for time, share in shares.items())
    seen = f"error lower by {said}"
    if max(shares.values()) < 0.02:
        advice = (
            "the prompt is ignored: train longer, check that captions say what pictures show, lower condition_dropout"
        )
        return Finding("prompt against none", "fault", seen, advice)
    if shares[0.9] < 0.02:
        advice = (
            "the prompt does not shape the layout: more of high noise, objective.times={kind: logit_normal, mean: 1}"
        )
        return Finding("prompt against none", "warning", seen, advice)
    return Finding("prompt against none", "ok", seen)


def _shares(pipeline: Pipeline, images: Tensor, fields: Sequence[Fields]) -> dict[float, float]:
    """For each time, 1 - (square error with the prompt) / (square error without)."""
    model, device = pipeline.model, pipeline.device
    path, rng = model.denoiser.path, torch.Generator().manual_seed(0)
    shares = {}
    with torch.inference_mode():
        x0 = model.codec.encode(images.to(device))
        kept = () if model.conditioner is None else model.conditioner.kept
        conds = [model.cond(raw) for raw in (fields, [silent(one, kept) for one in fields])]
        for time in TIMES:
            t = torch.full((len(x0),), time, device=device)
            x_t = noised(path, x0, torch.randn(x0.shape, generator=rng).to(device), along(t, x0).flatten())
            given, null = (float((model(x_t, t, cond) - x0).square().mean()) for cond in conds)
            shares[time] = 1 - given / null
    return shares


def _embeddings(model: Model, fields: Sequence[Fields]) -> Finding:
    """How alike different prompts are to the network."""
    distinct = list({str(sorted(one.items(), key=str)): one for one in model.known(fields)}.values())
    if len(distinct) < 2:
        return Finding("embeddings", "warning", "all captions looked at are the same", "captions that say what differs")
    with torch.inference_mode():
        cond = model.cond(distinct)
    told = cond.get("context", cond.get("pooled"))
    if told is None:
        return Finding("embeddings", "ok", "labels have one each")
    rows = torch.nn.functional.normalize(told.flatten(1).float(), dim=1)
    alike = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]
    mean, most = float(alike.mean()), float(alike.max())
    seen = f"cosine between {len(distinct)} prompts {mean:.2f} on average, {most:.3f} at most"
    if mean > 0.98:
        return Finding(
            "embeddings", "fault", seen, "collapsed: a smaller optim.lr, a longer optim.warmup, another seed"
        )
    return Finding("embeddings", "ok", seen)


def _guidance(pipeline: Pipeline, per_task: int) -> Finding | None:
    """The scene score at several scales; nothing for models that do not know the words of scenes."""
    try:
        check(pipeline.model)
    except (ConfigError, DataError):
        return None
    used = pipeline.settings().scale
    scores = {
        scale: evaluate(pipeline, per_task=per_task, held_out=0, guidance=scale).as_dict()["overall"]
        for scale in sorted({*SCALES, used})
    }
    return response(scores, used)


def response(scores: Mapping[float, float], used: float) -> Finding:
    """What the scores at some scales of guidance, 1 among them, say of the one that is used."""
    best = max(scores, key=lambda scale: scores[scale])
    seen = ", ".join(f"{score:.2f} at {scale:g}" for scale, score in scores.items()) + f" (used: {used:g})"
    if scores[best] < 0.05:
        return Finding("guidance", "warning", seen, "no scale makes it follow prompts yet: train longer")
    if scores[1.0] < 0.9 and scores[best] <= scores[1.0] + 0.02:
        return Finding("guidance", "warning", seen, "guidance does not help: is condition_dropout above 0?")
    if scores[best] > scores[used] + 0.08:
        return Finding("guidance", "warning", seen, f"sampling.guidance={best:g} follows prompts better")
    return Finding("guidance", "ok", seen)
