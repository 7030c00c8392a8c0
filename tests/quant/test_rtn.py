"""`mlsys.quant.rtn`: errors within half a step, groups exact where they can be, and the codes that peers get."""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import QuantizedTensor, Scheme, quantize, rtn
from mlsys.quant._scheme import FORMATS
from mlsys.quant._tensor import Grid, assemble

CONTRACT = CONTRACTS["rtn"]
INTEGERS = [f"int{bits}:{group}:{kind}" for bits in (2, 3, 4, 8) for group in ("g16", "channel", "tensor")
            for kind in ("sym", "affine")]  # fmt: skip
SCHEMES = [
    *FORMATS,
    *INTEGERS,
    "int4:g8:fp16",
    "int4:g8:bf16",
    "int4:g8:dq",
    "nf4:dq",
    "int4:tensor:dq",
    "e2m1:g32:bf16",
]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(q, w):
    """Each number's step: its group's scale."""
    scale, columns = q.scales(), w.shape[1]
    return scale.repeat_interleave(q.scheme.group_size(columns), dim=1)[:, :columns] if scale.shape[1] > 1 else scale


@settings(max_examples=25)
@given(
    shape=SHAPES,
    scheme=st.sampled_from(INTEGERS),
    size=st.sampled_from([1e-42, 1e-30, 1.0, 1e38]),
    seed=st.integers(0, 99),
)
def test_integers_err_by_half_a_step_at_most(shape, scheme, size, seed):
    w = (normal(*shape, seed=seed).clamp(-1.5, 1.5) + seed % 3 - 1).clamp(-1.5, 1.5) * size
    q = quantize(w, scheme)
    error = (q.dequantize().double() - w.double()).abs()
    slack = 1e-5 if size > 1e-37 else 1.01  # where the steps themselves are subnormal, a scale is off by up to half
    assert bool((error <= steps(q, w).double() * (0.5 + slack)).all())


@settings(max_examples=25)
@given(shape=SHAPES, scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 99))
def test_any_shape_keeps_its_size_and_sign(shape, scheme, seed):
    w = normal(*shape, seed=seed)
    kept = w.clone()
    q = quantize(w, scheme)
    near = q.dequantize()
    assert torch.equal(w, kept)
    assert near.shape == w.shape
    assert near.dtype == torch.float32
    assert bool((near * w >= 0).all())
    assert bool(((near - w).abs() <= w.abs().max() * 0.8).all())
    assert q.codes.dtype == (torch.int16 if q.scheme.bits > 8 else torch.uint8)


@pytest.mark.parametrize(
    "scheme", ["int8", "int4:g16:sym", "nf4:g16", "fp8_e4m3", "mxfp4", "mxfp8_e5m2", "e2m1:g8", "bf16"]
)
def test_rounding_twice_is_rounding_once(scheme):
    once = quantize(normal(7, 48), scheme)
    twice = quantize(once.dequantize(), scheme)
    torch.testing.assert_close(twice.dequantize(), once.dequantize(), rtol=1e-6, atol=0)
    assert torch.equal(twice.codes, once.codes)


def test_every_format_comes_near_what_its_bits_allow():
    """Signal to noise in decibels on N(0, 1): about 6 a bit."""
    w = normal(256, 512)
    expected = {"int8": 42, "int4:g64": 20.8, "nf4:dq": 20.7, "e2m1:g64": 19.5, "mxfp4": 18.8, "nvfp4": 20.4,
                "fp8_e4m3": 31.5, "int2:g16": 9.1, "bf16": 55.6}  # fmt: skip
    for scheme, decibels in expected.items():
        noise = (quantize(w, scheme).dequantize() - w).square().mean()
        assert 10 * math.log10(w.square().mean() / noise) == pytest.approx(decibels, abs=0.6), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_are_exact(scheme):
    assert torch.equal(quantize(torch.zeros(3, 40), scheme).dequantize(), torch.zeros(3, 40))
    w = normal(4, 64)
    w[:, 16:48] = 0
    w[2] = 0
    assert bool((quantize(w, scheme).dequantize()[w == 0] == 0).all())


@pytest.mark.parametrize(
    "scheme", ["int8", "int2:g8", "int3:g8:sym", "int4", "int4:tensor", "nf4:g8", "fp8_e5m2", "e2m1:g8"]
)
def test_groups_of_equal_numbers_are_exact(scheme):
    for value in (0.3, -1.7, 1e-40, 1e38):
        w = torch.full((2, 20), value)
        assert torch.equal(quantize(w, scheme).dequantize(), w)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (5, 0), (2, 0, 3), (1,), (1, 1), (20,), (2, 3, 20)])
def test_empty_single_and_deep_tensors(scheme, shape):
    w = normal(*shape)
    q = quantize(w, scheme)
    assert q.dequantize().shape == shape
    assert q.nbytes >= 0
    assert math.isnan(q.bits_per_weight) == (w.numel() == 0)
    flat = quantize(w.reshape(-1, shape[-1]) if w.numel() else w, scheme)
    assert torch.equal(q.dequantize().flatten(), flat.dequantize().flatten())


