"""Drawn prompt lengths scale as asked and never cut a prompt's own text."""

from __future__ import annotations

import numpy as np

from ersim.config import LengthsConfig, PromptSetConfig, WorkloadConfig
from ersim.workload import build_workload, load_prompt_set


def prompt_lengths(scale: float) -> tuple[np.ndarray, np.ndarray]:
    prompts = load_prompt_set(PromptSetConfig())
    config = WorkloadConfig(lengths=LengthsConfig(prompt_scale=scale))
    workload = build_workload(config, prompts, 50, 1, None)
    requests = [workload.next_request(user) for user in range(50) for _ in range(10)]
    own = np.array([prompts.own_tokens[request.prompt_index] for request in requests])
    return np.array([request.prompt_tokens for request in requests]), own


def test_prompts_scale_and_keep_their_text() -> None:
    full, own = prompt_lengths(1.0)
    small, _ = prompt_lengths(0.2)
    assert (small >= own).all()
    long = full > 10 * own
    assert long.sum() > 100
    np.testing.assert_allclose(small[long], full[long] * 0.2, atol=0.51)
