"""half and bfloat16 in kernels on the processor: the same bits as torch's."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mlsys.kernels.cuda import check, load

FILE = load(Path(__file__).parent / "files" / "formats.cu")
FORMATS = {"half": torch.float16, "bfloat16": torch.bfloat16}
by_format = pytest.mark.parametrize("name", FORMATS)


def patterns(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def run(kernel, n, *args):
    FILE[kernel](-(-n // 256), 256, n, *args)


def drawn(n, seed, dtype=torch.float32):
    """Numbers of all sizes, special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64) * 2 ** torch.randint(
        -26, 18, (n,), generator=generator
    )
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        65504.0,
        2.0**-24,
        2.0**-14,
        3e38,
        1e-40,
    ]
    x[: len(special)] = torch.tensor(special, dtype=torch.float64)
    return x.to(dtype)


def same_bits(got, want):
    """Equal bit by bit, but for which NaN it is."""
    number = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])


@by_format
def test_each_of_65536_patterns_as_a_float(name):
    x, y = patterns(FORMATS[name]), torch.zeros(65536)
    run(f"widen_{name}", 65536, x, y)
    number = ~x.isnan()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.view(torch.int32)[number], x.float().view(torch.int32)[number])


@by_format
def test_floats_round_to_nearest_even(name):
    """Each value, what lies halfway to the next, and a float on both sides of that."""
    dtype = FORMATS[name]
    values = patterns(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = ((values[:-1].double() + values[1:].double()) / 2).float()
    beside = torch.cat([middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([values, middles, beside, drawn(4096, 1)])
    y = torch.zeros(x.numel(), dtype=dtype)
    run(f"narrow_{name}", x.numel(), x, y)
    same_bits(y, x.to(dtype))


@by_format
def test_doubles_and_ints_are_rounded_once(name):
    dtype = FORMATS[name]
    values = patterns(dtype).double()
    values = values[values.isfinite()].sort().values
    middles = (values[:-1] + values[1:]) / 2
    above = middles * (1 + 2.0**-50)  # a float would take it for the middle
    x = torch.cat([above, middles])
    y = torch.zeros(x.numel(), dtype=dtype)
    run(f"narrow_double_{name}", x.numel(), x, y)
    away = torch.where(above > 0, values[1:], values[:-1])
    same_bits(y[: above.numel()][middles != 0], away[middles != 0].to(dtype))
    same_bits(y[above.numel() :], middles.float().to(dtype))
    whole = torch.tensor(
        [0, 1, -1, 2049, 2051, 65519, 65520, -65504, 2**24 + 1, 257, 259, -(2**31), 2**31 - 1, 33685505]
    )
    y = torch.zeros(whole.numel(), dtype=dtype)
    run(f"narrow_int_{name}", whole.numel(), whole.int(), y)
    want = [rounded(Fraction(int(i)), dtype) for i in whole]
    same_bits(y, torch.stack(want))


def rounded(x, dtype):
    """An exact fraction rounded to nearest, ties to even: the best of the neighbours of a first guess."""
    guess = torch.tensor(float(x), dtype=torch.float64).to(dtype)
    if not guess.isfinite():
        return guess
    bits = int(guess.view(torch.int16))
    near = [torch.tensor(b, dtype=torch.int16).view(dtype) for b in (bits, bits - 1, bits + 1) if -32768 <= b < 32768]
    near = [n for n in near if n.isfinite()]
    return min(near, key=lambda n: (abs(Fraction(float(n)) - x), int(n.view(torch.int16)) & 1))


@by_format
def test_arithmetic_rounds_after_each_operation(name):
    dtype, n = FORMATS[name], 20000
    a, b, c = (
        drawn(n, seed).to(dtype)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] for seed in (1, 2, 3)
    )
    a[:2], b[:2] = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
    out = torch.zeros(12, n, dtype=dtype)
    run(f"arithmetic_{name}", n, a, b, c, out)
    x, y = a.float(), b.float()
    for row, want in enumerate([x + y, x - y, x * y, x / y, -x]):
        same_bits(out[row], want.to(dtype))
    for row, want in ((6, torch.fmax(x, y)), (7, torch.fmin(x, y))):
        torch.testing.assert_close(out[row].float(), want, rtol=0, atol=0, equal_nan=True)
    assert not out[6][:2].signbit().any()
    assert out[7][:2].signbit().all()
    same_bits(out[8], x.abs().to(dtype))
    same_bits(out[10], x.abs().double().sqrt().float().to(dtype))  # torch's float sqrt is an ulp off at times
    same_bits(out[11], (1 / x).to(dtype))
    finite = x.exp().isfinite()
    torch.testing.assert_close(out[9][finite].float(), x.exp()[finite].to(dtype).float(), rtol=2**-7, atol=2**-24)


@by_format
def test_fma_rounds_once(name):
    """Where rounding the product, or the sum to a float, and then again gives another number, too."""
    dtype = FORMATS[name]
    places = 10 if dtype == torch.float16 else 7
    one = 1.0 + 2.0**-places
    planted = [
        (one, one, 2.0**-24),
        (one, one, -(2.0**-24)),
        (one, 1.0, 2.0 ** -(places + 1)),
        (one, one, 2.0**-14),
        (1.0, one, -1.0),
    ]
    a, b, c = (
        torch.cat([torch.tensor([p[i] for p in planted]), drawn(600, 7 + i).float()]).to(dtype) for i in range(3)
    )
    keep = a.isfinite() & b.isfinite() & c.isfinite() & (a.abs() < 100) & (b.abs() < 100) & (c.abs() < 1e4)
    a, b, c = a[keep], b[keep], c[keep]
    out = torch.zeros(12, len(a), dtype=dtype)
    run(f"arithmetic_{name}", len(a), a, b, c, out)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    want = torch.stack([rounded(x, dtype) for x in exact])
    assert torch.equal(out[5].float(), want.float())
    assert len(a) > 300


@by_format
def test_comparisons(name):
    dtype = FORMATS[name]
    a, b = drawn(2000, 4).to(dtype), drawn(2000, 5).to(dtype)
    b[1000:1500] = a[1000:1500]
    out = torch.zeros(2000, dtype=torch.int32)
    run(f"compare_{name}", 2000, a, b, out)
    tests = [a < b, a <= b, a == b, a != b, a > b, a >= b, a.isnan()]
    assert torch.equal(out, sum(t.int() << i for i, t in enumerate(tests)))


def test_pairs():
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(32, 2, generator=generator) for _ in range(2))
    y, wide = torch.zeros(32, 2, dtype=torch.float16), torch.zeros(32, 2)
    FILE["pairs"](1, 32, a.half(), b.half(), y, wide)
    want = (a.half().double() * b.half().double() + a.half().double()).half()
    assert torch.equal(y, want.flip(1))
    assert torch.equal(wide, want.float())
    y, wide = torch.zeros(32, 2, dtype=torch.bfloat16), torch.zeros(32)
    FILE["pairs_bfloat16"](1, 32, a.bfloat16(), b.bfloat16(), y, wide)
    assert torch.equal(y, a.bfloat16() * b.bfloat16())
    assert torch.equal(wide, y.float().sum(1))


def test_atomic_sums():
    x = torch.full((64,), 0.25, dtype=torch.float16)
    results = [
        torch.zeros(n, dtype=dtype) for n, dtype in ((1, torch.float16), (2, torch.float16), (1, torch.bfloat16))
    ]
    FILE["sums"](2, 64, x, *results)
    assert [r.tolist() for r in results] == [[32.0], [32.0, 128.0], [128.0]]
    assert check(FILE["sums"], 2, 64, x, *results) == []


def test_shuffles():
    x, y = torch.arange(32).half(), torch.zeros(32, dtype=torch.float16)
    FILE["shuffles"](1, 32, x, y)
    assert y.tolist() == [496.0] * 32


def test_shared_arrays_need_no_initialiser_and_are_watched():
    x, y = torch.arange(256).half(), torch.zeros(256, dtype=torch.float16)
    FILE["reversed"](1, 256, x, y, shared=512)
    assert torch.equal(y, (x + 1).flip(0))
    assert check(FILE["reversed"], 1, 256, x, y, shared=512) == []
    (finding,) = check(FILE["unordered"], 1, 256, x, y)
    assert finding.kind == "race"
    lines = {FILE.text.splitlines()[line - 1].strip() for line in (finding.line, finding.other_line)}
    assert lines == {"a[threadIdx.x] = x[threadIdx.x];", "y[threadIdx.x] = a[255 - threadIdx.x];"}


def test_a_half_as_an_argument():
    x, y = torch.arange(32).half(), torch.zeros(32, dtype=torch.float16)
    FILE["scaled"](1, 32, 32, 0.3, x, y)
    assert torch.equal(y, x * torch.tensor(0.3).half())
