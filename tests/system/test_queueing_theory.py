"""Known results of queueing theory: Erlang C for the gateway and for an engine, M/D/1 for one worker."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from ersim.engine import EngineConfig
from ersim.system.events import Clock
from ersim.system.gateway import Gateway
from ersim.system.inflight import InFlight
from ersim.system.replica import Replica
from ersim.system.sources import OpenArrivals
from ersim.types import Batch, Request
from ersim.workload import Workload


class ConstantStep:
    """Every step takes the same time, whatever runs in it."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def step_s(self, batch: Batch) -> float:
        """The constant."""
        return self._step_s

    def decode_run_s(self, decode_seqs: int, context_tokens: int, context_max: int, steps: int) -> np.ndarray:
        """The constant, `steps` times."""
        return np.full(steps, self._step_s)


class Arrivals(Workload):
    """An open workload of given requests."""

    closed = False

    def __init__(self, requests: list[Request]) -> None:
        self._requests = requests

    def arrivals(self) -> Iterator[Request]:
        """The requests as they are."""
        return iter(self._requests)


def erlang_c_wait_s(arrival_rate: float, service_rate: float, servers: int) -> float:
    """Mean wait in queue of M/M/c (Erlang 1917)."""
    load = arrival_rate / service_rate
    below = sum(load**k / math.factorial(k) for k in range(servers))
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (below + last) / (servers * service_rate - arrival_rate)


def poisson_requests(rate: float, count: int, output_tokens: np.ndarray, seed: int) -> list[Request]:
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    return [
        Request(i, 0, 0, 1, int(n), int(n), arrival_s=float(t))
        for i, (t, n) in enumerate(zip(times, output_tokens, strict=True))
    ]


class Sink:
    """Stands where a replica stands and notes when each request leaves the gateway."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    def submit(self, flight: InFlight, at_s: float) -> None:
        self.waits_s.append(at_s - flight.send_s - flight.routing_s)


def gateway_mean_wait_s(workers: int, rate: float, service_s: np.ndarray, seed: int) -> float:
    env, sink = Clock(), Sink()

    def service(flight: InFlight) -> float:
        flight.routing_s = float(service_s[flight.request_id])
        return flight.routing_s

    gateway = Gateway(
        env,
        workers=workers,
        queue_limit=None,
        backend_network_s=0.0,
        service_s=service,
        decide=lambda flight: 0,
        pick=lambda expert: 0,
        replicas=[[sink]],
        reject=lambda flight, why: pytest.fail(why),
    )
    requests = poisson_requests(rate, len(service_s), np.ones(len(service_s)), seed)
    OpenArrivals(env, iter(requests), 0.0, gateway.arrive)
    env.run()
    assert len(sink.waits_s) == len(service_s)
    return float(np.mean(sink.waits_s))


@pytest.mark.parametrize(("workers", "utilisation"), [(1, 0.7), (4, 0.8), (16, 0.9)])
def test_gateway_with_exponential_service_is_erlang_c(workers: int, utilisation: float) -> None:
    mean_s, count = 0.01, 30_000
    rate = utilisation * workers / mean_s
    theory = erlang_c_wait_s(rate, 1 / mean_s, workers)
    measured = [
        gateway_mean_wait_s(workers, rate, np.random.default_rng([9, seed]).exponential(mean_s, count), seed)
        for seed in range(4)
    ]
    error = float(np.std(measured, ddof=1)) / 2.0
    assert np.mean(measured) == pytest.approx(theory, abs=4 * error + 0.02 * theory)
    assert np.mean(measured) == pytest.approx(theory, rel=0.10)


def test_single_worker_with_constant_service_is_pollaczek_khinchine() -> None:
    mean_s, utilisation = 0.01, 0.8
    theory = utilisation * mean_s / (2 * (1 - utilisation))
    measured = gateway_mean_wait_s(1, utilisation / mean_s, np.full(150_000, mean_s), 5)
    assert measured == pytest.approx(theory, rel=0.05)


def engine_mean_wait_s(slots: int, rate: float, lengths: np.ndarray, step_s: float, seed: int) -> float:
    env = Clock()
    waits: list[float] = []

    def finished(flight: InFlight, time_s: float) -> None:
        waits.append(time_s - flight.send_s - step_s * flight.output_tokens)

    def failed(flight: InFlight, time_s: float, why: str) -> None:
        pytest.fail(why)

    config = EngineConfig(
        max_num_seqs=slots,
        max_num_batched_tokens=1024,
        max_model_len=100_000,
        num_blocks=60_000,
        enable_prefix_caching=False,
        async_scheduling=False,
    )
    replica = Replica(env, config, ConstantStep(step_s), None, finished, failed, failed)
    requests = poisson_requests(rate, len(lengths), lengths, seed)
    OpenArrivals(
        env, Arrivals(requests).arrivals(), 0.0, lambda flight: replica.submit(flight, flight.send_s)
    )
    env.run()
    assert len(waits) == len(lengths)
    return float(np.mean(waits))


def test_engine_whose_steps_cost_nothing_extra_is_erlang_c() -> None:
    """With constant steps and geometric lengths c sequence slots are c exponential servers.

    A step is short against a service time (mean 100 steps), so the discretisation is below 1 %.
    """
    slots, step_s, mean_steps, utilisation, count = 4, 0.001, 100, 0.75, 12_000
    service_rate = 1 / (step_s * mean_steps)
    rate = utilisation * slots * service_rate
    measured = [
        engine_mean_wait_s(
            slots, rate, np.random.default_rng([11, seed]).geometric(1 / mean_steps, count), step_s, seed
        )
        for seed in range(5)
    ]
    theory = erlang_c_wait_s(rate, service_rate, slots) + step_s / 2  # half a step until admission
    error = float(np.std(measured, ddof=1)) / np.sqrt(5)
    assert np.mean(measured) == pytest.approx(theory, abs=3.5 * error)
    assert np.mean(measured) == pytest.approx(theory, rel=0.12)
