"""The library's transformer with its layers shared out, and how one becomes it and back.

Names and order of the parameters are those of `mlsys.models.transformer.Transformer`, so a cut is found by name
(`_tensor_shards`), and everything that takes a Transformer, such as `generate`, takes this.

See also:
    `mlsys.parallel.tensor`, `mlsys.parallel._tensor_block` (its blocks).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mlsys.attention import naive
from mlsys.attention.kv_cache import BLOCK, PagedKVCache
from mlsys.models import _checkpoint
from mlsys.models._inputs import check_ids
from mlsys.models._layers import AttentionFn, Cache, KVCache, rotation
from mlsys.models.transformer import Transformer
from mlsys.parallel import traffic
from mlsys.parallel._tensor_block import ParallelBlock, ParallelNorm
from mlsys.parallel._tensor_layers import VocabEmbedding, vocab_cross_entropy
from mlsys.parallel._tensor_operators import Ranks, gather, part
from mlsys.parallel._tensor_shards import check_divides, cut_of
from mlsys.parallel.collectives import all_gather
from mlsys.parallel.collectives import gather as to_one
from mlsys.perf.configs import Config

IGNORED = -100  # a target that does not count: torch's ignore_index


def that_count(targets: Any) -> Any:
    """Targets with 0 in place of those that do not count, to be checked; what is no tensor as it is."""
    return targets.masked_fill(targets == IGNORED, 0) if isinstance(targets, Tensor) else targets


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return targets.numel() - int((targets == IGNORED).sum())


class TensorParallel(Transformer):
    """A transformer of which this rank holds its share; made by `mlsys.parallel.tensor.parallelize`.

    Every rank is called with the same tokens and gets the same logits or loss, as of one process. `parameters()` are
    this rank's shares, of which any optimizer takes its step; `state_dict()` is the whole model.
    """

    def __init__(
        self,
        config: Config,
        group: Ranks,
        *,
        sequence_parallel: bool = False,
        attention: AttentionFn = naive.attention,
        dtype: torch.dtype | None = None,
    ) -> None:
        """All shapes, on the meta device."""
        super().__init__(config, attention=attention, device="meta", dtype=dtype)
        check_divides(config, group.size)
        self.ranks, self.sequence_parallel = group, sequence_parallel
        self._compared = False
        for name in ("token_embedding",) if config.tied else ("token_embedding", "head"):
            matrix = VocabEmbedding(getattr(self, name).weight, group, sequence_parallel=sequence_parallel)
            setattr(self, name, matrix)
        self.blocks = nn.ModuleList(ParallelBlock(block, config, group, sequence_parallel) for block in self.blocks)
        self.norm = ParallelNorm(self.norm, group, sequence_parallel)

    @property
    def rank(self) -> int:
        """Of the tensor-parallel group."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Ranks of the tensor-parallel group."""
        return self.ranks.size

    # --- the model ---

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        cache: Cache | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b t d_model"]:
        """As of one process, whole on every rank."""
        x = self._stream(tokens, cache, positions)
        if x.shape[1] == tokens.shape[1]:
            return x
        return _by_sequence(gather(x, self.ranks), tokens.shape[0])

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of every token, whole on every rank: for sampling. `loss` gathers none."""
        rows = hidden.flatten(0, -2)
        share = self._output.logits(rows, cut=False).mT  # (share, rows): of the last rank maybe fewer
        share = F.pad(share, (0, 0, 0, self._output.weight.shape[0] - share.shape[0]))
        return gather(share, self.ranks)[: self.config.vocab].mT.unflatten(0, hidden.shape[:-1])

    def loss(self, tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats, the same on every rank, and its gradient that of one process.

        Logits stay where they are: each rank has its columns, and three numbers a token are all that is sent.
        Targets of −100 do not count, as for `F.cross_entropy`: the mean is over all others.
        """
        check_ids("targets", that_count(targets), 2, self.config.vocab, "vocab", self.token_embedding.weight.device)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, got {tuple(targets.shape)}")
        x = self._stream(tokens, None, None)
        cut = x.shape[1] != tokens.shape[1]
        logits = self._output.logits(x.flatten(0, 1))  # (b·t, share), if cut ordered by rank
        wanted = _by_rank(targets, self.size) if cut else targets
        return vocab_cross_entropy(logits, wanted.flatten(), self.ranks, vocab=self.config.vocab, ignore_index=IGNORED)

    def cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for this rank's key/value heads."""
        weight, config = self.token_embedding.weight, self._local()
        return KVCache(config, batch, capacity, device=weight.device, dtype=weight.dtype)

    def paged_cache(
        self, blocks: int, block: int = BLOCK, *, window: int | None = None, quantized: str | None = None
    ) -> PagedKVCache:
        """An empty cache of `blocks` blocks for this rank's key/value heads, as `Transformer.paged_cache`."""
        weight, config = self.token_embedding.weight, self._local()
        shape = (config.layers, config.kv_heads, config.head_dim, blocks, block)
        return PagedKVCache(*shape, window=window, quantized=quantized, dtype=weight.dtype, device=weight.device)

    @property
    def _output(self) -> VocabEmbedding:
        return cast(VocabEmbedding, self.token_embedding if self.head is None else self.head)

    def _local(self) -> Config:
        """The config of a model with this rank's heads only."""
        n = self.size
        return replace(self.config, heads=self.config.heads // n, kv_heads=max(1, self.config.kv_heads // n))

    def _stream(self, tokens: Tensor, cache: Cache | None, positions: Tensor | None) -> Tensor:
        """What the last norm gives: (b, t, d), or with sequence parallelism this rank's (b, t/n, d).

        With a cache the stream is not cut: nothing is kept for a backward pass, and a step may be one token.
        """
        positions = self._check(tokens, cache, positions)
        config, (b, t), n = self.config, tokens.shape, self.size
        cut = self.sequence_parallel and cache is None and n > 1
        if cut and t % n:
            raise ValueError(
                f"tokens of shape {(b, t)}: sequence parallelism cuts the sequence, and {n} ranks do not divide {t}: "
                f"pad or cut it to a multiple of {n}, or leave sequence_parallel out"
            )
        if cache is not None or not self._compared:
            self._compare(tokens)
        embedding: Any = self.token_embedding
        x = embedding((_by_rank(tokens, n) if cut else tokens).flatten(), cut=cut).unflatten(0, (b, -1))
        cos_sin = None
        if self.position_embedding is not None:
            learned = self.position_embedding(positions)
            x = x + (part(learned, self.ranks) if cut else learned)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            cos, sin = rotation(positions, config.head_dim, config.rope_theta)
            if positions.ndim == 2:
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (b, 1, t, half): the same for all heads
            cos_sin = cos.to(wide), sin.to(wide)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos_sin, cache, layer)
        if cache is not None:
            cache.advance(t)
        return self.norm(x)

    def _compare(self, tokens: Tensor) -> None:
        """Refuse other tokens than the first rank's: once, and with a cache always, since sampling may drift apart."""
        self._compared = True
        if self.size == 1:
            return
        there = self.ranks.channel
        own = [*tokens.shape, zlib.crc32(tokens.detach().cpu().contiguous().numpy().tobytes())]
        row = torch.tensor(own, dtype=torch.int64, device=there.device)
        rows = row.new_empty(self.size, len(own))
        with traffic.uncounted():
            all_gather(rows, row, there)
        for rank, other in enumerate(rows.tolist()):
            if other != rows[0].tolist():
                raise ValueError(
                    f"tokens on rank {rank} of the tensor-parallel group differ from those on rank 0: all its ranks "
                    "work on one batch, so give them the same tokens, and sample with generators of the same seed; "
                    "batches of their own are for data-parallel ranks"
                )

    # --- the whole model ---

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The whole model, as of one process: all ranks must call it. `parameters()` are what this rank has."""
        whole = {prefix + name: tensor for name, tensor in self.full_state_dict().items()}
        if destination is None:
            return whole
        destination.update(whole)
        return destination

    @torch.no_grad()
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Tensor]:
        """Every parameter whole, a copy, by its name in `Transformer`. All ranks must call it.

        With `rank0_only` the others get an empty dictionary, and hold no more than their shares.
        """
        found: dict[str, Tensor] = {}
        here = not rank0_only or self.rank == 0
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device and has no values: load_state_dict first, or init")
            cut, share = cut_of(name, self.config, self.size), parameter.detach().contiguous()
            if cut.dim is None:
                found |= {name: share.clone()} if here else {}
                continue
            all_ = share.new_empty((self.size, *share.shape)) if here else None
            if rank0_only:
                to_one(all_, share, self.ranks.channel, check=False)
            else:
                assert all_ is not None
                all_gather(all_, share, self.ranks.channel, check=False)
            if all_ is not None:
                found[name] = cut.joined(list(all_))
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take this rank's shares of a whole model's weights, which must be the same on all ranks; nothing is sent.

        ValueError, with nothing changed, for missing, unknown and misshapen tensors.
        """
        if assign or not strict:
            raise ValueError(f"assign={assign}, strict={strict}: shares are copied from a whole model, leave them out")
        self._take({name: tensor.shape for name, tensor in state_dict.items()}, state_dict.__getitem__)

    def _take(self, shapes: Mapping[str, Any], read: Callable[[str], Any]) -> None:
        """Copy this rank's shares of what `read` gives by name, once names and shapes are known to be right."""
        wanted = {name: parameter.shape for name, parameter in _whole(self.config).named_parameters()}
        missing, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
        if missing or unknown:
            raise ValueError(
                f"state must have the whole model's names: missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        for name, shape in wanted.items():
            if tuple(shapes[name]) != tuple(shape):
                raise ValueError(
                    f"state[{name!r}] must have the whole model's shape {tuple(shape)}, got {tuple(shapes[name])}"
                )
        for name, parameter in self.named_parameters():
            share = cut_of(name, self.config, self.size).share(read(name), self.rank, self.size)
            parameter.copy_(share)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that the norm of the *whole* model's is at most `max_norm`; returns the norm before.

        As `torch.nn.utils.clip_grad_norm_` on one process. What several ranks have counts once; one number is sent.
        `torch.nn.utils.clip_grad_norm_` itself would scale each rank by another factor, and the copies drift apart.
        """
        counted, largest = [], math.isinf(norm_type)
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        for name, gradient in gradients.items():
            if cut_of(name, self.config, self.size).is_first(self.rank, self.size):
                counted.append(torch.linalg.vector_norm(gradient, norm_type).double())
        device = self.token_embedding.weight.device
        norms = torch.stack(counted) if counted else torch.zeros(1, dtype=torch.float64, device=device)
        local = torch.linalg.vector_norm(norms, norm_type)
        total = (local if largest else local**norm_type).reshape(1)
        self.ranks.reduce(total, op="max" if largest else "sum")
        norm = (total if largest else total ** (1 / norm_type))[0].to(self.token_embedding.weight.dtype)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale)
        return norm

    def close(self) -> None:
        """End the communicator, if it was made with this model; copies of the model have the same one."""
        self.ranks.close()


def _whole(config: Config) -> Transformer:
    return Transformer(config, device="meta")


def header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config in a file that `transformer.save` wrote, and the dtype of its weights."""
    with Path(path).open("rb"):
        pass  # a missing file or a folder is told as Python tells it
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _checkpoint.KIND:
                raise ValueError(f"{path} holds no model that mlsys.models.transformer.save wrote")
            dtype = file.get_slice("token_embedding.weight")[:1].dtype
            return {"config": json.loads(metadata["config"]), "dtype": dtype}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}): save the model again") from None


def _by_rank(tokens: Tensor, n: int) -> Tensor:
    """(b, t) as (n, b, t/n): first what rank 0 has of every sequence."""
    return tokens.unflatten(1, (n, -1)).transpose(0, 1)


def _by_sequence(gathered: Tensor, b: int) -> Tensor:
    """(n·b, t/n, d), all ranks' parts, as (b, t, d)."""
    return gathered.unflatten(0, (-1, b)).transpose(0, 1).flatten(1, 2)
