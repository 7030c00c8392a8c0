"""Asynchronous copies, mbarriers, tensor copies, wgmma, groups on the processor: right programs give torch's results.

And wrong ones do not: what a kernel does not wait for happens after it has looked.
"""

import ctypes
from pathlib import Path

import pytest
import torch

import mlsys.kernels.cuda
from mlsys.kernels.cuda import KernelError, check, load
from mlsys.kernels.cuda._findings import Finding
from mlsys.kernels.cuda._tensor_map import _encoded_by_driver, tensor_map

INCLUDE = Path(mlsys.kernels.cuda.__file__).parent / "include"
FILE = load(Path(__file__).parent / "files" / "async.cu", includes=[INCLUDE])
GROUPS = load(Path(__file__).parent / "files" / "groups.cu")


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def watched(kernel, *args, **options) -> list[Finding]:
    return check(FILE[kernel], *args, **options)


# --- cp.async ---


@pytest.mark.parametrize("n", [1, 2, 511, 512, 1000, 1027])
def test_copies_with_zeros_past_the_end(n):
    x, y = drawn(n), torch.full((n,), torch.nan)
    blocks = -(-n // 512)
    want = torch.cat([x, torch.zeros(blocks * 512 - n)])
    kernel = FILE["reversed"]
    kernel(blocks, 128, n, 1, x, y)
    assert torch.equal(y, want.view(blocks, 512).flip(1).flatten()[:n])
    assert watched("reversed", blocks, 128, n, 1, x, y) == []


def test_a_copy_without_a_wait_brings_nothing_and_is_found():
    x, y = drawn(512).abs(), torch.zeros(512)
    FILE["reversed"](1, 128, 512, 0, x + 1, y)
    assert not torch.equal(y, (x + 1).view(128, 4).flip(0, 1).flatten())
    findings = watched("reversed", 1, 128, 512, 0, x, y)
    assert [f.kind for f in findings] == ["not-waited-for"]
    assert "s[threadIdx.x * 4 + i]" in findings[0].source


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 9])
def test_stages_of_copies(rounds):
    x, y = drawn(rounds, 32), torch.zeros(rounds, 32)
    FILE["stages"](1, 32, rounds, 1, x, y)
    assert torch.equal(y, x.flip(1))
    assert watched("stages", 1, 32, rounds, 1, x, y) == []
    FILE["stages"](1, 32, rounds, 0, x + 1, y)
    assert not torch.equal(y, (x + 1).flip(1))
    assert {f.kind for f in watched("stages", 1, 32, rounds, 0, x, y)} >= {"not-waited-for"}


def test_copies_of_cuda_pipeline():
    x, y = drawn(32, 2), torch.zeros(32, 2)
    FILE["pipeline"](1, 32, x, y)
    want = x.clone()
    want[1::2, 1] = 0
    assert torch.equal(y, want.flip(0))


def test_copies_want_aligned_memory_within_bounds():
    with pytest.raises(
        KernelError, match=r"cp\.async: the destination has to lie at a multiple of 16 bytes, and lies 4 bytes after"
    ):
        FILE["copy_crooked"](1, 32, drawn(128), torch.zeros(32))
    (finding,) = watched("copy_past_the_end", 1, 32, drawn(127), torch.zeros(32))
    assert finding.kind == "out-of-bounds"
    assert "cp_async<16>" in finding.source


# --- barriers of some warps ---


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barriers_of_two_warps(order):
    y = torch.zeros(5, 32, dtype=torch.int32)
    FILE["two_warps"](1, 64, 5, 1, y, order=order)
    assert torch.equal(y, (torch.arange(5)[:, None] * 100 + torch.arange(32).flip(0)).int())


def test_barriers_order_those_who_arrive_before_those_who_wait():
    y = torch.zeros(5, 32, dtype=torch.int32)
    assert watched("two_warps", 1, 64, 5, 1, y) == []
    with pytest.raises(
        KernelError, match=r"bar\.sync"
    ):  # warp 0 arrives five times, and warp 1 waits for it after that
        FILE["two_warps"](1, 64, 5, 0, y)


