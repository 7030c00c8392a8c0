"""`mlsys.kernels.matmul` and its ladder `matmul_cuda`: any sizes, no finding of the checker, compiles where it says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mlsys.kernels
from mlsys.contracts.kernels import CONTRACTS
from mlsys.kernels import list_variants, matmul_cuda, select
from mlsys.kernels._variants import Family, Variant
from mlsys.kernels.cuda import check, profile, source
from mlsys.kernels.matmul import FAMILY, chosen, matmul, tiled, traffic
from mlsys.kernels.matmul_cuda import LADDER, launch

RUNGS = list(LADDER)
SIZES = [(1, 1, 1), (5, 123, 77), (128, 128, 128), (129, 65, 33), (64, 257, 40), (200, 300, 410)]


def factors(m, n, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n))]


def assert_product(got, a, b):
    """Within the contract's tolerance of the float64 product."""
    contract = CONTRACTS["matmul"]
    assert contract.verify({"a": a, "b": b}, {"c": got}) is None


# --- the ladder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_computes_the_product_of_any_sizes(rung):
    for m, n, k in SIZES:
        a, b = factors(m, n, k, LADDER[rung].dtype)
        got = matmul_cuda.matmul(a, b, variant=rung)
        assert got.shape == (m, n)
        assert got.dtype == a.dtype
        assert_product(got, a, b)


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_has_no_mistake_that_the_checker_knows(rung):
    """Odd sizes with edges both ways; and for the pipelines more steps along k than they have stages."""
    for m, n, k in [(72, 136, 600), (200, 776, 40)] if rung == "hopper" else [(65, 129, 37), (33, 40, 200)]:
        a, b = factors(m, n, k, LADDER[rung].dtype)
        kernel, how, args = matmul_cuda.arguments(a, b, rung)
        assert check(kernel, how.grid, how.block, *args, shared=how.shared) == []


@pytest.mark.parametrize("rung", RUNGS)
def test_order_in_which_threads_run_does_not_matter(rung):
    a, b = factors(40, 72, 48, LADDER[rung].dtype)
    kernel, how, args = matmul_cuda.arguments(a, b, rung)
    results = []
    for order in (0, 1, 7):
        args[-1].tensor.fill_(9) if rung == "hopper" else args[-1].fill_(9)
        kernel(how.grid, how.block, *args, shared=how.shared, order=order)
        results.append((args[-1].tensor if rung == "hopper" else args[-1]).clone())
    assert_product(results[0], a, b)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("rung", ["vectorized", "warp_tiled"])
def test_sizes_that_are_multiples_of_the_tile_take_an_instance_without_bounds(rung):
    k = LADDER[rung].whole
    assert launch(LADDER[rung], 256, 128, k).instance.endswith("true>")
    for m, n, deep in [(255, 128, k), (256, 132, k), (256, 128, k + 4)]:
        assert launch(LADDER[rung], m, n, deep).instance.endswith("false>")


@pytest.mark.parametrize("rung", ["wmma", "mma"])
def test_float32_result_is_the_sum_before_its_rounding(rung):
    a, b = factors(37, 51, 90, torch.bfloat16)
    got = matmul_cuda.matmul(a, b, variant=rung, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=0, atol=1e-4)
    assert torch.equal(got.bfloat16(), matmul_cuda.matmul(a, b, variant=rung))


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_passes_nan_and_infinity_on(rung):
    a, b = factors(20, 36, 40, LADDER[rung].dtype)
    a[3, 5], a[4, 6], b[39, 35] = np.nan, np.inf, -np.inf
    assert_product(matmul_cuda.matmul(a, b, variant=rung), a, b)


@pytest.mark.parametrize("rung", ["coalesced", "warp_tiled", "mma", "hopper"])
def test_views_are_copied(rung):
    """Swapped axes, gaps between rows, a beginning at no multiple of 16 bytes."""
    dtype = LADDER[rung].dtype
    memory = factors(1, 1, 40 * 50 + 1, dtype)[0].flatten()
    views = memory[1:].view(40, 50), memory[:-1].view(50, 40).T, memory[:-1].view(40, 50)[:, ::2]
    for a in views:
        b = factors(1, 24, a.shape[1], dtype)[1]
        before = memory.clone()
        assert_product(matmul_cuda.matmul(a, b, variant=rung), a, b)
        assert torch.equal(memory, before)


@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_times_nothing(rung):
    for m, n, k in [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)]:
        a, b = factors(m, n, k, LADDER[rung].dtype)
        assert torch.equal(matmul_cuda.matmul(a, b, variant=rung), torch.zeros(m, n, dtype=a.dtype))


