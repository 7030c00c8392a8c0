"""What the compiler makes of every config of the kernels for codes, without a GPU: a slow file apart."""

from mlsys.kernels import _triton_compile


def test_every_config_compiles_for_ampere_and_hopper_and_none_spills_unexplained():
    rows = _triton_compile.compiled(["mlsys.quant.qlinear_triton"])
    assert {row.target for row in rows} == {80, 90}
    assert [problem for row in rows for problem in row.problems()] == []
    # codes go from memory to shared memory on their own, and to tensor cores by way of registers
    for row in rows:
        if "x=fp32" not in row.name and "ragged" not in row.name and (".floats" in row.name or ".integers" in row.name):
            assert {80: "mma.sync", 90: "wgmma"}[row.target] in row.shows, row
            assert "cp.async" in row.shows, row