def test_one_lane_is_elected():
    y = torch.zeros(3, dtype=torch.int32)
    FILE["elected"](1, 96, y)
    assert y.tolist() == [1, 1, 1]


def test_a_barrier_has_one_count():
    with pytest.raises(KernelError, match=r"barrier 1 is for 96 threads here, and for 64 where others have arrived"):
        FILE["barrier_counts"](1, 64, torch.zeros(64, dtype=torch.int32))


# --- mbarriers ---


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
def test_a_ring_of_buffers(rounds, order):
    y = torch.zeros(rounds, 32, dtype=torch.int32)
    FILE["ring"](1, 64, rounds, 32, y, order=order)
    assert torch.equal(y, (torch.arange(rounds)[:, None] * 100 + torch.arange(32).flip(0)).int())
    assert watched("ring", 1, 64, rounds, 32, y) == []


def test_a_ring_that_counts_half_of_its_readers():
    y = torch.zeros(8, 32, dtype=torch.int32)
    assert watched("ring", 1, 64, 8, 16, y)
    with pytest.raises(KernelError, match=r"mbarrier_wait \(parity 0: 32 of 64 arrivals missing\)"):
        FILE["ring"](1, 64, 8, 64, y)


def test_reading_without_waiting_for_an_mbarrier():
    findings = watched("ring_without_wait", 1, 64, torch.zeros(32, dtype=torch.int32))
    assert [f.kind for f in findings] == ["race"]


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (
            "too_many_arrivals",
            r"more arrivals at the mbarrier than the 1 it was initialised for: its phase waits for 16 bytes",
        ),
        ("never_initialised", "the mbarrier was not initialised"),
    ],
)
def test_misused_mbarriers(kernel, says):
    with pytest.raises(KernelError, match=says):
        FILE[kernel](1, 32, torch.zeros(32, dtype=torch.int32))


def test_an_mbarrier_is_initialised_before_it_is_used():
    kinds = {f.kind for f in watched("used_too_early", 1, 64, torch.zeros(64, dtype=torch.int32))}
    assert kinds == {"race"}


@pytest.mark.parametrize("tries", [0, 1])
def test_a_phase_that_never_ends(tries):
    with pytest.raises(KernelError, match=r"parity 0: 1 of 33 arrivals missing"):
        FILE["never_ends"](1, 32, tries, torch.zeros(32, dtype=torch.int32), limit=5)


# --- bulk and tensor copies ---


def test_bulk_copies():
    x, y = drawn(256), torch.zeros(256)
    FILE["bulk"](1, 256, 1, x, y)
    assert torch.equal(y, x.flip(0))
    assert watched("bulk", 1, 256, 1, x, y) == []
    FILE["bulk"](1, 256, 0, x + 1, y)
    assert not torch.equal(y, (x + 1).flip(0))
    assert "not-waited-for" in {f.kind for f in watched("bulk", 1, 256, 0, x, y)}


def raw(m):
    return bytes(m)


def box(source, target, rows, columns, swizzle, at, to, waits=1, bytes=None):
    """One box of source to target, and what lay in shared memory between."""
    seen = torch.zeros(rows, columns)
    maps = [raw(tensor_map(t, (rows, columns), swizzle=swizzle)) for t in (source, target)]
    size = rows * columns * 4
    FILE["boxes"](1, 64, rows * columns, bytes or size, waits, *maps, *at, *to, seen, source, target, shared=size)
    return seen


@pytest.mark.parametrize(("x", "y"), [(0, 0), (4, 3), (-8, -2), (20, 14), (100, 0)])
def test_tensor_copies_have_zeros_outside_and_write_nothing_there(x, y):
    source, target = drawn(17, 36), torch.full((10, 40), 7.0)
    wide = torch.zeros(300, 300)
    wide[100:117, 100:136] = source
    want = wide[100 + y : 108 + y, 100 + x : 112 + x]
    seen = box(source, target, 8, 12, 0, (x, y), (32, 5))
    assert torch.equal(seen, want)
    expected = torch.full((10, 40), 7.0)
    expected[5:, 32:] = want[:5, :8]
    assert torch.equal(target, expected)


