"""What the compiler makes of the Triton matmul, with every config, without a GPU: a slow file apart."""

from pathlib import Path

import pytest

from mlsys.kernels import _triton_compile, matmul_triton
from mlsys.loading import import_file

sound = import_file(Path(__file__).with_name("compiling.py")).sound
NAMES = dict.fromkeys(one.name for one in matmul_triton.specimens())


@pytest.fixture(scope="module")
def rows():
    return _triton_compile.compiled(["mlsys.kernels.matmul_triton"])


@pytest.mark.parametrize("name", NAMES)
def test_every_config_compiles_and_none_spills_unexplained(name, rows):
    sound(rows, name, [90] if "descriptor" in name else [80, 90])


def test_only_epilogues_may_spill_and_hardly_where_a_loop_goes_on_behind_them(rows):
    spilling = {row.name for row in rows if row.why_spills}
    assert spilling == {f"matmul.{variant} bf16 gelu" for variant in matmul_triton.VARIANTS}
    assert all(row.spilled <= 16 for row in rows if row.name == "matmul.persistent bf16 gelu")


def test_tensor_cores_are_fed_as_the_variant_says(rows):
    for row in rows:
        if "before_activation" in row.name:
            continue
        exact = "fp32" in row.name and "tf32" not in row.name
        assert ("wgmma" in row.shows) == (row.target == 90 and not exact and "BLOCK_M=16 " not in row.config)
        assert ("mma.sync" in row.shows) == (not exact and "wgmma" not in row.shows)
        assert ("TMA" in row.shows) == ("descriptor" in row.name)
        assert ("cp.async" in row.shows) == ("descriptor" not in row.name)
