"""Errors that a user can act on: every message names the key, the value and the remedy."""

from __future__ import annotations


class ErsimError(Exception):
    """Base of all errors that ersim raises on purpose; its text is fit for the user."""


class ConfigError(ErsimError, ValueError):
    """A configuration value, file or combination that cannot be used."""


class DataError(ErsimError, ValueError):
    """An input file (trace, prompt set, calibration, recorded run) that is not what it claims to be."""


class DoesNotFitError(ConfigError):
    """A model that does not fit the GPU memory it was given."""


class SimulationError(ErsimError, RuntimeError):
    """A simulation that could not go on; what finished before is kept by the caller."""


def bad_value(key: str, must: str, got: object, source: str | None = None) -> ConfigError:
    """Build the house's error: ``expert.kv_blocks must be >= 1, got 0 (conf/expert/llama3_8b.yaml)``."""
    where = f" ({source})" if source else ""
    return ConfigError(f"{key} must be {must}, got {got!r}{where}")


def unknown_choice(key: str, got: object, choices: object) -> ConfigError:
    """Build the error for a name that is not in a registry; it lists the names that are."""
    listed = ", ".join(sorted(str(choice) for choice in choices))  # type: ignore[attr-defined]
    return ConfigError(f"{key} must be one of: {listed}; got {got!r}")
