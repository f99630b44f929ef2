"""The gateway's benchmark: what it adds, apart from what the host does meanwhile."""

import asyncio
from typing import Any

import numpy as np
import pytest

from testbed import gateway_bench
from testbed.foreign_work import MOST_STOLEN
from testbed.gateway_bench import _added, bench, calmest, drive


def test_a_host_that_stands_still_in_a_round_is_not_what_the_gateway_adds() -> None:
    rng = np.random.default_rng(0)
    direct = rng.uniform(0.001, 0.002, (15, 200, 2))
    through = direct + 0.0013
    through[4, 50:90] += 0.5  # one stall of the host, met by the requests of one round

    figures = _added(direct, through)

    for name in ("ttft", "e2e"):
        assert figures[f"round_added_median_{name}_ms"] == pytest.approx(1.3)
        assert figures[f"round_added_p99_{name}_ms"] == pytest.approx(1.3)
        assert figures[f"added_p99_{name}_ms"] > 400, "which is what is judged"
        assert figures[f"direct_median_{name}_ms"] == pytest.approx(1.5, rel=0.02)


def test_a_gateway_that_is_slow_in_most_rounds_shows() -> None:
    direct = np.full((15, 200, 2), 0.001)
    through = direct + 0.0013
    through[::2, :4] += 0.02  # 2 % of the requests in eight of fifteen rounds

    assert _added(direct, through)["round_added_p99_ttft_ms"] == pytest.approx(21.3, rel=0.01)


def test_both_ways_are_driven_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []

    async def one(session: Any, url: str, text: str, tag: str) -> tuple[float, float]:
        sent.append((url, text))
        return 0.001, 0.002

    monkeypatch.setattr(gateway_bench, "_one", one)
    taken, _ = asyncio.run(drive({"a": "A", "b": "B"}, ["x", "y", "z"], 1000.0, 2, 3, 9))
    rounds = sent[2 * gateway_bench.WARM_REQUESTS :]
    assert [url for url, _ in rounds] == [*"AABBBBAAAABB"]
    assert [text for url, text in rounds if url == "B"] == [*"xyzxyz"], "each way gets the same, in turn"
    assert {name: each.shape for name, each in taken.items()} == {"a": (3, 2, 2), "b": (3, 2, 2)}


def test_rounds_that_the_hypervisor_disturbed_are_made_again_and_not_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def one(session: Any, url: str, text: str, tag: str) -> tuple[float, float]:
        return 0.001, 0.002

    def driven(*shares: float, most: int) -> list[float]:
        """What was stolen in each round made, of which two calm ones are wanted."""
        told = iter((0.9, *shares))  # the first is of the time before
        urls = {"a": "A", "b": "B"}
        taken, found = asyncio.run(drive(urls, ["x"], 1000.0, 2, 2, most, lambda: lambda now_s: next(told)))
        assert {each.shape for each in taken.values()} == {(len(found), 2, 2)}
        return list(found)

    monkeypatch.setattr(gateway_bench, "_one", one)
    assert driven(0.0, MOST_STOLEN, most=6) == [0.0, MOST_STOLEN]
    assert driven(0.2, 0.0, 0.3, 0.01, most=6) == [0.2, 0.0, 0.3, 0.01]
    assert driven(0.2, 0.1, 0.3, most=3) == [0.2, 0.1, 0.3], "a host that is never quiet ends it, too"
    assert list(calmest(np.array([0.2, 0.0, 0.3, 0.01]), 2)) == [1, 3]
    assert list(calmest(np.array([0.2, 0.1, 0.3]), 2)) == [0, 1], "then the calmest are judged"


def test_a_bench_of_the_real_gateway() -> None:
    figures = bench(rate=40.0, seconds=1.0, rounds=2, most=2, core=None)

    assert (figures["requests"], figures["rounds"], figures["rate_rps"]) == (40, 2, 40.0)
    assert (figures["rounds_made"], figures["rounds_calm"]) == (2, None), "half a second tells nothing"
    assert figures["every_round_bars_met"] == figures["bars_met"]
    assert figures["every_round_added_p99_ttft_ms"] == figures["added_p99_ttft_ms"]
    assert figures["bars_met"] in ("0/2", "1/2", "2/2")
    assert figures["direct_median_ttft_ms"] > 0.0 and figures["routing_median_ms"] > 0.0
    assert 0.0 < figures["gateway_median_ms"] < figures["gateway_p99_ms"]
    assert figures["stolen_share"] is None and figures["every_round_stolen_share"] is None
