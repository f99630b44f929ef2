"""Routings kept between processes: the same as fitted ones, and never trusted when in doubt."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import ersim
from ersim import fitted, prepare
from ersim.config import ExpertConfig, FleetConfig, RouterConfig, SimulationConfig, WorkloadConfig
from ersim.fitted import DIGEST_BYTES, Store


def config(seed: int = 0, router: RouterConfig | None = None) -> SimulationConfig:
    experts = {
        "code": ExpertConfig(domains=["code", "math"]),
        "rest": ExpertConfig(domains=["everyday", "writing"]),
    }
    return SimulationConfig(
        users=5,
        seed=seed,
        fleet=FleetConfig("two", experts=experts),
        router=router or RouterConfig(),
        workload=WorkloadConfig(requests=60),
    )


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every fit from here on."""
    done: list[int] = []
    original = prepare._fit

    def counted(*arguments: object) -> prepare.Routing:
        done.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_fit", counted)
    return done


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def test_a_kept_routing_gives_the_run_that_a_fitted_one_gives(tmp_path: Path, fits: list[int]) -> None:
    plain = ersim.simulate(config())
    first = ersim.simulate(config(), ersim.Preparations(Store(tmp_path)))
    again = ersim.simulate(config(), ersim.Preparations(Store(tmp_path)))
    assert len(fits) == 2  # the third run read what the second had kept
    assert plain.summary == first.summary == again.summary
    assert plain.table.frame().equals(again.table.frame())


def test_another_seed_policy_or_setting_is_fitted_anew(tmp_path: Path, fits: list[int]) -> None:
    for one in (
        config(),
        config(seed=1),
        config(router=RouterConfig(train_fraction=0.4)),
        config(router=RouterConfig(params={"clusters": 7})),
    ):
        ersim.Preparations(Store(tmp_path)).routing(one)
    assert len(fits) == len(files(tmp_path)) == 4


def test_changed_code_is_fitted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    before = store.path("same")
    monkeypatch.setattr(fitted, "_source_digest", lambda: "edited")
    fitted._surroundings.cache_clear()
    assert store.path("same") != before
    fitted._surroundings.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_fitted_anew_and_replaced(tmp_path: Path, fits: list[int], damage: str) -> None:
    whole = ersim.Preparations(Store(tmp_path)).routing(config())
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-100] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        body = pickle.dumps({"not": "a routing"})
        content = bytearray(hashlib.sha256(body).digest() + body)
    path.write_bytes(bytes(content))
    again = ersim.Preparations(Store(tmp_path)).routing(config())
    assert len(fits) == 2
    assert np.array_equal(whole.scores, again.scores) and whole.known == again.known
    assert len(path.read_bytes()) > DIGEST_BYTES + 1000


class Runs:
    """What a hostile file would hold: unpickled plainly, it runs a command."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.witness,)


def test_reading_a_file_runs_nothing(tmp_path: Path) -> None:
    store, witness = Store(tmp_path), tmp_path / "ran"
    body = pickle.dumps(Runs(str(witness)))
    store.path("x").write_bytes(hashlib.sha256(body).digest() + body)
    assert store.get("x") is None and not witness.exists()


def test_an_object_of_a_class_not_of_ours_is_not_kept(tmp_path: Path) -> None:
    Store(tmp_path).put("x", Path("somewhere"))
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_only_costs_the_fit(tmp_path: Path, fits: list[int]) -> None:
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file" / "cache")
    for _ in range(2):
        ersim.Preparations(store).routing(config())
    assert len(fits) == 2


def test_the_oldest_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "MAX_FILES", 2)
    store = Store(tmp_path)
    for age, name in enumerate("abc"):
        store.put(name, {"value": name})
        os.utime(store.path(name), (1e9 + age, 1e9 + age)) if store.path(name).exists() else None
    assert store.get("a") is None and store.get("b") == {"value": "b"} and store.get("c") == {"value": "c"}
