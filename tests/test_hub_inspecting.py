"""Inspecting a repository of the hub: headers are fetched, in ranges of bytes, and no weights."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from hubs import Online, cached, empty, refusing, small, unpacked
from sfumato.errors import CheckpointError, MachineError
from sfumato.io.directory import save_model, write_weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty(tmp_path, monkeypatch)


class Ranges:
    """A server of a snapshot's files that gives out ranges of bytes, and writes down what it gave."""

    def __init__(self, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[tuple[str, int]] = []
        self.given = given

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is http.server's
                name = self.path.partition("/resolve/")[2].partition("/")[2]
                data = (snapshot / name).read_bytes() if (snapshot / name).is_file() else None
                if data is None:
                    self.send_error(404)
                    return
                first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1]
                given.append((name, len(part)))
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{self.server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", place)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Ranges]]:
    made: list[Ranges] = []

    def serve(snapshot: Path) -> Ranges:
        made.append(Ranges(snapshot, monkeypatch))
        return made[-1]

    yield serve
    for one in made:
        one.server.shutdown()
        one.server.server_close()


Serve = Callable[[Path], Ranges]


def without_place(said: Any) -> Any:
    return {name: value for name, value in said.items() if name != "path"}


def test_of_a_pipeline_only_headers_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch, ranges: Serve) -> None:
    from sfumato.io.inspect import inspected

    big = {f"a.{i}.weight": torch.zeros(128, 128) for i in range(40)}  # of 2.6 MB
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}

    def files(made: Path) -> None:
        for name, said in (
            ("model_index.json", {"_class_name": "DDPMPipeline", **index, "tokenizer": ["transformers", "X"]}),
            ("unet/config.json", {"_class_name": "UNet2DModel"}),
            ("unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}}),
            ("scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}),
            ("tokenizer/vocab.json", {"large": 1}),
        ):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(json.dumps(said))
        stem = made / "unet/diffusion_pytorch_model"
        write_weights(stem.with_name(f"{stem.name}-00001-of-00002.safetensors"), big)
        write_weights(stem.with_name(f"{stem.name}-00002-of-00002.safetensors"), {"b.weight": torch.zeros(7, 3)})

    snapshot = cached(cache, "them/ddpm", files)
    here = inspected(snapshot)
    online, server = Online(monkeypatch, snapshot), ranges(snapshot)
    there = inspected("them/ddpm")
    assert without_place(there) == without_place(here) and there["path"] == "them/ddpm"
    assert there["parts"]["unet"]["parameters"] == 40 * 128 * 128 + 21 and there["missing"] == []
    assert not any(name.endswith((".safetensors", "vocab.json")) for name in online.fetched)
    assert [name for name, _ in sorted(server.given)] == [
        f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    assert sum(n for _, n in server.given) < 110_000


def test_of_a_single_file_a_long_header_is_fetched_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch, ranges: Serve
) -> None:
    from sfumato.io.inspect import as_text, inspected

    state = {
        f"lora_unet_{'x' * 60}_{i}.lora_{way}.weight": torch.zeros(2, 2) for i in range(800) for way in ("down", "up")
    }
    snapshot = cached(cache, "you/lora", lambda made: write_weights(made / "style.safetensors", state))
    here = inspected(snapshot / "style.safetensors")
    Online(monkeypatch, snapshot)
    server = ranges(snapshot)
    there = inspected("you/lora")
    assert without_place(there) == without_place(here) and there["kind"] == "LoRA" and there["modules"] == 800
    assert len(server.given) == 2 and "LoRA" in as_text(there)


def test_of_a_model_of_ours_and_of_pickles(cache: Path, monkeypatch: pytest.MonkeyPatch, ranges: Serve) -> None:
    from sfumato.io.inspect import as_text, inspected

    snapshot = cached(cache, "me/mine", lambda made: save_model(made / "x", small(), {}) or unpacked(made))
    here = inspected(snapshot)
    Online(monkeypatch, snapshot)
    server = ranges(snapshot)
    assert without_place(inspected("me/mine")) == without_place(here)
    assert [name for name, _ in server.given] == ["model.safetensors"]
    other = cached(cache, "me/old", lambda made: torch.save({"a": torch.zeros(3)}, made / "old.ckpt"))
    online, server = Online(monkeypatch, other), ranges(other)
    said = inspected("me/old")
    assert said["unread"] == "a pickle has no header to fetch" and online.fetched == [] and server.given == []
    assert "no header" in as_text(said)


def test_what_cannot_be_fetched_is_inspected_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.io.inspect import inspected

    snapshot = cached(cache, "me/mine", lambda made: save_model(made / "x", small(), {}) or unpacked(made))
    assert inspected("me/mine") == inspected(snapshot)
    refusing(monkeypatch, errors.GatedRepoError)
    with pytest.raises(CheckpointError, match="accept its terms"):
        inspected("me/mine")


def test_a_header_that_is_none_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, ranges: Serve) -> None:
    from sfumato.io.inspect import inspected

    snapshot = cached(cache, "me/bad", lambda made: (made / "a.safetensors").write_bytes(b"\x09" * 40))
    Online(monkeypatch, snapshot)
    ranges(snapshot)
    with pytest.raises(CheckpointError, match=r"me/bad/a\.safetensors"):
        inspected("me/bad")
    (snapshot / "a.safetensors").unlink()
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *_, **__: SimpleNamespace(siblings=[SimpleNamespace(rfilename="a.safetensors")]),
    )
    with pytest.raises(MachineError, match="hf download me/bad"):
        inspected("me/bad")
