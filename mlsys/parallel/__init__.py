"""Many processes, one model: collectives, data parallelism, ZeRO, tensor and pipeline parallelism.

`launcher`            run a function on n processes: `launch`.
`collectives`         all-reduce and its relatives, each algorithm written out; `Communicator` chooses among them.
`shared_memory`       the same through the memory of one host.
`traffic`             what was sent: `ledger`.
`data_parallel`       a replica on every rank, gradients averaged: naive, flat, bucketed with overlap.
`compress`            sending fewer bytes of gradient.
`zero`, `zero3`       optimizer state, gradients and weights in shards: ZeRO 1, 2 and 3.
`tensor`              a share of every matrix on every rank, and of the sequence: `parallelize`.
`schedules`           pipeline schedules as tables: checked, simulated, drawn.
`pipeline`            the model in stages, and any schedule run over messages.
`mesh`                data, pipeline and tensor parallelism together: `Parallel` on a `mesh(dp, pp, tp)`.
`sharded_checkpoint`  saving shards so that a kill loses nothing, and loading them on another number of ranks.
`timeline`            where each rank's time went.
"""

from mlsys.parallel.collectives import Communicator
from mlsys.parallel.data_parallel import DataParallel
from mlsys.parallel.launcher import LaunchError, launch
from mlsys.parallel.pipeline import Pipeline
from mlsys.parallel.tensor import parallelize
from mlsys.parallel.traffic import ledger
from mlsys.parallel.zero import ZeRO1, ZeRO2
from mlsys.parallel.zero3 import ZeRO3

__all__ = [
    "Communicator", "DataParallel", "LaunchError", "Pipeline", "ZeRO1", "ZeRO2", "ZeRO3",
    "launch", "ledger", "parallelize",
]  # fmt: skip
