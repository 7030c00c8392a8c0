"""`write_atomic`: the new file or the old one, never half of either, and nothing else left behind; one cache."""

import os
import stat

import platformdirs
import pytest

from mlsys import files
from mlsys.files import write_atomic


def test_writes_text_as_utf8_and_bytes_as_they_are(tmp_path):
    assert write_atomic(tmp_path / "a", "α\n") == tmp_path / "a"
    assert (tmp_path / "a").read_bytes() == b"\xce\xb1\n"
    write_atomic(str(tmp_path / "a"), b"\x00\r\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
    write_atomic(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    (tmp_path / "a").write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_contents_are_on_disk_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    steps = []

    def record(name, real):
        def wrapper(*args):
            kind = stat.S_ISDIR(os.fstat(args[0]).st_mode) if name == "fsync" else None
            steps.append(f"{name} folder" if kind else name)
            return real(*args)

        return wrapper

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", record("replace", os.replace))
    write_atomic(tmp_path / "a", "new")
    assert steps == ["fsync", "replace", "fsync folder"]


def test_permissions_are_the_old_files_or_the_umasks(tmp_path):
    write_atomic(tmp_path / "new", "")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    write_atomic(tmp_path / "plain", "x")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_reader_with_the_old_file_open_keeps_it(tmp_path):
    (tmp_path / "a").write_text("old")
    with (tmp_path / "a").open() as reader:
        write_atomic(tmp_path / "a", "new")
        assert reader.read() == "old"


def test_longest_possible_name(tmp_path):
    write_atomic(tmp_path / ("n" * 255), "x")
    write_atomic(tmp_path / ("é" * 127), "x")


def test_clear_errors(tmp_path):
    with pytest.raises(TypeError, match="data must be str or bytes, got list"):
        write_atomic(tmp_path / "a", [])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_atomic(tmp_path / "none" / "a", "")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_atomic(tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_cache_folder_is_the_users_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.setenv("MLSYS_CACHE", "")
    theirs = files.cache_folder()
    monkeypatch.delenv("MLSYS_CACHE")
    assert files.cache_folder() == theirs
    assert theirs.is_absolute()
    assert "mlsys" in theirs.parts


def test_everything_is_kept_in_the_same_folder(tmp_path, monkeypatch):
    from mlsys.data import docs, text
    from mlsys.perf import _measure

    monkeypatch.delenv("MLSYS_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *names, **settings: str(tmp_path / str(settings)))
    assert docs.default_cache_dir() == files.cache_folder() / "docs"
    assert text._folder(None) == files.cache_folder() / "text"
    assert _measure.cache_folder is files.cache_folder
