"""What `ersim-route` is told: a labelled set, the routers to compare, how to split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore

from ersim.config import FleetConfig, PromptSetConfig, RouterConfig
from ersim.errors import bad_value, unknown_choice
from experiments.folders import check_file, check_folder
from experiments.schema import TrackingConfig

ACTIONS = ("eval", "fit", "time")
OUTPUTS = Path("outputs/route")


@dataclass
class SetConfig:
    """A labelled prompt set and the routers that eval compares on it.

    where: column values that a row must have. strong, weak: the two models of a threshold
    comparison; without them all labelled models compete. prices: USD per million tokens by model.
    train overrides the job's own.
    """

    name: str = "set"
    prompts: PromptSetConfig = field(default_factory=PromptSetConfig)
    where: dict[str, Any] = field(default_factory=dict)
    strong: Optional[str] = None
    weak: Optional[str] = None
    prices: dict[str, float] = field(default_factory=dict)
    routers: dict[str, RouterConfig] = field(default_factory=dict)
    train: Optional[float] = None


@dataclass
class RouteConfig:
    """One job of `ersim-route`; conf/route/route.yaml says what each key means."""

    action: str = "eval"
    name: str = "route"
    data: Optional[str] = None
    train: float = 0.5
    seeds: int = 5
    seed: int = 0
    out: Optional[str] = None
    embedding_cache: Optional[str] = None
    set: SetConfig = field(default_factory=SetConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def register() -> None:
    """Put the schema into Hydra's config store."""
    store = ConfigStore.instance()
    store.store(name="route_schema", node=RouteConfig)


def check(config: RouteConfig) -> None:
    """Raise ConfigError for a job that cannot run."""
    if config.action not in ACTIONS:
        raise unknown_choice("action", config.action, ACTIONS)
    if not config.train > 0:
        raise bad_value("train", "> 0: a share up to 1 or a number of prompts", config.train)
    if config.seeds < 1:
        raise bad_value("seeds", ">= 1", config.seeds)
    if config.action == "eval":
        check_folder(OUTPUTS / config.name, "name")
    if config.action == "fit":
        if config.out is None:
            raise bad_value("out", "the file to write the policy to, such as out=policy.ersim", None)
        check_file(Path(config.out), "out")
