"""What the compiler makes of flash attention's kernel of dQ and of row sums, with every config, without a GPU."""

import pytest

from mlsys.attention import flash_triton
from mlsys.kernels import _triton_compile

KERNELS = ("flash.queries", "flash.row_sums")
NAMES = dict.fromkeys(one.name for one in flash_triton.specimens() if one.name.startswith(KERNELS))


@pytest.fixture(scope="module")
def rows():
    return [row for only in KERNELS for row in _triton_compile.compiled(["mlsys.attention.flash_triton"], only=only)]


@pytest.mark.parametrize("target", _triton_compile.TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, target, rows):
    mine = [row for row in rows if (row.name, row.target) == (name, target)]
    assert mine
    assert [problem for row in mine for problem in row.problems()] == []
    assert all(0 < row.registers <= 255 for row in mine)
