"""One real vLLM OpenAI server: started from the expert's configuration, watched, and surely stopped."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ersim.config import EngineSettings
from ersim.errors import ConfigError, ErsimError, bad_value
from testbed.live_settings import LiveSettings, check_machine
from testbed.server_log import explanation, root_cause, tail

HOST = "127.0.0.1"
AUTO_MODEL = "auto"
POLL_S = 0.25
STOP_TIMEOUT_S = 20.0
GIB_BYTES = 2**30
ROOT = Path(__file__).resolve().parents[1]
SWITCHES = (
    "enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "scheduler_reserve_full_isl",
)  # fmt: skip


class ExpertFailed(ErsimError, RuntimeError):
    """A server that did not start, or stopped; the message ends with the tail of its log."""


@dataclass(frozen=True)
class ServerSpec:
    """What one server process needs: a model folder or hub id, a port, cores or GPUs, a folder for its files.

    It answers to two model names: ``auto`` (what clients of the gateway ask for) and its expert's.
    """

    name: str
    expert: str
    model: str
    port: int
    tp: int
    engine: EngineSettings
    live: LiveSettings
    folder: Path
    cores: Sequence[int] = field(default_factory=tuple)
    gpus: Sequence[int] = field(default_factory=tuple)

    @property
    def key(self) -> str:
        """Where the fleet config describes the expert."""
        return f"fleet.experts.{self.expert}"

    @property
    def url(self) -> str:
        """Base URL, without a slash at its end."""
        return f"http://{HOST}:{self.port}"

    @property
    def log_path(self) -> Path:
        """Standard output and error of the server."""
        return self.folder / f"{self.name}.log"

    @property
    def steps_path(self) -> Path:
        """Where the recorder writes."""
        return self.folder / f"{self.name}.steps.jsonl"


def with_project(base: Mapping[str, str]) -> dict[str, str]:
    """An environment in which `python -m testbed...` is found from any working directory."""
    paths = [str(ROOT), base.get("PYTHONPATH", "")]
    return {**base, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def answers(url: str) -> bool:
    """Whether GET answers 200 within two seconds; never by way of a proxy that the environment names."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def free_port(taken: Collection[int] = ()) -> int:
    """A TCP port that nobody listens on at this moment, and none of those taken."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
        if port not in taken:  # the system may give the same one twice before anybody listens
            return port


def port_is_free(port: int, host: str = HOST) -> bool:
    """Whether one may listen there: nobody does, and it is a port of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError, UnicodeError):  # above 65535; a name that is none
            return False
        return True


def check_port(port: int, key: str) -> None:
    """Raise ConfigError if somebody listens on the port already."""
    if not port_is_free(port):
        raise bad_value(f"{key}.live.port", "a free port (or 0 for any)", port)


def check_model_folder(model: str, key: str) -> None:
    """Raise ConfigError for a local model directory that vLLM could not read."""
    folder = Path(model)
    local = folder.is_absolute() or model.startswith((".", "~"))
    if local and not folder.is_dir():
        raise bad_value(f"{key}.live.model", "an existing directory or a hub id", model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{key}.live.model: {model} holds no config.json; give the folder that a model was saved "
            "to, or leave live.model out to serve dummy weights"
        )


def check_vllm(python: str | None) -> None:
    """Raise ConfigError if the interpreter that would run the server has no vLLM."""
    if python is None or python == sys.executable:
        found = importlib.util.find_spec("vllm") is not None
    else:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            found = subprocess.run([python, "-c", code], check=False, timeout=60).returncode == 0
        except (OSError, subprocess.TimeoutExpired) as error:
            raise bad_value("live.python", "an interpreter that runs", python) from error
    if not found:
        raise ConfigError(
            f"vLLM is not installed in {python or sys.executable}: run `make venv-live` and use "
            "`make live` (or set live.python to an interpreter that has it)"
        )


