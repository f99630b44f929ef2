"""`ersim-serve`: the real gateway and supervisors before stand-ins for vLLM, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from ersim.config import ExpertConfig, FleetConfig, RouterConfig
from ersim.errors import ConfigError, DataError
from ersim.routing import load_policy
from experiments import serve
from experiments.live_schema import ServeConfig, register
from experiments.session_check import _composed
from testbed.expert_server import answers, free_port
from testbed.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "experiments" / "measured" / "cpu" / "live_cpu_pairs"
URLS = {"large": ["http://127.0.0.1:9001"], "small": ["http://127.0.0.1:9002"]}
VLLM = """
import http.server, os, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_DELETE(self):
        os._exit(5)

assert "--scheduler-cls" not in sys.argv, "no step is recorded while serving"
value = dict(zip(sys.argv, sys.argv[1:]))
time.sleep(60 if os.environ.get("SLOW") else 0)
http.server.HTTPServer(("127.0.0.1", int(value["--port"])), Handler).serve_forever()
"""


def fleet() -> FleetConfig:
    domains = {"large": ["code", "math"], "small": ["history"]}
    models = {"large": ("llama-75m", "int8"), "small": ("llama-36m", "bf16")}
    experts = {
        name: ExpertConfig(*models[name], "cpu", domains=domains[name], live={"cores": [[0]]})
        for name in models
    }
    return FleetConfig("live_cpu", experts=experts)


def job(**changes: Any) -> ServeConfig:
    return ServeConfig(**{"fleet": fleet(), "router": RouterConfig(policy="cluster"), **changes})


def fake_python(folder: Path) -> str:
    package = folder / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for one in (package, package.parent, package.parent.parent):
        (one / "__init__.py").write_text("")
    (package / "api_server.py").write_text(VLLM)
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/site:$PYTHONPATH exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def wait_for(what: Any, limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.1)


def gateway_process(folder: Path) -> psutil.Process:
    """The gateway itself, and not its supervisor."""
    settings = str(folder / "serve" / "gateway.json")
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if settings in command and "testbed.supervisor" not in command:
            return process
    raise AssertionError(f"no gateway of {settings} runs")


class Served:
    """The command as a process of its own: what it said, and its gateway."""

    def __init__(self, folder: Path, *given: str) -> None:
        self.log, self.folder = folder / "said.txt", folder
        port, python = free_port(), fake_python(folder)
        self.gateway = f"http://127.0.0.1:{port}"
        lives = [f"+fleet.experts.{name}.live.python={python}" for name in URLS]
        cores = [f"fleet.experts.{name}.live.cores=[[0]]" for name in URLS]
        command = [sys.executable, "-m", "experiments.serve", f"folder={folder}", f"port={port}"]
        with open(self.log, "w") as said:
            self.process = subprocess.Popen(
                [*command, *lives, *cores, *given], cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True,
                start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_ready(self) -> None:
        """Until the command itself knows that its gateway listens, and all experts answer through it."""
        wait_for(lambda: self.process.poll() is not None or self.said("gateway on"))
        wait_for(lambda: self.process.poll() is not None or answers(f"{self.gateway}/ready"))
        assert self.process.poll() is None, self.log.read_text()

    def urls(self) -> dict[str, str]:
        experts = json.loads((self.folder / "serve" / "gateway.json").read_text())["experts"]
        return {one["name"]: one["urls"][0] for one in experts}

    def kill(self, name: str) -> None:
        with pytest.raises((ConnectionError, OSError)):
            urllib.request.urlopen(urllib.request.Request(self.urls()[name], method="DELETE"), timeout=5)

    def stop(self, number: signal.Signals) -> tuple[int, dict[str, Any] | None]:
        """Status, and the last line printed if there is one; nothing of it runs afterwards."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        assert not answers(f"{self.gateway}/health")
        if (self.folder / "serve" / "gateway.json").is_file():
            assert not any(answers(f"{url}/health") for url in self.urls().values())
        lines = output.splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_fleet_is_served_kept_running_and_stopped(tmp_path: Path, number: signal.Signals) -> None:
    with Served(tmp_path) as served:
        served.wait_ready()
        served.kill("large")
        wait_for(lambda: served.said("expert large answers again"))
        assert answers(f"{served.urls()['large']}/health")
        status, last = served.stop(number)
    assert status == 0 and last is not None, served.log.read_text()
    assert (last["command"], last["restarted"], last["url"]) == (
        "ersim-serve", {"large": 1, "small": 0}, served.gateway,
    )  # fmt: skip
    for text in ("no profile in", "ended with status 5", "(1 of 3)", "gateway and experts are stopped"):
        assert served.said(text), served.log.read_text()


@pytest.mark.slow
def test_one_that_is_stopped_while_it_starts_has_served_nothing(tmp_path: Path) -> None:
    with Served(tmp_path, "+fleet.experts.large.live.env.SLOW=1") as served:
        wait_for(lambda: served.said("starting expert small"))
        status, last = served.stop(signal.SIGINT)
    assert (status, last) == (130, None)
    assert served.said("interrupted; its servers are stopped")


