"""One replication: build the system on one SimPy environment, let it run, collect what it did."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from simpy.events import Event

from ersim.config import FaultConfig, SimulationConfig
from ersim.engine import EngineConfig
from ersim.errors import SimulationError
from ersim.results.records import Gaps, RequestTable
from ersim.routing import Policy, build_balancer
from ersim.steptime import ExpertModel, Frontend
from ersim.system.dispatch import decider, picker, routing_times_s, service_time
from ersim.system.ends import Ends
from ersim.system.events import Clock
from ersim.system.gateway import Gateway
from ersim.system.log import StepLog
from ersim.system.replica import Replica
from ersim.system.sources import ClosedUsers, OpenArrivals
from ersim.types import ExpertState, FleetState, Prompt, StepTime
from ersim.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

NOISE_CHUNK = 4096


@dataclass(frozen=True)
class Counts:
    """Conservation: injected = completed + failed + rejected + in_gateway + on_replicas, at every instant."""

    injected: int
    completed: int
    failed: int
    rejected: int
    in_gateway: int
    on_replicas: int

    @property
    def balanced(self) -> bool:
        """Whether no request was lost or doubled."""
        ended = self.completed + self.failed + self.rejected
        return self.injected == ended + self.in_gateway + self.on_replicas


@dataclass(frozen=True)
class RunOutput:
    """What one replication did. `step_logs[expert][replica]` hold every engine step.

    beyond: per expert, how many steps lay outside its calibration's range, by what was exceeded.
    """

    table: RequestTable
    gaps: Gaps
    step_logs: list[list[StepLog]]
    counts: Counts
    end_s: float
    steps: int
    events: int
    beyond: list[dict[str, int]]

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request that ended."""
        return self.table.frame()


def engine_config(expert: ExpertModel) -> EngineConfig:
    """The engine's configuration from an expert's resolved settings."""
    settings = expert.engine
    return EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size,
        num_blocks=settings.kv_blocks,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        enable_prefix_caching=settings.enable_prefix_caching,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        policy=settings.policy,
        watermark=settings.watermark,
        scheduler_reserve_full_isl=settings.scheduler_reserve_full_isl,
        async_scheduling=settings.async_scheduling,
    )


def noise_chunks(relative_std: float, rng: np.random.Generator) -> Iterator[npt.NDArray[np.float64]] | None:
    """Lognormal factors of mean 1 in chunks, one per engine step; None without noise."""
    if relative_std <= 0.0:
        return None
    sigma = float(np.sqrt(np.log1p(relative_std**2)))

    def chunks() -> Iterator[npt.NDArray[np.float64]]:
        while True:
            yield np.exp(sigma * rng.standard_normal(NOISE_CHUNK) - 0.5 * sigma * sigma)

    return chunks()


