"""What tests of several indexes share."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KILLED_AT_THE_SECOND_RENAME = """
import os, signal
replace, calls = os.replace, []
def killed(source, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
"""


@pytest.fixture
def killed_while_saving() -> Callable[[str, Path], None]:
    """Save the `index` that some Python code makes, in a process killed when the arrays are there, the manifest not."""

    def run(makes_index: str, folder: Path) -> None:
        code = f"{makes_index}\n{KILLED_AT_THE_SECOND_RENAME}\nindex.save({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -signal.SIGKILL

    return run
