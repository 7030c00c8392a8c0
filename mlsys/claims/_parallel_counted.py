"""Published numbers about training on many devices, counted while this library's ranks run: bytes sent, bytes held."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mlsys.claims._parallel_memory import SEVEN_B, ZERO
from mlsys.claims._parallel_time import NCCL_TESTS, POWER_SGD, resnet18_shapes
from mlsys.claims.core import Claim

PATARASUK = "Patarasuk & Yuan 2009, JPDC 69(2), lower bound 2(N−1)/N of the vector for each node"

RANKS = 4


@cache
def on_ranks(count: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `count` finds in four processes, of each figure the largest of the four. It runs once."""
    from mlsys.parallel.launcher import launch

    found = launch(count, RANKS)
    return {name: max(one[name] for one in found) for name in found[0]}


def counted() -> dict[str, float]:
    """What the processes send and hold in data parallelism and ZeRO: bytes counted, not computed."""
    return on_ranks(_count)


def _count() -> dict[str, float]:
    """Runs in each rank."""
    return {**_count_all_reduce(), **_count_steps(), **_count_compressed()}


def _count_all_reduce() -> dict[str, float]:
    """Bytes sent over bytes of the vector."""
    import torch

    from mlsys.parallel.collectives import all_reduce
    from mlsys.parallel.traffic import ledger

    found = {}
    for algorithm in ("ring", "halving_doubling", "recursive_doubling"):
        vector = torch.ones(4096)
        with ledger() as book:
            all_reduce(vector, algorithm=algorithm, check=False)
        found[algorithm] = book.bytes["all_reduce"] / (vector.numel() * vector.element_size())
    return found


def _count_steps() -> dict[str, float]:
    """Of data parallelism and the ZeRO stages: bytes sent in a step, and bytes held, for each parameter.

    The model is in bfloat16, with masters and Adam's moments in float32. Held is counted at the end of backward, when
    there is most of it.
    """
    import torch
    from torch import nn

    from mlsys.parallel.data_parallel import DataParallel
    from mlsys.parallel.traffic import ledger
    from mlsys.parallel.zero import ZeRO1, ZeRO2
    from mlsys.parallel.zero3 import ZeRO3

    found = {}
    for name, wrap in {
        "DataParallel": lambda module: DataParallel(module.bfloat16()),
        "ZeRO1": lambda module: ZeRO1(module, dtype=torch.bfloat16),
        "ZeRO2": lambda module: ZeRO2(module, dtype=torch.bfloat16),
        "ZeRO3": lambda module: ZeRO3(module, dtype=torch.bfloat16, units=lambda part: isinstance(part, nn.Linear)),
    }.items():
        module = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
        numbers = sum(p.numel() for p in module.parameters())
        model: Any = wrap(module)
        zero = not isinstance(model, DataParallel)
        optimizer = model.optimizer(torch.optim.Adam) if zero else torch.optim.Adam(module.parameters())
        batch = torch.ones(2, 128, dtype=torch.bfloat16)
        for _ in range(2):  # in the first step there are no moments yet
            with ledger() as book:
                model(batch).sum().backward()
                if zero:
                    found[f"{name} holds"] = model.memory().total / numbers
                optimizer.step()
                optimizer.zero_grad()
        found[f"{name} sends"] = book.sent / numbers
        model.close()
    return found


def _count_compressed() -> dict[str, float]:
    """The gradients of ResNet-18, as data parallelism sends them plain and by PowerSGD: the ratio of the bytes."""
    import torch
    from torch import nn

    from mlsys.parallel.compress import PowerSGD
    from mlsys.parallel.data_parallel import DataParallel
    from mlsys.parallel.traffic import ledger

    matrices, vectors = resnet18_shapes()
    sent = {}
    for rank in (0, 1, 2, 4):
        module = nn.ParameterList([torch.ones(shape) for shape in (*matrices, (vectors,))])
        model = DataParallel(module, compress=PowerSGD(rank) if rank else None, algorithm="backend")
        with ledger() as book:
            torch.stack([parameter.sum() for parameter in module]).sum().backward()
        sent[rank] = book.sent
        model.close()
    return {f"PowerSGD {rank}": sent[0] / sent[rank] for rank in (1, 2, 4)}


COUNTED = (
    [
        Claim(
            name=f"counted-{algorithm.replace('_', '-')}-bytes",
            area="parallel.collectives",
            source=source,
            what=f"bytes that a rank sends over the bytes of the vector, all-reduce by {words}, {RANKS} ranks, counted",
            unit="",
            published=published,
            digits=2,
            formula=True,
            compute=lambda algorithm=algorithm: counted()[algorithm],  # type: ignore[misc]
        )
        for algorithm, words, published, source in (
            ("ring", "a ring", 1.5, f"{PATARASUK}, at N = 4"),
            ("halving_doubling", "halving and doubling", 1.5, f"{PATARASUK}, at N = 4"),
            (
                "recursive_doubling",
                "recursive doubling",
                2.0,
                "Thakur, Rabenseifner & Gropp 2005, IJHPCA 19(1), recursive doubling, n·log₂ p bytes at p = 4",
            ),
        )
    ]
    + [
        Claim(
            name="counted-data-parallel-bytes",
            area="parallel.data_parallel",
            source=f"{NCCL_TESTS}, factor 2(n−1)/n at n = 4",
            what=f"bytes that a rank of DataParallel sends in a step over the gradient's, {RANKS} ranks, counted",
            unit="",
            published=1.5,
            digits=2,
            formula=True,
            compute=lambda: counted()["DataParallel sends"] / 2,
        )
    ]
    + [
        Claim(
            name=f"counted-zero-{stage}-communication",
            area="parallel.zero3" if stage == 3 else "parallel.zero",
            source=f"{ZERO}, section {section}",
            what=f"bytes that a rank sends in a step of ZeRO{stage} over those of DataParallel, {RANKS} ranks, counted",
            unit="×",
            published=published,
            digits=1,
            compute=lambda stage=stage: counted()[f"ZeRO{stage} sends"] / counted()["DataParallel sends"],  # type: ignore[misc]
        )
        for stage, published, section in ((2, 1.0, "7.2.1"), (3, 1.5, "7.2.2"))
    ]
    + [
        Claim(
            name=f"counted-zero-{stage}-memory",
            area="parallel.zero3" if stage == 3 else "parallel.zero",
            source=f"{ZERO}, Table 1",
            what=f"model state of a rank of ZeRO{stage} with {RANKS} ranks, counted for each parameter, times 7.5 B",
            unit="GB",
            published=published,
            digits=digits,
            compute=lambda stage=stage: counted()[f"ZeRO{stage} holds"] * SEVEN_B / 1e9,  # type: ignore[misc]
        )
        for stage, published, digits in ((1, 52.5, 1), (2, 41.3, 1), (3, 30.0, 0))
    ]
    + [
        Claim(
            name=f"counted-power-sgd-rank-{rank}",
            area="parallel.compress",
            source=POWER_SGD,
            what=f"bytes that DataParallel sends for ResNet-18 plain over those with PowerSGD({rank}), counted",
            unit="×",
            published=published,
            digits=0,
            compute=lambda rank=rank: counted()[f"PowerSGD {rank}"],  # type: ignore[misc]
        )
        for rank, published in ((1, 243), (2, 136), (4, 72))
    ]
)
