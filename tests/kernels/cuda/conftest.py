"""Tests marked `gpu` are taken out where there is no NVIDIA GPU: what is left is skipped only for
a compiler or an emulator that is not installed."""

import pytest


def pytest_collection_modifyitems(config, items):
    import torch

    if torch.cuda.is_available():
        return
    without = [item for item in items if item.get_closest_marker("gpu")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Nothing compiled so far."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
