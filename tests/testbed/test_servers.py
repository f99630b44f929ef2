"""Starting and stopping: what is wrong is said before anything runs, and nothing outlives its starter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ersim.config import EngineSettings, ExpertConfig, FleetConfig, WorkloadConfig
from ersim.errors import ConfigError
from ersim.routing import ExpertProfile, create_policy
from ersim.steptime import ModelSpec, build_expert_model, load, load_model
from ersim.steptime.calibration import CALIBRATION_DIR
from testbed.calmly import Calmly
from testbed.expert_server import (
    ExpertFailed,
    ExpertServer,
    ServerSpec,
    answers,
    check_port,
    check_vllm,
    free_port,
    server_command,
    server_environment,
)
from testbed.fleet import LiveFleet, server_specs
from testbed.gateway.process import GatewayFailed, GatewayProcess
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings
from testbed.live_settings import read_live
from testbed.plan import ProfilePlan, check_plan, phases
from testbed.power import PowerSampler
from testbed.server_log import exceptions
from testbed.standing import check_standing
from testbed.weightless import llama_config, write_model

ROOT = Path(__file__).resolve().parents[2]


def spec(tmp_path: Path, **live: Any) -> ServerSpec:
    settings = read_live(live, "bf16", "e")
    return ServerSpec("e", "e", str(tmp_path), free_port(), 1, EngineSettings(), settings, tmp_path, [0], [])


def fake_vllm(tmp_path: Path, code: str) -> str:
    """An interpreter whose `-m vllm...` runs `code`; everything else is Python as usual."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "api_server.py").write_text(code)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site:$PYTHONPATH exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    return str(wrapper)


def test_unknown_and_impossible_live_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"e\.live must be one of.*got 'prot'"):
        read_live({"prot": 1}, "bf16", "e")
    with pytest.raises(ConfigError, match=r"e\.live\.quantization"):
        read_live({"quantization": "nf4"}, "bf16", "e")
    with pytest.raises(ConfigError, match=r"e\.live\.tokenizer"):
        read_live({"tokenizer": "model"}, "bf16", "e")
    with pytest.raises(ConfigError, match=r"e\.live\.port"):
        read_live({"port": 70000}, "bf16", "e")


def test_a_port_in_use_is_one_clear_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"fleet\.experts\.a\.live\.port must be a free port"):
            check_port(taken.getsockname()[1], "fleet.experts.a")


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, "")))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        server.start()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_no_vllm_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="make venv-live"):
        check_vllm(None)


def test_an_expert_that_dies_shows_its_log(tmp_path: Path) -> None:
    code = "import sys\nprint('no kernel image is available')\nsys.exit(3)\n"
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, code)))
    server.start()
    with pytest.raises(ExpertFailed, match=r"ended with status 3(.|\n)*no kernel image is available"):
        server.wait_ready()


def test_an_expert_that_never_gets_ready_is_stopped(tmp_path: Path) -> None:
    code = (
        "import signal, time\n"
        "def stopped(*given): raise RuntimeError('cancelled')\n"
        "signal.signal(signal.SIGINT, stopped)\n"
        "print('loading', flush=True)\ntime.sleep(600)\n"
    )
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, code), ready_timeout_s=2.0))
    server.start()
    with pytest.raises(ExpertFailed, match=r"not healthy within 2 s(.|\n)*loading") as raised:
        server.wait_ready()
    assert not server.running and "cancelled" in server.spec.log_path.read_text()
    assert "cancelled" not in str(raised.value), "its stop is not why it was late"


