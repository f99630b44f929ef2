"""The compiled hot path: found only while its sources are unchanged, and equal to the interpreted one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ersim import compiled

RUN = """
import hashlib, sys
import ersim
from ersim.compiled import is_compiled
from ersim.config import *

engine = EngineSettings(kv_blocks=int(sys.argv[1]), max_model_len=4096)
experts = {name: ExpertConfig(engine=engine, replicas=2) for name in ("a", "b")}
config = SimulationConfig(
    users=60,
    fleet=FleetConfig("pair", experts=experts),
    workload=WorkloadConfig(requests=400, turns=int(sys.argv[2]), system_prompt_tokens=48),
    router=RouterConfig(policy=sys.argv[3]),
    uncertainty=UncertaintyConfig(replications="1"),
)
result = ersim.simulate(config)
digest = hashlib.sha256(repr(sorted(result.summary.items())).encode())
for column in result.requests:
    digest.update(repr(result.requests[column].tolist()).encode())
for part in (result.gaps.end_s, result.gaps.gap_s, result.gaps.count, result.gaps.tokens):
    digest.update(part.tobytes())
print(is_compiled(), digest.hexdigest())
"""


def run(interpreted: bool, *arguments: str) -> tuple[str, str]:
    """Whether it ran compiled, and the digest of everything that a small run recorded."""
    environment = {**os.environ, "ERSIM_INTERPRETED": "1" if interpreted else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=compiled.ROOT)
    assert done.returncode == 0, done.stderr
    state, digest = done.stdout.split()
    return state, digest


@pytest.mark.skipif(not compiled.binaries(compiled.built_folder()), reason="not compiled: make fast")
@pytest.mark.parametrize(
    "arguments", [("4096", "1", "round_robin"), ("400", "1", "least_loaded"), ("500", "3", "random")]
)
def test_compiled_and_interpreted_runs_are_the_same_to_the_byte(arguments: tuple[str, ...]) -> None:
    fast, slow = run(False, *arguments), run(True, *arguments)
    assert (fast[0], slow[0]) == ("True", "False")
    assert fast[1] == slow[1]


def test_a_changed_source_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {module: compiled.source_file(module).read_bytes() for module in compiled.MODULES}
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    for module, text in sources.items():
        compiled.source_file(module).parent.mkdir(parents=True, exist_ok=True)
        compiled.source_file(module).write_bytes(text)
    before = compiled.built_folder()
    assert before == compiled.built_folder()
    assert tmp_path in before.parents
    changed = compiled.source_file(compiled.MODULES[-1])
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert compiled.built_folder() != before


def test_binaries_are_all_there_or_none(tmp_path: Path) -> None:
    assert compiled.binaries(tmp_path) == {}
    suffix = compiled.EXTENSION_SUFFIXES[0]
    names = [*compiled.MODULES, f"{compiled.GROUP}__mypyc"]
    for name in names:
        assert compiled.binaries(tmp_path) == {}
        file = tmp_path.joinpath(*name.split(".")).with_name(name.split(".")[-1] + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    files = compiled.binaries(tmp_path)
    assert sorted(files) == sorted(names)
    finder = compiled.Binaries(files)
    spec = finder.find_spec("ersim.engine.scheduler")
    assert spec is not None and spec.origin == str(files["ersim.engine.scheduler"])
    assert finder.find_spec("ersim.config") is None


def test_interpreted_on_request() -> None:
    assert run(True, "400", "1", "round_robin")[0] == "False"
