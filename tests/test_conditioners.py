"""Conditioners: what people say, what networks are told, and what of it is kept with a model."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.conditioners import Conditioner, Joined, Labels, Sizes, Source, dropped
from sfumato.data.scenes import Scenes
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.prompts import PAD, UNKNOWN, Prompts


class Captions:
    """A data source."""

    def __init__(self, *captions: str, classes: tuple[str, ...] = ()) -> None:
        self.said, self.classes = captions, classes

    def captions(self) -> Iterator[str]:
        return iter(self.said)


SOURCE = Captions("a red circle", "a blue circle", "two red squares", classes=("cat", "dog", "3"))


def prompts(source: Any = SOURCE, **options: Any) -> Prompts:
    torch.manual_seed(0)
    made = Prompts(**{"dim": 8, "depth": 2, "heads": 2, "length": 4, **options})
    made.prepare(source)
    return made.double().eval()


# Labels


def test_labels_by_number_and_by_name() -> None:
    labels = Labels()
    labels.prepare(SOURCE)
    assert labels.classes == 3 and labels.fields == ("label",)
    said = [{"label": 1}, {"label": "dog"}, {"label": "0"}, {"label": np.int64(2)}, {"label": None}, {}]
    cond = labels(said)
    assert cond["label"].tolist() == [1, 1, 0, 2, 3, 3] and cond["label"].dtype == torch.int64
    assert labels({"label": name} for name in ("cat", "3"))["label"].tolist() == [0, 2]  # a name comes before a number
    assert labels.null(2)["label"].tolist() == [3, 3]


@pytest.mark.parametrize("label", [3, -1, "4", "-1", "bird", "", "²", 1.0, [1]])
def test_labels_that_are_not_are_named(label: object) -> None:
    for names in ((), ("cat", "dog", "bug")):
        labels = Labels(3)
        labels.prepare(Captions(classes=names))
        for use in (labels, labels.check):
            with pytest.raises(DataError) as caught:
                use([{"label": 0}, {"label": label}])
            assert caught.value.where == "label" and caught.value.seen == str(label)
            assert caught.value.fix == "0 to 2" or (names and isinstance(label, str))


def test_where_no_class_is_none_one_must_be_told() -> None:
    labels = Labels(3, unlabelled=False)
    assert labels([{"label": 2}])["label"].tolist() == [2]
    for use in (labels, labels.check):
        with pytest.raises(DataError, match="without a class"):
            use([{"label": 1}, {}])
    assert Joined([Labels(3)]).unlabelled and not Joined([labels]).unlabelled


def test_a_mistyped_class_is_answered_with_the_nearest() -> None:
    labels = Labels()
    labels.prepare(SOURCE)
    with pytest.raises(DataError) as caught:
        labels.check([{"label": "dogg"}])
    assert caught.value.fix == "dog"


def test_a_name_with_commas_is_known_by_each_of_its_parts() -> None:
    """As ImageNet's are; a whole name comes before a part of another, and a class without a name is a number."""
    labels = Labels(4)
    labels.names = ("crane, machine", "crane", "tench, Tinca tinca", "")
    said = ("crane, machine", "machine", "crane", "Tinca tinca", "3")
    assert labels({"label": name} for name in said)["label"].tolist() == [0, 0, 1, 2, 3]
    for label in ("tinca", "", " machine"):
        with pytest.raises(DataError):
            labels.check([{"label": label}])


def test_the_data_has_the_last_word_on_classes() -> None:
    for classes, source in ((0, Captions("a")), (4, SOURCE)):
        with pytest.raises(DataError) as caught:
            Labels(classes).prepare(source)
        assert str(caught.value.where).startswith("model.conditioner")
    unnamed = Labels(4)
    unnamed.prepare(Captions("a"))
    assert (unnamed.classes, unnamed.names) == (4, ())
    with pytest.raises(ConfigError):
        Labels(-1)


def test_labels_travel() -> None:
    labels, again = Labels(), Labels()
    labels.prepare(SOURCE)
    again.restore(labels.files())
    assert (again.classes, again.names) == (labels.classes, labels.names) == (3, ("cat", "dog", "3"))
    assert not labels.state_dict()


# Prompts


