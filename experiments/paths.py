"""Where the project keeps its configuration and its tracking store."""

from __future__ import annotations

import os
from pathlib import Path

from ersim.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
MLFLOW = ROOT / "mlflow"


def conf_dir() -> Path:
    """The `conf/` folder. Raises ConfigError when ersim was installed without its checkout."""
    if not (CONF / "config.yaml").is_file():
        raise ConfigError(
            f"conf/config.yaml is not at {CONF}: ersim reads its configuration from the project's checkout; "
            "install it from there with `make venv` or `pip install -e .`"
        )
    return CONF


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI if set, else the sqlite store under `mlflow/`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{MLFLOW / 'ersim.db'}"


def cache_dir() -> Path | None:
    """Where fitted routers are kept between commands: ERSIM_CACHE, else the user's cache folder.

    ERSIM_CACHE= (empty) keeps nothing.
    """
    named = os.environ.get("ERSIM_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ersim"
    except RuntimeError:  # no home
        return None
