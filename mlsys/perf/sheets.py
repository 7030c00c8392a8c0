"""What a training run or a serving device needs, worked out line by line from a model, a machine and a layout.

Each function returns a `Worksheet`: every line has its formula, the formula with
numbers in it, and the result. The symbols are those of the papers:

    L layers   h width   a heads   s sequence   V vocabulary   N parameters   T tokens
    n devices = t tensor · p pipeline · d data     b microbatch   B global batch   m = B/(d·b) microbatches

Times are a pair of bounds. The lower one hides all communication behind compute;
the upper one hides none. A real run lies between, nearer to the lower one the better
its overlap. What share of the peak the kernels reach is an input, not a result.

Cost:
    Microseconds: a few dozen lines of arithmetic.

Memory:
    That of the sheet.

Papers:
    Narayanan et al. 2021, arXiv:2104.04473 (the layout t · p · d and what each part costs).
    Rajbhandari et al. 2020, arXiv:1910.02054 (what data-parallel devices hold).
    Korthikanti et al. 2022, arXiv:2205.05198, Table 2 (activations).
    Pope et al. 2022, arXiv:2211.05102 (serving: weights and caches against bandwidth).

See also:
    `mlsys cost` (which prints these), `mlsys.perf.transformer`, `mlsys.perf.activations`, `mlsys.perf.inference`,
    `mlsys.perf.zero`.
"""

from __future__ import annotations

import ast
import math
from typing import Any, Literal

from mlsys.perf import activations, collectives, inference, transformer
from mlsys.perf.configs import Config
from mlsys.perf.hardware import Hardware, Link, peak_flops
from mlsys.perf.worksheet import Worksheet, evaluate, show

Recompute = Literal["none", "selective", "full"]

SAVED = {  # of one GPT block and microbatch: (recompute, sequence parallel) → bytes
    ("none", False): "s*b*h*(10 + 24/t + 5*a*s/(h*t))",
    ("none", True): "s*b*h/t*(34 + 5*a*s/h)",
    ("selective", False): "s*b*h*(10 + 24/t)",
    ("selective", True): "s*b*h/t*34",
    ("full", False): "2*s*b*h",
    ("full", True): "2*s*b*h/t",
}

PASSES = {  # (full recomputation, sequence parallelism) → times that (t−1)/t of the activations is sent, both passes
    (False, False): 8,
    (False, True): 10,
    (True, False): 12,
    (True, True): 14,
}


