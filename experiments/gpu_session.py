"""Measures several experts on a GPU machine in one go: profile, validate, keep what was measured.

``python -m experiments.gpu_session [--gpu NAME] [--experts a,b] [--users 1,10] [--minutes 60] [overrides]``.
Each expert (a file in conf/expert) is profiled with ``live_plan=gpu`` and validated at each load;
its calibration goes to conf/calibration/<gpu>/, its runs to outputs/live/<expert>/. An expert that
fails is reported and the next one begins; nothing new begins after `minutes`. On a machine without
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

# in the order of worth, should the time run out
EXPERTS = ("llama3_8b_bf16", "llama3_8b_int4", "llama3_8b_fp8", "llama3_8b_int8",
           "llama3_70b_fp8", "llama3_70b_int4")  # fmt: skip
DEFAULTS = ("live_plan=gpu", "workload=chat", "seconds=60", "warmup_s=10", "repeats=1",
            "+expert.live.api_servers=4", "install=true")  # fmt: skip


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


def measure(expert: str, gpu: str, users: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Profile and validate one expert; the report holds the last JSON line of both."""
    began_s, report = time.monotonic(), {"expert": expert, "ok": True}
    for command in commands(expert, gpu, users, overrides):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode:
            report |= {"ok": False, "failed": command[2], "status": done.returncode}
            break
        report[command[2]] = json.loads(lines[-1])
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
    began_s, reports, skipped = time.monotonic(), [], []
    for expert in arguments.experts.split(","):
        if time.monotonic() - began_s > 60 * arguments.minutes:
            skipped.append(expert)
            continue
        print(f"== {expert}", file=sys.stderr, flush=True)
        reports.append(measure(expert, arguments.gpu, arguments.users, overrides))
    print(json.dumps({"command": "gpu_session", "experts": reports, "not_reached": skipped}))
    return int(bool(skipped) or not all(report["ok"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
