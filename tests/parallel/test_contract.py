"""The contracts of parallel: right implementations pass, and whatever a rank does wrong is told in a line."""

import os
import signal
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlsys.contracts import _parallel_collectives, _parallel_data, _parallel_ranks, _parallel_zero, check, find
from mlsys.contracts.isolate import check_isolated
from mlsys.parallel.zero import ZeRO1

COLLECTIVES, DATA_PARALLEL, ZERO, ZERO_3 = (
    find(f"parallel.{name}") for name in ("collectives", "data_parallel", "zero", "zero3")
)


def torchs_all_reduce(tensor, group=None):
    dist.all_reduce(tensor, group=group)


def ring(tensor, group=None):
    """What a student would write: a ring over uneven parts."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    parts = list(tensor.view(-1).tensor_split(n))
    for phase in (0, 1):
        for step in range(n - 1):
            send, receive = (rank - step + phase) % n, (rank - step - 1 + phase) % n
            incoming = torch.empty_like(parts[receive])
            calls = [
                dist.P2POp(dist.isend, parts[send].contiguous(), group=group, group_peer=(rank + 1) % n),
                dist.P2POp(dist.irecv, incoming, group=group, group_peer=(rank - 1) % n),
            ]
            for work in dist.batch_isend_irecv(calls):
                work.wait()
            parts[receive].copy_(incoming if phase else parts[receive] + incoming)


def torchs_ddp(module, group=None):
    return nn.parallel.DistributedDataParallel(module, process_group=group, find_unused_parameters=True)


class WholeTensors(nn.Module):
    """What a student would write: each parameter is one rank's, the next largest that of the one with the least."""

    mistake = ""

    def __init__(self, module, group=None):
        super().__init__()
        self.module, self.group = module, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.owner = self.owners()
        if self.mistake != "no_broadcast":
            for one in [*module.parameters(), *module.buffers()]:
                dist.broadcast(one.detach(), group_src=0, group=group)
        self.averaged = False

    def owners(self):
        owner, loads = {}, [0] * self.ranks
        for parameter in sorted(self.trained, key=torch.numel, reverse=True):
            owner[parameter] = loads.index(min(loads))
            loads[owner[parameter]] += parameter.numel()
        return owner

    def forward(self, tokens):
        return self.module(tokens)

    def average(self):
        if not self.averaged:
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)
                parameter.grad /= 1 if self.mistake == "sum" else self.ranks
        self.averaged = True

    def clip_grad_norm(self, max_norm):
        self.average()
        mine = [p for p in self.trained if self.owner[p] == self.rank]
        norm = torch.stack([p.grad.norm() for p in (mine if self.mistake == "local_norm" else self.trained)]).norm()
        for parameter in self.trained:
            parameter.grad *= (max_norm / norm).clamp(max=1)
        return norm

    def optimizer(self, cls, **options):
        mine = [p for p in self.trained if self.owner[p] == self.rank]
        made = cls([{"params": mine}], **options)
        made.register_step_pre_hook(lambda *_: self.average())
        made.register_step_post_hook(lambda *_: self.share())
        return made

    def share(self):
        for parameter, owner in self.owner.items():
            if self.mistake != "stale_shards":
                dist.broadcast(parameter.detach(), group_src=owner, group=self.group)
            parameter.grad = None
        self.averaged = False


class SumInTurn(WholeTensors):
    mistake = "sum"

    def owners(self):
        return {p: index % self.ranks for index, p in enumerate(self.trained)}


class StaleShards(WholeTensors):
    mistake = "stale_shards"


class LocalNorm(WholeTensors):
    mistake = "local_norm"


class NoBroadcast(WholeTensors):
    mistake = "no_broadcast"


class FirstHasAll(WholeTensors):
    def owners(self):
        return dict.fromkeys(self.trained, 0)


