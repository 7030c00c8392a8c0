"""`mlsys.quant.formats`: the same codes as ml_dtypes, the nearest number always, saturation said aloud."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import formats
from mlsys.quant.formats import CODEBOOKS, E8M0, FLOATS, Fixed, Integer, named

CONTRACT = CONTRACTS["formats"]
ORACLES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
WHOLE = [Integer(bits, signed) for bits in range(2, 9) for signed in (True, False)]
FIXED = [Fixed(1, 1), Fixed(3, 5), Fixed(8, 8), Fixed(4, 0)]
ALL = [*FLOATS.values(), *CODEBOOKS.values(), *WHOLE, *FIXED]


def all_codes(form):
    return torch.arange(1 << form.bits, dtype=torch.int32).to(torch.uint8 if form.bits <= 8 else torch.int32)


def finite_values(form):
    """Every number that has a code, ascending, without repeats."""
    values = form.decode(all_codes(form)).double()
    if isinstance(form, Integer) and form.signed:
        values = values[values != values.min()]  # it has no positive twin, and nothing is rounded to it
    return values[values.isfinite()].unique()


def raw(array):
    return array.view(np.uint8 if array.itemsize == 1 else np.uint16).astype(np.int64)


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_means_what_ml_dtypes_says(name):
    codes = all_codes(FLOATS[name])
    want = codes.numpy().astype(np.uint8 if FLOATS[name].bits <= 8 else np.uint16).view(ORACLES[name])
    np.testing.assert_array_equal(FLOATS[name].decode(codes).numpy(), want.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(FLOATS[name].decode(codes).numpy()), np.signbit(want.astype(np.float32)))


@pytest.mark.parametrize("name", FLOATS)
def test_float32_gets_the_code_that_ml_dtypes_gives(name):
    form = FLOATS[name]
    rng = np.random.default_rng(0)
    values = finite_values(form).numpy()
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: ties
    small = math.log10(form.largest) - (80 if name == "bf16" else 12)
    spread = rng.uniform(-1, 1, 20_000) * 10.0 ** rng.uniform(small, math.log10(form.largest), 20_000)
    x = np.concatenate([spread, values, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), [-0.0]])
    x = x.astype(np.float32)
    x = x[np.abs(x) <= form.largest]
    np.testing.assert_array_equal(form.encode(torch.from_numpy(x)).numpy(), raw(x.astype(ORACLES[name])))


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "e3m2", "fp16"])
def test_float64_is_rounded_once(name):
    form = FLOATS[name]
    values = finite_values(form)
    middles = (values[1:] + values[:-1]) / 2
    above = torch.nextafter(middles, torch.tensor(math.inf, dtype=torch.float64))  # float32 would make a tie of it
    torch.testing.assert_close(form.decode(form.encode(above)).double(), values[1:], rtol=0, atol=0)


@pytest.mark.parametrize("form", [*FLOATS.values(), *WHOLE, *FIXED], ids=lambda form: str(form))
@settings(max_examples=15)
@given(data=st.data())
def test_the_nearest_number_is_taken(form, data):
    """In exact arithmetic; of two equally near, the one with the even code."""
    most = torch.finfo(torch.float32).max
    low, high = max(-most, 1.5 * float(finite_values(form)[0]) - 1), min(most, 1.5 * form.largest + 1)
    x = data.draw(st.lists(st.floats(low, high, width=32), min_size=1, max_size=8))
    code = form.encode(torch.tensor(x))
    got = form.decode(code).double()
    values = finite_values(form)
    for mine, given_x in zip(got.tolist(), x, strict=True):
        place = int(torch.searchsorted(values, torch.tensor(given_x, dtype=torch.float64)))
        around = values[max(0, place - 2) : place + 2].tolist()
        assert abs(Fraction(mine) - Fraction(given_x)) == min(abs(Fraction(v) - Fraction(given_x)) for v in around)


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
def test_every_number_gets_its_own_code_again(form):
    values = finite_values(form).float()
    torch.testing.assert_close(form.decode(form.encode(values)), values, rtol=0, atol=0)


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
def test_beyond_the_largest_comes_the_largest(form):
    values = finite_values(form).float()
    far = torch.tensor([form.largest * 3, form.largest * 1e5, math.inf])
    assert form.decode(form.encode(far)).tolist() == [float(values[-1])] * 3
    assert form.decode(form.encode(-far)).tolist() == [float(values[0])] * 3
    assert float(values[-1]) == form.largest


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
def test_zero_is_zero_and_keeps_its_sign_where_there_is_one(form):
    assert form.decode(form.encode(torch.tensor([0.0, -0.0]))).tolist() == [0.0, 0.0]
    if form.name in FLOATS:
        assert torch.signbit(form.decode(form.encode(torch.tensor([0.0, -0.0])))).tolist() == [False, True]


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
def test_nan_stays_or_is_refused(form):
    x = torch.tensor([1.0, math.nan])
    if getattr(form, "special", "none") != "none":
        assert form.decode(form.encode(x)).isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match=f"NaN, which {form.name} has no code for"):
            form.encode(x)
    assert form.encode(torch.zeros(0)).shape == (0,)


def test_subnormals_keep_their_steps():
    e4m3 = FLOATS["e4m3"]
    step = 2.0**-9
    assert e4m3.decode(e4m3.encode(torch.tensor([step, 2.4 * step, 2.5 * step, 7.9 * step]))).tolist() == [
        step, 2 * step, 2 * step, 8 * step,
    ]  # fmt: skip


def test_e2m1_by_hand():
    e2m1 = FLOATS["e2m1"]
    assert e2m1.table[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.decode(e2m1.encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_e8m0_cuts_the_exponent_off_and_stops_at_its_ends():
    x = torch.tensor([1.0, 1.5, 1.99, 2.0, 0.75, 3e38, 0.0, 1e-45, math.inf, math.nan])
    assert E8M0.encode(x).tolist() == [127, 127, 127, 128, 126, 254, 0, 0, 254, 255]
    got = E8M0.decode(torch.arange(256).to(torch.uint8)).numpy()
    np.testing.assert_array_equal(
        got, np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )
    with pytest.raises(ValueError, match="negative"):
        E8M0.encode(torch.tensor([-1.0]))


def test_codebooks_are_sorted_and_rounded_to_the_nearest():
    for book in CODEBOOKS.values():
        assert list(book.values) == sorted(book.values)
        x = torch.linspace(-1.2, 1.2, 4001)
        want = (x[:, None] - book.table).abs().argmin(dim=1)
        got = book.encode(x)
        torch.testing.assert_close(book.table[got.int()], book.table[want], rtol=0, atol=0)
    assert named("nf4").encode(torch.tensor([(CODEBOOKS["nf4"].values[8]) / 2])).tolist() == [7]  # a tie: the lower


def test_nf4_has_the_values_of_its_formula():
    np.testing.assert_allclose(CODEBOOKS["nf4"].values, formats.normal_float(), rtol=0, atol=1e-6)


def test_bitsandbytes_has_the_same_tables():
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    _, state = bitsandbytes.quantize_4bit(torch.zeros(64), quant_type="nf4")
    torch.testing.assert_close(CODEBOOKS["nf4"].table, state.code, rtol=0, atol=0)
    torch.testing.assert_close(CODEBOOKS["dynamic8"].table, bitsandbytes.create_dynamic_map(), rtol=0, atol=0)


def test_integers_leave_out_the_number_without_a_twin():
    assert Integer(4, signed=True).decode(torch.tensor([7, 15, 9], dtype=torch.uint8)).tolist() == [7, -1, -7]
    assert Integer(4, signed=True).encode(torch.tensor([-9.0, 9.0, -1.0])).tolist() == [9, 7, 15]
    assert Integer(4).encode(torch.tensor([-3.0, 2.5, 3.5, 99.0])).tolist() == [0, 2, 4, 15]


def test_fixed_point():
    q = Fixed(3, 5)
    assert (q.smallest, q.largest, q.bits) == (-4.0, 4 - 2**-5, 8)
    assert q.encode(torch.tensor([1.0, -1.0, -4.0])).tolist() == [32, 256 - 32, 128]
    assert q.decode(torch.tensor([32, 224, 128], dtype=torch.uint8)).tolist() == [1.0, -1.0, -4.0]
    for bad in ((0, 4), (3, -1), (9, 8), (1, 0), (4.0, 4), ("4", 4)):
        with pytest.raises(ValueError, match="integer bit"):
            Fixed(*bad)


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    q, x = Fixed(4, 4), torch.tensor([0.3, -0.3, 1.0, -7.99]).repeat(20_000, 1)
    got = q.decode(q.encode(x, torch.Generator().manual_seed(0)))
    assert bool(((got - x).abs() < 2**-4).all())
    torch.testing.assert_close(got.mean(dim=0), x[0], rtol=0, atol=4 * 2**-4 / 2 / 20_000**0.5)
    assert got[:, 2].unique().tolist() == [1.0]
    again = q.decode(q.encode(x, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(got, again, rtol=0, atol=0)


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_get_the_codes_of_the_same_in_32(form, dtype):
    """Where the format's numbers, or what is halfway between two of them, are none of the 16-bit type's."""
    values = finite_values(form)
    x = torch.cat((values, (values[1:] + values[:-1]) / 2, 1.5 * values[-1:], -1.5 * values[-1:]))
    low = x.clamp(-60000, 60000).to(dtype)
    assert torch.equal(form.encode(low), form.encode(low.float()))


@pytest.mark.parametrize("form", ALL, ids=lambda form: str(form.name))
def test_transposes_are_read_as_they_stand(form):
    x = torch.linspace(-1, 1, 35).reshape(5, 7)
    assert torch.equal(form.encode(x.t()), form.encode(x).t())


def test_integers_of_other_widths_are_refused():
    for bits, signed in ((0, False), (9, False), (1, True), (4.0, True), (True, False), ("4", True)):
        with pytest.raises(ValueError, match=r"bits=.* must be \d … 8"):
            Integer(bits, signed)


@pytest.mark.parametrize("name", ["int4", "uint3", "e4m3", "bf16", "nf4", "e8m0", "q8.8"])
def test_formats_have_names(name):
    assert named(name).bits in range(3, 17)


def test_unknown_names_are_refused():
    for name in ("int9", "uint1", "e4m4", "q8", ""):
        with pytest.raises(ValueError, match="no format"):
            named(name)
    with pytest.raises(TypeError, match="name must be text"):
        named(None)


def test_inputs_are_not_changed():
    x = torch.randn(50)
    kept = x.clone()
    for form in ALL:
        formats.named(form.name).encode(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("seed", range(2))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACT, CONTRACT.reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
