"""What the compiler makes of every config of the Triton kernels of attention, without a GPU: a slow file apart."""

import pytest

from mlsys.kernels import _triton_compile


@pytest.mark.parametrize("module", ["flash_triton", "paged_triton"])
def test_every_config_compiles_for_ampere_and_hopper_and_none_spills_unexplained(module):
    rows = _triton_compile.compiled([f"mlsys.attention.{module}"])
    assert {row.target for row in rows} == {80, 90}
    assert [problem for row in rows for problem in row.problems()] == []
