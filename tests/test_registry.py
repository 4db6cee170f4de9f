"""Names to objects: slots, the user's own in them, and what is said when something is wrong."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from own_modules import mine as mine
from sfumato import catalogue, registry
from sfumato.denoiser import unit_variance
from sfumato.errors import ConfigError, MachineError
from sfumato.objectives import Denoising
from sfumato.objectives.weights import Flat, MinSNR
from sfumato.paths import Cosine, Linear, Tabulated
from sfumato.predictions import EPS, VELOCITY, Prediction, edm
from sfumato.registry import Problem, check, exists, fits, options_of, resolve, target_of
from sfumato.times import LogitNormal, Stratified


def problems(slot: Any, kind_of: str = "Weight", where: str = "weight") -> list[Problem]:
    return list(check(slot, kind_of, catalogue.KINDS, where))


# slots


def test_a_name_alone_is_built_with_defaults() -> None:
    assert catalogue.build("cosine", "Path") == Cosine()
    assert catalogue.build("min_snr", "Weight") == MinSNR()
    assert catalogue.build("velocity", "Prediction") is VELOCITY


def test_options_are_given() -> None:
    assert catalogue.build({"kind": "min_snr", "gamma": 3}, "Weight") == MinSNR(3)
    path = catalogue.build({"kind": "tabulated", "betas": [0.1, 0.2], "zero_terminal_snr": True}, "Path")
    assert path == Tabulated((0.1, 0.2), zero_terminal_snr=True)  # a list of numbers is a tuple
    hash(path)


def test_slots_within_slots_are_built() -> None:
    slot = {"kind": "denoising", "times": {"kind": "stratified", "of": {"kind": "logit_normal", "mean": 0.5}}}
    made = catalogue.build({**slot, "weight": "min_snr", "space": {"kind": "edm", "sigma_data": 0.7}}, "Objective")
    assert isinstance(made, Denoising)
    assert made.times == Stratified(LogitNormal(0.5)) and made.weight == MinSNR()
    assert made.space is not None and made.space.name == edm(0.7).name
    assert catalogue.build({"kind": "denoising", "space": None}, "Objective") == Denoising()


def test_a_slot_is_left_as_it_was() -> None:
    slot = {"kind": "min_snr", "gamma": 3}
    catalogue.build(slot, "Weight")
    assert slot == {"kind": "min_snr", "gamma": 3}


def test_functions_keep_their_options_for_later() -> None:
    from sfumato.times import karras, linear

    assert catalogue.build("linear", "Grid") is linear
    later = catalogue.build({"kind": "karras", "rho": 3}, "Grid")
    assert isinstance(later, functools.partial) and later.func is karras and later.keywords == {"rho": 3}


def test_factories_are_called() -> None:
    made = catalogue.build("edm", "Prediction")
    assert isinstance(made, Prediction) and made.name == "edm(0.5)"
    scale = catalogue.build({"kind": "unit_variance", "sigma_data": 1.0}, "ScaleInput")
    import torch

    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(scale(Linear(), t), unit_variance(1.0)(Linear(), t))


def test_what_is_built_already_stays() -> None:
    weight = Flat()
    assert catalogue.build(weight, "Weight") is weight
    assert catalogue.build(None, "Weight") is None


@pytest.mark.parametrize("slot", [{"gamma": 5}, {"kind": None}, {}, ""])
def test_a_slot_that_names_nothing_is_refused(slot: Any) -> None:
    with pytest.raises(ConfigError, match="unknown weight"):
        catalogue.build(slot, "Weight")


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        catalogue.build("min_snrr", "Weight")
    assert caught.value.seen == "min_snrr" and str(caught.value.fix).startswith("min_snr")


@pytest.mark.parametrize("kind_of", catalogue.KINDS)
def test_every_line_of_the_catalogue_is_there(kind_of: str) -> None:
    for name, target in catalogue.KINDS[kind_of].items():
        assert exists(target), name
        assert options_of(target) is not None, name  # all that is ours can be checked
        assert resolve(target) is not None
        assert [p for p in problems(name, kind_of) if "needed" not in p.what] == []


# what is the user's own


def test_targets_are_names_or_modules_with_a_name() -> None:
    table = {"flat": "sfumato.objectives.weights:Flat"}
    assert target_of("flat", table) == table["flat"]
    assert target_of("mine:Thing", table) == "mine:Thing"
    assert target_of("mine.deep.er:thing()", table) == "mine.deep.er:thing()"
    for kind in (
        "nosuch",
        "mine:",
        ":Thing",
        "mine:Thing.method",
        "mine:Thing(3)",
        "mine/deep:Thing",
        "os:system('x')",
    ):
        assert target_of(kind, table) is None


def test_the_users_own_stand_wherever_ours_do(mine: Path) -> None:
    slot = {"kind": "reg_mine:Loud", "volume": 3, "inner": {"kind": "min_snr", "gamma": 2}, "many": ["flat", "min_snr"]}
    assert problems(slot) == []
    told = catalogue.build(slot, "Weight").told
    assert told == {"volume": 3, "name": "loud", "inner": MinSNR(2), "many": [Flat(), MinSNR()]}
    assert catalogue.build({"kind": "reg_mine:factory()", "scale": 3.0}, "ScaleInput")(2) == 36
    assert catalogue.build({"kind": "reg_mine:sampler", "noise": "no"}, "Sampler")(1, 2, 3) == (1, 2, 3, 0.0, "no")
    assert catalogue.build({"kind": "reg_mine:Net", "width": 3, "weight": "flat"}, "Net").config.weight == Flat()
    assert catalogue.build("reg_mine:MADE", "Weight") == 3


def test_a_path_of_files_is_no_path_of_noise(mine: Path) -> None:
    """`where: Path`, with the standard library's: a string in a config, not the name of a noise path."""
    slot = {"kind": "reg_mine:Derived", "size": 1, "needed": 2, "where": "some/folder"}
    assert problems(slot) == []
    assert catalogue.build(slot, "Data").where == "some/folder"


