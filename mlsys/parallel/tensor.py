"""Tensor parallelism: every layer on every rank, each with a share of its matrices; and the sequence shared out too.

Half of a transformer's block is two matrix products with something elementwise, or attention of single heads, between
them. Cut the first matrix by columns and the second by rows:

    Y = h(X A) B,    A = [A₁ … A_n],    B = [B₁; …; B_n]    ⇒    Y = Σᵢ h(X Aᵢ) Bᵢ

Rank i computes h(X Aᵢ) Bᵢ without a word from the others: the elementwise h needs no more than its own columns, and
attention no more than its own heads. One all-reduce makes Y. The other way, the gradient of X is the sum of what each
rank finds for it: one more all-reduce. Two operators say all this. *f* stands before the pair, does nothing, and sums
the gradient; *f̄* stands behind it, sums, and hands the gradient on:

    X ─ f ─ X Aᵢ ─ h ─ (·) Bᵢ ─ f̄ ─ Y        2 halves a block: 2 all-reduces forward, 2 backward

What lies between two pairs, norms and residuals, is the same on all ranks, and so are its activations. With **sequence
parallelism** each rank has 1/n of the positions there. An all-reduce is a reduce-scatter and an all-gather, so there
are no more bytes to send: ḡ reduce-scatters behind a pair, g all-gathers before the next. Only the part is kept for
the backward pass, which gathers it once more.

The vocabulary is cut too. A rank looks up the tokens that it has, and a sum adds zeros for the others. The output
matrix gives each rank its columns of the logits, and the cross-entropy needs three numbers a token from them: the
logits, which may be larger than all else, stay where they are.

    from mlsys.parallel.tensor import parallelize

    model = parallelize(transformer.load("model.safetensors"), sequence_parallel=True)   # in each rank
    model.loss(tokens, targets).backward()                                               # the same tokens on each
    model.clip_grad_norm(1.0)

Gradients need no call at the end. Those of shares are complete; whatever several ranks have a copy of has the same
gradient on all of them, or goes through an operator that sums it in the backward pass itself: norms and biases of a cut
sequence, key/value heads where there are fewer than ranks. So accumulation and `torch.autograd.grad` are right as well.

Where it loses: the sums are on the critical path, four a block, and nothing but the weights' gradient can hide one. It
wants the fastest links there are, and matrices that are still large when cut.

Cost:
    1/n of one process's FLOPs on each rank; norms and residuals n times in all, unless the sequence is cut.

Communication:
    8·b·t·d·(n−1)/n numbers sent by a rank for a block, forward and backward; 10 with sequence parallelism, for what is
    gathered again. `mlsys.perf.tensor_parallel.model_traffic` lists the calls, and `traffic.ledger` counts the same.
    Not in that list, since they are small: with sequence parallelism gradients of norms, biases and learned positions,
    and with fewer key/value heads than ranks those of k and v.
    Memory: 1/n of the weights, but for norms and positions; activations see `mlsys.perf.activations`.

Papers:
    Shoeybi et al. 2019, arXiv:1909.08053, section 3 (the cuts, f, the vocabulary; their g is f̄ here).
    Korthikanti et al. 2022, arXiv:2205.05198, sections 4.2.1 and 4.2.2 (f̄, g, ḡ, sequence parallelism).

See also:
    `mlsys.parallel._tensor_operators` (f and the others: read it next), `mlsys.parallel._tensor_layers`,
    `mlsys.perf.tensor_parallel` (what is sent), `mlsys.parallel.zero3` (shards that are gathered before they are used).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist

from mlsys.attention import naive
from mlsys.models._layers import AttentionFn
from mlsys.models.transformer import Transformer
from mlsys.parallel._mesh_group import of_mesh
from mlsys.parallel._tensor_layers import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    apply_columns,
    vocab_cross_entropy,
)
from mlsys.parallel._tensor_model import TensorParallel, header
from mlsys.parallel._tensor_operators import Ranks, f, f_bar, g, g_bar, gather, part
from mlsys.parallel._tensor_shards import check_divides, cut_of
from mlsys.parallel.collectives import Communicator, Group, broadcast
from mlsys.perf import _checks
from mlsys.perf.configs import Config

__all__ = [
    "ColumnLinear", "Ranks", "RowLinear", "TensorParallel", "VocabEmbedding",
    "apply_columns", "f", "f_bar", "g", "g_bar", "gather", "parallelize", "part", "vocab_cross_entropy",
]  # fmt: skip


def parallelize(
    model: Transformer | str | os.PathLike[str],
    group: Group | Any = None,
    *,
    sequence_parallel: bool = False,
    algorithm: str = "auto",
    overlap: bool | None = None,
    attention: AttentionFn | None = None,
    dtype: torch.dtype | None = None,
) -> TensorParallel:
    """The transformer `model`, shared out to the ranks of `group`, all of which must call this.

    model:      a `Transformer`, which is not changed: rank 0's weights count, and the other ranks' may be on the meta
                device. If rank 0's is too, so is the result, with every shape; `load_state_dict` takes a whole model
                once it has memory (`to_empty`). Or the path of a file that `transformer.save` wrote: each rank reads
                its shares only, so that the file's checksum, which is of all of it, is not compared.
    group:      a process group, a `Communicator`, or a torch DeviceMesh of one dimension (`mesh["tp"]`). For the first
                and the last a Communicator is made, which `.close()` ends.
    sequence_parallel: also cut the sequence, of which the ranks must divide the length.
    algorithm:  of the collectives; "backend" is torch's own and makes no Communicator.
    overlap:    sum the gradient of a product's input while that of its weights is computed. None: where collectives
                do not run through shared memory; there, both would want the same cores.
    attention:  as of `Transformer`; None: that of `model`, or the default.
    dtype:      None: that of `model`, or of the file.

    ValueError if the ranks cannot have equal shares of heads and hidden units, or disagree about what to build.
    """
    if isinstance(model, TensorParallel):
        raise TypeError("model is a TensorParallel already: build a Transformer from its full_state_dict() first")
    if not isinstance(model, Transformer | str | os.PathLike):
        raise TypeError(f"model must be a Transformer or the path of a saved one, got {type(model).__name__}")
    _checks.known("algorithm", algorithm, ("auto", "ring", "shared_memory", "backend"))
    source = _Source(model, attention, dtype)
    chosen = of_mesh(group, "tp")
    own = None
    if algorithm != "backend" and not isinstance(chosen, Communicator):
        chosen = own = Communicator(chosen)
    try:
        ranks = Ranks(chosen, algorithm=algorithm, overlap=overlap, owned=own)
        source = _agreed(source, sequence_parallel, ranks)
        made = TensorParallel(
            source.config, ranks, sequence_parallel=sequence_parallel, attention=source.attention, dtype=source.dtype
        )
        with torch.no_grad():
            source.fill(made)
    except BaseException:
        if own is not None:
            own.close()
        raise
    return made


class _Source:
    """Where the weights come from: a model in memory, or a file."""

    def __init__(self, model: Any, attention: AttentionFn | None, dtype: torch.dtype | None) -> None:
        self.problem = ""
        self.model = model if isinstance(model, Transformer) else None
        self.path = None if isinstance(model, Transformer) else Path(model)
        self.frozen: tuple[str, ...] = ()
        self.training, self.empty, self.dtype = True, False, dtype
        self.config: Any = None  # until it is known
        if self.model is not None:
            named = dict(self.model.named_parameters())
            self.config, self.training = self.model.config, self.model.training
            self.frozen = tuple(name for name, p in named.items() if not p.requires_grad)
            self.dtype = dtype or self.model.token_embedding.weight.dtype
            self.empty = self.model.token_embedding.weight.is_meta
            first: Any = self.model.blocks[0]
            self.attention = attention or first.attention.attend
            if named.keys() != dict(Transformer(self.config, device="meta").named_parameters()).keys():
                self.problem = "model has other parameters than a Transformer of its config: parallelize it unchanged"
        else:
            self.attention = attention or naive.attention
            try:
                found = header(Path(model))
                self.config, self.dtype = Config(**found["config"]), dtype or found["dtype"]
            except (OSError, ValueError, TypeError) as error:  # the others must hear of it
                self.problem = f"{type(error).__name__}: {error}"

    def fill(self, made: TensorParallel) -> None:
        """Give `made`, which is on the meta device, memory and values."""
        made.train(self.training)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        if self.model is not None and self.empty:
            return
        ranks = made.ranks
        if self.path is not None:
            with safetensors.safe_open(self.path, framework="pt") as file:
                made.to_empty(device=ranks.channel.device)
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                made._take(shapes, file.get_slice)
            return
        assert self.model is not None
        weight = self.model.token_embedding.weight
        made.to_empty(device=ranks.channel.device if weight.is_meta else weight.device)
        shares = dict(made.named_parameters())
        for name, parameter in self.model.named_parameters():
            device = shares[name].device
            whole = parameter.detach().clone() if ranks.rank == 0 else torch.empty(parameter.shape, device=device)
            whole = whole.to(shares[name].dtype).contiguous()
            broadcast(whole, ranks.channel, algorithm=ranks.broadcasts, check=False)
            shares[name].copy_(cut_of(name, made.config, ranks.size).share(whole, ranks.rank, ranks.size))


def _agreed(source: _Source, sequence_parallel: bool, ranks: Ranks) -> _Source:
    """`source` with what rank 0 says of it; ValueError on every rank if they cannot build one model."""
    mine = (source.problem, source.config, source.dtype, source.path is None, sequence_parallel, source.frozen)
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, (mine, source.empty), group=ranks.channel.group)
    for rank, (theirs, _) in enumerate(everyone):
        if theirs[0]:
            raise ValueError(f"rank {rank} cannot take part: {theirs[0]}")
        names = ("config", "dtype", "source (a model or a path)", "sequence_parallel", "frozen parameters")
        for name, one, other in zip(names, everyone[0][0][1:], theirs[1:], strict=True):
            if one != other:
                raise ValueError(
                    f"the ranks disagree about {name}: rank 0 has {one}, rank {rank} has {other}; call parallelize "
                    "with the same on every rank"
                )
    check_divides(mine[1], ranks.size)
    source.empty = everyone[0][1]
    return source
