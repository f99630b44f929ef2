"""Keeps the servers of a fleet running while it is served: one that ends is started again, so many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ersim.errors import ErsimError
from testbed.expert_server import ExpertFailed, ExpertServer

PAUSE_S = 5.0
"""Before a second restart, and as much more before each further one: a server that cannot start would use up
all its restarts in a moment, and a port may be held for one."""


class Kept:
    """One server under watch. restarts: how often it may be started again."""

    def __init__(self, server: ExpertServer, restarts: int, say: Callable[[str], None]) -> None:
        self.server = server
        self.restarted = 0
        self.given_up: str | None = None
        self._restarts = restarts
        self._say = say
        self._starting = False
        self._due_s: float | None = None  # of the next start, while it is down

    def look(self) -> None:
        """Start it again if it has ended, or was not ready in its time; say what happens."""
        if self.given_up is not None:
            return
        try:
            if self._due_s is not None:
                self._start_if_due()
            elif not self._starting:
                self.server.check_alive()
            elif self.server.check_ready():
                self._starting = False
                self._say(f"expert {self.server.spec.name} answers again on {self.server.spec.url}")
        except (ErsimError, OSError) as error:  # OSError: no process or file can be made at the moment
            self._down(str(error))

    def _start_if_due(self) -> None:
        if self._due_s is None or time.monotonic() < self._due_s:
            return
        self._due_s = None
        self._starting = True
        self.restarted += 1
        self._say(f"starting expert {self.server.spec.name} again ({self.restarted} of {self._restarts})")
        self.server.start()

    def _down(self, why: str) -> None:
        self._say(why)
        self.server.stop()
        self._starting = False
        if self.restarted < self._restarts:
            self._due_s = time.monotonic() + PAUSE_S * self.restarted
            return
        self.given_up = why
        name = self.server.spec.name
        self._say(f"expert {name} is not started again: {self.restarted} restarts are all (restarts)")


class Keeper:
    """All servers of a fleet under watch."""

    def __init__(
        self, servers: Iterable[ExpertServer], restarts: int, say: Callable[[str], None] | None = None
    ) -> None:
        self.kept = [Kept(server, restarts, say or (lambda text: None)) for server in servers]

    def look(self) -> None:
        """Look at every server once. Raises ExpertFailed when the last one was given up."""
        for one in self.kept:
            one.look()
        reasons = [one.given_up for one in self.kept if one.given_up is not None]
        if len(reasons) == len(self.kept):
            raise ExpertFailed(f"no expert is left: allow more (restarts) or mend the last: {reasons[-1]}")

    @property
    def restarted(self) -> dict[str, int]:
        """How often each server was started again, by name."""
        return {one.server.spec.name: one.restarted for one in self.kept}
