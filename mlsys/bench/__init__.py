"""The measuring harness: checked, then timed, beside the reference, the peers and the machine's limit."""

from mlsys.bench.core import Benchmark, Impl, Plot, Work, run
from mlsys.bench.records import Record

__all__ = ["Benchmark", "Impl", "Plot", "Record", "Work", "run"]
