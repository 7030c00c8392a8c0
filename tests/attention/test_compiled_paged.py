"""What the compiler makes of paged attention's kernels, with every config, without a GPU."""

from pathlib import Path

import pytest

from mlsys.attention import paged_triton
from mlsys.kernels import _triton_compile
from mlsys.loading import import_file

sound = import_file(Path(__file__).parents[1] / "kernels" / "compiling.py").sound
NAMES = dict.fromkeys(one.name for one in paged_triton.specimens())


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled(["mlsys.attention.paged_triton"])


@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, rows):
    sound(rows, name, _triton_compile.TARGETS)
