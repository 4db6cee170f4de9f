"""Names that people know: every spelling of a sampler and a grid, and what an unknown one is told."""

from typing import Any

import pytest

from sfumato.catalogue import GRIDS, KINDS, SAMPLERS
from sfumato.errors import ConfigError
from sfumato.names import CLASSES, GRID_NAMES, SAMPLER_NAMES, grid_named, sampler_named, spelled_out
from sfumato.overlay import load_config
from sfumato.registry import check

KARRAS = {"kind": "karras"}
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # k-diffusion and ComfyUI
    "sample_dpmpp_2m": ({"kind": "dpmpp_2m"}, None),
    "dpmpp_2m_sde": ({"kind": "sde_dpmpp", "order": 2}, None),
    "uni_pc_bh2": ({"kind": "unipc", "order": 3, "variant": "bh2"}, None),
    "dpm_2_ancestral": ({"kind": "dpm_2_ancestral"}, None),
    # A1111
    "DPM++ 2M": ({"kind": "dpmpp_2m"}, None),
    "DPM++ 2M Karras": ({"kind": "dpmpp_2m"}, KARRAS),
    "k_dpmpp_2m_ka": ({"kind": "dpmpp_2m"}, KARRAS),
    "DPM++ 2M SDE Heun Exponential": (
        {"kind": "sde_dpmpp", "order": 2, "form": "heun"},
        {"kind": "exponential"},
    ),
    "DPM++ 3M SDE Karras": ({"kind": "sde_dpmpp", "order": 3}, KARRAS),
    "DPM++ 2S a Karras": ({"kind": "dpmpp_2s_ancestral"}, KARRAS),
    "DPM++ SDE Karras": ({"kind": "dpmpp_sde"}, KARRAS),
    "DPM2 a": ({"kind": "dpm_2_ancestral"}, None),
    "Euler a": ({"kind": "euler_ancestral"}, None),
    "Euler": ({"kind": "euler"}, None),
    "LMS Karras": ({"kind": "lms"}, KARRAS),
    "Restart": ({"kind": "restart"}, None),
    "PLMS": ({"kind": "pndm"}, None),
    "UniPC": ({"kind": "unipc"}, None),
    # InvokeAI
    "euler_k": ({"kind": "euler"}, KARRAS),
    "dpmpp_2m_sde_k": ({"kind": "sde_dpmpp", "order": 2}, KARRAS),
    "kdpm_2_a": ({"kind": "dpm_2_ancestral"}, None),
    # ComfyUI's two fields in one, and diffusers
    "dpmpp_2m_sgm_uniform": ({"kind": "dpmpp_2m"}, {"kind": "linspace", "spare": True}),
    "ipndm_beta": ({"kind": "ipndm"}, {"kind": "beta_time"}),
    "EulerAncestralDiscreteScheduler": ({"kind": "euler_ancestral"}, {"kind": "linspace"}),
    "FlowMatchEulerDiscreteScheduler": ({"kind": "euler"}, {"kind": "shifted", "by": 1.0, "compat": "sd3"}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_resolves(name: str) -> None:
    assert sampler_named(name) == SPELLINGS[name]


def test_the_catalogues_own_names_stay() -> None:
    for name in SAMPLERS:
        assert sampler_named(name).sampler == {"kind": name}
        assert spelled_out({"sampler": name}) == {"sampler": name}
    for name in GRIDS:
        assert grid_named(name) == {"kind": name}


def test_everything_that_a_name_stands_for_is_in_the_catalogue() -> None:
    slots = [(slot, "Sampler") for slot in SAMPLER_NAMES.values()] + [(slot, "Grid") for slot in GRID_NAMES.values()]
    for name in CLASSES:
        sampler, grid = sampler_named(name)
        slots += [(sampler, "Sampler"), (grid, "Grid")]
    for slot, kind in slots:
        assert list(check(slot, kind, KINDS, "here")) == []


def test_options_stay_with_a_name() -> None:
    assert spelled_out({"sampler": {"kind": "DPM++ 2M SDE Karras", "eta": 0.5}}) == {
        "sampler": {"kind": "sde_dpmpp", "order": 2, "eta": 0.5},
        "grid": KARRAS,
    }
    assert grid_named({"kind": "align_your_steps", "model": "svd"}) == {"kind": "ays", "model": "svd"}


def test_a_grid_that_is_given_wins_over_the_names() -> None:
    assert spelled_out({"sampler": "DPM++ 2M Karras", "grid": "simple"}) == {
        "sampler": {"kind": "dpmpp_2m"},
        "grid": {"kind": "trailing"},
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [("DPM++ 2N Karras", "dpmpp_2m"), ("eulr", "euler"), ("EulerDiscreteSheduler", "EulerDiscreteScheduler")],
)
def test_an_unknown_name_lists_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match="not known") as raised:
        spelled_out({"sampler": name})
    assert raised.value.fix is not None and near in raised.value.fix
    with pytest.raises(ConfigError, match="karras"):
        spelled_out({"grid": "karas"})


def test_configurations_take_every_name_and_keep_the_catalogues() -> None:
    config = load_config("tiny", ["sampling.sampler=DPM++ 2M Karras"]).config
    assert config.sampling.sampler == {"kind": "dpmpp_2m"} and config.sampling.grid == KARRAS
    with pytest.raises(ConfigError, match="dpmpp_2m") as raised:
        load_config("tiny", ["sampling.sampler=DPM++ 2N"])
    assert "the command line" in str(raised.value)


def test_one_own_function_is_left_alone() -> None:
    assert spelled_out({"sampler": "mine:walk", "grid": "mine:times"}) == {"sampler": "mine:walk", "grid": "mine:times"}
