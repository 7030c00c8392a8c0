"""Search: which of many documents, or vectors, answer a query.

Text: `bm25` ranks by the words that query and document share; `tokenize` makes the words.
Vectors: `exact` compares a query with all of them, `ivf` with those of a few regions, `pq` and `ivfpq` with
codes of a few bytes, `hnsw` with those that it meets on its way through a graph.
Both: `late_interaction` compares the vectors of all tokens, `fusion` makes one ranking of several, `metrics`
says how good a ranking is. A module that ends in `_numba` is the same as the one without, compiled.
"""
