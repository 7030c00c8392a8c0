"""Peak memory counts what is alive at once, also inside torch's own kernels."""

import torch

from mlsys.bench.memory import peak_bytes

MB = 2**20


def test_counts_the_largest_total_alive_at_once():
    def run():
        a = torch.ones(MB)  # 4 MB
        b = a + 1  # 8 MB alive
        del a
        c = b + 1  # 8 MB alive
        return float(c[0])

    assert 8 * MB <= peak_bytes(run) < 8.1 * MB


def test_does_not_add_up_what_is_freed():
    def run():
        for _ in range(5):
            torch.ones(MB)

    assert 4 * MB <= peak_bytes(run) < 4.1 * MB


def test_inputs_are_not_counted():
    held = torch.ones(MB)
    assert peak_bytes(lambda: held.add_(1)) < 0.1 * MB
