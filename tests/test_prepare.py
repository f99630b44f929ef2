"""What runs share: prices a router may count with, and policies fitted once."""

from __future__ import annotations

import os
import subprocess
import sys

import ersim
from ersim.config import ExpertConfig, FleetConfig
from ersim.prepare import token_prices_usd


def test_token_prices_follow_the_hardware() -> None:
    shared = ersim.Preparations()
    small = token_prices_usd(shared.expert(ExpertConfig(), "small"))
    large = token_prices_usd(
        shared.expert(ExpertConfig(model="llama3.1-70b", precision="fp8", tp=2), "large")
    )
    free = token_prices_usd(shared.expert(ExpertConfig(usd_per_gpu_hour=0.0), "free"))
    assert small[0] is not None and small[1] is not None
    assert large[0] is not None and large[1] is not None
    assert 5 < large[0] / small[0] < 20  # 8.8 times the weights
    assert 3 < large[1] / small[1] < 20
    assert small[0] < small[1]  # decoding uses a GPU worse than prefill
    assert free == (0.0, 0.0)


def test_experts_are_shown_to_the_router_with_domains_slots_and_prices() -> None:
    fleet = FleetConfig("one", experts={"law": ExpertConfig(replicas=3, domains=["law"])})
    (state,) = ersim.Preparations().expert_states(fleet)
    assert (state.name, state.domains) == ("law", ("law",))
    assert state.slots == 3 * 1024
    assert state.usd_per_mtok_out is not None


def test_a_policy_does_not_depend_on_the_number_of_threads() -> None:
    """Fitted in processes that may use one or two threads, the same decision for every prompt."""
    code = (
        "from ersim.config import *; from ersim.prepare import Preparations; import hashlib; "
        "e = {n: ExpertConfig('llama3.1-8b', 'bf16', 'h100-80gb', domains=[d]) for n, d in "
        "(('a', 'code'), ('b', 'law'))}; "
        "c = SimulationConfig(fleet=FleetConfig('f', experts=e), seed=7); "
        "print(hashlib.sha256(Preparations().routing(c).scores.tobytes()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
