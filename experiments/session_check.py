"""What a profile and the validation after it would refuse, found before the first of them runs."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ersim.errors import ConfigError, ErsimError, bad_value
from experiments.check import without_hydra
from experiments.expert_hints import config_dirs
from experiments.group_values import check_groups
from experiments.live_schema import LiveConfig, list_overrides, register, to_live
from experiments.paths import conf_dir
from testbed.plan import check_common_load, check_plan
from testbed.profile_fit import check_kv_cache

FOLDER_OPTIONS = ("--config-dir", "-cd")


def check_first(profile: Sequence[str], validation: Sequence[str]) -> None:
    """Raise ConfigError or DataError for arguments that either command would refuse, or both together.

    With an option of Hydra's own (--help, --cfg) neither measures, and nothing is checked.
    """
    register()
    first, second = (_overrides(arguments) for arguments in (profile, validation))
    if first is None or second is None:
        return
    job = _composed("live/profile", first)
    assert job.fleet is not None  # to_live has checked it
    for name, expert in job.fleet.experts.items():
        check_plan(job.plan, expert.engine.max_model_len)
        check_kv_cache(expert, f"fleet.experts.{name}")
    check_common_load(job.plan)
    used = sorted({*_composed("live/validate", second).users} & {*job.plan.mixed_users})
    if used:
        must = f"loads that do not calibrate (plan.mixed_users={list(job.plan.mixed_users)})"
        raise bad_value("users", must, used)


def _overrides(arguments: Sequence[str]) -> list[str] | None:
    """What `compose` takes of a command line; None with options that it has no word for."""
    given = list(arguments)
    folders = config_dirs(given)
    plain = [
        argument
        for argument, before in zip(given, ["", *given], strict=False)
        if argument.partition("=")[0] not in FOLDER_OPTIONS and before not in FOLDER_OPTIONS
    ]
    if any(argument.startswith("-") for argument in plain):
        return None
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []
    return [*list_overrides(plain), *search]


def _composed(name: str, overrides: list[str]) -> LiveConfig:
    """The checked job that a command would do."""
    check_groups(overrides, conf_dir(), name)
    settings = HydraConfig.instance()
    before = settings.cfg
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose(name, overrides=overrides, return_hydra_config=True)
        settings.set_config(config)
        return to_live(without_hydra(config))
    except ErsimError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    finally:
        settings.cfg = before


def _one_line(error: Exception) -> str:
    """What Hydra says, without where it searched, and what OmegaConf had told it."""
    texts = [str(error).partition("Config search path")[0], str(error.__cause__ or "").partition("\n")[0]]
    return ": ".join(" ".join(text.split()) for text in texts if text.strip())