def test_words_are_split_and_folded() -> None:
    """By case, by Unicode's compatibility forms, and at punctuation."""
    conditioner = prompts(Captions("A Red circle, left"))
    assert set(conditioner.words) == {PAD, UNKNOWN, "a", "red", "circle", ",", "left"}
    numbers = [conditioner.words[word] for word in ("a", "red", "circle", ",")]
    for text in ("a red circle,", "A RED  Circle ,", "\uff41 r\uff45d circle,"):
        assert conditioner.tokens([{"caption": text}]).tolist() == [numbers]


def test_tokens_are_padded_cut_and_unknown() -> None:
    conditioner = prompts()
    word = conditioner.words
    said = [{"caption": "a circle"}, {"caption": "a zebra"}, {"caption": "a a a a red"}, {"caption": ""}, {}]
    assert conditioner.tokens(said).tolist() == [
        [word["a"], word["circle"], 0, 0],
        [word["a"], 1, 0, 0],
        [word["a"]] * 4,
        [0] * 4,
        [0] * 4,
    ]


def test_the_null_condition_is_nothing_but_padding() -> None:
    conditioner = prompts()
    null = conditioner.null(3)
    x = conditioner.table(torch.zeros(3, 4, dtype=torch.long)) + conditioner.place
    for block in conditioner.blocks:
        x = block(x)
    assert torch.equal(null["context"], conditioner.norm(x))
    for empty in ({}, {"caption": None}, {"caption": ""}, {"label": 3}):
        assert torch.equal(conditioner([empty])["context"][0], null["context"][0])
    assert not torch.equal(conditioner([{"caption": "a"}])["context"][0], null["context"][0])


def test_what_networks_are_told_of_a_prompt() -> None:
    said = [{"caption": "a red circle"}, {"caption": "two"}]
    cond = prompts()(said)
    assert {name: tuple(value.shape) for name, value in cond.items()} == {"context": (2, 4, 8), "pooled": (2, 8)}
    assert torch.equal(cond["pooled"], cond["context"].mean(1))
    plain = prompts(pooled=False)
    assert plain(said).keys() == {"context"} and (plain.context_dim, plain.pooled_dim) == (8, 0)
    other = prompts(field="text")
    assert other.fields == ("text",)
    assert torch.equal(other([{"text": "two"}])["pooled"], cond["pooled"][1:])


def test_the_order_of_words_counts() -> None:
    pooled = prompts(Captions("red left blue"))([{"caption": "red left blue"}, {"caption": "blue left red"}])["pooled"]
    assert (pooled[0] - pooled[1]).abs().max() > 1e-6


