"""The `ersim-serve` command: a fleet's real experts behind the real gateway, until it is told to stop."""

# ruff: noqa: E402 (threads are limited before anything imports numpy)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ersim.config import FleetConfig, SimulationConfig
from ersim.errors import bad_value
from ersim.prepare import Preparations
from ersim.routing import Policy
from ersim.types import ExpertState
from ersim.util.files import to_json
from ersim.workload import load_prompt_set
from experiments.live_check import fit_unpriced
from experiments.live_schema import (
    ServeConfig,
    home,
    one_line_errors,
    run_task,
    say,
    simulation,
    to_live,
)
from testbed.expert_server import port_is_free
from testbed.fleet import LiveFleet, check_servers
from testbed.fleet_calibration import FILE, calibration_digests, check_digests, with_calibrations
from testbed.fleet_calibration import load as load_fleet
from testbed.gateway.process import GatewayProcess
from testbed.gateway.settings import LOOPBACK, ExpertEndpoint, GatewaySettings, check
from testbed.keeper import Keeper

POLL_S = 0.5


def serve(job: ServeConfig) -> dict[str, Any]:
    """Start servers and gateway, keep them running, stop them on Ctrl-C or SIGTERM; returns what happened.

    Raises ConfigError before anything starts for what cannot work, KeyboardInterrupt when it is stopped
    before the gateway listens, ExpertFailed when no expert is left, GatewayFailed when the gateway has ended.
    """
    assert job.fleet is not None  # to_live has checked it
    check_serving(job)
    fleet = unrecorded(job.fleet)
    check_servers(fleet)
    folder = home(job) / "serve"
    live = LiveFleet(fleet, folder, say)
    check_port(job, [server.spec.port for server in live.all_servers])
    settings = serving_settings(job, fleet, live.urls(), folder)
    began_s, keeper = time.monotonic(), Keeper(live.all_servers, job.restarts, say)
    serving = False
    try:
        with live, GatewayProcess(settings, folder, wait_ready=False) as gateway:
            serving = True
            say(f"gateway on {gateway.url} (log: {gateway.log_path}); Ctrl-C stops it and the experts")
            while True:
                time.sleep(POLL_S)
                gateway.check_alive()
                keeper.look()
    except KeyboardInterrupt:
        if not serving:
            raise
        say("gateway and experts are stopped")
    return {
        "command": "ersim-serve",
        "fleet": fleet.name,
        "url": settings.url,
        "restarted": keeper.restarted,
        "seconds": round(time.monotonic() - began_s, 1),
    }


def check_serving(job: ServeConfig) -> None:
    """Raise ConfigError for what the gateway could not be told, under the names that this command has."""
    if job.restarts < 0:
        raise bad_value("restarts", ">= 0", job.restarts)
    if not 1 <= job.port <= 65535:
        raise bad_value("port", "from 1 to 65535", job.port)
    if job.host not in LOOPBACK and not job.api_keys:
        raise bad_value("host", f"one of {', '.join(LOOPBACK)} unless api_keys=[...] are given", job.host)
    if not port_is_free(0, job.host):
        raise bad_value("host", "an address of this machine", job.host)


def check_port(job: ServeConfig, taken: Sequence[int]) -> None:
    """Raise ConfigError unless nobody listens on the gateway's port, nor will one of the servers (taken)."""
    if job.port in taken:
        raise bad_value("port", f"none of the experts' ports ({', '.join(map(str, taken))})", job.port)
    if not port_is_free(job.port, job.host):
        raise bad_value("port", f"a free port of {job.host}", job.port)


def unrecorded(fleet: FleetConfig) -> FleetConfig:
    """The fleet without step logs, which grow as long as it serves, but where they are asked for."""
    experts = {
        name: dataclasses.replace(one, live={"record_steps": False, **one.live})
        for name, one in fleet.experts.items()
    }
    return dataclasses.replace(fleet, experts=experts)


def serving_settings(
    job: ServeConfig, fleet: FleetConfig, urls: dict[str, list[str]], folder: Path
) -> GatewaySettings:
    """The gateway's settings; the policy is fitted and saved into `folder`. Raises ConfigError for bad ones.

    With calibrations (a profile of this fleet, or those of its GPUs) the policy knows what tokens cost, and
    an expert is sent as many requests at once as its engine runs; else the gateway's own default holds.
    """
    config = simulation(job, fleet, 1)
    known = _with_profile(job, fleet)
    slots: dict[str, int] = {}
    if known is None:
        say(f"no profile in {home(job)}: the router knows no prices, the gateway no limits of engines")
        policy = _uncalibrated(config)
    else:
        policy, slots = _calibrated(config, known)
    endpoints = [
        ExpertEndpoint(name, urls[name], one.model, list(one.domains), slots.get(name, ExpertEndpoint.slots))
        for name, one in fleet.experts.items()
    ]
    queue_limit = GatewaySettings.queue_limit if job.gateway.queue_limit is None else job.gateway.queue_limit
    path = folder / "policy.bin"
    settings = GatewaySettings(
        experts=endpoints,
        policy_path=str(path),
        host=job.host,
        port=job.port,
        balancer=job.router.balancer,
        seed=job.seed,
        api_keys=list(job.api_keys),
        queue_limit=queue_limit,
    )
    check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(path)
    return settings


def _with_profile(job: ServeConfig, fleet: FleetConfig) -> FleetConfig | None:
    """The fleet with the calibrations of its last profile, or those known of its GPUs.

    None for experts on CPUs that were not profiled: nothing else tells how fast they are. Raises DataError
    for a damaged profile, or one of whose calibrations another was put in the place.
    """
    folder = home(job)
    if (folder / FILE).is_file():
        known = load_fleet(folder)
        calibrated = with_calibrations(fleet, known, folder)
        check_digests(known, calibration_digests(calibrated, Preparations()), folder)
        return calibrated
    unknown = any((one.gpu, one.calibration) == ("cpu", "auto") for one in fleet.experts.values())
    return None if unknown else fleet


def _calibrated(config: SimulationConfig, fleet: FleetConfig) -> tuple[Policy, dict[str, int]]:
    """The simulator's own policy, and how many requests each expert's replicas run at once."""
    shared = Preparations()
    config = dataclasses.replace(config, fleet=fleet)
    states = shared.expert_states(fleet)
    return shared.routing(config).policy, {state.name: state.slots for state in states}


def _uncalibrated(config: SimulationConfig) -> Policy:
    """The same policy, fitted without what a calibration tells."""
    experts, slots = config.fleet.experts.items(), ExpertEndpoint.slots
    states = [ExpertState(name, one.model, tuple(one.domains), (), slots) for name, one in experts]
    return fit_unpriced(config, states, load_prompt_set(config.workload.prompts).prompts)


@one_line_errors
def _task(config: DictConfig) -> None:
    job = to_live(config)
    assert isinstance(job, ServeConfig)  # conf/live/serve.yaml is one
    print(to_json(serve(job), indent=None))


def main() -> None:
    """Run the command line in sys.argv."""
    run_task(_task, "serve")


if __name__ == "__main__":
    main()
