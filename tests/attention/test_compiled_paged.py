"""What the compiler makes of paged attention's kernels, with every config, without a GPU."""

import pytest

from mlsys.attention import paged_triton
from mlsys.kernels import _triton_compile

NAMES = dict.fromkeys(one.name for one in paged_triton.specimens())


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled(["mlsys.attention.paged_triton"])


@pytest.mark.parametrize("target", _triton_compile.TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, target, rows):
    mine = [row for row in rows if (row.name, row.target) == (name, target)]
    assert mine
    assert [problem for row in mine for problem in row.problems()] == []
    assert all(0 < row.registers <= 255 for row in mine)
