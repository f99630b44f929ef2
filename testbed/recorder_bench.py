"""What the recorder costs per engine step, all of it, and what vLLM's own scheduler takes meanwhile.

``python -m testbed.recorder_bench [--rows 1,16,64,256] [--steps 1000]`` (in the environment that has vLLM).
No server and no model: vLLM's scheduler serves requests with scripted tokens, always `rows` of them. The
recorder is put before it with the scheduler's answers already made, so that its own work is timed apart
(CPU time): when a request comes and goes, at both calls of a step, and the thread that writes the log. The
difference of two schedulers, one recorded and one not, would drown in where their memory lies. The probe of
the host's speed is not among it (`MOST_PROBED` of the time, on CPUs only). The last line printed is JSON: by
rows, microseconds a step of the scheduler, and of the recorder in the engine's thread and in the writer's, of
which the log itself tells the first (`told_us`, but for requests that come and go); the log's bytes; and the
shortest step, in milliseconds, of which all of it is 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ersim.engine import EngineConfig
from testbed.arguments import whole

PROMPT_TOKENS = 300
OUTPUT_TOKENS = 150
SETTLING = 2 * OUTPUT_TOKENS  # steps until requests come and go
BAR = 0.02  # of a step
CONFIG = EngineConfig(
    max_num_seqs=512, max_num_batched_tokens=8192, max_model_len=8192, num_blocks=40_000, block_size=16
)


class Answered:
    """In the scheduler's place below the recorder: what it would answer was made before.

    Everything else is the scheduler's own; a request is freed as vLLM frees it, after the recorder saw it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.answer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def add_request(self, request: Any) -> None:
        """Added before."""

    def _free_request(self, request: Any) -> None:
        """Freed before."""

    def schedule(self) -> Any:
        """What it answered."""
        return self.answer

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """What it answered."""
        return self.answer


class Timed:
    """A scheduler that always has `rows` requests, and the recorder before it, each on its own clock."""

    def __init__(self, scheduler: Any, recorder: Any, hasher: Callable[..., Any], rows: int) -> None:
        self.scheduler_s = 0.0
        self.recorder_s = 0.0
        self.writer_s = 0.0
        self._scheduler = scheduler
        self._recorder = recorder
        self._hasher = hasher
        self._rows = rows
        self._added = 0

    def clear(self) -> None:
        """Forget what was timed so far."""
        self.scheduler_s = self.recorder_s = self.writer_s = 0.0

    def step(self) -> None:
        """One call of `schedule` and one of `update_from_output`, with new requests before it."""
        from vllm.v1.outputs import ModelRunnerOutput

        while len(self._scheduler.running) + len(self._scheduler.waiting) < self._rows:
            request = self._request()
            self._scheduled(self._scheduler.add_request, request)
            self._recorded(self._recorder.add_request, request)
        before = dict(self._scheduler.requests)
        output = self._scheduled(self._scheduler.schedule)
        self._recorder.answer = output
        self._recorded(self._recorder.schedule)
        names = list(output.num_scheduled_tokens)
        made = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if before[name].is_prefill_chunk else [5] for name in names],
        )
        self._recorder.answer = self._scheduled(self._scheduler.update_from_output, output, made)
        for name in before.keys() - self._scheduler.requests.keys():
            self._recorded(self._recorder._free_request, before[name])
        self._recorded(self._recorder.update_from_output, output, made)

    def write(self) -> None:
        """What the writing thread does twice a second."""
        began_s = time.thread_time()
        self._recorder._log._drain()
        self.writer_s += time.thread_time() - began_s

    def _scheduled(self, call: Callable[..., Any], *given: Any) -> Any:
        began_s = time.thread_time()
        result = call(*given)
        self.scheduler_s += time.thread_time() - began_s
        return result

    def _recorded(self, call: Callable[..., Any], *given: Any) -> None:
        began_s = time.thread_time()
        call(*given)
        self.recorder_s += time.thread_time() - began_s

    def _request(self) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        first = 1000 + self._added * PROMPT_TOKENS  # nobody else's: prefixes are hashed, and none is found
        length = OUTPUT_TOKENS * (1 + self._added % 4) // 2  # requests end one by one
        self._added += 1
        return Request(
            request_id=str(self._added),
            prompt_token_ids=list(range(first, first + PROMPT_TOKENS)),
            sampling_params=SamplingParams(max_tokens=length, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher,
        )


def bench(rows: int, steps: int) -> dict[str, Any]:
    """What both take at one batch size."""
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    from testbed.oracle.vllm_side import Vllm
    from testbed.recording_scheduler import FLUSH_PERIOD_S, RecordingMixin

    vllm = Vllm()
    hasher = get_request_block_hasher(CONFIG.block_size, vllm.hash_function)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.jsonl")
        scheduler = vllm.scheduler(CONFIG)
        before = os.environ.get("ERSIM_STEP_LOG")
        os.environ["ERSIM_STEP_LOG"] = str(path)
        try:
            recorder = type("Recorder", (RecordingMixin, Answered), {})(scheduler)
        finally:
            os.environ.pop("ERSIM_STEP_LOG")
            if before is not None:
                os.environ["ERSIM_STEP_LOG"] = before
        recorder._log._stop.set()  # its thread: `write` does what that would
        recorder._log._thread.join(2 * FLUSH_PERIOD_S)
        timed = Timed(scheduler, recorder, hasher, rows)
        for _ in range(SETTLING):
            timed.step()
        timed.write()
        size = path.stat().st_size
        timed.clear()
        for number in range(1, steps + 1):
            timed.step()
            if number % 25 == 0 or number == steps:
                timed.write()
        size = path.stat().st_size - size
        logged = [json.loads(line) for line in path.read_text().splitlines() if line]
    told_s = [record[16] for record in logged if record[0] == "s"][-steps:]
    every_us = 1e6 / steps
    recorder_us = (timed.recorder_s + timed.writer_s) * every_us
    return {
        "scheduler_us": round(timed.scheduler_s * every_us, 1),
        "recorder_us": round(timed.recorder_s * every_us, 1),
        "writer_us": round(timed.writer_s * every_us, 1),
        "told_us": round(sum(told_s) * every_us, 1),
        "bytes": round(size / steps),
        "step_ms_at_2_percent": round(recorder_us / 1e3 / BAR, 2),
    }


def batch_sizes(text: str) -> list[int]:
    """`1,16` as numbers from 1 to what a step may hold, each once. Raises argparse's error."""
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1 or len(set(rows)) < len(rows) or max(rows) > CONFIG.max_num_seqs:
        limit = CONFIG.max_num_seqs
        raise argparse.ArgumentTypeError(f"must be numbers from 1 to {limit}, as 1,16,64, got {text!r}")
    return rows


def main() -> int:
    """Entry point; 2 for options that cannot be, or without vLLM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=batch_sizes, default=[1, 16, 64, 256], help="sequences of a step")
    parser.add_argument("--steps", type=whole(1), default=1000, help="that are timed")
    arguments = parser.parse_args()
    try:
        from testbed.oracle.vllm_side import vllm_version

        version = vllm_version()
    except ImportError as error:
        parser.error(f"vLLM cannot be imported here ({error}): run `make venv-live` and use .venv-live")
    found = {}
    for rows in arguments.rows:
        found[str(rows)] = bench(rows, arguments.steps)
        print(f"{rows} rows: {found[str(rows)]}", file=sys.stderr, flush=True)
    print(json.dumps({"command": "recorder_bench", "vllm": version, "rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
