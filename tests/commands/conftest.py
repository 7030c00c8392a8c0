"""What the tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library keeps between runs is empty, and is the test's own."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A folder of ten small files, each the same kind of line."""
    folder = tmp_path / "words"
    folder.mkdir()
    for i in range(10):
        lines = [f"the {('cat', 'rat', 'hat')[(i * j) % 3]} sat on mat {j % 7}.\n" for j in range(40)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return str(folder)
