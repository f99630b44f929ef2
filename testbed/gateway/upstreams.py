"""What the gateway knows of the experts: replicas, their health, who waits for a slot."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import aiohttp

from ersim.routing import Balancer, build_balancer
from ersim.types import ExpertState, FleetState, ReplicaState
from testbed.gateway.kv_share import KvShare, kv_share
from testbed.gateway.settings import ExpertEndpoint, GatewaySettings

FAILS_DOWN = 3  # probes in a row that must fail by time-out; a refused connection counts as all of them
PLAIN = {"Accept-Encoding": "identity"}  # the session leaves answers as they come


class Replica:
    """One upstream server; satisfies `ersim.types.ReplicaState`.

    healthy: whether requests may be sent; so it is until a probe fails. seen: a probe has succeeded.
    """

    def __init__(self, expert: str, index: int, url: str, slots: int) -> None:
        self.expert = expert
        self.index = index
        self.url = url.rstrip("/")
        self.slots = slots
        self.in_flight = 0
        self.kv = KvShare(slots)
        self.healthy = True
        self.seen = False
        self.fails = 0  # consecutive failed health probes

    @property
    def running(self) -> int:
        """Requests under way that fit into its batch."""
        return min(self.in_flight, self.slots)

    @property
    def waiting(self) -> int:
        """Requests under way beyond that."""
        return max(0, self.in_flight - self.slots)

    @property
    def kv_used_fraction(self) -> float:
        """Share of KV blocks in use; once it has been looked at, the health watch keeps it up to date."""
        return self.kv.estimate(self.running)


@dataclass(frozen=True, slots=True)
class TriedReplica:
    """A replica as a request sees it that has tried it in vain: as loaded as it is, and not healthy."""

    replica: Replica
    healthy: bool = False

    @property
    def running(self) -> int:
        """As of the replica."""
        return self.replica.running

    @property
    def waiting(self) -> int:
        """As of the replica."""
        return self.replica.waiting

    @property
    def kv_used_fraction(self) -> float:
        """As of the replica."""
        return self.replica.kv_used_fraction


class SlotQueue:
    """The requests that wait in the gateway for an expert's slot, as a policy sees them.

    In the simulator they wait in a replica's queue and count for the expert's load; here they do by
    standing among its replicas, as one that takes no request.
    """

    running = 0
    kv_used_fraction = 0.0
    healthy = False

    def __init__(self, expert: Expert) -> None:
        self._expert = expert

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return self._expert.queued


class QueueFull(Exception):
    """No slot and no place in the queue: the client is told to come back later."""


class Expert:
    """One expert: its replicas, its balancer, and a bounded FIFO queue for its slots."""

    def __init__(self, endpoint: ExpertEndpoint, settings: GatewaySettings, seed: int) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        share = max(1, endpoint.slots // len(endpoint.urls))
        self.replicas = [Replica(self.name, i, url, share) for i, url in enumerate(endpoint.urls)]
        # one for trial picks once: what such a balancer looks at is wanted from the first probe on
        build_balancer(settings.balancer, seed).pick(self.replicas)
        self.balancer: Balancer = build_balancer(settings.balancer, seed)
        self._free = endpoint.slots
        self._queue_limit = settings.queue_limit
        self._timeout_s = settings.queue_timeout_s
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        """Requests that wait here for a slot."""
        return len(self._waiters)

    @property
    def ready(self) -> bool:
        """Whether any replica is known to accept requests, by a probe."""
        return any(replica.healthy and replica.seen for replica in self.replicas)

    async def take_slot(self) -> None:
        """Wait for a slot in order of arrival. Raises QueueFull when the queue is, or on time-out."""
        if self._free > 0:
            self._free -= 1
            return
        if len(self._waiters) >= self._queue_limit:
            raise QueueFull(f"{self.name}: {len(self._waiters)} requests wait already")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter, self._timeout_s)
        except TimeoutError:
            if waiter.done() and not waiter.cancelled():
                return  # handed over in the very turn of the loop in which the time ran out
            self._forget(waiter)
            raise QueueFull(f"{self.name}: no slot within {self._timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._forget(waiter)
            if waiter.done() and not waiter.cancelled():
                self.give_slot()
            raise

    def _forget(self, waiter: asyncio.Future[None]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def give_slot(self) -> None:
        """Hand the slot to who waits longest, or keep it free."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


class Fleet:
    """All experts, as the policy sees them."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.experts = [
            Expert(endpoint, settings, settings.seed + index)
            for index, endpoint in enumerate(settings.experts)
        ]
        self.by_name = {expert.name: index for index, expert in enumerate(self.experts)}
        self.state = FleetState([_expert_state(expert) for expert in self.experts])
        self._settings = settings

    @property
    def replicas(self) -> Sequence[Replica]:
        """Every replica of every expert."""
        return [replica for expert in self.experts for replica in expert.replicas]

    def replicas_left(self, expert: int, tried: Collection[tuple[int, int]]) -> Sequence[ReplicaState]:
        """An expert's replicas for a request that has `tried` some (expert, replica) in vain."""
        return [
            TriedReplica(one) if (expert, one.index) in tried else one
            for one in self.experts[expert].replicas
        ]

    def state_left(self, tried: Collection[tuple[int, int]]) -> FleetState:
        """The whole fleet for such a request: what the policy is asked with."""
        if not tried:
            return self.state
        return FleetState(
            [
                replace(state, replicas=[*self.replicas_left(index, tried), SlotQueue(self.experts[index])])
                for index, state in enumerate(self.state.experts)
            ]
        )

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Ask every replica for its health, for ever: who died is skipped, who is back is used."""
        while True:
            await asyncio.gather(*(self._probe(session, replica) for replica in self.replicas))
            await asyncio.sleep(self._settings.health_period_s)

    async def _probe(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        probes = [self._probe_health(session, replica)]
        if replica.kv.wanted:
            probes.append(self._probe_kv(session, replica))
        await asyncio.gather(*probes)

    async def _probe_health(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        timeout = aiohttp.ClientTimeout(total=self._settings.health_timeout_s)
        try:
            async with session.get(f"{replica.url}/health", timeout=timeout, allow_redirects=False) as answer:
                replica.fails = 0 if answer.status == 200 else replica.fails + 1
                replica.seen = replica.seen or answer.status == 200
        except TimeoutError:
            replica.fails += 1  # a busy server may be slow to answer: believe it only when it repeats
        except (aiohttp.ClientError, OSError):
            replica.fails = FAILS_DOWN
        replica.healthy = replica.fails < FAILS_DOWN

    async def _probe_kv(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        """Read the replica's KV share; who does not tell it keeps the last one, or none."""
        timeout = aiohttp.ClientTimeout(total=self._settings.health_timeout_s)
        try:
            async with session.get(
                f"{replica.url}/metrics", timeout=timeout, headers=PLAIN, allow_redirects=False
            ) as answer:
                share = kv_share(await answer.read()) if answer.status == 200 else None
        except (aiohttp.ClientError, OSError):  # of which a time-out is one
            return
        if share is not None:
            replica.kv.set(share, replica.running)


def _expert_state(expert: Expert) -> ExpertState:
    endpoint = expert.endpoint
    return ExpertState(
        name=endpoint.name,
        model=endpoint.model,
        domains=tuple(endpoint.domains),
        replicas=[*expert.replicas, SlotQueue(expert)],
        slots=endpoint.slots,
        usd_per_mtok_in=endpoint.usd_per_mtok_in,
        usd_per_mtok_out=endpoint.usd_per_mtok_out,
    )
