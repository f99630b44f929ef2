"""The engine equals vLLM's own scheduler step by step; needs vLLM, no model and no GPU."""

from __future__ import annotations

import pytest

from ersim.engine import VLLM_VERSION
from testbed.oracle.cases import THEMES, make_case
from testbed.oracle.sides import ErsimSide, compare

pytestmark = pytest.mark.live

SEEDS = range(9_000_000, 9_000_012)


@pytest.fixture(scope="module")
def vllm() -> object:
    pytest.importorskip("vllm", reason="vLLM is not installed (make venv-live)")
    from testbed.oracle.vllm_side import Vllm

    return Vllm()


def test_the_installed_release_is_the_one_claimed(vllm: object) -> None:
    from testbed.oracle.vllm_side import vllm_version

    assert vllm_version().split("+")[0] == VLLM_VERSION


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_no_step_differs(vllm: object, theme: str) -> None:
    from testbed.oracle.vllm_side import VllmSide

    steps = 0
    for seed in SEEDS:
        case = make_case(seed, theme)
        count, difference = compare(case, ErsimSide(case.config), VllmSide(vllm, case.config))
        assert difference is None, f"{seed} {theme} {case.config}\n{difference.describe()}"
        steps += count
    assert steps > 50


def test_a_wrong_engine_is_caught(vllm: object) -> None:
    """The oracle is only worth its zeros if it sees a difference: one block fewer must show."""
    from dataclasses import replace

    from testbed.oracle.vllm_side import VllmSide

    case = make_case(SEEDS[0], "starved")
    config = replace(case.config, num_blocks=case.config.num_blocks - 1)
    _, difference = compare(case, ErsimSide(config), VllmSide(vllm, case.config))
    assert difference is not None
