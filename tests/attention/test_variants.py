"""`mlsys.attention.variants`: what the options take; the slopes and masks, number by number."""

import pytest
import torch

from mlsys.attention import flash, naive, variants


def drawn(t):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, t, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_slopes_of_a_power_of_two_are_a_geometric_sequence():
    assert variants.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(variants.alibi_slopes(16)[:2], torch.tensor([2**-0.5, 2**-1.0]))
    assert variants.alibi_slopes(1).tolist() == [2.0**-8]


def test_slopes_of_other_numbers_take_those_between():
    """As the authors' code: 12 heads are the 8 slopes, then every other one of 16."""
    slopes = variants.alibi_slopes(12)
    assert torch.equal(slopes[:8], variants.alibi_slopes(8))
    assert torch.equal(slopes[8:], variants.alibi_slopes(16)[0:8:2])


def test_a_prefix_sees_itself_whole():
    assert variants.prefix_mask(3, 4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert variants.prefix_mask(3, 3, 3).all()
    assert torch.equal(variants.prefix_mask(3, 4, 0), torch.ones(3, 4).tril(1).bool())


def test_documents_are_packed_sequences():
    q, k, v = drawn(7)
    masked = flash.attention(q, k, v, causal=True, mask=variants.document_mask(torch.tensor([0, 0, 0, 1, 2, 2, 2])))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, 3, 4, 7])
    torch.testing.assert_close(masked[0].transpose(0, 1), flash.varlen(*packed, ends, ends, causal=True))


def test_streaming_keeps_the_first_keys_and_the_latest():
    assert variants.streaming_mask(6, 6, 1, 2).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    q, k, v = drawn(9)
    masked = naive.attention(q, k, v, mask=variants.streaming_mask(9, 9, 0, 3))
    torch.testing.assert_close(masked, naive.attention(q, k, v, causal=True, window=(2, -1)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: variants.alibi_slopes(0), ValueError, "heads must be at least 1, got 0"),
        (lambda: variants.alibi_slopes(8.0), TypeError, "heads must be an int, got float"),
        (lambda: variants.prefix_mask(3, 3, -1), ValueError, "prefix must be at least 0, got -1"),
        (lambda: variants.streaming_mask(3, 3, 1, True), TypeError, "window must be an int, got bool"),
        (lambda: variants.document_mask([0, 1]), ValueError, "documents must be a tensor of one number a token"),
    ],
)
def test_bad_input_names_argument_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
