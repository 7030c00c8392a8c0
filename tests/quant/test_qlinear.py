"""`mlsys.quant.qlinear`: every path gives what plain torch gives, and refuses what it cannot do."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import QuantizedTensor, Scheme, _native, explain, prepare, qlinear, quantize
from mlsys.quant.qlinear import INT_MM_ROWS, NATIVE_ROWS, PATHS, round_rows

NATIVE = [
    "int8", "int8:affine", "int8:tensor", "int8:g32", "int8:g64:affine:fp16", "int8:g48", "int8:g96", "int8:g128",
    "int4", "int4:sym", "int4:tensor", "int4:g16", "int4:g32", "int4:g64:sym:bf16", "int4:g128", "int4:g256",
    "int4:g24", "int4:g7", "int2:g16:sym", "int3:g32", "int5", "int6:sym", "int7:g16", "nf4", "nf4:dq", "e2m1:g32",
    "mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2:tensor", "mxfp6_e3m2", "mxfp6_e2m3",
]  # fmt: skip
OTHERS = ["dynamic8", "bf16", "fp16"]
INTEGERS = [scheme for scheme in NATIVE if scheme.startswith("int")]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 400))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(got, want, x, w, unit=2.0**-23):
    """Whether sums of products differ by roundings; `unit` is the largest relative one."""
    limit = 8 * unit * (x.abs().double() @ w.abs().double().T + 1e-30)
    return bool(((got.double() - want.double()).abs() <= limit).all())


@pytest.fixture(autouse=True)
def _built():
    assert _native.missing() is None


@settings(max_examples=25)
@given(shape=SHAPES, scheme=st.sampled_from([*NATIVE, *OTHERS]), seed=st.integers(0, 99))
def test_float_paths_are_the_reference(shape, scheme, seed):
    m, n, k = shape
    x, q = normal(m, k, seed=seed), quantize(normal(n, k, seed=seed + 1), scheme)
    w = q.dequantize()
    want = x.double() @ w.double().T
    paths = ["auto", "reference", "dequantize", *(["native"] if scheme in NATIVE else [])]
    # A zero point beside a scale: the two parts of a sum may cancel
    zeros = torch.zeros_like(w) if q.zero is None else w.abs().max() * torch.ones_like(w)
    for path in paths:
        assert near(qlinear(x, q, path=path), want, x, w.abs() + zeros), path


@pytest.mark.parametrize("scheme", NATIVE)
def test_native_reads_every_format(scheme):
    for n, k in ((5, 7), (7, 130), (6, 515), (4, 256)):
        q = quantize(normal(n, k, seed=k) + 0.3, scheme)
        w, out = q.dequantize(), torch.empty(n, k)
        assert torch.allclose(_native.dequantize(_native.weight(q), 0, n, out), w, rtol=1e-5, atol=1e-6)
        for m in (1, 2, 3, 4, 7):
            x = normal(m, k, seed=m)
            assert near(qlinear(x, q, path="native"), x.double() @ w.double().T, x, w.abs() + w.abs().max()), (n, k, m)


FIXED_POINT = [
    "int4:g16", "int4:g32", "int4:g32:sym", "int4:g64", "int4:g64:sym:bf16", "int4:g128", "int4:g128:sym:fp16",
    "int4:g256", "int4:g384:sym", "int2:g128:sym", "int3:g32",
]  # fmt: skip


@pytest.mark.parametrize("scheme", FIXED_POINT)
def test_one_row_of_floats_in_fixed_point(scheme):
    for n, k in ((5, 128), (7, 130), (6, 515), (4, 1024)):
        q, x = quantize(normal(n, k, seed=k) + 0.3, scheme), normal(1, k, seed=n)
        assert ("fixed point" in explain(x, q)) == (_native.has_vnni() and q.scheme.groups(k) > 1)
        w, wide, few, one = q.dequantize(), x.clone(), x.clone(), torch.zeros(1, k)
        wide[:, ::7], wide[:, 3::11] = 1e-3 * x[:, ::7], 1e20 * x[:, 3::11]
        few[:, k // 3 :] = 0
        one[0, k - 1] = -3.7
        # Of a power of two and the next number below, the first needs one bit more
        edges = torch.where(x > 0, 1.0, -1.0) * torch.tensor([2.0, 2 - 2.0**-23, 1.99, 1.9921, 1.9922]).repeat(k)[:k]
        for values in (x, -x.abs(), wide, 1e30 * wide.sign() + x, few, one, torch.zeros(1, k), edges):
            want = values.double() @ w.double().T
            assert near(qlinear(values, q, path="native"), want, values, w.abs() + w.abs().max()), (n, k)


@pytest.mark.parametrize("scheme", ["int4:g32", "int4:g128", "int4:g64:sym"])
def test_fixed_point_moves_with_its_input(scheme):
    q, x = quantize(normal(5, 300), scheme), normal(1, 300, seed=1)
    y = qlinear(x, q, path="native")
    for power in (-90, -30, 60):
        assert torch.equal(qlinear(x * 2.0**power, q, path="native"), y * 2.0**power)
    x[:, :100] = 0  # a group whose sums are exact: those of 22 bits are, as floats of 24 are
    x[:, 100:] = torch.randint(-(2**21), 2**21, (200,), generator=torch.Generator().manual_seed(2)).float()
    want = x.double() @ q.dequantize().double().T
    assert torch.allclose(qlinear(x, q, path="native").double(), want, rtol=1e-6, atol=2.0**21 * 1e-4)
    tiny = torch.full((1, 300), 3e-41)  # below the smallest normal number
    want = tiny.double() @ q.dequantize().double().T
    assert torch.allclose(qlinear(tiny, q, path="native").double(), want, rtol=1e-3, atol=1e-43)


def test_numbers_too_large_for_fixed_point_are_multiplied_as_floats():
    q, x = quantize(normal(5, 300), "int4:g128"), normal(1, 300, seed=1)
    w = q.dequantize()
    for large in (3e29, 3e30, 1e38):
        values = x.clone()
        values[0, 170] = large
        got = qlinear(values, q, path="native")
        assert got.isfinite().all()
        assert near(got, values.double() @ w.double().T, values, w.abs() + w.abs().max())
    for scheme in ("int4:g128", "int4:sym", "int4:g32"):
        q = quantize(normal(5, 300) + 0.1, scheme)
        for value in (float("inf"), -float("inf"), float("nan")):
            values = x.clone()
            values[0, 170] = value
            got, want = (qlinear(values, q, path=path) for path in ("native", "reference"))
            assert not got.isfinite().any()
            if scheme != "int4:g32":  # there a zero point is taken off a sum, and inf - inf is NaN
                assert torch.equal(got.nan_to_num(0, 1, -1), want.nan_to_num(0, 1, -1))


@pytest.mark.parametrize("scheme", INTEGERS)
def test_integer_products_are_exact(scheme):
    for m, n, k in ((1, 5, 7), (3, 6, 130), (5, 7, 515), (17, 4, 256)):
        x, q = normal(m, k, seed=k), quantize(normal(n, k, seed=m), scheme)
        codes, t = round_rows(x)
        w = q.dequantize()
        want = (codes.double() @ w.double().T) * t.double()
        for path in ("auto", "native", "reference"):
            got = qlinear(x, q, path=path, activations="int8")
            assert near(got, want, codes * t, w.abs() + w.abs().max()), path


@pytest.mark.parametrize("scheme", ["int8", "int4:sym", "int8:affine", "int4"])
def test_long_rows_do_not_overflow(scheme):
    x = torch.ones(1, 70_000)
    q = quantize(torch.ones(3, 70_000), scheme)
    q = dataclasses.replace(q, codes=torch.full_like(q.codes, 0x7F if q.scheme.bits == 8 else 0x77))
    want = x.double() @ q.dequantize().double().T
    assert torch.allclose(qlinear(x, q, activations="int8", path="native").double(), want, rtol=1e-6)


def test_rounding_of_rows_is_that_of_plain_torch():
    x = normal(5, 333) * torch.tensor([1e-20, 1.0, 3e4, 0.0, 1e-44])[:, None]
    codes, scale = _native.quantize_rows(x)
    want_codes, want_scale = round_rows(x)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)
    assert int(codes[1].abs().max()) == 127
    assert not codes[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_shape_and_dtype_of_x(dtype):
    q = quantize(normal(6, 130), "int4:g32")
    x, bias = normal(2, 3, 130, seed=1).to(dtype), normal(6, seed=2)
    want = x.double() @ q.dequantize().double().T + bias.double()
    for activations, allowed in ((None, 2), (None, 0), ("int8", 0)):
        several = x if allowed else x[:1, :1]
        got = qlinear(several, q, bias, activations=activations)
        assert got.dtype == dtype
        assert got.shape == (*several.shape[:-1], 6)
        unit = torch.finfo(dtype).eps if activations is None else 2**-6
        assert torch.allclose(got.double(), want[: len(several), : several.shape[1]], atol=20 * max(unit, 1e-6))


@pytest.mark.parametrize("rows", [1, 5, NATIVE_ROWS + 1])
def test_strides_of_x_do_not_matter(rows):
    q = quantize(normal(6, 40), "int4:g16")
    x = normal(40, 2 * rows, seed=1).T[::2]
    assert not x.is_contiguous()
    for activations in (None, "int8"):
        assert torch.equal(qlinear(x, q, activations=activations), qlinear(x.clone(), q, activations=activations))
        if activations is None:
            assert torch.allclose(qlinear(x, q), x @ q.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_empty_products(activations):
    bias = normal(3)
    q = quantize(normal(3, 8), "int4:g4")
    assert qlinear(normal(0, 8), q, bias, activations=activations).shape == (0, 3)
    assert qlinear(normal(2, 0, 8), q, activations=activations).shape == (2, 0, 3)
    nothing = quantize(torch.empty(3, 0), "int8")
    assert torch.equal(qlinear(torch.empty(2, 0), nothing, bias, activations=activations), bias.expand(2, 3))
    assert qlinear(normal(2, 8), quantize(torch.empty(0, 8), "int8"), activations=activations).shape == (2, 0)


def test_two_threads_give_the_same_bits():
    q, x = quantize(normal(37, 200), "int4:g32"), normal(3, 200, seed=1)
    before = torch.get_num_threads()
    for activations in (None, "int8"):
        one = qlinear(x, q, activations=activations, path="native")
        try:
            torch.set_num_threads(2)
            assert torch.equal(qlinear(x, q, activations=activations, path="native"), one)
        finally:
            torch.set_num_threads(before)


def test_torch_paths_are_near():
    x = normal(4, 256, seed=1).bfloat16()
    for scheme, path in (("int8", "int8pack"), ("int4:g64", "int4pack"), ("int4:g128:sym", "int4pack")):
        q = quantize(normal(32, 256), scheme)
        w = q.dequantize()
        prepared = prepare(q, path)
        got = qlinear(x, prepared, path=path)
        assert near(got, x.double() @ w.double().T, x, w.abs() + w.abs().max(), 2.0**-9)
        assert torch.equal(got, qlinear(x, q, path=path))
    q = quantize(normal(32, 256), "int8")
    for m in (1, 3, 20):
        wide = normal(m, 256, seed=m)
        got, want = (qlinear(wide, q, path=path, activations="int8") for path in ("int_mm", "reference"))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_float_zero_points_are_multiplied():
    q = quantize(normal(5, 64), "int4:g32")
    q = dataclasses.replace(q, zero=q.zero.float() + 0.37)
    x = normal(3, 64, seed=1)
    want = x.double() @ q.dequantize().double().T
    assert torch.allclose(qlinear(x, q, path="native").double(), want, atol=1e-4)
    codes, t = round_rows(x)
    want = (codes.double() @ q.dequantize().double().T) * t
    for path in ("native", "reference"):
        assert torch.allclose(qlinear(x, q, path=path, activations="int8").double(), want, atol=1e-4)


def test_gradient_flows_through_the_reference():
    q, bias = quantize(normal(5, 64), "int4:g32"), normal(5).requires_grad_()
    x = normal(3, 64, seed=1).requires_grad_()
    assert explain(x, q).startswith("reference:")
    qlinear(x, q, bias).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(dim=0).expand(3, 64), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((5,), 3.0))
    with torch.no_grad():
        assert explain(x, q).startswith("native:")
    with pytest.raises(ValueError, match="gradient"):
        qlinear(x, q, activations="int8")
    with pytest.raises(ValueError, match="gradient"):
        qlinear(x, q, path="native")


def test_prepared_weights_copy_nothing_that_can_be_read_as_it_is():
    for scheme in ("int8", "int4:g32", "mxfp4", "nvfp4", "fp8_e4m3"):
        q = quantize(normal(6, 64), scheme)
        prepared = prepare(q)
        assert prepared.nbytes - q.nbytes <= 64, scheme
        assert torch.equal(qlinear(normal(2, 64), prepared), qlinear(normal(2, 64), q))
    large = quantize(normal(2048, 2048), "int8")  # so long that there are whole pages of 2 MiB in it
    before, at = large.codes.clone(), large.codes.data_ptr()
    prepared = prepare(large)
    assert prepared.native.kept[0].data_ptr() == at == large.codes.data_ptr()
    assert torch.equal(large.codes, before)
    q = quantize(normal(6, 64), "int3:g32")
    assert prepare(prepare(q)).nbytes >= q.nbytes + 6 * 32


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, q: qlinear(x[:, :-1], q), ValueError, "64"),
        (lambda x, q: qlinear(x.int(), q), TypeError, "int32"),
        (lambda x, q: qlinear(x, q.dequantize()), TypeError, "QuantizedTensor"),
        (lambda x, q: qlinear(x, q, torch.zeros(4)), ValueError, "bias"),
        (lambda x, q: qlinear(x, q, path="fast"), ValueError, "native"),
        (lambda x, q: qlinear(x, q, activations="int4"), ValueError, "int8"),
        (lambda x, q: qlinear(x, q.to("meta")), ValueError, "meta"),
        (lambda x, q: qlinear(x, q, torch.zeros(5, device="meta")), ValueError, "meta"),
        (lambda x, q: qlinear(x, quantize(torch.ones(5, 64), "nf4"), activations="int8"), ValueError, "nf4"),
        (lambda x, q: qlinear(x, quantize(torch.ones(5, 2, 64), "int8")), ValueError, "matrix"),
        (lambda x, q: qlinear(x, q, path="int_mm"), ValueError, "activations"),
        (lambda x, q: qlinear(x, q, path="int_mm", activations="int8"), ValueError, "int4"),
        (lambda x, q: qlinear(x, q, path="int8pack"), ValueError, "int4"),
        (lambda x, q: prepare(q, "int4pack"), ValueError, "sixteens"),
        (lambda x, q: qlinear(x, quantize(torch.ones(16, 64), "int4:g64"), path="int4pack"), ValueError, "bfloat16"),
        (lambda x, q: qlinear(x.double(), q, path="native"), ValueError, "float64"),
        (lambda x, q: qlinear(x, quantize(torch.ones(5, 64), "bf16"), path="native"), ValueError, "bf16"),
        (lambda x, q: prepare(quantize(torch.ones(5, 64), "dynamic8"), "native"), ValueError, "256"),
    ],
)
def test_errors_name_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call(normal(3, 64), quantize(normal(5, 64), "int4:g32"))


def test_explain_names_the_path_and_why_not_another():
    q = quantize(normal(6, 256), "int4:g128")
    few, many = explain(normal(1, 256), q), explain(normal(100, 256), q)
    assert few.startswith("native: 1 × 256 float32 times int4:g128:affine (6, 256)")
    assert many.startswith("dequantize:")
    for path in PATHS:
        assert (f"not {path}: " in few) != few.startswith(path)
    assert "plain loops, for groups of 24" in explain(normal(1, 256), quantize(normal(6, 256), "int4:g24"))
    assert explain(normal(1, 256).double(), q).startswith("reference:")
    assert explain(normal(1, 256), q, activations="int8").startswith("native:")
    rows = quantize(normal(6, 256), "int8")
    assert explain(normal(INT_MM_ROWS, 256), rows, activations="int8").startswith("native:")
    assert explain(normal(INT_MM_ROWS + 1, 256), rows, activations="int8").startswith("int_mm:")
    assert explain(normal(INT_MM_ROWS + 1, 256), q, activations="int8").startswith("native:")


def test_without_a_compiler_torch_does_it_and_explain_says_so(monkeypatch):
    monkeypatch.setattr(_native, "missing", lambda: "there is no C++ compiler")
    x, q = normal(2, 64), quantize(normal(16, 64), "int8")
    for activations, path in ((None, "dequantize"), ("int8", "int_mm")):
        said = explain(x, q, activations=activations)
        assert said.startswith(f"{path}:")
        assert "not native: there is no C++ compiler" in said
        want = qlinear(x, q, activations=activations, path="reference")
        assert torch.allclose(qlinear(x, q, activations=activations), want, atol=1e-4)
    assert explain(x.bfloat16(), q).startswith("int8pack:")
    grouped = prepare(quantize(normal(16, 64), "int4:g32"), "int4pack")
    assert explain(x.bfloat16(), grouped).startswith("int4pack:")
    assert explain(x, grouped, activations="int8").startswith("reference:")
    tensor = quantize(normal(1100, 1000), "int8:tensor")  # more than one block of rows
    wide = normal(3, 1000)
    assert torch.allclose(qlinear(wide, tensor, path="dequantize"), wide @ tensor.dequantize().T, atol=1e-3)


def test_a_compiler_that_refuses_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_native.NotBuilt, match="no-such-compiler"):
        _native.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(_native.NotBuilt, match="refused"):
        _native.build()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_folder_that_cannot_be_made_is_reported_and_torch_does_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_native, "_library", functools.cache(_native._library.__wrapped__))  # as in a new process
    with pytest.raises(_native.NotBuilt, match="the cache folder cannot be made"):
        _native.build()
    x, q = normal(2, 64), quantize(normal(16, 64), "int8")
    for activations, path in ((None, "dequantize"), ("int8", "int_mm")):
        said = explain(x, q, activations=activations)
        assert said.startswith(f"{path}:")
        assert "not native: the cache folder cannot be made" in said
        want = qlinear(x, q, activations=activations, path="reference")
        assert torch.allclose(qlinear(x, q, activations=activations), want, atol=1e-4)
    with pytest.raises(ValueError, match="set MLSYS_CACHE"):
        qlinear(x, q, path="native")


def test_on_a_gpu_triton_is_taken_and_int_mm_only_for_the_shapes_that_cuda_has(monkeypatch):
    """Decided by shapes alone, so tensors without numbers do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tl = pytest.importorskip("triton.language")
    monkeypatch.setattr("mlsys.kernels._triton.INTERPRETED", tl.constexpr(False))
    with FakeTensorMode():
        for m, n, k in ((17, 16, 64), (16, 16, 64), (17, 12, 64), (17, 16, 60)):
            codes, scale = torch.empty(n, k, dtype=torch.uint8, device="cuda"), torch.empty(n, 1, device="cuda")
            q = QuantizedTensor(codes, scale, None, (n, k), Scheme("int8"))
            x = torch.empty(m, k, device="cuda")
            said = explain(x, q, activations="int8")
            assert said.startswith("triton:")
            assert "not native: the weight is on cuda" in said
            if (m, n, k) == (17, 16, 64):
                assert explain(x, q, activations="int8", path="int_mm").startswith("int_mm:")
            else:
                assert "not int_mm: on a GPU it takes more than 16 rows of x, and rows and columns" in said
                with pytest.raises(ValueError, match="on a GPU it takes more than 16 rows of x, and rows and columns"):
                    explain(x, q, activations="int8", path="int_mm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_a_gpu_computes_what_the_processor_does(rows):
    x, q = normal(rows, 64), quantize(normal(16, 64, seed=1), "int8")
    for activations in (None, "int8"):
        want = qlinear(x, q, activations=activations, path="reference")
        got = qlinear(x.cuda(), q.to("cuda"), activations=activations)
        assert torch.allclose(got.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int3:g32", "int4:g32", "nf4:dq", "nvfp4"])
def test_a_copy_of_a_prepared_weight_is_its_own(scheme):
    q, x = quantize(normal(16, 64), scheme), normal(2, 64, seed=1)
    prepared = prepare(q)
    want = qlinear(x, prepared)
    twin = copy.deepcopy(prepared)
    q.codes.zero_()
    assert torch.equal(qlinear(x, twin), want)
    assert twin.weight.codes.data_ptr() != q.codes.data_ptr()


def test_a_copy_is_packed_as_the_first_was():
    x, prepared = normal(2, 64).bfloat16(), prepare(quantize(normal(16, 64), "int4:g32"), "int4pack")
    twin = copy.deepcopy({"weight": prepared, "again": prepared})
    assert twin["weight"] is twin["again"]
    assert twin["weight"].packed is not None
    assert torch.equal(qlinear(x, twin["weight"], path="int4pack"), qlinear(x, prepared, path="int4pack"))


@pytest.mark.parametrize("scheme", ["int3:g32", "int6", "int8", "nf4:dq", "nvfp4", "mxfp6_e2m3", "dynamic8"])
@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_weight_that_was_changed_after_it_was_prepared_is_refused(scheme, part):
    q, x = quantize(normal(6, 64), scheme), normal(2, 64, seed=1)
    prepared = prepare(q)
    qlinear(x, prepared)
    changed = getattr(q, part)
    (changed.codes if isinstance(changed, QuantizedTensor) else changed).zero_()
    with pytest.raises(ValueError, match="changed in place after it was prepared"):
        qlinear(x, prepared)
    assert torch.allclose(qlinear(x, prepare(q)), x @ q.dequantize().T, atol=1e-4)


def test_what_is_prepared_in_inference_mode_is_multiplied():
    with torch.inference_mode():
        q, x = quantize(normal(6, 64), "int3:g32"), normal(2, 64, seed=1)
        assert torch.allclose(qlinear(x, prepare(q)), x @ q.dequantize().T, atol=1e-4)


def test_contract_accepts_plain_torch():
    def plain(x, codes, scale, zero, bias, *, bits, group, activations):
        q = QuantizedTensor(codes, scale, zero, (len(codes), x.shape[1]), Scheme(f"int{bits}", group, zero is not None))
        return qlinear(x, q, bias, path="reference", activations=activations)

    assert check(CONTRACTS["qlinear"], plain).passed


@pytest.mark.parametrize("seed", range(6))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACTS["qlinear"], CONTRACTS["qlinear"].reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACTS["qlinear"].wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACTS["qlinear"], CONTRACTS["qlinear"].wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong, str(failure)


def test_contract_refuses_what_cannot_take_views():
    def contiguous_only(x, *args, **options):
        return CONTRACTS["qlinear"].reference(x.view(-1).view(x.shape), *args, **options)

    failure = check(CONTRACTS["qlinear"], contiguous_only).failure
    assert failure is not None
    assert failure.case["given"] == "views"


@pytest.mark.parametrize("path", ["auto", "reference", "native", "int_mm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_no_integers_stand_for_is_nan_and_the_others_stay(path, bad):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    qw = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(1)), "int8")
    good = qlinear(x, qw, activations="int8", path=path)
    x[2, 7] = bad
    y = qlinear(x, qw, activations="int8", path=path)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize("columns", [5, 40, 130])
def test_int8pack_is_refused_where_it_would_read_beyond_the_rows(columns):
    qw = quantize(torch.randn(7, columns, generator=torch.Generator().manual_seed(0)), "int8")
    with pytest.raises(ValueError, match=f"beyond the end of a row of {columns}"):
        qlinear(torch.ones(1, columns, dtype=torch.bfloat16), qw, path="int8pack")


def test_int_mm_scales_each_row_of_weights_without_overflow_on_the_way():
    """A row of large weights must not decide for one of small ones, whose products are finite."""
    w = torch.ones(2, 64) * torch.tensor([[1e3], [1e-3]])
    x = torch.full((20, 64), 1e37)
    y = qlinear(x, quantize(w, "int8"), path="int_mm", activations="int8")
    torch.testing.assert_close(y, qlinear(x, quantize(w, "int8"), path="reference", activations="int8"))
    assert y[0].isfinite().tolist() == [False, True]
