"""One replica of one expert: the engine's decisions, placed on the clock.

The replica turns like vLLM's engine core: when a step ends its outputs are applied, what has
arrived meanwhile joins the queue, the next step is decided and its end is the replica's next turn.
Stretches of pure decode in which nothing joins, ends or runs out of blocks are one turn as a
whole; an arrival in the middle cuts the stretch at the end of the step that is then running.
The replica keeps its own clock (exact sums of step times), so that both ways of taking a stretch
give the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from ersim.engine.config import EngineConfig
from ersim.engine.engine import Engine
from ersim.engine.errors import LivelockError, RejectedRequest
from ersim.engine.step import Step
from ersim.steptime import Frontend
from ersim.steptime.evaluate import PreparedStepTime
from ersim.system.events import Clock
from ersim.system.inflight import InFlight
from ersim.system.log import StepLog
from ersim.system.turns import Agenda, Turn
from ersim.types import StepTime
from ersim.util.vectors import i64, is_compiled, vec

MIN_RUN_STEPS = 24 if is_compiled(Engine.steady_steps) else 12  # a shorter stretch costs less step by step
MAX_RUN_STEPS: Final = 4096
Ended = Callable[[InFlight, float], None]


_NOTHING: Final = 0
_WAKE: Final = 1
_STEP: Final = 2
_RUN: Final = 3
"""What a replica's entry in the agenda is: none, an arrival while idle, the end of a step or of a stretch."""


