"""Each kernel file of the library compiles for each architecture that it names, without a word from the compiler."""

import pytest

from mlsys.kernels.cuda import _targets
from mlsys.kernels.cuda._report import compile_report
from mlsys.kernels.cuda._runner import LIBRARY

FILES = sorted(LIBRARY.glob("*.cu"))


def test_there_are_files():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_compiles_and_keeps_its_numbers_in_registers(path):
    text = path.read_text(encoding="utf-8")
    for arch in _targets.architectures(text):
        report = compile_report(path, arch)
        assert report.warnings == ()
        for kernel in report:
            assert kernel.spill_stores == 0, f"{kernel.kernel} for {arch}"
            assert kernel.occupancy.blocks > 0, f"{kernel.kernel} for {arch}"
