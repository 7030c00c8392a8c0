"""Generation: what does the next token cost, against the length of the context, with and without a KV cache?

The model is trained on the standard library's source when it is first needed (some seconds, kept in the cache folder),
and what it generates has to be the same tokens for all. What to look at, by what is done:

- **next tokens**: a token for a sequence of so many. Without a cache the whole sequence runs again. With one, every
  weight is used once, and only the keys and values that are read grow; blocks are read where they lie. In 8 bits there
  is less to read and more to compute, and tokens may differ: what is compared are the logits of the first one.
- **first token**: of a prompt that was asked before. A paged cache knows it, all but its last block; the others have
  thrown it away and compute it again.

Reference: no cache. Peer: the textbook's cache, one tensor a layer that `torch.cat` makes anew for each token, with
`scaled_dot_product_attention`; the rest of the model is ours, as it is for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlsys.attention import flash
from mlsys.attention.kv_cache import Batch
from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.data import text
from mlsys.data.trained import Recipe, trained
from mlsys.models.training import TrainConfig
from mlsys.models.transformer import AttentionFn, KVCache, Transformer, generate
from mlsys.perf.configs import llama
from mlsys.perf.inference import decode_step

Case = Mapping[str, Any]
BLOCK = 16
RECIPE = Recipe(
    llama(4, 128, 4, 344, vocab=256, context=8192, kv_heads=2, tied=True),
    TrainConfig(steps=150, batch=4, seq=64, lr=6e-3),
)
ALLOWED = 0.05  # relative error of an 8-bit cache's logits


def case(what: str, context: int) -> Case:
    return {"what": what, "context": context, "tokens": 4 if what == "next tokens" else 1}


@dataclass(frozen=True)
class Inputs:
    """The model, and real text that it was not trained on, (1, context)."""

    model: Transformer
    prompt: Tensor
    tokens: int


@functools.cache
def material() -> tuple[Transformer, Tensor]:
    """The trained model and held-out text."""
    model, tokenizer = trained(RECIPE, attention=flash.attention)
    _, held_out = text.split(text.corpus(RECIPE.source))
    stream = text.tokens(held_out, tokenizer)[: RECIPE.config.context]
    return model, torch.from_numpy(stream.astype("int64"))


def inputs(case: Case, device: str) -> Inputs:
    model, stream = material()
    return Inputs(model.to(device), stream[None, : case["context"]].to(device), case["tokens"])


def work(case: Case, given: Inputs) -> Work:
    if case["what"] == "first token":  # what is known need not be computed, so there is no least
        return Work(0, 0, items=1, unit="tokens")
    step = decode_step(given.model.config, 1, case["context"], 1.0, itemsize=4, kv_itemsize=4)
    n = case["tokens"]
    return Work(n * step.flops, n * (step.weight_bytes + step.kv_bytes), items=n, unit="tokens")


@dataclass(frozen=True)
class Generated:
    """The new tokens; of an 8-bit cache the logits from which the first was chosen, since it may choose others."""

    tokens: list[int]
    logits: Tensor | None = None
    exact: bool = True


class Growing:
    """The cache that is written first: what there is and what is new, put together."""

    def __init__(self, layers: int) -> None:
        self.layers, self.length = layers, 0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def positions(self, tokens: int) -> Tensor:
        return torch.arange(self.length, self.length + tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat((old, new), 2) for old, new in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        self.kept = {layer: (k[:, :, :length], v[:, :, :length]) for layer, (k, v) in self.kept.items()}
        self.length = length


# --- who does it: a function of the inputs that returns the call ------------------------------------------------------

Filled = KVCache | Batch | Growing


def no_cache(given: Inputs) -> Filled | None:
    return None


def contiguous(given: Inputs) -> Filled:
    return filled(given, given.model.cache(1, given.prompt.shape[1] + given.tokens))


def growing(given: Inputs) -> Filled:
    return filled(given, Growing(given.model.config.layers))


def numba() -> Callable[[Inputs], Filled]:
    """The same with blocks read by `paged_numba`."""
    from mlsys.attention import paged_numba

    def made(given: Inputs) -> Filled:
        batch = paged(given)
        return Batch(batch.cache, batch.seqs, paged_numba.attention)

    return made


def paged(given: Inputs, quantized: str | None = None) -> Batch:
    blocks = 2 * (given.prompt.shape[1] // BLOCK + 1)
    cache = given.model.paged_cache(blocks, BLOCK, quantized=quantized)
    batch, neighbour = cache.batch([cache.pool.start()]), cache.pool.start()
    for part in given.prompt[:, :-1].split(BLOCK * 8, dim=1):
        given.model.hidden(part, cache=batch)
        cache.reserve([neighbour], batch.length // 2)  # it grows too, so that these blocks do not all lie side by side
    return batch


def filled(given: Inputs, cache: KVCache | Growing) -> Filled:
    """With all of the prompt but its last token, which is the first to be decoded."""
    given.model.hidden(given.prompt[:, :-1], cache=cache)
    return cache


def first(how: Callable[[Inputs], Filled | None], given: Inputs) -> Callable[[], Generated]:
    """The token after the prompt, from nothing but what the cache kept of an earlier call."""
    room = given.prompt.shape[1] // BLOCK + 2
    cache = given.model.paged_cache(room, BLOCK) if how is paged else how is contiguous

    def call() -> Generated:
        if how is growing:
            logits = given.model.logits(given.model.hidden(given.prompt, cache=Growing(RECIPE.config.layers))[0, -1])
            return Generated([int(logits.argmax())])
        tokens = generate(given.model, given.prompt, 1, temperature=0.0, cache=cache)
        return Generated([int(tokens[0, -1])])

    return call


def prepare(how: Callable[[Inputs], Filled | None], case: Case, given: Inputs) -> Callable[[], Generated]:
    if case["what"] == "first token":
        call = first(how, given)
    else:
        with torch.no_grad():
            cache = how(given)
        exact = not (isinstance(cache, Batch) and cache.cache.format)
        call = functools.partial(decode, given, cache, exact)
    return torch.no_grad()(call)


def decode(given: Inputs, cache: Filled | None, exact: bool) -> Generated:
    """The likeliest token, again and again; then forgotten, so that each call does the same."""
    held, tokens, chosen = given.prompt.shape[1] - 1, given.prompt, list[Tensor]()
    for _ in range(given.tokens):
        unseen = tokens if cache is None else tokens[:, cache.length :]
        chosen.append(given.model.logits(given.model.hidden(unseen, cache=cache)[:, -1]))
        tokens = torch.cat((tokens, chosen[-1].argmax(-1, keepdim=True)), dim=1)
    if cache is not None:
        cache.truncate(held)
    return Generated(tokens[0, held + 1 :].tolist(), chosen[0], exact)


def verify(case: Case, given: Inputs, got: Generated, want: Generated) -> tuple[float, float]:
    """How many tokens differ: none may; of a cache in 8 bits the logits of the first one, relative to the largest."""
    if got.exact or got.logits is None or want.logits is None:
        return float(sum(a != b for a, b in zip(got.tokens, want.tokens, strict=True))), 0.0
    return float((got.logits - want.logits).abs().max() / want.logits.abs().max()), ALLOWED


CONTEXTS = (256, 512, 1024, 2048, 4096)


def cases(*contexts: int) -> list[Case]:
    return [case(what, context) for what in ("next tokens", "first token") for context in contexts]


def next_only(case: Case) -> bool:
    return bool(case["what"] == "next tokens")


bench = Benchmark(
    __file__,
    cases={
        "quick": [case("next tokens", 256), *cases(1024)],
        "default": cases(*CONTEXTS),
        "full": cases(*CONTEXTS, 8188),
    },
    inputs=inputs,
    work=work,
    impls={
        "no cache": Impl(lambda: no_cache, "reference"),
        "contiguous": Impl(lambda: contiguous, "ours"),
        "paged": Impl(lambda: paged, "ours"),
        "paged numba": Impl(numba, "ours", needs="numba", only=next_only),
        "paged int8": Impl(lambda: functools.partial(paged, quantized="int8"), "ours", only=next_only),
        "torch.cat and sdpa": Impl(lambda: growing, "peer"),
    },
    subject="paged",
    prepare=prepare,
    verify=verify,
    budget_s=20.0,
    plots=(Plot(x="context", xlabel="tokens of context", panel=("what",), per="tokens"),),
)

if __name__ == "__main__":
    bench.main()
