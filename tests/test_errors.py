"""Errors say what, where, seen and fix, and carry the exit code of the command line."""

import inspect

import pytest

from sfumato import errors
from sfumato.errors import (
    MOST,
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MachineError,
    MemoryShortage,
    SfumatoError,
    nearest,
)

CODES = {
    SfumatoError: 1,
    ConfigError: 2,
    MachineError: 3,
    DataError: 4,
    CheckpointError: 4,
    MemoryShortage: 5,
    Interrupted: 6,
}


def test_an_error_is_told_in_order() -> None:
    error = ConfigError("unknown sampler", where="sampling.sampler", seen="ddmi", fix="ddim, ddpm")
    assert str(error) == "unknown sampler\n  where  sampling.sampler\n  seen   ddmi\n  fix    ddim, ddpm"
    assert (error.what, error.where, error.seen, error.fix) == (
        "unknown sampler",
        "sampling.sampler",
        "ddmi",
        "ddim, ddpm",
    )


def test_what_is_not_known_is_not_said() -> None:
    assert str(DataError("no pictures")) == "no pictures"
    assert str(DataError("no pictures", fix="data.path=pictures")) == "no pictures\n  fix    data.path=pictures"
    assert str(DataError("no pictures", where="", seen="")) == "no pictures"


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda x: getattr(x, "__name__", str(x)))
def test_each_kind_has_its_exit_code(kind: type[SfumatoError], code: int) -> None:
    with pytest.raises(SfumatoError) as caught:
        raise kind("what")
    assert caught.value.exit_code == code


def test_no_kind_is_without_a_code_in_this_test() -> None:
    kinds = {one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, SfumatoError)}
    assert kinds == set(CODES)


def test_the_nearest_names_come_best_first_and_few() -> None:
    assert nearest("gama", ["alpha", "beta", "gamma", "gamma2", "gammas", "gam"]).split(", ")[0] == "gamma"
    assert len(nearest("gama", ["gamma", "gamma2", "gammas", "gam"]).split(", ")) == 3
    assert nearest("gama", ["gamma", "gam"], 1) == "gamma"


def test_when_nothing_is_near_everything_is_named_in_order() -> None:
    assert nearest("zzz", {"linear", "cosine"}) == "cosine, linear"
    assert nearest("zzz", []) == ""


def test_nobody_reads_thousands_of_names() -> None:
    names = nearest("zzz", [f"{i:04d}" for i in range(5000)]).split(", ")
    assert len(names) == MOST + 1 and names[-1] == "..." and names[0] == "0000"
