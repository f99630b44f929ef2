"""What a profiled fleet knows beyond its experts' calibrations: contention, gateway, front ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ersim.config import FleetConfig, GatewayConfig
from ersim.errors import DataError
from ersim.util.files import write_json
from testbed.contention import Contention
from testbed.load import RequestRecord
from testbed.profiling import request_tag
from testbed.step_log import StepLog

FORMAT = "ersim-fleet-calibration"
VERSION = 2
FILE = "fleet.json"


@dataclass(frozen=True)
class FleetCalibration:
    """Measured on one fleet under common load, through the gateway.

    calibrations: file name by expert, relative to this file. contention: by expert, what its
    neighbours cost it (see `contention`). gateway: network_s, base_s, backend_network_s and
    routing_s, medians in seconds, and the ways they were made of. users: the loads that were used
    and must not be used to validate. vllm_version: of the servers.
    """

    fleet: str
    calibrations: Mapping[str, str]
    contention: Mapping[str, Contention]
    gateway: Mapping[str, float]
    users: list[int] = field(default_factory=list)
    vllm_version: str = ""

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


def measure_gateway(
    records: list[RequestRecord], access: Mapping[str, Mapping[str, Any]], logs: Mapping[str, StepLog]
) -> dict[str, float]:
    """Medians of where a request's time goes outside engine steps, from a run through the gateway.

    The simulator has one network time each way on either side of the gateway; a way out and a way
    back that differ are split evenly, which leaves their sum, and so every latency, right.
    """
    ways: dict[str, list[float]] = {name: [] for name in ("to", "base", "routing", "in", "out", "back")}
    added = {request_tag(r.request_id): r for log in logs.values() for r in log.requests.values()}
    engines = {
        name: (log.ends_s(), np.array([s.schedule_s for s in log.steps])) for name, log in logs.items()
    }
    for record in records:
        gate = access.get(record.tag)
        if (
            gate is None
            or record.first_s is None
            or gate["first_in_s"] is None
            or record.expert not in engines
        ):
            continue
        ends, starts = engines[record.expert]
        ways["to"].append(gate["received_s"] - record.send_s)
        ways["routing"].append(gate["routing_s"])
        inbound = gate["submitted_s"] - gate["received_s"] - gate["queued_s"]
        ways["base"].append(inbound - gate["routing_s"])
        ways["back"].append(record.first_s - gate["first_in_s"])
        step = int(np.searchsorted(ends, gate["first_in_s"])) - 1
        if step >= 0:
            ways["out"].append(gate["first_in_s"] - ends[step])
        request = added.get(record.tag)
        if request is not None:
            before = int(np.searchsorted(starts, request.added_s)) - 1
            if before < 0 or ends[before] < gate["submitted_s"]:
                ways["in"].append(request.added_s - gate["submitted_s"])
    median = {name: float(np.median(values)) if values else 0.0 for name, values in ways.items()}
    return {
        "network_s": (median["to"] + median["back"]) / 2,
        "base_s": max(0.0, median["base"]),
        "routing_s": median["routing"],
        "backend_network_s": (median["in"] + median["out"]) / 2,
        "to_gateway_s": median["to"],
        "from_gateway_s": median["back"],
        "to_engine_s": median["in"],
        "from_engine_s": median["out"],
    }


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
        data["contention"] = {name: Contention(**item) for name, item in data["contention"].items()}
        return FleetCalibration(**data)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: {error}; profile the fleet again") from error


def with_calibrations(fleet: FleetConfig, known: FleetCalibration, folder: Path) -> FleetConfig:
    """The fleet with every expert's calibration set to its measured file."""
    experts = {}
    for name, expert in fleet.experts.items():
        if name not in known.calibrations:
            raise DataError(f"{folder / FILE}: no calibration of expert {name}; profile this fleet")
        path = str((folder / known.calibrations[name]).resolve())
        experts[name] = dataclasses.replace(expert, calibration=path)
    return dataclasses.replace(fleet, experts=experts)
