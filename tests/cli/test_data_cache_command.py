"""`sfumato data cache`: latents and states, once, and training from them."""

from pathlib import Path

import pytest
import torch
from commands import QUICK, Command, told

from sfumato.io.directory import write_weights
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig


@pytest.fixture
def latents(tmp_path: Path) -> tuple[str, ...]:
    torch.manual_seed(0)
    shape = AutoencoderConfig(channels=(8, 16), blocks=1, groups=4, attention=False)
    write_weights(tmp_path / "vae.safetensors", Autoencoder(shape).state_dict())
    return (*QUICK, "data.count=12", "model.codec={kind: latents, weights: vae.safetensors, groups: 4}")


def test_once_and_then_no_more(sfumato: Command, tmp_path: Path, latents: tuple[str, ...]) -> None:
    outcome = sfumato("data", "cache", "tiny", *latents, "data.cache=kept")
    assert outcome.code == 0 and outcome.out == "kept\n"
    assert "pictures    12, 12 of them new" in outcome.err and "size" in outcome.err
    again = sfumato("data", "cache", "tiny", *latents, "--to", "kept", "--json").data
    assert again | {"bytes": 0} == {
        "folder": "kept",
        "pictures": 12,
        "pictures_made": 0,
        "conditions": 0,
        "conditions_made": 0,
        "bytes": 0,
    }
    assert sfumato("train", "tiny", *latents, "data.cache=kept", "--run", "run").code == 0
    of_run = sfumato("data", "cache", "run", "--json").data  # a run says what it was trained on, and where it is kept
    assert of_run["folder"] == "kept" and of_run["pictures_made"] == 0


def test_it_says_what_to_do(sfumato: Command, latents: tuple[str, ...]) -> None:
    told(sfumato("data", "cache", "tiny", *latents), 2, "says of no cache", "data.cache=true")
    told(sfumato("data", "cache", "tiny", *QUICK, "--to", "kept"), 2, "there is nothing to keep", "codec pixels")
    outcome = sfumato("train", "tiny", *latents, "data.cache=kept", "--run", "run")
    told(outcome, 4, "the cache is not whole", "1 of 1 shards of latents", "sfumato data cache")


def test_other_commands_pass_it_over(sfumato: Command, latents: tuple[str, ...]) -> None:
    assert sfumato("data", "check", "tiny", "data.count=4", "data.cache=kept").code == 0
