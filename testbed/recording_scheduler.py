"""vLLM scheduler plugin that logs every engine step to a compact file.

Start a server with ``--scheduler-cls testbed.recording_scheduler.make_scheduler`` and
``ERSIM_STEP_LOG=<file>``. The engine's thread only appends tuples to a queue; a daemon thread turns
them into one JSON array a line. All times are ``time.monotonic()`` seconds (CLOCK_MONOTONIC, one
clock for all processes of a machine, so that steps join with client-side records).

Lines, by their first element:
  "m"  meta: one mapping with the engine's constants
  "a"  [t, index, request id, prompt tokens, max_tokens, priority, block hashes of the prompt]
  "f"  [t, index, status, output tokens, preemptions, block hashes at the end]
  "s"  [n, s0, s1, u0, u1, running, waiting, blocks used, decode rows, their computed tokens summed,
        the largest of these, other rows, preempted indices, prefix hits, tokens out, record cost,
        CPU seconds of the engine's thread so far, those of the speed probe or null, stolen share or null,
        CPU seconds of that thread at s0, seconds that it waited for its core so far or null, those at s0,
        decode rows that the call before had not, those that it had and this one has not]
s0/s1 enclose ``schedule()``, u0/u1 ``update_from_output()``. Other rows are [index, scheduled tokens,
computed tokens before, tokens so far, prompt tokens]. Of decode rows (one token, prompt computed) only
those are listed, by index, that join or leave, so that a line does not grow with the batch: every row of
every step is known, and what it has computed is what it had in the step before and one. Prefix hits are
[index, cached tokens] of newly admitted requests. Requests are indexed in order of arrival. Written for
vLLM 0.32.0; the hooks exist unchanged in 0.26.0. Settings that a release does not have are written as it
behaves without them (see `BEFORE`).
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from testbed.core_wait import CoreWait
from testbed.probe_works import WITH_PRODUCT, WITHOUT_PRODUCT
from testbed.stolen_time import StolenShare

FLUSH_PERIOD_S = 0.5
PROBE_PERIOD_S = 0.02
MOST_PROBED = 0.01  # of the time: measuring the host is to cost less than what it explains
BEFORE: dict[str, Any] = {
    "watermark": 0.0,
    "scheduler_reserve_full_isl": False,
    "async_scheduling": False,
    "long_prefill_token_threshold": 0,
}
"""What a V1 scheduler does where it has no such setting yet: no block is kept free (the watermark came with
vLLM's pull request 44594), a request is admitted when its first chunk fits (37307), steps run one after the
other, and the budget alone bounds a chunk of prefill."""


class StepLog:
    """Append-only file fed by a queue; serialising and writing happen in a daemon thread."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1 << 20)  # noqa: SIM115 (lives as long as the server)
        if self._file.tell():
            self._file.write("\n")  # the server before may have been killed in the middle of a line
        self._queue: deque[tuple[Any, ...]] = deque()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="ersim-step-log")
        self._thread.start()
        atexit.register(self.close)

    def put(self, record: tuple[Any, ...]) -> None:
        """Queue one record; atomic, never blocks the engine."""
        self._queue.append(record)

    def _drain(self) -> None:
        with self._lock:
            lines = []
            while self._queue:
                lines.append(json.dumps(self._queue.popleft(), separators=(",", ":")))
            if lines:
                self._file.write("\n".join(lines) + "\n")
                self._file.flush()

    def _loop(self) -> None:
        while not self._stop.wait(FLUSH_PERIOD_S):
            self._drain()

    def close(self) -> None:
        """Write what is queued; safe to call twice."""
        self._stop.set()
        self._drain()


