"""What every test of compiled kernels asks. Used as `import_file(Path(...) / "compiling.py").sound`."""

from collections.abc import Sequence

from mlsys.kernels._triton_compile import Compiled


def sound(rows: Sequence[Compiled], name: str, targets: Sequence[int]) -> None:
    """The kernel `name` was compiled for just these GPUs, fits, and spills where it says why only."""
    mine = [row for row in rows if row.name == name]
    assert {row.target for row in mine} == set(targets)
    assert [problem for row in mine for problem in row.problems()] == []
    assert all(0 < row.registers <= 255 for row in mine)
