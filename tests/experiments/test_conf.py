"""Everything in conf/ composes, and every fleet can be simulated."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.check import check, preparations
from experiments.paths import CONF, ROOT
from experiments.schema import register, to_run, to_simulation


def names(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    """Hydra, ready to compose from conf/."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", list(overrides))


@pytest.mark.parametrize("fleet", [name for name in names("fleet") if not name.startswith("live")])
def test_every_fleet_uses_eight_gpus_and_fits_them(fleet: str, hydra: None) -> None:
    run = to_run(composed(f"fleet={fleet}"))
    assert run.fleet.name == fleet and run.fleet.label
    assert sum(expert.tp * expert.replicas for expert in run.fleet.experts.values()) == 8
    check(to_simulation(run), preparations())


@pytest.mark.parametrize("fleet", [name for name in names("fleet") if not name.startswith("live")])
def test_every_built_in_domain_has_exactly_one_expert(fleet: str, hydra: None) -> None:
    run = to_run(composed(f"fleet={fleet}"))
    prompts = preparations().prompt_set(run.workload.prompts)
    served = [domain for expert in run.fleet.experts.values() for domain in expert.domains]
    assert sorted(served) == prompts.domains


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group in ("workload", "lengths", "gateway", "objective", "uncertainty")
        for name in names(group)
        if (group, name) != ("workload", "trace")
    ],
)
def test_every_option_passes_the_check(group: str, name: str, hydra: None) -> None:
    run = to_run(composed(f"{group}={name}"))
    if name == "prompts":
        pytest.skip("lengths=prompts needs a set that has lengths")
    check(to_simulation(run), preparations())


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_is_a_sweep_with_a_name(name: str, hydra: None) -> None:
    config = compose("config", [f"experiment={name}"], return_hydra_config=True)
    assert config.name == name
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.hydra.sweeper.params


def test_requests_grow_with_users(hydra: None) -> None:
    assert composed("users=1").workload.requests == 300
    assert composed("users=1000").workload.requests == 6_000


def test_the_mlflow_folder_does_not_shadow_the_package() -> None:
    assert not (ROOT / "mlflow" / "__init__.py").exists()
    import mlflow

    assert mlflow.__version__ == version("mlflow")


def test_pinned_versions_name_no_host_and_no_path() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    assert [line for line in lines if "==" not in line or "/" in line or "@" in line] == []


def test_conf_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ersim.errors import ConfigError
    from experiments import paths

    monkeypatch.setattr(paths, "CONF", tmp_path)
    with pytest.raises(ConfigError, match="make venv"):
        paths.conf_dir()
