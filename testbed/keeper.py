"""Keeps the servers of a fleet running while it is served: one that ends is started again, so many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ersim.errors import ErsimError
from testbed.expert_server import ExpertFailed, ExpertServer


class Kept:
    """One server under watch. restarts: how often it may be started again."""

    def __init__(self, server: ExpertServer, restarts: int, say: Callable[[str], None]) -> None:
        self.server = server
        self.restarted = 0
        self.given_up: ErsimError | None = None
        self._restarts = restarts
        self._say = say
        self._starting = False

    def look(self) -> None:
        """Start it again if it has ended, or was not ready in its time; say what happens."""
        if self.given_up is not None:
            return
        try:
            if not self._starting:
                self.server.check_alive()
            elif self.server.check_ready():
                self._starting = False
                self._say(f"expert {self.server.spec.name} answers again on {self.server.spec.url}")
        except ExpertFailed as error:
            self._say(str(error))
            self._start_again(error)

    def _start_again(self, why: ErsimError) -> None:
        name = self.server.spec.name
        self.server.stop()
        if self.restarted == self._restarts:
            self.given_up = why
            self._say(f"expert {name} is not started again after {self.restarted} restarts (restarts)")
            return
        self.restarted += 1
        self._say(f"starting expert {name} again ({self.restarted} of {self._restarts})")
        try:
            self.server.start()
            self._starting = True
        except ErsimError as error:  # its port was taken meanwhile, or its model's folder is gone
            self.given_up = error
            self._say(f"expert {name} cannot be started again: {error}")


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
            raise ExpertFailed("no expert is left to answer") from reasons[-1]

    @property
    def restarted(self) -> dict[str, int]:
        """How often each server was started again, by name."""
        return {one.server.spec.name: one.restarted for one in self.kept}