RIGHT = {
    "torch's all-reduce": (COLLECTIVES, torchs_all_reduce),
    "a ring": (COLLECTIVES, ring),
    "no mistake, all-reduce": (COLLECTIVES, _parallel_collectives._plain),
    "torch's DDP": (DATA_PARALLEL, torchs_ddp),
    "no mistake, DDP": (DATA_PARALLEL, _parallel_data._Plain),
    "ZeRO1": (ZERO, ZeRO1),
    "whole tensors, ZeRO": (ZERO, WholeTensors),
    "no mistake, ZeRO": (ZERO, _parallel_zero._Sharded),
    "no mistake, ZeRO-3": (ZERO_3, _parallel_zero._Pieces),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_implementations_pass_on_another_seed(name):
    contract, impl = RIGHT[name]
    verdict = check(contract, impl, seed=1000)
    assert verdict.passed, verdict


def test_wrong_variants_are_named_on_another_seed_too():
    wrong = COLLECTIVES.wrong
    assert {name: check(COLLECTIVES, wrong[name].impl, seed=1000).failure.like for name in wrong} == {
        n: n for n in wrong
    }


@pytest.mark.parametrize(
    ("impl", "like"),
    [
        (SumInTurn, "sum"),  # of two ranks, one has twice as much state as the other; the variant's have the same
        (StaleShards, "stale_shards_by_size"),
        (LocalNorm, "local_norm_by_size"),
        (NoBroadcast, "no_broadcast_by_size"),
    ],
)
def test_mistakes_are_named_however_the_parameters_are_divided(impl, like):
    failure = check(ZERO, impl).failure
    assert failure.like == like
    assert failure.hint == _parallel_zero.HINTS[impl.mistake]


def test_a_rank_with_all_the_state_is_not_taken_for_every_rank_with_all_of_it():
    """The optimizer's state is incidental, but here it is what is wrong."""
    failure = check(ZERO, FirstHasAll).failure
    assert failure.message.startswith("numbers of optimizer state: rank 0 holds ")
    assert failure.like is None


def test_there_are_enough_wrong_variants():
    assert all(len(contract.wrong) >= 10 for contract in (COLLECTIVES, DATA_PARALLEL, ZERO, ZERO_3))


# --- what goes wrong beside numbers -----------------------------------------------------------------------------------


LOCK = threading.Lock()


def raises_on_rank_1(tensor, group=None):
    if dist.get_rank() == 1:
        raise KeyError("my mistake")
    dist.all_reduce(tensor)


def exits_on_rank_1(tensor, group=None):
    if dist.get_rank() == 1:
        sys.exit(3)
    dist.all_reduce(tensor)


def leaves_on_rank_1(tensor, group=None):
    if dist.get_rank() == 1:
        os._exit(4)
    dist.all_reduce(tensor)


def dies_on_rank_1(tensor, group=None):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(tensor)


def reshapes(tensor, group=None):
    tensor.resize_(2, 2)


class NoOptimizer(nn.Module):
    def __init__(self, module, group=None):
        super().__init__()
        for one in [*module.parameters(), *module.buffers()]:
            dist.broadcast(one.detach(), 0)
        self.module = module

    def forward(self, tokens):
        return self.module(tokens)


class NotAnOptimizer(NoOptimizer):
    def optimizer(self, cls, **options):
        return "adam"


class HalfAState(NoOptimizer):
    def full_state_dict(self):
        return {"embedding.weight": self.module.embedding.weight}


TOLD = {
    "raises": (COLLECTIVES, raises_on_rank_1, "rank 1 raised KeyError: 'my mistake', at test_contract.py:"),
    "exits": (COLLECTIVES, exits_on_rank_1, "rank 1 raised SystemExit: 3, at test_contract.py:"),
    "leaves": (COLLECTIVES, leaves_on_rank_1, "rank 1 of 2 exited with status 4 before the function returned"),
    "dies": (COLLECTIVES, dies_on_rank_1, "rank 1 of 2 was killed by SIGSEGV (signal 11)"),
    "another shape": (COLLECTIVES, reshapes, "left a tensor of shape (2, 2), it was (4,)"),
    "no group": (COLLECTIVES, lambda tensor: dist.all_reduce(tensor), "takes 1 positional argument but 2 were given"),
    "no module": (DATA_PARALLEL, lambda module, group=None: None, "returned NoneType, expected a module to call"),
    "no optimizer": (ZERO, NoOptimizer, "'NoOptimizer' object has no attribute 'optimizer'"),
    "not an optimizer": (
        ZERO,
        NotAnOptimizer,
        ".optimizer(…) returned str, expected a torch optimizer with its .state",
    ),
    "half a state": (ZERO_3, HalfAState, "full_state_dict() has no 'gain'; it has 'embedding.weight'"),
    "cannot be sent": (
        COLLECTIVES,
        lambda tensor, group=None, lock=LOCK: lock,
        "cannot be sent to the ranks: TypeError",
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_a_rank_does_wrong_is_told(name):
    contract, impl, message = TOLD[name]
    failure = check(contract, impl).failure
    assert message in failure.message
    assert failure.like is None


def test_a_rank_that_never_arrives_is_named_with_the_collective_that_waits(monkeypatch):
    def waits(tensor, group=None):
        if dist.get_rank() == 1:
            time.sleep(600)
        dist.all_reduce(tensor)

    monkeypatch.setattr(_parallel_ranks, "TIMEOUT_S", 3.0)
    message = check(COLLECTIVES, waits).failure.message
    assert "2 of 2 ranks had not finished after 3 s; rank 1 is behind" in message
    assert "rank 0 is in its 1st collective, all_reduce of float32 (4,)" in message
    assert "rank 1 has called no collective" in message


# --- a student's file -------------------------------------------------------------------------------------------------

MINE = """
    import torch.distributed as dist
    from torch import nn
    from neighbour import mean

    class MyDDP(nn.Module):
        def __init__(self, module, group=None):
            super().__init__()
            print("noise", flush=True)
            self.module, self.group = module, group
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), group_src=0, group=group)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self.average)

        def forward(self, *args):
            return self.module(*args)

        def average(self, parameter):
            mean(parameter.grad, self.group)
"""
NEIGHBOUR = """
    import torch.distributed as dist

    def mean(tensor, group):
        dist.all_reduce(tensor, group=group)
        tensor /= dist.get_world_size(group)
"""


def judge(folder, mine=MINE, neighbour=NEIGHBOUR):
    (folder / "mine.py").write_text(textwrap.dedent(mine))
    (folder / "neighbour.py").write_text(textwrap.dedent(neighbour))
    return check_isolated("parallel.data_parallel", f"{folder / 'mine.py'}:MyDDP", limit_s=120.0)


def test_a_file_gets_its_hint(tmp_path):
    verdict = judge(tmp_path, neighbour=NEIGHBOUR.replace("/=", "*= 1 or"))
    assert verdict.failure.case == {"n": 2}
    assert verdict.failure.like == "sum"
    assert "divide by the number of ranks" in str(verdict)
    assert "inputs  ranks 2, members 2 items, weights (2, 135) float64" in str(verdict)


def test_a_line_of_the_file_is_named(tmp_path):
    verdict = judge(tmp_path, mine=MINE.replace("self.module(*args)", "self.modul(*args)"))
    assert " raised AttributeError: 'MyDDP' object has no attribute 'modul'" in verdict.failure.message
    assert "at mine.py:18 in forward: `return self.modul(*args)`" in verdict.failure.message
