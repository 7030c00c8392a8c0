"""Attention: the plain formula, and ways to compute it without its t × s matrix.

Tensors are `(batch, heads, seq, head_dim)`. Queries may outnumber key/value heads
(grouped-query attention). Causal masks are aligned bottom-right: the last query
sees every key.

`naive`  the formula, one line an equation; the reference for everything else here.
`flash`  the same numbers tile by tile, forward and backward, in linear memory.
"""