class SpeedProbe:
    """A fixed piece of work whose time tells how fast this core is at the moment.

    On a shared host the same step takes half as long again for seconds at a time: other tenants use the
    core's other thread, its matrix unit, its caches and its memory. So the probe does a little of all that a
    step does: a product of 12 rows with weights that lie in 32 MiB, in bfloat16 as the experts' own, a small
    product in the first cache, 512 KiB read twice, and the next piece of 8 MiB. At most every 20 ms, and
    `MOST_PROBED` of the time. How steps follow it is fitted (see `testbed.sensitivity`).

    work: with the product or, where several threads would share it, without (`probe_works`).
    """

    def __init__(self, work: int = WITH_PRODUCT) -> None:
        import numpy as np  # late: only where the probe is asked for

        random = np.random.default_rng(0)
        self._square = random.random((64, 64), dtype=np.float32)
        self._near = random.random(1 << 16)
        self._far = random.random(1 << 20)
        self._product = _product() if work == WITH_PRODUCT else lambda _: None
        self._at = 0
        self._due_s = 0.0

    def __call__(self) -> float | None:
        """CPU seconds that the work takes just now; None when the last time was a moment ago.

        Not wall seconds: what others take of the core is told apart (`core_time`), and a loaded machine would
        look like a slow host.
        """
        if time.monotonic() < self._due_s:
            return None
        began_s = time.thread_time()
        self._product(self._at)
        self._square @ self._square
        self._near.sum()
        self._near.sum()
        far = self._at % 16 << 16
        self._far[far : far + (1 << 16)].sum()
        took_s = time.thread_time() - began_s
        self._at += 1
        self._due_s = time.monotonic() + max(PROBE_PERIOD_S, took_s / MOST_PROBED)
        return took_s if took_s > 0.0 else None  # where threads' time is counted coarsely it says nothing


def _product() -> Callable[[int], object]:
    """A product of 12 rows with the next of 64 pieces of weights, 512 KiB each, in bfloat16."""
    import torch

    rows = torch.ones((12, 512), dtype=torch.bfloat16)
    weights = [torch.full((512, 512), 1 / 512, dtype=torch.bfloat16) for _ in range(64)]
    torch.mm(rows, weights[0])  # the first one prepares what all others use
    return lambda number: torch.mm(rows, weights[number % 64])


def _probed_work(config: Any) -> int | None:
    """What this server's probe does; None where nothing is probed."""
    if os.environ.get("ERSIM_SPEED_PROBE") != "1":
        return None
    return WITH_PRODUCT if _computes_in_one_thread(config) else WITHOUT_PRODUCT


def _computes_in_one_thread(config: Any) -> bool:
    """Whether the engine's own thread does all of a step's work, so that its CPU time is the step's."""
    from vllm.platforms import current_platform

    one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    parallel = config.parallel_config
    in_engine = parallel.world_size == 1 and parallel.distributed_executor_backend == "uni"
    return one_thread and current_platform.is_cpu() and in_engine


def _meta(scheduler: Any) -> dict[str, Any]:
    import vllm

    settings, cache = scheduler.scheduler_config, scheduler.cache_config
    model = scheduler.vllm_config.model_config
    later = {name: getattr(settings, name, before) for name, before in BEFORE.items()}
    return {
        "format": 4,
        "vllm_version": vllm.__version__,
        "scheduler": type(scheduler).__name__,
        "monotonic_s": time.monotonic(),
        "epoch_s": time.time(),
        "one_thread": _computes_in_one_thread(scheduler.vllm_config),
        "speed_probe": _probed_work(scheduler.vllm_config),
        **later,
        "async_scheduling": bool(later["async_scheduling"]),
        "max_num_seqs": scheduler.max_num_running_reqs,
        "max_num_batched_tokens": scheduler.max_num_scheduled_tokens,
        "policy": str(settings.policy),
        "enable_chunked_prefill": settings.enable_chunked_prefill,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "block_size": scheduler.block_size,
        "num_blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        "max_model_len": scheduler.max_model_len,
        "model": model.model,
        "quantization": str(model.quantization) if model.quantization else None,
    }


