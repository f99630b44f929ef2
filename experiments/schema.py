"""What the `ersim` command composes: the simulation's typed config and what surrounds a run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ersim.config import SimulationConfig
from ersim.errors import ConfigError
from experiments.names import check_names


@dataclass
class TrackingConfig:
    """Where results are logged.

    enabled: None logs sweeps and leaves single runs alone. uri: None takes MLFLOW_TRACKING_URI or
    the sqlite store under mlflow/. experiment: the MLflow experiment's name.
    """

    enabled: Optional[bool] = None
    uri: Optional[str] = None
    experiment: str = "ersim"


@dataclass
class RunConfig(SimulationConfig):
    """A simulation, the name of the study it belongs to, and where it is logged.

    replications: auto or a number, short for uncertainty.replications; None leaves that as it is.
    """

    name: str = "adhoc"
    replications: Optional[str] = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def requests_for(users: int, least: int, per_user: int) -> int:
    """`${requests_for:${users},least,per_user}` in conf: per_user requests each, but `least` in all."""
    return max(least, per_user * users)


def register() -> None:
    """Put the schema into Hydra's config store, and the resolver that conf/workload uses."""
    ConfigStore.instance().store(name="ersim_schema", node=RunConfig)
    OmegaConf.register_new_resolver("requests_for", requests_for, replace=True)


def to_run(config: DictConfig) -> RunConfig:
    """The composed config as typed objects. Raises ConfigError that names the key at fault."""
    check_names(config)
    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key} cannot be used: {str(error).splitlines()[0]}") from error


def to_simulation(run: RunConfig) -> SimulationConfig:
    """The part that the model sees: results do not depend on a study's name or on tracking."""
    values: dict[str, Any] = {item.name: getattr(run, item.name) for item in fields(SimulationConfig)}
    if run.replications is not None:
        values["uncertainty"] = replace(run.uncertainty, replications=run.replications)
    return SimulationConfig(**values)
