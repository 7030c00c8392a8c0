"""What the forward pass must keep for the backward pass, tensor by tensor.

The gradient of a product needs both factors, so each matrix needs its input again
when its own gradient is computed; softmax, GELU, norms and dropout need something
of theirs too. These tensors, the activations, stay in memory from the forward pass
until the backward pass has used them. For a block of the GPT kind in 16 bits,
s tokens, batch b, width h, a heads, that is

    s·b·h · (34 + 5·a·s/h) bytes

of which `saved_tensors` is the list. *Selective* recomputation drops what
attention holds between its two products (the term with s²) and computes it
again; *full* recomputation keeps only a block's input, and pays a fourth forward
pass. Tensor parallelism over `tp` devices divides what lies between the matrices,
but not the norms, residuals and their dropout: sequence parallelism divides those.

What is not counted: a norm's mean and variance (8 bytes a token), an expert's
routing weights, communication buffers, fragmentation.

Cost:
    FLOPs of recomputation: selective 4·batch·seq²·heads·head_dim a layer, full as many as the block's forward pass.

Memory:
    activation_bytes_per_layer: the sum of `saved_tensors`; activation_bytes: that of every block which a pipeline stage
    holds, for each microbatch in flight, and of what lies before the first block and after the last (`head_bytes`).

Papers:
    Korthikanti et al. 2022, arXiv:2205.05198, section 4 (what is kept), Table 2 (per layer) and section 4.3 (the rest).
    Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (microbatches in flight, with and without interleaving).

See also:
    `mlsys.perf.transformer` (FLOPs with recomputation; weights, gradients and optimizer state),
    `mlsys.perf.checkpointing` (which layers to recompute), `mlsys.perf.tensor_parallel`, `mlsys.perf.pipeline` (what
    splitting sends, and the schedules).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlsys.perf._checks import known, whole
from mlsys.perf.configs import Config
from mlsys.perf.transformer import Recompute, key_value_dims, token_count

Kind = Literal["sequence", "tensor", "core"]


@dataclass(frozen=True)
class Saved:
    """A tensor that the forward pass of a block leaves for the backward pass.

    bytes: on one device.
    kind:  "sequence": as wide as the model; tensor parallelism copies it, sequence parallelism divides it by position.
           "tensor":   belongs to heads or hidden units; tensor parallelism divides it.
           "core":     between attention's two products, batch × heads × seq × seq; divided by heads, and what selective
                       recomputation, or a flash kernel, does not keep.
    """

    name: str
    bytes: int
    kind: Kind


def saved_tensors(
    config: Config,
    batch: int,
    seq: int,
    *,
    layer: int = 0,
    recompute: Recompute = "none",
    tp: int = 1,
    sequence_parallel: bool = False,
    dropout: bool | None = None,
    itemsize: int = 2,
) -> list[Saved]:
    """What block `layer` keeps for one microbatch of `batch` sequences, tensor by tensor, on one of `tp` devices.

    dropout:  whether the block has its three dropouts, whose masks take one byte an element. None: as the family is
              trained, with GELU (GPT) yes, with SwiGLU (Llama) no.
    itemsize: bytes of an activation.

    A matrix product keeps its inputs, GELU and SiLU theirs, a softmax its output, a
    norm its input, an elementwise product both factors, a dropout its mask; a tensor
    that two of them keep is listed once. Nothing is fused: a fused SwiGLU does
    without "activated gate". Experts hold a copy of each token for every routed
    expert it goes to, and their outputs, which the routing weights' gradient needs;
    the load is taken as balanced and is not divided over devices but by `tp`.

    With "full" recomputation only the block's input is left. Korthikanti et al. keep
    it whole on each device, as here; with `sequence_parallel` it is divided too.
    Raises ValueError where `tp` does not divide the heads, the hidden width or, in
    sequence parallelism, the sequence. Fewer key/value heads than devices are copied.
    """
    tokens = token_count(config, batch, seq)
    layer = whole("layer", layer, at_least=0)
    if layer >= config.layers:
        raise ValueError(f"layer={layer}: the model has layers={config.layers}, counted from 0")
    known("recompute", recompute, get_args(Recompute))
    seq, tp = _check_shards(config, seq, tp, sequence_parallel)
    itemsize = whole("itemsize", itemsize)
    if dropout is None:
        dropout = config.activation == "gelu"

    shards = {"sequence": tp if sequence_parallel else 1, "tensor": tp, "core": tp}
    if recompute == "full":
        per_token: list[_PerToken] = [("block input", config.d_model * itemsize, "sequence")]
    else:
        per_token = [
            *_attention_saves(config, seq, tp, dropout, itemsize),
            *_mlp_saves(config, config.has_experts(layer), dropout, itemsize),
        ]
    return [
        Saved(name, tokens * width // shards[kind], kind)
        for name, width, kind in per_token
        if not (recompute == "selective" and kind == "core")
    ]


_PerToken = tuple[str, int, Kind]  # name, bytes a token, kind


def _attention_saves(config: Config, seq: int, tp: int, dropout: bool, itemsize: int) -> list[_PerToken]:
    d, heads, latent = config.d_model * itemsize, config.heads * itemsize, config.latent
    key, value = key_value_dims(config)
    copies = heads if latent else max(config.kv_heads, tp) * itemsize
    saves: list[_PerToken] = [("attention norm input", d, "sequence"), ("attention input", d, "sequence")]
    if latent and latent.query_rank:
        rank = latent.query_rank * itemsize
        saves += [("query norm input", rank, "sequence"), ("compressed query", rank, "sequence")]
    if latent:
        rank = latent.kv_rank * itemsize
        saves += [("key/value norm input", rank, "sequence"), ("compressed key/value", rank, "sequence")]
    saves += [
        ("queries", heads * key, "tensor"),
        ("keys", copies * key, "tensor"),
        ("values", copies * value, "tensor"),
        ("softmax output", heads * seq, "core"),
    ]
    if dropout:
        saves += [
            ("attention dropout mask", config.heads * seq, "core"),
            ("attention dropout output", heads * seq, "core"),
        ]
    saves.append(("attention output", heads * value, "tensor"))
    if dropout:
        saves.append(("projection dropout mask", config.d_model, "sequence"))
    return saves


def _mlp_saves(config: Config, has_experts: bool, dropout: bool, itemsize: int) -> list[_PerToken]:
    d = config.d_model * itemsize
    saves: list[_PerToken] = [("mlp norm input", d, "sequence"), ("mlp input", d, "sequence")]
    if config.experts and has_experts:
        k, routed = config.experts.per_token, config.experts.per_token * config.experts.d_ff * itemsize
        saves += [
            ("router probabilities", config.experts.count * 4, "sequence"),  # in float32
            ("expert inputs", k * d, "sequence"),
            *_hidden_saves(config, "expert ", routed),
            ("expert outputs", k * d, "sequence"),
        ]
        if config.experts.shared:
            saves += _hidden_saves(config, "shared expert ", config.experts.shared * config.experts.d_ff * itemsize)
    else:
        saves += _hidden_saves(config, "", config.d_ff * itemsize)
    if dropout:
        saves.append(("mlp dropout mask", config.d_model, "sequence"))
    return saves


def _hidden_saves(config: Config, prefix: str, width: int) -> list[_PerToken]:
    names = {
        "gelu": ("hidden before GELU", "hidden after GELU"),
        "swiglu": ("gate", "activated gate", "up", "gated product"),
    }
    return [(prefix + name, width, "tensor") for name in names[config.activation]]


def activation_bytes_per_layer(
    config: Config,
    batch: int,
    seq: int,
    *,
    layer: int = 0,
    recompute: Recompute = "none",
    tp: int = 1,
    sequence_parallel: bool = False,
    dropout: bool | None = None,
    itemsize: int = 2,
) -> int:
    """Bytes that one block keeps for one microbatch on one device: the sum of `saved_tensors`, with its arguments.

    For a GPT block (GELU, an MLP four times as wide, as many key/value heads as
    heads, dropout, 16 bits) these are the closed forms of Korthikanti et al., in s·b·h bytes:

                       none                    selective      full
        tp only        10 + 24/t + 5as/ht      10 + 24/t      2
        with sequence  34/t + 5as/ht           34/t           2/t   (the paper: 2)

    Not so for SwiGLU, grouped or latent attention and experts, which `saved_tensors` lists one by one.
    """
    saved = saved_tensors(
        config,
        batch,
        seq,
        layer=layer,
        recompute=recompute,
        tp=tp,
        sequence_parallel=sequence_parallel,
        dropout=dropout,
        itemsize=itemsize,
    )
    return sum(tensor.bytes for tensor in saved)


def head_bytes(
    config: Config,
    batch: int,
    seq: int,
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    itemsize: int = 2,
) -> int:
    """Bytes that one device keeps for one microbatch after the last block, with the arguments of `saved_tensors`.

    The input of the last norm and that of the output matrix, which sequence parallelism
    divides, and the logits in float32, of which each of `tp` devices has the columns of
    its part of the vocabulary, padded to a multiple of `tp`. For 16 bits that is
    4·s·b·h·(1 + V/h). With a large vocabulary the logits outweigh many blocks.
    """
    tokens = token_count(config, batch, seq)
    seq, tp = _check_shards(config, seq, tp, sequence_parallel)
    itemsize = whole("itemsize", itemsize)
    inputs = 2 * tokens * config.d_model * itemsize // (tp if sequence_parallel else 1)
    return inputs + 4 * tokens * -(-config.vocab // tp)


def activation_bytes(
    config: Config,
    batch: int,
    seq: int,
    *,
    recompute: Recompute = "none",
    tp: int = 1,
    sequence_parallel: bool = False,
    pp: int = 1,
    chunks: int = 1,
    microbatches: int | None = None,
    dropout: bool | None = None,
    itemsize: int = 2,
) -> int:
    """Bytes of activations on the device that holds most, at the fullest moment of a step with 1F1B.

    batch:        sequences in one microbatch.
    pp, chunks:   pipeline stages, and model chunks a stage holds (above 1: the interleaved schedule).
    microbatches: in a step; None: enough to fill the pipeline.

    The first stage holds layers/pp blocks for pp microbatches, so a pipeline does not
    lower the peak: L·(bytes of a block) again, and with interleaving a factor
    1 + (pp−1)/(pp·chunks) more. To the blocks comes the embedding's dropout mask,
    s·b·h a microbatch. The last stage holds its blocks for one microbatch only, but
    `head_bytes` with them: where blocks keep little, as with recomputation, or the
    vocabulary is large, that is the most. Stages between the two can be it where only some blocks have experts.
    Recomputation in the backward pass brings one block's tensors back at a time; these are not counted.
    """
    tokens = token_count(config, batch, seq)
    seq, tp = _check_shards(config, seq, tp, sequence_parallel)
    pp, chunks = whole("pp", pp), whole("chunks", chunks)
    if config.layers % (pp * chunks):
        raise ValueError(f"layers={config.layers} do not divide into pp={pp} stages of chunks={chunks} chunks")
    if chunks > 1 and pp == 1:
        raise ValueError(f"chunks={chunks} needs pp of at least 2: one stage has nothing to interleave with")
    if microbatches is None:
        microbatches = 2 * pp
    microbatches = whole("microbatches", microbatches)
    if chunks > 1 and microbatches % pp:
        raise ValueError(f"microbatches={microbatches}: the interleaved schedule needs a multiple of pp={pp}")
    if dropout is None:
        dropout = config.activation == "gelu"

    blocks = [
        activation_bytes_per_layer(
            config,
            batch,
            seq,
            layer=layer,
            recompute=recompute,
            tp=tp,
            sequence_parallel=sequence_parallel,
            dropout=dropout,
            itemsize=itemsize,
        )
        for layer in range(config.layers)
    ]
    if dropout:  # one byte an element of the embedding
        blocks[0] += tokens * config.d_model // (tp if sequence_parallel else 1)
    blocks[-1] += head_bytes(config, batch, seq, tp=tp, sequence_parallel=sequence_parallel, itemsize=itemsize)

    each = config.layers // (pp * chunks)
    places = [sum(blocks[start : start + each]) for start in range(0, config.layers, each)]
    return max(_stage_peak(places[rank::pp], rank, pp, microbatches) for rank in range(pp))


def _stage_peak(chunks: list[int], rank: int, pp: int, microbatches: int) -> int:
    """The most bytes that stage `rank` holds, whose chunks keep so many for a microbatch, from forward to backward.

    A device runs some forward passes to warm up, and then a forward and a backward pass by turns: with one chunk
    1F1B, with more the order of Narayanan et al. 2021, section 2.2.2, which gives `pp` microbatches to each chunk in
    turn. Chunks differ, so it is followed pass by pass, over 3·pp microbatches at most: the others repeat them.
    """
    count, passes = len(chunks), min(microbatches, 3 * pp) * len(chunks)
    order = [step // pp % count for step in range(passes)]  # the chunk of each forward pass; backward from the last
    warm_up = pp - 1 - rank if count == 1 else 2 * (pp - 1 - rank) + (count - 1) * pp
    held = peak = sum(chunks[chunk] for chunk in order[:warm_up])
    for ahead, behind in zip(order[warm_up:], order, strict=False):
        held += chunks[ahead]
        peak = max(peak, held)
        held -= chunks[count - 1 - behind]
    return peak


def _check_shards(config: Config, seq: int, tp: int, sequence_parallel: bool) -> tuple[int, int]:
    """`seq` and `tp`, once `tp` devices are known to get equal shares."""
    seq, tp = whole("seq", seq), whole("tp", tp)
    widths = {"heads": config.heads, "d_ff": config.d_ff}
    if config.experts:
        widths["experts.d_ff"] = config.experts.d_ff
    for name, width in widths.items():
        if width % tp:
            raise ValueError(f"tp={tp} does not divide {name}={width}: each device needs an equal share")
    if config.latent is None and config.kv_heads % tp and tp % config.kv_heads:
        raise ValueError(
            f"tp={tp} and kv_heads={config.kv_heads}: one must divide the other, to share out or to copy the heads"
        )
    if sequence_parallel and seq % tp:
        raise ValueError(f"tp={tp} does not divide seq={seq}: sequence parallelism gives each device an equal share")
    return seq, tp
