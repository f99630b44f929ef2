"""ersim predicts what a fleet of routed LLM experts will do before anyone rents the GPUs.

>>> import ersim
>>> result = ersim.simulate(config)          # ersim.config.SimulationConfig
>>> result.summary["output_throughput"]      # tokens per second, with _low and _high beside it
>>> result.requests                          # one row per request, a pandas DataFrame
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ersim.compiled import use_binaries

if TYPE_CHECKING:
    from ersim.prepare import Preparations
    from ersim.simulation import Result, simulate

__all__ = ["Preparations", "Result", "simulate"]
__version__ = "0.1.0"

_HOMES = {"simulate": "ersim.simulation", "Result": "ersim.simulation", "Preparations": "ersim.prepare"}


use_binaries()


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `import ersim.errors` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ersim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
