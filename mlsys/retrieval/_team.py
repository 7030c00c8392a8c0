"""Threads that wait for work, for parallel parts that are shorter than the start of a thread.

A graph of ten thousand nodes is linked in hundreds of batches, of a millisecond or so. To hand such a batch to a
`ThreadPoolExecutor` and to wait for it costs more than with a queue alone, for futures take locks.

See also:
    `hnsw_numba` (who has them).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

Task = tuple[Callable[[int], None], int, SimpleQueue[BaseException | None]]


class Team:
    """The thread that enters it as a context, and n − 1 others, which end with it, however it ends."""

    def __init__(self, n: int) -> None:
        self._tasks = SimpleQueue[Task | None]()
        self._threads = [Thread(target=_work, args=(self._tasks,), daemon=True) for _ in range(n - 1)]
        self.ended = False
        # One None ends them all. If Ctrl-C comes before `__exit__` has put it there, it is put when this is dropped.
        weakref.finalize(self, self._tasks.put, None)

    def spread(self, work: Callable[[int], None], parts: int) -> None:
        """work(0) here, work(1) … work(parts − 1) in the others, parts ≤ n; wait for all. Raises what one does."""
        if self.ended or parts > len(self._threads) + 1:
            raise RuntimeError(f"a team of {len(self._threads) + 1}, ended: {self.ended}, cannot do {parts} parts")
        ended = SimpleQueue[BaseException | None]()
        for part in range(1, parts):
            self._tasks.put((work, part, ended))
        try:
            work(0)
        finally:
            raised = [ended.get() for _ in range(1, parts)]
        for error in raised:
            if error is not None:
                raise error

    def __enter__(self) -> Self:
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._tasks.put(None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tasks.put(None)
        self.ended = True
        for thread in self._threads:
            thread.join()


def _work(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        work, part, ended = task
        try:
            work(part)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)
        del task, work, ended  # nothing is held while it waits
    tasks.put(None)  # for the others
