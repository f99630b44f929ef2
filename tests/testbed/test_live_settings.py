"""An expert's `live` mapping: every wrong kind of value is one message with its key."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ersim.errors import ConfigError
from testbed.live_settings import KINDS, LiveSettings, check_machine, read_live

NAN, INFINITE = float("nan"), float("inf")


def test_every_setting_has_its_kind_and_the_defaults_are_of_it() -> None:
    assert set(KINDS) == {item.name for item in dataclasses.fields(LiveSettings)}
    assert read_live(dataclasses.asdict(LiveSettings()), "bf16", "e").quantization == "bf16"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", (5, "", ["m"])),
        ("quantization", (["bf16"], 8)),
        ("tokenizer", (None, ["word"])),
        ("device", (None, 0)),
        ("port", ("abc", None, 1.5, True, -1, 65536)),
        ("cores", ([0, 1], 3, "0", None, [[-1]], [[0, 0]], [[1.0]], [[True]], [["0-3"]], [[]])),
        ("gpus", ([0], [[0, 0]], 1)),
        ("api_servers", ("x", 0, 1.0, None, True)),
        ("kv_space_gib", (None, "1", 0, -1.0, NAN, INFINITE, True)),
        ("python", (3, "")),
        ("ready_timeout_s", ("abc", None, 0, NAN, INFINITE)),
        ("record_steps", ("yes", None, 1)),
        ("args", ("--foo", None, [None], [["--foo"]], {"--foo": 1}, [True])),
        ("env", (["a"], "A=1", None, {"A": None}, {"A": True}, {1: "a"})),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as raised:
            read_live({name: value}, "bf16", "fleet.experts.a")
        told = str(raised.value)
        assert told.startswith(f"fleet.experts.a.live.{name} must be ") and told.endswith(f"got {value!r}")


def test_values_of_the_right_kind_are_taken() -> None:
    given: dict[str, Any] = {
        "cores": [[0, 1], [2]], "gpus": [], "args": ["--seed", 5, 0.5], "env": {"A": "x", "B": 1},
        "port": 65535, "kv_space_gib": 2, "api_servers": 4, "model": None,
    }  # fmt: skip
    settings = read_live(given, "bf16", "e")
    assert {name: getattr(settings, name) for name in given} == given


def test_the_last_replicas_port_must_be_one() -> None:
    assert read_live({"port": 65534}, "bf16", "e", replicas=2).port == 65534
    assert read_live({"port": 0}, "bf16", "e", replicas=70000).port == 0
    with pytest.raises(ConfigError, match=r"e\.live\.port must be at most 65534, one for each of 2 replicas"):
        read_live({"port": 65535}, "bf16", "e", replicas=2)


def test_a_home_directory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_live({"model": "~/m"}, "bf16", "e").model == f"{tmp_path}/m"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells")
def test_cores_must_be_there() -> None:
    here = sorted(os.sched_getaffinity(0))
    check_machine(read_live({"cores": [here]}, "bf16", "e"), "e")
    absent = read_live({"cores": [here[:1], [9999]]}, "bf16", "e")
    message = re.escape(f"e.live.cores must be cores of this machine ({here}), got [9999]")
    with pytest.raises(ConfigError, match=message):
        check_machine(absent, "e")
    check_machine(dataclasses.replace(absent, device="gpu"), "e")
