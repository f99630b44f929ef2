"""Hydra made quick to start: YAML is read and written by libyaml, and a run is composed once.

Hydra composes every configuration twice, once only to learn whether it is a sweep, and OmegaConf
reads YAML in pure Python: together more than half a second before a run begins. For every file it
lists the choices made so far, which only a defaults list with an interpolation asks for. Its help
copies the whole repository for every group. Nothing else of either changes; what they do not offer
in this form (another version, PyYAML without libyaml) stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hydra._internal import defaults_list
from hydra._internal import hydra as hydra_core
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, _utils, omegaconf

RUN_MODE = "hydra.mode=RUN"


class SingleComposition(ConfigLoaderImpl):
    """Hands the configuration that `hydra.mode` was read from to the run itself."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose, or return what the question for the mode has composed from the same overrides.

        That question is the only call with `validate_sweep_overrides` off. Where no mode is
        configured Hydra then adds `hydra.mode=RUN` to the overrides of a run, and so does this.
        """
        asked: dict[tuple[str | None, tuple[str, ...]], DictConfig] = self.__dict__.setdefault("_asked", {})
        if not validate_sweep_overrides and not _names_a_sweep(overrides):
            with contextlib.suppress(Exception):  # what is wrong is said by the composition below
                config = super().load_configuration(config_name, overrides, RunMode.RUN, from_shell)
                asked[config_name, tuple(overrides)] = config
                return config
        told = overrides[-1:] == [RUN_MODE]
        found = asked.pop((config_name, tuple(overrides[:-1] if told else overrides)), None)
        if found is None or run_mode is not RunMode.RUN or not validate_sweep_overrides:
            return self._composed(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if told:
            found.hydra.mode = RunMode.RUN
            found.hydra.overrides.hydra.append(RUN_MODE)
        return found

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """Options of a group; without overrides the repository is asked as it is, not a copy of it.

        `--help` asks 168 times, and each copy takes 10 ms.
        """
        if config_name is None and not overrides:
            options: list[str] = self.repository.get_group_options(group_name, results_filter)
            return options
        return super().get_group_options(group_name, results_filter, config_name, overrides)

    def _composed(self, *arguments: Any) -> DictConfig:
        """What Hydra composes; a file that is no YAML is one message that names file and line."""
        try:
            return super().load_configuration(*arguments)
        except yaml.YAMLError as error:
            raise ConfigCompositionException(f"not valid YAML: {error}") from error


def _names_a_sweep(overrides: list[str]) -> bool:
    """Whether an override may hold several values: Hydra then composes, and complains, itself."""
    return any(set(item.partition("=")[2]) & set(",()[]{}*") for item in overrides)


def _asked_for_only(create_map: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """`create_map` for a defaults list that holds an interpolation; an empty map for any other."""

    def choices(overrides: Any, entries: list[Any], self_added: bool) -> DictConfig:
        if any(entry.is_interpolation() for entry in entries if not entry.is_self()):
            return create_map(overrides, entries, self_added)
        return OmegaConf.create({})

    return choices


def quicken() -> None:
    """Let this process's Hydra use `SingleComposition` and libyaml; done once."""
    if getattr(hydra_core, "ConfigLoaderImpl", None) is SingleComposition:
        return
    if hasattr(defaults_list, "_create_interpolation_map"):
        defaults_list._create_interpolation_map = _asked_for_only(defaults_list._create_interpolation_map)
    if hasattr(hydra_core, "ConfigLoaderImpl"):
        hydra_core.ConfigLoaderImpl = SingleComposition
    if not yaml.__with_libyaml__ or not hasattr(_utils, "get_yaml_loader"):
        return
    with _c_classes():
        loader = _utils.get_yaml_loader()
    _utils.get_yaml_loader = lambda: loader
    if hasattr(omegaconf, "get_omega_conf_dumper"):
        plain = _utils.get_omega_conf_dumper()
        dumper = type("Dumper", (yaml.CDumper,), {})
        dumper.add_representer(str, plain.str_representer)  # type: ignore[attr-defined]
        omegaconf.get_omega_conf_dumper = lambda: dumper


@contextlib.contextmanager
def _c_classes() -> Iterator[None]:
    """While OmegaConf derives its loader from `yaml.SafeLoader`, let that be libyaml's."""
    plain = yaml.SafeLoader
    yaml.SafeLoader = yaml.CSafeLoader
    try:
        yield
    finally:
        yaml.SafeLoader = plain