def test_swizzled_tensor_copies():
    source, target = drawn(24, 64), torch.zeros(24, 64)
    seen = box(source, target, 16, 32, 128, (32, 8), (0, 4))
    tile = source[8:, 32:].view(16, 8, 4)
    want = torch.stack([tile[row, torch.arange(8) ^ row % 8] for row in range(16)])
    assert torch.equal(seen.view(16, 8, 4), want)
    assert torch.equal(target[4:20, :32], source[8:, 32:])
    assert int(target.count_nonzero()) == 16 * 32


def test_tensor_copies_of_three_dimensions():
    source, target = drawn(4, 5, 8), torch.full((4, 5, 8), 7.0)
    maps = [raw(tensor_map(t, (2, 3, 8), swizzle=0)) for t in (source, target)]
    FILE["boxes_3d"](1, 32, *maps, 0, 3, 3)
    want = torch.full((4, 5, 8), 7.0)
    want[3:, 3:] = source[3:, 3:]
    assert torch.equal(target, want)


def test_tensor_copies_come_late():
    source, target = drawn(8, 32), torch.zeros(8, 32)
    assert torch.equal(box(source, target, 8, 32, 128, (0, 0), (0, 0), waits=0), torch.full((8, 32), -1.0))


def test_too_many_bytes_announced():
    with pytest.raises(KernelError, match=r"parity 0: 16 bytes missing"):
        box(drawn(8, 32), torch.zeros(8, 32), 8, 32, 128, (0, 0), (0, 0), bytes=8 * 32 * 4 + 16)


def test_too_few_bytes_announced():
    with pytest.raises(KernelError, match=r"16 bytes landed that nobody announced"):
        box(drawn(8, 32), torch.zeros(8, 32), 8, 32, 128, (0, 0), (0, 0), bytes=8 * 32 * 4 - 16)


def test_a_store_has_to_be_waited_for():
    target = torch.zeros(8, 32)
    m = raw(tensor_map(target, (8, 32)))
    with pytest.raises(KernelError, match="the block ends without a wait for this store"):
        FILE["store_unwaited"](1, 64, m, target)
    FILE["store_overwritten"](1, 64, 1, m, target)
    assert torch.equal(target, torch.ones(8, 32))
    FILE["store_overwritten"](1, 64, 0, m, target)
    assert target[0, 0] == 2


def test_tensor_maps_are_made_for_one_side():
    with pytest.raises(KernelError, match="not made for the processor"):
        FILE["store_unwaited"](1, 64, b"\0" * 128, torch.zeros(8, 32))


@pytest.mark.parametrize(
    ("tensor", "box", "swizzle", "error", "says"),
    [
        (torch.zeros(8), (8,), 0, ValueError, "2 or 3 dimensions"),
        (torch.zeros(8, 32), (8,), 0, ValueError, "box must be 2 ints"),
        (torch.zeros(8, 32), (8, 257), 0, ValueError, "from 1 to 256"),
        (torch.zeros(8, 32), (8, 16), 128, ValueError, "rows of 128 bytes"),
        (torch.zeros(8, 32), (8, 3), 0, ValueError, "multiple of 16 bytes, got 3 elements of 4 bytes: 12"),
        (torch.zeros(8, 33), (8, 32), 128, ValueError, "pad the rows to a multiple of 4"),
        (torch.zeros(32, 8).T, (8, 32), 128, ValueError, "without gaps"),
        (torch.zeros(260)[1:257].view(8, 32), (8, 32), 128, ValueError, "begin at a multiple of 16"),
        (torch.zeros(8, 32), (8, 32), 64, ValueError, "swizzle must be 0 or 128"),
        (torch.zeros(8, 32, dtype=torch.complex64), (8, 16), 128, TypeError, "ordinary type"),
        ([1], (8, 16), 128, TypeError, "torch tensor"),
    ],
)
def test_what_the_hardware_does_not_take(tensor, box, swizzle, error, says):
    with pytest.raises(error, match=says):
        tensor_map(tensor, box, swizzle=swizzle)


