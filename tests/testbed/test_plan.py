"""Plans that could not be fitted are refused before a server starts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ersim.errors import ConfigError
from testbed.plan import ProfilePlan, check_common_load, check_plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "conf/live_plan").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_we_ship_can_be_driven(file: Path) -> None:
    plan = ProfilePlan(**yaml.safe_load(file.read_text()))
    check_plan(plan, 8192)
    check_common_load(plan)


def test_a_plan_may_fill_the_context() -> None:
    check_plan(ProfilePlan(prefill_tokens=[8190], decode_contexts=[64, 8176]), 8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: []}, f"{name} must be at least one number, got []")
          for name in ("prefill_tokens", "decode_batches", "decode_contexts")),
        ({"prefill_tokens": [16, 0]}, "prefill_tokens must be all >= 1, got [16, 0]"),
        ({"prefill_tokens": [8191]}, "prefill_tokens must be at most 8190 (max_model_len=8192 less 2 tokens"),
        ({"decode_contexts": [64, 8177]}, "decode_contexts must be at most 8176 (max_model_len=8192 less 16"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
        ({"decode_tokens": 0}, "decode_tokens must be >= 2, got 0"),
        ({"decode_tokens": 1}, "decode_tokens must be >= 2, got 1"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"max_context_tokens": 63}, "max_context_tokens must be >= 64, or no decode batch is left"),
        *(({"seconds": seconds}, f"seconds must be a number of seconds > 0, got {seconds}")
          for seconds in (0.0, float("nan"), float("inf"))),
        ({"mixed_users": []}, "mixed_users must be at least one number of users, got []"),
        *(({"mixed_s": seconds}, f"mixed_s must be a number of seconds > 0, got {seconds}")
          for seconds in (-1.0, 0.0, float("nan"), float("inf"))),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_fitted_names_its_key(changes: dict[str, Any], message: str) -> None:
    plan = dataclasses.replace(ProfilePlan(), **changes)
    with pytest.raises(ConfigError, match=re.escape(f"plan.{message}")):
        check_plan(plan, 8192)
        check_common_load(plan)