@pytest.mark.slow
def test_the_last_expert_and_the_gateway_end_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Served(tmp_path / "a", "restarts=0", "~fleet.experts.small") as served:
        served.wait_ready()
        served.kill("large")
        assert served.process.wait(60) == 1
    for text in ("no expert is left: ", "ended with status 5", "0 restarts are all (restarts)"):
        assert served.said(text), served.log.read_text()
    with Served(tmp_path / "b") as served:
        served.wait_ready()
        experts = served.urls()
        gateway_process(served.folder).kill()
        assert served.process.wait(60) == 1
    assert served.said("the gateway ended with status"), served.log.read_text()
    assert not any(answers(f"{url}/health") for url in experts.values())


def test_a_profiled_fleet_is_routed_as_the_simulator_routes_it(tmp_path: Path) -> None:
    settings = serve.serving_settings(job(folder=str(STORED)), fleet(), URLS, tmp_path)
    assert [(one.name, one.urls, one.domains) for one in settings.experts] == [
        ("large", URLS["large"], ["code", "math"]), ("small", URLS["small"], ["history"]),
    ]  # fmt: skip
    stored = json.loads((STORED / "large.json").read_text())
    assert settings.experts[0].slots == stored["engine"]["max_num_seqs"]
    assert list(load_policy(settings.policy_path, list(URLS)).experts) == list(URLS)
    assert (settings.host, settings.port, settings.access_log) == ("127.0.0.1", 8100, None)


def test_one_that_was_not_profiled_is_served_without_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(serve, "say", said.append)
    wanted = job(folder=str(tmp_path), port=9000, api_keys=["secret"])
    wanted.gateway.queue_limit = 7
    settings = serve.serving_settings(wanted, fleet(), URLS, tmp_path / "serve")
    assert settings.experts[0].slots == 1024 and settings.queue_limit == 7
    assert (settings.port, settings.api_keys) == (9000, ["secret"])
    assert len(said) == 1 and said[0].startswith(f"no profile in {tmp_path}: the router knows no prices")
    default = serve.serving_settings(job(folder=str(tmp_path)), fleet(), URLS, tmp_path / "serve")
    assert default.queue_limit == GatewaySettings.queue_limit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restarts": -1}, "restarts must be >= 0, got -1"),
        ({"port": 0}, "port must be from 1 to 65535, got 0"),
        ({"port": 99999}, "port must be from 1 to 65535, got 99999"),
        (
            {"host": "0.0.0.0"},
            r"host must be one of .* unless api_keys=\[\.\.\.\] are given, got '0\.0\.0\.0'",
        ),
        ({"host": "no.such.host.", "api_keys": ["k"]}, "host must be an address of this machine, got"),
        ({"host": "a..b", "api_keys": ["k"]}, r"host must be an address of this machine, got 'a\.\.b'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        serve.serve(job(folder=str(tmp_path), **changes))
    assert not (tmp_path / "serve").exists()


def test_a_port_that_is_taken_or_an_experts_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port must be a free port of 127\.0\.0\.1, got {port}"):
            serve.check_port(job(port=port), [port + 1])
    with pytest.raises(
        ConfigError, match=r"port must be none of the experts' ports \(8100, 8101\), got 8101"
    ):
        serve.check_port(job(port=8101), [8100, 8101])


def test_a_profile_whose_calibration_was_exchanged_is_refused(tmp_path: Path) -> None:
    for file in STORED.glob("*.json"):
        shutil.copy(file, tmp_path)
    stored = json.loads((tmp_path / "large.json").read_text())
    (tmp_path / "large.json").write_text(json.dumps({**stored, "kv_blocks": stored["kv_blocks"] + 1}))
    with pytest.raises(DataError, match=r"calibration of expert large .* is not the one that"):
        serve.serving_settings(job(folder=str(tmp_path)), fleet(), URLS, tmp_path / "serve")


def test_experts_that_do_not_record_are_served() -> None:
    """What a profile refuses."""
    register()
    for name, refused in (("serve", False), ("profile", True)):
        overrides = ["fleet=live_cpu", "+fleet.experts.large.live.record_steps=false"]
        if refused:
            with pytest.raises(ConfigError, match=r"large\.live\.record_steps must be true"):
                _composed(f"live/{name}", overrides)
        else:
            assert isinstance(_composed(f"live/{name}", overrides), ServeConfig)


def test_steps_are_recorded_where_it_is_asked_for() -> None:
    asked = fleet()
    asked.experts["large"].live["record_steps"] = True
    found = serve.unrecorded(asked)
    assert [one.live["record_steps"] for one in found.experts.values()] == [True, False]
    assert "record_steps" not in asked.experts["small"].live, "the job's own fleet is as it was"
