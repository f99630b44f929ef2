"""The quicker start of Hydra composes what Hydra composes, and refuses what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf, _utils

from experiments.composition import quicken


def test_a_run_is_composed_once(ersim: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []
    original = ConfigLoaderImpl._load_configuration_impl

    def count(self: ConfigLoaderImpl, *arguments: object, **options: object) -> object:
        composed.append(options)
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", count)
    assert ersim("uncertainty=none", "workload.requests=100", "users=3").code == 0
    assert len(composed) == 1


def test_values_in_a_list_need_multirun(ersim: Callable) -> None:
    run = ersim("users=1,2")
    assert run.code == 1
    assert "--multirun" in run.err


def test_an_experiment_that_sweeps_is_a_sweep_without_being_told(ersim: Callable) -> None:
    shown = ersim("experiment=flagship", "users=0", "hydra.sweep.dir=out")
    assert shown.code == 2 and "no job was started" in shown.err


def test_the_command_line_is_recorded(ersim: Callable) -> None:
    assert ersim("uncertainty=none", "workload.requests=100", "users=3", "hydra.run.dir=out").code == 0
    assert yaml.safe_load(Path("out/.hydra/overrides.yaml").read_text()) == [
        "uncertainty=none",
        "workload.requests=100",
        "users=3",
    ]


def test_libyaml_reads_and_writes_as_omegaconf_does() -> None:
    text = "a: 1e3\nb: 'yes'\nc: 2026-11-21\nd: ${a}\ne: [1, 0x10, null, true]\nf: '1e3'\ng: größer\n"
    plain = _utils.get_yaml_loader()
    quicken()
    assert yaml.load(text, _utils.get_yaml_loader()) == yaml.load(text, plain)
    config = OmegaConf.create(text)
    assert OmegaConf.create(OmegaConf.to_yaml(config)) == config
    with pytest.raises(yaml.constructor.ConstructorError, match="duplicate key a"):
        OmegaConf.create("a: 1\na: 2\n")


def test_starting_loads_no_library_that_only_the_end_needs() -> None:
    code = (
        "import sys, experiments.simulate, ersim; ersim.simulate; "
        "libraries = {'pandas', 'pyarrow', 'scipy', 'sklearn', 'mlflow', 'matplotlib', 'rich'}; "
        "print(sorted(libraries & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fleet_that_is_no_yaml_is_one_message(ersim: Callable) -> None:
    Path("mine/fleet").mkdir(parents=True)
    Path("mine/fleet/broken.yaml").write_text("name: broken\nexperts: [\n")
    run = ersim("--config-dir", "mine", "fleet=broken")
    assert run.code == 1
    assert "not valid YAML" in run.err and "broken.yaml" in run.err and "line 3" in run.err
    assert "Traceback" not in run.err


def test_choices_are_listed_for_a_defaults_list_that_asks_for_them(ersim: Callable) -> None:
    for folder, text in {
        "mine/crowd/small.yaml": "# @package _global_\nusers: 17\n",
        "mine/seeds/small.yaml": "# @package _global_\nseed: 4\n",
        "mine/both/all.yaml": "# @package _global_\ndefaults: [{/crowd: small}, {/seeds: '${crowd}'}]\n",
    }.items():
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).write_text(text)
    shown = ersim("--config-dir", "mine", "--cfg", "job", "+both=all")
    assert shown.code == 0, shown.err
    assert (yaml.safe_load(shown.out)["users"], yaml.safe_load(shown.out)["seed"]) == (17, 4)
