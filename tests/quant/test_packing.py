"""`mlsys.quant.packing`: bits lie where the picture says, come back as they were, and bad widths are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant.packing import pack, packed_bytes, unpack

CONTRACT = CONTRACTS["packing"]


def by_numpy(codes, bits):
    """Each code as its bits, lowest first; all of them in a row, eight to a byte."""
    each = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


@given(bits=st.integers(1, 8), rows=st.integers(0, 3), n=st.integers(0, 40), seed=st.integers(0, 9))
def test_bits_lie_where_numpy_puts_them_and_come_back(bits, rows, n, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, rows, n)).astype(np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (2, rows, packed_bytes(n, bits))
    if codes.size:
        np.testing.assert_array_equal(packed.numpy(), by_numpy(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits, n).numpy(), codes)


def test_the_picture():
    """Code i is all ones, the others are 0: its digits' places in the picture are 1."""
    for bits, picture in ((4, "11110000 33332222 55554444"), (3, "22111000 54443332 77766655")):
        for code in range(6 if bits == 4 else 8):
            codes = torch.zeros(6 if bits == 4 else 8, dtype=torch.uint8)
            codes[code] = (1 << bits) - 1
            drawn = ["".join("1" if digit == str(code) else "0" for digit in byte) for byte in picture.split()]
            assert [f"{byte:08b}" for byte in pack(codes, bits).tolist()] == drawn
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 4, 7, 0, 0, 0, 5], dtype=torch.uint8), 3).tolist() == [
        0b00010001,
        0b1111,
        0b10100000,
    ]


def test_every_byte_comes_back():
    codes = torch.arange(256, dtype=torch.uint8)
    for bits in range(1, 9):
        few = codes[: 1 << bits].reshape(2, -1)
        assert torch.equal(unpack(pack(few, bits), bits, few.shape[1]), few)


def test_slices_and_transposes_are_read_as_they_stand():
    codes = torch.randint(0, 8, (16, 24), dtype=torch.uint8)
    for view in (codes.t(), codes[1::2, 3:], codes[:, 1:9]):
        packed = pack(view, 3)
        np.testing.assert_array_equal(packed.numpy(), by_numpy(view.contiguous().numpy(), 3))
        wide = torch.zeros(packed.shape[0], packed.shape[1] + 3, dtype=torch.uint8)
        wide[:, 3:] = packed
        assert torch.equal(unpack(wide[:, 3:], 3, view.shape[1]), view)


def test_the_result_is_new_memory():
    codes = torch.ones(2, 8, dtype=torch.uint8)
    for bits in (4, 8):
        pack(codes, bits).fill_(0)
        unpack(codes, bits, 16 if bits == 4 else 8).fill_(0)
    assert bool((codes == 1).all())


def test_bad_requests_are_refused():
    codes = torch.tensor([[1, 8]], dtype=torch.uint8)
    for call, error, message in (
        (lambda: pack(codes, 3), ValueError, r"below 2\^3 = 8, got 8"),
        (lambda: pack(codes.int(), 4), TypeError, "codes must be uint8, got torch.int32"),
        (lambda: pack(codes, 0), ValueError, "bits must be 1 … 8, got 0"),
        (lambda: pack(codes, True), ValueError, "bits must be"),
        (lambda: pack(codes, 4.0), ValueError, "bits must be"),
        (lambda: pack([1, 2], 4), TypeError, "codes must be a dense tensor that holds numbers, got list"),
        (lambda: pack(codes.to("meta"), 4), TypeError, "got a meta tensor"),
        (lambda: unpack(codes.to_sparse(), 4, 4), TypeError, "packed must be a dense tensor .* got torch.sparse_coo"),
        (lambda: unpack(codes, 4, 4.0), TypeError, "n must be a number of codes, got 4.0"),
        (lambda: pack(codes[0, 0], 4), ValueError, "at least one dimension"),
        (lambda: unpack(codes, 4, 5), ValueError, "rows of 2 bytes; 5 codes of 4 bits take 3"),
        (lambda: unpack(codes, 8, 1), ValueError, "rows of 2 bytes; 1 codes of 8 bits take 1"),
        (lambda: unpack(codes.float(), 4, 4), TypeError, "packed must be uint8"),
        (lambda: unpack(codes, 9, 2), ValueError, "bits must be"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("seed", range(2))
def test_contract_accepts_the_reference(seed):
    verdict = check(CONTRACT, CONTRACT.reference, seed=seed)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("wrong", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(wrong):
    failure = check(CONTRACT, CONTRACT.wrong[wrong].impl, seed=1).failure
    assert failure is not None
    assert failure.like == wrong
