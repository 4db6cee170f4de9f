"""The doctor, on machines and models whose illness is known."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from sfumato import doctor, files
from sfumato.codecs import Pixels
from sfumato.conditioners import Conditioner, Raw
from sfumato.denoiser import Cond, Denoiser
from sfumato.doctor import TIMES, Finding, environment, of_run, response
from sfumato.errors import DataError
from sfumato.model import Model
from sfumato.paths import Linear
from sfumato.pipeline import Pipeline, load
from sfumato.predictions import X0

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def found(findings: Sequence[Finding], name: str) -> Finding:
    return next(one for one in findings if one.name == name)


# the machine


def test_the_machine_is_described(tmp_path: Path) -> None:
    findings = environment(tmp_path)
    assert [one.name for one in findings] == ["python", "torch", "device", "bf16", "torchvision", "disk", "compiler"]
    assert all(one.seen for one in findings) and all(one.advice for one in findings if one.state != "ok")
    assert torch.__version__ in found(findings, "torch").seen


def torchvision(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What is found of a torchvision with this code in the first place of the module path."""
    package = folder / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(folder / "site"))
    return found(environment(folder), "torchvision")


def test_a_broken_torchvision_is_named_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    finding = torchvision(tmp_path, code, monkeypatch)
    assert finding.state == "warning"
    assert finding.seen == "broken: RuntimeError: operator torchvision::nms does not exist"
    assert "pip uninstall torchvision" in finding.advice
    assert "torchvision" not in sys.modules  # looked at from outside: here it would break imports


def test_a_torchvision_that_crashes_the_interpreter_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = torchvision(tmp_path, "import os; os.abort()", monkeypatch)
    assert finding.state == "warning" and finding.seen.startswith("broken: ")


def test_a_whole_torchvision_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchvision(tmp_path, "", monkeypatch) == Finding("torchvision", "ok", "installed, not needed")


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((2 * 2**30, "warning"), (100 * 2**30, "ok")):
        monkeypatch.setattr(files, "free_space", lambda path, free=free: free)
        finding = found(environment(tmp_path), "disk")
        assert (finding.state, finding.seen) == (state, f"{free // 2**30} GiB free")


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "compile=false" in found(environment(tmp_path), "compiler").advice
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert found(environment(tmp_path), "compiler").state == "ok"


def test_a_build_for_the_cpu_beside_a_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    finding = found(environment(tmp_path), "torch")
    assert finding.state == "warning" and "CUDA" in finding.advice


def test_a_build_for_cuda_without_a_device_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    finding = found(environment(tmp_path), "device")
    assert finding.state == "warning" and "nvidia-smi" in finding.advice


# a model


class Words(Conditioner):
    """A colour's name as its RGB values in [-1, 1]; nothing as grey. alike: how much of what differs is left out."""

    fields = ("caption",)

    def __init__(self, alike: float) -> None:
        super().__init__()
        self.alike = alike

    def forward(self, raw: Sequence[Raw]) -> Cond:
        rows = [
            [v / 127.5 - 1 for v in COLOURS[str(one["caption"])]] if one.get("caption") else [0.0] * 3 for one in raw
        ]
        context = torch.tensor(rows)[:, None]
        told = self.alike * torch.ones_like(context) + (1 - self.alike) * context
        return {"context": told if self.alike else context}

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            if one.get("caption") not in COLOURS:
                raise DataError("a word this model has never seen", seen=str(one.get("caption")))


class Listener(nn.Module):
    """Predicts a flat picture of `share` of the colour it is told, at times up to `until`, and grey after that."""

    def __init__(self, share: float, until: float = 1.0) -> None:
        super().__init__()
        self.share, self.until = nn.Parameter(torch.tensor(share)), until

    def forward(self, x: Tensor, t: Tensor, *, context: Tensor) -> Tensor:
        told = self.share * context.mean(1)[:, :, None, None].expand_as(x)
        return torch.where(t[:, None, None, None] <= self.until, told, torch.zeros_like(x))


class Case(NamedTuple):
    run: Path
    pipeline: Pipeline


@pytest.fixture
def case(tmp_path: Path) -> Any:
    """A run on a folder of flat colours, class by class, and a model that listens so far."""

    def made(
        share: float,
        until: float = 1.0,
        alike: float = 0.0,
        conditioner: bool = True,
        words: Sequence[str] = tuple(COLOURS),
    ) -> Case:
        pictures = tmp_path / "pictures"
        for word in words:
            (pictures / word).mkdir(parents=True)
            for i in range(30):
                Pillow.new("RGB", (8, 8), COLOURS[word]).save(pictures / word / f"{i}.png")
        (tmp_path / "config.yaml").write_text(f"data: {{kind: folder, path: '{pictures}', size: 8}}\n")
        denoiser = Denoiser(Listener(share, until), Linear(), X0)
        spec = {
            "model": {},
            "size": [8, 8],
            "sampling": {"sampler": "ddim", "grid": "linear", "steps": 1, "guidance": 1.0},
        }
        model = Model(denoiser, Words(alike) if conditioner else None, Pixels(), spec)
        return Case(tmp_path, Pipeline(model, "cpu"))

    return made


