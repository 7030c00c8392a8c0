"""Matmul in Triton: values and gradients beside float64 and beside plain low precision, guarded memory, refusals.

Where there is no GPU, Triton's interpreter runs the kernels, a tile in some milliseconds: shapes are small.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mlsys.contracts import check, find
from mlsys.kernels import _matmul_triton_launch, matmul, matmul_triton
from mlsys.kernels._matmul_triton_kernels import place
from mlsys.kernels._triton import INTERPRETED, at, config
from mlsys.kernels.matmul_triton import VARIANTS
from mlsys.loading import import_file

Fences = import_file(Path(__file__).with_name("guards.py")).Fences
DEVICE = "cpu" if INTERPRETED.value else "cuda"
SMALL = config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=2, warps=4, stages=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "": ({}, lambda z: z),
    "relu": ({"activation": "relu"}, torch.relu),
    "silu": ({"activation": "silu"}, F.silu),
    "gelu": ({"activation": "gelu"}, F.gelu),
    "gelu tanh": ({"activation": "gelu", "approximate": "tanh"}, partial(F.gelu, approximate="tanh")),
}


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def factors(m, n, k, dtype=torch.float32, seed=0):
    """a, b and bias; sums are of the size of one, where an activation bends."""
    a, b, bias = (numbers(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(((m, k), (k, n), (n,))))
    return a, b / math.sqrt(max(k, 1)), bias


def both(function, inputs, dy):
    """The result and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    c = function(*leaves)
    return [c.detach(), *torch.autograd.grad(c, leaves, dy.to(c.dtype))]


def plain(activation):
    return lambda a, b, bias: ACTIVATIONS[activation][1](a @ b + bias)


def close(got, want, tolerance=3e-6):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        scale = w.double().abs().max().clamp(min=1) if w.numel() else 1
        assert not w.numel() or (g.double() - w.double()).abs().max() <= tolerance * scale


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [None, SMALL], ids=str)
@pytest.mark.parametrize("variant", ["tiled", "persistent"])
def test_the_contract_of_matmul(variant, one):
    verdict = check(find("kernels.matmul"), partial(matmul_triton.matmul, variant=variant, config=one), device=DEVICE)
    assert verdict.passed, str(verdict)


