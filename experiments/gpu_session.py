"""Measures several experts on a GPU machine in one go: profile, validate, keep what was measured.

``python -m experiments.gpu_session [--gpu NAME] [--experts a,b] [--users 1,10] [--minutes 90] [overrides]``.
Each expert (a file in conf/expert) is profiled with ``live_plan=gpu`` and validated at each load;
its calibration goes to conf/calibration/<gpu>/, its runs to outputs/live/<expert>/. An expert that
fails is reported and the next one begins. After `minutes` what runs is stopped and reported, its
servers with it; what it has written is kept. Where a command may take ten minutes only, one expert at
a time: ``--experts llama3_8b_bf16 --minutes 9 live_plan=gpu_short seconds=30``. On a machine without
a GPU: ``--gpu cpu --experts tiny_bf16 --users 1,2 live_plan=short workload=live_cpu seconds=15 warmup_s=2
+expert.live.api_servers=1 install=false``.
The last line printed is JSON: what was done, what failed, how long each took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.live import split_arguments
from testbed.supervisor import parent_death_signal

# in the order of worth, should the time run out
EXPERTS = ("llama3_8b_bf16", "llama3_8b_int4", "llama3_8b_fp8", "llama3_8b_int8",
           "llama3_70b_fp8", "llama3_70b_int4")  # fmt: skip
DEFAULTS = ("live_plan=gpu", "workload=chat", "seconds=60", "warmup_s=10", "repeats=1",
            "+expert.live.api_servers=4", "install=true")  # fmt: skip


STOP_S = 30.0  # the time that a command gets to stop its servers
OUT_OF_TIME = 124


def commands(expert: str, gpu: str, users: str, overrides: Sequence[str]) -> list[list[str]]:
    """The profile and the validation of one expert."""
    given = {item.lstrip("+~").partition("=")[0] for item in overrides}
    chosen = [item for item in DEFAULTS if item.lstrip("+").partition("=")[0] not in given]
    profile, validate = split_arguments([*chosen, *overrides])
    both = [f"expert={expert}", f"expert.gpu={gpu}", f"folder=outputs/live/{expert}"]
    python = [sys.executable, "-m"]
    return [
        [*python, "experiments.profile", *both, *profile],
        [*python, "experiments.validate", *both, f"users={users}", *validate],
    ]


def finished(command: Sequence[str], left_s: float) -> tuple[int, str]:
    """(status, standard output) of a command; it is stopped, servers and all, when its time is over."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=parent_death_signal()
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(left_s, 0.0))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return OUT_OF_TIME, ""
    return process.returncode, output


def measure(expert: str, both: Sequence[Sequence[str]], left_s: float) -> dict[str, Any]:
    """Profile and validate one expert with these commands; the report holds the last JSON line of both."""
    began_s, report = time.monotonic(), {"expert": expert, "ok": True}
    for command in both:
        status, output = finished(command, left_s - (time.monotonic() - began_s))
        if status:
            why = "out of time" if status == OUT_OF_TIME else status
            report |= {"ok": False, "failed": command[2], "status": why}
            break
        report[command[2]] = json.loads(output.strip().splitlines()[-1])
    report["seconds"] = round(time.monotonic() - began_s, 1)
    return report


def main() -> int:
    """Entry point; 1 when any expert failed or was not reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", default=",".join(EXPERTS))
    parser.add_argument("--gpu", default="h200-141gb", help="a name in conf/gpu, or cpu")
    parser.add_argument("--users", default="1,10,100,500,1000")
    parser.add_argument("--minutes", type=float, default=90.0)
    arguments, overrides = parser.parse_known_args()
    deadline_s, reports, skipped = time.monotonic() + 60 * arguments.minutes, [], []
    for expert in arguments.experts.split(","):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            skipped.append(expert)
            continue
        print(f"== {expert}", file=sys.stderr, flush=True)
        both = commands(expert, arguments.gpu, arguments.users, overrides)
        reports.append(measure(expert, both, left_s))
    print(json.dumps({"command": "gpu_session", "experts": reports, "not_reached": skipped}))
    return int(bool(skipped) or not all(report["ok"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
