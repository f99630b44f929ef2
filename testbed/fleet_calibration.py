"""What a profiled fleet knows beyond its experts' calibrations: contention, gateway, front ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ersim.config import FleetConfig, GatewayConfig
from ersim.errors import DataError
from ersim.prepare import Preparations
from ersim.util.files import write_json
from testbed.contention import Contention
from testbed.step_scatter import StepScatter
from testbed.stored_json import FileKind, StoredJson

FORMAT = "ersim-fleet-calibration"
VERSION = 9
FILE = "fleet.json"
KIND = FileKind(
    "a fleet calibration", FORMAT, VERSION, "profile the fleet again", "make it with ersim-profile fleet=..."
)
GATEWAY = ("network_s", "base_s", "routing_s", "backend_network_s")  # what the simulator's gateway takes


@dataclass(frozen=True)
class FleetCalibration:
    """Measured on one fleet under common load, through the gateway.

    calibrations: file name by expert, relative to this file. contention: by expert, what its
    neighbours cost it (see `contention`). gateway: network_s, base_s, backend_network_s and
    routing_s, medians in seconds, and the ways they were made of. waits: by recorded request, how many were
    under way and what it waited beyond the medians (see `waits`). users: the loads that were used and must
    not be used to validate. vllm_version: of the servers. digests: by expert, of the calibration that all
    of this is relative to (`Calibration.digest`).
    """

    fleet: str
    calibrations: Mapping[str, str]
    contention: Mapping[str, Contention]
    gateway: Mapping[str, float]
    users: list[int] = field(default_factory=list)
    vllm_version: str = ""
    waits: Sequence[Sequence[float]] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

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
    """Read and check fleet.json. Raises DataError naming file, key, value and remedy."""
    file = StoredJson(KIND, folder / FILE)
    data = file.read()
    file.only(data, [item.name for item in dataclasses.fields(FleetCalibration)])
    for name in ("fleet", "vllm_version"):
        if not isinstance(data[name], str):
            raise file.bad(name, "a string", data[name])
    for name in ("calibrations", "digests"):
        file.texts(name, data[name])
    for name in data["calibrations"]:
        if name not in data["digests"]:
            raise file.bad(f"digests.{name}", "the digest of that expert's calibration", None)
    _check_common_load(file, data)
    contention = file.mapping("contention", data["contention"])
    data["contention"] = {name: _contention(file, name, item) for name, item in contention.items()}
    return FleetCalibration(**data)


def _check_common_load(file: StoredJson, data: Mapping[str, Any]) -> None:
    """What was measured at the gateway, and at which loads."""
    gateway = file.mapping("gateway", data["gateway"])
    for name in dict.fromkeys((*GATEWAY, *gateway)):
        file.number(f"gateway.{name}", gateway.get(name), 0.0 if name in GATEWAY else None)
    for name in ("users", "waits"):
        if not isinstance(data[name], list):
            raise file.bad(name, "a list", data[name])
    for index, users in enumerate(data["users"]):
        file.integer(f"users[{index}]", users, 1)
    for index, row in enumerate(data["waits"]):
        file.numbers(f"waits[{index}]", row, length=4)


def _contention(file: StoredJson, name: str, item: Any) -> Contention:
    key = f"contention.{name}"
    data = file.mapping(key, item)
    file.only(data, [one.name for one in dataclasses.fields(Contention)], key)
    slowdowns = file.mapping(f"{key}.slowdowns", data["slowdowns"])
    for other, value in slowdowns.items():
        file.number(f"{key}.slowdowns.{other}", value, 0.0)
    file.number(f"{key}.base", data["base"], above=0.0)
    for traffic in ("token_wait_s", "hand_out_tokens"):
        file.number(f"{key}.{traffic}", data[traffic], 0.0)
    file.numbers(f"{key}.rounds", data["rounds"], 0.0)
    if not isinstance(data["refits"], list):
        raise file.bad(f"{key}.refits", "a list", data["refits"])
    for index, refit in enumerate(data["refits"]):
        file.numbers(f"{key}.refits[{index}]", refit, 0.0, 2 + len(slowdowns))
    scatter = file.mapping(f"{key}.scatter", data["scatter"])
    kinds = [one.name for one in dataclasses.fields(StepScatter)]
    file.only(scatter, kinds, f"{key}.scatter")
    for kind in kinds:
        file.numbers(f"{key}.scatter.{kind}", scatter[kind], 0.0)
    return Contention(**{**data, "scatter": StepScatter(**scatter)})


def with_calibrations(fleet: FleetConfig, known: FleetCalibration, folder: Path) -> FleetConfig:
    """The fleet with every expert's calibration set to its measured file."""
    experts = {}
    for name, expert in fleet.experts.items():
        if name not in known.calibrations:
            raise DataError(f"{folder / FILE}: no calibration of expert {name}; profile this fleet")
        path = str((folder / known.calibrations[name]).resolve())
        experts[name] = dataclasses.replace(expert, calibration=path)
    return dataclasses.replace(fleet, experts=experts)


def calibration_digests(fleet: FleetConfig, shared: Preparations) -> dict[str, str]:
    """By expert, the digest of the calibration file that its config names, as it was read.

    Raises DataError when there is none.
    """
    digests = {}
    for name, expert in fleet.experts.items():
        if not Path(expert.calibration).is_file():
            raise DataError(f"{expert.calibration}: no calibration of expert {name} there; {KIND.remedy}")
        digests[name] = shared.expert(expert, f"fleet.experts.{name}").calibration.digest
    return digests


def check_digests(known: FleetCalibration, digests: Mapping[str, str], folder: Path) -> None:
    """Raise DataError when a calibration is not the one that fleet.json was made with.

    digests: of the files beside it (`calibration_digests`), one of which may have been exchanged since.
    """
    for name, digest in digests.items():
        was = known.digests.get(name)
        if was != digest:
            raise DataError(
                f"{folder / known.calibrations.get(name, name)}: calibration of expert {name} "
                f"({digest[:12]}) is not the one that {folder / FILE} was made with "
                f"({(was or 'none')[:12]}); {KIND.remedy}"
            )
