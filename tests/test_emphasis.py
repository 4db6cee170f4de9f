"""Weighed words and long prompts: the marks, the states, and what stays as it is."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import clip, t5

from sfumato.errors import ConfigError, DataError
from sfumato.text import Text, Texts
from sfumato.text.emphasis import emphasised, weighed

transformers = pytest.importorskip("transformers")

UP = 1.1


def runs(text: str) -> list[tuple[str, float]]:
    """Stretches of equal weight."""
    plain, weights = weighed(text)
    assert len(plain) == len(weights)
    found = groupby(zip(plain, weights, strict=True), key=lambda pair: round(pair[1], 9))
    return [("".join(one for one, _ in pairs), weight) for weight, pairs in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red circle", [("red circle", 1)]),
        ("a (red) circle", [("a ", 1), ("red", UP), (" circle", 1)]),
        ("a [red] circle", [("a ", 1), ("red", 1 / UP), (" circle", 1)]),
        ("((red))", [("red", UP**2)]),
        ("(red:1.3) (blue: .5)", [("red", 1.3), (" ", 1), ("blue", 0.5)]),
        ("(a (red:2) circle)", [("a ", UP), ("red", 2 * UP), (" circle", UP)]),
        (r"\(red\) \[a\] \\", [(r"(red) [a] " + "\\", 1)]),
        ("red) a] (blue", [("red) a] ", 1), ("blue", UP)]),
        ("3:1.5) left", [("3:1.5) left", 1)]),
        ("(red:much)", [("red:much", UP)]),
        # the example of the web UI's own documentation
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.3 * UP**2),
                (" ", UP),
                ("on", 1),
                (" a ", UP),
                ("hill", 0.5 * UP),
                (", sun, ", UP),
                ("sky", UP**4),
                (".", UP),
            ],
        ),
    ],
)
def test_marks(text: str, expected: list[tuple[str, float]]) -> None:
    found = runs(text)
    assert [one for one, _ in found] == [one for one, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_the_mean_stays() -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)) + 0.3
    weights = torch.tensor([[1.0, 2, 1, 1, 1], [1] * 5, [0.5] * 5])
    told = emphasised(states, weights)
    torch.testing.assert_close(told.mean((1, 2)), states.mean((1, 2)))
    assert torch.equal(told[1], states[1])
    torch.testing.assert_close(told[2], states[2])  # all by the same number is no emphasis
    torch.testing.assert_close(told[0, 1] / states[0, 1], 2 * told[0, 0] / states[0, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and a T5."""
    place = tmp_path_factory.mktemp("texts")
    clip.encoder(3, projected=7).save_pretrained(place / "text_encoder")
    clip.tokenizer(place / "tokenizer").save_pretrained(place / "tokenizer")
    t5.encoder().save_pretrained(place / "text_encoder_2")
    t5.tokenizer(place / "tokenizer_2")
    return place


class Nothing:
    """A data source without captions."""

    def captions(self) -> list[str]:
        return []


def prepared(folder: Path, **options: Any) -> Text:
    made = Text(**{"weights": str(folder), "length": 16, **options})
    made.prepare(Nothing())
    return made


@torch.no_grad()
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_pieces_of_a_word_are_weighed_and_nothing_else(folder: Path, part: str) -> None:
    plain, made = prepared(folder, part=part), prepared(folder, part=part, emphasis=True)
    said, marked = [{"caption": "a red circle"}], [{"caption": "a (red:1.5) circle"}]
    states, told = plain(said)["context"], made(marked)["context"]
    assert torch.equal(made.tokens(marked), plain.tokens(said))
    assert torch.equal(made(said)["context"], states)  # without marks it is the same, bit for bit
    pieces = plain.tokenizer.convert_ids_to_tokens(plain.tokens(said)[0].tolist())
    weights = torch.tensor([[1.5 if "red" in piece else 1.0 for piece in pieces]])
    assert int((weights > 1).sum()) == 1
    torch.testing.assert_close(told, emphasised(states, weights))
    assert not torch.equal(plain(marked)["context"], states)  # off, the marks are read as they stand


