"""Tensor parallelism: each layer's matrices cut over t devices, and what must be sent so that nobody notices.

Attention is cut by heads and the MLP by hidden columns. Each half of a block is then
a pair of matrices, the first cut by columns and the second by rows:

    Y = f(X A) B,    A = [A₁ … A_t],    B = [B₁; …; B_t]    ⇒    Y = Σᵢ f(X Aᵢ) Bᵢ

so a device does its share without a word, and the sum is one all-reduce. The
backward pass mirrors it: one all-reduce of the gradient of X. With two halves a
block, that is 2 all-reduces of b·s·h numbers forward and 2 backward, in each of which
a device sends 2(t−1)/t of the vector:

    8·b·s·h·(t−1)/t  numbers a layer, a device and a microbatch        b sequences of s tokens, width h

*Sequence parallelism* also cuts what lies between the pairs (norms, dropout,
residuals) along the sequence. Each all-reduce becomes its two halves, a reduce-scatter
after the pair and an all-gather before the next: the same bytes, 1/t of the
activations. Only its share of X is kept for the backward pass, so X is gathered once
more there: 2·b·s·h·(t−1)/t on top, which can run beside the gradient of the weights.

Cut evenly: queries, keys and values by heads, the MLP by d_ff, embedding and output by
rows of the vocabulary, padded to a multiple of t. Kept whole by each device: norms,
position embeddings, and biases that are added after the sum.

Cost:
    1/t of the matmul FLOPs for each device.

Communication:
    See above; `layer_traffic` and `model_traffic` list the collectives, in bytes. It grows with b·s·h while the work
    grows with b·s·h², so wide models hide it best; and it waits on the critical path, so t stays inside a node.

Papers:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3 (the cut, the vocabulary's included).
    Narayanan et al. 2021, arXiv:2104.04473, section 3.2 (8bsh(t−1)/t).
    Korthikanti et al. 2022, arXiv:2205.05198, section 4.2 (sequence parallelism).

See also:
    `mlsys.perf.collectives` (seconds), `mlsys.perf.activations` (activations under both), `mlsys.perf.pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mlsys.perf import _checks, collectives
from mlsys.perf.configs import Config

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Call:
    """The same collective `count` times, over a vector of `size` bytes (whose, `mlsys.perf.collectives` says)."""

    operation: str
    count: int
    size: float


@dataclass(frozen=True)
class Traffic:
    """The collectives of one microbatch among `tp` devices, forward and backward."""

    tp: int
    forward: tuple[Call, ...]
    backward: tuple[Call, ...]

    @property
    def forward_bytes(self) -> float:
        """Bytes that a device sends in the forward pass."""
        return self._sent(self.forward)

    @property
    def backward_bytes(self) -> float:
        """Bytes that a device sends in the backward pass."""
        return self._sent(self.backward)

    @property
    def total(self) -> float:
        """Bytes that a device sends in both passes."""
        return self.forward_bytes + self.backward_bytes

    def seconds(self, alpha: float, beta: float) -> float:
        """Seconds for both passes, each collective on a ring, nothing overlapped: α a message, β a byte."""
        calls = self.forward + self.backward
        return sum(
            call.count * collectives.cost(call.operation, "ring", self.tp, call.size).seconds(alpha, beta)
            for call in calls
        )

    def _sent(self, calls: Iterable[Call]) -> float:
        return sum(
            call.count * collectives.cost(call.operation, "ring", self.tp, call.size).bytes_per_rank for call in calls
        )


def layer_traffic(
    batch: int,
    seq: int,
    d_model: int,
    tp: int,
    *,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    itemsize: int = 2,
) -> Traffic:
    """The collectives of one block for a microbatch of `batch` sequences of `seq` tokens, over `tp` devices.

    `recompute` "full" runs the forward pass again, collectives and all; "selective" repeats only the core of attention,
    which sends nothing. `itemsize` is the bytes of an activation.
    """
    for name, value in (("batch", batch), ("seq", seq), ("d_model", d_model), ("tp", tp), ("itemsize", itemsize)):
        _checks.whole(name, value)
    _checks.known("recompute", recompute, RECOMPUTE)
    _check_sequence(seq, tp, sequence_parallel)
    size = batch * seq * d_model * itemsize
    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    if sequence_parallel:
        forward = (Call("all_gather", 2, size), Call("reduce_scatter", 2, size))
        backward = (Call("all_gather", 4, size), Call("reduce_scatter", 2, size))  # 2 gradients in, 2 inputs once more
    else:
        forward = backward = (Call("all_reduce", 2, size),)
    return Traffic(tp, forward, (*forward, *backward) if recompute == "full" else backward)


def elements_per_layer(
    batch: int,
    seq: int,
    d_model: int,
    tp: int,
    *,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> float:
    """Numbers, not bytes, that a device sends for one block, forward and backward: 8bsh(t−1)/t, or 10 with sequence
    parallelism.
    """
    return layer_traffic(
        batch, seq, d_model, tp, sequence_parallel=sequence_parallel, recompute=recompute, itemsize=1
    ).total


def model_traffic(
    config: Config,
    batch: int,
    seq: int,
    tp: int,
    *,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    itemsize: int = 2,
) -> Traffic:
    """The collectives of the whole model for one microbatch: every block, the embedding, the output and the loss.

    The embedding's rows lie on different devices, so what they look up is summed; the loss over a cut vocabulary sums
    three float32 numbers a token (maximum, denominator, the target's logit) in place of the logits.
    Raises ValueError if `tp` does not divide the heads or d_ff.
    """
    _check_divisible(config, tp)
    layer = layer_traffic(
        batch, seq, config.d_model, tp, sequence_parallel=sequence_parallel, recompute=recompute, itemsize=itemsize
    )
    size = batch * seq * config.d_model * itemsize
    loss = Call("all_reduce", 3, batch * seq * 4)
    ends_forward: tuple[Call, ...]
    ends_backward: tuple[Call, ...]
    if sequence_parallel:
        ends_forward = (Call("reduce_scatter", 1, size), Call("all_gather", 1, size), loss)
        ends_backward = (Call("reduce_scatter", 1, size), Call("all_gather", 2, size))
    else:
        ends_forward = (Call("all_reduce", 1, size), loss)
        ends_backward = (Call("all_reduce", 1, size),)
    return Traffic(
        tp,
        (*(_times(call, config.layers) for call in layer.forward), *ends_forward),
        (*(_times(call, config.layers) for call in layer.backward), *ends_backward),
    )


@dataclass(frozen=True)
class Shard:
    """Parameters of one device.

    token_embedding, attention, mlp, output:  its share of what is cut; `output` is 0 where it is the embedding.
    replicated:  what every device has in full.
    padding:     numbers of all devices together that are rows added to the vocabulary, so that it can be cut evenly.
    """

    tp: int
    token_embedding: int
    attention: int
    mlp: int
    output: int
    replicated: int
    padding: int

    @property
    def total(self) -> int:
        """Numbers on the device, padding included."""
        return self.token_embedding + self.attention + self.mlp + self.output + self.replicated

    @property
    def whole(self) -> int:
        """Numbers of the uncut model: the shares of all devices, less padding, and one copy of what is replicated."""
        return self.tp * (self.total - self.replicated) - self.padding + self.replicated


def shard_parameters(config: Config, tp: int) -> Shard:
    """How many parameters each of `tp` devices has: all have the same.

    Raises ValueError if `tp` does not divide the heads, the key/value heads or d_ff, and for latent attention and
    experts, which are cut in ways of their own.
    """
    _check_divisible(config, tp)
    d, heads = config.d_model, config.head_dim * config.heads
    qkv = config.head_dim * (config.heads + 2 * config.kv_heads)
    hidden = config.d_ff * (2 if config.activation == "swiglu" else 1)  # SwiGLU has a gate beside each hidden unit
    rows = -(-config.vocab // tp)
    bias = int(config.bias)
    norm = d * (1 + (bias if config.norm == "layernorm" else 0))
    return Shard(
        tp=tp,
        token_embedding=rows * d,
        attention=config.layers * (qkv * (d + bias) + heads * d) // tp,
        mlp=config.layers * (hidden * (d + bias) + config.d_ff * d) // tp,
        output=0 if config.tied else rows * d,
        replicated=(
            (2 * config.layers + 1) * norm
            + 2 * config.layers * d * bias
            + (config.context * d if config.positions == "learned" else 0)
        ),
        padding=(rows * tp - config.vocab) * d * (1 if config.tied else 2),
    )


def _times(call: Call, count: int) -> Call:
    return Call(call.operation, call.count * count, call.size)


def _check_sequence(seq: int, tp: int, sequence_parallel: bool) -> None:
    if sequence_parallel and seq % tp:
        raise ValueError(f"seq={seq} is not a multiple of tp={tp}, as sequence parallelism needs")


def _check_divisible(config: Config, tp: int) -> None:
    _checks.whole("tp", tp)
    for name, value in (("latent", config.latent), ("experts", config.experts)):
        if value is not None:
            raise ValueError(f"config.{name}: only plain attention and plain MLPs are cut here")
    for name in ("heads", "kv_heads", "d_ff"):
        value = getattr(config, name)
        if value % tp:
            remedy = f"take a tp that divides {value}"
            if name == "kv_heads" and tp > value:
                remedy += ", or copy key/value heads and count those yourself"
            raise ValueError(f"config.{name}={value} is not a multiple of tp={tp}: {remedy}")