def train(
    config: Config,
    hardware: Hardware,
    *,
    gpus: int,
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    batch: int | None = None,
    microbatch: int = 1,
    seq: int | None = None,
    tokens: float = 300e9,
    recompute: Recompute = "none",
    sequence_parallel: bool = False,
    zero: int = 0,
    efficiency: float = 0.5,
    dtype: str = "bfloat16",
    node: int = 8,
) -> Worksheet:
    """Memory of a device, time of a step, and days of a run.

    gpus:        n, all devices; data parallelism takes what tp · pp leave.
    chunks:      model chunks a pipeline stage holds; above 1 the interleaved schedule.
    batch:       B, sequences in a step; default: 4 · pp microbatches for each data-parallel replica.
    seq:         s; default the model's context.
    tokens:      T, what the whole run trains on.
    zero:        ZeRO stage 0 to 3 over the data-parallel devices.
    efficiency:  share of `hardware`'s peak that the matrix products reach: an assumption.
    node:        devices that `hardware.link` connects; beyond, `hardware.network` does.
    """
    seq = config.context if seq is None else seq
    for name, value in (("gpus", gpus), ("tp", tp), ("pp", pp), ("chunks", chunks), ("microbatch", microbatch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
    if gpus % (tp * pp):
        raise ValueError(f"gpus={gpus} is not a multiple of tp·pp={tp}·{pp}={tp * pp}")
    if config.layers % (pp * chunks):
        raise ValueError(f"pp={pp}, chunks={chunks}: {config.layers} layers do not divide into {pp * chunks} parts")
    if chunks > 1 and pp == 1:
        raise ValueError(f"chunks={chunks}: interleaving needs a pipeline, pp=1 has none")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency={efficiency}: a share of the peak above 0 and at most 1 is needed")
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"zero={zero}: the stages are 0 (plain data parallel), 1, 2 and 3")
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens={tokens}: a positive, finite number is needed")
    _check_heads(config, "tp", tp)
    replicas = gpus // (tp * pp)
    batch = 4 * pp * microbatch * replicas if batch is None else batch
    if batch % (replicas * microbatch):
        raise ValueError(
            f"batch={batch} is not a multiple of data-parallel replicas · microbatch = {replicas}·{microbatch}"
        )

    if chunks > 1 and batch // (replicas * microbatch) % pp:
        raise ValueError(
            f"batch={batch}: interleaving needs a multiple of pp={pp} microbatches, "
            f"this makes {batch // (replicas * microbatch)}"
        )

    sheet = Worksheet()
    sheet.section("Given")
    for symbol, size, note in (
        ("L", config.layers, "layers"),
        ("h", config.d_model, "width of the model"),
        ("a", config.heads, "heads"),
        ("s", seq, "tokens of a sequence"),
        ("n", gpus, hardware.name),
        ("t", tp, "tensor parallel"),
        ("p", pp, "pipeline stages"),
        ("v", chunks, "model chunks of a stage"),
        ("b", microbatch, "sequences in a microbatch"),
        ("B", batch, "sequences in a step"),
        ("T", tokens, "tokens of the run"),
    ):
        sheet.given(symbol, size, note=note)
    sheet.line("d", "n / (t*p)", note="data parallel")
    sheet.line("m", "B / (d*b)", note="microbatches of a step through one pipeline")

    sheet.section("Model")
    _parameters(sheet, config)

    sheet.section("Memory of a device (weights and gradients in 16 bits, Adam in 32)")
    sheet.line("N_device", "N / (t*p)", note="split evenly; the first and last stage also hold the embeddings")
    sheet.line("weights", "2*N_device/d" if zero >= 3 else "2*N_device", "B", shared(zero, 3))
    sheet.line("gradients", "2*N_device/d" if zero >= 2 else "2*N_device", "B", shared(zero, 2))
    sheet.line("optimizer", "12*N_device/d" if zero >= 1 else "12*N_device", "B", shared(zero, 1))
    saved = {"recompute": recompute, "tp": tp, "sequence_parallel": sequence_parallel}
    if is_gpt(config):
        sheet.line("block", SAVED[recompute, sequence_parallel], "B", f"kept of one block; recompute {recompute}")
    else:
        counted = activations.activation_bytes_per_layer(
            config,
            microbatch,
            seq,
            layer=config.layers - 1,
            **saved,  # type: ignore[arg-type]
        )
        sheet.given("block", counted, "B", f"kept of one block, counted tensor by tensor; recompute {recompute}")
    _activations(sheet, config, pp, chunks, sequence_parallel)
    sheet.line("memory", "weights + gradients + optimizer + activations", "B")
    sheet.given("device", hardware.memory, "B", f"memory of one {hardware.name}")
    sheet.line("full", "memory / device", "%", "fits" if sheet.values["memory"] <= hardware.memory else "DOES NOT FIT")

    sheet.section(f"Time of a step ({dtype})")
    flops = transformer.training_flops(config, batch, seq).total
    executed = transformer.training_flops(config, batch, seq, recompute=recompute).total
    sheet.given("F", flops, "FLOP", "forward and backward of the whole batch")
    sheet.given("F_run", executed, "FLOP", f"with what is computed again; recompute {recompute}")
    sheet.given("peak", peak_flops(hardware, dtype), "FLOP/s", "of a device")
    sheet.given("e", efficiency, note="share of the peak that the kernels reach: assumed")
    sheet.line("stage", "F_run / (n*m*peak*e)", "s", "one microbatch through one stage, forward and backward")
    sheet.line("bubble", "(p - 1)/v*stage", "s", "waiting for the pipeline to fill and drain")
    sheet.line("lower", "m*stage + bubble", "s", "a step with all communication hidden")
    hidden = []
    if tp > 1:
        link = link_of(hardware, tp, node)
        passes = PASSES[recompute == "full", sequence_parallel]
        sheet.given("link", link.bandwidth, "B/s", f"{link.name}, one direction")
        sheet.line(
            "tensor",
            f"{passes}*(t - 1)/t*2*b*s*h*L/p*(m + (p - 1)/v)/link",
            "s",
            f"for each layer and microbatch {passes // 2} ring all-reduces of 2·b·s·h bytes, or what makes them up",
        )
        hidden.append("tensor")
    if pp > 1:
        network = link_of(hardware, tp * pp, node)
        sheet.given("wire", network.bandwidth, "B/s", f"{network.name}, one direction")
        shard = "/t" if sequence_parallel else ""
        sheet.line("pipeline", f"2*2*b*s*h{shard}*v*m/wire", "s", "activations forward and gradients back")
        hidden.append("pipeline")
    if replicas > 1:
        network = link_of(hardware, gpus, node)
        sheet.given("net", network.bandwidth, "B/s", f"{network.name}, one direction")
        sends, note = DATA[zero]
        sheet.line("data", f"{sends}*(d - 1)/d*2*N_device/net", "s", note)
        hidden.append("data")
    if hidden:
        sheet.line("upper", " + ".join(["lower", *hidden]), "s", "a step with none of it hidden")

    sheet.section("The run")
    for bound, end in (("lower", "best"), ("upper", "worst")) if hidden else (("lower", "best"),):
        sheet.line(f"tokens_{end}", f"B*s/{bound}", "tokens/s", f"throughput at {end}")
        sheet.line(f"mfu_{end}", f"F/({bound}*n*peak)", "%", f"model FLOPs utilization at {end}")
        sheet.line(f"time_{end}", f"T/tokens_{end}", "s", f"the whole run at {end}")
    return sheet


def _activations(sheet: Worksheet, config: Config, pp: int, chunks: int, sequence_parallel: bool) -> None:
    """The lines from what one block keeps to what the fullest device holds: one of the first or of the last stage."""
    shard = "/t" if sequence_parallel else ""
    if pp == 1:
        sheet.line("first", "block*L", "B", "all blocks, for the one microbatch in flight")
    elif chunks == 1:
        sheet.line("in_flight", "min(m, p)", note="microbatches that the first stage holds (1F1B); the last holds one")
        sheet.line("first", "block*L/p*in_flight", "B", "blocks of the first stage")
        sheet.line("last", "block*L/p", "B", "blocks of the last stage")
    else:
        sheet.line("in_flight", "min(m*v, (v + 1)*p - 1)/v", note="microbatches that the first stage holds")
        sheet.line("first", "block*L/p*in_flight", "B", "blocks of the first stage")
        sheet.line("last", "block*L/p*min(m*v, (v - 1)*p + 1)/v", "B", "blocks of the last stage")
    mask = ""
    if config.activation == "gelu":
        held = "1" if pp == 1 else "min(m, p)" if chunks == 1 else "min(m, 2*p)"
        sheet.line("embedding", f"b*s*h{shard}*{held}", "B", "dropout mask after the embedding")
        mask = " + embedding"
    sheet.line("head", f"4*b*s*h{shard} + 4*b*s*ceil(V/t)", "B", "inputs of last norm and output; logits, 32 bits")
    fullest = f"first{mask} + head" if pp == 1 else f"max(first{mask}, last + head)"
    sheet.line("activations", fullest, "B", "of the fullest device")


# ZeRO stage → how many times (d−1)/d of the weights' bytes are sent in a step, and by what
DATA = {
    0: ("2", "ring all-reduce of the gradients"),
    1: ("2", "reduce-scatter of the gradients, all-gather of the weights"),
    2: ("(m + 1)", "reduce-scatter of each microbatch's gradients, all-gather of the weights"),
    3: ("3*m", "for each microbatch: all-gather of the weights twice, reduce-scatter of the gradients"),
}


def serve(
    config: Config,
    hardware: Hardware,
    *,
    gpus: int = 1,
    batch: int = 1,
    context: int | None = None,
    prompt: int | None = None,
    weight_bits: float = 16,
    cache_bits: float = 16,
    dtype: str = "bfloat16",
    node: int = 8,
) -> Worksheet:
    """Memory, time of a decode step, and time to the first token, on `gpus` devices that share every matrix.

    batch:       sequences decoded together.
    context:     tokens that each of them has in its cache; default the model's context.
    prompt:      tokens to prefill for one sequence; default `context`.
    weight_bits: of a weight in memory; cache_bits: of an element of the KV cache.
    dtype:       of the arithmetic: which of the machine's peaks counts.
    """
    context = config.context if context is None else context
    prompt = context if prompt is None else prompt
    for name, value in (("gpus", gpus), ("batch", batch), ("context", context), ("prompt", prompt)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
    for name, bits in (("weight_bits", weight_bits), ("cache_bits", cache_bits)):
        if not 1 <= bits <= 64:
            raise ValueError(f"{name}={bits}: from 1 to 64 bits")
    _check_heads(config, "gpus", gpus)

    sheet = Worksheet()
    sheet.section("Given")
    sheet.given("L", config.layers, note="layers")
    sheet.given("h", config.d_model, note="width of the model")
    sheet.given("n", gpus, note=hardware.name)
    sheet.given("B", batch, note="sequences decoded together")
    sheet.given("s", context, note="tokens of each in the cache")
    sheet.given("w", weight_bits / 8, note="bytes of a weight")
    sheet.given("c", cache_bits / 8, note="bytes of an element of the cache")

    sheet.section("Model")
    _parameters(sheet, config)

    sheet.section("Memory of all devices")
    sheet.line("weights", "w*N", "B")
    if config.latent:
        sheet.given("r", config.latent.kv_rank, note="compressed keys and values")
        sheet.given("r_rope", config.latent.rope_dim, note="rotated key, shared by the heads")
        sheet.line("token", "L*(r + r_rope)*c", "B", "KV cache of a token: latent attention")
    else:
        sheet.line("token", "2*L*k*d_head*c", "B", "KV cache of a token: keys and values")
    if config.latent:
        sheet.line("copies", "n", note="each device needs the whole compressed vector")
    else:
        sheet.line("copies", "max(1, n/k)", note="of each key/value head: a device has at least one whole head")
    sheet.line("sequence", "s*token*copies", "B", "KV cache of a sequence, on all devices together")
    sheet.given("device", hardware.memory, "B", f"memory of one {hardware.name}")
    sheet.line("free", "n*device - weights", "B")
    fits = sheet.values["free"] > 0
    sheet.line("most", "max(0, floor(free/sequence))", "sequences", "" if fits else "THE WEIGHTS DO NOT FIT")
    sheet.line("cache", "B*sequence", "B", "fits" if batch <= sheet.values["most"] else "DOES NOT FIT")

    sheet.section("A decode step: one token for each sequence")
    bandwidth, peak = hardware.bandwidth, peak_flops(hardware, dtype)
    step = inference.decode_step(
        config, batch, context, bandwidth, peak=peak, itemsize=weight_bits / 8, kv_itemsize=cache_bits / 8, devices=gpus
    )
    note = "all weights once" if config.experts is None else "weights of the experts that the batch is expected to use"
    sheet.given("read", step.weight_bytes, "B", note)
    sheet.given("F", step.flops, "FLOP", "two for each weight used and each cached number, for each sequence")
    sheet.given("bandwidth", bandwidth, "B/s", "of a device")
    sheet.given("peak", peak, "FLOP/s", f"of a device, {dtype}")
    sheet.line("memory", "(read + cache)/(n*bandwidth)", "s", "to read weights and caches")
    sheet.line("compute", "F/(n*peak)", "s", "to multiply")
    parts, binds = "max(memory, compute)", {name: sheet.values[name] for name in ("memory", "compute")}
    if gpus > 1:
        link = link_of(hardware, gpus, node)
        sheet.given("link", link.bandwidth, "B/s", f"{link.name}, one direction")
        sheet.line("reduce", "2*L*2*(n - 1)/n*2*B*h/link", "s", "two ring all-reduces a layer, their latency left out")
        parts += " + reduce"
        binds["link"] = sheet.values["reduce"]
    sheet.line("step", parts, "s", f"{max(binds, key=lambda name: binds[name])} binds")
    sheet.line("rate", "B/step", "tokens/s", "all sequences together")
    sheet.line("each", "1/step", "tokens/s", "each sequence")

    sheet.section("The first token")
    sheet.given("prompt", prompt, note="tokens to prefill, one sequence")
    flops = transformer.forward_flops(config, 1, prompt, causal=True, logits="last").total
    sheet.given("F_prompt", flops, "FLOP", "forward pass, causal")
    moved = inference.weight_bytes_read(config, prompt, weight_bits / 8)
    sheet.given("read_prompt", moved, "B", "weights that so many tokens use")
    sheet.line(
        "first", "max(F_prompt/(n*peak), (read_prompt + prompt*token*copies)/(n*bandwidth))", "s", "a lower bound"
    )
    return sheet


# algorithm → steps, and bytes on the path, over n ranks and S bytes; L = ⌈log₂ n⌉
ALL_REDUCE = {
    "ring": ("2*(n - 1)", "2*S*(n - 1)/n"),
    "halving_doubling": ("2*log2(n)", "2*S*(n - 1)/n"),
    "recursive_doubling": ("log2(n)", "S*log2(n)"),
    "tree": ("2*ceil(log2(n))", "2*S*ceil(log2(n))"),
    "hierarchical": ("2*(k - 1) + 2*(n/k - 1)", "2*S*(n - 1)/n"),
}


def all_reduce(
    ranks: int, size: float, latency: float, bandwidth: float, *, local: int | None = None
) -> list[dict[str, Any]]:
    """The algorithms for an all-reduce of `size` bytes, one row each, the fastest marked.

    latency:   α, seconds a message. bandwidth: bytes/s of a rank's link, one direction.
    local:     ranks of a group, for the hierarchical algorithm; without it that one is left out.

    Each row has `steps` and `bytes` (sent one after the other on the longest path) with their formulas.
    Where the number of ranks is no power of two, halving and doubling first fold the ranks too many;
    their rows then carry counts without a formula.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: bytes a second above 0 are needed")
    seconds = collectives.ranking("all_reduce", ranks, size, latency, 1 / bandwidth, local=local)
    values = {"n": ranks, "S": size} | ({"k": local} if local else {})
    fold = ranks & (ranks - 1) != 0
    rows = []
    for place, (algorithm, took) in enumerate(seconds.items()):
        cost = collectives.cost(
            "all_reduce", algorithm, ranks, size, local=local if algorithm == "hierarchical" else None
        )
        row: dict[str, Any] = {"algorithm": algorithm, "seconds": took, "steps": cost.steps, "bytes": cost.path_bytes}
        row["bus_bandwidth"] = collectives.bus_bandwidth("all_reduce", ranks, size, took) if took else 0.0
        row["fastest"] = place == 0
        for key, formula in zip(("steps", "bytes"), ALL_REDUCE[algorithm]):
            tree = ast.parse(formula, mode="eval").body
            if ranks > 1 and not (fold and "doubling" in algorithm):
                assert abs(evaluate(tree, values) - row[key]) <= 1e-9 * max(1, row[key]), (algorithm, key)
                row[f"{key}_formula"] = show(tree, {})
        rows.append(row)
    return rows


def _parameters(sheet: Worksheet, config: Config) -> None:
    """The lines that lead to N, the number of parameters: with formulas where every block is the same."""
    count = transformer.parameters(config)
    if not config.latent:
        kind = "multi-head" if config.kv_heads == config.heads else "multi-query" if config.kv_heads == 1 else "grouped"
        if "a" not in sheet.values:
            sheet.given("a", config.heads, note="heads")
        sheet.given("k", config.kv_heads, note=f"key/value heads: {kind}")
        sheet.given("d_head", config.head_dim, note="width of a head")
    sheet.given("V", config.vocab, note="vocabulary")
    sheet.line("N_embedding", "V*h" if config.tied else "2*V*h", note="tied" if config.tied else "input and output")
    parts = ["N_embedding"]
    if count.position_embedding:
        sheet.given("positions", config.context, note="learned")
        sheet.line("N_positions", "positions*h")
        parts.append("N_positions")
    if config.latent or config.experts:
        sheet.given("N_attention", count.attention, note="of all layers, counted matrix by matrix")
        sheet.given("N_mlp", count.mlp + count.experts + count.router, note="with all experts and their routers")
    else:
        bias = " + (a + 2*k)*d_head + h" if config.bias else ""
        sheet.line("N_attention", f"L*(2*h*(a + k)*d_head{bias})", note="queries and output, keys and values")
        sheet.given("f", config.d_ff, note="hidden width of the MLP")
        matrices = 3 if config.activation == "swiglu" else 2
        bias = (" + 2*f + h" if matrices == 3 else " + f + h") if config.bias else ""
        sheet.line("N_mlp", f"L*({matrices}*h*f{bias})", note=f"{matrices} matrices: {config.activation}")
    sheet.given("N_norms", count.norms, note=config.norm)
    sheet.line("N", " + ".join([*parts, "N_attention", "N_mlp", "N_norms"]), note="parameters")
    if count.active != count.total:
        sheet.given("N_active", count.active, note="of which one token uses")


def _check_heads(config: Config, name: str, parts: int) -> None:
    """Tensor parallelism gives each device whole heads and an equal part of the MLP."""
    for what, count in (("heads", config.heads), ("columns of the MLP", config.d_ff)):
        if count % parts:
            raise ValueError(f"{name}={parts}: the model has {count} {what}, which do not divide by it")
    if config.latent is None and config.kv_heads % parts and parts % config.kv_heads:
        raise ValueError(f"{name}={parts}: of it and the {config.kv_heads} key/value heads one must divide the other")


def shared(zero: int, stage: int) -> str:
    """The note on a part of the model state."""
    return f"split over the data-parallel devices (ZeRO stage {zero})" if zero >= stage else ""


def is_gpt(config: Config) -> bool:
    """Whether the closed forms for activations are about this block."""
    return (
        config.activation == "gelu"
        and config.latent is None
        and config.experts is None
        and config.kv_heads == config.heads
        and config.heads * config.head_dim == config.d_model
        and config.d_ff == 4 * config.d_model
    )


def link_of(hardware: Hardware, devices: int, node: int) -> Link:
    """What so many neighbouring devices talk through: the link inside a node, else the network."""
    found = hardware.link if devices <= node else hardware.network or hardware.link
    if found is None:
        raise ValueError(f"hardware={hardware.name!r} has no link on record, so {devices} devices cannot be laid out")
    return found
