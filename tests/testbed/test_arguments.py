"""Options of the testbed's small commands: what cannot be is one message and a status."""

from __future__ import annotations

import argparse
import importlib
import socket
import sys

import pytest

from ersim.errors import SimulationError
from testbed import gateway_bench, outside_client, stub_upstream
from testbed.arguments import positive, whole


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gateway_bench --rate 0", "argument --rate: must be a number > 0, got '0'"),
        ("gateway_bench --rate inf", "argument --rate: must be a number > 0, got 'inf'"),
        ("gateway_bench --seconds 0", "argument --seconds: must be a number > 0, got '0'"),
        ("gateway_bench --seconds soon", "argument --seconds: must be a number > 0, got 'soon'"),
        ("gateway_bench --core 99999", "argument --core: must be one of "),
        ("gateway_bench --core -1", "argument --core: must be an integer >= 0, got '-1'"),
        ("gateway_bench --rate 0.1 --seconds 1", "must make one request a round, got 0.1 * 1 / 15"),
        ("gateway_bench --most 3 --rounds 4", "argument --most: must be >= --rounds 4, got 3"),
        ("recorder_bench --rows 0", "argument --rows: must be numbers from 1 to 512, as 1,16,64, got '0'"),
        ("recorder_bench --rows 8,8", "must be numbers from 1 to 512, as 1,16,64, got '8,8'"),
        ("recorder_bench --rows x", "must be numbers from 1 to 512, as 1,16,64, got 'x'"),
        ("recorder_bench --steps 0", "argument --steps: must be an integer >= 1, got '0'"),
        ("gateway_bench --rounds 0", "argument --rounds: must be an integer >= 1, got '0'"),
        ("stub_upstream", "arguments are required: port"),
        ("stub_upstream 99999", "argument port: must be an integer from 1 to 65535, got '99999'"),
        ("outside_client --users 0", "argument --users: must be an integer >= 1, got '0'"),
        ("outside_client --requests x", "argument --requests: must be an integer >= 1, got 'x'"),
        ("outside_client --output-tokens 1", "argument --output-tokens: must be an integer >= 2, got '1'"),
        ("outside_client --prompt-tokens 4096", "must be at most 4096 together, got 4128"),
    ],
)
def test_options_that_cannot_be_are_named(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command.split()
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"testbed.{name}").main()
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_numbers_in_bounds_pass() -> None:
    assert (positive("0.5"), whole(1)("3"), whole(1, 3)("3")) == (0.5, 3, 3)
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer from 1 to 3, got '4'"):
        whole(1, 3)("4")


def test_a_stub_on_a_port_that_is_taken_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["stub_upstream", str(port)])
        assert stub_upstream.main() == 1
    assert f"stub_upstream: port {port}: cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "part"), [(gateway_bench, "bench"), (outside_client, "compare")])
def test_what_fails_on_the_way_is_one_line(
    module: object, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise SimulationError("no vLLM here")

    monkeypatch.setattr(module, part, fail)
    monkeypatch.setattr(sys, "argv", [part])
    assert module.main() == 1  # type: ignore[attr-defined]
    assert capsys.readouterr().err.endswith(": no vLLM here\n")
