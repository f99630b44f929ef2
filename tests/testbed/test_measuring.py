"""What a measurement leaves behind, whole or broken off, and what it says of other work on the machine."""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ersim.config import ExpertConfig, FleetConfig, SimulationConfig
from ersim.errors import ConfigError
from ersim.prepare import Preparations
from ersim.util.files import WHOLE, set_earlier_aside
from experiments import profile, validate
from experiments.live_schema import LiveConfig, again_s, simulation
from testbed import foreign_work
from testbed.calmly import Calmly
from testbed.fleet_calibration import FleetCalibration
from testbed.foreign_work import CpuUse
from testbed.plan import ProfilePlan

Measure = Callable[..., list[str]]
STOLEN = (0.2, 0.2, 0.1, 0.0, 0.1, 0.0, 0.2, 0.02, 0.3)  # of four rounds, of three once more, of two again


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs `validate._measure` for two loads with stand-ins for servers, gateway and client; what was said.

    Every run is written as a run.json that holds its attempt; `fails` names one that raises instead.
    """

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(gpus=None, all_servers=[], servers={}, url="")

    def measured(
        gpu: str = "cpu",
        fails: str = "",
        foreign: tuple[float, ...] = (0.0,) * 4,
        stolen: tuple[float, ...] = (),
    ) -> list[str]:
        said: list[str] = []
        readings = iter([
            CpuUse(at_s, (by * at_s,), 0.0, frozenset({0})) for by in foreign for at_s in (0.0, 10.0)
        ])  # fmt: skip
        shares = iter(stolen)

        def run_once(job: Any, level: Any, *rest: Any) -> Any:
            repeat, attempt = rest[-2:]
            if f"u{level.users}r{repeat}" == fails:
                raise ConfigError("it died")
            return types.SimpleNamespace(text=f"attempt {attempt}", logs={})

        def write_run(run: Any, level: Any, folder: Path, *_: Any) -> None:
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(run.text)

        def check_servers(fleet: FleetConfig) -> None:
            if fails == "port":
                raise ConfigError("port in use")

        for name, stand_in in {
            "LiveFleet": nothing, "GatewayProcess": nothing, "gateway_settings": lambda *_: None,
            "calibration_digests": lambda *_: {}, "check_all": lambda *_: {}, "_run_once": run_once,
            "check_answered": lambda _: None, "write_run": write_run, "say": said.append,
            "check_servers": check_servers, "_calibrations": lambda *_: {},
            "steps_stolen": lambda run: next(shares, 0.0),
        }.items():  # fmt: skip
            monkeypatch.setattr(validate, name, stand_in)
        monkeypatch.setattr(foreign_work.CpuUse, "now", classmethod(lambda cls: next(readings)))
        fleet = FleetConfig("f", experts={"a": ExpertConfig(gpu=gpu)})
        job = LiveConfig(fleet=fleet, users=[1, 2], repeats=2)
        known = FleetCalibration("f", {}, {}, {})
        validate._measure(job, simulation(job, fleet, 1), Preparations(), known, tmp_path)
        return said

    return measured


def test_a_measurement_that_breaks_off_never_costs_the_last_whole_one(
    tmp_path: Path, measure: Measure
) -> None:
    measure()
    runs, previous, broken = (tmp_path / name for name in ("runs", "runs.previous", "runs.broken"))
    assert json.loads((runs / WHOLE).read_text()) == {"users": [1, 2], "repeats": 2, "failed_again": []}
    (runs / "u1r0" / "run.json").write_text("the good one")
    with pytest.raises(ConfigError, match="it died"):
        measure(fails="u2r1")
    assert (runs / "u1r1" / "run.json").is_file() and not (runs / WHOLE).exists()
    assert (previous / "u1r0" / "run.json").read_text() == "the good one"
    with pytest.raises(ConfigError, match="it died"):
        measure(fails="u1r0")  # before any run was written
    assert (previous / "u1r0" / "run.json").read_text() == "the good one"
    assert (broken / "u1r1" / "run.json").is_file(), "what broke off is kept too, elsewhere"
    measure()
    assert (previous / "u1r0" / "run.json").read_text() == "the good one"
    assert (broken / "u1r1" / "run.json").is_file(), "one that left no run takes nobody's place"
    set_earlier_aside(runs, WHOLE, "*/run.json")
    assert (previous / "u1r0" / "run.json").read_text() == "attempt 0" and not runs.exists()


def test_servers_that_cannot_start_move_nothing(tmp_path: Path, measure: Measure) -> None:
    measure()
    with pytest.raises(ConfigError, match="port in use"):
        measure(fails="port")
    assert (tmp_path / "runs" / WHOLE).is_file() and not (tmp_path / "runs.previous").exists()


def test_runs_beside_others_work_are_measured_again_on_cpus_only(measure: Measure) -> None:
    disturbed = (0.5, 0.0, 0.0, 0.0, 0.0)
    assert "u1r0: other work on our cores used 0.50 of them" in measure(foreign=disturbed)
    said = measure("h100-80gb", foreign=(0.5,) * 4)
    assert [line for line in said if "other work" in line] == [], (
        "servers on GPUs have no use for these cores"
    )


def test_runs_that_the_hypervisor_took_cores_from_are_measured_again(
    tmp_path: Path, measure: Measure
) -> None:
    said = measure(foreign=(0.0,) * 7, stolen=(0.05, 0.01, 0.0, 0.12, 0.02, 0.07, 0.06))
    assert "u2r1: the hypervisor took 12 % of the steps' time" in said
    assert "u1r0: the best of 3 attempts had 5 % stolen; better measured on a quiet machine" in said
    runs = [(tmp_path / "runs" / tag / "run.json").read_text() for tag in ("u1r0", "u2r0", "u1r1", "u2r1")]
    assert runs == ["attempt 0", "attempt 0", "attempt 0", "attempt 1"], "the worst was made again first"
    assert not list((tmp_path / "runs").glob("*.new"))


@pytest.mark.parametrize(
    ("gpu", "foreign", "stolen", "tags"),
    [
        ("cpu", (0.5, 0.0, 0.3, 0.0, 0.0, 0.4, 0.35), (), ["p12r0", "p12r1", "p3r0t1", "p3r1"]),
        ("cpu", (0.0,) * 9, STOLEN, ["p12r0t1", "p12r1", "p3r0t2", "p3r1"]),
        ("h100-80gb", (0.5,) * 4, STOLEN[:4], ["p12r0", "p12r1", "p3r0", "p3r1"]),
    ],
)
def test_a_profiles_common_load_that_others_disturbed_is_driven_again_in_other_words(
    monkeypatch: pytest.MonkeyPatch,
    gpu: str,
    foreign: tuple[float, ...],
    stolen: tuple[float, ...],
    tags: list[str],
) -> None:
    """After all others; of three disturbed attempts at the third load the first was disturbed least."""
    readings = iter([
        CpuUse(at_s, (by * at_s,), 0.0, frozenset({0})) for by in foreign for at_s in (0.0, 10.0)
    ])  # fmt: skip
    driven: list[tuple[str, int, float, int]] = []
    shares = iter(stolen)

    def run_level(level: SimulationConfig, *rest: Any) -> Any:
        *_, seconds, tag, repeat = rest
        driven.append((tag, level.seed, seconds, repeat))
        return types.SimpleNamespace(tag=tag, logs={}, load=types.SimpleNamespace(start_s=10.0 * len(driven)))

    monkeypatch.setattr(profile, "run_level", run_level)
    monkeypatch.setattr(profile, "say", lambda _: None)
    monkeypatch.setattr(profile, "steps_stolen", lambda run: next(shares, 0.0))
    monkeypatch.setattr(foreign_work.CpuUse, "now", classmethod(lambda cls: next(readings)))
    fleet = FleetConfig("f", experts={"a": ExpertConfig(gpu=gpu)})
    job = LiveConfig(fleet=fleet, seed=5, plan=ProfilePlan(mixed_users=[3, 12], mixed_s=20.0, rounds=2))
    nobody: Any = None
    calmly = Calmly(again_s(job, fleet))
    found = profile._common_load(job, simulation(job, fleet, 1), Preparations(), nobody, nobody, "", calmly)
    assert sorted(run.tag for run in found) == tags
    assert [run.load.start_s for run in found] == sorted(run.load.start_s for run in found)
    assert {(seed, seconds) for _, seed, seconds, _ in driven} == {(5 + 3, 10.0), (5 + 12, 10.0)}
    assert [repeat for tag, *_, repeat in driven if "t" not in tag] == [0, 0, 1, 1]
    assert next(readings, None) is None and next(shares, None) is None
