"""Shared by the workload tests: a small prompt set and the shared data, where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ersim.types import Prompt
from ersim.workload import PromptSet

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def prompts() -> PromptSet:
    """60 prompts in three domains; texts of 3 to 60 words, every fifth with an answer length."""
    return PromptSet(
        "small",
        [
            Prompt(str(i), "word " * (3 + i), "abc"[i % 3], output_tokens=10 + i if i % 5 == 0 else None)
            for i in range(60)
        ],
    )


@pytest.fixture
def shared_data() -> Path:
    """Real traces and labelled prompts; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared data folder beside the checkout")
    return SHARED