def test_the_current_directory_is_importable_only_for_a_while(mine: Path) -> None:
    before = list(sys.path)
    resolve("reg_mine:Loud")
    assert sys.path == before
    with pytest.raises(ConfigError):
        resolve("reg_mine:Nothing")
    assert sys.path == before


def test_files_beside_the_user_do_not_stand_in_for_libraries(mine: Path) -> None:
    """A `colorsys.py` in the current directory is not what a module of ours means by it."""
    (mine / "colorsys.py").write_text("raise SystemExit('the wrong one')")
    sys.modules.pop("colorsys", None)
    with registry.here("sfumato.data.scenes"):
        import colorsys
    assert hasattr(colorsys, "hsv_to_rgb")


def test_what_cannot_be_imported_says_why(mine: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be found") as caught:
        resolve("reg_nowhere:Thing")
    assert caught.value.where == "reg_nowhere:Thing" and "reg_nowhere" in str(caught.value.seen)
    with pytest.raises(ConfigError, match="cannot be found"):
        resolve("reg_mine.deeper:Thing")
    with pytest.raises(ConfigError, match="lacks") as caught:
        resolve("reg_mine:Lout")
    assert caught.value.seen == "Lout" and str(caught.value.fix).startswith("Loud")


def test_a_module_that_fails_is_told_of_as_the_users(mine: Path) -> None:
    (mine / "reg_fails.py").write_text("class Thing: ...\nThing.nothing\n")
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        resolve("reg_fails:Thing")
    assert "AttributeError" in str(caught.value.seen) and isinstance(caught.value.__cause__, AttributeError)
    (mine / "reg_lacks.py").write_text("import reg_absent_library.inner\nclass Thing: ...\n")
    with pytest.raises(MachineError, match="library is missing") as lacking:
        resolve("reg_lacks:Thing")
    assert "reg_absent_library" in str(lacking.value.seen) and lacking.value.exit_code == 3


# what is wrong with a slot


@pytest.mark.parametrize("name", ["flat", "min_snr", "elbo"])
def test_nothing_is_wrong_with_what_is_right(name: str) -> None:
    assert problems(name) == problems({"kind": name}) == []


@pytest.mark.parametrize("slot", [3, ["flat"], {"gamma": 3}, {"kind": 3}, {"kind": None}, True, 1.5])
def test_a_slot_names_something(slot: Any) -> None:
    (problem,) = problems(slot)
    assert problem.where == "weight" and "kind" in problem.what and problem.seen == repr(slot)
    assert problem.fix == "weight=flat"


def test_a_table_may_be_empty() -> None:
    """What only the user can bring has no names of ours."""
    (problem,) = check(3, "Thing", {"Thing": {}}, "thing")
    assert problem.fix == "thing=module:Name"
    (problem,) = check("three", "Thing", {"Thing": {}}, "thing")
    assert problem.what == "is not known"


def test_an_unknown_kind_names_the_nearest() -> None:
    (problem,) = problems("minsnr")
    assert problem.where == "weight" and problem.seen == "minsnr"
    assert problem.fix.startswith("min_snr") and "module:Name" in problem.fix


def test_an_unknown_option_names_the_nearest() -> None:
    (problem,) = problems({"kind": "min_snr", "gama": 3})
    assert problem == Problem("weight.gama", "is no option of min_snr", "3", "gamma")
    (problem,) = problems({"kind": "flat", "depth": 3})
    assert problem.fix == "remove it"


def test_an_option_of_another_kind_names_that_kind() -> None:
    (problem,) = problems({"kind": "flat", "sigma_data": 0.5})
    assert problem.where == "weight.sigma_data" and problem.fix == "weight.kind=edm, which has it"


def test_a_value_of_the_wrong_type_names_the_right_one() -> None:
    (problem,) = problems({"kind": "min_snr", "gamma": "five"})
    assert problem == Problem("weight.gamma", "should be float", "'five'")


def test_what_is_missing_is_named() -> None:
    (problem,) = problems({"kind": "folder", "size": 64}, "Data", "data")
    assert (problem.where, problem.what) == ("data.path", "is needed by folder")
    assert problem.fix == "data.path=..., str"


def test_everything_is_said_at_once_and_where_it_is() -> None:
    slot = {
        "kind": "denoising",
        "times": {"kind": "stratified", "of": {"kind": "logit_normal", "men": 1, "std": "wide"}},
        "weight": {"kind": "p3"},
        "space": 7,
        "colour": "red",
    }
    found = {problem.where: problem for problem in problems(slot, "Objective", "objective")}
    assert set(found) == {
        "objective.times.of.men",
        "objective.times.of.std",
        "objective.weight",
        "objective.space",
        "objective.colour",
    }
    assert found["objective.times.of.men"].fix == "mean" and found["objective.weight"].fix.startswith("p2")


def test_lists_of_slots_are_checked_one_by_one(mine: Path) -> None:
    (problem,) = problems({"kind": "reg_mine:Loud", "volume": 1, "many": ["flat", {"kind": "min_snr", "gama": 1}]})
    assert problem.where == "weight.many.1.gama"
    assert problems({"kind": "reg_mine:Loud", "volume": 1, "inner": None}) == []


@pytest.mark.parametrize("kind", ["reg_nowhere:Thing", "reg_mine:Nothing", "reg_package.no:Thing", "reg_folder:One"])
def test_what_the_user_names_must_be_there(mine: Path, kind: str) -> None:
    (problem,) = problems(kind)
    assert (problem.where, problem.seen) == ("weight", kind) and "cannot be found" in problem.what


# the types of values


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [0, -3], [1.0, "1", True, None, [1]]),
        ("float", [0, 1.5, float("inf")], ["1.5", True, None]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("str", ["", "3"], [3, None, ["a"]]),
        ("int | None", [1, None], ["none", 1.5]),
        ("int | tuple[int, int]", [1, [1, 2], (1, 2)], [[1], [1, 2, 3], ["a", "b"], "12"]),
        ("tuple[int, ...]", [[], [1], [1, 2, 3]], [[1, "a"], 1, "ab"]),
        ("Sequence[float]", [[], [1, 2.5]], [["a"], 2]),
        ("list[list[int]]", [[[1], []]], [[1], [["a"]]]),
        ("Literal['fast', 'slow']", ["fast"], ["fastest", 3, None]),
        ("Literal['one']", ["one"], ["two"]),
        ("Literal['a'] | int", ["a", 3], ["b", 1.5]),
        ("dict[str, int]", [{}, {"a": 1}], [[1], "a", 3]),
        ("'int | None'", [1, None], ["a"]),
        ("Tensor", [1, "a", None, []], []),  # not simple: not judged
        ("Callable[[int], int]", [1, "a"], []),
        ("", [1, "a", None], []),
        ("not an annotation", [1, "a"], []),
    ],
)
def test_simple_types_are_judged(annotation: str, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, annotation) for value in good)
    assert not any(fits(value, annotation) for value in bad)


def test_any_table_will_do() -> None:
    """The registry itself knows nothing of the library."""
    kinds = {"Thing": {"one": "sfumato.predictions:EPS", "two": "sfumato.paths:Linear"}}
    assert registry.build("one", "Thing", kinds) is EPS
    assert registry.build("two", "Thing", kinds) == Linear()
    (problem,) = check("three", "Thing", kinds, "thing")
    assert "one, two" in problem.fix


def test_a_missing_space_after_a_colon_is_pointed_at() -> None:
    (problem,) = problems({"kind:min_snr": None})
    assert "space after the colon" in problem.fix
