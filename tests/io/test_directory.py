"""The model directory: what goes in comes out to the bit, and what was damaged or cannot be trusted stays out."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import FACTS, edited, made, refused, spec
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sfumato
from sfumato import files
from sfumato.errors import CheckpointError, SfumatoError
from sfumato.io.directory import load_model, save_model
from sfumato.model import build_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", made(), FACTS)
    return tmp_path / "model"


# Out and back


def test_a_model_comes_back_to_the_bit(saved: Path) -> None:
    first, again = made(), load_model(saved)
    assert again.weights().keys() == first.weights().keys()
    assert all(torch.equal(value, first.weights()[name]) for name, value in again.weights().items())
    assert again.spec == first.spec and again.facts == FACTS
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    x, said = torch.randn(2, 3, 8, 12), [{"label": 2, "caption": "a red circle"}, {}]
    first.eval()
    with torch.no_grad():
        assert torch.equal(again(x, 0.5, again.cond(said)), first(x, 0.5, first.cond(said)))


def test_a_directory_is_plain_files(saved: Path) -> None:
    names = {"model.json", "model.safetensors", "0.labels.json", "1.tokenizer.json", files.MANIFEST}
    assert {path.name for path in saved.iterdir()} == names
    said = json.loads((saved / "model.json").read_text())
    assert (said["format"], said["version"], said["facts"]) == ("sfumato", 1, FACTS)
    assert said["files"] == ["0.labels.json", "1.tokenizer.json"]
    assert {key: said[key] for key in spec()} == spec()


def test_saving_again_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "again", load_model(saved), FACTS)
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_older_model_gives_way(saved: Path) -> None:
    save_model(saved, made(1), {"steps": 8})
    again = load_model(saved)
    assert again.facts == {"steps": 8}
    assert all(torch.equal(value, made(1).weights()[name]) for name, value in again.weights().items())
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_other_weights_than_the_models_own(tmp_path: Path) -> None:
    model = made()
    average = {name: value + 1 if value.is_floating_point() else value for name, value in model.weights().items()}
    save_model(tmp_path / "model", model, {}, average)
    assert all(torch.equal(value, average[name]) for name, value in load_model(tmp_path / "model").weights().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made()
    save_model(tmp_path / "model", model, {}, dtype=dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    for name, value in load_model(tmp_path / "model").weights().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.weights()[name].to(dtype).float())


def test_loading_leaves_the_callers_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    load_model(saved)
    assert torch.equal(torch.rand(3), want)


def test_models_without_conditions_have_no_files(tmp_path: Path) -> None:
    save_model(tmp_path / "model", made(conditioner=None), {})
    assert load_model(tmp_path / "model").conditioner is None
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.json", "model.safetensors", files.MANIFEST}


def test_every_network_and_condition_comes_back(tmp_path: Path) -> None:
    nets = (
        {"kind": "unet", "channels": [8, 16], "blocks": 1, "attention": [0, 1], "head": 8, "text": "joint"},
        {
            "kind": "dit",
            "patch": 2,
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "text": "cross",
            "adaln": "shared",
            "skips": True,
        },
    )
    for i, net in enumerate(nets):
        for j, conditioner in enumerate(({"kind": "labels", "classes": 2}, {"kind": "prompts", "dim": 8, "heads": 2})):
            first, folder = made(net=net, conditioner=conditioner).eval(), tmp_path / f"{i}{j}"
            save_model(folder, first, {})
            again, x = load_model(folder), torch.randn(1, 3, 8, 12)
            with torch.no_grad():
                assert torch.equal(again(x, 0.3, again.cond([{}])), first(x, 0.3, first.cond([{}])))


def test_the_public_door(saved: Path, tmp_path: Path) -> None:
    """A model's folder or its run's; anything else is named."""
    for path in (saved, tmp_path, str(saved)):
        assert sfumato.load(path, "cpu").model.facts == FACTS
    with pytest.raises(SfumatoError) as caught:
        sfumato.load(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere")


# Damage


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "0.labels.json", "1.tokenizer.json"])
def test_whatever_was_altered_is_named(saved: Path, name: str) -> None:
    path, whole = saved / name, (saved / name).read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:-1])
    assert str(path) in (str(refused(saved).where))
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert str(path) in str(refused(saved).where)
    path.unlink()
    assert (str(path) if name != "model.json" else str(saved)) == str(refused(saved).where)
    path.write_bytes(whole)
    load_model(saved)


def test_a_directory_without_a_manifest_was_never_finished(saved: Path) -> None:
    (saved / files.MANIFEST).unlink()
    assert refused(saved).what == "a folder was never finished"


def test_weights_that_do_not_fit_are_all_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["net.surplus"] = torch.zeros(1)
    del weights["net.head.out.bias"]
    weights["net.patches.weight"] = torch.zeros(2, 3)
    weights["conditioner.parts.1.place"] = torch.zeros(4)
    save_file(weights, saved / "model.safetensors")
    files.seal(saved)
    error = refused(saved)
    assert error.what.endswith("in 4 places") and error.where == str(saved)
    assert error.seen == "; ".join(
        [
            "conditioner.parts.1.place is [4], not [4, 8]",
            "net.head.out.bias is missing",
            "net.patches.weight is [2, 3], not [16, 48]",
            "net.surplus is unknown",
        ]
    )


def test_weights_that_are_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ???")
    files.seal(saved)
    assert refused(saved).where == str(saved / "model.safetensors")


# Descriptions


def test_a_newer_format_says_what_to_do(saved: Path) -> None:
    edited(saved, lambda said: said.update(version=2))
    error = refused(saved)
    assert "newer" in error.what and "upgrade" in str(error.fix) and error.seen == "format 'sfumato', version 2"


@pytest.mark.parametrize(
    "change", [{"version": 0}, {"version": "1"}, {"format": "other"}, {"format": "other", "version": 2}]
)
def test_another_format_is_named(saved: Path, change: dict[str, Any]) -> None:
    edited(saved, lambda said: said.update(change))
    assert refused(saved).what == "a model of another kind"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"sfumato"', "[" * 100_000, "\ud800"])
def test_a_description_that_is_none(saved: Path, text: str) -> None:
    (saved / "model.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refused(saved).where == str(saved / "model.json")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert refused(path).what == "this is no model directory"


def test_a_models_files_lie_beside_it(saved: Path) -> None:
    for name in ("../secret", "/etc/passwd", "a/b", ".."):
        edited(saved, lambda said, name=name: said.update(files=[name]))  # type: ignore[misc]
        assert isinstance(refused(saved), CheckpointError)


def test_the_problems_of_a_description_are_all_named(saved: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        said["model"]["net"]["depht"] = 3
        said["model"]["path"]["kind"] = "straight"
        said["sampling"]["sampler"] = {"kind": "ddim", "eta": "much"}

    edited(saved, change)
    for name in ("model.net.depht", "model.path", "straight", "sampling.sampler.eta"):
        assert name in str(refused(saved).seen)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data, by its keys."""
    if here:
        yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*here, key))


