"""Laying configurations over each other, and telling all that is wrong with the result at once, by its origin."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import overlay
from sfumato.errors import ConfigError
from sfumato.overlay import as_yaml, leaves, load_config, merged, parse_yaml, recipes, resolved


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def fault(source: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return caught.value


# reading


def test_recipes_say_what_they_are() -> None:
    found = {recipe.name: recipe for recipe in recipes()}
    assert {"quickstart", "tiny"} <= set(found)
    for recipe in found.values():
        assert recipe.path.is_file() and len(recipe.summary) > 20 and not recipe.summary.startswith("#")


def test_a_file_extends_a_recipe_and_its_name_is_its_own(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "mine.yaml", "extends: tiny\nsteps: 7\noptim: {lr: 1e-5}\n")).config
    tiny = load_config("tiny").config
    assert (config.name, config.steps, config.optim.lr) == ("mine", 7, 1e-5)
    assert config.optim.kind == tiny.optim.kind == "muon"  # inherited, two files down
    assert config.model == tiny.model
    named = load_config(write(tmp_path / "mine.yaml", "extends: tiny\nname: other\n")).config
    assert named.name == "other"


def test_what_is_extended_lies_beside_the_file_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "base.yaml", "extends: tiny\nsteps: 11\n")
    write(tmp_path / "in" / "mine.yaml", "extends: base.yaml\nbatch: 3\n")
    write(tmp_path / "base.yaml", "extends: tiny\nsteps: 99\n")  # one of the same name where we stand
    monkeypatch.chdir(tmp_path)
    assert load_config("in/mine.yaml").config.steps == 11
    write(tmp_path / "in" / "up.yaml", "extends: ../base.yaml\n")
    assert load_config("in/up.yaml").config.steps == 99
    write(tmp_path / "in" / "far.yaml", "extends: far_base.yaml\n")
    write(tmp_path / "far_base.yaml", "extends: tiny\nsteps: 5\n")
    assert load_config("in/far.yaml").config.steps == 5  # not beside it: from here


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circles_are_found(tmp_path: Path, length: int) -> None:
    for i in range(length):
        write(tmp_path / f"{i}.yaml", f"extends: {(i + 1) % length}.yaml\n")
    error = fault(str(tmp_path / "0.yaml"))
    assert "circle" in error.what
    assert error.seen == " -> ".join([*(f"{i}.yaml" for i in range(length)), "0.yaml"])


def test_what_is_not_there_is_said_with_what_is_like_it(tmp_path: Path) -> None:
    assert fault("tinny").fix == "tiny (see: sfumato recipes)"
    assert "no file" in str(fault(str(tmp_path / "no.yaml")).seen)
    error = fault(write(tmp_path / "a.yaml", "extends: quickstrat\n"))
    assert "quickstart" in str(error.fix) and f"extended by {tmp_path / 'a.yaml'}" in str(error.where)
    assert "extended by" in str(fault(write(tmp_path / "a.yaml", "extends: b.yaml\n")).where)


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("steps: [1\nbatch: 2\n", "not YAML", "line 2, column 6"),
        ("steps:\n\t1\n", "not YAML", "line 2, column 1"),
        ("steps: 1\nbatch: 2\nsteps: 3\n", "not YAML", "line 3, column 1"),
        ("optim: {lr: 1, kind: adamw, lr: 2}\n", "not YAML", "line 1, column 29"),
        ("- 1\n- 2\n", "is a mapping", ""),
        ("", "is a mapping", ""),
        ("just words\n", "is a mapping", ""),
        ("a: !!python/object/apply:os.system ['true']\n", "not YAML", "line 1"),
    ],
)
def test_texts_that_are_no_configuration(tmp_path: Path, text: str, what: str, where: str) -> None:
    error = fault(write(tmp_path / "a.yaml", text))
    assert what in error.what
    assert str(tmp_path / "a.yaml") in str(error.where) and where in str(error.where)


def test_a_key_twice_is_named(tmp_path: Path) -> None:
    assert fault(write(tmp_path / "a.yaml", "steps: 1\nsteps: 2\n")).seen == "the key 'steps' is there twice"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00s")
    assert fault(str(tmp_path / "a.yaml")).what == "a configuration cannot be read"
    write(tmp_path / "b.yaml", "\ufeffextends: tiny\n")  # as some editors begin a file
    assert load_config(str(tmp_path / "b.yaml")).config.name == "b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        ("-2.5e+4", -25000.0),
        (".5e-1", 0.05),
        ("1.e2", 100.0),
        ("1e6", 10**6),
        ("3", 3),
        ("0.1", 0.1),
        ("1_000", 1000),
        (".inf", float("inf")),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1e400", float("inf")),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("a red circle", "a red circle"),
        ("'1e3'", "1e3"),
        ("[1e-3, off]", [0.001, "off"]),
    ],
)
def test_values_mean_what_people_mean(text: str, value: Any) -> None:
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12
) | st.sampled_from(
    [
        "1e3",
        "1E-3",
        "off",
        "no",
        "true",
        "null",
        "2024-01-01",
        "1_0",
        ".5",
        "0x1f",
        "1:30",
        "",
        "~",
        "=",
        "<<",
        "- a",
        "a: b",
        "#",
        " x ",
        "two\nlines",
        "a: \n\n- b\n",
    ]
)
plain = st.recursive(
    words | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(words, plain, max_size=4))
def test_what_is_written_is_read_as_the_same(raw: dict[str, Any]) -> None:
    text = as_yaml(raw)
    found = parse_yaml(text, "here")
    assert found == raw
    assert yaml.safe_load(text) == raw  # and so do other readers of YAML


# laying over


def test_mappings_are_merged_and_the_rest_replaced() -> None:
    below = {"optim": {"lr": 1, "kind": "adamw"}, "ema": [{"decay": 0.9}, {"decay": 0.5}], "steps": 3}
    above = {"optim": {"lr": 2}, "ema": [{"decay": 0.1}], "batch": 1}
    assert merged(below, above) == {
        "optim": {"lr": 2, "kind": "adamw"},
        "ema": [{"decay": 0.1}],
        "steps": 3,
        "batch": 1,
    }
    assert below["optim"] == {"lr": 1, "kind": "adamw"}  # untouched


def test_a_slot_that_changes_its_kind_keeps_what_the_new_one_has() -> None:
    below = {"data": {"kind": "scenes", "size": 64, "seed": 3, "count": 10}}
    assert merged(below, {"data": {"kind": "folder", "path": "x"}})["data"] == {
        "kind": "folder",
        "size": 64,
        "path": "x",
    }
    assert merged(below, {"data": "folder"})["data"] == {"kind": "folder", "size": 64}
    assert merged(below, {"data": {"seed": 4}})["data"] == {"kind": "scenes", "size": 64, "seed": 4, "count": 10}
    assert merged(below, {"data": "scenes"})["data"] == below["data"]  # the same kind loses nothing
    assert merged({"data": "scenes"}, {"data": {"size": 48}})["data"] == {"kind": "scenes", "size": 48}
    assert merged(below, {"data": {"kind": "mine:Data"}})["data"] == {"kind": "mine:Data"}  # not known what it has
    assert merged({"model": {"conditioner": {"kind": "prompts", "dim": 3}}}, {"model": {"conditioner": None}})[
        "model"
    ] == {"conditioner": None}


def test_nested_slots_change_their_kind_too() -> None:
    below = {"objective": {"kind": "denoising", "times": {"kind": "logit_normal", "mean": 1.0}, "weight": "flat"}}
    over = merged(below, {"objective": {"times": "uniform"}})["objective"]
    assert over == {"kind": "denoising", "times": {"kind": "uniform"}, "weight": "flat"}


def test_a_recipe_on_ones_own_folder(tmp_path: Path) -> None:
    """The quick start's second command: options of the old kind go, the size stays, in either order."""
    for overrides in (["data.kind=folder", f"data.path={tmp_path}"], [f"data={{kind: folder, path: '{tmp_path}'}}"]):
        data = load_config("quickstart", overrides).config.data
        assert data == {"kind": "folder", "path": str(tmp_path), "size": 32}
    late = load_config("quickstart", [f"data.path={tmp_path}", "data.kind=folder"]).config.data
    assert late == {"kind": "folder", "path": str(tmp_path), "size": 32}


