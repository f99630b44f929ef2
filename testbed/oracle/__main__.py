"""Compare ersim's engine with vLLM's own scheduler, step by step, on random workloads.

    python -m testbed.oracle --cases 1000 --seed 7

Case i of a run is drawn from the seed `seed * 1_000_000 + i`; `--case N` repeats the case with that
very seed. Ends with one line of JSON: cases, steps, mismatches, vllm. Exit code 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

from ersim.engine import VLLM_VERSION
from testbed.oracle.cases import THEMES, make_case
from testbed.oracle.sides import ErsimSide, compare

SEED_STRIDE = 1_000_000


def run(seeds: list[int], theme: str | None, progress: bool) -> dict[str, object]:
    """Compare the cases of these seeds; prints each case that differs."""
    from testbed.oracle.vllm_side import Vllm, VllmSide, vllm_version

    vllm = Vllm()
    gc.collect()
    gc.freeze()  # vLLM's heap is large and static; collections would cost more than the scheduler
    steps = 0
    wrong: list[int] = []
    begin = time.monotonic()
    for done, seed in enumerate(seeds, 1):
        case = make_case(seed, theme)
        try:
            count, difference = compare(case, ErsimSide(case.config), VllmSide(vllm, case.config))
        except Exception:
            print(f"case {seed} ({case.theme}) raised; {case.config}", file=sys.stderr)
            raise
        steps += count
        if difference is not None:
            wrong.append(seed)
            print(f"case {seed} ({case.theme}) differs; left is ersim, right is vLLM\n{case.config}")
            print(f"{difference.describe()}\nrepeat with: python -m testbed.oracle --case {seed}\n")
        if progress and done % 50 == 0:
            rate = steps / (time.monotonic() - begin)
            print(f"{done}/{len(seeds)} cases, {steps} steps, {rate:.0f} steps/s", file=sys.stderr)
    return {
        "cases": len(seeds),
        "steps": steps,
        "mismatches": len(wrong),
        "wrong_seeds": wrong[:20],
        "vllm": vllm_version(),
        "engine_vllm": VLLM_VERSION,
        "wall_s": round(time.monotonic() - begin, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m testbed.oracle", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first case of this seed")
    parser.add_argument("--case", type=int, help="one case by its own seed")
    parser.add_argument("--theme", choices=sorted(THEMES))
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    start = options.seed * SEED_STRIDE + options.first
    seeds = [options.case] if options.case is not None else list(range(start, start + options.cases))
    try:
        report = run(seeds, options.theme, not options.quiet)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("vllm", "torch"):
            raise
        print("the oracle needs vLLM: make venv-live", file=sys.stderr)
        return 2
    if report["vllm"].split("+")[0] != VLLM_VERSION:  # type: ignore[attr-defined]
        print(f"note: the engine claims to equal vLLM {VLLM_VERSION}, not {report['vllm']}", file=sys.stderr)
    report["seed"] = options.seed
    print(json.dumps(report))
    return 1 if report["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
