"""`ersim-serve`: the real gateway and supervisors before stand-ins for vLLM, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ersim.config import ExpertConfig, FleetConfig, RouterConfig
from ersim.errors import ConfigError
from ersim.routing import load_policy
from experiments import serve
from experiments.live_schema import ServeConfig
from testbed.expert_server import answers, free_port
from testbed.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "experiments" / "measured" / "cpu" / "live_cpu_pairs"
URLS = {"large": ["http://127.0.0.1:9001"], "small": ["http://127.0.0.1:9002"]}
VLLM = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_DELETE(self):
        os._exit(5)

assert "--scheduler-cls" not in sys.argv, "no step is recorded while serving"
value = dict(zip(sys.argv, sys.argv[1:]))
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


@pytest.mark.slow
def test_a_fleet_is_served_kept_running_and_stopped(tmp_path: Path) -> None:
    port, python, log = free_port(), fake_python(tmp_path), tmp_path / "said.txt"
    given = [f"+fleet.experts.{name}.live.python={python}" for name in URLS]
    command = [
        sys.executable, "-m", "experiments.serve", f"folder={tmp_path}", f"port={port}", *given,
        "fleet.experts.large.live.cores=[[0]]", "fleet.experts.small.live.cores=[[0]]",
    ]  # fmt: skip
    with open(log, "w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        gateway = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(f"{gateway}/ready"))
        assert process.poll() is None, log.read_text()
        experts = json.loads((tmp_path / "serve" / "gateway.json").read_text())["experts"]
        urls = {one["name"]: one["urls"][0] for one in experts}
        with pytest.raises((ConnectionError, OSError)):
            urllib.request.urlopen(urllib.request.Request(urls["large"], method="DELETE"), timeout=5)
        wait_for(lambda: "expert large answers again" in log.read_text())
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()
    last = json.loads(output.splitlines()[-1])
    assert (last["command"], last["restarted"], last["url"]) == (
        "ersim-serve", {"large": 1, "small": 0}, gateway,
    )  # fmt: skip
    said_text = log.read_text()
    assert "no profile of large, small in" in said_text and "ersim-profile" in said_text
    assert "ended with status 5" in said_text and "gateway and experts are stopped" in said_text
    assert not answers(f"{gateway}/health") and not any(answers(f"{url}/health") for url in urls.values())


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
    assert len(said) == 1 and "make it with ersim-profile" in said[0]
    default = serve.serving_settings(job(folder=str(tmp_path)), fleet(), URLS, tmp_path / "serve")
    assert default.queue_limit == GatewaySettings.queue_limit


def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "check_servers", lambda fleet: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port must be a free port of 127\.0\.0\.1, got {port}"):
            serve.serve(job(folder=str(tmp_path), port=port))
    with pytest.raises(ConfigError, match="restarts must be >= 0, got -1"):
        serve.serve(job(folder=str(tmp_path), restarts=-1))
    with pytest.raises(
        ConfigError, match=r"gateway\.host must be a loopback address unless api_keys are set"
    ):
        serve.serve(job(folder=str(tmp_path), host="0.0.0.0", port=free_port()))
    assert not list((tmp_path / "serve").glob("*.log")), "no server was started"


def test_steps_are_recorded_where_it_is_asked_for() -> None:
    asked = fleet()
    asked.experts["large"].live["record_steps"] = True
    found = serve.unrecorded(asked)
    assert [one.live["record_steps"] for one in found.experts.values()] == [True, False]
    assert "record_steps" not in asked.experts["small"].live, "the job's own fleet is as it was"
