"""Typed description of one simulation: what Hydra composes, what `ersim.simulate` takes.

Plain dataclasses (also valid OmegaConf structured configs). Types are checked by whoever builds
them; values are checked by `validate`, which names the key, the value and the remedy.
Seconds, tokens and bytes throughout; None means "use the documented default".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from ersim.errors import bad_value, unknown_choice


@dataclass
class EngineSettings:
    """vLLM engine arguments, under vLLM's own names; None takes vLLM's default for the GPU.

    kv_cache_dtype: auto (16 bits) or fp8 (half the bytes a token).
    """

    max_num_seqs: Optional[int] = None
    max_num_batched_tokens: Optional[int] = None
    max_model_len: int = 8192
    block_size: Optional[int] = None
    kv_blocks: Optional[int] = None
    gpu_memory_utilization: float = 0.92
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    async_scheduling: Optional[bool] = None
    kv_cache_dtype: str = "auto"
    speculative_tokens: int = 0
    max_loras: int = 0


@dataclass
class ExpertConfig:
    """One kind of expert: a model at a precision on a GPU, and how many replicas of it."""

    model: str = "llama3.1-8b"
    precision: str = "bf16"
    gpu: str = "h100-80gb"
    tp: int = 1
    replicas: int = 1
    domains: list[str] = field(default_factory=list)
    calibration: str = "auto"
    engine: EngineSettings = field(default_factory=EngineSettings)
    usd_per_gpu_hour: Optional[float] = None
    live: dict[str, Any] = field(default_factory=dict)


@dataclass
class FleetConfig:
    """A named set of experts; the mapping's order is the order of expert indices.

    gpu: the GPU of all experts that do not name one of their own (conf/expert files refer to it).
    label: what figures call the fleet; its name where empty.
    """

    name: str = "unnamed"
    label: str = ""
    gpu: str = "h100-80gb"
    experts: dict[str, ExpertConfig] = field(default_factory=dict)


@dataclass
class LengthsConfig:
    """Where prompt and answer lengths come from.

    kind: conversation, code, summarisation (fitted distributions), prompts (as the prompt set
    says), constant. `prompt_tokens` and `output_tokens` are used by constant only.
    `prompt_scale` multiplies drawn prompt lengths (never below the prompt's own text),
    `output_scale` answer lengths; `max_tokens_factor` is declared / true length
    (1.0 means that requests end by length, as with ignore_eos). `max_total_tokens` cuts prompt and
    answer together; None leaves long ones to the engine, which refuses or truncates them.
    """

    kind: str = "conversation"
    prompt_tokens: Optional[int] = None
    output_tokens: Optional[int] = None
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    max_tokens_factor: float = 1.0
    max_total_tokens: Optional[int] = None


@dataclass
class PromptSetConfig:
    """Which prompts users ask.

    path None is the built-in set. Column names map a foreign file's columns; `quality_columns`
    maps a model name to the column that holds its score. `limit` keeps the first N rows.
    """

    path: Optional[str] = None
    text_column: str = "prompt"
    domain_column: Optional[str] = "domain"
    id_column: Optional[str] = None
    prompt_tokens_column: Optional[str] = None
    output_tokens_column: Optional[str] = None
    quality_columns: dict[str, str] = field(default_factory=dict)
    limit: Optional[int] = None


@dataclass
class WorkloadConfig:
    """Who asks what, and when.

    arrivals: closed (users with think time), poisson, gamma (rate_rps, cv), trace (trace_path).
    requests: how many requests one run ends (completed, failed or rejected); None is
    max(2000, 10 per user), or the whole trace. Warm-up is cut from them by `results`.
    think_s is the mean of an exponential think time; 0 means none.
    turns is the mean number of turns of a session (geometric); a later turn's prompt holds the
    earlier ones and their answers. `system_prompt_tokens` are shared by all requests to an expert.
    ramp_s spreads the users' first requests evenly. domain_weights are the domains' shares of the
    requests (relative; a domain not named gets none); empty asks all prompts alike.
    """

    arrivals: str = "closed"
    requests: Optional[int] = None
    max_duration_s: Optional[float] = None
    think_s: float = 1.0
    ramp_s: float = 2.0
    turns: float = 1.0
    system_prompt_tokens: int = 0
    rate_rps: Optional[float] = None
    cv: float = 1.0
    trace_path: Optional[str] = None
    trace_speed: float = 1.0
    domain_weights: dict[str, float] = field(default_factory=dict)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    prompts: PromptSetConfig = field(default_factory=PromptSetConfig)


@dataclass
class RouterConfig:
    """Which policy routes (a name in the policy registry) and with what parameters.

    `policy_path` loads a fitted policy from a file instead of fitting one on the prompt set.
    `train_fraction` of the prompts (grouped by text) fits the policy; the rest is asked.
    """

    policy: str = "cluster"
    params: dict[str, Any] = field(default_factory=dict)
    policy_path: Optional[str] = None
    train_fraction: float = 0.5
    balancer: str = "least_outstanding"
    spill: Optional[dict[str, Any]] = field(default_factory=dict)


@dataclass
class GatewayConfig:
    """The routing gateway as a server: workers, service time, network.

    Service time of a request = base_s + per_prompt_token_s * prompt tokens + the policy's routing
    time. routing_s and routing_per_char_s override the policy's measured routing time.
    network_s is one way, client to gateway; backend_network_s one way, gateway to expert.
    workers None means no gateway queue at all (infinite servers).
    """

    workers: Optional[int] = 4
    base_s: float = 0.0005
    per_prompt_token_s: float = 0.0
    routing_s: Optional[float] = None
    routing_per_char_s: Optional[float] = None
    network_s: float = 0.0005
    backend_network_s: float = 0.0002
    queue_limit: Optional[int] = None


@dataclass
class ObjectiveConfig:
    """Service-level objective that goodput counts against, per request."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


@dataclass
class FaultConfig:
    """One replica that stops and later comes back; requests on it fail."""

    expert: str = ""
    replica: int = 0
    at_s: float = 0.0
    back_s: Optional[float] = None


@dataclass
class UncertaintyConfig:
    """How intervals are made: replications of the run with resampled calibration and workload.

    replications: a count, or "auto" to add replications until the relative half width of the
    mean output throughput and median E2E is below `precision`, within min and max_replications.
    sample_calibration: draw each replication's coefficients from the calibration's covariance.
    step_noise: draw each step's residual; off gives the mean step time.
    """

    replications: str = "auto"
    precision: float = 0.03
    min_replications: int = 4
    max_replications: int = 12
    level: float = 0.90
    step_noise: bool = True
    sample_calibration: bool = True


@dataclass
class SimulationConfig:
    """Everything one run needs; the same config and seed give byte-identical results."""

    users: int = 100
    seed: int = 0
    fleet: FleetConfig = field(default_factory=FleetConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    faults: list[FaultConfig] = field(default_factory=list)


PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")
ARRIVALS = ("closed", "poisson", "gamma", "trace")
LENGTH_KINDS = ("conversation", "code", "summarisation", "prompts", "constant")
POLICIES = ("fcfs", "priority")
KV_CACHE_DTYPES = ("auto", "fp8")


def _at_least(key: str, value: float | int | None, low: float | int) -> None:
    if value is not None and not value >= low:
        raise bad_value(key, f">= {low}", value)


def _above(key: str, value: float | None, low: float) -> None:
    if value is not None and not value > low:
        raise bad_value(key, f"> {low}", value)


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise bad_value(key, f"in [{low}, {high}]", value)


def validate_engine(engine: EngineSettings, key: str) -> None:
    """Raise ConfigError for an engine setting that vLLM would refuse or that we do not model."""
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "kv_blocks"):
        _at_least(f"{key}.{name}", getattr(engine, name), 1)
    _within(f"{key}.gpu_memory_utilization", engine.gpu_memory_utilization, 0.01, 1.0)
    _within(f"{key}.watermark", engine.watermark, 0.0, 0.99)
    _at_least(f"{key}.long_prefill_token_threshold", engine.long_prefill_token_threshold, 0)
    if engine.policy not in POLICIES:
        raise unknown_choice(f"{key}.policy", engine.policy, POLICIES)
    if engine.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise unknown_choice(f"{key}.kv_cache_dtype", engine.kv_cache_dtype, KV_CACHE_DTYPES)
    for name in ("speculative_tokens", "max_loras"):
        if getattr(engine, name) != 0:
            raise bad_value(f"{key}.{name}", "0 (not modelled yet)", getattr(engine, name))
    budget, seqs = engine.max_num_batched_tokens, engine.max_num_seqs
    if budget is not None and seqs is not None and budget < seqs:
        raise bad_value(f"{key}.max_num_batched_tokens", f">= max_num_seqs ({seqs}), as vLLM demands", budget)
    if budget is not None and not engine.enable_chunked_prefill and budget < engine.max_model_len:
        raise bad_value(
            f"{key}.max_num_batched_tokens",
            f">= max_model_len ({engine.max_model_len}) when chunked prefill is off, as vLLM demands",
            budget,
        )


def validate_expert(expert: ExpertConfig, key: str) -> None:
    """Raise ConfigError for an expert that cannot exist; names of models and GPUs are checked on load."""
    if expert.precision not in PRECISIONS:
        raise unknown_choice(f"{key}.precision", expert.precision, PRECISIONS)
    if expert.tp not in (1, 2, 4, 8):
        raise bad_value(f"{key}.tp", "1, 2, 4 or 8", expert.tp)
    _at_least(f"{key}.replicas", expert.replicas, 1)
    _at_least(f"{key}.usd_per_gpu_hour", expert.usd_per_gpu_hour, 0)
    validate_engine(expert.engine, f"{key}.engine")


def validate_workload(workload: WorkloadConfig, key: str = "workload") -> None:
    """Raise ConfigError for a workload that cannot be generated."""
    if workload.arrivals not in ARRIVALS:
        raise unknown_choice(f"{key}.arrivals", workload.arrivals, ARRIVALS)
    if workload.lengths.kind not in LENGTH_KINDS:
        raise unknown_choice(f"{key}.lengths.kind", workload.lengths.kind, LENGTH_KINDS)
    _at_least(f"{key}.requests", workload.requests, 1)
    _above(f"{key}.max_duration_s", workload.max_duration_s, 0)
    _at_least(f"{key}.think_s", workload.think_s, 0)
    _at_least(f"{key}.ramp_s", workload.ramp_s, 0)
    _at_least(f"{key}.turns", workload.turns, 1)
    _at_least(f"{key}.system_prompt_tokens", workload.system_prompt_tokens, 0)
    _above(f"{key}.trace_speed", workload.trace_speed, 0)
    _above(f"{key}.cv", workload.cv, 0)
    _at_least(f"{key}.lengths.max_total_tokens", workload.lengths.max_total_tokens, 2)
    for domain, weight in workload.domain_weights.items():
        _at_least(f"{key}.domain_weights.{domain}", weight, 0)
    _above(f"{key}.lengths.prompt_scale", workload.lengths.prompt_scale, 0)
    _above(f"{key}.lengths.output_scale", workload.lengths.output_scale, 0)
    _at_least(f"{key}.lengths.max_tokens_factor", workload.lengths.max_tokens_factor, 1)
    if workload.arrivals in ("poisson", "gamma"):
        if workload.rate_rps is None:
            raise bad_value(f"{key}.rate_rps", f"set for {workload.arrivals} arrivals", None)
        _above(f"{key}.rate_rps", workload.rate_rps, 0)
    if workload.arrivals == "trace" and workload.trace_path is None:
        raise bad_value(f"{key}.trace_path", "set for trace arrivals", None)
    if workload.lengths.kind == "constant":
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(workload.lengths, name) is None:
                raise bad_value(f"{key}.lengths.{name}", "set for constant lengths", None)
    for name in ("prompt_tokens", "output_tokens"):
        _at_least(f"{key}.lengths.{name}", getattr(workload.lengths, name), 1)


def validate(config: SimulationConfig) -> None:
    """Raise ConfigError if any value is out of range; cheap enough to check a whole sweep first."""
    _at_least("users", config.users, 1)
    _at_least("seed", config.seed, 0)
    if not config.fleet.experts:
        raise bad_value("fleet.experts", "at least one expert", {})
    for name, expert in config.fleet.experts.items():
        validate_expert(expert, f"fleet.experts.{name}")
    validate_workload(config.workload)
    _within("router.train_fraction", config.router.train_fraction, 0.0, 1.0)
    gateway = config.gateway
    _at_least("gateway.workers", gateway.workers, 1)
    _at_least("gateway.queue_limit", gateway.queue_limit, 1)
    for name in (
        "base_s",
        "per_prompt_token_s",
        "routing_s",
        "routing_per_char_s",
        "network_s",
        "backend_network_s",
    ):
        _at_least(f"gateway.{name}", getattr(gateway, name), 0)
    _above("objective.ttft_s", config.objective.ttft_s, 0)
    _above("objective.tpot_s", config.objective.tpot_s, 0)
    uncertainty = config.uncertainty
    count = uncertainty.replications
    if count != "auto" and not (str(count).isdigit() and int(count) >= 1):
        raise bad_value("uncertainty.replications", "auto or an integer >= 1", count)
    _above("uncertainty.precision", uncertainty.precision, 0)
    _at_least("uncertainty.min_replications", uncertainty.min_replications, 2)
    _at_least("uncertainty.max_replications", uncertainty.max_replications, uncertainty.min_replications)
    _within("uncertainty.level", uncertainty.level, 0.5, 0.999)
    for index, fault in enumerate(config.faults):
        key = f"faults[{index}]"
        if fault.expert not in config.fleet.experts:
            raise unknown_choice(f"{key}.expert", fault.expert, config.fleet.experts)
        replicas = config.fleet.experts[fault.expert].replicas
        _within(f"{key}.replica", fault.replica, 0, replicas - 1)
        _at_least(f"{key}.at_s", fault.at_s, 0)
        if fault.back_s is not None:
            _above(f"{key}.back_s", fault.back_s, fault.at_s)
