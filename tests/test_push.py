"""Pushing: what is sent is what is read back, and what a card says is true. The hub is its own library with the calls
that change it faked: a commit lands in a cache, from which it is read offline.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

import hubs
import sfumato
from hubs import SHA, small
from sfumato import stored
from sfumato.cards import card
from sfumato.cli import main
from sfumato.errors import CheckpointError, ConfigError, MachineError
from sfumato.hub import located
from sfumato.io.directory import save_model, write_weights
from sfumato.io.tuned import save_tuned
from sfumato.push import Parcel, packed, push, stale


class Hub:
    """Repositories as snapshots in a cache."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.private = cache, dict[str, Any]()
        for name in ("create_repo", "list_repo_files", "create_commit", "revision_exists"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))

    def home(self, repo: str) -> Path:
        return self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / SHA

    def create_repo(self, repo: str, private: Any = None, exist_ok: bool = False) -> None:
        assert exist_ok
        self.private.setdefault(repo, private)
        self.home(repo).mkdir(parents=True, exist_ok=True)
        refs = self.home(repo).parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(SHA)

    def revision_exists(self, repo: str, revision: str) -> bool:
        return revision == "main"

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        home = self.home(repo)
        return sorted(one.relative_to(home).as_posix() for one in home.rglob("*") if one.is_file())

    def create_commit(self, repo: str, operations: Any, *, commit_message: str, revision: Any = None) -> Any:
        for one in operations:
            place = self.home(repo) / one.path_in_repo
            if isinstance(one, CommitOperationDelete):
                place.unlink()
                continue
            assert isinstance(one, CommitOperationAdd)
            place.parent.mkdir(parents=True, exist_ok=True)
            with one.as_file() as file:
                place.write_bytes(file.read())
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/{SHA}")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(hubs.empty(tmp_path, monkeypatch), monkeypatch)


def head(text: str) -> dict[str, Any]:
    """What a card says to machines."""
    _, front, _ = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert isinstance(said, dict)
    return said


def drawn(path: str) -> Any:
    return sfumato.load(path, "cpu").sample([1, 2], seeds=3).images


def test_a_model_directory_comes_back_as_it_was(there: Hub) -> None:
    save_model(Path("mine"), small(), {"steps": 7})
    with packed("mine", "me/mine", license="apache-2.0") as parcel:
        assert push(parcel, "me/mine", private=True) == f"https://huggingface.co/me/mine/commit/{SHA}"
    assert there.private == {"me/mine": True}
    assert np.array_equal(drawn("mine"), drawn("me/mine"))
    text = (located("me/mine") / "README.md").read_text()
    said = head(text)
    assert said["library_name"] == "sfumato" and said["license"] == "apache-2.0"
    assert said["pipeline_tag"] == "unconditional-image-generation" and {"dit", "flow-matching"} <= set(said["tags"])
    assert "sfumato sample me/mine --condition label=0" in text and "pipeline.sample(0)" in text
    assert '"steps": 7' in text and "--to diffusers" in text
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.library_name == "sfumato"  # their parser reads it


def test_a_run_is_pushed_as_its_model(there: Hub, tiny_run: Path) -> None:
    with packed(tiny_run, "me/tiny") as parcel:
        push(parcel, "me/tiny")
        assert head(parcel.card)["pipeline_tag"] == "text-to-image"
        assert parcel.files.keys() >= {"model.json", "model.safetensors", "MANIFEST.json"}
    assert sfumato.load("me/tiny", "cpu").model.facts["run"] == "tiny"


def test_new_weights_take_old_samplers_and_other_layouts_away(there: Hub) -> None:
    save_model(Path("a"), small(), {})
    save_tuned(Path("a"), 4, {"sampler": "ddim", "grid": "linear"}, {})
    save_model(Path("b"), small(1), {})
    with packed("a", "me/x") as parcel:
        push(parcel, "me/x")
    assert "samplers/4.json" in there.list_repo_files("me/x")
    (there.home("me/x") / "README.md").write_text("mine, by hand")
    (there.home("me/x") / "notes.txt").write_text("kept")
    with packed("b", "me/x") as parcel:
        push(parcel, "me/x")
    left = there.list_repo_files("me/x")
    assert "samplers/4.json" not in left and "notes.txt" in left
    assert (there.home("me/x") / "README.md").read_text() == "mine, by hand"
    assert np.array_equal(drawn("b"), drawn("me/x"))