class Replica(Turn):
    """The clock's side of one engine.

    `finished(flight, time_s)`, `failed(flight, time_s, why)` and `rejected` (alike) are its outputs.
    `step_noise` yields factors of mean 1, one per step; None for no noise. `frontend` is the time
    that the server takes before the engine sees a request. `fast_forward` False takes every step as
    a turn of its own (needed where a balancer looks at KV blocks at any moment).
    """

    __slots__ = (
        "_agenda",
        "_clock_s",
        "_config",
        "_decode_run_s",
        "_due",
        "_engine",
        "_failed",
        "_fast_forward",
        "_finished",
        "_inbox",
        "_min_run_steps",
        "_noise",
        "_noise_at",
        "_noise_chunks",
        "_number",
        "_per_prompt_token_s",
        "_prepared",
        "_rejected",
        "_request_s",
        "_run_ends",
        "_run_lengths",
        "_run_seqs",
        "_run_steps",
        "_step_end_s",
        "_step_length_s",
        "_step_s",
        "healthy",
        "log",
    )

    def __init__(
        self,
        env: Clock,
        config: EngineConfig,
        step_time: StepTime,
        step_noise: Iterator[npt.NDArray[np.float64]] | None,
        finished: Ended,
        failed: Callable[[InFlight, float, str], None],
        rejected: Callable[[InFlight, float, str], None],
        fast_forward: bool = True,
        frontend: Frontend | None = None,
    ) -> None:
        self._agenda: Agenda = env.agenda
        self._config = config
        self._engine = Engine(config)
        self._prepared = step_time if isinstance(step_time, PreparedStepTime) else None
        self._step_s = step_time.step_s
        self._decode_run_s = step_time.decode_run_s
        self._noise_chunks = step_noise
        self._noise: vec[float] = vec[float]()
        self._noise_at: i64 = 0
        self._finished = finished
        self._failed = failed
        self._rejected = rejected
        self._fast_forward = fast_forward
        self._min_run_steps = MIN_RUN_STEPS
        self._request_s = frontend.request_s if frontend else 0.0
        self._per_prompt_token_s = frontend.per_prompt_token_s if frontend else 0.0
        self._inbox: deque[InFlight] = deque()
        self._clock_s = 0.0
        self._step_end_s = 0.0
        self._step_length_s = 0.0
        self._number: i64 = -1
        self._due = _NOTHING
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
        if self._due == _STEP:
            return
        if self._due == _RUN:
            self._cut_run(inbox[0].ready_s)
        else:
            self._wake_at(inbox[0].ready_s)

    def _insert(self, flight: InFlight) -> None:
        """Keep the inbox ordered: a long prompt takes the front end longer than a short one behind it."""
        later: deque[InFlight] = deque()
        while self._inbox and self._inbox[-1].ready_s > flight.ready_s:
            later.appendleft(self._inbox.pop())
        self._inbox.append(flight)
        self._inbox.extend(later)

    def fail(self, why: str) -> None:
        """The replica dies now: everything on it fails, and nothing is accepted until `restart`."""
        now = self._agenda.now_s
        self.settle(now)
        self.healthy = False
        self._due = _NOTHING
        self._number = -1
        inside = [*self._engine.running_requests(), *self._engine.waiting_requests()]
        inside.sort(key=lambda request: request.arrival)
        lost = [*cast("list[InFlight]", inside), *self._inbox]
        self._inbox = deque()
        self._engine = Engine(self._config)
        for flight in lost:
            self._failed(flight, now, why)

    def restart(self) -> None:
        """The replica is back, with an empty engine."""
        self.healthy = True

    # The turn -----------------------------------------------------------------------------

    def happen(self, now_s: float, number: i64) -> None:
        """A step or a stretch is over, or a request arrives while nothing runs."""
        if number != self._number:
            return  # superseded
        due = self._due
        if due == _STEP:
            self._end_step()
        elif due == _RUN:
            self._take_run(self._run_steps)
        else:
            self._clock_s = self._step_end_s
        self._begin()

    def _enter(self, due: int, at_s: float) -> None:
        """Have the next turn at `at_s`; whatever was entered before is superseded."""
        agenda = self._agenda
        delay_s = at_s - agenda.now_s
        self._due = due
        self._number = agenda.enter(self, delay_s if delay_s > 0.0 else 0.0)

    def _wake_at(self, at_s: float) -> None:
        self._step_end_s = at_s
        self._enter(_WAKE, at_s)

    def _take_arrivals(self) -> None:
        inbox, now, engine = self._inbox, self._clock_s, self._engine
        while inbox and inbox[0].ready_s <= now:
            flight = inbox.popleft()
            try:
                engine.add(flight)
            except RejectedRequest as error:
                self._rejected(flight, now, str(error))

    def _begin(self) -> None:
        """Decide what runs from now and put its end on the clock."""
        inbox = self._inbox
        if inbox:
            self._take_arrivals()
        engine = self._engine
        if self._fast_forward and (steps := engine.steady_steps()) >= self._min_run_steps:
            self._begin_run(steps)
            return
        try:
            step = engine.start()
        except LivelockError as error:
            step = self._start_without(error)
        if step is None:
            self._due = _NOTHING
            if inbox:
                self._wake_at(inbox[0].ready_s)
            return
        prepared = self._prepared
        length_s = self._step_s(step) if prepared is None else prepared.step_s(step)
        if self._noise_chunks is not None:
            if self._noise_at >= len(self._noise):
                self._more_noise()
            length_s *= self._noise[self._noise_at]
            self._noise_at += 1
        self._step_length_s = length_s
        self._step_end_s = end_s = self._clock_s + length_s
        self._enter(_STEP, end_s)

    def _start_without(self, error: LivelockError) -> Step | None:
        """The engine's next step; a request that could never run is failed instead of blocking the queue."""
        while True:
            flight = cast("InFlight", error.request)
            self._engine.abort(flight)
            self._failed(flight, self._clock_s, str(error))
            try:
                return self._engine.start()
            except LivelockError as another:
                error = another

    def _end_step(self) -> None:
        """The running step is over: record it and hand out what ended."""
        now = self._clock_s = self._step_end_s
        engine = self._engine
        step = engine.complete()
        gaps = tokens = step.tokens_out
        # the engine hands back the objects it was given
        if step.first:
            for flight in cast("Sequence[InFlight]", step.first):
                flight.first_s = now
            gaps -= len(step.first)
        self.log.add(now, self._step_length_s, gaps, tokens, engine.blocks_used)
        if step.finished:
            for flight in cast("Sequence[InFlight]", step.finished):
                self._finished(flight, now)

    def _more_noise(self) -> None:
        assert self._noise_chunks is not None
        self._noise = vec[float](next(self._noise_chunks).tolist())
        self._noise_at = 0

    # Stretches of pure decode --------------------------------------------------------------

    def _begin_run(self, steps: int) -> None:
        steps = min(steps, MAX_RUN_STEPS)
        if self._noise_chunks is not None:
            if self._noise_at >= len(self._noise):
                self._more_noise()
            steps = min(steps, int(len(self._noise) - self._noise_at))
        batch = self._engine.steady_batch()
        seqs = batch.decode_seqs
        lengths = self._decode_run_s(seqs, batch.decode_context_tokens, batch.decode_context_max, steps)
        if self._noise_chunks is not None:
            lengths = lengths * np.array(list(self._noise[self._noise_at : self._noise_at + steps]))
        # a running sum from the clock on: the same additions, in the same order, as step by step
        self._run_ends = np.cumsum(np.concatenate(([self._clock_s], lengths)))[1:]
        self._run_lengths = lengths
        self._run_steps = steps
        self._run_seqs = seqs
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
        self._enter(_RUN, end_s)

    def _cut_run(self, at_s: float) -> None:
        """End the stretch with the step that runs when a request arrives at `at_s`."""
        steps = self._steps_until(at_s)
        if steps < self._run_steps:
            self._run_steps = steps
            self._schedule_run_end()

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
