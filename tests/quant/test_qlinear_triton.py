"""The Triton kernels for codes: values beside float64, exact sums of integers, any shape, guarded memory, refusals."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.kernels import _triton
from mlsys.kernels._triton import config
from mlsys.loading import import_file
from mlsys.quant import QuantizedTensor, Scheme, explain, prepare, qlinear, qlinear_triton, quantize
from mlsys.quant.qlinear import round_rows
from mlsys.quant.qlinear_triton import configs

Fences = import_file(Path(__file__).parent.parent / "kernels" / "guards.py").Fences
DEVICE = "cpu" if _triton.INTERPRETED.value else "cuda"
# groups of a power of two, of 16 times 3, of what no step divides, of an odd number, of a row, of all
SCHEMES = [
    "int4:g128", "int4:g32:sym", "int4:g16:fp16", "int4:g48", "int4:g24:sym:bf16", "int4:g7", "int4", "int4:tensor:sym",
    "int8", "int8:affine", "int8:g64:affine:fp16", "int8:g7", "int8:tensor",
]  # fmt: skip
SMALL = (
    config(BLOCK_N=4, BLOCK_G=1, SPLIT=2, warps=1, stages=1),  # of gemv
    config(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, SPLIT=3, warps=1, stages=1),
    config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, SPLIT=1, warps=1, stages=1),
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(n, k, scheme, seed=0):
    return quantize(normal(n, k, seed=seed) + 0.2, scheme).to(DEVICE)


def allowed(scheme, rows, *, rounded=False):
    """Of the small settings those that this call may take: `gemv` needs spans of 16 columns at least, and float x."""
    few = rows <= 8 and not rounded and "g7" not in scheme and "g24" not in scheme
    return SMALL if few else SMALL[1:]


def no_worse(got, plain, want, x, w, dtype):
    """An error at most twice that of a plain product in this dtype; sums of float32 may come in another order."""
    floor = 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ w.double().abs().T).max()
    floor += torch.finfo(dtype).eps / 2 * want.abs().max()
    assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max() + floor


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_products_are_no_worse_than_plain_ones(scheme, dtype):
    for m, n, k in ((1, 37, 130), (3, 5, 333), (19, 17, 128)):
        q, x, bias = weight(n, k, scheme), normal(m, k, seed=1).to(dtype).to(DEVICE), normal(n, seed=2).to(DEVICE)
        w = q.dequantize()
        want = x.double() @ w.double().T + bias.double()
        plain = ((x @ w.to(dtype).T).float() + bias).to(dtype)
        for one in allowed(scheme, m):
            got = qlinear_triton.qlinear(x, q, bias, config=one)
            assert (got.shape, got.dtype) == ((m, n), dtype)
            no_worse(got, plain, want, x, w.abs() + w.abs().max(), dtype)


@pytest.mark.parametrize("k", [256, 300, 1024])
def test_sums_of_int8_are_exact(k):
    q = weight(19, k, "int8")
    for m in (1, 17):
        x = normal(m, k, seed=m).to(DEVICE)
        codes, t = round_rows(x.cpu())
        exact = codes.long() @ q.codes.cpu().view(torch.int8).long().T
        want = exact.float() * (t * q.scale.cpu().T)
        for one in SMALL[1:]:
            got = qlinear_triton.qlinear(x, q, activations="int8", config=one)
            assert torch.equal(
                got.cpu(), want
            )  # the same bits: one rounding of each sum, one of each scale, one of both
        one = dataclasses.replace(q, scale=torch.ones_like(q.scale))
        whole = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m)).float().to(DEVICE)
        whole[:, 0] = 127  # a step of 1
        got = qlinear_triton.qlinear(whole, one, activations="int8").cpu()
        exact = whole.long().cpu() @ q.codes.cpu().view(torch.int8).long().T
        assert int(exact.abs().max()) < 1 << 24  # that far float32 is exact, too
        assert torch.equal(got.long(), exact)


def test_sums_of_a_long_row_need_all_of_int32():
    k = 1 << 17
    q = weight(1, k, "int8")
    q = dataclasses.replace(q, codes=torch.full_like(q.codes, 127), scale=torch.ones_like(q.scale))
    x = torch.full((1, k), 127.0, device=DEVICE)
    block = 8192 if DEVICE == "cpu" else 128  # the interpreter takes its time for each step
    one = config(BLOCK_M=16, BLOCK_N=16, BLOCK_K=block, SPLIT=2, warps=8, stages=1)
    assert float(qlinear_triton.qlinear(x, q, activations="int8", config=one)) == 127 * 127 * k
    longer = QuantizedTensor(
        torch.zeros(1, k + 8, dtype=torch.uint8), torch.ones(1, 1), None, (1, k + 8), Scheme("int8")
    )
    with pytest.raises(ValueError, match=f"sums of {k + 8} products do not fit into its 32 bits"):
        qlinear_triton.qlinear(torch.ones(1, k + 8, device=DEVICE), longer.to(DEVICE), activations="int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_products_of_groups(scheme):
    for m, n, k in ((1, 21, 130), (18, 5, 257)):
        q, x = weight(n, k, scheme), normal(m, k, seed=1).to(DEVICE)
        w = q.dequantize()
        codes, t = (part.to(DEVICE) for part in round_rows(x.cpu()))
        want = (codes.double() @ w.double().T) * t.double()
        limit = 8 * 2.0**-23 * ((codes.double().abs() @ (w.double().abs() + w.abs().max()).T) * t)
        for one in allowed(scheme, m, rounded=True):
            got = qlinear_triton.qlinear(x, q, activations="int8", config=one)
            assert ((got.double() - want).abs() <= limit).all()


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 140)),
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 99),
    rounded=st.booleans(),
)
def test_any_shape(shape, scheme, seed, rounded):
    m, n, k = shape
    x, q = normal(m, k, seed=seed).to(DEVICE), weight(n, k, scheme, seed=seed + 1)
    want = qlinear(x, q, path="reference", activations="int8" if rounded else None)
    got = qlinear_triton.qlinear(x, q, activations="int8" if rounded else None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * k**0.5)


def test_rounding_of_rows_is_that_of_plain_torch():
    x = normal(8, 2333) * torch.tensor([1e-20, 1.0, 3e4, 0.0, 1e-44, 1.0, 1.0, 1.0])[:, None]
    x[5, 7], x[6, 2332], x[7, 0] = math.nan, math.inf, -math.inf
    x[1] = torch.arange(2333) * 0.5 - 500  # halves of a step: to the even one
    x[1, 0] = 127 * 8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want_codes, want_scale = round_rows(x.to(dtype))
        codes, scale = qlinear_triton.round_rows(x.to(dtype).to(DEVICE))
        assert torch.equal(codes.cpu(), want_codes)
        torch.testing.assert_close(scale.cpu(), want_scale[:, 0], rtol=0, atol=0, equal_nan=True)


def test_rows_that_no_integers_stand_for_are_nan_and_the_others_stay():
    x, q = normal(5, 64).to(DEVICE), weight(24, 64, "int4:g32")
    good = qlinear_triton.qlinear(x, q, activations="int8")
    for bad in (math.nan, math.inf, -math.inf):
        x[2, 7] = bad
        y = qlinear_triton.qlinear(x, q, activations="int8")
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("scheme", ["int4:g24", "int8", "int4:g7", "int8:g48:affine"])
def test_nothing_beyond_the_tensors_is_read_or_written(scheme, rounded):
    """Where something beyond them is read, a NaN or the least integer is added to a sum."""
    q, x, bias = weight(21, 77, scheme), normal(3, 77).to(DEVICE), normal(21, seed=2).to(DEVICE)
    activations = "int8" if rounded else None
    want = qlinear(x, q, bias, path="reference", activations=activations)
    for one in allowed(scheme, 3, rounded=rounded):
        with Fences() as fences:
            zero = None if q.zero is None else fences.around(q.zero)
            around = dataclasses.replace(q, codes=fences.around(q.codes), scale=fences.around(q.scale), zero=zero)
            got = qlinear_triton.qlinear(
                fences.around(x), around, fences.around(bias), activations=activations, config=one
            )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_strides_do_not_matter():
    q = weight(21, 64, "int4:g32")
    wide = normal(64, 40, seed=1).to(DEVICE)
    for x in (wide.T, wide.T[::3], normal(7, 100).to(DEVICE)[:, 5:69], normal(1, 64).to(DEVICE).expand(6, 64)):
        for activations in (None, "int8"):
            got = qlinear_triton.qlinear(x, q, activations=activations)
            assert torch.equal(got, qlinear_triton.qlinear(x.clone().contiguous(), q, activations=activations))
    x = normal(3, 64).to(DEVICE)
    want = qlinear_triton.qlinear(x, q)
    part = dataclasses.replace(
        weight(42, 64, "int4:g32"), codes=q.codes.repeat_interleave(2, 0)[::2], scale=q.scale.T.contiguous().T,
        zero=torch.cat((q.zero, q.zero), 1)[:, :2], shape=(21, 64),
    )  # fmt: skip
    assert not part.codes.is_contiguous()
    assert torch.equal(qlinear_triton.qlinear(x, part), want)


def test_zero_points_may_be_floats_and_biases_of_another_dtype():
    q, x = weight(9, 96, "int4:g32"), normal(3, 96).to(DEVICE)
    q = dataclasses.replace(q, zero=q.zero.float() + 0.37)
    for rounded in (None, "int8"):
        for dtype in (torch.float16, torch.float64):
            bias = normal(9, seed=3).to(dtype).to(DEVICE)
            want = qlinear(x, q, bias, path="reference", activations=rounded)
            got = qlinear_triton.qlinear(x, q, bias, activations=rounded)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_the_bias_has_its_gradient():
    q, x = weight(5, 64, "int4:g32"), normal(3, 64).to(DEVICE).bfloat16()
    bias = normal(5).to(DEVICE).requires_grad_()
    y = qlinear_triton.qlinear(x, q, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(bias.grad, torch.full((5,), 3.0, device=DEVICE))
    with torch.no_grad():
        assert torch.equal(qlinear_triton.qlinear(x, q, bias), y)


def test_shapes_of_x_and_empty_products():
    q, bias = weight(6, 40, "int4:g16"), normal(6).to(DEVICE)
    assert qlinear_triton.qlinear(normal(2, 3, 40).to(DEVICE), q).shape == (2, 3, 6)
    assert qlinear_triton.qlinear(normal(40).to(DEVICE), q).shape == (6,)
    assert qlinear_triton.qlinear(normal(0, 40).to(DEVICE), q, bias).shape == (0, 6)
    nothing = quantize(torch.empty(3, 0), "int8").to(DEVICE)
    empty = torch.empty(2, 0, device=DEVICE)
    assert torch.equal(qlinear_triton.qlinear(empty, nothing, bias[:3]), bias[:3].expand(2, 3))


@pytest.mark.parametrize("scheme", ["int4:g128", "int8", "int4:g24"])
def test_every_config_computes_the_same(scheme):
    for rows in (2, 5, 18):
        x, q = normal(rows, 256).to(DEVICE), weight(19, 256, scheme)
        for rounded in (False, True):
            activations = "int8" if rounded else None
            want = qlinear(x, q, path="reference", activations=activations)
            found = configs(rows, q, x.dtype, rounded)
            assert len(set(found)) == len(found) >= 2
            for one in found:
                got = qlinear_triton.qlinear(x, q, activations=activations, config=one)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_configs_suit_the_groups():
    kinds = {scheme: configs(1, weight(8, 512, scheme), torch.bfloat16) for scheme in SCHEMES}
    for scheme, found in kinds.items():
        of_gemv = [one for one in found if "BLOCK_G" in dict(one.constants)]
        assert bool(of_gemv) == ("g7" not in scheme and "g24" not in scheme)
        assert of_gemv == list(found[: len(of_gemv)])  # the first is taken where nothing can be timed
    assert {one["BLOCK_K"] for one in configs(99, weight(8, 512, "int4:g32"), torch.bfloat16)} == {32}
    assert {one["BLOCK_K"] for one in configs(99, weight(8, 512, "int4:g48"), torch.bfloat16)} == {16}
    assert {one["BLOCK_K"] for one in configs(99, weight(8, 512, "int8:g16"), torch.bfloat16, True)} == {32}
    assert not any("BLOCK_G" in dict(one.constants) for one in configs(1, weight(8, 512, "int8"), torch.bfloat16, True))
    assert qlinear_triton.fitting(64, 100, 16) == 64  # whose second step is a short one


# --- the path of `qlinear` --------------------------------------------------------------------------------------------


def test_qlinear_takes_it_by_name_and_explain_says_so():
    x, q = normal(2, 64).to(DEVICE), weight(9, 64, "int4:g32")
    said = explain(x, q, path="triton")
    assert said.startswith("triton: 2 × 64 float32 times int4:g32:affine (9, 64)")
    assert "decoded in registers, by kernels in Triton" in said
    prepared = prepare(q, "triton")
    assert torch.equal(qlinear(x, prepared, path="triton"), qlinear_triton.qlinear(x, q))
    if DEVICE == "cpu":
        assert "not triton: for x on cpu its kernels run under Triton's interpreter" in explain(x, q)


def test_on_a_gpu_it_is_taken_where_it_can_be(monkeypatch):
    """Decided by device and format alone, so tensors without numbers do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(_triton, "INTERPRETED", tl.constexpr(False))
    with FakeTensorMode():
        for scheme, dtype, integers, path in (
            ("int4:g128", torch.bfloat16, None, "triton"), ("int8", torch.float32, "int8", "triton"),
            ("int8", torch.float64, None, "dequantize"), ("int3:g32", torch.bfloat16, None, "dequantize"),
            ("int4:g64:dq", torch.bfloat16, None, "dequantize"), ("int6", torch.float32, "int8", "reference"),
        ):  # fmt: skip
            parsed = Scheme.parse(scheme)
            codes = torch.empty(16, 128 * parsed.bits // 8, dtype=torch.uint8, device="cuda")
            scale, zero = (
                torch.empty(16, 2, device="cuda"),
                torch.empty(16, 2, device="cuda") if parsed.affine else None,
            )
            q = QuantizedTensor(codes, scale, zero, (16, 128), parsed)
            said = explain(torch.empty(3, 128, dtype=dtype, device="cuda"), q, activations=integers)
            assert said.startswith(f"{path}:")
            assert ("not triton:" in said) == (path != "triton")


def test_on_a_gpu_it_is_not_taken_if_interpreted_or_for_a_gpu_that_is_too_old(monkeypatch):
    for capability, interpreted, why in (
        ((8, 0), True, "not triton: for x on cuda.* its kernels run under Triton's interpreter"),
        ((7, 5), False, "not triton: it needs compute capability 8.0, and this GPU has 7.5"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=capability: have)
        monkeypatch.setattr(_triton, "INTERPRETED", tl.constexpr(interpreted))
        with FakeTensorMode():
            codes, scale = torch.empty(16, 64, dtype=torch.uint8, device="cuda"), torch.empty(16, 1, device="cuda")
            q = QuantizedTensor(codes, scale, None, (16, 64), Scheme("int8"))
            said = explain(torch.empty(3, 64, device="cuda"), q)
        assert said.startswith("dequantize:")
        assert re.search(why, said)


def multiplied(x, scheme):
    return qlinear_triton.qlinear(x, weight(5, 64, scheme))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, q: qlinear_triton.qlinear(x.double(), q), ValueError, "x must be float32, .* and is float64"),
        (
            lambda x, q: qlinear_triton.qlinear(x.int(), q),
            TypeError,
            "x must be a floating-point tensor, got torch.int",
        ),
        (lambda x, q: multiplied(x, "int3:g32"), ValueError, "codes of int4 and int8, not of int3.*quantize to one"),
        (lambda x, q: multiplied(x, "nf4"), ValueError, "codes of int4 and int8, not of nf4"),
        (lambda x, q: multiplied(x, "int4:g32:dq"), ValueError, "keep them in fp16, or take path="),
        (lambda x, q: prepare(weight(5, 64, "int6"), "triton"), ValueError, 'path="triton": its kernels read'),
        (lambda x, q: qlinear_triton.qlinear(x.requires_grad_(), q), ValueError, "it has no gradient, and x needs one"),
        (lambda x, q: qlinear_triton.qlinear(x, q.to("meta")), ValueError, "x is on .* and qw on meta: move one"),
        (lambda x, q: qlinear_triton.qlinear(x, q, torch.zeros(5, device="meta")), ValueError, "bias is on meta"),
        (lambda x, q: qlinear_triton.qlinear(x.to("meta"), q.to("meta")), ValueError, "x must be on a CUDA device"),
        (lambda x, q: qlinear_triton.qlinear(x, q, activations="int4"), ValueError, 'must be None or "int8"'),
        (lambda x, q: qlinear_triton.qlinear(x[:, :-1], q), ValueError, "64"),
        (lambda x, q: qlinear_triton.qlinear(x, q.dequantize()), TypeError, "QuantizedTensor"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call(normal(3, 64).to(DEVICE), weight(5, 64, "int4:g32"))


def test_without_gpu_and_interpreter_the_error_names_both_ways():
    code = (
        "import torch\nfrom mlsys.quant import explain, qlinear, quantize\n"
        "x, q = torch.ones(1, 32), quantize(torch.ones(2, 32), 'int4:g32')\n"
        "assert not explain(x, q).startswith('triton')\n"
        "for call in (qlinear, explain):\n"
        "    try: call(x, q, path='triton')\n"
        "    except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    said = (
        "x is on a CPU, where Triton kernels run under Triton's interpreter only: set TRITON_INTERPRET=1 before Python "
        "starts, or use mlsys.quant.qlinear"
    )
    assert done.stdout.splitlines() == [said, said]


def test_contract_by_the_kernels():
    verdict = check(CONTRACTS["qlinear_triton"], CONTRACTS["qlinear_triton"].reference, device=DEVICE)
    assert verdict.passed, verdict


def test_typical_calls_can_be_made():
    calls = list(qlinear_triton.typical(torch.device(DEVICE), torch.bfloat16, (1, 32, 128)))
    assert [label for label, _ in calls] == [
        "1 × 32 × 128, int4:g128",
        "1 × 32 × 128, int8",
        "1 × 32 × 128, int8, x in int8",
    ]
    assert all(call().shape == (1, 32) for _, call in calls)
    with pytest.raises(ValueError, match="1x4096x4096"):
        next(qlinear_triton.typical(torch.device(DEVICE), torch.bfloat16, (1, 32)))


@pytest.mark.parametrize("rows", [1, 20])
def test_a_bias_may_have_any_strides(rows):
    w = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), "int4:g32")
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    for bias in (torch.arange(48.0)[::2], torch.ones(1).expand(24)):
        got = qlinear_triton.qlinear(x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE))
        want = qlinear(x, w, bias, path="reference")
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_a_config_of_another_kernel_is_refused():
    w = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), "int8")
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    w = w.to(DEVICE)
    with pytest.raises(TypeError, match="config must be a Config or None, got int"):
        qlinear_triton.qlinear(x, w, config=3)
    gemv = qlinear_triton.configs(1, w, x.dtype)[0]
    with pytest.raises(ValueError, match=r"config must be of a kernel .*rounded=True"):
        qlinear_triton.qlinear(x, w, activations="int8", config=gemv)
