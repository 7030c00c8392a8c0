"""What the compiler makes of flash attention's kernel of dK and dV, with every config, without a GPU."""

from pathlib import Path

import pytest

from mlsys.attention import flash_triton
from mlsys.kernels import _triton_compile
from mlsys.loading import import_file

sound = import_file(Path(__file__).parents[1] / "kernels" / "compiling.py").sound
NAMES = dict.fromkeys(one.name for one in flash_triton.specimens() if one.name.startswith("flash.keys"))


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled(["mlsys.attention.flash_triton"], only="flash.keys")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, rows):
    sound(rows, name, _triton_compile.TARGETS)