def test_what_is_stale_is_what_would_be_read() -> None:
    here = Path("x")
    names = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors")
    sent = Parcel(dict.fromkeys(names, here), "", "diffusers")
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    kept = ["README.md", "vae/diffusion_pytorch_model.safetensors", "style.safetensors", "unet/other.safetensors"]
    old = ["model.json", "model.safetensors", "unet/diffusion_pytorch_model.bin", index, *shards]
    assert sorted(stale(sent, [*names, *kept, *old])) == sorted(old)
    assert stale(Parcel({stored.LORAS[0]: here}, "", "lora"), [*kept, *old]) == []


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    place = tmp_path_factory.mktemp("theirs") / "ddpm"
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(place)
    return place


def test_a_folder_of_diffusers_goes_as_it_is_or_in_our_layout(there: Hub, theirs: Path) -> None:
    from diffusers import DDPMPipeline

    with packed(theirs, "me/theirs") as parcel:
        push(parcel, "me/theirs")
        assert head(parcel.card)["library_name"] == "diffusers"
        assert 'DiffusionPipeline.from_pretrained("me/theirs")' in parcel.card
    again = DDPMPipeline.from_pretrained("me/theirs")  # their library reads it from the same cache
    assert again.unet.config.sample_size == 8
    with packed(theirs, "me/ours", to="sfumato") as parcel:
        push(parcel, "me/ours")
        assert "model.json" in parcel.files and head(parcel.card)["library_name"] == "sfumato"
    one = sfumato.load("me/theirs", "cpu").sample(steps=3).images
    assert np.array_equal(one, sfumato.load("me/ours", "cpu").sample(steps=3).images)
    with packed("me/ours", "me/back", to="diffusers") as parcel:
        push(parcel, "me/back")
    assert np.array_equal(one, sfumato.load("me/back", "cpu").sample(steps=3).images)


def test_an_adapter_is_found_by_its_repository(there: Hub, tmp_path: Path) -> None:
    from sfumato.adapters.reading import read_raw

    state = {"net.blocks.0.feed.up.lora_A.weight": torch.ones(2, 16)}
    state["net.blocks.0.feed.up.lora_B.weight"] = torch.ones(64, 2)
    write_weights(tmp_path / "style.safetensors", state, metadata={"sfumato.base": "them/base"})
    with packed(tmp_path / "style.safetensors", "me/style") as parcel:
        push(parcel, "me/style")
        said = head(parcel.card)
    assert said["base_model"] == "them/base" and said["base_model_relation"] == "adapter" and "lora" in said["tags"]
    assert 'load_lora_weights("me/style")' in parcel.card and "--lora me/style" in parcel.card
    assert there.list_repo_files("me/style") == ["README.md", "pytorch_lora_weights.safetensors"]
    assert read_raw("me/style").layers.keys() == {"net.blocks.0.feed.up"}
    with (
        pytest.raises(ConfigError, match="no layout of ours"),
        packed(tmp_path / "style.safetensors", "me/style", to="sfumato"),
    ):
        pass


