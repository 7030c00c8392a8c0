"""What the compiler makes of softmax, norms and cross-entropy, with every config, without a GPU."""

from pathlib import Path

import pytest

from mlsys.kernels import _triton_compile, cross_entropy_triton, norm_triton, softmax_triton
from mlsys.loading import import_file

sound = import_file(Path(__file__).with_name("compiling.py")).sound
MODULES = (softmax_triton, norm_triton, cross_entropy_triton)
NAMES = dict.fromkeys(one.name for module in MODULES for one in module.specimens())


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled([module.__name__ for module in MODULES])


@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, rows):
    sound(rows, name, _triton_compile.TARGETS)
