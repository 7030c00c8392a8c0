"""A benchmark small enough for a test: sums of n numbers, with a peer, and another that is not installed."""

import pytest

from mlsys.bench import Benchmark, Impl, Plot, Work


def work(case, numbers):
    return Work(flops=len(numbers), bytes=8 * len(numbers), items=len(numbers), unit="number")


def make(**changes):
    settings = {
        "file": "benchmarks/toys/sums.py",
        "cases": {size: [{"n": n} for n in (10, 100, 1000)] for size in ("quick", "default", "full")},
        "inputs": lambda case, device: list(range(case["n"])),
        "work": work,
        "impls": {
            "sum": Impl(lambda: sum, "reference"),
            "loop": Impl(lambda: lambda xs: sum(x for x in xs), "ours"),
            "peer": Impl(lambda: sum, "peer"),
            "absent": Impl(lambda: sum, "peer", needs="no_such_module"),
        },
        "subject": "loop",
        "prepare": lambda function, case, xs: lambda: function(xs),
        "verify": lambda case, xs, got, want: (abs(got - want), 0.0),
        "plots": (Plot(x="n", xlabel="numbers"), Plot(x="n", xlabel="n", y="throughput", panel=("n",))),
    }
    return Benchmark(**{**settings, **changes})


@pytest.fixture
def toy():
    """Makes the benchmark, with any of its settings changed."""
    return make
