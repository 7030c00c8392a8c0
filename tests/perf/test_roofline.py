"""The bound is what its definition says, at and on both sides of the ridge; impossible work is refused."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlsys.perf import roofline
from mlsys.perf.hardware import HARDWARE, Hardware, Link
from mlsys.perf.roofline import Bound

TOY = Hardware("toy", {"float32": 100.0, "bfloat16": 400.0}, bandwidth=10.0, memory=1000, link=Link("wire", 2.0))
ALONE = Hardware("alone", {"float32": 100.0}, bandwidth=10.0, memory=1000)
work = st.floats(min_value=1e-3, max_value=1e15)
machines = st.sampled_from([(h, d) for h in HARDWARE.values() for d in h.peak])
sizes = st.integers(min_value=1, max_value=5000)


def test_by_hand():
    # 1000 FLOPs take 10 s, 50 bytes 5 s, 30 bytes sent 15 s
    b = roofline.bound(1000, 50, TOY, "float32")
    assert (b.compute_seconds, b.memory_seconds, b.link_seconds) == (10, 5, 0)
    assert (b.seconds, b.sum_seconds, b.side, b.intensity) == (10, 15, "compute", 20)
    b = roofline.bound(1000, 50, TOY, "float32", link_bytes=30)
    assert (b.link_seconds, b.seconds, b.sum_seconds, b.side) == (15, 15, 30, "link")
    b = roofline.bound(1000, 50, TOY, "bfloat16")
    assert (b.compute_seconds, b.seconds, b.side) == (2.5, 5, "memory")
    assert b.share(10) == 0.5
    assert b.share(2.5) == 2.0  # from cache


def test_ridge_by_hand_and_as_published():
    assert roofline.ridge(TOY, "float32") == 10
    # Jouppi et al. 2017 print about 1,350 multiply-adds per byte, each of which is two operations
    assert roofline.ridge(HARDWARE["tpu-v1"], "int8") / 2 == pytest.approx(1353, abs=0.5)
    assert roofline.ridge(HARDWARE["h100"], "bfloat16") == pytest.approx(295, abs=0.5)


def test_balanced_at_the_ridge_only():
    assert roofline.bound(10, 1, TOY, "float32").side == "balanced"
    assert roofline.bound(10.001, 1, TOY, "float32").side == "compute"
    assert roofline.bound(9.999, 1, TOY, "float32").side == "memory"
    assert roofline.bound(1, 1, TOY, "float32", link_bytes=0.2).side == "balanced"
    assert roofline.bound(0, 0, TOY, "float32").side == "balanced"


def test_extremes():
    assert roofline.bound(5, 0, TOY, "float32").intensity == math.inf
    assert roofline.bound(0, 5, TOY, "float32").intensity == 0
    assert roofline.attainable(math.inf, TOY, "float32") == 100
    assert roofline.attainable(0, TOY, "float32") == 0
    assert roofline.bound(0, 0, TOY, "float32").seconds == 0


@given(machines, work, work)
def test_the_two_forms_agree(machine, flops, bytes_):
    hardware, dtype = machine
    b = roofline.bound(flops, bytes_, hardware, dtype)
    assert flops / b.seconds == pytest.approx(roofline.attainable(b.intensity, hardware, dtype), rel=1e-9)
    assert b.seconds <= b.sum_seconds <= 2 * b.seconds * (1 + 1e-12)
    assume(not math.isclose(b.intensity, roofline.ridge(hardware, dtype), rel_tol=1e-6))
    assert b.side == ("compute" if b.intensity > roofline.ridge(hardware, dtype) else "memory")


@given(work, work, work, st.floats(min_value=1.001, max_value=1e3))
def test_more_work_is_never_faster_and_all_of_it_scales(flops, bytes_, link_bytes, factor):
    b = roofline.bound(flops, bytes_, TOY, "float32", link_bytes=link_bytes)
    for more in (
        roofline.bound(flops * factor, bytes_, TOY, "float32", link_bytes=link_bytes),
        roofline.bound(flops, bytes_ * factor, TOY, "float32", link_bytes=link_bytes),
        roofline.bound(flops, bytes_, TOY, "float32", link_bytes=link_bytes * factor),
    ):
        assert more.seconds >= b.seconds
        assert more.sum_seconds >= b.sum_seconds
    scaled = roofline.bound(flops * factor, bytes_ * factor, TOY, "float32", link_bytes=link_bytes * factor)
    assert scaled.seconds == pytest.approx(factor * b.seconds)
    assert scaled.intensity == pytest.approx(b.intensity)


@given(sizes, sizes, sizes, st.sampled_from([0.5, 1, 2, 4, 8]))
def test_matmul_work_is_the_sum_over_the_matrices(m, n, k, itemsize):
    flops, bytes_ = roofline.matmul_work(m, n, k, itemsize)
    per_output = k + k  # multiplications and additions, the first one to zero
    assert flops == m * n * per_output
    assert bytes_ == sum(rows * columns * itemsize for rows, columns in ((m, k), (k, n), (m, n)))
    assert roofline.matmul_work(2 * m, n, k, itemsize)[0] == 2 * flops
    assert roofline.matmul_work(2 * m, n, k, itemsize)[1] < 2 * bytes_  # the weights are read once


@given(sizes, sizes, st.sampled_from([0.5, 1, 2, 4]), machines)
def test_critical_rows_is_where_the_matmul_crosses_the_ridge(n, k, itemsize, machine):
    hardware, dtype = machine
    rows = roofline.critical_rows(n, k, itemsize, hardware, dtype)
    assert rows > 0

    def side(m):
        return roofline.bound(*roofline.matmul_work(m, n, k, itemsize), hardware, dtype).side

    if rows > 1e12:  # never, or not with any matrix that fits
        assert side(10**9) == "memory"
        return
    assert side(math.floor(rows) + 1) in ("compute", "balanced")
    if rows > 1:
        assert side(math.ceil(rows) - 1 or 1) in ("memory", "balanced")


def test_critical_rows_for_large_weights_is_the_ridge_in_numbers():
    h100 = HARDWARE["h100"]
    assert roofline.critical_rows(10**7, 10**7, 2, h100, "bfloat16") == pytest.approx(295.3, abs=0.1)
    assert roofline.critical_rows(10**7, 10**7, 1, h100, "float8") == pytest.approx(295.3, abs=0.1)
    assert roofline.critical_rows(8, 8, 2, h100, "bfloat16") == math.inf


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["flops", "bytes_", "link_bytes"])
def test_impossible_work_is_refused(name, bad):
    given = {"flops": 1.0, "bytes_": 1.0, "link_bytes": 1.0, name: bad}
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {bad}"):
        roofline.bound(given["flops"], given["bytes_"], TOY, "float32", link_bytes=given["link_bytes"])


def test_other_errors_name_argument_and_remedy():
    with pytest.raises(LookupError, match="toy has no peak for dtype 'int8'; it has float32, bfloat16"):
        roofline.bound(1, 1, TOY, "int8")
    with pytest.raises(ValueError, match="link_bytes=8, but the record of alone has no link"):
        roofline.bound(1, 1, ALONE, "float32", link_bytes=8)
    assert roofline.bound(1, 1, ALONE, "float32").link_seconds == 0
    with pytest.raises(ValueError, match="no work has no intensity"):
        roofline.intensity(0, 0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="intensity="):
            roofline.attainable(bad, TOY, "float32")
    with pytest.raises(TypeError, match="flops must be a number"):
        roofline.bound("many", 1, TOY, "float32")
    with pytest.raises(ValueError, match="seconds must be positive"):
        Bound(1, 1).share(0)
    with pytest.raises(ValueError, match="m must be at least 1"):
        roofline.matmul_work(0, 1, 1, 4)
    with pytest.raises(TypeError, match="k must be a whole number"):
        roofline.matmul_work(1, 1, 2.0, 4)
    with pytest.raises(ValueError, match="itemsize must be positive"):
        roofline.critical_rows(1, 1, 0, TOY, "float32")