@given(m=st.integers(1, 3000), n=st.integers(1, 3000), k=st.integers(1, 100), rung=st.sampled_from(RUNGS))
def test_grid_covers_the_result_and_no_tile_more(m, n, k, rung):
    how = launch(LADDER[rung], m, n, k, multiprocessors=10**6)
    rows, columns = LADDER[rung].tile
    blocks = how.grid[0] * how.grid[1]
    assert blocks == len(range(0, m, rows)) * len(range(0, n, columns))
    assert how.block[0] * how.block[1] <= 1024
    assert how.block[0] % 32 == 0


def test_persistent_grid_has_a_block_for_each_multiprocessor_or_tile():
    assert launch(LADDER["hopper"], 8192, 8192, 64, multiprocessors=132).grid == (132, 1)
    assert launch(LADDER["hopper"], 128, 257, 64, multiprocessors=132).grid == (2, 1)


def test_default_is_the_last_rung_of_the_dtype():
    for dtype, rung in ((torch.float32, "warp_tiled"), (torch.bfloat16, "hopper")):
        a, b = factors(17, 40, 24, dtype)
        assert torch.equal(matmul_cuda.matmul(a, b), matmul_cuda.matmul(a, b, variant=rung))


TARGETS = {"wmma": ("sm_80", "sm_90a"), "mma": ("sm_80", "sm_90a"), "hopper": ("sm_90a",)}
COMPILED = [(rung, arch) for rung in RUNGS for arch in TARGETS.get(rung, ("sm_75", "sm_80", "sm_90a"))]


@pytest.mark.parametrize(("rung", "arch"), COMPILED)
def test_rung_compiles_for_a_gpu_without_spills(rung, arch):
    from mlsys.kernels.cuda import compile_report

    report = compile_report(f"matmul.{rung}", arch)
    assert report.warnings == ()  # such as that wgmma is serialised
    for kernel in report:
        assert kernel.spill_stores == kernel.spill_loads == kernel.stack == 0
    threads = LADDER[rung].block[0] * LADDER[rung].block[1]
    a, b = factors(128, 256, 64, LADDER[rung].dtype)
    instance = matmul_cuda.arguments(a, b, rung)[1].instance
    launched = next(kernel for kernel in report if kernel.kernel == instance)
    assert launched.max_threads >= threads


def test_every_file_of_the_ladder_is_a_rung():
    files = sorted(path.name.split(".")[1] for path in source("matmul.naive").parent.glob("matmul.*.cu"))
    assert files == sorted(RUNGS)
    for rung in RUNGS:
        assert source(f"matmul.{rung}").read_text(encoding="utf-8").startswith(f"// Rung {RUNGS.index(rung) + 1} of")


# --- what the headers of the files say --------------------------------------------------------------------------------


def counts(rung, m=128, n=128, k=32):
    a, b = factors(m, n, k, LADDER[rung].dtype)
    kernel, how, args = matmul_cuda.arguments(a, b, rung)
    return profile(kernel, how.grid, how.block, *args, shared=how.shared)


def test_coalescing_divides_sectors_as_the_header_says():
    naive, coalesced = counts("naive"), counts("coalesced")
    products = 128 * 128 * 32 // 32  # of a warp
    assert naive.sectors == products * 33 + 128 * 128
    assert coalesced.sectors == products * 5 + 128 * 128 // 8


@pytest.mark.parametrize("rung", RUNGS[2:])
def test_tiles_load_what_the_formula_says(rung):
    m, n, k = 256, 512, 64
    got = sum(32 * a.transactions for a in counts(rung, m, n, k).accesses if (a.space, a.kind) == ("global", "read"))
    assert got == LADDER[rung].dtype.itemsize * (traffic(m, n, k, *LADDER[rung].tile) - m * n)


@pytest.mark.parametrize(
    ("rung", "times"),
    [("tiled", 1), ("tiled_2d", 8), ("vectorized", 2), ("warp_tiled", 1), ("wmma", 1), ("hopper", 1)],
)
def test_sectors_of_c_are_stored_as_often_as_the_header_says(rung, times):
    m, n, k = 128, 256, 64
    got = sum(32 * a.transactions for a in counts(rung, m, n, k).accesses if (a.space, a.kind) == ("global", "write"))
    assert got == times * LADDER[rung].dtype.itemsize * m * n


@pytest.mark.parametrize("rung", RUNGS)
def test_arithmetic_is_that_of_the_formula(rung):
    m, n, k = 128, 256, 64
    assert counts(rung, m, n, k).flops == 2 * m * n * k


@pytest.mark.parametrize("rung", ["naive", "coalesced", "tiled", "tiled_1d", "warp_tiled", "mma", "hopper"])
def test_no_bank_conflicts_where_the_header_says_so(rung):
    assert counts(rung).conflicts == 0


@pytest.mark.parametrize("rung", ["tiled_2d", "vectorized"])
def test_bank_conflicts_where_the_header_says_so(rung):
    assert counts(rung).conflicts > 0


