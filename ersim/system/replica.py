"""One replica of one expert: the engine's decisions, placed on the clock.

The replica turns like vLLM's engine core: when a step ends its outputs are applied, what has
arrived meanwhile joins the queue, the next step is decided and its duration is one SimPy event.
Stretches of pure decode in which nothing joins, ends or runs out of blocks are one event as a
whole; an arrival in the middle cuts the stretch at the end of the step that is then running.
The replica keeps its own clock (exact sums of step times), so that both ways of taking a stretch
give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from simpy import Environment
from simpy.events import Event

from ersim.engine import Engine, EngineConfig, LivelockError, RejectedRequest, Step
from ersim.steptime import Frontend
from ersim.system.events import Call
from ersim.system.inflight import InFlight
from ersim.system.log import StepLog
from ersim.types import StepTime

MIN_RUN_STEPS = 12  # below this a vectorised stretch costs more than its steps one by one
MAX_RUN_STEPS = 4096
Ended = Callable[[InFlight, float], None]


class Replica:
    """SimPy side of one engine. `finished(flight, time_s)` and `failed(flight, time_s, why)` are its outputs.

    `step_noise` yields factors of mean 1, one per step; None for no noise. `frontend` is the time
    that the server takes before the engine sees a request. `fast_forward` False takes every step as
    an event of its own (needed where a balancer looks at KV blocks at any moment).
    """

    def __init__(
        self,
        env: Environment,
        config: EngineConfig,
        step_time: StepTime,
        step_noise: Iterator[npt.NDArray[np.float64]] | None,
        finished: Ended,
        failed: Callable[[InFlight, float, str], None],
        rejected: Callable[[InFlight, float, str], None],
        fast_forward: bool = True,
        frontend: Frontend | None = None,
    ) -> None:
        self._env = env
        self._config = config
        self._engine = Engine(config)
        self._step_s = step_time.step_s
        self._decode_run_s = step_time.decode_run_s
        self._noise_chunks = step_noise
        self._noise: list[float] = []
        self._noise_at = 0
        self._finished = finished
        self._failed = failed
        self._rejected = rejected
        self._fast_forward = fast_forward
        self._request_s = frontend.request_s if frontend else 0.0
        self._per_prompt_token_s = frontend.per_prompt_token_s if frontend else 0.0
        self._inbox: deque[InFlight] = deque()
        self._live: dict[int, InFlight] = {}
        self._clock_s = 0.0
        self._step_end_s = 0.0
        self._step_length_s = 0.0
        self._busy = False
        self._serial = 0
        self._run_ends: npt.NDArray[np.float64] | None = None
        self._run_lengths: npt.NDArray[np.float64] | None = None
        self._run_steps = 0
        self._run_seqs = 0
        self.healthy = True
        self.log = StepLog()

    # What a balancer and a policy may see -------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the engine's running batch."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Requests sent here and not yet running."""
        return self._engine.waiting + len(self._inbox)

    @property
    def kv_used_fraction(self) -> float:
        """Share of usable KV blocks in use."""
        return self._engine.blocks_used / max(1, self._config.num_blocks - 1)

    # Inputs -------------------------------------------------------------------------------

    def submit(self, flight: InFlight, at_s: float) -> None:
        """A request arrives at `at_s`, now or a network delay from now."""
        flight.submit_s = at_s
        ready_s = flight.ready_s = at_s + self._request_s + self._per_prompt_token_s * flight.prompt_tokens
        inbox = self._inbox
        if inbox and inbox[-1].ready_s > ready_s:
            self._insert(flight)
        else:
            inbox.append(flight)
        if not self._busy:
            self._wake_at(inbox[0].ready_s)
        elif self._run_ends is not None:
            self._cut_run(inbox[0].ready_s)

    def _insert(self, flight: InFlight) -> None:
        """Keep the inbox ordered: a long prompt takes the front end longer than a short one behind it."""
        later: deque[InFlight] = deque()
        while self._inbox and self._inbox[-1].ready_s > flight.ready_s:
            later.appendleft(self._inbox.pop())
        self._inbox.append(flight)
        self._inbox.extend(later)

    def fail(self, why: str) -> None:
        """The replica dies now: everything on it fails, and nothing is accepted until `restart`."""
        now = self._env._now
        self.settle(now)
        self.healthy = False
        self._serial += 1
        self._busy = False
        lost = [*self._live.values(), *self._inbox]
        self._live, self._inbox = {}, deque()
        self._engine = Engine(self._config)
        for flight in lost:
            self._failed(flight, now, why)

    def restart(self) -> None:
        """The replica is back, with an empty engine."""
        self.healthy = True

    # The turn -----------------------------------------------------------------------------

    def _wake_at(self, at_s: float) -> None:
        self._serial += 1
        Call(self._env, max(at_s - self._env._now, 0.0), self._wake, (self._serial, at_s))

    def _wake(self, event: Event) -> None:
        serial, at_s = event._value
        if serial != self._serial or self._busy:
            return
        self._clock_s = at_s
        self._begin()

    def _take_arrivals(self) -> None:
        inbox, now = self._inbox, self._clock_s
        while inbox and inbox[0].ready_s <= now:
            flight = inbox.popleft()
            try:
                self._engine.add(flight)
            except RejectedRequest as error:
                self._rejected(flight, now, str(error))
            else:
                self._live[flight.request_id] = flight

    def _begin(self) -> None:
        """Decide what runs from now and put its end on the clock."""
        inbox = self._inbox
        if inbox:
            self._take_arrivals()
        engine = self._engine
        if self._fast_forward and (steps := engine.steady_steps()) >= MIN_RUN_STEPS:
            self._begin_run(steps)
            return
        step = self._start()
        if step is None:
            self._busy = False
            if inbox:
                self._wake_at(inbox[0].ready_s)
            return
        length_s = self._step_s(step.batch)
        if self._noise_chunks is not None:
            if self._noise_at >= len(self._noise):
                self._more_noise()
            length_s *= self._noise[self._noise_at]
            self._noise_at += 1
        self._busy = True
        self._step_length_s = length_s
        self._step_end_s = self._clock_s + length_s
        self._serial += 1
        Call(self._env, max(self._step_end_s - self._env._now, 0.0), self._end, self._serial)

    def _start(self) -> Step | None:
        """The engine's next step; a request that could never run is failed instead of blocking the queue."""
        while True:
            try:
                return self._engine.start()
            except LivelockError as error:
                flight = cast("InFlight", error.request)
                self._engine.abort(flight)
                del self._live[flight.request_id]
                self._failed(flight, self._clock_s, str(error))

    def _end(self, event: Event) -> None:
        """The running step is over: record it, hand out what ended, go on."""
        if event._value != self._serial:
            return
        now = self._clock_s = self._step_end_s
        engine = self._engine
        step = engine.complete()
        # the engine hands back the objects it was given
        for flight in cast("Sequence[InFlight]", step.first):
            flight.first_s = now
        self.log.add(
            now, self._step_length_s, step.tokens_out - len(step.first), step.tokens_out, engine.blocks_used
        )
        for flight in cast("Sequence[InFlight]", step.finished):
            del self._live[flight.request_id]
            self._finished(flight, now)
        self._begin()

    def _more_noise(self) -> None:
        assert self._noise_chunks is not None
        self._noise = next(self._noise_chunks).tolist()
        self._noise_at = 0

    # Stretches of pure decode --------------------------------------------------------------

    def _begin_run(self, steps: int) -> None:
        steps = min(steps, MAX_RUN_STEPS)
        if self._noise_chunks is not None:
            if self._noise_at >= len(self._noise):
                self._more_noise()
            steps = min(steps, len(self._noise) - self._noise_at)
        batch = self._engine.steady_batch()
        seqs = batch.decode_seqs
        lengths = self._decode_run_s(seqs, batch.decode_context_tokens, batch.decode_context_max, steps)
        if self._noise_chunks is not None:
            lengths = lengths * np.array(self._noise[self._noise_at : self._noise_at + steps])
        # a running sum from the clock on: the same additions, in the same order, as step by step
        self._run_ends = np.cumsum(np.concatenate(([self._clock_s], lengths)))[1:]
        self._run_lengths = lengths
        self._run_steps = steps
        self._run_seqs = seqs
        self._busy = True
        if self._inbox:  # on its way through the front end
            self._run_steps = self._steps_until(self._inbox[0].ready_s)
        self._schedule_run_end()

    def _steps_until(self, at_s: float) -> int:
        """How many steps of the stretch there are up to the one that runs at `at_s`."""
        assert self._run_ends is not None
        return min(int(np.searchsorted(self._run_ends[: self._run_steps], at_s)) + 1, self._run_steps)

    def _schedule_run_end(self) -> None:
        assert self._run_ends is not None
        end_s = float(self._run_ends[self._run_steps - 1])
        self._serial += 1
        Call(self._env, max(end_s - self._env._now, 0.0), self._end_run, self._serial)

    def _cut_run(self, at_s: float) -> None:
        """End the stretch with the step that runs when a request arrives at `at_s`."""
        steps = self._steps_until(at_s)
        if steps < self._run_steps:
            self._run_steps = steps
            self._schedule_run_end()

    def _end_run(self, event: Event) -> None:
        if event._value != self._serial:
            return
        self._take_run(self._run_steps)
        self._begin()

    def settle(self, now_s: float) -> None:
        """Enter the steps of a stretch that are over by `now_s` and forget the rest."""
        if self._run_ends is not None:
            self._take_run(int(np.searchsorted(self._run_ends[: self._run_steps], now_s, side="right")))

    def _take_run(self, steps: int) -> None:
        assert self._run_ends is not None and self._run_lengths is not None
        ends, lengths = self._run_ends[:steps], self._run_lengths[:steps]
        self._run_ends = self._run_lengths = None
        if steps == 0:
            return
        blocks = self._engine.steady_blocks(steps)
        self._engine.advance(steps)
        if self._noise_chunks is not None:
            self._noise_at += steps
        self._clock_s = float(ends[-1])
        self.log.add_run(ends, lengths, self._run_seqs, np.asarray(blocks))
