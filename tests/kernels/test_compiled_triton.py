"""What the compiler makes of softmax, norms and cross-entropy, with every config, without a GPU."""

import pytest

from mlsys.kernels import _triton_compile, cross_entropy_triton, norm_triton, softmax_triton

MODULES = (softmax_triton, norm_triton, cross_entropy_triton)
NAMES = dict.fromkeys(one.name for module in MODULES for one in module.specimens())


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled([module.__name__ for module in MODULES])


@pytest.mark.parametrize("target", _triton_compile.TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, target, rows):
    mine = [row for row in rows if (row.name, row.target) == (name, target)]
    assert mine
    assert [problem for row in mine for problem in row.problems()] == []
    assert all(0 < row.registers <= 255 for row in mine)
