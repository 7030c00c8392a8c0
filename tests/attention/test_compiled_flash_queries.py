"""What the compiler makes of flash attention's kernel of dQ and of row sums, with every config, without a GPU."""

from pathlib import Path

import pytest

from mlsys.attention import flash_triton
from mlsys.kernels import _triton_compile
from mlsys.loading import import_file

sound = import_file(Path(__file__).parents[1] / "kernels" / "compiling.py").sound
KERNELS = ("flash.queries", "flash.row_sums")
NAMES = dict.fromkeys(one.name for one in flash_triton.specimens() if one.name.startswith(KERNELS))


@pytest.fixture(scope="module")
def rows():
    return [row for only in KERNELS for row in _triton_compile.compiled(["mlsys.attention.flash_triton"], only=only)]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, rows):
    sound(rows, name, _triton_compile.TARGETS)
