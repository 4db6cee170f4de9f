"""Training from caches: the same batches, the same weights, and everything that could make them stale told apart."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import bytes_of, rows_of, stopped
from tests.clip import encoder, tokenizer

from sfumato import load, train
from sfumato.config import Config
from sfumato.data import cache as stores
from sfumato.errors import ConfigError, DataError
from sfumato.io.directory import write_weights
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.train.cache import Filled, cache_folder, fill
from sfumato.train.run import Run
from sfumato.train.step import clean

Small = Callable[..., Config]
Start = Callable[..., Run]
SHAPE = AutoencoderConfig(latent=4, channels=(8, 16), blocks=1, groups=4, attention=False)
ON = (
    "model.net={kind: dit, patch: 4, dim: 16, depth: 1, heads: 2, text: cross}",
    "data.count=24",
    "steps=4",
    "checkpoint.every=2",
    "validate={every: 2, batches: 1, holdout: 4}",
    "condition_dropout=0.5",
)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MOST_ROWS", 10)


@pytest.fixture
def autoencoder(tmp_path: Path) -> str:
    return made(tmp_path / "autoencoder.safetensors", 3)


def made(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    net = Autoencoder(SHAPE)
    with torch.no_grad():
        net.encoder.exit.bias[4:] = -1.0  # a spread that can be seen
    write_weights(path, net.state_dict())
    return f"model.codec={{kind: latents, weights: {path}, groups: 4, scale: 0.9, sampled: true}}"


@pytest.fixture
def text(tmp_path: Path) -> str:
    tokenizer(tmp_path / "clip").save_pretrained(tmp_path / "clip" / "tokenizer")
    encoder().save_pretrained(tmp_path / "clip" / "text_encoder")
    return f"model.conditioner={{kind: text, weights: {tmp_path / 'clip'}, length: 8, pooled: true}}"


@contextmanager
def quiet(name: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def filled(config: Config) -> Filled:
    folder = cache_folder(config)
    assert folder is not None
    return fill(config, folder, quiet)


def test_a_run_from_the_cache_is_the_same_to_the_last_bit(
    small: Small, tmp_path: Path, autoencoder: str, text: str
) -> None:
    plain = small(*ON, autoencoder, text)
    kept = small(*ON, autoencoder, text, f"data.cache={tmp_path / 'cache'}")
    done = filled(kept)
    assert (done.pictures, done.pictures_made) == (24, 24) and done.conditions == done.conditions_made > 10
    train(plain, run=tmp_path / "plain")
    stopped(kept, tmp_path / "kept", 3)
    train(kept, run=tmp_path / "kept", resume=True)
    one, other = (bytes_of(tmp_path / name) for name in ("plain", "kept"))
    assert one["model/model.safetensors"] == other["model/model.safetensors"]
    assert rows_of(tmp_path / "plain") == rows_of(tmp_path / "kept")
    assert len(load(tmp_path / "kept", "cpu").sample(["a red circle"], steps=2).images) == 1


@pytest.mark.parametrize("sampled", [True, False])
def test_batches_are_the_same_to_the_last_bit(
    small: Small, start: Start, tmp_path: Path, autoencoder: str, text: str, sampled: bool
) -> None:
    changes = (*ON, autoencoder, text, f"model.codec.sampled={sampled}".lower())
    kept = (*changes, f"data.cache={tmp_path / 'cache'}")
    filled(small(*kept))
    plain, cached = start(*changes), start(*kept, folder="cached")
    for step in range(7):  # more than an epoch
        one, other = next(plain.loader), next(cached.loader)
        assert np.array_equal(one.indices, other.indices) and one.fields == other.fields and other.images is None
        device = torch.device("cpu")
        first, second = (
            clean(run.model, batch, device, torch.Generator().manual_seed(step))
            for run, batch in ((plain, one), (cached, other))
        )
        assert torch.equal(first, second)
        conds = [run.stepper.cond(batch.fields) for run, batch in ((plain, one), (cached, other))]
        assert conds[0].keys() == conds[1].keys() >= {"context", "pooled"}
        assert all(torch.equal(conds[0][name], conds[1][name]) for name in conds[0])
    mean = clean(plain.model, one, device, torch.Generator().manual_seed(9))
    assert torch.equal(mean, first) is not sampled  # drawn anew, or the mean


def test_neither_pictures_are_read_nor_encoders_run(
    small: Small, start: Start, tmp_path: Path, autoencoder: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*ON, autoencoder, text, f"data.cache={tmp_path / 'cache'}")
    filled(small(*changes))

    def forbidden(*given: Any, **more: Any) -> Any:
        raise AssertionError("not needed")

    monkeypatch.setattr("sfumato.data.scenes.Scenes.batch", forbidden)
    run = start(*changes, "workers=0")
    monkeypatch.setattr(type(run.model.codec), "moments", forbidden)  # type: ignore[union-attr]
    monkeypatch.setattr(type(run.model.conditioner), "forward", forbidden)  # type: ignore[union-attr]
    run._advance()
    assert run.updates == 1


def test_it_goes_on_where_it_was_stopped(
    small: Small, tmp_path: Path, autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(*ON, autoencoder, f"data.cache={tmp_path / 'cache'}")
    write, written = stores.LatentStore.write, []

    def stop(self: stores.LatentStore, shard: int, moments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, moments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stores.LatentStore, "write", stop)
        filled(config)
    with pytest.raises(DataError, match=r"1 of 3 shards of latents[\s\S]*sfumato data cache"):
        train(config, run=tmp_path / "run")
    assert written == [0, 1] and filled(config).pictures_made == 4
    assert filled(config).pictures_made == 0
    train(config, run=tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    ["data.seed=2", "data.size=48", "data.count=25", "model.codec.scale=0.8", "other weights", "model.codec.tile=8"],
)
def test_what_latents_depend_on_makes_them_others(small: Small, tmp_path: Path, autoencoder: str, change: str) -> None:
    where = f"data.cache={tmp_path / 'cache'}"
    filled(small(*ON, autoencoder, where))
    if change == "other weights":
        changed = small(*ON, made(tmp_path / "other.safetensors", 4), where)
    else:
        changed = small(*ON, autoencoder, where, change)
    with pytest.raises(DataError, match=r"not whole, or of other data or another autoencoder[\s\S]*shards of latents"):
        train(changed, run=tmp_path / "run")
    assert filled(changed).pictures_made == len(range(25 if change == "data.count=25" else 24))
    harmless = small(*ON, autoencoder, where, "model.codec.sampled=false", "batch=5", "seed=3")
    assert filled(harmless).pictures_made == 0


def test_the_same_weights_at_another_place_are_the_same(small: Small, tmp_path: Path, autoencoder: str) -> None:
    where = f"data.cache={tmp_path / 'cache'}"
    filled(small(*ON, autoencoder, where))
    assert filled(small(*ON, made(tmp_path / "again.safetensors", 3), where)).pictures_made == 0


def test_what_states_depend_on_makes_them_others(small: Small, tmp_path: Path, text: str) -> None:
    where = f"data.cache={tmp_path / 'cache'}"
    first = filled(small(*ON, text, where))
    assert first.pictures == 0 and first.conditions_made == first.conditions
    assert filled(small(*ON, text, where)).conditions_made == 0
    more = filled(small(*ON, text, where, "data.count=40"))
    assert 0 < more.conditions_made < more.conditions  # what was known stays known
    assert filled(small(*ON, text, where, "model.conditioner.length=9")).conditions_made == first.conditions
    encoder(seed=5).save_pretrained(tmp_path / "clip" / "text_encoder")
    with pytest.raises(DataError, match=r"missing: \d+ conditions"):
        train(small(*ON, text, where), run=tmp_path / "run")


def test_what_cannot_be_kept_is_named(small: Small, tmp_path: Path, autoencoder: str) -> None:
    where = f"data.cache={tmp_path / 'cache'}"
    with pytest.raises(ConfigError, match="nothing to keep"):
        filled(small(*ON, where))
    alone = ("model.net=null", "model.conditioner=null", autoencoder, "objective=autoencoder", where)
    for begin in (filled, lambda config: train(config, run=tmp_path / "run")):
        with pytest.raises(ConfigError, match="an autoencoder is trained on pictures"):
            begin(small(*alone))
    with pytest.raises(ConfigError, match=r"data\.cache is a folder"):
        small("data.cache=3")
    assert cache_folder(small("data.cache=false")) is None is cache_folder(small())


def test_the_usual_place(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "usual"))
    assert cache_folder(small("data.cache=true")) == tmp_path / "usual"
    monkeypatch.delenv("SFUMATO_CACHE")
    assert cache_folder(small("data.cache=true")) == Path("~/.cache/sfumato").expanduser()


def test_a_source_of_ones_own_has_to_say_which_pictures_it_has(
    small: Small, tmp_path: Path, autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "from sfumato.data.scenes import Scenes\n\nclass Mine(Scenes):\n    identity = None\n"
    (tmp_path / "nameless.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = f"data={{kind: 'nameless:Mine', size: 32, count: 24, cache: {tmp_path / 'cache'}}}"
    with pytest.raises(ConfigError, match="does not say which pictures"):
        filled(small(autoencoder, data))


def test_a_model_made_over_reads_what_its_own_ends_say(
    small: Small, tmp_path: Path, autoencoder: str, text: str
) -> None:
    """And not those of the model that it starts from, which read classes and no words."""
    dit = "{kind: dit, patch: 4, dim: 16, depth: 1, heads: 2, text: cross, adaln: shared}"
    old = small(
        *ON, autoencoder, "model.net={kind: dit, patch: 4, dim: 16, depth: 1, heads: 2}", "model.conditioner=labels"
    )
    base = train(old, run=tmp_path / "classes")
    changes = (f"start={base}", "reparameterise={time: 0.5}", f"model.net={dit}", f"data.cache={tmp_path / 'cache'}")
    config = small(*ON, autoencoder, text, *changes)
    assert filled(config).conditions > 10
    train(config, run=tmp_path / "words")
