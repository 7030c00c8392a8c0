"""Attention: the plain formula, and ways to compute it without its t × s matrix.

Tensors are `(batch, heads, seq, head_dim)`. Queries may outnumber key/value heads
(grouped-query attention). Causal masks are aligned bottom-right: the last query
sees every key.

`merge`     attention over two sets of keys, done apart, is attention over both: the idea behind the rest.
`naive`     the formula, one line an equation; the reference for everything else here.
`flash`     the same numbers tile by tile, forward and backward, in linear memory; packed sequences.
            `flash_numba` is the same, with what happens between the matmuls compiled,
            `flash_triton` one fused kernel a pass, for a GPU.
`linear`    without the softmax: the past in one matrix that decays, in chunks, step by step, or as one masked matrix.
`variants`  windows, masks, ALiBi, soft-cap, sinks: the options that the two share.
`kv_cache`  keys and values in blocks that sequences share, so that nothing is reserved in vain; 16 or 8 bits.
`paged`     attention that reads such blocks: decoding, prompts in pieces, shared prefixes once.
            `paged_triton` reads them in as many parts as fill a GPU.
"""