REFUSED = """\
(APIServer pid=7) INFO 11-21 15:39:30 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=9) ERROR 11-21 15:39:52 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-21 15:39:52 [core.py:1510]   File "core.py", line 1482, in run_engine_core
(EngineCore pid=9) ERROR 11-21 15:39:52 [core.py:1510] {cause}
Traceback (most recent call last):
  File "utils.py", line 1431, in wait_for_engine_startup
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (
            "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4",
            r"take fleet\.experts\.e\.precision=int8, int4 or bf16",
        ),
        (
            "ValueError: Failed to find a kernel that can implement the ScaledMM linear layer. Reasons: \n"
            "(EngineCore pid=9) ERROR 11-21 15:39:52 [core.py:1510] CPUFp8BlockScaledMMKernel requires AMX",
            r"take fleet\.experts\.e\.precision=int8, int4 or bf16.* Reasons: CPUFp8Block\w+ requires AMX",
        ),
        (
            "ValueError: Available memory on node 0 (9.1/23.5 GiB) on kv cache allocation is less than "
            "requested memory for kv (400.0 GiB).",
            r"lower fleet\.experts\.e\.live\.kv_space_gib",
        ),
        (
            "ValueError: To serve at least one request with the models's max seq len (8192), 0.02 GiB KV "
            "cache is needed, which is larger than the available KV cache memory (0.01 GiB).",
            r"raise fleet\.experts\.e\.live\.kv_space_gib .*lower fleet\.experts\.e\.engine\.max_model_len",
        ),
        (
            "OSError: We couldn't connect to 'http://127.0.0.1:9' to load the files, and couldn't find them "
            "in the cached files.",
            r"fleet\.experts\.e\.live\.model names a model of the hub.*give the directory of a model",
        ),
    ],
)
def test_a_refusal_that_is_known_is_one_line_with_its_remedy(tmp_path: Path, cause: str, remedy: str) -> None:
    code = f"import sys\nsys.stderr.write({REFUSED.format(cause=cause)!r})\nsys.exit(1)\n"
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, code)))
    earlier = "OSError: We couldn't connect to 'http://127.0.0.1:8' to load the files\n"
    server.spec.log_path.write_text(earlier)
    server.start()
    with pytest.raises(ExpertFailed, match=remedy) as raised:
        server.wait_ready()
    assert cause.splitlines()[0].strip() in str(raised.value) and str(server.spec.log_path) in str(
        raised.value
    )
    assert len(str(raised.value).splitlines()) == 1 and earlier.strip() not in str(raised.value)


def test_any_other_refusal_names_the_first_exception_and_shows_the_end(tmp_path: Path) -> None:
    first, *others = REFUSED.format(cause="TypeError: later").splitlines(keepends=True)
    log = [first, "pydantic.ValidationError: 1 validation error\n", "  Value error, no such thing\n", *others]
    code = f"import sys\nsys.stderr.write({''.join(log)!r})\nsys.exit(1)\n"
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, code)))
    server.start()
    with pytest.raises(ExpertFailed, match="Engine core initialization failed") as raised:
        server.wait_ready()
    told = str(raised.value).splitlines()[0]
    assert "status 1 (pydantic.ValidationError: 1 validation error Value error, no such thing);" in told


def test_what_another_process_logs_does_not_continue_an_exception() -> None:
    """Two ranks, whose lines alternate; each exception goes on with its own process's next line only."""
    first, second = (f"(Worker_TP{n} pid={n}) ERROR 11-21 15:39:52 [worker.py:1] " for n in (1, 2))
    lines = (first, "ValueError: a"), (second, "OSError: b"), (second, "goes on"), ("", "INFO done")
    assert list(exceptions("\n".join(map("".join, lines)))) == ["ValueError: a", "OSError: b goes on"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def start_supervised(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    note = tmp_path / "pids"
    command = [sys.executable, "-m", "testbed.supervisor", "--", sys.executable, "-c", STUBBORN, str(note)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if note.exists() and len(note.read_text().split()) == 2:
            break
        time.sleep(0.05)
    return process, [int(pid) for pid in note.read_text().split()]


@pytest.mark.slow
def test_closing_the_pipe_ends_the_whole_group(tmp_path: Path) -> None:
    process, pids = start_supervised(tmp_path)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    assert wait_gone(pids)


@pytest.mark.slow
def test_a_killed_starter_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGKILL cannot be caught: the supervisor notices that the pipe is gone."""
    note = tmp_path / "pids"
    starter = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'testbed.supervisor', '--', sys.executable, '-c', *sys.argv[1:]]\n"
        "subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter, STUBBORN, str(note)], cwd=ROOT)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (note.exists() and len(note.read_text().split()) == 2):
        time.sleep(0.05)
    pids = [int(pid) for pid in note.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait(5)
    assert wait_gone(pids, 20)


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_command_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    nap = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-m", "testbed.supervisor", "--", sys.executable, "-c", nap, str(note)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (note.exists() and note.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait(5)
    assert wait_gone([int(note.read_text())], 5)


HEALTHY = """
import http.server, os, pathlib, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

value = dict(zip(sys.argv, sys.argv[1:]))
assert pathlib.Path(value["--model"], "config.json").is_file(), value["--model"]
pathlib.Path(os.environ["ERSIM_STEP_LOG"]).write_text("steps")
http.server.HTTPServer(("127.0.0.1", int(value["--port"])), Handler).serve_forever()
"""


def test_servers_start_from_any_folder_and_past_any_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are those of who starts the server; loopback is asked directly whatever the environment says."""
    python = fake_vllm(tmp_path, HEALTHY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    one = dataclasses.replace(spec(tmp_path, python=python), model="./", folder=Path("files"))
    server = ExpertServer(one)
    server.start()
    try:
        server.wait_ready()
        assert (tmp_path / "files" / "e.steps.jsonl").read_text() == "steps"
        policy = Path("policy.bin")
        create_policy("round_robin", [ExpertProfile("e", "m")], {}).save(policy)
        settings = GatewaySettings([ExpertEndpoint("e", [one.url])], str(policy), port=free_port())
        with GatewayProcess(settings, Path("files")) as gateway:
            assert answers(gateway.url + "/ready")
        assert not answers(gateway.url + "/ready")
    finally:
        server.stop()
    assert not server.running and not answers(one.url)


DIES_WHEN_ASKED = HEALTHY.replace(
    "\nvalue =",
    """
    def do_POST(self):
        print("the card fell out", flush=True)
        os._exit(7)

value =""",
)


def test_an_expert_that_dies_while_it_is_looked_at_alone_shows_its_log(tmp_path: Path) -> None:
    server = ExpertServer(spec(tmp_path, python=fake_vllm(tmp_path, DIES_WHEN_ASKED)))
    any_known = load(sorted(CALIBRATION_DIR.rglob("*.json"))[0])
    known = dataclasses.replace(any_known, engine={**any_known.engine, "max_model_len": 2048})
    alone = build_expert_model(ExpertConfig(), "expert").step_time()
    server.start()
    try:
        server.wait_ready()
        began_s = time.monotonic()
        with pytest.raises(ExpertFailed, match=r"expert e ended with status 7(.|\n)*the card fell out"):
            check_standing(server, alone, known, 1000, WorkloadConfig(), 1, Calmly(0.0))
        assert time.monotonic() - began_s < 10
    finally:
        server.stop()


LIKE_VLLM = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getppid(), os.getpid(), child.pid, flush=True)
"""
MEASURES = """
import signal, sys, time
from pathlib import Path
from ersim.config import ExpertConfig, FleetConfig
from experiments.live_schema import run_command
from testbed.fleet import LiveFleet

python, folder = sys.argv[1:]
expert = ExpertConfig(gpu="cpu", replicas=2, live={"python": python, "model": folder})

def measure():
    with LiveFleet(FleetConfig("f", experts={"e": expert}), Path(folder)):
        print("ready", flush=True)
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without it
run_command(measure, "ersim-measure")
"""


def logged_pids(tmp_path: Path, servers: int) -> list[int]:
    """Of supervisors, servers and their children, once all of them have said theirs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        words = [path.read_text().split() for path in sorted(tmp_path.glob("*.log"))]
        if len(words) == servers and all(word[:1] == ["pids"] and len(word) >= 4 for word in words):
            return [int(pid) for word in words for pid in word[1:4]]
        time.sleep(0.05)
    raise AssertionError(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_an_interrupted_fleet_leaves_no_server(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """A command with two replicas is interrupted, as a terminal does it: one line, status 130, no process."""
    python = fake_vllm(tmp_path, LIKE_VLLM + (HEALTHY if when == "ready" else "import time; time.sleep(600)"))
    command = subprocess.Popen(
        [sys.executable, "-c", MEASURES, python, str(tmp_path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    pids: list[int] = []
    try:
        pids = logged_pids(tmp_path, 2)
        if when == "ready":
            assert command.stdout is not None and command.stdout.readline() == "ready\n"
        assert len(set(pids)) == 6 and all(alive(pid) for pid in pids)
        os.killpg(command.pid, number)
        _, told = command.communicate(timeout=60)
        assert not any(alive(pid) for pid in pids), "a server outlived its command"
        assert command.returncode == 130
        assert re.fullmatch(r"ersim-measure: interrupted.*\n", told), told
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        command.kill()
        command.wait()


def test_commands_and_environment_follow_the_config(tmp_path: Path) -> None:
    one = spec(tmp_path, cores=[[0]], args=["--seed", 5], env={"X": 1})
    command = server_command(one)
    assert command[command.index("--served-model-name") + 1 :][:2] == ["auto", "e"]
    assert command[command.index("--distributed-executor-backend") + 1] == "uni"
    assert "--load-format" in command and command[-2:] == ["--seed", "5"]
    environment = server_environment(one, {"PATH": os.environ["PATH"]})
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0" and environment["X"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    on_gpus = dataclasses.replace(one, live=read_live({"device": "gpu"}, "bf16", "e"), gpus=[2, 3])
    environment = server_environment(on_gpus, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3" and environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_each_rank_has_its_share_of_the_cores(tmp_path: Path) -> None:
    one = dataclasses.replace(spec(tmp_path, kv_space_gib=0.25), tp=2, cores=[4, 5, 6, 7])
    command, environment = server_command(one), server_environment(one, {"VLLM_CPU_KVCACHE_SPACE": "9"})
    assert command[command.index("--distributed-executor-backend") + 1] == "mp"
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(2**28)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment, "it would override the argument"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "4,5|6,7" and environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("tp", "cores", "message"),
    [
        (2, [[0, 1, 2]], r"fleet\.experts\.a\.live\.cores must be as many for each of the 2 ranks"),
        (4, [], r"fleet\.experts\.a\.tp must be a divisor of the 6 attention heads of llama-36m"),
    ],
)
def test_what_ranks_cannot_share_is_said_before_anything_starts(
    tmp_path: Path, tp: int, cores: list[list[int]], message: str
) -> None:
    expert = ExpertConfig(model="llama-36m", gpu="cpu", tp=tp, live={"cores": cores})
    with pytest.raises(ConfigError, match=message):
        server_specs(FleetConfig("f", experts={"a": expert}), tmp_path)


def test_a_port_for_every_replica_is_said_before_anything_starts(tmp_path: Path) -> None:
    expert = ExpertConfig(model="llama-36m", gpu="cpu", replicas=2, live={"port": 65535})
    with pytest.raises(ConfigError, match=r"fleet\.experts\.a\.live\.port must be at most 65534"):
        server_specs(FleetConfig("f", experts={"a": expert}), tmp_path)


def test_one_config_gives_simulator_and_servers_the_same_fleet(tmp_path: Path) -> None:
    expert = ExpertConfig(model="llama-36m", gpu="cpu", replicas=2, live={"cores": [[0], [1]]})
    specs = server_specs(FleetConfig("f", experts={"a": expert}), tmp_path)["a"]
    assert [one.cores for one in specs] == [[0], [1]] and len({one.port for one in specs}) == 2
    written = json.loads((tmp_path / "models" / "a" / "config.json").read_text())
    assert ModelSpec.from_hf_config(written).params == load_model("llama-36m").params


def test_free_ports_are_nobodys_even_before_anybody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may hand out one port twice in a row; a port that was given may be a free one as well."""
    offered = iter([9100, 9100, 9001, 9101])

    class Probe:
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def bind(self, _: object) -> None: ...

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", next(offered)

    monkeypatch.setattr("testbed.expert_server.socket.socket", Probe)
    experts = {
        "a": ExpertConfig(model="llama-36m", gpu="cpu", replicas=2),
        "b": ExpertConfig(model="llama-36m", gpu="cpu", replicas=2, live={"port": 9000}),
    }
    specs = server_specs(FleetConfig("f", experts=experts), tmp_path)
    assert [spec.port for spec in specs["a"]] == [9100, 9101]
    assert [spec.port for spec in specs["b"]] == [9000, 9001]


def test_servers_that_share_a_core_say_so(tmp_path: Path) -> None:
    def said(**cores: list[list[int]]) -> list[str]:
        experts = {
            name: ExpertConfig(model="llama-36m", gpu="cpu", live={"cores": given})
            for name, given in cores.items()
        }
        experts["two"] = ExpertConfig(model="llama-36m", gpu="cpu", replicas=2, live={"cores": [[7], [8]]})
        lines: list[str] = []
        LiveFleet(FleetConfig("f", experts=experts), tmp_path, lines.append)
        return lines

    assert said(a=[[0]], b=[[1]], c=[]) == []
    assert said(a=[[0, 1]], b=[[0, 7]]) == ["a, b share core 0", "b, two-0 share core 7"]


def test_weightless_folders_hold_config_and_exact_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", load_model("llama-36m"), "int8", 4096, tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 32000
    assert (
        llama_config(load_model("llama3.1-8b"), "fp8", 8192)["quantization_config"]["quant_method"] == "fp8"
    )


def test_the_profile_plan_fits_the_engine_and_puts_basics_first() -> None:
    with pytest.raises(ConfigError, match=r"plan\.prefill_tokens must be at most 8190 .*got 9000"):
        check_plan(ProfilePlan(prefill_tokens=[9000]), 8192)
    names = [phase.name for phase in phases(ProfilePlan(), 8)]
    assert names[:2] == ["warmup", "prefill"] and "decode-c64-b16" not in names


def test_power_is_absent_without_a_gpu_and_says_why() -> None:
    with PowerSampler(0.01) as power:
        time.sleep(0.05)
    assert power.log.rows or power.log.absent


def test_a_gateway_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = GatewaySettings(
        experts=[ExpertEndpoint("a", ["http://127.0.0.1:9"])],
        policy_path=str(tmp_path / "absent"),
        port=free_port(),
    )
    with pytest.raises(GatewayFailed, match="absent"), GatewayProcess(settings, tmp_path):
        pass
