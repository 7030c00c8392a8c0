"""Models: one small decoder-only transformer that every later package trains, quantizes, splits and serves.

Tokens are `(batch, seq)` integers, hidden states `(batch, seq, d_model)`, logits `(batch, seq, vocab)`.

`transformer`  GPT-2 or Llama style from one frozen config, with KV caches, `generate`, `save` and `load`.
`training`     trains it on real text, and resumes after being killed at any moment.
"""
