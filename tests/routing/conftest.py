from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from ersim.types import ExpertState, FleetState, Prompt

WORDS = {
    "code": ["function", "loop", "compile", "variable", "python", "recursion", "pointer", "array"],
    "law": ["contract", "court", "plaintiff", "statute", "liability", "appeal", "judge", "tort"],
    "medicine": ["patient", "symptom", "dose", "diagnosis", "blood", "therapy", "kidney", "surgery"],
    "cooking": ["oven", "butter", "recipe", "simmer", "flour", "garlic", "sauce", "roast"],
}
COMMON = ["please", "explain", "how", "this", "works", "when", "there", "are", "several", "cases"]


@dataclass
class Replica:
    """A replica as policies and balancers see it."""

    running: int = 0
    waiting: int = 0
    kv_used_fraction: float = 0.0
    healthy: bool = True


def make_prompts(count: int, seed: int = 0, labelled: bool = True) -> list[Prompt]:
    """Prompts of four domains in their own words; each of four specialists is good in one domain.

    The generalist "big" is right nearly always; prompt length carries a little of the difficulty.
    """
    generator = np.random.default_rng(seed)
    domains = list(WORDS)
    prompts = []
    for index in range(count):
        domain = domains[int(generator.integers(len(domains)))]
        length = int(generator.integers(6, 40))
        words = [
            str(generator.choice(WORDS[domain] if generator.random() < 0.5 else COMMON))
            for _ in range(length)
        ]
        quality = {
            f"small-{name}": float(generator.random() < (0.9 if name == domain else 0.3)) for name in domains
        }
        quality["big"] = float(generator.random() < 0.95)
        text = " ".join(words) + f" {int(generator.integers(100))}?"
        prompts.append(Prompt(f"p{index}", text, domain, quality=quality if labelled else {}))
    return prompts


def make_fleet(names: list[str], domains: bool = True, priced: bool = True) -> FleetState:
    """One expert per name with one idle replica; `small-x` serves domain x, `big` costs ten times more."""
    return FleetState(
        [
            ExpertState(
                name,
                name,
                (name.removeprefix("small-"),) if domains and name != "big" else (),
                [Replica()],
                8,
                (1.0 if name == "big" else 0.1) if priced else None,
                (1.0 if name == "big" else 0.1) if priced else None,
            )
            for name in names
        ]
    )


SMALL = [f"small-{domain}" for domain in WORDS]


@pytest.fixture(autouse=True, scope="session")
def one_thread():  # type: ignore[no-untyped-def]
    """Small matrices: a second BLAS thread only spins, and on a busy machine it spins for minutes."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield


@pytest.fixture
def prompts() -> list[Prompt]:
    return make_prompts(400)


@pytest.fixture
def fleet() -> FleetState:
    return make_fleet([*SMALL, "big"])


@pytest.fixture
def pair() -> FleetState:
    return make_fleet(["small-code", "big"], domains=False)


@pytest.fixture
def replica() -> type[Replica]:
    return Replica


@pytest.fixture(name="make_prompts")
def make_prompts_fixture():  # type: ignore[no-untyped-def]
    return make_prompts


@pytest.fixture(name="make_fleet")
def make_fleet_fixture():  # type: ignore[no-untyped-def]
    return make_fleet