@torch.no_grad()
def test_weights_find_their_words_inside_a_template(folder: Path) -> None:
    options = {"part": "text_encoder_2", "template": "a of {} square", "drop": 2, "length": 14}
    plain, made = prepared(folder, **options), prepared(folder, emphasis=True, **options)
    states = plain([{"caption": "red circle"}])["context"]
    told = made([{"caption": "red (circle:1.5)"}])["context"]
    ratio = (told / states)[0].mean(-1)
    pieces = plain.tokenizer.convert_ids_to_tokens(plain.tokens([{"caption": "red circle"}])[0].tolist())[2:]
    expected = [1.5 if "circle" in piece else 1.0 for piece in pieces]
    assert (ratio / ratio[0]).tolist() == pytest.approx(expected, rel=1e-3) and max(expected) > 1


LONG = "a red circle left of a blue square of a red square left of a blue circle of a red circle"


@torch.no_grad()
def test_long_prompts_go_on_in_further_windows(folder: Path) -> None:
    made, one = prepared(folder, chunks=3, pooled=True), prepared(folder, pooled=True)
    words = made.tokenizer(LONG, add_special_tokens=False).input_ids
    assert 14 < len(words) <= 28
    cond = made([{"caption": LONG}, {"caption": "red"}, {}])
    first, second = (one.tokenizer.decode(cut) for cut in (words[:14], words[14:]))
    assert cond["context"].shape == (3, 48, 12)
    expected = one([{"caption": first}, {"caption": second}])
    torch.testing.assert_close(cond["context"][0, :32], expected["context"].flatten(0, 1))
    torch.testing.assert_close(cond["pooled"][0], expected["pooled"][0])
    torch.testing.assert_close(cond["context"][1, :16], one([{"caption": "red"}])["context"][0])
    torch.testing.assert_close(cond["context"][2, :16], one.null(1)["context"][0])
    assert cond["context_mask"].sum(1).tolist() == [32, 16, 16]
    made.check([{"caption": LONG}])
    with pytest.raises(DataError, match="at most 44"):
        made.check([{"caption": f"{LONG} {LONG} {LONG}"}])


@torch.no_grad()
def test_words_are_weighed_in_whatever_window_they_are(folder: Path) -> None:
    plain, made = prepared(folder, chunks=2), prepared(folder, chunks=2, emphasis=True)
    states = plain([{"caption": LONG}])["context"]
    told = made([{"caption": LONG.removesuffix("circle") + "(circle:2)"}])["context"]
    assert torch.equal(told[:, :16], states[:, :16])  # each window keeps its own mean
    ratio = (told / states)[0, 16:].mean(-1)
    at = made.tokens([{"caption": LONG}])[1].tolist().index(made.tokenizer.eos_token_id) - 1
    assert ratio[at] / ratio[0] == pytest.approx(2, rel=1e-3)


def test_options_change_where_they_can(folder: Path) -> None:
    made = Texts(parts=[Text(pooled=True, length=16), Text(part="text_encoder_2", length=20)], join="apart")
    made.weights = str(folder)
    made.prepare(Nothing())
    made.change(emphasis=True, length=30, skip=1)
    one, other = made.texts
    assert one.emphasis and other.emphasis and (one.length, other.length, one.skip, other.skip) == (16, 30, 1, 0)
    for options, what in (
        ({"chunks": 2}, "one window"),
        ({"colour": 2}, "no such option"),
        ({"skip": 9}, "no more than it has"),
        ({"emphasis": 3}, "another kind"),
        ({"length": 2}, "a begin, a word and an end"),
    ):
        with pytest.raises(ConfigError, match=what):
            made.change(**options)
    with pytest.raises(ConfigError, match="only CLIP"):
        other.change(chunks=2)
    with pytest.raises(ConfigError, match="template has one window"):
        Text(chunks=2, template="a {}")


@torch.no_grad()
def test_half_precision_does_not_overflow_t5(folder: Path) -> None:
    """As the published one's feed-forward would in fp16."""
    made = prepared(folder, part="text_encoder_2")
    last = made.encoder.block[0].layer[1].DenseReluDense.wo.weight
    last.mul_(3e6 / last.abs().max())
    right = made([{"caption": "a red circle"}])["context"]
    with torch.autocast("cpu", torch.float16):
        told = made([{"caption": "a red circle"}])["context"]
    assert told.isfinite().all()
    torch.testing.assert_close(told.float(), right, rtol=0.1, atol=0.1)
