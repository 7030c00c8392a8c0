"""Saving a file so that a crash leaves the old one or the new one, never half of either; and where the cache is.

Writing over a file in place destroys it first. So: write a temporary file in the
same folder, force it to disk, rename it over the old one (a rename within a file
system is atomic in POSIX), and force the folder's entry to disk as well.

Papers:
    Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI (why each of the four steps is needed).

See also:
    `os.replace`, `os.fsync`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def cache_folder() -> Path:
    """Where everything is kept that can be made again: the folder MLSYS_CACHE, else the platform's for this user."""
    import platformdirs

    return Path(os.environ.get("MLSYS_CACHE") or platformdirs.user_cache_dir("mlsys", appauthor=False))


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Make `data` the contents of `path` (text as UTF-8), all at once; returns the path written.

    The folder must exist. A file that is replaced keeps its permissions; a symbolic
    link stays a link and its target is replaced. If anything fails, the old file is
    as it was and no temporary file is left. OSError as for `open`; TypeError for
    data that is neither text nor bytes.
    """
    if not isinstance(data, str | bytes):
        raise TypeError(f"data must be str or bytes, got {type(data).__name__}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(target.parent)!r}")
    contents = data.encode() if isinstance(data, str) else data

    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        # O_EXCL: never write into someone else's file; 0o666: the user's umask decides, as for `open`
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                temporary.chmod(target.stat().st_mode & 0o7777)
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105  (named as the docstring and the literature name it)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return target


def _sync_folder(folder: Path) -> None:
    """Force the folder's entries to disk, where the system lets a folder be opened (Windows does not)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