def test_what_the_driver_is_asked():
    """The order of the arguments of cuTensorMapEncodeTiled: innermost dimension first."""
    asked = {}

    class Driver:
        class cuTensorMapEncodeTiled:
            def __new__(cls, where, *args):
                asked["where"], asked["args"] = where.value, args
                ctypes.memset(where, 0x5A, 128)
                return asked.get("status", 0)

    t = torch.zeros(4, 6, 16, dtype=torch.bfloat16)
    assert _encoded_by_driver(tensor_map(t, (2, 3, 16), swizzle=0), Driver()) == b"\x5a" * 128
    assert asked["where"] % 64 == 0
    kind, dims, address, size, strides, box, steps, interleave, swizzle, promotion, fill = asked["args"]
    assert (kind.value, dims.value, address.value) == (9, 3, t.data_ptr())
    assert [list(x) for x in (size, strides, box, steps)] == [[16, 6, 4], [32, 192], [16, 3, 2], [1, 1, 1]]
    assert [x.value for x in (interleave, swizzle, promotion, fill)] == [0, 0, 3, 0]
    asked["status"] = 1
    with pytest.raises(RuntimeError, match=r"refused a tensor of shape \(4, 6, 16\).*CUDA error 1"):
        _encoded_by_driver(tensor_map(t, (2, 3, 16), swizzle=0), Driver())
    with pytest.raises(RuntimeError, match="CUDA 12"):
        _encoded_by_driver(tensor_map(t, (2, 3, 16), swizzle=0), object())


# --- wgmma ---


@pytest.mark.parametrize(
    ("kernel", "n", "dtype", "a_by_columns", "b_by_rows"),
    [
        ("64", 64, torch.float16, False, False),
        ("128", 128, torch.bfloat16, False, False),
        ("256", 256, torch.float16, False, False),
        ("64_columns_rows", 64, torch.bfloat16, True, True),
        ("128_columns", 128, torch.float16, True, False),
        ("256_rows", 256, torch.bfloat16, False, True),
    ],
)
def test_wgmma_multiplies_what_tensor_copies_bring(kernel, n, dtype, a_by_columns, b_by_rows):
    k = 192
    a, b, c = drawn(64, k, dtype=dtype), drawn(k, n, dtype=dtype, seed=1), torch.zeros(64, n)
    laid_a = a.T.contiguous() if a_by_columns else a
    laid_b = b if b_by_rows else b.T.contiguous()
    maps = raw(tensor_map(laid_a, (64, 64))), raw(tensor_map(laid_b, (64 if b_by_rows else n, 64)))
    FILE[f"product_{kernel}"](1, 128, *maps, k, 1, c, laid_a, laid_b)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_producer_and_two_warpgroups(order):
    k = 320
    a, b, c = drawn(128, k, dtype=torch.float16), drawn(64, k, dtype=torch.float16, seed=1), torch.zeros(128, 64)
    maps = raw(tensor_map(a, (128, 64))), raw(tensor_map(b, (64, 64)))
    FILE["specialised"](1, 384, *maps, k, 1, c, a, b, shared=2 * 192 * 128, order=order)
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-4, atol=1e-4)


def findings_of(kernel, block, *args, shared=0):
    """As check, but the tensors are not copied: a tensor map says where they are."""
    from mlsys.kernels.cuda import _processor

    lines, reader = FILE[kernel]._run((1, 1, 1), (block, 1, 1), args, shared, 0, 1, 60.0, _processor.CHECK)
    return reader().read(lines)


