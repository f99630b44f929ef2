"""A profile that breaks off costs no earlier one: neither its calibrations nor its logs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ersim.config import ExpertConfig, FleetConfig
from ersim.errors import ConfigError
from experiments import profile
from experiments.live_schema import LiveConfig
from experiments.schema import TrackingConfig
from testbed import expert_server
from testbed.calmly import Calmly
from testbed.contention import Contention
from testbed.fleet_calibration import FleetCalibration, load

EXPERTS = ("a", "b")
GATEWAY = dict.fromkeys(("network_s", "base_s", "routing_s", "backend_network_s"), 0.001)


class Profiles:
    """Stands in for servers and fits: every profile leaves its number in all that it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.number, self.fails_at, self.folder = 0, "", folder
        monkeypatch.setattr(profile, "LiveFleet", self._fleet)
        monkeypatch.setattr(expert_server, "check_vllm", lambda python: None)
        monkeypatch.setattr(profile, "_one_expert", self._one)
        monkeypatch.setattr(profile, "_together", self._common)
        monkeypatch.setattr(profile, "summary", lambda item: {})

    def run(self, fails_at: str = "", names: Sequence[str] = EXPERTS, **live: Any) -> None:
        """One more profile; it fails at an expert, or with "together" at the common load."""
        self.number, self.fails_at = self.number + 1, fails_at
        experts = {name: ExpertConfig("llama-36m", gpu="cpu", live=live) for name in names}
        fleet, untracked = FleetConfig("f", experts=experts), TrackingConfig(enabled=False)
        profile.profile(LiveConfig(fleet=fleet, folder=str(self.folder), tracking=untracked))

    @contextlib.contextmanager
    def _fleet(self, fleet: FleetConfig, made: Path, say: object) -> Iterator[Any]:
        made.mkdir(parents=True)
        yield SimpleNamespace()

    def _one(self, job: LiveConfig, live: object, name: str, made: Path) -> str:
        (made / f"{name}.steps.jsonl").write_text(str(self.number))
        if self.fails_at == name:
            raise ConfigError("it died")
        for kind in ("json", "png"):
            (made / f"{name}.{kind}").write_text(str(self.number))
        return name

    def _common(
        self, job: LiveConfig, live: object, made_of: object, made: Path, calmly: Calmly
    ) -> FleetCalibration:
        calmly.failed.append(f"attempt of {self.number}")
        if self.fails_at == "together":
            raise KeyboardInterrupt
        contention = {name: Contention() for name in EXPERTS}
        files = {name: f"{name}.json" for name in EXPERTS}
        digests = dict.fromkeys(EXPERTS, str(self.number))
        return FleetCalibration("f", files, contention, GATEWAY, digests=digests)

    def stands(self) -> set[str]:
        """Of which profiles the fleet's calibrations, figures and fleet.json are."""
        found = {(self.folder / f"{name}.{kind}").read_text() for name in EXPERTS for kind in ("json", "png")}
        return found | set(load(self.folder).digests.values())

    def logs(self, folder: str) -> set[str]:
        """Of which profiles the logs in a folder are."""
        return {path.read_text() for path in (self.folder / folder).glob("*.steps.jsonl")}


def test_what_breaks_off_leaves_the_earlier_profile_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = Profiles(monkeypatch, tmp_path)
    profiles.run()
    assert profiles.stands() == {"1"} and profiles.logs("profile") == {"1"}
    whole = json.loads((tmp_path / "profile" / "whole.json").read_text())
    assert whole == {"experts": list(EXPERTS), "failed_again": ["attempt of 1"]}
    capsys.readouterr()
    with pytest.raises(ConfigError, match="it died"):
        profiles.run("b")
    kept = f"what it recorded is in {tmp_path}/profile; the earlier profile in {tmp_path} is as it was"
    assert kept in capsys.readouterr().err
    assert profiles.stands() == {"1"} and profiles.logs("profile.previous") == {"1"}
    with pytest.raises(KeyboardInterrupt):
        profiles.run("together")
    assert profiles.stands() == {"1"} and profiles.logs("profile.previous") == {"1"}
    assert profiles.logs("profile") == {"3"} and profiles.logs("profile.broken") == {"2"}
    profiles.run()
    assert profiles.stands() == {"4"} and profiles.logs("profile.previous") == {"1"}
    profiles.run()
    assert profiles.stands() == {"5"} and profiles.logs("profile.previous") == {"4"}


@pytest.mark.parametrize("broken_off", ["", "b"])
def test_servers_that_cannot_start_move_no_earlier_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken_off: str
) -> None:
    profiles = Profiles(monkeypatch, tmp_path)
    with contextlib.suppress(ConfigError):
        profiles.run(broken_off)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    capsys.readouterr()
    if hasattr(os, "sched_getaffinity"):
        with pytest.raises(ConfigError, match=r"experts\.a\.live\.cores must be cores of this machine"):
            profiles.run(cores=[[9999]])
    with socket.socket() as taken:
        taken.bind((expert_server.HOST, 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"experts\.\w\.live\.port must be a free port"):
            profiles.run(names=("a",), port=taken.getsockname()[1])
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert "what it recorded" not in capsys.readouterr().err, "these recorded nothing"


def test_a_first_profile_that_fails_promises_no_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = Profiles(monkeypatch, tmp_path)
    with pytest.raises(ConfigError):
        profiles.run("a")
    told = capsys.readouterr().err
    assert "what it recorded is in" in told and "earlier" not in told
    assert not (tmp_path / "a.json").exists()