def test_the_command_line_wins_and_the_last_of_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a.yaml", "extends: tiny\nsteps: 5\n")
    assert load_config(source, ["steps=6", "steps=7", "optim.lr=2e-3"]).config.steps == 7
    config = load_config(
        source, ["model.conditioner=null", "samples.prompts=[a red circle, 'b, c']", "name=x=y"[:6]]
    ).config
    assert config.model.conditioner is None and config.samples.prompts == ["a red circle", "b, c"]
    assert load_config(source, ["data.path=a=b", "data.kind=folder"]).config.data["path"] == "a=b"


@pytest.mark.parametrize("override", ["steps", "=3", "", ".=3", "optim.=3", ".lr=3", "--steps"])
def test_overrides_are_key_and_value(override: str) -> None:
    error = fault("tiny", override)
    assert error.what == "an override is key=value" and error.seen == override


def test_a_value_that_is_not_yaml_is_put_in_quotes() -> None:
    error = fault("tiny", "samples.prompts=[a red")
    assert error.where == "samples.prompts=[a red" and error.fix == "'samples.prompts=\"[a red\"'"


def test_leaves_are_dotted_keys() -> None:
    assert leaves({"a": {"b": 1, "c": {"d": 2}}, "e": [3], "f": {}}) == ["a.b", "a.c.d", "e", "f"]


