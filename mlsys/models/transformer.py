"""A decoder-only transformer, GPT-2 or Llama style from one config: next-token logits for every position.

Each token starts as a row of the embedding. Every block lets it read the tokens
before it (attention), then works on it alone (MLP), and adds both results to
what it has. What stands at position i in the end predicts token i + 1:

    x = E[tokens]  (+ P[positions], where positions are learned)
    x ← x + attention(norm(x));   x ← x + mlp(norm(x))       `layers` times
    logits = norm(x) Wᵀ                                      W is E itself where the two are tied

|           | GPT-2                          | Llama                                    |
|-----------|--------------------------------|------------------------------------------|
| positions | learned, added once            | rotary: q and k are turned in each layer |
| norm      | LayerNorm                      | RMSNorm                                  |
| MLP       | gelu(x U) D, GELU in tanh form | (silu(x G) · (x U)) D                    |
| biases    | in linear layers and norms     | none                                     |
| heads     | each with its keys and values  | groups may share them (GQA)              |

Attention is a function argument, `attention(q, k, v, *, causal)`: any of
`mlsys.attention` fits. The default is `naive.attention`, which is quicker up to
some 250 tokens and when a batch is decoded (on a CPU, `flash` walks over the
heads one by one), and has every derivative. From some 500 tokens on pass
`flash.attention`: naive then loses in time, and keeps all scores for the backward pass.

With a cache, a forward pass is over new tokens only, and attention is done by the cache, which knows where keys and
values are: `KVCache` in one piece, or `mlsys.attention.kv_cache` in blocks that sequences share. `generate` gives the
same tokens with either and with none.

The layers themselves (rotation, cache, attention, MLP) are in `_layers.py`: read that next.

Cost:
    2 FLOPs a token for each weight of a matrix (the embedding is looked up, the
    output matrix counts), and 4·layers·heads·head_dim·s for attention to s
    tokens; a training step costs three times the forward pass. Exactly:
    `mlsys.perf.transformer.forward_flops`.

Memory:
    The parameters; for the cache 2·layers·kv_heads·head_dim numbers a token; the
    logits, b·t·vocab numbers, which for a small model are its largest activation.

Where it loses: each operation is a call of its own, with its intermediate result
in memory. Compiled or hand-fused models save those trips, most of all in decoding,
where a step of a small model is mostly the overhead of some hundred calls.

Papers:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (norms, initialisation).
    Touvron et al. 2023, arXiv:2302.13971, section 2.2 (RMSNorm, SwiGLU and rotary positions together).
    Su et al. 2021, arXiv:2104.09864, sections 3.2.2 and 3.4.2 (rotary positions).
    Zhang & Sennrich 2019, arXiv:1910.07467, equation 4 (RMSNorm).
    Shazeer 2020, arXiv:2002.05202, section 2 (SwiGLU).
    Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2 (GELU and its tanh form).
    Ainslie et al. 2023, arXiv:2305.13245, section 2.2 (grouped queries).
    Press & Wolf 2017, arXiv:1608.05859 (tied embedding and output).

See also:
    `mlsys.perf.configs` (configs, also of published models), `mlsys.perf.transformer` (what one costs),
    `mlsys.attention` (what to pass as `attention`), `mlsys.attention.kv_cache` and `paged` (blocks, and reading them).
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.attention import naive
from mlsys.attention.kv_cache import BLOCK, Batch, PagedKVCache, Sequence
from mlsys.models import _checkpoint
from mlsys.models._inputs import check_ids
from mlsys.models._layers import AttentionFn, Block, Cache, KVCache, embedding, norm, rotation
from mlsys.perf.configs import Config

__all__ = ["AttentionFn", "Cache", "Config", "KVCache", "Transformer", "generate", "init", "load", "save"]

INIT_STD = 0.02


class Transformer(nn.Module):
    """The model of a config. Its weights are drawn by `init`, from torch's global generator; `load` reads saved ones.

    Under `device="meta"` it has every shape and holds nothing, however large the config.
    ValueError for configs with latent attention or experts, which this library only counts.
    """

    def __init__(
        self,
        config: Config,
        *,
        attention: AttentionFn = naive.attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config (see mlsys.perf.configs), got {type(config).__name__}")
        if not callable(attention):
            raise TypeError(f"attention must be a function such as naive.attention, got {type(attention).__name__}")
        for name in ("latent", "experts"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"config.{name} must be None, got {getattr(config, name)}: this module builds plain heads and one "
                    "MLP a block; mlsys.perf.transformer counts the others"
                )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.token_embedding = embedding(config.vocab, config.d_model, **factory)
        learned = config.positions == "learned"
        self.position_embedding = embedding(config.context, config.d_model, **factory) if learned else None
        self.blocks = nn.ModuleList(Block(config, attention, **factory) for _ in range(config.layers))
        self.norm = norm(config, **factory)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab, bias=False, **factory)
        init(self)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        cache: Cache | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b t vocab"]:
        """Logits of the token that follows each of these; position i sees 0 … i, and all that is in the cache.

        tokens:     ids below `config.vocab`, int64 or int32, at least one.
        cache:      takes in keys and values; `tokens` are those that follow what it holds. Needs `torch.no_grad()`.
        positions:  what is told to the model as their positions (what a token sees is decided by order alone);
                    by default they count on from the cache's length, or from 0.
        TypeError or ValueError if tokens or positions are of a wrong type, out of range, empty or too many.
        """
        return self.logits(self.hidden(tokens, cache=cache, positions=positions))

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        cache: Cache | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b t d_model"]:
        """What `forward` multiplies with the output matrix: the last block's result, normalised."""
        positions = self._check(tokens, cache, positions)
        config, x = self.config, self.token_embedding(tokens)  # (b, t, d_model)
        cos_sin = None
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            cos, sin = rotation(positions, config.head_dim, config.rope_theta)
            if positions.ndim == 2:
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (b, 1, t, half): the same for all heads
            cos_sin = cos.to(wide), sin.to(wide)  # the same for all layers
        for layer, block in enumerate(self.blocks):
            x = block(x, cos_sin, cache, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of every token from hidden states: of the last position only, if only that one is passed."""
        head = self.token_embedding if self.head is None else self.head
        return F.linear(hidden, head.weight)

    def loss(self, tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats of `targets`, the token that follows each of `tokens`.

        In float32 at least: in 16 bits the sum over the vocabulary would lose most of its terms.
        """
        check_ids("targets", targets, 2, self.config.vocab, "vocab", self.token_embedding.weight.device)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        logits = self(tokens).flatten(0, 1)  # (b·t, vocab)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets.flatten().long())

    def cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (`config.context`), in the model's dtype."""
        weight = self.token_embedding.weight
        return KVCache(self.config, batch, capacity, device=weight.device, dtype=weight.dtype)

    def paged_cache(
        self, blocks: int, block: int = BLOCK, *, window: int | None = None, quantized: str | None = None
    ) -> PagedKVCache:
        """An empty cache of `blocks` blocks of `block` tokens, which any number of sequences share, of any lengths.

        window, quantized: as in `mlsys.attention.kv_cache`; a window must be that of the model's attention. Pass it to
        `generate`, or `cache.batch(seqs)` to `forward`.
        """
        weight, config = self.token_embedding.weight, self.config
        shape = (config.layers, config.kv_heads, config.head_dim, blocks, block)
        return PagedKVCache(*shape, window=window, quantized=quantized, dtype=weight.dtype, device=weight.device)

    def _check(self, tokens: Tensor, cache: Cache | None, positions: Tensor | None) -> Tensor:
        """The positions to use, after refusing what no model could read."""
        check_ids("tokens", tokens, 2, self.config.vocab, "vocab", self.token_embedding.weight.device)
        t, start = tokens.shape[1], 0 if cache is None else cache.length
        if tokens.numel() == 0:
            raise ValueError(f"tokens must hold at least one token, got shape {tuple(tokens.shape)}")
        if start + t > self.config.context:
            cached = f" after {start} in the cache" if start else ""
            raise ValueError(f"tokens must fit in the context of {self.config.context}, got {t}{cached}")
        if cache is not None and cache.layers != self.config.layers:
            raise ValueError(
                f"cache must have the model's {self.config.layers} layers, got {cache.layers}: use model.cache"
            )
        if positions is None:
            return torch.arange(t, device=tokens.device) if cache is None else cache.positions(t)
        check_ids("positions", positions, 1, self.config.context, "context", tokens.device)
        if positions.shape[0] != t:
            raise ValueError(f"positions must have one entry for each of {t} tokens, got {positions.shape[0]}")
        return positions


@torch.no_grad()
def init(model: Transformer, generator: torch.Generator | None = None) -> Transformer:
    """Draw the weights as GPT-2 does, in place: the same `generator` seed gives the same weights.

    Matrices from N(0, 0.02²), and those that add to the residual stream from N(0, 0.02² / 2·layers): the stream
    is a sum of 2·layers of them. Biases 0, norms 1. The generator must be on the model's device.
    """
    residual_std = INIT_STD / math.sqrt(2 * model.config.layers)
    for name, weight in model.named_parameters():
        if weight.is_meta:  # nothing to draw; torch would load its decompositions for it, which takes seconds
            continue
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
            weight.normal_(0.0, residual_std if residual else INIT_STD, generator=generator)
    return model


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Int[Tensor, "b t"],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    cache: bool | PagedKVCache = True,
    chunk: int | None = None,
) -> Int[Tensor, "b total"]:
    """The prompt followed by `n` sampled tokens; position by position, each one conditioned on all before it.

    temperature:  divides the logits: below 1 sharper, 0 always the likeliest token.
    top_k:        sample among the k likeliest tokens only.
    cache:        True: keep keys and values in one piece; False: keep none, and run the whole sequence again for each
                  token. Or a cache of `model.paged_cache`, shared by calls: what it knows of the beginning of a prompt
                  is not computed again, equal prompts hold the same blocks, and what this call computes is there for
                  the next, for as long as the room is not needed.
    chunk:        take the prompt in so many tokens at a time, so that no activation is as long as the prompt.

    The tokens are the same whatever `cache` and `chunk` are, to rounding: only where two tokens are equally likely
    to the last digit, or a cache is quantized, another one may win. To interrupt a sequence is to call again with the
    tokens so far and the same generator. A paged cache holds no sequence of this call afterwards, whatever happens.

    ValueError if prompt and `n` exceed the context, or an option is out of range; `OutOfBlocks` (of
    `mlsys.attention.kv_cache`) if a paged cache is too small, before the first token is sampled unless it has a window.
    """
    check_ids("prompt", prompt, 2, model.config.vocab, "vocab", model.token_embedding.weight.device)
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an int of at least 0, got {n!r}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or not 1 <= top_k <= model.config.vocab):
        raise ValueError(f"top_k must be None or an int between 1 and vocab = {model.config.vocab}, got {top_k!r}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be None or an int of at least 1, got {chunk!r}")
    if not isinstance(cache, bool | PagedKVCache):
        raise TypeError(f"cache must be True, False or a cache of model.paged_cache, got {type(cache).__name__}")
    if chunk is not None and cache is False:
        raise ValueError(f"chunk must be None without a cache, got {chunk}: the next chunk would not see this one")
    if prompt.shape[1] + n > model.config.context:
        raise ValueError(
            f"prompt and n must fit in the context of {model.config.context} tokens, got {prompt.shape[1]} + {n}: "
            "shorten the prompt or ask for fewer"
        )
    if n == 0:
        return prompt
    with ExitStack() as held:
        kv: KVCache | Batch | None
        if isinstance(cache, PagedKVCache):
            kv, logits = _take_in(model, prompt, n, cache, chunk, held)
        else:
            kv = model.cache(prompt.shape[0], prompt.shape[1] + n) if cache else None
            logits = _next(model, prompt, kv, chunk)
        tokens = prompt
        while True:
            tokens = torch.cat((tokens, _sample(logits, temperature, top_k, generator).to(tokens.dtype)), dim=1)
            if tokens.shape[1] == prompt.shape[1] + n:
                return tokens
            logits = _next(model, tokens if kv is None else tokens[:, kv.length :], kv)


