"""What an implementation of attention holds: measured at the operations, not guessed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlsys.contracts.core import Mismatch


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations have made since the mode began and that are still alive.

    Storages are counted, not tensors: a view holds nothing of its own, an expanded one looks larger than
    it is. What is only read (inputs, a workspace made before) does not count. NumPy's memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.kept = 0  # for the backward pass, the output included
        self.largest: tuple[int, tuple[int, ...]] = (0, ())  # elements that fit its storage, shape
        self._alive: dict[int, tuple[int, Any]] = {}  # id of a storage → its bytes, the reference that tells its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x.untyped_storage() for x in _tensors((args, kwargs))]
        outside = {id(storage) for storage in given if id(storage) not in self._alive}
        for storage in given:
            if id(storage) in self._alive:  # an `out=` may have been resized
                self._count(storage)
        for x in _tensors(result):
            storage = x.untyped_storage()
            if id(storage) not in outside:
                self._count(storage)
                self.largest = max(self.largest, (storage.nbytes() // x.element_size(), tuple(x.shape)))
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        before, reference = self._alive.get(key, (0, None))
        self._alive[key] = size, reference or weakref.ref(storage, lambda _: self._end(key))
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _end(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]

    def refuse_scores(self, t: int, s: int, remedy: str) -> None:
        """Mismatch if an operation made a tensor as large as t × s scores."""
        elements, shape = self.largest
        if elements >= t * s:
            raise Mismatch(
                f"an operation made a tensor of shape {shape}, as many elements as the t × s scores "
                f"(t = {t}, s = {s}): {remedy}"
            )


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == strided]