# saying what is wrong


def test_all_faults_are_told_at_once_each_with_its_origin(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "extends: tiny\nbatch: 0\noptim: {lrr: 3}\n")
    mine = write(tmp_path / "mine.yaml", "extends: base.yaml\nmodel: {net: {dimm: 3}}\nprecision: fp8\n")
    error = fault(mine, "stps=3", "data.kind=scene", "model.path.kind=lineal")
    lines = str(error).splitlines()
    assert lines[0] == "7 faults in the configuration"
    told = {line.split()[0]: line for line in lines if line.startswith("  ") and "(seen:" in line}
    assert set(told) == {"batch", "optim.lrr", "model.net.dimm", "precision", "stps", "data", "model.path"}
    for key in ("batch", "optim.lrr"):
        assert told[key].endswith(f"from {Path(base).resolve()})")
    for key in ("model.net.dimm", "precision"):
        assert told[key].endswith(f"from {Path(mine).resolve()})")
    for key in ("stps", "data", "model.path"):
        assert told[key].endswith("from the command line)"), told[key]
    assert error.where == mine
    tries = [line.strip() for line in lines if "try:" in line]
    for expected in ("try: lr", "try: dim", "try: steps", "try: scenes", "try: linear"):
        assert any(line.startswith(expected) for line in tries), (expected, tries)


def test_a_fault_of_a_recipe_would_name_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "broken.yaml", "# A broken one\nname: broken\nsteps: 0\ndata: scenes\nmodel: {net: dit}\n")
    monkeypatch.setattr(overlay, "RECIPES", tmp_path)
    assert "steps should be at least 1 (seen: 0, from recipe broken)" in str(fault("broken"))


def test_the_origin_of_a_fault_is_who_set_it_last(tmp_path: Path) -> None:
    source = write(tmp_path / "a.yaml", "extends: tiny\nema: [{decay: 2}]\nsampling: {sampler: ddmi}\n")
    assert re.search(r"ema\.0\.decay .*from .*a\.yaml", str(fault(source)))
    assert re.search(r"ema\.0\.decay .*from the command line", str(fault(source, "ema=[{decay: 3}]")))
    assert re.search(r"sampling\.sampler .*from the command line", str(fault(source, "sampling.sampler=heum")))
    assert re.search(r"sampling\.sampler .*from .*a\.yaml", str(fault(source)))


def test_an_option_of_another_kind_is_told_as_such() -> None:
    error = str(fault("quickstart", "data.path=pictures"))
    assert "data.path is no option of scenes (seen: 'pictures', from the command line)" in error
    assert "try: data.kind=folder, which has it" in error


def test_braces_in_values_are_just_values() -> None:
    assert "(seen: '{expected} {0}', from the command line)" in str(fault("tiny", "precision='{expected} {0}'"))


def test_origins_are_kept_for_what_was_set() -> None:
    loaded = load_config("tiny", ["steps=3", "data.seed=9"])
    assert loaded.origins["steps"] == loaded.origins["data.seed"] == "the command line"
    assert loaded.origins["batch"] == "recipe tiny"
    assert loaded.origins["optim.lr"] == "recipe quickstart"
    assert "accumulate" not in loaded.origins
    known = set(leaves(resolved(loaded.config)))
    assert {key for key in loaded.origins if not any(leaf == key or leaf.startswith(f"{key}.") for leaf in known)} <= {
        "name",
        "model.path",
        "model.prediction",
        "model.time_input",
        "objective.times",
        "objective.weight",
        "sampling.sampler",
        "sampling.grid",
    }