def engine_arguments(engine: EngineSettings) -> list[str]:
    """vLLM command-line arguments of the settings that differ from None, under vLLM's names."""
    arguments = ["--max-model-len", str(engine.max_model_len), "--scheduling-policy", engine.policy]
    arguments += ["--watermark", str(engine.watermark), "--kv-cache-dtype", engine.kv_cache_dtype]
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        value = getattr(engine, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if engine.long_prefill_token_threshold:
        arguments += ["--long-prefill-token-threshold", str(engine.long_prefill_token_threshold)]
    if engine.kv_blocks is not None:
        arguments += ["--num-gpu-blocks-override", str(engine.kv_blocks)]
    for name in SWITCHES:
        value = getattr(engine, name)
        if value is not None:
            flag = name.replace("_", "-")
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
    return arguments


def entry_point(spec: ServerSpec) -> list[str]:
    """The module that serves, and the model: another one where there are several front ends."""
    if spec.live.api_servers == 1:
        return ["vllm.entrypoints.openai.api_server", "--model", spec.model]
    return ["testbed.vllm_serve", "serve", spec.model, "--api-server-count", str(spec.live.api_servers)]


def server_command(spec: ServerSpec) -> list[str]:
    """The command line of the server."""
    live = spec.live
    command = [live.python or sys.executable, "-W", "ignore", "-m", *entry_point(spec)]
    command += ["--served-model-name", AUTO_MODEL, spec.expert, "--host", HOST]
    command += ["--port", str(spec.port), "--tensor-parallel-size", str(spec.tp)]
    command += ["--disable-uvicorn-access-log"]
    if live.weightless:
        command += ["--load-format", "dummy"]
    if live.tokenizer == "none":
        command += ["--skip-tokenizer-init"]
    if live.record_steps:
        command += ["--scheduler-cls", "testbed.recording_scheduler.make_scheduler"]
    if live.device == "cpu":
        executor = "uni" if spec.tp == 1 else "mp"  # uni has no second rank: it would wait for it for ever
        command += ["--distributed-executor-backend", executor, "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", str(int(live.kv_space_gib * GIB_BYTES))]
    else:
        command += ["--gpu-memory-utilization", str(spec.engine.gpu_memory_utilization)]
    return command + engine_arguments(spec.engine) + [str(argument) for argument in live.args]


def supervised_command(spec: ServerSpec) -> list[str]:
    """The command line of the supervisor that runs the server, bound where it is one rank and one front end.

    These two processes, unbound, are moved by Linux to where others run, and let those wait for a core for
    up to a second meanwhile (docs/testbed.md). vLLM binds what it starts only where there are several ranks;
    several front ends go where they like, for the engine's core is not theirs.
    """
    one_rank_and_front_end = spec.tp == 1 and spec.live.api_servers == 1
    bound = spec.live.device == "cpu" and one_rank_and_front_end and spec.cores
    cores = ["--cores", ",".join(map(str, spec.cores))] if bound else []
    return [sys.executable, "-m", "testbed.supervisor", *cores, "--", *server_command(spec)]


def cores_of_ranks(cores: Sequence[int], tp: int) -> list[list[int]]:
    """The cores of each tensor-parallel rank: neighbours in the list, as many for each."""
    each = len(cores) // tp
    return [list(cores[rank * each : (rank + 1) * each]) for rank in range(tp)]


def server_environment(spec: ServerSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: offline unless a hub id is served, bound to its cores or GPUs."""
    environment = {
        **with_project(base),
        "ERSIM_STEP_LOG": str(spec.steps_path),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if spec.live.weightless or Path(spec.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if spec.live.device == "cpu":
        ranks = cores_of_ranks(spec.cores, spec.tp)
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.tp == 1 else "1",
            "OMP_NUM_THREADS": str(max(1, len(ranks[0]))),
            "ERSIM_SPEED_PROBE": "1",  # a CPU is shared with others, see testbed/host_speed.py
            "VLLM_CPU_OMP_THREADS_BIND": (
                "|".join(",".join(map(str, cores)) for cores in ranks) if spec.cores else "nobind"
            ),
        }
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_space_gib
    elif spec.gpus:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML counts, which samples their power
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.gpus))
    return environment | {key: str(value) for key, value in spec.live.env.items()}


class ExpertServer:
    """A server process under supervision: it ends when it is stopped or when this process does."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.started_s = 0.0
        self.ready_s: float | None = None

    @property
    def running(self) -> bool:
        """Whether the supervised process still runs."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise ConfigError for what keeps it from starting and can be seen beforehand."""
        check_machine(self.spec.live, self.spec.key)
        check_vllm(self.spec.live.python)
        check_model_folder(self.spec.model, self.spec.key)
        check_port(self.spec.port, self.spec.key)

    def start(self) -> None:
        """Start the process without waiting. Raises ConfigError as `check` does."""
        self.check()
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        command = supervised_command(self.spec)
        with open(self.spec.log_path, "ab") as log:
            self._log_start = log.tell()  # what an earlier start wrote is not this one's
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the supervisor that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self.spec, os.environ),
                start_new_session=True,
            )
        self.started_s = time.monotonic()

    def _fail(self, what: str) -> ExpertFailed:
        """The error: what to do about it where that is known, else its cause and the end of the log."""
        name, path = self.spec.name, self.spec.log_path
        try:
            with open(path, "rb") as log:
                log.seek(self._log_start)
                text = log.read().decode(errors="replace")
        except OSError:
            text = "(no log)"
        known = explanation(text, self.spec.key)
        if known is not None:
            return ExpertFailed(f"expert {name} {what}: {known}; its log is {path}")
        cause = root_cause(text)
        why = f" ({cause})" if cause else ""
        return ExpertFailed(f"expert {name} {what}{why}; the end of its log ({path}):\n{tail(text)}")

    def healthy(self) -> bool:
        """Whether GET /health answers 200 now."""
        return answers(f"{self.spec.url}/health")

    def check_alive(self) -> None:
        """Raise ExpertFailed if the process has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise self._fail(f"ended with status {self._process.returncode}")

    def wait_ready(self) -> float:
        """Wait until healthy; returns seconds since start. Raises ExpertFailed on death or time-out."""
        while not self.check_ready():
            time.sleep(POLL_S)
        assert self.ready_s is not None
        return self.ready_s

    def check_ready(self) -> bool:
        """Whether it is healthy by now. Raises ExpertFailed on death, or, stopping it, after its time."""
        self.check_alive()
        if self.healthy():
            self.ready_s = time.monotonic() - self.started_s
            return True
        if time.monotonic() < self.started_s + self.spec.live.ready_timeout_s:
            return False
        late = f"was not healthy within {self.spec.live.ready_timeout_s:g} s (live.ready_timeout_s)"
        failed = self._fail(late)  # before it is stopped: what it logs then is no cause
        self.stop()
        raise failed

    def kill(self) -> None:
        """Kill all its processes at once, as a crash would: what the fault test uses."""
        if self._process is None:
            return
        for child in _descendants(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the server and wait until its processes are gone; safe to call twice."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.kill()
            self._process.wait()


def _descendants(pid: int) -> list[int]:
    """All processes below `pid` (Linux), children before grandchildren."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
        except OSError:
            continue
        for task in tasks:
            try:
                children = [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
            found += children
            pending += children
    return found
