"""Run a command so that it cannot outlive whoever started it.

``python -m testbed.supervisor [--cores 0,1] -- command...`` starts the command in its own process group,
bound to these cores if any are given, and waits. When standard input reaches its end (the starter closed
it, crashed or was killed) or a termination signal arrives, the whole group gets SIGINT, then SIGTERM, then
SIGKILL. Should the supervisor itself be killed, Linux sends the command SIGTERM. A system that cannot bind
runs the command unbound. Exit status: the command's own; 2 for cores that are not of this machine, or an
unreadable command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection

PR_SET_PDEATHSIG = 1  # linux/prctl.h
USAGE = "usage: python -m testbed.supervisor [--cores 0,1] -- command [arguments]"
GRACE_S = {signal.SIGINT: 6.0, signal.SIGTERM: 4.0, signal.SIGKILL: 5.0}


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of a group; a group that is gone is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def group_alive(group: int) -> bool:
    """Whether any process of the group still exists."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Stop every process in the command's group, politely first."""
    for number, grace_s in GRACE_S.items():
        signal_group(process.pid, number)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader, which would otherwise keep the group alive
            if not group_alive(process.pid):
                return
            time.sleep(0.05)


def parent_death_signal() -> Callable[[], None] | None:
    """What a child does first so that Linux sends it SIGTERM when its parent is killed; None elsewhere."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died meanwhile, and Linux will not say so any more
            os._exit(1)

    return ask


def bound_to(cores: Collection[int]) -> Callable[[], None]:
    """What a child does first: bind itself, and with it all that it starts, and ask for the death signal."""
    ask = parent_death_signal()

    def prepare() -> None:
        if ask is not None:
            ask()
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


def supervise(command: list[str], cores: Collection[int] = ()) -> int:
    """Run the command until it ends or the starter does; returns its exit status."""
    wake_read, wake_write = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda got, _frame: os.write(wake_write, bytes([got])))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=bound_to(cores)
    )
    try:
        while process.poll() is None:
            ready, _, _ = select.select([0, wake_read], [], [], 1.0)
            if wake_read in ready and os.read(wake_read, 1)[0] != signal.SIGCHLD:
                break
            if 0 in ready and not os.read(0, 4096):
                break
    finally:
        end_group(process)
    return process.wait()


def read_arguments(arguments: list[str]) -> tuple[list[str], set[int]]:
    """The command and its cores. Raises ValueError, with what to print, for what cannot be run."""
    command, cores = arguments, set[int]()
    if command[:1] == ["--cores"]:
        try:
            cores, command = {int(core) for core in command[1].split(",")}, command[2:]
        except (IndexError, ValueError):
            raise ValueError(USAGE) from None
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise ValueError(USAGE)
    if not hasattr(os, "sched_setaffinity"):
        return command, set()
    here = os.sched_getaffinity(0)
    if not cores <= here:
        missing = sorted(cores - here)
        raise ValueError(f"supervisor: cores {missing} are not of this machine ({sorted(here)})")
    return command, cores


def main() -> int:
    """Entry point of ``python -m testbed.supervisor``."""
    try:
        command, cores = read_arguments(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    status = supervise(command, cores)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