def test_a_prompt_does_not_depend_on_the_others() -> None:
    conditioner, said = prompts(), [{"caption": "a red circle"}, {}, {"caption": "two"}]
    whole = conditioner(said)
    for i, one in enumerate(said):
        torch.testing.assert_close(conditioner([one])["context"][0], whole["context"][i], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("said", "seen", "fix"),
    [
        ("a red zebra", "zebra", "a, blue, circle, red, squares, two"),
        ("A  Circel", "Circel", "circle"),
        ("[pad]", "[", "a, blue, circle, red, squares, two"),
        ("[unknown]", "[", "a, blue, circle, red, squares, two"),
        ("a red circle a a", "5 words", "at most 4 words"),
        (7, "7", None),
        (["a"], "['a']", None),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(said: object, seen: str, fix: str | None) -> None:
    with pytest.raises(DataError) as caught:
        prompts().check([{"caption": "a red circle"}, {}, {"caption": said}])
    assert caught.value.seen == seen and (fix is None or caught.value.fix == fix)
    assert str(said) in str(caught.value)


def test_a_large_vocabulary_is_not_read_out() -> None:
    conditioner = prompts(Captions(" ".join(f"word{i}" for i in range(5000))))
    with pytest.raises(DataError) as caught:
        conditioner.check([{"caption": "zzz"}])
    assert len(str(caught.value)) < 600


def test_the_most_frequent_words_are_kept() -> None:
    conditioner = prompts(Captions("c c c", "b b a", "d"), vocabulary=4)
    assert conditioner.words == {PAD: 0, UNKNOWN: 1, "b": 2, "c": 3}
    assert conditioner.table.weight.shape == (4, 8)


def test_captions_that_are_cut_and_words_that_are_dropped_are_told_of() -> None:
    conditioner = prompts(Captions("a b c", "a b", "a"), length=2, vocabulary=4)
    cut, dropped = conditioner.notes
    assert cut.startswith("1 of 3 captions are cut after 2 words") and cut.endswith("model.conditioner.length=3")
    assert dropped.startswith("the 1 rarest words")
    assert prompts(Captions("a b"), length=2).notes == () and prompts(Scenes(), length=14).notes == ()


def test_every_word_of_scenes_is_known() -> None:
    data = Scenes(rich=0.3)
    conditioner = prompts(data, length=64)
    conditioner.check([data[i].fields for i in range(200)])


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"heads": 3}, "heads"),
        ({"heads": 0}, "heads"),
        ({"dim": 0}, "dim"),
        ({"length": 0}, "length"),
        ({"vocabulary": 2}, "vocabulary"),
    ],
)
def test_encoders_that_cannot_be_are_named(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompts(**{"dim": 8, "heads": 2, **options})
    assert caught.value.where == f"model.conditioner.{where}"


def test_data_without_captions_teaches_no_words() -> None:
    for source in (Captions(), Captions("", "  ")):
        with pytest.raises(DataError, match="no captions"):
            prompts(source)


def test_a_vocabulary_travels() -> None:
    torch.manual_seed(0)
    first, again = prompts(), Prompts(dim=8, depth=2, heads=2, length=4)
    again.restore(first.files())
    assert again.words == first.words and again.files() == first.files()
    again.double().load_state_dict(first.state_dict())
    said = [{"caption": "two red circle"}, {}]
    assert torch.equal(again(said)["context"], first(said)["context"])


def test_a_vocabulary_depends_on_the_captions_and_not_on_their_order() -> None:
    backwards = Captions(*reversed(SOURCE.said))
    for most in (3, 5, 8192):  # also where it is cut within words of equal count
        assert prompts(backwards, vocabulary=most).files() == prompts(vocabulary=most).files()


@pytest.mark.parametrize(
    "change",
    [
        lambda said: "{",
        lambda said: "[]",
        lambda said: json.dumps({**said, "model": {**said["model"], "vocab": {"[pad]": 0, "[unknown]": 1, "a": 3}}}),
        lambda said: json.dumps({**said, "model": {**said["model"], "vocab": {"a": 0, "[unknown]": 1, "[pad]": 2}}}),
    ],
)
def test_a_vocabulary_that_was_meddled_with_is_refused(change: Any) -> None:
    text = change(json.loads(prompts().files()["tokenizer.json"]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        prompts().restore({"tokenizer.json": text.encode()})


def test_the_encoder_learns_with_the_network() -> None:
    """Every weight of the encoder, and each word that was said."""
    conditioner = prompts()
    net = DiT(DiTConfig(size=4, patch=2, dim=16, depth=1, heads=2, context_dim=8, pooled_dim=8)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    cond = conditioner([{"caption": "a red circle"}, {"caption": "two squares"}])
    net(torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.ones(2), **cond).square().sum().backward()
    for name, p in conditioner.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    learned = conditioner.table.weight.grad.abs().amax(1) > 0  # type: ignore[union-attr]
    said = {conditioner.words[word] for word in ["a", "red", "circle", "two", "squares"]} | {0}
    assert set(learned.nonzero().flatten().tolist()) == said


# Joined


def joined() -> Joined:
    torch.manual_seed(0)
    both = Joined([Labels(), Prompts(dim=8, depth=1, heads=2, length=4)])
    both.prepare(SOURCE)
    return both


def test_joined_conditioners_answer_together() -> None:
    both = joined()
    assert (both.fields, both.context_dim, both.pooled_dim, both.classes) == (("label", "caption"), 8, 8, 3)
    said = [{"label": "dog", "caption": "a red circle"}, {"caption": "two"}, {}]
    cond = both(said)
    parts = list(both.parts)
    assert torch.equal(cond["label"], torch.tensor([1, 3, 3]))
    assert torch.equal(cond["context"], parts[1](said)["context"])
    assert cond.keys() == {"label", "context", "pooled"}
    null = both.null(1)
    assert null["label"].tolist() == [3]
    assert torch.equal(null["context"], parts[1].null(1)["context"])  # type: ignore[operator,union-attr]


def test_joined_conditioners_check_each() -> None:
    for wrong, where in (({"label": 9}, "label"), ({"caption": "zebra"}, "prompt 'zebra'")):
        with pytest.raises(DataError) as caught:
            joined().check([{"label": 1, "caption": "two"}, wrong])
        assert caught.value.where == where


def test_conditioners_that_say_the_same_cannot_be_joined() -> None:
    twice = Joined([prompts(), prompts(pooled=False)])
    with pytest.raises(ConfigError) as caught:
        twice([{"caption": "a"}])
    assert caught.value.where == "model.conditioner.parts" and caught.value.seen == "context"


def test_joined_conditioners_travel() -> None:
    """Files of equal name keep apart, also beyond ten."""
    first = joined()
    assert set(first.files()) == {"0.labels.json", "1.tokenizer.json"}
    again = Joined([Labels(), Prompts(dim=8, depth=1, heads=2, length=4)])
    again.restore(first.files())
    assert again.files() == first.files()
    again.load_state_dict(first.state_dict())
    said = [{"label": 2, "caption": "two red"}]
    assert all(torch.equal(again(said)[name], value) for name, value in first(said).items())
    many, more = Joined([Labels(i + 1) for i in range(12)]), Joined([Labels() for _ in range(12)])
    more.restore(many.files())
    assert [part.classes for part in more.parts] == list(range(1, 13))


def test_devices_are_followed() -> None:
    both = joined().to("meta")
    assert {value.device.type for value in both([{"label": 1, "caption": "two"}]).values()} == {"meta"}


# What all share


def test_the_base_keeps_nothing_and_checks_nothing() -> None:
    class Fixed(Conditioner):
        def forward(self, raw: Any) -> Mapping[str, torch.Tensor]:
            return {"pooled": torch.tensor([[len(one)] for one in raw])}

    fixed = Fixed()
    fixed.check([{"anything": 1}])
    fixed.prepare(SOURCE)
    fixed.restore(fixed.files())
    assert fixed.files() == {} and torch.equal(fixed.null(2)["pooled"], torch.zeros(2, 1))
    assert isinstance(SOURCE, Source) and isinstance(fixed, nn.Module)


def test_dropout_of_conditions_follows_its_rate_and_its_generator() -> None:
    raw = [{"caption": str(i)} for i in range(10_000)]

    def drop(rate: float, seed: int = 0) -> list[Any]:
        return dropped(raw, rate, torch.Generator().manual_seed(seed))

    assert drop(0.0) == raw and drop(1.0) == [{}] * len(raw)
    assert drop(0.1) == drop(0.1) != drop(0.1, seed=1)
    gone = [one == {} for one in drop(0.1)]
    assert abs(sum(gone) / len(raw) - 0.1) < 5 * (0.1 * 0.9 / len(raw)) ** 0.5  # five standard deviations
    assert all(one == {} or one == raw[i] for i, one in enumerate(drop(0.1)))
    more = [one == {} for one in drop(0.3)]  # a higher rate drops these, and others
    assert all(b or not a for a, b in zip(gone, more, strict=True))


# Sizes


def test_sizes_are_those_that_are_said_or_drawn() -> None:
    """Height, width and the one over the other; they stay where nothing else is said."""
    conditioner = Joined([Labels(3), Sizes()])
    conditioner.of_size((64, 96))
    assert conditioner.fields == ("label", "original_size") and conditioner.kept == ("original_size",)
    raw = [{"label": 1, "original_size": [30, 20]}, {}]
    assert conditioner(raw)["sizes"].tolist() == [[30.0, 20.0, 1.5], [64.0, 96.0, pytest.approx(2 / 3)]]
    told = conditioner.sized(raw, (32, 32))
    assert conditioner(told)["sizes"].tolist() == [[30.0, 20.0, 1.5], [32.0, 32.0, 1.0]]
    for size in ([1], "big", [1, -1]):
        with pytest.raises(DataError, match="two numbers"):
            conditioner.check([{"original_size": size}])
