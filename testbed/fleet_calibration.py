"""What a profiled fleet knows beyond its experts' calibrations: contention, gateway, front ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ersim.config import FleetConfig, GatewayConfig
from ersim.errors import DataError
from ersim.util.files import write_json
from testbed.contention import Contention
from testbed.step_scatter import StepScatter

FORMAT = "ersim-fleet-calibration"
VERSION = 6
FILE = "fleet.json"


@dataclass(frozen=True)
class FleetCalibration:
    """Measured on one fleet under common load, through the gateway.

    calibrations: file name by expert, relative to this file. contention: by expert, what its
    neighbours cost it (see `contention`). gateway: network_s, base_s, backend_network_s and
    routing_s, medians in seconds, and the ways they were made of. waits: by recorded request, how many were
    under way and what it waited beyond the medians (see `waits`). users: the loads that were used and must
    not be used to validate. vllm_version: of the servers.
    """

    fleet: str
    calibrations: Mapping[str, str]
    contention: Mapping[str, Contention]
    gateway: Mapping[str, float]
    users: list[int] = field(default_factory=list)
    vllm_version: str = ""
    waits: Sequence[Sequence[float]] = ()

    def gateway_config(self, template: GatewayConfig) -> GatewayConfig:
        """The simulator's gateway as it was measured: one worker, the event loop."""
        return dataclasses.replace(
            template,
            workers=1,
            network_s=self.gateway["network_s"],
            base_s=self.gateway["base_s"],
            routing_s=self.gateway["routing_s"],
            routing_per_char_s=0.0,
            backend_network_s=self.gateway["backend_network_s"],
        )


def save(calibration: FleetCalibration, folder: Path) -> Path:
    """Write fleet.json beside the experts' calibrations."""
    path = folder / FILE
    write_json(path, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(calibration)})
    return path


def load(folder: Path) -> FleetCalibration:
    """Read fleet.json. Raises DataError naming what is missing and how to make it."""
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); make it with ersim-profile fleet=...") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not a whole JSON document ({error.msg}); profile the fleet again"
        ) from error
    if data.pop("format", None) != FORMAT or data.pop("version", None) != VERSION:
        raise DataError(f"{path}: not a fleet calibration of version {VERSION}; profile the fleet again")
    try:
        data["contention"] = {name: _contention(item) for name, item in data["contention"].items()}
        return FleetCalibration(**data)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: {error}; profile the fleet again") from error


def _contention(item: dict[str, Any]) -> Contention:
    return Contention(**{**item, "scatter": StepScatter(**item["scatter"])})


def with_calibrations(fleet: FleetConfig, known: FleetCalibration, folder: Path) -> FleetConfig:
    """The fleet with every expert's calibration set to its measured file."""
    experts = {}
    for name, expert in fleet.experts.items():
        if name not in known.calibrations:
            raise DataError(f"{folder / FILE}: no calibration of expert {name}; profile this fleet")
        path = str((folder / known.calibrations[name]).resolve())
        experts[name] = dataclasses.replace(expert, calibration=path)
    return dataclasses.replace(fleet, experts=experts)
