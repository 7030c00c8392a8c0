"""Our schedules as torch writes them: rows of `3F0`, for `torch.distributed.pipelining` to run.

(tmp_path / "table.csv").write_text(to_csv(zb_h1(2, 4)))
runtime = _PipelineScheduleRuntime(stages, n_microbatches=4, loss_fn=...)
runtime._load_csv(tmp_path / "table.csv")        # format="compute_only": torch adds the messages itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlsys.parallel.schedules import Op, Schedule

TORCH = {"F": "F", "B": "I", "W": "W", "BW": "B"}  # torch calls a whole backward pass B, and the input's gradient I
OURS = {theirs: ours for ours, theirs in TORCH.items()}


def to_csv(schedule: Schedule) -> str:
    """One line a rank, in rank order."""
    lines = [",".join(f"{stage}{TORCH[kind]}{i}" for kind, stage, i in schedule[rank]) for rank in range(len(schedule))]
    return "\n".join(lines) + "\n"


def from_torch(pipeline_order: Mapping[int, Sequence[object]]) -> Schedule:
    """A table of torch's, as `_PipelineScheduleRuntime.pipeline_order` has it: without its gaps and reductions."""
    return {rank: [op for action in row for op in _ops(action)] for rank, row in pipeline_order.items()}


def _ops(action):
    if action is None:
        return []
    together = getattr(action, "sub_actions", None)
    if together:
        return [op for one in together for op in _ops(one)]
    kind = OURS.get(action.computation_type.value)
    return [Op(kind, action.stage_index, action.microbatch_index)] if kind else []


class FakeStage:
    """What a torch schedule asks of a stage before anything runs: no process group is needed to make its table."""

    def __init__(self, index: int, stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, 0
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.has_backward, self.submod, self.group = True, None, None
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(stages)}


def torch_table(name: str, p: int, m: int, v: int = 1) -> Schedule:
    """The table that torch's own schedule `name` makes; those with several stages a rank only."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    stages = p * v
    own = [0, stages - 1] if name in ("ZBVZeroBubble", "DualPipeV") else range(0, stages, p)
    made = get_schedule_class(name)([FakeStage(index, stages, p) for index in own], m, loss_fn=None)
    return from_torch(made.pipeline_order)