def test_an_adapter_in_the_dialect_of_diffusers(there: Hub, tmp_path: Path) -> None:
    """kohya's file of Stable Diffusion's U-Net, told by its names and shapes alone."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{key}.lora_down.weight": torch.ones(2, 320), f"{key}.lora_up.weight": torch.ones(320, 2)}
    write_weights(tmp_path / "k.safetensors", {**state, f"{key}.alpha": torch.tensor(1.0)})
    with packed(tmp_path / "k.safetensors", "me/k", to="diffusers", base="them/sd") as parcel:
        from safetensors.torch import load_file

        found = load_file(parcel.files["pytorch_lora_weights.safetensors"])
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert torch.equal(found[name], torch.ones(2, 320))
    assert head(parcel.card)["base_model"] == "them/sd"


def test_a_dry_run_sends_nothing(there: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Path("mine"), small(), {})
    (Path("mine") / "README.md").write_text("---\nlicense: mit\n---\nhand-written")
    with pytest.raises(SystemExit) as left:
        main(["push", "mine", "me/mine", "--dry-run", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert left.value.code in (0, None) and said["url"] is None and "hand-written" in said["card"]
    sizes = {one.name: one.stat().st_size for one in Path("mine").iterdir()}
    assert said["files"] == sizes and not there.cache.exists()
    with pytest.raises(SystemExit):
        main(["push", "mine", "me/mine", "--dry-run"])
    out, err = capsys.readouterr()
    assert "model.safetensors" in out and "hand-written" in err and "would be sent to me/mine" in err
    with pytest.raises(SystemExit):
        main(["push", "mine", "me/mine"])
    assert "huggingface.co/me/mine" in capsys.readouterr().out
    assert (there.home("me/mine") / "README.md").read_text().endswith("hand-written")


@pytest.mark.parametrize(
    ("words", "kind", "what"),
    [
        ({"repo": "mine"}, ConfigError, "OWNER/NAME|no name of the hub"),
        ({"repo": "me/mine/x"}, ConfigError, "OWNER/NAME"),
        ({"repo": "me/mine", "to": "flax"}, ConfigError, "no such layout"),
        ({"repo": "me/mine", "source": "nowhere"}, CheckpointError, "nothing to push"),
        ({"repo": "me/mine", "to": "diffusers"}, ConfigError, "no published family"),
    ],
    ids=str,
)
def test_what_cannot_be_pushed_is_named(there: Hub, words: Any, kind: type[Exception], what: str) -> None:
    model = small()
    model.conditioner = None  # of a class-conditional model without its classes
    save_model(Path("mine"), model if words.get("to") != "diffusers" else flow_unet(), {})
    with pytest.raises(kind, match=what), packed(words.pop("source", "mine"), **words):
        pass


def flow_unet() -> Any:
    from sfumato.model import build_model

    section = {
        "path": "linear",
        "prediction": "velocity",
        "time_input": "thousandths",
        "scale_input": None,
        "net": {"kind": "unet", "channels": [8, 8], "blocks": 1, "attention": [0, 0], "middle": 0},
        "codec": "pixels",
        "conditioner": None,
    }
    return build_model({"model": section, "size": [16, 16], "sampling": {"sampler": "ddim", "steps": 2}})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalTokenNotFoundError("no token"), "does not know who is asking"),
        (errors.HfHubHTTPError("no", response=SimpleNamespace(headers={}, request=None, status_code=403)), "may not"),  # type: ignore[arg-type]
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said(there: Hub, monkeypatch: Any, error: Exception, words: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    save_model(Path("mine"), small(), {})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with packed("mine", "me/mine") as parcel, pytest.raises(MachineError, match=words):
        push(parcel, "me/mine")


def test_cards_of_other_kinds() -> None:
    whole = {"kind": "folder of diffusers", "family": "stable_diffusion", "class": "StableDiffusionPipeline"}
    parts = {name: {"parameters": 3} for name in ("unet", "vae", "text_encoder")}
    text = card("me/sd", {**whole, "parts": parts, "prediction": "epsilon"}, "diffusers", base="them/sd|x")
    assert head(text)["pipeline_tag"] == "text-to-image" and "base_model" not in head(text)
    assert "them/sd\\|x" in text
    control = {"kind": "part of a pipeline", "class": "ControlNetModel", "parts": {"c": {"parameters": 3}}}
    text = card("me/c", control, "diffusers")
    assert "controlnet" in head(text)["tags"] and "--control me/c:picture.png" in text
    assert 'ControlNetModel.from_pretrained("me/c")' in text and "pipeline_tag" not in head(text)
    own = {"kind": "model of sfumato", "family": None, "codec": "latents", "parts": {"codec": {"parameters": 3}}}
    assert "weights: me/vae" in card("me/vae", own, "sfumato")
