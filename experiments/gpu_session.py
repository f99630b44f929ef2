"""Measures several experts on a GPU machine in one go: profile, validate, keep what was measured.

``python -m experiments.gpu_session [--gpu NAME] [--experts a,b] [--users 1,10] [--minutes 90] [overrides]``.
Each expert (a file in conf/expert) is profiled with ``live_plan=gpu`` and validated at each load;
its calibration goes to conf/calibration/<gpu>/, its runs to outputs/live/<expert>/. What either command
would refuse of any expert is said before the first begins (status 2). An expert that fails is reported
and the next one begins. After `minutes`, and on Ctrl-C or SIGTERM (status 130), what runs is stopped and
reported, its servers with it; what it has written is kept. Where a command may take ten minutes only,
one expert at a time: ``--experts llama3_8b_bf16 --minutes 9 live_plan=gpu_short seconds=30``. On a
machine without a GPU: ``--gpu cpu --experts tiny_bf16 --users 1,2 live_plan=short workload=live_cpu
seconds=15 warmup_s=2 +expert.live.api_servers=1 install=false``.
The last line printed is JSON: what was done, what failed, how long each took.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ersim.errors import ErsimError
from experiments.live import REFUSED, split_arguments
from experiments.long_command import INTERRUPTED, OUT_OF_TIME, run_to_its_end
from experiments.session_check import check_first
from testbed.arguments import positive

# in the order of worth, should the time run out
EXPERTS = ("llama3_8b_bf16", "llama3_8b_int4", "llama3_8b_fp8", "llama3_8b_int8",
           "llama3_70b_fp8", "llama3_70b_int4")  # fmt: skip
DEFAULTS = ("live_plan=gpu", "workload=chat", "seconds=60", "warmup_s=10", "repeats=1",
            "+expert.live.api_servers=4", "+expert.live.ready_timeout_s=900",  # a cold 70B compiles first
            "install=true")  # fmt: skip
WORDS = {OUT_OF_TIME: "out of time", INTERRUPTED: "interrupted"}


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


def measure(expert: str, both: Sequence[Sequence[str]], left_s: float) -> dict[str, Any]:
    """Profile and validate one expert with these commands; the report holds the last JSON line of both."""
    began_s, report = time.monotonic(), {"expert": expert, "ok": True}
    for command in both:
        own_s = max(left_s - (time.monotonic() - began_s), 0.0)
        status, output = run_to_its_end(command, own_s, capture=True)
        if status:
            report |= {"ok": False, "failed": command[2], "status": WORDS.get(status, status)}
            break
        try:
            report[command[2]] = json.loads(output.strip().splitlines()[-1])
        except (IndexError, ValueError):  # its calibration or its runs are written all the same
            report |= {"ok": False, "failed": command[2], "status": "ended without its figures"}
            break
    report["seconds"] = round(time.monotonic() - began_s, 1)
    return report


def _refused(experts: Sequence[str], gpu: str, users: str, overrides: Sequence[str]) -> bool:
    """Whether a command of any expert would refuse its arguments; why is printed."""
    for expert in experts:
        profile, validation = commands(expert, gpu, users, overrides)
        try:
            check_first(profile[3:], validation[3:])
        except ErsimError as error:
            print(f"gpu_session: {expert}: {error}; nothing was started", file=sys.stderr)
            return True
    return False


def main() -> int:
    """Entry point: 1 when an expert failed or was not reached, 2 when one was refused, 130 if interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", default=",".join(EXPERTS))
    parser.add_argument("--gpu", default="h200-141gb", help="a name in conf/gpu, or cpu")
    parser.add_argument("--users", default="1,10,100,500,1000")
    parser.add_argument("--minutes", type=positive, default=90.0)
    arguments, overrides = parser.parse_known_args()
    if unknown := [one for one in overrides if one.startswith("--")]:
        parser.error(f"no such option: {' '.join(unknown)}; settings are given as key=value")
    signal.signal(signal.SIGTERM, _interrupt)
    experts, reports, interrupted = arguments.experts.split(","), [], False
    try:
        if _refused(experts, arguments.gpu, arguments.users, overrides):
            return REFUSED
        deadline_s = time.monotonic() + 60 * arguments.minutes
        while experts and not interrupted and (left_s := deadline_s - time.monotonic()) > 0:
            print(f"== {experts[0]}", file=sys.stderr, flush=True)
            both = commands(experts[0], arguments.gpu, arguments.users, overrides)
            reports.append(measure(experts[0], both, left_s))
            interrupted = reports[-1].get("status") == WORDS[INTERRUPTED]
            experts.pop(0)
    except KeyboardInterrupt:  # between two commands
        interrupted = True
    print(json.dumps({"command": "gpu_session", "experts": reports, "not_reached": experts}))
    if interrupted:
        return INTERRUPTED
    return int(bool(experts) or not all(report["ok"] for report in reports))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM as if it were Ctrl-C, once: `timeout` sends it twice, and the second would not wait."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