def _take_in(
    model: Transformer, prompt: Tensor, n: int, cache: PagedKVCache, chunk: int | None, held: ExitStack
) -> tuple[Batch, Tensor]:
    """Each row of the prompt as a sequence of the paged cache, to be freed with `held`, and the logits after each.

    Row by row, for each may know another part of its prompt, also from the row before. Equal rows are forks: computed
    once, in the same blocks, until they differ.
    """
    rows, seqs, logits = prompt.tolist(), list[Sequence](), list[Tensor]()
    for i, row in enumerate(rows):
        twin = rows.index(row)
        seqs.append(cache.pool.start(row) if twin == i else cache.pool.fork(seqs[twin]))
        held.callback(cache.pool.free, seqs[i])
        unseen = prompt[i : i + 1, seqs[i].length :]
        logits.append(_next(model, unseen, cache.batch(seqs[i:]), chunk) if twin == i else logits[twin])
    if cache.pool.window is None:  # a window gives blocks back on the way, so that fewer may do
        cache.reserve(seqs, n - 1)
    return cache.batch(seqs), torch.cat(logits)


def _next(
    model: Transformer, tokens: Tensor, cache: KVCache | Batch | None, chunk: int | None = None
) -> Float[Tensor, "b vocab"]:
    """The logits of what follows `tokens`, which follow what the cache holds; `chunk` tokens in one pass."""
    for part in tokens.split(chunk or max(1, tokens.shape[1]), dim=1):
        if isinstance(cache, Batch):
            cache.tell(part)  # whose keys and values these are, so that others can use them
        hidden = model.hidden(part, cache=cache)
    return model.logits(hidden[:, -1])


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token of each row, (b, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    kept, ids = logits.topk(top_k or logits.shape[-1], dim=-1)  # largest first
    kept = kept.double()  # a temperature that float32 rounds to 0 would give 0/0
    # The largest is subtracted first: a division by a small temperature then overflows to −∞ only, which is 0
    weights = ((kept - kept[:, :1]) / temperature).softmax(-1)
    return ids.gather(-1, torch.multinomial(weights, 1, generator=generator))


def save(model: Transformer, path: str | os.PathLike[str]) -> None:
    """Write the weights and the config to one safetensors file, whole or not at all; tied weights once.

    A checksum of both goes into its metadata. Holds a serialised copy of the weights in memory meanwhile.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
    _checkpoint.write(path, asdict(model.config), model.state_dict())


def load(
    path: str | os.PathLike[str],
    *,
    attention: AttentionFn = naive.attention,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model that `save` wrote, in the dtype it was saved in unless `dtype` says otherwise.

    ValueError if the file is damaged or holds something else; OSError as for `open`.
    """
    config, weights = _checkpoint.read(path)
    try:
        model = Transformer(Config(**config), attention=attention, device="meta")
        model.load_state_dict({k: w.to(device, dtype or w.dtype) for k, w in weights.items()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:  # a field or a layer that this version does not know
        raise ValueError(f"{path} was written by another version of mlsys: {error}") from None
    return model
