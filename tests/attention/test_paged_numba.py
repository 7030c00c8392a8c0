"""What is `paged_numba`'s own: numbers as stored, rows four at a time, tokens two; the rest is in `test_paged`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys.attention import paged, paged_numba


def blocks(h_kv, group, block, d, lengths, dtype=torch.float64, seed=0):
    """Queries and blocks of sequences that lie in a row, without a gap: the arguments of `decode`."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-n // block) for n in lengths]
    tables = torch.full((len(lengths), max(widths)), -1, dtype=torch.int32)
    for i, width in enumerate(widths):
        tables[i, :width] = torch.arange(width) + sum(widths[:i])
    keys, values = (torch.randn(sum(widths), h_kv, block, d, generator=generator).to(dtype) for _ in "kv")
    q = torch.randn(len(lengths), h_kv * group, d, generator=generator).to(dtype)
    return q, keys, values, tables, torch.tensor(lengths, dtype=torch.int32)


@given(
    h_kv=st.integers(1, 3),
    group=st.integers(1, 9),
    block=st.integers(1, 9),
    d=st.integers(1, 40),
    length=st.integers(1, 40),
    window=st.integers(-1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_and_tokens_that_are_left_over(h_kv, group, block, d, length, window, seed):
    """Four rows and two tokens are done at once: any number of either must come out as `paged` has it."""
    given_ = blocks(h_kv, group, block, d, [length, 1, 2 * length], seed=seed)
    want = paged.decode(*given_, window=(window, -1), return_lse=True)
    got = paged_numba.decode(*given_, window=(window, -1), return_lse=True)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("d", "layers"), [(64, 1), (64, 400), (600, 400)])
def test_pieces_that_are_fetched_ahead_and_pieces_that_are_not(d, layers):
    """Small ones, of a cache that is larger than what a processor keeps: of that, this is one layer."""
    q, keys, values, *where = blocks(2, 4, 16, d, [100, 3], torch.float32)
    kept = torch.empty(layers, *keys.shape)[-1]
    kept.copy_(keys)
    assert paged_numba._layers(kept) == layers
    assert (103 * 2 * 2 * d * 4 * layers > paged_numba.NEAR) == (layers > 1)
    assert (keys[0, 0].nbytes <= paged_numba.FETCHED) == (d == 64)
    torch.testing.assert_close(
        paged_numba.decode(q, kept, values, *where), paged.decode(q, keys, values, *where), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("softcap", [None, 1e-3, 3.0, 1e4])
def test_the_compiled_softmax_in_float32(softcap, group):
    """2^x is a polynomial there; in float64 it is the library's."""
    given_ = blocks(2, group, 4, 16, [70, 1, 33])
    alibi = torch.linspace(0.0, 2.0, 2 * group)
    options = {"softcap": softcap, "alibi": alibi, "sinks": torch.linspace(-3, 3, 2 * group), "window": (40, 0)}
    want = paged.decode(*given_, return_lse=True, **options)
    q, keys, values, *where = given_
    got = paged_numba.decode(q.float(), keys.float(), values.float(), *where, return_lse=True, **options)
    torch.testing.assert_close(tuple(x.double() for x in got), want, rtol=1e-5, atol=1e-5)


def test_every_code_of_8_bits_and_every_bfloat16_is_read_as_torch_reads_it():
    """One token a block and one key that is looked at: the output is the value itself."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    for values in (bytes_.view(torch.float8_e4m3fn), bytes_.view(torch.int8)):
        values = values[values.float().isfinite()].view(1, 1, 1, -1)
        keys, ones = torch.zeros(1, 1, 1, 1, dtype=values.dtype), torch.ones(1, 1, 1)
        cache = keys, values, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        out = paged_numba.decode(torch.ones(1, 1, 1), *cache, scales=(ones, ones))
        assert torch.equal(out.flatten(), values.float().flatten())
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()].view(1, 1, 1, -1)
        cache = torch.zeros(1, 1, 1, 1, dtype=dtype), values, cache[2], cache[3]
        assert torch.equal(paged_numba.decode(torch.ones(1, 1, 1, dtype=dtype), *cache).flatten(), values.flatten())


@pytest.mark.usefixtures("unchecked_types")
def test_compiled_code_is_for_the_cpu():
    q, keys, values, tables, lengths = blocks(1, 4, 4, 8, [9])
    with pytest.raises(ValueError, match=r"q must be on the CPU, got meta: use paged there"):
        paged_numba.decode(q.to("meta"), keys, values, tables, lengths)
