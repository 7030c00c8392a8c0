"""Published numbers about paged caches: the paper's own examples, and the share of the memory that holds tokens.

The second half is a simulation. Requests arrive as the paper's do (Poisson, 2 a second, for OPT-13B on an A100 with
15,728 slots), their lengths are drawn from log-normal distributions with the means of ShareGPT's in the paper's Figure
11, and a step takes as long as its bytes. Who reserves memory as one piece reserves a power of two, as a buddy
allocator gives it; the paged cache is our `Pool`, with blocks of 16.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from mlsys.attention.kv_cache import OutOfBlocks, Pool, Sequence
from mlsys.claims.core import Claim
from mlsys.perf import inference
from mlsys.perf.configs import MODELS

VLLM = "Kwon et al. 2023, arXiv:2309.06180"
NEXT = 7  # "Four score and seven years ago our" are tokens 0 to 6
OPT = MODELS["opt-13b"]
SLOTS = inference.kv_slots(12 * 2**30, OPT)
BANDWIDTH, PEAK = 1.3e12, 1.5e14  # bytes/s and FLOP/s that an A100-40GB reaches
SECONDS = 300.0  # simulated
DRAWN = "simulated with lengths drawn from log-normal distributions of the same means; the paper replayed the data set"
Held = dict[int, Sequence | int]  # by the number of a request: its sequence, or the slots that are reserved for it
Policy = Literal["max", "pow2", "oracle", "paged"]


def example() -> tuple[Pool, Sequence]:
    """The prompt of Figures 6 and 8, seven tokens, in blocks of four."""
    pool = Pool(9, 4)
    seq = pool.start(range(NEXT))
    for token in range(NEXT):
        pool.append(seq, token)
    return pool, seq


def blocks_after_two_steps() -> int:
    """Figure 6: "fathers" still fits in the second block, "brought" takes a third."""
    pool, seq = example()
    pool.append(seq, NEXT)
    pool.append(seq, NEXT)
    return pool.used


def blocks_of_two_samples() -> int:
    """Figure 8: two samples of that prompt, each with a first token of its own."""
    pool, seq = example()
    other = pool.fork(seq)
    pool.append(seq, NEXT)
    pool.append(other, NEXT + 1)
    return pool.used


@cache
def token_share(policy: Policy) -> float:
    """Per cent of the memory that requests occupy which holds tokens, on average over time."""
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(1 / 2.0, int(3 * SECONDS)))
    prompts = np.clip(_lengths(random, 161.31, 1.1, arrivals.size), 1, 1024)
    outputs = np.minimum(np.maximum(_lengths(random, 337.99, 0.9, arrivals.size), 1), OPT.context - prompts)

    pool = Pool(SLOTS // 16, 16)
    waiting, running = 0, list[list[int]]()  # a running request: its number, and how many tokens it has
    held: Held = {}
    again: list[list[int]] = []  # what had to make room
    now = tokens = occupied = 0.0
    while now < SECONDS:
        fresh = 0
        while again or arrivals[waiting] <= now:
            number, length = again[0] if again else (waiting, int(prompts[waiting]))
            place = _place(policy, pool, length, int(prompts[number] + outputs[number]), held)
            if place is None:
                break
            held[number] = place
            running.append([number, length])
            fresh += length
            if again:
                again.pop(0)
            else:
                waiting += 1
        if not running:
            now = float(arrivals[waiting])
            continue
        in_cache = sum(length for _, length in running)
        step = (inference.weight_bytes(OPT) + in_cache * inference.kv_cache_bytes_per_token(OPT)) / BANDWIDTH
        step += 2 * inference.weight_bytes(OPT, 1) * fresh / PEAK + 2e-3  # prompts; and what else a step takes
        now += step
        tokens += step * in_cache
        occupied += step * (pool.used * pool.block if policy == "paged" else sum(map(_slots, held.values())))
        for request in list(running):
            number, length = request
            if request not in running:  # it has just made room for another
                continue
            if length + 1 >= prompts[number] + outputs[number]:
                running.remove(request)
                _release(pool, held.pop(number))
            else:
                request[1] += 1
                _grow(pool, held, running, again, request)
    return 100 * tokens / occupied


def _lengths(random: np.random.Generator, mean: float, spread: float, n: int) -> np.ndarray:
    return random.lognormal(np.log(mean) - spread**2 / 2, spread, n).astype(int)


def _slots(place: Sequence | int) -> int:
    assert isinstance(place, int)
    return place


def _place(policy: Policy, pool: Pool, length: int, final: int, held: Held) -> Sequence | int | None:
    """Room for a request that has `length` tokens and will have `final`, which only the oracle knows."""
    if policy == "paged":
        seq = pool.start()
        try:
            pool.reserve([seq], length)
        except OutOfBlocks:
            pool.free(seq)
            return None
        pool.advance(seq, length)
        return seq
    wanted = {"max": OPT.context, "pow2": length + _power(final - length), "oracle": final}[policy]
    wanted = _power(min(wanted, OPT.context))
    return wanted if wanted + sum(map(_slots, held.values())) <= SLOTS else None


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _grow(pool: Pool, held: Held, running: list[list[int]], again: list[list[int]], request: list[int]) -> None:
    """One more token; while there is no block, the youngest request gives its own back, to be computed again later."""
    while request in running:
        seq = held[request[0]]
        if isinstance(seq, int):
            return
        try:
            pool.append(seq)
            return
        except OutOfBlocks:
            youngest = running.pop()
            _release(pool, held.pop(youngest[0]))
            again.insert(0, youngest)


def _release(pool: Pool, place: Sequence | int) -> None:
    if isinstance(place, Sequence):
        pool.free(place)


KV_CACHE = [
    Claim(
        name="vllm-blocks-decoding",
        area="attention.kv_cache",
        source=f"{VLLM}, Figure 6",
        what="blocks of 4 that a prompt of 7 tokens and two generated ones have taken",
        unit="blocks",
        published=3,
        digits=0,
        compute=blocks_after_two_steps,
    ),
    Claim(
        name="vllm-blocks-two-samples",
        area="attention.kv_cache",
        source=f"{VLLM}, Figure 8",
        what="blocks of 4 that two samples of a prompt of 7 tokens hold, each with one token of its own",
        unit="blocks",
        published=3,
        digits=0,
        compute=blocks_of_two_samples,
    ),
    *(
        Claim(
            name=f"kv-memory-{policy}",
            area="attention.kv_cache",
            source=f"{VLLM}, Figure 2",
            what=f"share of the KV memory in use that holds tokens: {how}; OPT-13B, ShareGPT, 2 requests a second",
            unit="%",
            published=published,
            digits=1,
            compute=lambda policy=policy: token_share(policy),  # type: ignore[misc]
            tolerance=tolerance,
            expected="approximate",
            reason=reason,
        )
        for policy, how, published, tolerance, reason in (
            ("max", "2,048 slots reserved for each", 20.4, 0.2, DRAWN),
            ("pow2", "the output reserved up to the next power of two", 26.8, 0.2, DRAWN),
            ("oracle", "the true output length reserved", 38.2, 0.2, DRAWN),
            ("paged", "blocks of 16", 96.3, 0.05, DRAWN + "; only the last block of a request is partly empty here"),
        )
    ),
]
