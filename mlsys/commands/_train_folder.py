"""The folder of `mlsys train`: one run at a time, and after a kill at any moment something whole to go on from."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError
from mlsys.files import write_atomic

if TYPE_CHECKING:
    from mlsys.commands._train_options import Order
    from mlsys.data.text import Tokenizer

RUN, CHECKPOINT, TOKENIZER, MODEL = "run.json", "checkpoint.safetensors", "tokenizer.json", "model.safetensors"
SHARDS = "checkpoint"  # instead of CHECKPOINT where each rank saves what only it has
MANIFEST = f"{SHARDS}/manifest.json"
LEFT_OVER = re.compile(rf"\.({'|'.join(map(re.escape, (RUN, CHECKPOINT, TOKENIZER, MODEL)))})\.[0-9a-f]{{12}}\.tmp")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder for this process alone; made if need be, and cleared of what a killed save left in it.

    A folder that is made and stays empty is removed again. The lock belongs to the process, so a kill ends it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / ".lock"):
            for path in folder.iterdir():
                if LEFT_OVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            yield
    finally:
        with suppress(OSError):  # not empty: the usual case
            for path in made:
                path.rmdir()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock; UsageError if another process does. Without fcntl (Windows), or where locks are not to be had: none.

    The file is removed at the end. Whoever opened it before that and locks it after has locked a file without a name,
    sees so, and tries again.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UsageError(
                f"another `mlsys train` (pid {pid}) is at work in {file.parent}: wait for it, or give another --out"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def noted(order: Order, file: Path) -> Iterator[None]:
    """What was asked for is in the file; if it proves impossible, the file is as it was. A kill leaves it there."""
    before = file.read_bytes() if file.exists() else None
    order.save(file)
    try:
        yield
    except Exception:
        file.unlink() if before is None else write_atomic(file, before)
        raise


def start(folder: Path, order: Order, tokenizer: Tokenizer) -> None:
    """Make the folder that of a new run, which has then only to save its checkpoint.

    From here on, whatever happens, there is something to go on from: a kill before the old checkpoint is gone leaves
    the old run; one after it leaves run.json, to begin the new one.
    """
    from mlsys.data import text

    order.save(folder / RUN)
    for name in (MODEL, CHECKPOINT, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)  # without its manifest, it is no checkpoint
    with naming(folder / TOKENIZER, "nothing of this run is saved yet"):
        text.save(tokenizer, folder / TOKENIZER)


@contextmanager
def naming(file: Path, safe: str) -> Iterator[None]:
    """An OSError inside, such as a full disk, names the file and says what is saved in spite of it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {safe}", str(file)) from error


def say(line: str) -> None:
    """A line to the user that is not a result."""
    print(line, file=sys.stderr, flush=True)
