"""Search: which of many documents answer a query.

`bm25` ranks by the words that query and document share; `bm25_numba` is the same, compiled.
`tokenize` makes the words; `metrics` says how good a ranking is.
"""