@pytest.mark.parametrize("share", [0.5, 1.0, 0.1])
def test_the_gap_is_what_it_is(case: Any, share: float) -> None:
    """A model that says `share` of the truth errs by (1 - share)^2 of what grey errs by: the gap is known."""
    finding = found(of_run(*case(share)), "prompt against none")
    percent = round(100 * (1 - (1 - share) ** 2))
    assert finding.state == "ok"
    assert finding.seen == "error lower by " + ", ".join(f"{percent}% at t={t:g}" for t in TIMES)


def test_a_model_that_does_not_listen_is_at_fault(case: Any) -> None:
    finding = found(of_run(*case(0.0)), "prompt against none")
    assert finding.state == "fault" and "0% at t=0.9" in finding.seen and "-0%" not in finding.seen
    assert "condition_dropout" in finding.advice


def test_a_model_that_listens_only_to_details_is_warned_of(case: Any) -> None:
    finding = found(of_run(*case(1.0, until=0.6)), "prompt against none")
    assert finding.state == "warning" and "100% at t=0.5, 0% at t=0.7" in finding.seen
    assert "logit_normal" in finding.advice


def test_embeddings_that_are_told_apart(case: Any) -> None:
    # Red, green and blue lie at -1/3 of one another, and white at -1/sqrt(9) of each: by hand, -1/3 on average.
    finding = found(of_run(*case(1.0)), "embeddings")
    assert finding.state == "ok" and finding.seen == "cosine between 4 prompts -0.33 on average, -0.333 at most"


def test_collapsed_embeddings_are_a_fault(case: Any) -> None:
    finding = found(of_run(*case(1.0, alike=0.99)), "embeddings")
    assert finding.state == "fault" and finding.advice.startswith("collapsed")


def test_captions_that_are_all_the_same_are_told(case: Any) -> None:
    finding = found(of_run(*case(1.0, words=["red"])), "embeddings")
    assert finding.state == "warning" and "all captions" in finding.seen


def test_weights_that_are_no_numbers_end_the_examination(case: Any) -> None:
    findings = of_run(*case(float("nan")))
    assert [one.name for one in findings] == ["weights"]
    assert (
        findings[0].state == "fault" and "net.share" in findings[0].seen and "earlier checkpoint" in findings[0].advice
    )


def test_a_model_without_conditions_has_nothing_to_listen_to(case: Any) -> None:
    findings = of_run(*case(1.0, conditioner=False))
    assert [(one.name, one.state) for one in findings] == [("weights", "ok"), ("condition", "ok")]


def test_guidance_is_asked_of_scenes_alone(case: Any) -> None:
    assert "guidance" not in [one.name for one in of_run(*case(1.0))]


def test_a_model_alone_does_not_tell_its_data(case: Any) -> None:
    run, pipeline = case(1.0)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match="does not tell its data"):
        of_run(run, pipeline)


@pytest.mark.parametrize(
    ("scores", "used", "state", "advice"),
    [
        ({1.0: 0.40, 2.0: 0.60, 4.0: 0.65, 7.0: 0.60}, 4.0, "ok", ""),
        ({1.0: 0.40, 2.0: 0.60, 4.0: 0.65, 7.0: 0.60}, 2.0, "ok", ""),  # within chance of the best
        ({1.0: 0.40, 2.0: 0.60, 4.0: 0.65, 7.0: 0.50}, 7.0, "warning", "sampling.guidance=4 follows prompts better"),
        ({1.0: 0.40, 2.0: 0.60, 4.0: 0.65, 7.0: 0.50}, 1.0, "warning", "sampling.guidance=4 follows prompts better"),
        (
            {1.0: 0.40, 2.0: 0.41, 4.0: 0.30, 7.0: 0.10},
            2.0,
            "warning",
            "guidance does not help: is condition_dropout above 0?",
        ),
        ({1.0: 0.97, 2.0: 0.98, 4.0: 0.98, 7.0: 0.90}, 2.0, "ok", ""),  # no help needed
        (
            {1.0: 0.00, 2.0: 0.02, 4.0: 0.00, 7.0: 0.00},
            2.0,
            "warning",
            "no scale makes it follow prompts yet: train longer",
        ),
    ],
)
def test_the_response_to_guidance(scores: dict[float, float], used: float, state: str, advice: str) -> None:
    finding = response(scores, used)
    assert (finding.state, finding.advice) == (state, advice)
    assert f"{scores[4.0]:.2f} at 4" in finding.seen and finding.seen.endswith(f"(used: {used:g})")


def test_a_real_run_is_examined_whole(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def judged(pipeline: Pipeline, *, guidance: float, **options: Any) -> Any:
        asked.append(guidance)
        assert options == {"per_task": 2, "held_out": 0}

        class Report:
            def as_dict(self) -> dict[str, float]:
                return {"overall": 0.5 if guidance == 3 else 0.3}

        return Report()

    monkeypatch.setattr(doctor, "evaluate", judged)
    for folder in (tiny_run, tiny_run / "model"):
        findings = of_run(folder, load(folder, "cpu"), per_task=2)
        assert [one.name for one in findings] == ["weights", "prompt against none", "embeddings", "guidance"]
        assert found(findings, "guidance").state == "ok"
        assert found(findings, "prompt against none").state == "fault"  # a model of twenty steps
    assert asked == [1.0, 2.0, 3.0, 4.0, 7.0] * 2  # its own scale among the others
