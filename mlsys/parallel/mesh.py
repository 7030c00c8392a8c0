"""Data, pipeline and tensor parallelism together: ranks as a grid, and the transformer trained on it as in one process.

n = dp · pp · tp ranks. Each of dp *replicas* takes its part of the batch; in a replica each of pp pipeline ranks has
some neighbouring layers; and each of those is tp ranks, of which every one has a share of each layer:

    replica 0   [ 0 1 ] → [ 4 5 ]        rank = (stage · dp + replica) · tp + share
                   ↕         ↕
    replica 1   [ 2 3 ] → [ 6 7 ]        dp = pp = tp = 2

    with mlsys.parallel.launch in 8 processes:

    grid = mesh(dp=2, pp=2, tp=2)
    model = Parallel("model.safetensors", grid, one_f_one_b(2, 8))   # each rank reads its shares of its stages
    optimizer = model.optimizer(torch.optim.AdamW, lr=3e-4)

    optimizer.zero_grad()
    loss = model.step(*model.part(tokens, targets))    # of this replica's sequences; the mean over all tokens of all
    model.clip_grad_norm(1.0)
    optimizer.step()

**Which dimension where.** Ranks with neighbouring numbers share a host, and there the fastest links. With b sequences
of t tokens in a replica's step, m microbatches, L layers of width d, and Ψ weights, a rank sends

    tp   in each layer, 8 b t d (tp − 1)/tp numbers        · L/pp layers      nothing can hide it
    dp   once a step,   2 Ψ/(pp·tp) · (dp − 1)/dp          whatever L         after the last microbatch
    pp   at each cut,   2 b t d                            for one cut        while other microbatches are computed

So tp is innermost: within a host, and no larger than one. The pipeline sends least, by far where there are many layers,
and one neighbour at a time: it is outermost, and crosses the slow links. dp lies between. That is the order of
Megatron-LM.

**What has to be true** for the gradients to be those of one process, beside what each part sees to by itself:

- Replicas with more tokens count more. The mean over all N tokens that have a target is Σᵢ (nᵢ/N) meanᵢ, so replica i,
  of which the all-reduce takes the mean, multiplies its loss with dp·nᵢ/N.
- Gradients travel between replicas once a step, and not once a microbatch.
- Each share meets only its like: ranks of a dp group have the same stage and the same share. A weight that several
  stages have, as a tied embedding, is averaged over replicas, then added up over stages.
- A norm for clipping counts each number once: shares are summed, and what tp ranks, stages or replicas have copies of
  is counted on one of them.

**ZeRO** goes inside dp. With `zero=1` a replica keeps its slice of the optimizer's state, and after `step` of the
gradients. Stage 2 would reduce in every backward pass, so in every microbatch of a pipeline: m times the bytes, to save
what a pipeline rank must have anyway while microbatches add to it. It is refused there (pp > 1), and so is stage 3,
which would also gather the weights for every microbatch, twice.

Cost:
    One process's FLOPs over n, and the waits: of the pipeline's bubble (`schedules.simulate`) and of tp's sums.

Memory:
    Weights, gradients and optimizer state over pp·tp (with `zero=1` the latter over dp too); activations as of
    `mlsys.perf.activations`, over tp, for as many microbatches as the schedule holds.

Communication:
    As above. A rank of a stage sends to the rank of its share in the next one; without sequence parallelism all tp of
    them send the same x, with it each sends its part.

Papers:
    Narayanan et al. 2021, arXiv:2104.04473, section 3 (which degrees: tensor within a host, pipelines across, then
    data; the bubble (p − 1)/m with m = B/(d·b)).
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1 (what `zero=1` keeps in slices).

See also:
    `mlsys.parallel.pipeline`, `mlsys.parallel.tensor`, `mlsys.parallel.data_parallel`, `mlsys.parallel.zero` (the
    parts), `mlsys.perf.tensor_parallel`, `mlsys.perf.pipeline`, `mlsys.perf.zero` (their formulas).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mlsys.models._layers import AttentionFn
from mlsys.models.transformer import Transformer
from mlsys.parallel._mesh_grid import KINDS, ORDER, Grid, Place, checked, groups, show
from mlsys.parallel._mesh_replicas import (
    HookedReplicas,
    Replicas,
    ShardedReplicas,
    TiedOfReplicas,
    gradients_of,
)
from mlsys.parallel._mesh_source import Source, agreed, check_batch, check_zero
from mlsys.parallel._mesh_stages import check_whole, loss_of, opened, stages_of, take
from mlsys.parallel._tensor_model import TensorParallel, counted
from mlsys.parallel._tensor_operators import Ranks
from mlsys.parallel._tensor_shards import check_divides, cut_of
from mlsys.parallel.collectives import Communicator, all_gather, all_reduce, broadcast
from mlsys.parallel.pipeline import Pipeline, Schedule, one_f_one_b, validate
from mlsys.perf import _checks
from mlsys.perf.configs import Config

__all__ = ["KINDS", "Grid", "Parallel", "Place", "grid_of", "groups", "mesh", "show"]


def mesh(dp: int = 1, pp: int = 1, tp: int = 1, *, device_type: str = "cpu") -> DeviceMesh:
    """A mesh of all ranks with the dimensions "pp", "dp" and "tp", tp innermost; to be called on every rank.

    `mesh.get_group("dp")` is this rank's group of replicas, and so on; any tool that takes a DeviceMesh takes this.
    ValueError if the product is not the number of ranks.
    """
    grid = checked(dp, pp, tp)
    world = dist.get_world_size() if dist.is_initialized() else 0
    if not world:
        raise RuntimeError("there is no process group: run inside mlsys.parallel.launch, or init_process_group first")
    if grid.ranks != world:
        raise ValueError(
            f"dp={dp}, pp={pp}, tp={tp} are {grid.ranks} ranks, and there are {world}: their product must be {world}"
        )
    return init_device_mesh(device_type, tuple(getattr(grid, kind) for kind in ORDER), mesh_dim_names=ORDER)


def grid_of(device_mesh: DeviceMesh) -> Grid:
    """The grid of a mesh that has these three dimensions and all ranks, in whatever order."""
    names = device_mesh.mesh_dim_names or ()
    if sorted(names) != sorted(KINDS):
        raise ValueError(f"mesh has the dimensions {tuple(names)}: make it with mlsys.parallel.mesh.mesh(dp, pp, tp)")
    grid = Grid(**{kind: device_mesh.size(names.index(kind)) for kind in KINDS})
    if grid.ranks != dist.get_world_size():
        raise ValueError(f"mesh has {grid.ranks} ranks, and there are {dist.get_world_size()}: make one of all")
    return grid


class Parallel:
    """The transformer `model` on a mesh; `step` is the forward and backward pass of one process on everybody's batch.

    model:      a `Transformer`, which is not changed: rank 0's weights count, and the other ranks' may be on the meta
                device. Or the path of a file that `transformer.save` wrote, of which each rank reads its shares.
    mesh:       of `mesh(dp, pp, tp)`.
    schedule:   of pp ranks (`mlsys.parallel.schedules`), with any number of stages and microbatches. None, for pp = 1:
                the batch in one piece.
    sequence_parallel: cut the sequence between the layers too, over tp.
    zero:       None, 1, or with pp = 1 also 2: the stage of ZeRO over the replicas.
    costs:      of the layers, as of `pipeline.split`.
    bucket_mb:  MiB of gradients that travel together between replicas.
    algorithm:  of the collectives over dp and tp; "backend" is torch's own.
    attention:  as of `Transformer`; None: that of `model`, or the default.
    timeline:   as of `Pipeline`.

    ValueError on all ranks, before anything is built, if they disagree or the model cannot be cut so.
    """

    def __init__(
        self,
        model: Transformer | str | os.PathLike[str],
        mesh: DeviceMesh,
        schedule: Schedule | None = None,
        *,
        sequence_parallel: bool = False,
        zero: int | None = None,
        costs: Sequence[float] | None = None,
        bucket_mb: float = 25.0,
        algorithm: str = "auto",
        attention: AttentionFn | None = None,
        timeline: Any = None,
    ) -> None:
        self.mesh, self.grid, self.zero = mesh, grid_of(mesh), zero
        grid = self.grid
        self.place = Place(**{kind: mesh.get_local_rank(kind) for kind in KINDS})
        _checks.known("algorithm", algorithm, ("auto", "ring", "shared_memory", "backend"))
        _checks.amount("bucket_mb", bucket_mb, positive=True)
        if schedule is None and grid.pp > 1:
            raise ValueError(f"schedule=None with pp={grid.pp}: say what runs when, such as one_f_one_b({grid.pp}, 8)")
        schedule = one_f_one_b(1, 1) if schedule is None else schedule
        summary = validate(schedule)
        if summary.ranks != grid.pp:
            raise ValueError(
                f"schedule is for {summary.ranks} ranks, and the mesh has pp={grid.pp}: make it for as many"
            )
        check_zero(zero, grid, summary.microbatches)
        self.microbatches = summary.microbatches
        source = agreed(Source(model, attention), (schedule, sequence_parallel, zero, costs))
        self.config: Config = source.config
        check_divides(self.config, grid.tp)
        self.sequence_parallel = sequence_parallel and grid.tp > 1
        self._owned: list[Communicator] = []
        self._algorithm, self._compared = algorithm, False
        self._weight = 1.0  # of this replica's mean loss in the step's
        try:
            self._build(source, schedule, costs, bucket_mb, timeline)
        except BaseException:
            self.close()
            raise

    # --- use ---

    def part(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This replica's sequences of a batch that all ranks have: as even as can be."""
        return tuple(one.tensor_split(self.grid.dp)[self.place.dp] for one in batch)

    def step(self, tokens: Any, targets: Any) -> Tensor:
        """Gradients of the mean loss over all tokens of all replicas, added to what is there; returns that mean.

        Targets of −100 do not count, as for `F.cross_entropy`: the mean is over all others, wherever they are.

        tokens, targets: (b, t), this replica's part of the batch, the same on all its ranks; or lists of the
                         microbatches. Replicas may have different numbers of sequences.
        """
        loss = self.backward(tokens, targets)
        self.reduce()
        return loss

    def backward(self, tokens: Any, targets: Any) -> Tensor:
        """The first half of `step`: what this replica adds. Several such may come before one `reduce`."""
        return self._run(self.pipeline.step, tokens, targets)

    def reduce(self) -> None:
        """The second half: the mean over the replicas."""
        if self._replicas is not None:
            self._replicas.reduce()

    def evaluate(self, tokens: Any, targets: Any) -> Tensor:
        """The mean loss as `step` returns it, by forward passes alone."""
        return self._run(self.pipeline.evaluate, tokens, targets)

    def optimizer(
        self, cls: Callable[..., torch.optim.Optimizer], groups: Any = None, **options: Any
    ) -> torch.optim.Optimizer:
        """A torch optimizer of this rank's shares, or with `zero` of its slices of them.

        groups: parameters of `named_parameters()`, or dictionaries with "params", as torch takes them; None: all.
        """
        if isinstance(self._replicas, ShardedReplicas | HookedReplicas):
            return self._replicas.optimizer(cls, groups, **options)
        return cls([p for p in self.parameters() if p.requires_grad] if groups is None else groups, **options)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shares, by their names in the whole model."""
        return self._named()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names."""
        return (parameter for _, parameter in self._named())

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that the norm of the *whole* model's is at most `max_norm`; returns the norm before.

        As `torch.nn.utils.clip_grad_norm_` on one process, and the same factor on every rank: one number is sent.
        """
        gradients, n = self._gradients(), self.grid.tp
        first_replica = self.place.dp == 0 or self.zero is not None  # others have the same, or slices of their own
        counted = [
            torch.linalg.vector_norm(gradient, norm_type).double()
            for name, gradient in gradients
            if first_replica
            and self._owner[name] == self.place.pp
            and cut_of(name, self.config, n).is_first(self.place.tp, n)
        ]
        norms = torch.stack(counted) if counted else torch.zeros(1, dtype=torch.float64, device=self.pipeline.device)
        local, largest = torch.linalg.vector_norm(norms, norm_type), math.isinf(norm_type)
        total = (local if largest else local**norm_type).reshape(1)
        all_reduce(total, None, op="max" if largest else "sum")
        norm = (total if largest else total ** (1 / norm_type))[0]
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    # --- the whole model ---

    @torch.no_grad()
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Tensor]:
        """Every parameter whole, a copy, by its name in `Transformer`; to be called on all ranks.

        With `rank0_only` the others get an empty dictionary, and hold one parameter at a time.
        """
        found: dict[str, Tensor] = {}
        here, own = not rank0_only or dist.get_rank() == 0, dict(self._named())
        wanted = dict(Transformer(self.config, device="meta").named_parameters())
        dtype = next(iter(own.values())).dtype
        for name in self._order:
            if self._owner[name] == self.place.pp:
                whole = self._joined(name, own[name])
            else:
                whole = torch.empty(wanted[name].shape, dtype=dtype, device=self.pipeline.device)
            if self.grid.pp > 1:
                broadcast(whole, self.mesh.get_group("pp"), src=self._owner[name], check=False)
            if here:
                found[name] = whole
        return found

    def load_state_dict(self, weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        """Take this rank's shares of a whole model's weights, the same on all ranks, or of a saved file.

        ValueError, with nothing changed, for missing, unknown and misshapen tensors.
        """
        with opened(weights) as (shapes, read):
            check_whole(self.config, shapes)
            take(dict(self._named()), self.config, read, self.place.tp, self.grid.tp)

    def close(self) -> None:
        """End the communicators that were made here."""
        for communicator in self._owned:
            communicator.close()

    # --- inside ---

    def _build(self, source: Source, schedule: Schedule, costs: Any, bucket_mb: float, timeline: Any) -> None:
        """This rank's stages, the pipeline that runs them, and what brings the replicas together."""
        grid, algorithm, summary = self.grid, self._algorithm, validate(schedule)
        self._dp = dp = self._group("dp")
        tp = self._group("tp")
        self._tp = Ranks(tp, algorithm=algorithm) if grid.tp > 1 else None

        options: dict[str, Any] = {"attention": source.attention, "dtype": source.dtype}
        if self._tp is None:
            whole = Transformer(self.config, device="meta", **options)
        else:
            whole = TensorParallel(self.config, self._tp, sequence_parallel=self.sequence_parallel, **options)
        self._order = [name for name, _ in whole.named_parameters()]
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(name not in source.frozen)
        stages = stages_of(whole, summary.stages, costs)
        # Who has what: the pipeline ranks of each parameter, the first of which speaks for it.
        owners: dict[str, set[int]] = {name: set() for name in self._order}
        for stage, rank in zip(stages, summary.rank_of, strict=True):
            for name, _ in stage.named_parameters():
                owners[name].add(rank)
        self._owner = {name: min(ranks) for name, ranks in owners.items()}
        mine = {i: stage for i, stage in enumerate(stages) if summary.rank_of[i] == self.place.pp}
        self._stages = nn.ModuleDict({str(i): stage for i, stage in mine.items()})
        self._stages.to_empty(device=source.device)
        source.fill(dict(self._named()), self.place.tp, grid.tp)
        self._stages.train(source.training)

        loss = loss_of(self.config, self._tp, self.sequence_parallel)
        self.pipeline = Pipeline(
            mine,
            schedule,
            lambda output, targets: loss(output, targets) * self._weight,
            self.mesh.get_group("pp"),
            count=lambda targets: counted(targets) if self._weight else 1,  # where none counts, all are 0
            timeline=timeline,
        )
        tied = [p for name, p in self._named() if len(owners[name]) > 1]
        self._replicas: Replicas | ShardedReplicas | HookedReplicas | None = None
        if self.zero == 1:
            self._replicas = ShardedReplicas(self._stages, tied, dp, bucket_mb=bucket_mb)
        elif self.zero == 2:
            self._replicas = HookedReplicas(self._stages, dp, bucket_mb=bucket_mb)
        elif grid.dp > 1:
            parameters = [p for _, p in self._named()]
            self._replicas = Replicas(parameters, tied, dp, bucket_mb=bucket_mb, algorithm=algorithm)
        if grid.dp > 1:
            self.pipeline.tied = TiedOfReplicas(self.pipeline.tied, dp, algorithm)

    def _run(self, do: Callable[[Any, Any], Tensor], tokens: Any, targets: Any) -> Tensor:
        count = self._counted(tokens, targets)
        self._weight = count[0] * self.grid.dp / count[1]
        total = do(tokens, targets)
        if self.grid.dp > 1:
            all_reduce(total := total.reshape(1), self._dp, op="mean", algorithm=self._algorithm, check=False)
        return total.reshape(())

    def _counted(self, tokens: Any, targets: Any) -> tuple[float, float]:
        """Targets of this replica and of all; an error on one rank is raised on all, before anything is sent."""
        error: Exception | None = None
        number = 0
        try:
            number = check_batch(tokens, targets, self.config, self.microbatches, self._cut_into)
        except (TypeError, ValueError) as found:
            error = found
        if not self._compared:
            self._compared = self._compare(tokens, error)
        row = torch.tensor([float(number), float(error is not None)], dtype=torch.float64, device=self.pipeline.device)
        if self.grid.ranks > 1:
            all_reduce(row, None, check=False)
        if error is not None:
            raise error
        if row[1].item():
            raise ValueError("another rank has a batch that cannot be used, and says why: nothing was sent")
        if not row[0].item():
            raise ValueError("targets are −100 in all replicas: there is nothing to take the mean of")
        return float(number), float(row[0].item()) / (self.grid.pp * self.grid.tp)

    def _compare(self, tokens: Any, error: Exception | None) -> bool:
        """Refuse, once, ranks of one replica that have different tokens: as of a loader that counts all ranks.

        Whether there was something to compare on every rank.
        """
        some = tokens if isinstance(tokens, list) else [tokens]
        known = error is None and not any(one.is_meta for one in some)
        text = b"".join(one.detach().cpu().contiguous().numpy().tobytes() for one in some) if known else b""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.place.dp, zlib.crc32(text) if known else None, error is None))
        first: dict[int, tuple[int, int]] = {}
        for rank, (replica, checksum, _) in enumerate(everyone):
            if checksum is None:
                continue
            other, expected = first.setdefault(replica, (rank, checksum))
            if checksum != expected:
                raise ValueError(
                    f"tokens on rank {rank} differ from those on rank {other}, and both are of replica {replica}: its "
                    'ranks work on one batch, so let the loader count by mesh.get_local_rank("dp"), or use part()'
                )
        return all(fine for *_, fine in everyone)

    @property
    def _cut_into(self) -> int:
        return self.grid.tp if self.sequence_parallel else 1

    def _group(self, kind: str) -> Any:
        """This rank's group, with a Communicator where there is something to say."""
        group = self.mesh.get_group(kind)
        if self._algorithm == "backend" or getattr(self.grid, kind) == 1:
            return group
        self._owned.append(Communicator(group))
        return self._owned[-1]

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        for stage in self._stages.values():
            for name, parameter in stage.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def _gradients(self) -> list[tuple[str, Tensor]]:
        if isinstance(self._replicas, ShardedReplicas | HookedReplicas):
            return gradients_of(self._replicas)
        return [(name, p.grad) for name, p in self._named() if p.grad is not None]

    def _joined(self, name: str, parameter: nn.Parameter) -> Tensor:
        cut, share = cut_of(name, self.config, self.grid.tp), parameter.detach().contiguous()
        if self._tp is None or cut.dim is None:
            return share.clone()
        shares = share.new_empty((self.grid.tp, *share.shape))
        all_gather(shares, share, self._tp.channel, check=False)
        return cut.joined(list(shares))