def test_no_description_is_answered_with_anything_but_an_error_of_ours(saved: Path) -> None:
    """Each value of a description replaced by each of these, or taken away: it loads, or it is refused in words."""
    whole = json.loads((saved / "model.json").read_text())
    loaded, kept = 0, (saved / "model.json").read_bytes()
    for i, place in enumerate(places(whole)):
        for j, other in enumerate((None, 0, -1, "", [], {}, True, float("inf"), "os:system", ...)):
            if (i + j) % 2:  # half of them are enough
                continue
            said = copy.deepcopy(whole)
            inner = said
            for key in place[:-1]:
                inner = inner[key]
            if other is ...:
                del inner[place[-1]]
            else:
                inner[place[-1]] = other
            (saved / "model.json").write_text(json.dumps(said))
            files.seal(saved)
            try:
                load_model(saved)
                loaded += 1
            except SfumatoError:
                pass
    assert loaded > 0  # a default was left out, a fact changed
    (saved / "model.json").write_bytes(kept)


def test_a_vocabulary_of_another_model_does_not_fit(saved: Path, tmp_path: Path) -> None:
    class More:
        def captions(self) -> Iterator[str]:
            yield "a b c d e f g"

    torch.manual_seed(0)
    save_model(tmp_path / "other", build_model(spec(), More()), {})
    (saved / "1.tokenizer.json").write_bytes((tmp_path / "other" / "1.tokenizer.json").read_bytes())
    files.seal(saved)
    assert "conditioner.parts.1.table.weight" in str(refused(saved).seen)


def test_every_tensor_of_a_model_is_stored(tmp_path: Path) -> None:
    """Buffers too; nothing is stored that is not a weight or a buffer."""
    model = made()
    model.net.register_buffer("scale", torch.full((3,), 2.0))
    save_model(tmp_path / "model", model, {})
    stored: dict[str, Tensor] = load_file(tmp_path / "model" / "model.safetensors")
    named = {f"net.{name}" for name, _ in model.net.named_parameters()} | {"net.scale"}
    assert isinstance(model.conditioner, nn.Module)
    assert stored.keys() == named | {f"conditioner.{name}" for name, _ in model.conditioner.named_parameters()}
