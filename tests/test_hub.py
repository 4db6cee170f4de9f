"""The hub as a place of models: its cache as it lies on a disk, read offline by its own library; what is fetched online
is told by a library whose two calls are faked.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import errors

import sfumato
from hubs import SHA, Online, cached, empty, refusing, small, unpacked
from sfumato import hub
from sfumato.cli import main
from sfumato.errors import CheckpointError, ConfigError, MachineError
from sfumato.hub import Place, located, needed, place_of
from sfumato.io.directory import load_model, save_model, write_weights
from sfumato.train.start import read_start


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty(tmp_path, monkeypatch)


# Names


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", Place("org/name")),
        ("org/name@v1.0", Place("org/name", "v1.0")),
        ("hf://org/name@refs%2Fpr%2F1", Place("org/name", "refs/pr/1")),
        ("org/name/unet", Place("org/name", None, "unet")),
        ("hf://org/name/a/b.safetensors", Place("org/name", None, "a/b.safetensors")),
        (Path("hf://org/name"), Place("org/name")),
        ("/org/name", None),
        ("./org/name", None),
        ("~/org/name", None),
        ("name", None),
        ("org/../name", None),
        ("runs/quickstart", None),
        ("models/sd15", None),
        ("here/name", None),
    ],
    ids=str,
)
def test_what_is_a_name_of_the_hub(cache: Path, text: str | Path, place: Place | None) -> None:
    Path("here").mkdir()
    assert place_of(text) == place
    if place is None:
        assert located(text) == Path(text).expanduser()


def test_a_path_that_is_there_is_that_path_but_for_the_scheme(cache: Path) -> None:
    Path("org/name").mkdir(parents=True)
    assert place_of("org/name") is None and located("org/name") == Path("org/name")
    assert place_of("hf://org/name") == Place("org/name")
    with pytest.raises(ConfigError, match="no name of the hub"):
        place_of("hf://name")


# What is fetched

PIPELINE = [
    "model_index.json",
    "README.md",
    ".gitattributes",
    "sd_xl.safetensors",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/openvino/model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_flax_model.msgpack",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "scheduler/scheduler_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
]
PARTS = {
    name: ["diffusers", "X"]
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
} | {"_class_name": "StableDiffusionPipeline", "image_encoder": [None, None]}


def test_of_a_pipeline_each_weight_is_fetched_once() -> None:
    assert sorted(needed(PIPELINE, PARTS)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert sorted(needed(PIPELINE, PARTS, only=("vae",))) == [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]


def test_of_shards_and_variants_one_copy_is_fetched() -> None:
    stem = "diffusion_pytorch_model"
    full = [
        f"{stem}.safetensors.index.json",
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
    ]
    half = [f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16-00001-of-00001.safetensors"]
    old = [f"{stem}.safetensors.index.fp16.json", f"{stem}-00001-of-00001.fp16.safetensors"]
    assert sorted(needed(["config.json", *full, *half])) == sorted(["config.json", *full])
    assert sorted(needed(["config.json", *half])) == sorted(["config.json", *half])
    assert sorted(needed(["config.json", *old])) == sorted(["config.json", *old])


def test_of_other_repositories() -> None:
    ours = ["model.json", "model.safetensors", "MANIFEST.json", "tokenizer.json", "samplers/8.json"]
    assert needed([*ours, "README.md", ".gitattributes", "sheet.png", "old/model.safetensors"]) == ours
    lora = "pytorch_lora_weights.safetensors"
    assert needed([lora, "README.md", "a.png"]) == [lora]
    peft = ["adapter_config.json", "adapter_model.safetensors"]
    assert needed([*peft, "adapter_model.bin", "README.md"]) == peft
    both = [f"{part}/{name}" for part in ("transformer", "text_encoder") for name in peft]
    assert needed([*both, "README.md"]) == both
    google = ["model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.bin"]
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    assert needed([*google, "images/1.png"], index) == google
    assert needed(["v1.safetensors", "v1.ckpt", "README.md"]) == ["v1.safetensors"]
    with pytest.raises(ConfigError, match=r"several(.|\n)*hf://o/n/a.safetensors"):
        needed(["a.safetensors", "b.safetensors"], None, "o/n")
    with pytest.raises(CheckpointError, match="no model"):
        needed(["README.md"], None, "o/n")


# Reading


def test_a_model_directory_is_read_offline_from_the_cache(cache: Path) -> None:
    model = small()
    place = cached(cache, "me/mine", lambda made: save_model(made / "x", model, {}) or unpacked(made))
    assert located("me/mine") == place and located(f"me/mine@{SHA}") == place
    save_model(Path("local"), model, {})
    here, there = sfumato.load("local", "cpu"), sfumato.load("me/mine", "cpu")
    assert np.array_equal(here.sample([1, 2]).images, there.sample([1, 2]).images)
    assert read_start("me/mine").where == "me/mine"
    assert load_model(place).spec == model.spec


def test_a_revision_is_its_own(cache: Path) -> None:
    place = cached(cache, "me/mine", lambda made: (made / "model.json").write_text("{}"), revision="v2")
    assert located("me/mine@v2") == place
    with pytest.raises(MachineError, match=r"cannot be reached(.|\n)*me/mine(.|\n)*hf download me/mine"):
        located("me/mine")


def test_the_command_line_reads_and_writes_with_names(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(cache, "me/mine", lambda made: save_model(made / "x", small(), {}) or unpacked(made))

    def said(*words: str) -> Any:
        with pytest.raises(SystemExit) as left:
            main([*words, "--json"])
        out, err = capsys.readouterr()
        assert left.value.code == 0, err
        return json.loads(out)

    drawn = said("sample", "me/mine", "--condition", "label=3", "--device", "cpu", "-n", "2")
    assert [Path(one["path"]).parent for one in drawn["pictures"]] == [Path("pictures")] * 2
    assert said("inspect", "me/mine")["family"] == "dit"
    assert said("convert", "me/mine", "copy", "--to", "sfumato")["path"] == "copy"
    assert (Path("copy") / "model.json").is_file()
    with pytest.raises(SystemExit) as left:
        main(["tune-sampler", "me/mine", "--steps", "4"])
    assert left.value.code == 2 and "not written into" in capsys.readouterr().err


def test_parts_controls_and_adapters_have_names_too(cache: Path) -> None:
    from sfumato.io.pretrained import codec_from
    from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig

    diffusers = pytest.importorskip("diffusers")
    shape = AutoencoderConfig(channels=(32, 32), blocks=1, latent=4)
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=shape.channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )
    place = cached(cache, "them/vae", lambda made: theirs.save_pretrained(made))
    slot, state = codec_from({"kind": "latents", "weights": "them/vae"})
    assert slot["channels"] == [32, 32] and len(state) == len(Autoencoder(shape).state_dict())
    assert located("them/vae/config.json") == place / "config.json"


def test_a_file_of_adapters_is_found_offline(cache: Path, tmp_path: Path) -> None:
    from sfumato.adapters.reading import read_raw

    state = {"unet.a.to_q.lora_A.weight": torch.ones(2, 4), "unet.a.to_q.lora_B.weight": torch.ones(4, 2)}
    place = cached(cache, "you/lora", lambda made: write_weights(made / "style.safetensors", state))
    assert located("you/lora") == place / "style.safetensors" == located("hf://you/lora/style.safetensors")
    assert read_raw("you/lora").layers.keys() == {"unet.a.to_q"}
    with pytest.raises(CheckpointError, match="no such file or folder"):
        located("you/lora/other.safetensors")


def test_online_the_files_of_a_folder_of_diffusers_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(made: Path) -> None:
        for name in PIPELINE:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(json.dumps(PARTS) if name == hub.INDEX else "{}")

    snapshot = cached(cache, "them/sd", files)
    online = Online(monkeypatch, snapshot)
    assert located("them/sd") == snapshot
    assert sorted(set(online.fetched)) == sorted(needed(PIPELINE, PARTS))
    online.fetched.clear()
    assert located("them/sd/sd_xl.safetensors") == snapshot / "sd_xl.safetensors"
    assert online.fetched == ["sd_xl.safetensors"]
    online.fetched.clear()
    assert located("them/sd/vae") == snapshot / "vae"
    assert sorted(online.fetched) == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]


# Errors


@pytest.mark.parametrize(
    ("kind", "ours", "words"),
    [
        (errors.RepositoryNotFoundError, CheckpointError, "not|nor on the hub"),
        (errors.GatedRepoError, CheckpointError, "accept its terms at https://huggingface.co/me/mine"),
        (errors.RevisionNotFoundError, CheckpointError, "no such revision"),
        (errors.HFValidationError, ConfigError, "no such names"),
        (errors.OfflineModeIsEnabled, MachineError, "cannot be reached"),
        (TimeoutError, MachineError, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], ours: type[Exception], words: str
) -> None:
    refusing(monkeypatch, kind)
    with pytest.raises(ours, match=f"(?s){words}.*me/mine|me/mine.*{words}"):
        located("me/mine@x")


def test_without_the_library_a_name_says_so_and_paths_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    save_model(Path("local"), small(), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert sfumato.load("local", "cpu").model.size == (16, 16)
    with pytest.raises(MachineError, match=r"sfumato\[hub\]"):
        sfumato.load("me/mine", "cpu")


def test_a_run_that_is_not_there_is_not_looked_for_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, AssertionError)
    with pytest.raises(sfumato.errors.DataError, match="no such run or model"):
        sfumato.load("runs/nosuch", "cpu")