def test_a_shorter_last_group_has_its_own_scale():
    w = torch.cat((normal(3, 16), 100 * normal(3, 5, seed=1)), dim=1)
    q = quantize(w, "int8:g16")
    assert q.scales().shape == (3, 2)
    assert torch.equal(q.dequantize()[:, :16], quantize(w[:, :16], "int8:g16").dequantize())
    assert torch.equal(q.dequantize()[:, 16:], quantize(w[:, 16:], "int8:g16").dequantize())


def test_a_group_wider_than_the_row_is_the_row():
    w = normal(3, 20)
    for scheme in ("int4:g1000000000", "nf4:g64"):
        wide = quantize(w, scheme)
        assert wide.scales().shape == (3, 1)
        assert torch.equal(wide.dequantize(), quantize(w, scheme.partition(":")[0] + ":channel").dequantize())


def test_tensors_as_they_come():
    w = normal(24, 36)
    for view in (w.t(), w[::2, 1::3], w.expand(2, 24, 36), torch.nn.Parameter(w)):
        assert torch.equal(
            quantize(view, "int4:g8").dequantize(), quantize(view.detach().clone(), "int4:g8").dequantize()
        )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = w.to(dtype)
        assert torch.equal(quantize(low, "nf4").dequantize(), quantize(low.float(), "nf4").dequantize())
    assert quantize(w, "int8").dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_is_refused(scheme):
    for bad in (math.nan, math.inf, -math.inf):
        w = normal(3, 20)
        w[1, 7] = bad
        with pytest.raises(ValueError, match=rf"w must be finite, got {bad} at \[1, 7\]"):
            quantize(w, scheme)


def test_what_is_no_matrix_of_floats_is_refused():
    for w, error, message in (
        (np.zeros((2, 2)), TypeError, "w must be a torch tensor, got ndarray"),
        (torch.zeros(2, 2, dtype=torch.int8), TypeError, "floating-point tensor, got torch.int8"),
        (torch.tensor(1.0), ValueError, "at least one dimension"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "dense"),
        (torch.zeros(2, 2, device="meta"), TypeError, "w must hold numbers, got a meta tensor"),
        (torch.full((2, 2), 1e39, dtype=torch.float64), ValueError, r"fit into float32, got 1e\+39"),
        (torch.full((2, 2), 3e38), ValueError, "half of what float32 holds"),
    ):
        with pytest.raises(error, match=message):
            quantize(w, "int4")
    with pytest.raises(ValueError, match="keep scales in bf16 or fp32"):
        quantize(torch.full((2, 2), 1e7), "int4:fp16")


def test_schemes_say_what_is_wrong_with_them():
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        assert Scheme.parse(str(scheme)) == scheme
    for text, message in (
        ("int9", "no format 'int9'"),
        ("int4:g0", "'g0' is none of"),
        ("int4:g8:channel", "exclude each other"),
        ("nf4:affine", "no zero point"),
        ("mxfp4:g16", "add nothing"),
        ("bf16:dq", "add nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            Scheme.parse(text)
    with pytest.raises(TypeError, match="scheme must be text"):
        quantize(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="group=True"):
        Scheme("int4", True)
    with pytest.raises(TypeError, match="affine must be True or False, got 'yes'"):
        Scheme("int4", 8, "yes")
    with pytest.raises(TypeError, match="must be a floating-point one"):
        quantize(torch.zeros(2, 2), "int4").dequantize(torch.int8)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("int8", 8 + 32 / 512), ("int4:g128", 4 + 40 / 128), ("int4:g64:sym:fp16", 4.25), ("int3:g32:sym", 4),
        ("nf4", 4.5), ("nf4:dq", 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**19), ("mxfp4", 4.25), ("mxfp6_e2m3", 6.25),
        ("mxfp8_e4m3", 8.25), ("nvfp4", 4.5 + 32 / 2**19), ("bf16", 16),
    ],
)  # fmt: skip
def test_bits_are_counted_with_scales(scheme, bits):
    assert quantize(normal(1024, 512), scheme).bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_zero_groups_do_not_change_what_others_get():
    """Their scale must not stand among those that share one."""
    w = 1e-4 * normal(8, 64)
    w[5, 16:48] = 0
    for scheme in ("nvfp4", "nf4:g16:dq", "int4:g16:dq"):
        near = quantize(w, scheme).dequantize()
        assert float((near - w).norm() / w.norm()) < 0.12


@pytest.mark.parametrize("scheme", ["nf4:g8:dq", "int4:g8:dq", "nvfp4", "dynamic8:g8"])
def test_large_numbers_keep_finite_scales(scheme):
    """Not even a sum of scales may leave float32."""
    w = 1.5e38 * normal(8, 64).clamp(-1, 1)
    near = quantize(w, scheme).dequantize()
    assert float((near.double() - w).norm() / w.double().norm()) < 0.12


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transposes_have_the_codes_of_their_copies(scheme):
    w = normal(40, 7).t()
    assert torch.equal(quantize(w, scheme).codes, quantize(w.contiguous(), scheme).codes)


