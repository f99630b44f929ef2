"""A fleet of real experts: every replica of every expert of one fleet config, started together."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ersim.config import ExpertConfig, FleetConfig
from ersim.errors import bad_value
from ersim.steptime import load_model
from ersim.steptime.specs import check_tensor_parallel
from testbed.expert_server import ExpertServer, ServerSpec, free_port
from testbed.live_settings import LiveSettings, of_replica, read_live
from testbed.weightless import write_model


def replica_name(expert: str, replica: int, replicas: int) -> str:
    """`expert`, or `expert-<replica>` when there are several."""
    return expert if replicas == 1 else f"{expert}-{replica}"


def model_folder(expert: ExpertConfig, live: LiveSettings, name: str, folder: Path) -> str:
    """The model that the server loads; writes the weightless folder when no model is given."""
    if live.model is not None:
        return live.model
    assert live.quantization is not None  # read_live has filled it in
    written = write_model(
        folder / "models" / name,
        load_model(expert.model),
        live.quantization,
        expert.engine.max_model_len,
        live.tokenizer == "word",
    )
    return str(written)


def server_specs(fleet: FleetConfig, folder: Path) -> dict[str, list[ServerSpec]]:
    """One spec per replica, by expert. Raises ConfigError for a `live` mapping that cannot work."""
    specs: dict[str, list[ServerSpec]] = {}
    lives = {
        name: read_live(one.live, one.precision, f"fleet.experts.{name}", one.gpu, one.replicas)
        for name, one in fleet.experts.items()
    }
    ports = _ports(fleet, lives)
    for name, expert in fleet.experts.items():
        key, live = f"fleet.experts.{name}", lives[name]
        if live.weightless:
            check_tensor_parallel(load_model(expert.model), expert.tp, key)
        model = model_folder(expert, live, name, folder)
        specs[name] = [
            ServerSpec(
                name=replica_name(name, replica, expert.replicas),
                expert=name,
                model=model,
                port=ports[name][replica],
                tp=expert.tp,
                engine=expert.engine,
                live=live,
                folder=folder,
                cores=of_replica(live.cores, replica),
                gpus=of_replica(live.gpus, replica),
            )
            for replica in range(expert.replicas)
        ]
    check_cores([spec for group in specs.values() for spec in group])
    check_gpus([spec for group in specs.values() for spec in group])
    return specs


def _ports(fleet: FleetConfig, lives: Mapping[str, LiveSettings]) -> dict[str, list[int]]:
    """One for each replica, by expert: those that were given, and free ones apart from them."""
    given = {
        name: [lives[name].port + replica for replica in range(one.replicas)]
        for name, one in fleet.experts.items()
        if lives[name].port
    }
    taken = [port for ports in given.values() for port in ports]
    for port in taken:
        if taken.count(port) > 1:
            raise bad_value("fleet.experts.*.live.port", "different for every replica", port)
    ports = {}
    for name, expert in fleet.experts.items():
        ports[name] = given.get(name, [])
        while len(ports[name]) < expert.replicas:
            taken.append(free_port(taken))
            ports[name].append(taken[-1])
    return ports


def check_cores(specs: Sequence[ServerSpec]) -> None:
    """Raise ConfigError for servers whose cores their tensor-parallel ranks cannot share evenly."""
    for spec in specs:
        if spec.live.device == "cpu" and len(spec.cores) % spec.tp:
            shares = f"as many for each of the {spec.tp} ranks of a replica (tp={spec.tp})"
            raise bad_value(f"{spec.key}.live.cores", shares, spec.cores)


def shared_cores(specs: Sequence[ServerSpec]) -> list[str]:
    """One line for every core that several servers are bound to: they compute in turns there."""
    users: dict[int, list[str]] = {}
    for spec in specs:
        for core in set(spec.cores) if spec.live.device == "cpu" else ():
            users.setdefault(core, []).append(spec.name)
    shared = [(core, names) for core, names in sorted(users.items()) if len(names) > 1]
    return [f"{', '.join(names)} share core {core}" for core, names in shared]


def check_servers(fleet: FleetConfig) -> None:
    """Raise ConfigError for servers that cannot start here, as far as can be seen; writes nothing."""
    with tempfile.TemporaryDirectory() as folder:  # but the folders of weightless models, here
        for server in LiveFleet(fleet, Path(folder)).all_servers:
            server.check()


def check_gpus(specs: Sequence[ServerSpec]) -> None:
    """Raise ConfigError for servers that share a machine without saying their GPUs, or not as many as TP."""
    on_gpu = [spec for spec in specs if spec.live.device == "gpu"]
    for spec in on_gpu:
        key = f"{spec.key}.live.gpus"
        if not spec.gpus and len(on_gpu) > 1:
            raise bad_value(key, f"given when {len(on_gpu)} servers share the machine", spec.gpus)
        if spec.gpus and len(spec.gpus) != spec.tp:
            raise bad_value(key, f"{spec.tp} of them for each replica (tp={spec.tp})", spec.gpus)


class LiveFleet:
    """Context manager: all servers are ready inside, and gone afterwards, whatever happened.

    SIGTERM inside the context is turned into KeyboardInterrupt so that the servers are stopped too;
    should this process be killed outright, the servers' supervisors notice and stop them.
    """

    def __init__(self, fleet: FleetConfig, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.fleet = fleet
        self.servers = {
            name: [ExpertServer(spec) for spec in group]
            for name, group in server_specs(fleet, folder).items()
        }
        self._say = say or (lambda text: None)
        self._old_handler: Any = None
        for line in shared_cores([server.spec for server in self.all_servers]):
            self._say(line)

    @property
    def all_servers(self) -> list[ExpertServer]:
        """Every replica of every expert, in the fleet's order."""
        return [server for group in self.servers.values() for server in group]

    @property
    def gpus(self) -> list[int] | None:
        """GPUs that its servers are bound to; [] if one takes what is there, None if none runs on a GPU."""
        bound = [server.spec.gpus for server in self.all_servers if server.spec.live.device == "gpu"]
        if not bound:
            return None
        return sorted({index for gpus in bound for index in gpus}) if all(bound) else []

    def urls(self) -> dict[str, list[str]]:
        """Base URLs of the replicas by expert."""
        return {name: [server.spec.url for server in group] for name, group in self.servers.items()}

    def __enter__(self) -> LiveFleet:
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        begin = time.monotonic()
        for server in self.all_servers:
            self._say(f"starting expert {server.spec.name} on {server.spec.url}")
            server.start()
        for server in self.all_servers:
            server.wait_ready()
        self._say(f"{len(self.all_servers)} experts ready after {time.monotonic() - begin:.0f} s")

    def check_alive(self) -> None:
        """Raise ExpertFailed if any server has ended."""
        for server in self.all_servers:
            server.check_alive()

    def stop(self) -> None:
        """Stop all servers, several at a time."""
        threads = [threading.Thread(target=server.stop) for server in self.all_servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
            self._old_handler = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")
