"""Independent pieces of work shared among forked processes, with the results in their order."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


def spread(work: Callable[[int], T], numbers: Sequence[int], workers: int) -> Iterator[T]:
    """`work(number)` for each of `numbers`, in order, on up to `workers` processes.

    This process takes the first number and every `workers`-th after it; the others are forked, see
    all that is loaded here, and send their results back pickled. What a helper cannot deliver (it
    died, or raised) is worked out here, where it raises what it raises without helpers. Without
    fork (not on Linux) everything is done here.
    """
    count = min(workers, len(numbers)) if sys.platform == "linux" else 1
    if count <= 1:
        yield from map(work, numbers)
        return
    with contextlib.ExitStack() as ends:
        shares = [numbers[offset::count] for offset in range(1, count)]
        pipes = [ends.enter_context(_helper(work, share)) for share in shares]
        for index, number in enumerate(numbers):
            sent = _receive(pipes[index % count - 1]) if index % count else None
            yield work(number) if sent is None else sent[0]


@contextlib.contextmanager
def _helper(work: Callable[[int], Any], share: Sequence[int]) -> Iterator[Connection]:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, share, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine
    finally:
        process.terminate()
        process.join()
        mine.close()


def _serve(work: Callable[[int], Any], share: Sequence[int], pipe: Connection) -> None:
    """Send each result as a 1-tuple; stop at the first error, which is the parent's to raise."""
    with contextlib.suppress(Exception):
        for number in share:
            pipe.send((work(number),))


def _receive(pipe: Connection) -> tuple[Any] | None:
    """The helper's next result as a 1-tuple; None when it has ended without one."""
    try:
        received: tuple[Any] = pipe.recv()
    except (EOFError, OSError):
        return None
    return received