def test_the_checker_follows_tensor_copies_and_wgmma():
    k = 320
    a, b, c = drawn(128, k, dtype=torch.float16), drawn(64, k, dtype=torch.float16, seed=1), torch.zeros(128, 64)
    maps = raw(tensor_map(a, (128, 64))), raw(tensor_map(b, (64, 64)))
    assert findings_of("specialised", 384, *maps, k, 1, c, a, b, shared=2 * 192 * 128) == []
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-4, atol=1e-4)
    findings = findings_of("specialised", 384, *maps, k, 0, c, a, b, shared=2 * 192 * 128)
    assert [f.kind for f in findings] == ["misuse"]  # the ring is full, and the producer arrives once more
    assert "mbarrier_arrive_expect_tx(&full[at]" in findings[0].source


def test_wgmma_without_waiting_for_its_factors():
    a, b, c = drawn(64, 64, dtype=torch.float16), drawn(64, 64, dtype=torch.float16, seed=1), torch.zeros(64, 64)
    maps = raw(tensor_map(a, (64, 64))), raw(tensor_map(b, (64, 64)))
    assert findings_of("product_64", 128, *maps, 64, 1, c, a, b) == []
    findings = findings_of("product_64", 128, *maps, 64, 0, c, a, b)
    assert "not-waited-for" in {f.kind for f in findings}
    FILE["product_64"](1, 128, *maps, 64, 0, c, a, b)
    assert not torch.allclose(c, a.float() @ b.float().T, atol=1e-2)


def test_wgmma_adds_when_it_is_waited_for():
    c = torch.full((256,), 5.0)
    FILE["read_too_early"](1, 128, c)
    assert c.tolist() == [0.0] * 128 + [16.0] * 128


def test_wgmma_is_done_by_128_threads_alike():
    with pytest.raises(KernelError, match="do not agree"):
        FILE["disagreeing"](1, 128, torch.zeros(256))
    with pytest.raises(KernelError, match="128 threads"):
        FILE["read_too_early"](1, 96, torch.zeros(256))


# --- groups ---


@pytest.mark.parametrize("size", [1, 4, 16, 32])
def test_tiles(size):
    x = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(size)).int()
    y = torch.zeros(8, 64, dtype=torch.int32)
    GROUPS[f"tiles_{size}"](1, (8, 4, 2), x, y)
    tiles = x.view(-1, size)
    each = torch.arange(64 // size)
    bits = (tiles % 3 == 0).long() @ (1 << torch.arange(size))
    rows = [
        tiles.sum(1), tiles.max(1).values, tiles.sum(1), (bits - (bits >> 31 << 32)), tiles[:, [0, *range(size - 1)]],
        tiles[each, each % size], (tiles > 90).any(1) * 2 + (tiles > 3).all(1), tiles.cumsum(1),
    ]  # fmt: skip
    for got, want in zip(y, rows, strict=True):
        want = want if want.dim() == 2 else want[:, None].expand(-1, size)
        assert torch.equal(got, want.reshape(-1).int())
    assert check(GROUPS[f"tiles_{size}"], 1, 64, x, y) == []


def test_lanes_that_come_together():
    total, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    GROUPS["coalesced"](1, 64, total, y)
    assert total.item() == 32
    counts = y - 32000
    assert (counts[::2] == -1).all()
    assert sorted(counts[1::2].tolist()) == list(range(32))


def test_a_tile_of_which_the_other_half_has_returned():
    y = torch.zeros(32, dtype=torch.int32)
    GROUPS["half_a_warp"](1, 32, y)
    assert y.tolist() == [min(i + 3, i if i > 12 else i + 3) for i in range(16)] + [0] * 16


def test_ranks_in_the_grid():
    y = torch.zeros(6, 32, dtype=torch.int64)
    GROUPS["ranks"]((3, 2), 32, y)
    assert torch.equal(y, (192000 + torch.arange(6) % 3)[:, None].expand(6, 32))