# --- the readable one, and its count ----------------------------------------------------------------------------------


@given(
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    k=st.integers(0, 40),
    blocks=st.tuples(*[st.integers(1, 17)] * 3),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_size_are_the_product(m, n, k, blocks, seed):
    a, b = factors(m, n, k, torch.float64, seed)
    got = tiled(a, b, **dict(zip(("block_m", "block_n", "block_k"), blocks, strict=True)))
    torch.testing.assert_close(got, a @ b, rtol=1e-12, atol=1e-12)


def test_tiles_in_bfloat16_are_rounded_once():
    a, b = (x.abs() for x in factors(8, 8, 2000, torch.bfloat16))
    torch.testing.assert_close(tiled(a, b), (a.double() @ b.double()).bfloat16(), rtol=2**-8, atol=0)


def test_tiled_has_a_gradient():
    a, b = (x.double().requires_grad_() for x in factors(7, 9, 11))
    assert torch.autograd.gradcheck(lambda a, b: tiled(a, b, block_m=4, block_n=4, block_k=3), (a, b))


def test_traffic_counts_loads_and_stores_of_the_loops():
    m, n, k, block_m, block_n = 100, 70, 30, 32, 16
    loaded = sum(
        min(block_m, m - i) * k + k * min(block_n, n - j) for i in range(0, m, block_m) for j in range(0, n, block_n)
    )
    assert traffic(m, n, k, block_m, block_n) == loaded + m * n
    assert traffic(8, 8, 8) == 2 * 8**3 + 64


# --- variants ---------------------------------------------------------------------------------------------------------


def test_variants_are_those_of_the_ladder_in_its_order():
    in_triton = [f"triton.{name}" for name in ("tiled", "persistent", "descriptor")]
    assert list_variants("matmul") == ["torch", "tiled", *(f"cuda.{rung}" for rung in RUNGS), *in_triton]
    assert all(variant.idea for variant in FAMILY.variants)


@pytest.mark.parametrize("variant", FAMILY.variants, ids=lambda v: v.name)
def test_every_variant_by_name(variant):
    rung = variant.name.removeprefix("cuda.")
    a, b = factors(17, 24, 40, LADDER[rung].dtype if variant.name.startswith("cuda.") else torch.float32)
    assert_product(matmul(a, b, variant=variant.name), a, b)


def test_module_can_be_called_and_imported_from():
    a, b = factors(3, 4, 5)
    assert torch.equal(mlsys.kernels.matmul(a, b), a @ b)
    assert torch.equal(mlsys.kernels.matmul.matmul(a, b), a @ b)
    assert "matmul" in dir(mlsys.kernels)
    with pytest.raises(AttributeError, match=r"no attribute 'matmull'; its families: .*matmul"):
        mlsys.kernels.matmull  # noqa: B018


def test_package_is_imported_without_torch():
    code = "import sys, mlsys.kernels; mlsys.kernels.families(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_auto_is_torch_on_a_cpu_and_says_why():
    a, b = factors(3, 4, 5)
    name, why = select("matmul", a, b)
    assert name == "torch"
    assert "CPU" in why
    assert chosen(a, b) == (name, why)


class OnGpu:
    """As much of a GPU's tensor as choosing looks at."""

    device, dtype, requires_grad = torch.device("cuda:0"), torch.bfloat16, False

    def __init__(self, numel):
        self._numel = numel

    def numel(self):
        return self._numel

    def element_size(self):
        return 2


def record(rung, impl, seconds, *, n=4096, gpu="NVIDIA H200", dtype="bfloat16", status="ok", device="cuda"):
    return {
        "benchmark": "kernels.matmul",
        "case": {"rung": rung, "n": n, "dtype": dtype},
        "impl": impl,
        "status": status,
        "seconds": seconds,
        "device": device,
        "bytes": 6.0 * n * n,
        "machine": {"gpu": gpu},
    }


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """What "auto" takes on a GPU, after these records."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    refused = lambda *tensors: "not here"  # noqa: E731
    family = Family(
        "matmul",
        tuple(
            Variant(n, n, len, *r) for n, *r in [("torch",), ("cuda.mma",), ("cuda.hopper",), ("cuda.wmma", refused)]
        ),
    )

    def run(*records, n=4096):
        folder = tmp_path / "results" / "machine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.matmul.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return family.choose(OnGpu(n * n), OnGpu(n * n), folders=(tmp_path / "results",))

    return run


def test_auto_on_a_gpu_is_the_fastest_that_was_measured_there(choose):
    torch_row, mma, hopper = (
        record("mma", "torch", 2.0),
        record("mma", "kernel", 3.0),
        record("hopper", "kernel", 1.0, status="noisy"),
    )
    assert choose(torch_row, mma, hopper).name == "cuda.hopper"
    assert choose(torch_row, mma).name == "torch"
    assert "3 measured on NVIDIA H200" in choose(torch_row, mma, hopper).why


def test_auto_leaves_out_what_was_not_measured_here_or_is_refused(choose):
    torch_row = record("mma", "torch", 2.0)
    others = [
        record("hopper", "kernel", 1.0, gpu="NVIDIA A100"),
        record("hopper", "kernel", 1.0, dtype="float32"),
        record("hopper", "kernel", 1.0, device="cpu"),
        record("hopper", "kernel", None, status="wrong"),
        record("wmma", "kernel", 1.0),
        record("gone", "kernel", 1.0),
    ]
    assert choose(torch_row, *others).name == "torch"
    assert choose(*others[:4]).why.startswith("no record of kernels.matmul in bfloat16 on NVIDIA H200")
    assert "mlsys bench kernels.matmul --device cuda --save" in choose().why


def test_auto_looks_at_the_nearest_size(choose):
    rows = [record("mma", "kernel", 1.0, n=512), record("mma", "torch", 2.0, n=512)]
    rows += [record("mma", "kernel", 9.0, n=8192), record("mma", "torch", 8.0, n=8192)]
    assert choose(*rows, n=600).name == "cuda.mma"
    assert choose(*rows, n=7000).name == "torch"


# --- bad input --------------------------------------------------------------------------------------------------------

A, B = torch.zeros(3, 4), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (A.tolist(), B, TypeError, "a must be a torch tensor, got list"),
        (A, B[0], ValueError, r"b must be a matrix, got shape \(5,\)"),
        (A[None], B, ValueError, r"a must be a matrix, got shape \(1, 3, 4\): flatten"),
        (A.int(), B.int(), TypeError, "a must be float32, .* got torch.int32"),
        (A, B.double(), TypeError, r"one dtype, got torch.float32 and torch.float64: give b.to\(torch.float32\)"),
        (A, B.T, ValueError, r"\(3, 4\) and \(5, 4\): 4 and 5; b.mT would fit"),
        (A, torch.zeros(5, 6), ValueError, r"\(3, 4\) and \(5, 6\): 4 and 5$"),
        (A.to_sparse(), B, TypeError, r"a must be dense, .* give a.to_dense\(\)"),
        (A, torch.zeros(4, 5, device="meta"), ValueError, "on one device, got cpu and meta: give b.to"),
    ],
)
def test_bad_factors_are_named(a, b, error, words):
    for function in (matmul, chosen, tiled, matmul_cuda.matmul):
        with pytest.raises(error, match=words):
            function(a, b)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"variant must be auto or one of torch, tiled, cuda.naive, .*got 'cuda.tild'"):
        matmul(A, B, variant="cuda.tild")
    with pytest.raises(TypeError, match="variant must be a name, got 3"):
        matmul(A, B, variant=3)
    with pytest.raises(ValueError, match=r"variant must be one of naive, .*got 'torch'"):
        matmul_cuda.matmul(A, B, variant="torch")
    with pytest.raises(ValueError, match=r"family must be one of .*matmul.*got 'matmull'"):
        list_variants("matmull")
    with pytest.raises(ValueError, match="block_n must be a positive int, got 0"):
        tiled(A, B, block_n=0)
    with pytest.raises(ValueError, match="m, n and k must be at least 0, got 3, -1, 2"):
        traffic(3, -1, 2)
    with pytest.raises(ValueError, match="empty, got shapes"):
        matmul_cuda.arguments(A[:0], B, "naive")


def test_what_a_rung_cannot_do_is_said_with_what_can():
    with pytest.raises(
        ValueError, match=r"'cuda.mma' cannot compute this: it takes torch.bfloat16, and a is torch.float32"
    ):
        matmul(A, B, variant="cuda.mma")
    with pytest.raises(ValueError, match="take one of naive, coalesced"):
        matmul_cuda.matmul(A, B, variant="hopper")
    with pytest.raises(ValueError, match=r"no gradient: give a.detach\(\)"):
        matmul(A.clone().requires_grad_(), B, variant="cuda.naive")
    with pytest.raises(TypeError, match="a must be float32 or bfloat16"):
        matmul_cuda.matmul(A.double(), B.double())
    with pytest.raises(ValueError, match=r"out_dtype must be torch.float32 for variant 'naive', got torch.float64"):
        matmul_cuda.matmul(A, B, variant="naive", out_dtype=torch.float64)
    with pytest.raises(ValueError, match="more than a grid has: split the matrices"):
        launch(LADDER["coalesced"], 10**6, 1, 1)
    with torch.no_grad():
        matmul(A.clone().requires_grad_(), B, variant="cuda.naive")