class RecordingMixin:
    """Wraps the four scheduler calls that make up a request's and a step's life."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._log = StepLog(os.environ.get("ERSIM_STEP_LOG", f"steps-{os.getpid()}.jsonl"))
        self._steps = 0
        self._added = 0
        self._index: dict[str, int] = {}
        self._in_flight: deque[list[Any]] = deque()
        self._starts: deque[tuple[float, float | None]] = deque()  # of each step, as the thread counts
        self._decoding: set[int] = set()
        self._changes: deque[tuple[list[int], list[int]]] = deque()  # of the decode rows, by step
        meta = _meta(self)
        work = meta["speed_probe"]
        self._probe = None if work is None else SpeedProbe(work)
        self._stolen = None if work is None else StolenShare()
        self._waited = None if work is None else CoreWait()
        self._log.put(("m", meta))

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        index = self._index[request.request_id] = self._added
        self._added += 1
        hashes = [block_hash.hex()[:12] for block_hash in request.block_hashes]
        self._log.put(
            ("a", time.monotonic(), index, request.request_id, request.num_prompt_tokens,
             request.max_tokens, request.priority, hashes)
        )  # fmt: skip

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        hashes = [block_hash.hex()[:12] for block_hash in request.block_hashes]
        self._log.put(
            ("f", time.monotonic(), self._index.get(request.request_id), request.status.name,
             request.num_output_tokens, request.num_preemptions, hashes)
        )  # fmt: skip
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        s0, cpu_start = time.monotonic(), time.thread_time()
        self._starts.append((cpu_start, None if self._waited is None else self._waited()))
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        s1 = time.monotonic()
        self._in_flight.append(self._describe(output, s0, s1))
        self._in_flight[-1].append(time.monotonic() - s1)
        self._steps += 1
        return output

    def _describe(self, output: Any, s0: float, s1: float) -> list[Any]:
        index, requests = self._index, self.requests  # type: ignore[attr-defined]
        decoding, context, context_max, others = set(), 0, 0, []
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            computed = request.num_computed_tokens - tokens  # schedule() has advanced it already
            if tokens == 1 and computed >= request.num_prompt_tokens:
                decoding.add(index[request_id])
                context += computed
                if computed > context_max:
                    context_max = computed
            else:
                others.append(
                    (index[request_id], tokens, computed, request.num_tokens, request.num_prompt_tokens)
                )
        self._changes.append((sorted(decoding - self._decoding), sorted(self._decoding - decoding)))
        self._decoding = decoding
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        waiting = len(self.waiting) + len(getattr(self, "kv_holding_waiting", ()))  # type: ignore[attr-defined]
        hits = [(index[new.req_id], new.num_computed_tokens) for new in output.scheduled_new_reqs]
        preempted = [index[request_id] for request_id in sorted(output.preempted_req_ids or ())]
        return ["s", self._steps, s0, s1, 0.0, 0.0, len(self.running), waiting, used,  # type: ignore[attr-defined]
                len(decoding), context, context_max, others, preempted, hits, 0]  # fmt: skip

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        u0 = time.monotonic()
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        u1 = time.monotonic()
        record = self._in_flight.popleft()  # first in, first out: outputs come in schedule order
        record[4], record[5] = u0, u1
        record[15] = sum(len(out.new_token_ids) for core in result.values() for out in core.outputs)
        cpu, waited = time.thread_time(), None if self._waited is None else self._waited()
        cpu_start, waited_start = self._starts.popleft()
        record += (
            cpu,
            None if self._probe is None else self._probe(),
            None if self._stolen is None else round(self._stolen(u1), 4),
            cpu_start,
            waited,
            waited_start,
            *self._changes.popleft(),
        )
        record[16] += time.monotonic() - u1
        self._log.put(tuple(record))
        return result

    def shutdown(self) -> None:
        self._log.close()
        super().shutdown()  # type: ignore[misc]


class RecordingScheduler(RecordingMixin, Scheduler):  # type: ignore[misc]
    """vLLM's synchronous scheduler, recorded."""


class RecordingAsyncScheduler(RecordingMixin, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler, recorded."""


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """Build the recorder on the base that the server's own configuration would have chosen."""
    config = kwargs.get("vllm_config") or args[0]
    overlaps = getattr(config.scheduler_config, "async_scheduling", BEFORE["async_scheduling"])
    base = RecordingAsyncScheduler if overlaps else RecordingScheduler
    return base(*args, **kwargs)
