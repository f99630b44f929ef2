"""A server that ends while it is served is started again, so many times."""

from __future__ import annotations

import types
from typing import Any

import pytest

from ersim.errors import ConfigError
from testbed import keeper as keeper_module
from testbed.expert_server import ExpertFailed
from testbed.keeper import PAUSE_S, Keeper


class Server:
    """As much of an ExpertServer as is kept: it is well, dead, or starting, as a test says."""

    def __init__(self, name: str) -> None:
        self.spec = types.SimpleNamespace(name=name, url=f"http://{name}")
        self.state = "well"
        self.calls: list[str] = []
        self.start_raises: Exception | None = None

    def check_alive(self) -> None:
        if self.state == "dead":
            raise ExpertFailed(f"expert {self.spec.name} ended with status 9")

    def check_ready(self) -> bool:
        self.check_alive()
        if self.state == "late":
            raise ExpertFailed(f"expert {self.spec.name} was not healthy within 240 s")
        return self.state == "well"

    def stop(self) -> None:
        self.calls.append("stop")

    def start(self) -> None:
        self.calls.append("start")
        if self.start_raises is not None:
            raise self.start_raises
        self.state = "starting"


class Clock:
    """A monotonic clock that a test moves."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(keeper_module, "time", one)
    return one


def kept(*names: str, restarts: int = 2) -> tuple[list[Any], Keeper, list[str]]:
    servers, said = [Server(name) for name in names], list[str]()
    return servers, Keeper(servers, restarts, said.append), said  # type: ignore[arg-type]


def test_servers_that_are_well_are_left_alone(clock: Clock) -> None:
    servers, keeper, said = kept("a", "b")
    keeper.look()
    assert said == [] and all(server.calls == [] for server in servers)
    assert keeper.restarted == {"a": 0, "b": 0}


def test_one_that_ends_is_started_again_without_waiting_for_it(clock: Clock) -> None:
    (a, b), keeper, said = kept("a", "b")
    a.state = "dead"
    keeper.look()
    keeper.look()
    assert a.calls == ["stop", "start"] and b.calls == []
    keeper.look()  # still starting: nothing is said, the other one is looked at
    assert said == ["expert a ended with status 9", "starting expert a again (1 of 2)"]
    a.state = "well"
    keeper.look()
    keeper.look()
    assert said[2:] == ["expert a answers again on http://a"]
    assert keeper.restarted == {"a": 1, "b": 0}


def test_one_that_never_gets_well_is_given_up_and_the_others_go_on(clock: Clock) -> None:
    (a, _), keeper, said = kept("a", "b")
    a.state = "dead"
    keeper.look()
    keeper.look()
    a.state = "late"
    keeper.look()
    keeper.look()
    assert keeper.restarted["a"] == 1, "the second restart comes after a pause"
    clock.now_s = PAUSE_S
    keeper.look()
    assert keeper.restarted["a"] == 2
    a.state = "late"
    keeper.look()
    assert said[-1] == "expert a is not started again: 2 restarts are all (restarts)"
    before = len(said)
    clock.now_s = 10 * PAUSE_S
    keeper.look()
    assert len(said) == before, "it is said once"
    assert a.calls == ["stop", "start"] * 2 + ["stop"] and keeper.restarted == {"a": 2, "b": 0}


@pytest.mark.parametrize("error", [ConfigError("live.port must be a free port"), OSError("no space left")])
def test_a_start_that_fails_is_one_of_its_restarts(clock: Clock, error: Exception) -> None:
    (a, _), keeper, said = kept("a", "b")
    a.state, a.start_raises = "dead", error
    keeper.look()
    keeper.look()
    assert said[1:] == ["starting expert a again (1 of 2)", str(error)]
    a.start_raises = None
    clock.now_s = PAUSE_S
    keeper.look()
    a.state = "well"
    keeper.look()
    assert said[-1] == "expert a answers again on http://a" and keeper.restarted == {"a": 2, "b": 0}


def test_without_an_expert_it_ends(clock: Clock) -> None:
    (a, b), keeper, _ = kept("a", "b", restarts=0)
    a.state = "dead"
    keeper.look()
    b.state = "dead"
    with pytest.raises(
        ExpertFailed, match=r"no expert is left: .* \(restarts\) .* expert b ended with status 9"
    ):
        keeper.look()
