"""A progress bar on standard error: what runs now, how much is done, how long is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

WIDE = 80  # columns of a terminal that has room for a bar


class Progress:
    """Progress over jobs of known weight; a bar on a terminal, one line per job elsewhere."""

    def __init__(self, weights: dict[int, float]) -> None:
        self._weights = weights
        self._total = sum(weights.values()) or 1.0
        self._done_weight = 0.0
        self._done = 0
        self._running: dict[int, str] = {}
        self._began_s = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = self._make_bar()
            self._task = self._bar.add_task("starting", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @staticmethod
    def _make_bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        console = Console(stderr=True)
        rest = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = [BarColumn(30)] if console.width >= WIDE else []
        return Bar(*bar, rest, console=console, transient=True)

    def started(self, job: int, label: str) -> None:
        """Say that `job` runs now."""
        self._running[job] = label
        if self._bar is not None:
            self._show()

    def ended(self, job: int, failed: bool) -> None:
        """Say that `job` has ended."""
        label = self._running.pop(job)
        self._done += 1
        self._done_weight += self._weights[job]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done_weight)
            self._show()
        else:
            state = "FAILED" if failed else "done"
            print(f"[{self._done}/{len(self._weights)}] {label}: {state}, {self._left()}", file=sys.stderr)

    def _left(self) -> str:
        """Time left, from the smaller share done by weight or by number: a few users cost a job as much
        as many do, so heavy jobs that come first say too little about the light ones."""
        share = min(self._done_weight / self._total, self._done / len(self._weights))
        if share == 0:
            return "time left not known yet"
        elapsed = time.perf_counter() - self._began_s
        return f"about {elapsed * (1 / share - 1):.0f} s left"

    def _show(self) -> None:
        """What matters most comes first: a narrow terminal cuts the end of the line."""
        share, count = self._done_weight / self._total, f"{self._done}/{len(self._weights)}"
        running = " | ".join(self._running.values())
        self._bar.update(self._task, description=f"{share:4.0%} {count}, {self._left()}  {running}".rstrip())


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Show `what` on a terminal's standard error while it is done."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
