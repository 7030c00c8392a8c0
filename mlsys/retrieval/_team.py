"""Threads that wait for work, for parallel parts that are shorter than the start of a thread.

A graph of ten thousand nodes is linked in hundreds of batches, of a millisecond or so. To hand such a batch to a
`ThreadPoolExecutor` and to wait for it costs twice what it costs with a queue alone: futures take locks.

See also:
    `hnsw_numba` (who has them).
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

Task = tuple[Callable[[int], None], int, SimpleQueue[BaseException | None]]


class Team:
    """The calling thread and n − 1 others. A context manager: at its end the others have ended."""

    def __init__(self, n: int) -> None:
        self._asked: list[SimpleQueue[Task | None]] = [SimpleQueue() for _ in range(n - 1)]
        self._threads = [Thread(target=_work, args=(asked,), daemon=True) for asked in self._asked]
        for thread in self._threads:
            thread.start()

    def spread(self, work: Callable[[int], None], parts: int) -> None:
        """work(0) here, work(1) … work(parts − 1) in the others, parts ≤ n; wait for all. Raises what one does."""
        ended = SimpleQueue[BaseException | None]()
        asked = self._asked[: parts - 1]
        for part, queue in enumerate(asked, 1):
            queue.put((work, part, ended))
        try:
            work(0)
        finally:
            raised = [ended.get() for _ in asked]
        for error in raised:
            if error is not None:
                raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for queue in self._asked:
            queue.put(None)
        for thread in self._threads:
            thread.join()


def _work(asked: SimpleQueue[Task | None]) -> None:
    while (task := asked.get()) is not None:
        work, part, ended = task
        try:
            work(part)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)
        del task, work, ended  # nothing is held while it waits
