"""A KV cache in blocks: what do block tables cost a decode step, and what do they save in memory?

What to look at, by what is done:

- **decode**: one token is appended to each sequence, in each layer, and attends to all before it. A contiguous cache
  hands out a view; blocks have to be gathered first, a copy of the whole cache that takes as long as the one
  `torch.cat` makes. Attention that reads the blocks where they lie is the answer, and not this module's business.
  In 8 bits there is less to read and more to compute.
- **fork**: several samples of one prompt, each with a token of its own. Whoever has no tables copies the prompt.
- **serve**: the bookkeeping alone, for requests of random lengths that come and go. "places per token" is the memory
  held for each token: above 1 it is waste, below 1 prefixes are shared. One block of 1,024 is a contiguous cache that
  reserves for the longest.

Reference: a contiguous cache, `mlsys.models.transformer.KVCache`.
Peer: `torch.cat`, with which most model code lets its cache grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlsys.attention.kv_cache import PagedKVCache, Pool
from mlsys.bench import Benchmark, Impl, Plot, Record, Work
from mlsys.models.transformer import KVCache
from mlsys.perf.configs import Config, llama

Case = Mapping[str, Any]
LAYERS, HEADS, HEAD_DIM, BLOCK = 2, 8, 64, 16
RUNNING, LONGEST = 16, 1024  # of the requests that are served
ALLOWED = {"float32": 1e-4, "bfloat16": 4e-2, "int8": 3e-2, "fp8": 1e-1}  # relative to the largest value


def decode(n: int, dtype: str, quantized: str | None = None, batch: int = 4) -> Case:
    return {"what": "decode", "n": n, "batch": batch, "dtype": dtype, "quantized": quantized}


def fork(n: int, samples: int = 4) -> Case:
    return {"what": "fork", "n": n, "samples": samples, "dtype": "float32"}


def serve(block: int, requests: int, shared: int = 0) -> Case:
    return {"what": "serve", "block": block, "requests": requests, "shared": shared}


@dataclass(frozen=True)
class Inputs:
    """Keys and values of the tokens that are cached and of the new ones; or the requests to be served."""

    case: Case
    k: Tensor  # (layers, sequences, heads, n, head_dim)
    v: Tensor
    k_new: Tensor  # the same with one token
    v_new: Tensor
    q: Tensor
    requests: list[tuple[list[int], int]]  # prompt, and how many tokens it is continued by

    @property
    def config(self) -> Config:
        """Of a model with such a cache."""
        width = HEADS * HEAD_DIM
        return llama(LAYERS, width, HEADS, width, vocab=2, context=self.k.shape[3] + 1)


def inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(case.get("n", 0))
    dtype = getattr(torch, case.get("dtype", "float32"))
    cached, new = case.get("batch", 1), case.get("batch", case.get("samples", 1))

    def draw(sequences: int, n: int) -> Tensor:
        shape = (LAYERS, sequences, HEADS, n, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    requests = []
    if case["what"] == "serve":
        prefix = torch.randint(50_000, (case["shared"],), generator=generator, device=device).tolist()
        # Means of 161 and 338 tokens, as the vLLM paper gives them for ShareGPT, with a long tail
        spread = torch.randn(case["requests"], 2, generator=generator, device=device) * torch.tensor([1.1, 0.9])
        lengths = torch.exp(spread) * torch.tensor([161 * 0.546, 338 * 0.667])
        for prompt, output in lengths.clamp(1, LONGEST // 2 - case["shared"] // 2).int().tolist():
            own = torch.randint(50_000, (prompt,), generator=generator, device=device).tolist()
            requests.append((prefix + own, output))
    n = case.get("n", 1)
    return Inputs(case, draw(cached, n), draw(cached, n), draw(new, 1), draw(new, 1), draw(new, 1), requests)


def work(case: Case, given: Inputs) -> Work:
    if case["what"] == "serve":  # no number is computed
        return Work(0, 0, items=sum(len(prompt) + output for prompt, output in given.requests), unit="tokens")
    if case["what"] == "fork":  # what must be written are the new tokens
        return Work(0, 2 * (given.k_new.nbytes + given.v_new.nbytes), items=case["samples"], unit="forks")
    flops = 4 * given.k.numel()
    return Work(flops, given.k.nbytes + given.v.nbytes, items=case["batch"], unit="tokens")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * HEAD_DIM**-0.5, -1) @ v


# --- who does it: a function of the inputs that returns the call ------------------------------------------------------

Read = Callable[[], Tensor]  # a fork's result: all keys of its sequences, read later


def contiguous(given: Inputs) -> Callable[[], Any]:
    if given.case["what"] == "serve":
        return partial(run, Whole, given)
    _, sequences, _, n, _ = given.k.shape
    made = partial(KVCache, given.config, device=given.k.device, dtype=given.k.dtype)
    cache = made(sequences)
    for layer in range(LAYERS):
        cache.append(layer, given.k[layer], given.v[layer])
    cache.advance(n)

    def step() -> Tensor:  # the length stays as it is: each call writes the same place
        return torch.stack(
            [attend(given.q[i], *cache.append(i, given.k_new[i], given.v_new[i])) for i in range(LAYERS)]
        )

    def samples() -> Read:
        copy = made(given.k_new.shape[1])
        copy.keys[:, :, :, :n], copy.values[:, :, :, :n] = cache.keys[:, :, :, :n], cache.values[:, :, :, :n]
        copy.advance(n)
        read = [copy.append(i, given.k_new[i], given.v_new[i])[0] for i in range(LAYERS)]
        return lambda: read[-1]

    return step if given.case["what"] == "decode" else samples


def paged(given: Inputs) -> Callable[[], Any]:
    if given.case["what"] == "serve":
        return partial(run, Pool, given)
    _, sequences, _, n, _ = given.k.shape
    blocks = sequences * (n // BLOCK + 1) + given.k_new.shape[1]
    cache = PagedKVCache(
        LAYERS, HEADS, HEAD_DIM, blocks, BLOCK,
        quantized=given.case.get("quantized"), dtype=given.k.dtype, device=given.k.device,
    )  # fmt: skip
    seqs = [cache.pool.start() for _ in range(sequences)]
    for piece in range(0, n, BLOCK):  # a piece of each in turn, so that no sequence's blocks lie side by side
        part = slice(piece, piece + BLOCK)
        for layer in range(LAYERS):
            cache.append(layer, seqs, given.k[layer, :, :, part], given.v[layer, :, :, part])
        cache.advance(seqs, min(BLOCK, n - piece))
    batch, children = cache.batch(seqs), list[Any]()

    def step() -> Tensor:
        return torch.stack(
            [attend(given.q[i], *batch.append(i, given.k_new[i], given.v_new[i])) for i in range(LAYERS)]
        )

    def samples() -> Read:
        while children:
            cache.pool.free(children.pop())
        children.extend(cache.pool.fork(seqs[0]) for _ in range(given.k_new.shape[1]))
        for layer in range(LAYERS):
            cache.append(layer, children, given.k_new[layer], given.v_new[layer])
        cache.advance(children, 1)
        return lambda: torch.stack([cache.gather(LAYERS - 1, child)[0] for child in children])

    return step if given.case["what"] == "decode" else samples


def growing(given: Inputs) -> Callable[[], Any]:
    """`torch.cat` of what there is and what is new."""

    def grown(i: int) -> tuple[Tensor, Tensor]:
        b = given.k_new.shape[1]
        return (
            torch.cat((given.k[i].expand(b, -1, -1, -1), given.k_new[i]), 2),
            torch.cat((given.v[i].expand(b, -1, -1, -1), given.v_new[i]), 2),
        )

    def samples() -> Read:
        read = [grown(i) for i in range(LAYERS)]
        return lambda: read[-1][0]

    def step() -> Tensor:
        return torch.stack([attend(given.q[i], *grown(i)) for i in range(LAYERS)])

    return step if given.case["what"] == "decode" else samples


class Whole:
    """The books of a cache that reserves for the longest: a handle is a list."""

    class Handle:
        """A sequence."""

        def __init__(self) -> None:
            self.length = 0

    def __init__(self, blocks: int, block: int) -> None:
        self.available, self.each = blocks, LONGEST // block

    def start(self, tokens: list[int]) -> Handle:
        self.available -= self.each
        return self.Handle()

    def append(self, seq: Handle, token: int) -> None:
        seq.length += 1

    def free(self, seq: Handle) -> None:
        self.available += self.each


@dataclass(frozen=True)
class Served:
    """How long each request got, and what was held for a token, on average over the steps."""

    lengths: list[int]
    places: float
    computed: int


def run(make: Callable[[int, int], Any], given: Inputs) -> Served:
    """Serve the requests, `RUNNING` at a time, each with a token a step; a prompt is taken in at once."""
    block = given.case["block"]
    blocks = RUNNING * LONGEST // block
    pool = make(blocks, block)
    waiting = list(enumerate(given.requests))[::-1]
    running: list[tuple[int, Any, int]] = []  # number, handle, length at the end
    lengths, held, tokens, computed = [0] * len(waiting), 0, 0, 0
    while waiting or running:
        while waiting and len(running) < RUNNING:
            number, (prompt, output) = waiting.pop()
            seq = pool.start(prompt)
            computed += len(prompt) - seq.length
            for token in prompt[seq.length :]:
                pool.append(seq, token)
            running.append((number, seq, len(prompt) + output))
        for number, seq, _ in running:
            pool.append(seq, number)
        held += (blocks - pool.available) * block
        tokens += sum(seq.length for _, seq, _ in running)
        for number, seq, end in running:
            if seq.length == end:
                lengths[number] = seq.length
                pool.free(seq)
        running = [request for request in running if request[1].length != request[2] and not lengths[request[0]]]
    return Served(lengths, held / tokens, computed)


def prepare(function: Callable[..., Any], case: Case, given: Inputs) -> Callable[[], Any]:
    if isinstance(function, type):  # someone's own pool
        return partial(run, function, given)
    call = function(given)

    def without_gradients() -> Any:
        with torch.no_grad():
            return call()

    return without_gradients


def verify(case: Case, given: Inputs, got: Any, want: Any) -> tuple[float, float]:
    """Relative to the largest value; what a fork holds and the lengths of requests are exact."""
    if case["what"] == "serve":
        return float(got.lengths != want.lengths), 0.0
    if case["what"] == "fork":
        return float((got() - want()).abs().max()), 0.0
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return float(error), ALLOWED[case["quantized"] or case["dtype"]]


def figures(case: Case, given: Inputs, got: Any) -> dict[str, float]:
    if case["what"] == "serve":
        prompts = sum(len(prompt) for prompt, _ in given.requests)
        return {"places per token": got.places, "prompt tokens computed %": 100 * got.computed / prompts}
    return {}


# --- pictures ---------------------------------------------------------------------------------------------------------


def waste_picture(records: Sequence[Record]) -> str | None:
    """Memory held for a token against the size of a block."""
    from mlsys.bench.plots import COLOURS, MARKERS, new_figure, to_svg

    shown = [r for r in records if "places per token" in r.figures and r.role != "yours"]
    if not shown:
        return None
    figure, (ax,) = new_figure(1, width=6.4)
    lines = sorted({(r.impl, r.case["shared"]) for r in shown if r.impl == "paged"})
    for number, (impl, shared) in enumerate(lines):
        points = sorted(
            (r.case["block"], r.figures["places per token"])
            for r in shown
            if (r.impl, r.case["shared"]) == (impl, shared)
        )
        label = f"blocks, {shared} tokens of each prompt in common" if shared else "blocks"
        ax.plot(*zip(*points, strict=True), color=COLOURS[number], marker=MARKERS[number], label=label)
    reserved = next((r for r in shown if r.impl == "contiguous" and not r.case["shared"]), None)
    if reserved:
        value = reserved.figures["places per token"]
        ax.axhline(value, color="black", linestyle="--", label=f"{LONGEST} tokens reserved for each sequence")
    ax.axhline(1, color="grey", linewidth=0.8)
    sizes = sorted({r.case["block"] for r in shown})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set(xlabel="tokens a block", ylabel="memory held, in places per token", ylim=(0, None))
    ax.grid(True, alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.66))  # above blocks, below a whole
    return to_svg(figure)


def scene() -> tuple[Pool, dict[str, Any]]:
    """A running batch: a and b began with the same eight tokens, c is a fork of a, d stands alone, one has ended."""
    pool, common = Pool(16, 4), list(range(8))

    def taken_in(prompt: list[int]) -> Any:
        seq = pool.start(prompt)
        for token in prompt[seq.length :]:
            pool.append(seq, token)
        return seq

    seqs = {"a": taken_in([*common, 20, 21]), "b": taken_in([*common, 30, 31, 32, 33, 34])}
    ended = taken_in(list(range(40, 46)))
    seqs |= {"c": pool.fork(seqs["a"]), "d": taken_in([50, 51, 52])}
    pool.free(ended)
    for token in range(60, 63):
        for name in "cd":
            pool.append(seqs[name], token)
    return pool, seqs


def tables_picture(records: Sequence[Record]) -> str | None:
    """Left the table of each sequence, right the pool: who holds which block."""
    from matplotlib.patches import Rectangle

    from mlsys.bench.plots import COLOURS, new_figure, to_svg

    if not records:
        return None
    pool, seqs = scene()
    colours = dict(zip(seqs, COLOURS, strict=False))
    figure, (left, right) = new_figure(2, width=5.0, height=3.0)
    holders = {block: [name for name, seq in seqs.items() if block in seq.blocks] for block in range(pool.blocks)}

    def cell(ax: Any, x: float, y: float, **look: Any) -> None:
        ax.add_patch(Rectangle((x, y), 0.94, 0.8, edgecolor="black", linewidth=0.8, facecolor="none", **look))

    for row, (name, seq) in enumerate(seqs.items()):
        left.text(-0.25, -row + 0.4, name, ha="right", va="center", color=colours[name], weight="bold")
        for column, block in enumerate(seq.blocks):
            filled = min(pool.block, seq.length - column * pool.block)
            width = 0.94 * filled / pool.block
            left.add_patch(Rectangle((column, -row), width, 0.8, facecolor=colours[name], alpha=0.35))
            cell(left, column, -row)
            left.text(column + 0.47, -row + 0.4, f"→ {block}", ha="center", va="center", fontsize=9)
        left.text(len(seq.blocks) + 0.1, -row + 0.4, f"{seq.length} tokens", va="center", fontsize=8)
    left.set(title=f"tables: blocks of {pool.block} tokens", xlim=(-0.8, 5.6), ylim=(-len(seqs) + 0.8, 1.2))
    idle = set(pool.idle)
    for block in range(pool.blocks):
        x, y = block % 8, -(block // 8) * 1.3
        for part, name in enumerate(holders[block]):
            height = 0.8 / len(holders[block])
            strip = Rectangle((x, y + part * height), 0.94, height, facecolor=colours[name], alpha=0.35)
            right.add_patch(strip)
        cell(right, x, y, hatch="////" if block in idle else "")
        right.text(x + 0.47, y + 0.4, ",".join(holders[block]), ha="center", va="center", fontsize=9)
        right.text(x + 0.47, y - 0.05, str(block), ha="center", va="top", fontsize=7)
    right.set(title="pool: who holds a block (hatched: only remembered)", xlim=(-0.1, 8.1), ylim=(-1.7, 1.2))
    for ax in (left, right):
        ax.set_axis_off()
        ax.title.set_fontsize(9)
    return to_svg(figure)


def only(*what: str) -> Callable[[Case], bool]:
    return lambda case: case["what"] in what


QUICK = [
    decode(512, "float32"),
    decode(512, "float32", "int8"),
    fork(1024),
    *(serve(block, 16) for block in (16, 256)),
    serve(16, 16, shared=256),
]
DEFAULT = [
    *(decode(n, dtype) for dtype in ("float32", "bfloat16") for n in (256, 1024, 4096)),
    *(decode(1024, "float32", quantized) for quantized in ("int8", "fp8")),
    *(fork(n) for n in (256, 1024, 4096)),
    *(serve(block, 100) for block in (1, 4, 16, 64, 256, 1024)),
    *(serve(block, 100, shared=256) for block in (1, 4, 16, 64, 256)),
]
bench = Benchmark(
    __file__,
    cases={
        "quick": QUICK,
        "default": DEFAULT,
        "full": [*DEFAULT, decode(16384, "bfloat16"), decode(1024, "float32", batch=32), fork(4096, samples=16)],
    },
    inputs=inputs,
    work=work,
    impls={
        "contiguous": Impl(lambda: contiguous, "reference"),
        "paged": Impl(lambda: paged, "ours"),
        "torch.cat": Impl(lambda: growing, "peer", only=only("decode", "fork")),
    },
    subject="paged",
    prepare=prepare,
    verify=verify,
    figures=figures,
    contract="attention.kv_cache",
    yours=only("serve"),
    memory=True,
    plots=(
        Plot(
            x="n",
            xlabel="cached tokens of each of 4 sequences",
            panel=("dtype",),
            only=lambda case: case["what"] == "decode" and not case["quantized"] and case["batch"] == 4,
        ),
    ),
    pictures={"waste": waste_picture, "tables": tables_picture},
)

if __name__ == "__main__":
    bench.main()