class System:
    """Users, gateway and replicas wired together on one clock.

    `step_times[e]` is expert e's step time in this replication; `known` are decisions of a static
    policy per prompt. `fast_forward` False takes every step as an event of its own, for step times
    that depend on more than the batch. `frontends[e]` is what expert e's API server adds, None for
    nothing. `scores` are the policy's scores per prompt, where known. The same arguments and `seed`
    give the same output to the byte.
    """

    def __init__(
        self,
        config: SimulationConfig,
        experts: Sequence[ExpertModel],
        step_times: Sequence[StepTime],
        prompts: Sequence[Prompt],
        workload: Workload,
        policy: Policy,
        known: Sequence[int] | None,
        seed: int,
        fast_forward: bool = True,
        frontends: Sequence[Frontend] | None = None,
        scores: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.env = Clock()
        self._config = config
        self._fast_forward = fast_forward
        self._frontends = frontends
        self._step_times = step_times
        self._names = list(config.fleet.experts)
        self._prompts = prompts
        self._return_s = config.gateway.network_s + config.gateway.backend_network_s
        self._ends = Ends(self.env.agenda, config.gateway.network_s, self._return_s, request_target(config))
        self.replicas = self._build_replicas(experts, step_times, seed)
        fleet = self._fleet_state(experts)
        balancers = [build_balancer(config.router.balancer, seed + index) for index in range(len(experts))]
        routing_s = routing_times_s(config.gateway, policy, prompts)
        self.gateway = Gateway(
            self.env,
            workers=config.gateway.workers,
            queue_limit=config.gateway.queue_limit,
            backend_network_s=config.gateway.backend_network_s,
            service_s=service_time(config.gateway, routing_s),
            decide=decider(policy, prompts, fleet, known, scores, always_healthy=not config.faults),
            pick=picker(balancers, self.replicas),
            replicas=self.replicas,
            reject=self._ends.turn_away,
        )
        self.source = self._ends.source = self._build_source(workload)
        for fault in config.faults:
            self._plan_fault(fault)

    def _build_replicas(
        self, experts: Sequence[ExpertModel], step_times: Sequence[StepTime], seed: int
    ) -> list[list[Replica]]:
        fast = self._fast_forward and self._config.router.balancer != "least_kv"
        replicas: list[list[Replica]] = []
        for index, (expert, step_time) in enumerate(zip(experts, step_times, strict=True)):
            std = expert.step_noise if self._config.uncertainty.step_noise else 0.0
            frontend = None if self._frontends is None else self._frontends[index]
            count = self._config.fleet.experts[self._names[index]].replicas
            replicas.append(
                [
                    Replica(
                        self.env,
                        engine_config(expert),
                        step_time,
                        noise_chunks(std, np.random.default_rng([seed, 3, index, number])),
                        self._ends.finished,
                        self._ends.fail,
                        self._ends.refuse,
                        fast_forward=fast,
                        frontend=frontend,
                    )
                    for number in range(count)
                ]
            )
        return replicas

    def _fleet_state(self, experts: Sequence[ExpertModel]) -> FleetState:
        states = [
            ExpertState(
                name=name,
                model=self._config.fleet.experts[name].model,
                domains=tuple(self._config.fleet.experts[name].domains),
                replicas=self.replicas[index],
                slots=experts[index].engine.max_num_seqs * len(self.replicas[index]),
            )
            for index, name in enumerate(self._names)
        ]
        return FleetState(states)

    def _build_source(self, workload: Workload) -> ClosedUsers | OpenArrivals:
        network_s, arrive = self._config.gateway.network_s, self.gateway.arrive
        if workload.closed:
            return ClosedUsers(self.env, self._config.users, workload, network_s, arrive)
        return OpenArrivals(self.env, workload.arrivals(), network_s, arrive)

    def _plan_fault(self, fault: FaultConfig) -> None:
        replica = self.replicas[self._names.index(fault.expert)][fault.replica]
        why = f"expert {fault.expert} replica {fault.replica} died"
        self.env.call_later(fault.at_s, lambda event: replica.fail(why))
        if fault.back_s is not None:
            self.env.call_later(fault.back_s, lambda event: replica.restart())

    # The run -------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Where every injected request is now."""
        on_replicas = sum(replica.running + replica.waiting for row in self.replicas for replica in row)
        return Counts(
            self.source.injected,
            self._ends.completed,
            self._ends.failed,
            self._ends.rejected,
            self.gateway.queued + self.gateway.in_service,
            on_replicas,
        )

    def run(self) -> RunOutput:
        """Run to the target number of requests, the time limit, or the end of the arrivals."""
        limit_s = self._config.workload.max_duration_s
        if limit_s is not None:
            self.env.call_later(limit_s, self._time_is_up)
        self._run_until_stopped()
        for row in self.replicas:
            for replica in row:
                replica.settle(self.env.now)
        logs = [[replica.log for replica in row] for row in self.replicas]
        domains = [prompt.domain for prompt in self._prompts]
        table = self._ends.log.table(self._names, domains)
        parts = [log.gaps(self._return_s) for row in logs for log in row]
        end_s = float(np.nanmax(table["last_token_s"])) if len(table) else float(self.env.now)
        steps = sum(len(log) for row in logs for log in row)
        return RunOutput(
            table,
            Gaps.concatenate(parts),
            logs,
            self.counts(),
            end_s,
            steps,
            next(self.env._eid),
            [dict(getattr(step_time, "beyond", {})) for step_time in self._step_times],
        )

    def _time_is_up(self, event: Event) -> None:
        self.env.agenda.stopped = True

    def _run_until_stopped(self) -> None:
        """Until the run is stopped or, for arrivals that end, until nothing is left."""
        agenda = self.env.agenda
        collecting = gc.isenabled()
        gc.disable()  # a run makes no cycles, and the collector would look at every request again and again
        try:
            agenda.drain(self.env.step)
        finally:
            if collecting:
                gc.enable()
        if not agenda.stopped and self.source.injected == 0:
            raise SimulationError("the workload holds no requests")


def request_target(config: SimulationConfig) -> int | None:
    """How many requests end a run: as configured, else max(2000, 10 per user); None for a whole trace."""
    wanted = config.workload.requests
    if wanted is not None:
        return wanted
    if config.workload.arrivals == "trace":
        return None
    return max(2000, 10 * config.users)