def test_the_contract_of_matmul_where_rows_begin_at_multiples_of_16_bytes():
    contract = find("kernels.matmul")
    sizes = [{**case, **{name: -(-case[name] // 8) * 8 for name in "mnk"}} for case in contract.cases]
    one = partial(matmul_triton.matmul, variant="descriptor", config=SMALL)
    verdict = check(replace(contract, cases=sizes), one, device=DEVICE)
    assert verdict.passed, str(verdict)


# --- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    m=st.integers(0, 40), n=st.integers(0, 70), k=st.integers(0, 40), variant=st.sampled_from(["tiled", "persistent"]),
    activation=st.sampled_from(list(ACTIVATIONS)), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_with_any_epilogue(m, n, k, variant, activation, biased, seed):
    a, b, bias = factors(m, n, k, seed=seed)
    inputs = [a, b, bias][: 2 + biased]
    dy = numbers(m, n, seed=seed + 7)
    options = ACTIVATIONS[activation][0] | {"variant": variant, "config": SMALL}
    got = both(partial(matmul_triton.matmul, **options), inputs, dy)
    want = both(
        lambda a, b, bias=None: ACTIVATIONS[activation][1](a @ b if bias is None else a @ b + bias),
        [x.double() for x in inputs], dy,
    )  # fmt: skip
    close(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_more_than_twice_the_error_of_plain_torch_in_that_dtype(variant, dtype, activation):
    m, n, k = (72, 120, 96) if variant == "descriptor" else (5, 123, 123)
    inputs, dy = factors(m, n, k, dtype), numbers(m, n, dtype=dtype, seed=9)
    want = both(plain(activation), [x.double() for x in inputs], dy)
    allowed = both(plain(activation), inputs, dy)
    options = ACTIVATIONS[activation][0] | {"variant": variant}
    got = both(partial(matmul_triton.matmul, **options), inputs, dy)
    for g, a, w, name in zip(got, allowed, want, ("c", "da", "db", "dbias"), strict=True):
        assert g.dtype == dtype
        error, baseline = ((x.double() - w).abs().max().item() for x in (g, a))
        assert error <= 2 * baseline + 4e-7 * w.abs().max().item(), name


def test_sums_are_rounded_once():
    """In bfloat16 a sum of ones stops growing at 256."""
    a, b = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((3, 1000), (1000, 8)))
    for variant in VARIANTS:
        assert (matmul_triton.matmul(a, b, variant=variant) == 1000).all()


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transposed_views_are_read_as_they_are_and_their_gradients_lie_as_they_do(variant, layout):
    m, n, k = 40, 24, 56
    a, b = (
        numbers(columns, rows, seed=i).mT if how == "t" else numbers(rows, columns, seed=i)
        for i, (how, rows, columns) in enumerate(zip(layout, (m, k), (k, n), strict=True))
    )
    dy = numbers(m, n, seed=2)
    got = both(partial(matmul_triton.matmul, variant=variant, config=SMALL), [a, b], dy)
    close(got, both(torch.matmul, [a.double(), b.double()], dy))
    assert [x.stride() for x in got[1:]] == [a.stride(), b.stride()]


@pytest.mark.parametrize("variant", ["tiled", "persistent"])
def test_any_strides_will_do(variant):
    x = numbers(40, 50)
    views = x[::2, 3:20], x.t()[::3, 1::2], x[:1].expand(9, 50), x[:, :1].expand(40, 9), x.as_strided((7, 9), (1, 2))
    for a in views:
        b = numbers(a.shape[1], 2 * 21)[:, ::2]
        dy = numbers(1, 21).expand(len(a), 21)
        bias = numbers(42)[::2]
        before = x.clone()
        options = {"variant": variant, "config": SMALL, "activation": "silu"}
        got = both(partial(matmul_triton.matmul, **options), [a, b, bias], dy)
        close(got, both(plain("silu"), [a.double(), b.double(), bias.double()], dy))
        assert torch.equal(x, before)


def test_descriptors_of_padded_rows_and_a_gradient_that_begins_between():
    """Rows of 13 numbers, 16 apart: k and what is beyond it, which is NaN, are told apart by the descriptor."""
    a, b = numbers(24, 16), numbers(32, 16).mT
    a[:, 13:], b[13:] = math.nan, math.nan
    dy = numbers(24 * 32 + 1)[1:].view(24, 32)
    got = both(partial(matmul_triton.matmul, variant="descriptor", config=SMALL), [a[:, :13], b[:13]], dy)
    close(got, both(torch.matmul, [a[:, :13].double(), b[:13].double()], dy))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_expanded(variant):
    a, b, bias = factors(16, 24, 8)
    leaves = [x.detach().requires_grad_() for x in (a, b, bias)]
    matmul_triton.matmul(*leaves, variant=variant).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    (wide[0] @ wide[1] + wide[2]).sum().backward()
    close([x.grad for x in leaves], [x.grad for x in wide])


def test_only_the_gradients_that_are_wanted():
    a, b, bias = factors(9, 8, 7)
    for wanted in (a, b, bias):
        leaf = wanted.detach().requires_grad_()
        given = [leaf if x is wanted else x for x in (a, b, bias)]
        (got,) = torch.autograd.grad(matmul_triton.matmul(*given, activation="relu").sum(), leaf)
        (want,) = torch.autograd.grad(torch.relu(given[0] @ given[1] + given[2]).sum(), leaf)
        close([got], [want])


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu tanh"])
def test_activations_far_out_and_of_nan(activation):
    """Where exponentials overflow, at zero, and at infinity; 0 · NaN is NaN."""
    z = torch.tensor([-3e38, -1e4, -90.0, -20.0, -6.0, -1e-20, -0.0, 0.0, 1e-20, 6.0, 90.0, 1e4, math.inf, math.nan])
    z = z.to(DEVICE)[None]
    one = torch.ones(1, 1, device=DEVICE)
    options, function = ACTIVATIONS[activation]
    got, _, slope = both(partial(matmul_triton.matmul, **options), [one, z], torch.ones_like(z))
    leaf = z.double().requires_grad_()
    want = function(leaf)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=2e-6, equal_nan=True)
    finite = z.isfinite() & (z.abs() < 1e5)  # at infinity a derivative may be ∞ · 0
    (wanted,) = torch.autograd.grad(want, leaf, torch.ones_like(want))
    torch.testing.assert_close(slope[finite].double(), wanted[finite], rtol=2e-6, atol=2e-6)


def test_nan_spreads_along_its_row_and_column_only():
    a, b, _ = factors(40, 48, 24)
    a[3, 5], b[7, 40] = math.nan, math.inf
    for variant in VARIANTS:
        got = matmul_triton.matmul(a, b, variant=variant, config=SMALL)
        want = a @ b
        assert torch.equal(got.isnan(), want.isnan())
        close([got.nan_to_num(posinf=0, neginf=0)], [want.nan_to_num(posinf=0, neginf=0)])


def test_tf32_is_taken_where_it_is_asked_for():
    """Under the interpreter it is float32 too; compiled, "ieee" has no tensor cores, as the compile check shows."""
    a, b, _ = factors(16, 24, 40)
    close([matmul_triton.matmul(a, b, precision="tf32")], [a @ b], 1e-2)


def test_the_same_inputs_give_the_same_bits():
    a, b, bias = factors(50, 70, 123, torch.bfloat16)
    dy = numbers(50, 70, dtype=torch.bfloat16)
    function = partial(matmul_triton.matmul, activation="gelu", variant="persistent", config=SMALL)
    first, second = (both(function, [a, b, bias], dy) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_three_walks_compute_the_same_bits():
    a, b, bias = factors(72, 120, 96, torch.bfloat16)
    got = [matmul_triton.matmul(a, b, bias, activation="gelu", variant=v, config=SMALL) for v in VARIANTS]
    assert all(torch.equal(x, got[0]) for x in got)


# --- the order of tiles -----------------------------------------------------------------------------------------------


@triton.jit
def _places(out, down, along, GROUP: tl.constexpr):
    i, j = place(tl.program_id(0), down, along, GROUP)
    tl.store(out + tl.program_id(0) * 2, i)
    tl.store(out + tl.program_id(0) * 2 + 1, j)


@settings(max_examples=20)
@given(down=st.integers(1, 9), along=st.integers(1, 6), group=st.integers(1, 10))
def test_every_tile_is_taken_once_whatever_the_group(down, along, group):
    out = torch.full((down * along, 2), -1, dtype=torch.int32, device=DEVICE)
    with at(out.device):
        _places[(down * along,)](out, down, along, GROUP=group)
    assert sorted(map(tuple, out.tolist())) == [(i, j) for i in range(down) for j in range(along)]


def test_the_order_of_tiles_is_that_of_the_picture():
    out = torch.empty((30, 2), dtype=torch.int32, device=DEVICE)
    with at(out.device):
        _places[(30,)](out, 5, 6, GROUP=2)
    begins = tuple(f"{number:6}" for number in (0, 1, 12, 13, 24))
    rows = [line.split()[:6] for line in matmul_triton.__doc__.splitlines() if line.startswith(begins)]
    picture = [[int(x) for x in row] for row in rows]
    assert [picture[i][j] for i, j in out.tolist()] == list(range(30))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(5, 41, 23), (33, 64, 16)])
def test_nothing_beyond_the_tensors_is_read_or_written(variant, sizes, dtype):
    """A load beyond an input would bring a NaN into a sum, a store beyond a result a fence would show."""
    m, n, k = (-(-size // 8) * 8 for size in sizes) if variant == "descriptor" else sizes
    given, dy = factors(m, n, k, dtype), numbers(m, n, dtype=dtype, seed=5)
    options = {"variant": variant, "config": SMALL}
    with Fences() as fences:
        a, b, bias = (fences.around(x) for x in given)
        got = both(partial(matmul_triton.matmul, activation="gelu", **options), [a, b, bias], fences.around(dy))
    want = both(plain("gelu"), [x.double() for x in given], dy)
    close(got, want, 3e-6 if dtype == torch.float32 else 1e-2)


AT_THE_EDGE = """
import ctypes, mmap, torch
from mlsys.kernels import matmul_triton
from mlsys.kernels._triton import config

def last(x):  # a copy that ends where a page ends, behind which nothing may be read
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape)
    return copy.copy_(x)

small = config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=2)
for variant, (m, n, k) in {'tiled': (5, 41, 23), 'persistent': (33, 7, 16), 'descriptor': (24, 40, 24)}.items():
    a, b, bias, dy = (last(torch.randn(shape)) for shape in ((m, k), (k, n), (n,), (m, n)))
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    c = matmul_triton.matmul(*leaves, activation='silu', variant=variant, config=small)
    torch.autograd.grad(c, leaves, dy)
    print(variant)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's memory")
def test_no_address_behind_an_input_is_read_not_even_for_lanes_that_are_not_stored():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, list(VARIANTS)), done.stderr


def test_no_gradient_no_second_result(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda *size, **how: made.append(size) or torch.zeros(*size, **how))
    a, b, bias = factors(4, 5, 6)
    matmul_triton.matmul(a, b, bias, activation="gelu")
    assert made == [(4, 5)]
    made.clear()
    matmul_triton.matmul(a.requires_grad_(), b, bias, activation="relu")
    assert made == [(4, 5)]
    matmul_triton.matmul(a, b, bias, activation="gelu")
    assert made == [(4, 5)] * 3


# --- the family, tuning, and what is compiled -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_family_knows_it_with_its_gradient(variant):
    a, b, _ = factors(16, 24, 8)
    leaf = a.requires_grad_()
    got = matmul(leaf, b, variant=f"triton.{variant}")
    close([got.detach()], [(a @ b).detach()])
    assert got.requires_grad


def test_configs_have_no_more_rows_than_are_needed():
    for variant in VARIANTS:
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
            for m in (1, 16, 17, 100, 5000):
                found = matmul_triton.configs(variant, dtype, precision, m)
                assert found
                assert len(set(found)) == len(found)
                assert max(one["BLOCK_M"] for one in found) <= max(64, 2 * m)
            assert matmul_triton.configs(variant, dtype, precision, 5000)[0]["BLOCK_M"] >= 64
            behind = matmul_triton.configs(variant, dtype, precision, 5000, "gelu")
            assert behind
            assert set(behind) <= set(matmul_triton.configs(variant, dtype, precision, 5000))


def test_every_kernel_has_specimens_of_every_config_and_dtype():
    found = matmul_triton.specimens()
    assert len({(one.name, one.config) for one in found}) == len(found)
    for variant in VARIANTS:
        for short, dtype, precision in (
            ("bf16", torch.bfloat16, "ieee"), ("fp16", torch.float16, "ieee"), ("fp32", torch.float32, "ieee"),
            ("fp32 tf32", torch.float32, "tf32"),
        ):  # fmt: skip
            compiled = {str(one.config) for one in found if one.name == f"matmul.{variant} {short}"}
            known = {str(one) for m in (1, 32, 5000) for one in matmul_triton.configs(variant, dtype, precision, m)}
            assert compiled == known


def test_typical_calls_can_be_made():
    calls = dict(matmul_triton.typical(torch.device(DEVICE), torch.float32, (16, 24, 40)))
    assert [label.split()[0] for label in calls] == list(VARIANTS)
    for call in calls.values():
        call()
    assert len(dict(matmul_triton.typical(torch.device(DEVICE), torch.float32, (5, 7, 9)))) == 2
    with pytest.raises(ValueError, match="it must be m, n and k"):
        list(matmul_triton.typical(torch.device(DEVICE), torch.float32, (3, 4)))


# --- what is refused --------------------------------------------------------------------------------------------------

X = torch.zeros(8, 8, device=DEVICE)
REFUSED = {
    "float64": ((X.double(), X.double()), {}, TypeError, r"takes float32, bfloat16 or float16, and a is torch.float64"),
    "mixed": ((X, X.bfloat16()), {}, TypeError, "a and b must have one dtype, got torch.float32 and torch.bfloat16"),
    "bias": ((X, X, X[0].half()), {}, TypeError, "bias must have a's dtype torch.float32, got torch.float16"),
    "bias shape": ((X, X, X[0, :3]), {}, ValueError, r"bias must have the shape \(8,\), got \(3,\)"),
    "shapes": ((X, X[:5]), {}, ValueError, r"as many columns as b has rows, got \(8, 8\) and \(5, 8\)"),
    "device": ((X, X.to("meta")), {}, ValueError, "a and b must be on one device, got .* and meta"),
    "bias device": ((X, X, X[0].to("meta")), {}, ValueError, "bias must be on a's device .*, got meta: move it"),
    "meta": ((X.to("meta"), X.to("meta")), {}, ValueError, "a must be on a CUDA device, got meta: move it, or use "),
    "variant": ((X, X), {"variant": "tma"}, ValueError, "variant must be one of tiled, persistent, descriptor, got"),
    "activation": ((X, X), {"activation": "tanh"}, ValueError, "activation must be None or one of relu, gelu, silu"),
    "approximate": ((X, X), {"approximate": "erf"}, ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
    "of what": ((X, X), {"approximate": "tanh"}, ValueError, "approximate is of the GELU, and activation is None"),
    "precision": ((X, X), {"precision": "bf16"}, ValueError, "precision must be \"ieee\" or \"tf32\", got 'bf16'"),
    "tf32": ((X.half(), X.half()), {"precision": "tf32"}, ValueError, "of float32 factors, and a is torch.float16"),
    "config": ((X, X), {"config": 3}, TypeError, "config must be a Config or None, got int"),
    "pitch": ((X[:, :5].contiguous(), X[:5]), {"variant": "descriptor"}, ValueError,
              r"the rows of a, or its columns, must be contiguous and begin at multiples of 16 bytes, got shape "
              r"\(8, 5\) and strides \(5, 1\) in torch.float32: pad them, or take 'persistent'"),
    "begin": ((X, X.flatten()[1:33].view(8, 4)), {"variant": "descriptor"}, ValueError, "the rows of b, or its co"),
    "result": ((X, X.mT[:, :3]), {"variant": "descriptor"}, ValueError, "rows of the result .*, got 3 numbers of"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(name):
    inputs, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        matmul_triton.matmul(*inputs, **options)


def test_a_size_that_an_index_cannot_hold_is_refused():
    a = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1)
    with pytest.raises(ValueError, match=r"sizes are ints of 32 bits, .*: split the matrices"):
        matmul_triton.matmul(a, torch.zeros(1, 1, device=DEVICE))


@pytest.mark.usefixtures("unchecked_types")
def test_tma_is_refused_where_the_gpu_has_none(monkeypatch):
    class OnGpu:
        device, dtype, shape = torch.device("cuda:0"), torch.bfloat16, (8, 8)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert matmul_triton.refuse(OnGpu(), OnGpu(), variant="descriptor") == (
        "TMA needs compute capability 9.0, this GPU has 8.0: take 'persistent'"
    )
    assert matmul_triton.refuse(OnGpu(), OnGpu(), variant="persistent") is None


def test_no_second_derivative_is_said_not_silent():
    a, b, _ = factors(4, 5, 6)
    with pytest.raises(RuntimeError, match="the Triton matmul is differentiable once, and create_graph=True asks"):
        torch.autograd.grad(matmul_triton.matmul(a.requires_grad_(), b).sum(), a, create_graph=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_on_a_cpu_without_the_interpreter_the_error_says_what_to_do():
    code = (
        "import torch; from mlsys.kernels import matmul; x = torch.zeros(8, 8)\n"
        "for variant in ('tiled', 'persistent', 'descriptor'):\n"
        "    try: matmul(x, x, variant=f'triton.{variant}')\n"
        "    except RuntimeError as error: print(error)\n"
    )
    kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=True)
    line, *others = done.stdout.splitlines()
    assert others == [line] * 2
    assert line == (
        "a is on a CPU, where Triton kernels run under Triton's interpreter only: set TRITON_INTERPRET=1 before "
        "Python starts, or use mlsys.kernels.matmul"
    )


def test_launches_are_of_the_size_that_they_say(monkeypatch):
    """A program a tile, or at most one a multiprocessor."""
    grids = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for variant, kernel in _matmul_triton_launch.KERNELS.items():
        monkeypatch.setitem(_matmul_triton_launch.KERNELS, variant, Recorded(kernel))
    a, b, _ = factors(40, 70, 24)
    for variant in ("tiled", "persistent"):
        matmul_triton.matmul(a, b, variant=variant, config=SMALL)
    processors = _matmul_triton_launch.multiprocessors(a.device)
    assert grids == [(9,), (min(9, processors),)]