def test_nvfp4_blocks_far_below_the_others_are_not_lost():
    w = normal(2, 32)
    w[:, 16:] *= 1e-3 / 4
    q = quantize(w, "nvfp4")
    assert bool((q.scales() > 0).all())
    tiny, near = w[:, 16:], q.dequantize()[:, 16:]
    assert float((near - tiny).abs().max() / tiny.abs().max()) < 0.5


def test_mx_scales_stop_at_the_ends_of_their_range():
    for size in (1e-39, 1e-38, 1e38):
        w = (normal(2, 64) * 0.3).clamp(-1, 1) * size
        near = quantize(w, "mxfp8_e4m3").dequantize()
        assert bool((near - w).abs().max() <= w.abs().max() * 0.07)


# --- peers ------------------------------------------------------------------------------------------------------------


def gguf_blocks(w, kind):
    return gguf.quants.quantize(w.numpy(), kind).reshape(len(w), -1, gguf.GGML_QUANT_SIZES[kind][1])


def nibbles(packed):
    """A block's first half in the low bits, its second half in the high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def test_gguf_has_the_same_mxfp4():
    kind, w = gguf.GGMLQuantizationType.MXFP4, normal(16, 128) * torch.logspace(-12, 12, 128)
    blocks, q = gguf_blocks(w, kind), quantize(w, "mxfp4")
    np.testing.assert_array_equal(blocks[..., 0], q.scale.numpy())
    theirs, ours = nibbles(blocks[..., 1:]).reshape(16, 128), q.unpacked().numpy()
    np.testing.assert_array_equal(np.where(theirs == 8, 0, theirs), np.where(ours == 8, 0, ours))  # 8 is −0
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks.reshape(16, -1), kind), q.dequantize().numpy())


def test_gguf_has_the_same_q8_0():
    """Codes are the same where fp16 holds the scale exactly: gguf divides by the scale before it is rounded."""
    kind, w = gguf.GGMLQuantizationType.Q8_0, normal(16, 96).clamp(-3.9, 3.9)
    w[:, ::32] = 127 / 32
    blocks, q = gguf_blocks(w, kind), quantize(w, "int8:g32:fp16")
    np.testing.assert_array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], q.scale.numpy())
    np.testing.assert_array_equal(blocks[..., 2:].reshape(16, -1), q.unpacked().numpy())
    w = normal(16, 96, seed=1)
    blocks, q = gguf_blocks(w, kind), quantize(w, "int8:g32:fp16")
    np.testing.assert_array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], q.scale.numpy())
    theirs = gguf.quants.dequantize(blocks.reshape(16, -1), kind)
    assert float((q.dequantize() - w).norm()) <= float(np.linalg.norm(theirs - w.numpy()))


def test_gguf_q4_0_is_a_grid_that_the_record_can_hold():
    """Its scale may be negative, and its zero point is 8."""
    kind, w = gguf.GGMLQuantizationType.Q4_0, normal(16, 96)
    blocks = gguf_blocks(w, kind)
    scale = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0])
    codes = torch.from_numpy(nibbles(blocks[..., 2:]).reshape(16, 96))
    grid = Grid(scale.float(), torch.full(scale.shape, 8.0), scale)
    q = assemble(codes, grid, (16, 96), Scheme.parse("int4:g32:affine:fp16"))
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks.reshape(16, -1), kind), q.dequantize().numpy())
    assert isinstance(q, QuantizedTensor)


def test_bitsandbytes_has_the_same_nf4_and_double_quantization():
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    w = normal(300, 128)
    packed, state = bitsandbytes.quantize_4bit(w, quant_type="nf4", blocksize=64)
    q = quantize(w, "nf4")
    theirs = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).reshape(300, 128)
    assert torch.equal(theirs, q.unpacked())
    assert torch.equal(state.absmax, q.scale.flatten())
    assert torch.equal(bitsandbytes.dequantize_4bit(packed, state), q.dequantize())

    _, state = bitsandbytes.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    scale = quantize(w, "nf4:dq").scale
    off = (state.absmax.int() - scale.codes.flatten().int()).abs()
    assert (int(off.max()), int((off > 0).sum())) <= (1, 3)  # halfway between two: it multiplies by 1 / absmax
    torch.testing.assert_close(state.state2.absmax, scale.scale.flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(state.offset, scale.zero.squeeze(), rtol=1e-6, atol=0)  # its mean is one in float32


def test_names():
    assert rtn.quantize is quantize
    assert repr(quantize(normal(4, 128), "int4:g128")) == (
        "QuantizedTensor((4, 128), 'int4:g128:affine', 4.312 bits per weight)"
    )


@pytest.mark.parametrize("seed", range(2))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACT, CONTRACT.reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
