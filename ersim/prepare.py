"""What many runs share: prompt set, fitted policy, resolved experts. Made once, used by every replication."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ersim.config import ExpertConfig, FleetConfig, PromptSetConfig, RouterConfig, SimulationConfig
from ersim.fitted import Store
from ersim.routing import Policy, build_policy, split_prompts
from ersim.steptime import ExpertModel, build_expert_model
from ersim.system.dispatch import queries, static_decisions
from ersim.types import Batch, ExpertState, FleetState
from ersim.workload import PromptSet, load_prompt_set

REFERENCE_TOKENS, REFERENCE_SEQS = 1024, 32
DEPLOYMENT = ("domains", "replicas", "live")  # of an expert's config: what its one replica does not depend on


@dataclass(frozen=True)
class Routing:
    """A fitted policy, the prompts that may be asked, and what it thinks of every prompt.

    known: the expert of each prompt where decisions are static. scores: the policy's scores, shape
    (prompts, experts). preferred: its choice per prompt without load, for a policy that load moves.
    """

    policy: Policy
    ask: Sequence[int]
    known: Sequence[int] | None
    scores: npt.NDArray[np.float64]
    preferred: npt.NDArray[np.intp] | None


class Preparations:
    """Keeps what was prepared, by the configuration it was prepared from; one per process or notebook.

    store: keeps fitted routings between processes; None fits in every process.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._prompts: dict[str, PromptSet] = {}
        self._routing: dict[str, Routing] = {}
        self._experts: dict[str, ExpertModel] = {}
        self._prices: dict[int, tuple[float | None, float | None]] = {}

    def prompt_set(self, config: PromptSetConfig) -> PromptSet:
        """The prompt set of a configuration."""
        key = _key(asdict(config))
        if key not in self._prompts:
            self._prompts[key] = load_prompt_set(config)
        return self._prompts[key]

    def expert(self, config: ExpertConfig, key: str) -> ExpertModel:
        """An expert with calibration and KV capacity; `key` is its name in error messages."""
        known = _key({name: value for name, value in asdict(config).items() if name not in DEPLOYMENT})
        if known not in self._experts:
            self._experts[known] = build_expert_model(config, key)
        return self._experts[known]

    def expert_states(self, fleet: FleetConfig) -> list[ExpertState]:
        """The fleet's experts as a policy may see them before anything runs."""
        states = []
        for name, config in fleet.experts.items():
            expert = self.expert(config, f"fleet.experts.{name}")
            if id(expert) not in self._prices:  # kept above, so that no other takes its id
                self._prices[id(expert)] = token_prices_usd(expert)
            price_in, price_out = self._prices[id(expert)]
            states.append(
                ExpertState(
                    name=name,
                    model=config.model,
                    domains=tuple(config.domains),
                    replicas=(),
                    slots=expert.engine.max_num_seqs * config.replicas,
                    usd_per_mtok_in=price_in,
                    usd_per_mtok_out=price_out,
                )
            )
        return states

    def routing(self, config: SimulationConfig) -> Routing:
        """The policy of a run, fitted on the training part of the prompts with the run's seed."""
        prompts = self.prompt_set(config.workload.prompts)
        states = self.expert_states(config.fleet)
        identity = [asdict(state) for state in states]
        key = _key([asdict(config.router), identity, prompts.digest, config.seed])
        if key not in self._routing:
            self._routing[key] = self._kept(key, config.router) or self._fit(key, config, states, prompts)
        return self._routing[key]

    def _kept(self, key: str, router: RouterConfig) -> Routing | None:
        """The routing that an earlier process fitted; a policy from a file is read from that."""
        found = self._store.get(key) if self._store is not None and router.policy_path is None else None
        return found if isinstance(found, Routing) else None

    def _fit(
        self, key: str, config: SimulationConfig, states: Sequence[ExpertState], prompts: PromptSet
    ) -> Routing:
        routing = _fit(config.router, states, prompts, config.seed)
        if self._store is not None and config.router.policy_path is None:
            self._store.put(key, routing)
        return routing


def token_prices_usd(expert: ExpertModel) -> tuple[float | None, float | None]:
    """US dollars per million prompt and answer tokens when a replica is well used; None without a price.

    A reference load that a router may count with, not what a run costs: prefill at 1,024 tokens a
    step, decode at 32 sequences of 1,024 tokens of context, or as many as the replica may run.
    """
    if expert.usd_per_hour is None:
        return None, None
    step_time = expert.step_time(None)
    tokens = min(REFERENCE_TOKENS, expert.engine.max_num_batched_tokens)
    seqs = min(REFERENCE_SEQS, expert.engine.max_num_seqs)
    prefill_s = step_time.step_s(Batch(tokens, 0, 0, 0, ((tokens, 0),), 1))
    decode_s = step_time.step_s(Batch(seqs, seqs, seqs * REFERENCE_TOKENS, REFERENCE_TOKENS, (), seqs))
    usd_per_s = expert.usd_per_hour / 3600
    return 1e6 * usd_per_s * prefill_s / tokens, 1e6 * usd_per_s * decode_s / seqs


def _fit(router: RouterConfig, states: Sequence[ExpertState], prompts: PromptSet, seed: int) -> Routing:
    """Fit on one thread: more of them add up in another order, and a prompt near a border changes sides."""
    with threadpool_limits(limits=1):
        return _fitted(router, states, prompts, seed)


def _fitted(router: RouterConfig, states: Sequence[ExpertState], prompts: PromptSet, seed: int) -> Routing:
    train, ask = split_prompts(prompts.prompts, router.train_fraction, seed)
    training = [prompts.prompts[index] for index in train]
    policy = build_policy(router, states, training, seed)
    if policy.sees_asked:  # the oracle alone
        policy.reveal(prompts.prompts)
    asked = [int(index) for index in ask] or list(range(len(prompts.prompts)))
    scores = np.asarray(policy.score(queries(prompts.prompts)))
    known = static_decisions(policy, scores, FleetState(states))
    return Routing(policy, asked, known, scores, policy.decide(scores) if policy.trades_quality else None)


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
