"""The ledger's bytes are those of the formulas, for torch's collectives, DDP and FSDP2, and for messages one by one."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mlsys.parallel import launch, traffic
from mlsys.parallel._call import Call
from mlsys.parallel.collectives import (
    Communicator,
    Links,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    reduce_scatter,
)
from mlsys.parallel.traffic import ledger
from mlsys.perf import collectives, zero

PART = 120  # numbers of 4 bytes that each rank has


def torch_collectives():
    """Every collective of torch.distributed once: what the book says of each, as (calls, size, sent)."""
    n, rank = dist.get_world_size(), dist.get_rank()
    x, whole = torch.ones(PART), torch.ones(PART * n)
    many = [torch.empty(PART) for _ in range(n)]
    split = [rank + 1] * n  # to each other rank; what comes back are 1, 2, … numbers
    uneven = torch.empty(sum(range(1, n + 1)))
    gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather_function = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    scatter_function = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather(many, x),
        "all_gather_tensor": lambda: gather_tensor(whole, x),
        "reduce_scatter": lambda: dist.reduce_scatter(x, list(whole.chunk(n))),
        "reduce_scatter_tensor": lambda: scatter_tensor(x, whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(PART * n), whole),
        "all_to_all_uneven": lambda: dist.all_to_all_single(
            uneven, torch.ones(sum(split)), [r + 1 for r in range(n)], split
        ),
        "broadcast": lambda: dist.broadcast(x, n - 1),
        "reduce": lambda: dist.reduce(x, n - 1),
        "gather": lambda: dist.gather(x, many if rank == 0 else None),
        "scatter": lambda: dist.scatter(x, many if rank == 0 else None),
        "barrier": dist.barrier,
        "functional_all_reduce": lambda: functional.all_reduce(x, "sum", dist.group.WORLD).wait(),
        "functional_all_gather": lambda: gather_function(x, 0, dist.group.WORLD).wait(),
        "functional_reduce_scatter": lambda: scatter_function(whole, "sum", 0, dist.group.WORLD).wait(),
        "async_all_reduce": lambda: dist.all_reduce(x, async_op=True).wait(),
    }
    seen = {}
    for name, call in calls.items():
        with ledger() as book:
            call()
        seen[name] = [(row.operation, row.algorithm, row.ranks, row.calls, row.size, row.sent) for row in book.rows]
    return seen


def one_step(model, inputs):
    with ledger() as book:
        model(inputs).square().mean().backward()
    model.zero_grad()
    return book


def torch_wrappers():
    """A step of DDP and of FSDP2: bytes by operation, and the numbers of the model."""
    n = dist.get_world_size()
    net = nn.Sequential(*(nn.Linear(12 * n, 12 * n, bias=False) for _ in range(3)))
    inputs = torch.ones(2, 12 * n)
    ddp = DistributedDataParallel(nn.Sequential(*(nn.Linear(12 * n, 12 * n) for _ in range(3))))
    found = {"ddp": [dict(one_step(ddp, inputs).bytes) for _ in range(3)]}
    found["ddp numbers"] = sum(p.numel() for p in ddp.parameters())
    mesh = init_device_mesh("cpu", (n,))
    for layer in net:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(net, mesh=mesh)
    found["fsdp"] = [dict(one_step(net, inputs).bytes) for _ in range(2)]
    found["fsdp numbers"] = 3 * (12 * n) ** 2
    return found


def messages():
    """Lone messages, messages of a collective, headers, notes, and a thread of its own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    if n == 1:
        return None
    x, y = torch.ones(PART), torch.empty(PART)

    def around():
        works = [dist.isend(x, (rank + 1) % n), dist.irecv(y, (rank - 1) % n)]
        for work in works:
            work.wait()

    with ledger() as lone:
        around()
    with ledger() as outer:
        around()
        with ledger() as inner, traffic.collective("all_reduce", "ring", x.nbytes, n):
            around()
            with traffic.uncounted():
                around()
            with traffic.collective("all_gather", "ring", x.nbytes, n):  # a part of the all-reduce
                around()
    with ledger() as worker:
        thread = threading.Thread(target=traffic.carried(around))
        thread.start()
        thread.join()
        untold = threading.Thread(target=around)
        untold.start()
        untold.join()
    with ledger() as noted:
        traffic.note("all_reduce", "shared_memory", 1000, n)
        traffic.note("all_reduce", "shared_memory", 1000, n)
        traffic.note("broadcast", "shared_memory", 600, n, sent=lambda: 123)
        with traffic.collective("all_reduce", "hierarchical", 1000, n):
            traffic.note("reduce_scatter", "shared_memory", 1000, n, sent=7)
    traffic.note("all_reduce", "shared_memory", 1000, n)  # nobody listens
    with traffic.collective("all_reduce", "ring", 1000, n), traffic.uncounted():
        pass
    return [[*book.rows] for book in (lone, inner, outer, worker, noted)], str(noted)


def reading(shared):
    """A mode that counts, in `of`, the bytes that this rank reads of each rank's slots: what operators are given."""

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.of = [0] * shared.size
            slots = shared._segment.slots(torch.uint8)
            self.slots = [(slot.data_ptr(), slot.numel(), rank) for buffer in slots for rank, slot in enumerate(buffer)]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                read = args[1:2]
            elif func is torch.ops.aten.add.out:
                read = args[:2]
            else:
                read = ()
            for tensor in read:
                for start, length, rank in self.slots:
                    if start <= tensor.data_ptr() < start + length:
                        self.of[rank] += tensor.nbytes
            return func(*args, **(kwargs or {}))

    return Reads()


def through_shared_memory():
    """By name of the call: what the book says that this rank sent, and what it read of each rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    if n == 1:
        return {}
    sizes = [50 * r for r in range(n)]  # rank 0 has nothing
    mine, total = torch.ones(sizes[rank]), torch.ones(sum(sizes))
    sends, receives = [10 * rank + r for r in range(n)], [10 * r + rank for r in range(n)]
    found = {}
    with Communicator(links=Links()) as group:
        calls = {
            # One crossing, two, and two in several segments.
            **{
                f"all_reduce {size}": lambda size=size: all_reduce(torch.ones(size), group)
                for size in (0, 1, 1000, 20_001, 700_001)
            },
            "reduce_scatter": lambda: reduce_scatter(torch.empty(300_000), torch.ones(300_000 * n), group),
            "reduce_scatter uneven": lambda: reduce_scatter(mine.clone(), total, group, sizes=sizes),
            "all_gather": lambda: all_gather(torch.empty(300_000 * n), torch.ones(300_000), group),
            "all_gather uneven": lambda: all_gather(total.clone(), mine, group, sizes=sizes),
            "broadcast": lambda: broadcast(torch.ones(300_000), group, src=n - 1),
            "all_to_all": lambda: all_to_all(torch.empty(70 * n), torch.ones(70 * n), group),
            "all_to_all uneven": lambda: all_to_all(
                torch.empty(sum(receives)), torch.ones(sum(sends)), group, output_sizes=receives, input_sizes=sends
            ),
            "barrier": lambda: barrier(group),
        }
        for name, call in calls.items():
            with ledger() as book, reading(group.shared) as reads:
                call()
            (row,) = book.rows
            found[name] = (row.operation, row.algorithm, row.sent, row.counted, reads.of)
    return found


def all_of_it():
    return torch_collectives(), torch_wrappers(), messages(), through_shared_memory()


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request):
    """What n ranks have seen."""
    return launch(all_of_it, request.param, timeout=120.0)


def test_collectives_of_torch(ranks):
    n = len(ranks)
    part, whole = 4 * PART, 4 * PART * n
    for rank, (seen, *_) in enumerate(ranks):
        ring = {
            operation: collectives.cost(operation, collectives.ALGORITHMS[operation][0], n, size).bytes_per_rank
            for operation, size in (
                ("all_reduce", part),
                ("all_gather", whole),
                ("reduce_scatter", whole),
                ("all_to_all", whole),
            )
        }
        children = {1: (0,), 2: (1, 0), 3: (2, 0, 0), 4: (2, 1, 0, 0)}[n][(rank - (n - 1)) % n]  # of a binomial tree
        want = {
            "all_reduce": ("all_reduce", part, ring["all_reduce"]),
            "all_gather": ("all_gather", whole, ring["all_gather"]),
            "all_gather_tensor": ("all_gather", whole, ring["all_gather"]),
            "reduce_scatter": ("reduce_scatter", whole, ring["reduce_scatter"]),
            "reduce_scatter_tensor": ("reduce_scatter", whole, ring["reduce_scatter"]),
            "all_to_all": ("all_to_all", whole, ring["all_to_all"]),
            "all_to_all_uneven": ("all_to_all", 4 * n * (rank + 1), 4 * (n - 1) * (rank + 1)),
            "broadcast": ("broadcast", part, part * children),
            "reduce": ("reduce", part, 0 if rank == n - 1 else part),
            "gather": ("gather", whole, part if rank else 0),
            "scatter": ("scatter", whole, 0 if rank else whole - part),
            "barrier": ("barrier", 0, 0),
            "functional_all_reduce": ("all_reduce", part, ring["all_reduce"]),
            "functional_all_gather": ("all_gather", whole, ring["all_gather"]),
            "functional_reduce_scatter": ("reduce_scatter", whole, ring["reduce_scatter"]),
            "async_all_reduce": ("all_reduce", part, ring["all_reduce"]),
        }
        for name, (operation, size, sent) in want.items():
            assert seen[name] == [(operation, "backend", n, 1, size, pytest.approx(sent, rel=1e-12))], name
        assert set(seen) == set(want)


def test_broadcast_in_all_is_one_vector_for_every_other_rank(ranks):
    n = len(ranks)
    sent = [seen["broadcast"][0][-1] for seen, *_ in ranks]
    assert sum(sent) == 4 * PART * (n - 1)
    assert max(sent) == collectives.cost("broadcast", "tree", n, 4 * PART).bytes_per_rank


def test_ddp_sends_what_stage_0_says(ranks):
    n = len(ranks)
    for _, found, *_ in ranks:
        want = zero.communication(found["ddp numbers"], n, 0, bytes_gradients=4)
        assert [step.get("all_reduce", 0) for step in found["ddp"]] == [pytest.approx(want, rel=1e-12)] * 3
        assert sum(found["ddp"][-1].values()) == pytest.approx(want, rel=1e-12)  # the first steps also set up


def test_fsdp2_sends_what_stage_3_says(ranks):
    n = len(ranks)
    for _, found, *_ in ranks:
        want = zero.communication(found["fsdp numbers"], n, 3, bytes_weights=4, bytes_gradients=4)
        assert sum(found["fsdp"][-1].values()) == pytest.approx(want, rel=1e-12)
        assert found["fsdp"][-1].get("reduce_scatter", 0) == pytest.approx(want / 3, rel=1e-12)


def test_messages_are_counted_where_they_belong(ranks):
    n = len(ranks)
    if n == 1:
        return
    once = 4 * PART
    for _, _, (books, table), _ in ranks:
        lone, inner, outer, worker, noted = books
        assert lone == worker == [traffic.Row("send", "point-to-point", 2, 1, once, once, counted=True)]
        ring = traffic.Row("all_reduce", "ring", n, 1, once, 2 * once, counted=True)
        assert inner == [ring]
        assert outer == [ring, *lone]
        shared = 2 * collectives.cost("all_reduce", "ring", n, 1000).bytes_per_rank
        assert noted == [
            traffic.Row("all_reduce", "shared_memory", n, 2, 2000, pytest.approx(shared), counted=False),
            traffic.Row("broadcast", "shared_memory", n, 1, 600, 123, counted=True),
            traffic.Row("all_reduce", "hierarchical", n, 1, 1000, 7, counted=True),
        ]
        header, _, *lines = table.splitlines()
        assert header.split("  ")[0] == "operation"
        assert [line.split()[:2] for line in lines] == [
            ["all_reduce", "shared_memory"],
            ["broadcast", "shared_memory"],
            ["all_reduce", "hierarchical"],
        ]
        assert "2,000" in lines[0]
        assert lines[0].endswith("computed")


def test_sent_through_shared_memory_is_what_others_read(ranks):
    found = [seen for *_, seen in ranks]
    for name in found[0]:
        for rank, seen in enumerate(found):
            operation, algorithm, sent, counted, _ = seen[name]
            assert (operation, algorithm, counted) == (name.split()[0], "shared_memory", True)
            assert sent == sum(other[name][-1][rank] for r, other in enumerate(found) if r != rank), (name, rank)


def test_sent_through_shared_memory_in_all():
    """As much as a ring's in all, but for the small all-reduce, which every rank sums for itself."""
    for n in range(1, 6):
        for elements in (0, 1, 5, 5000, 100_000, 2_000_003):
            call = Call("all_reduce", torch.bfloat16, elements, None, None, "sum")
            total = sum(traffic.shared_memory_sent(call, rank, n, 1 << 20) for rank in range(n))
            small = n * call.nbytes <= 128 << 10
            assert total == (n if small else 2) * (n - 1) * call.nbytes


def test_book_of_nothing():
    with ledger() as book:
        torch.ones(3).sum()
    assert book.rows == ()
    assert (book.sent, book.calls["all_reduce"], book.bytes["all_reduce"], book.size["send"]) == (0, 0, 0, 0)


def test_operations_are_named_as_in_perf():
    named = {operation for operators in traffic.OPERATIONS.values() for operation, _, _ in operators.values()}
    assert named == {*collectives.ALGORITHMS, "reduce", "gather", "scatter", "send", "barrier"}


def test_table_fits_the_operators_of_this_torch():
    """Every operator that is named exists here or in another supported version, with the argument that is named."""
    known = 0
    for namespace, operators in traffic.OPERATIONS.items():
        for name, (_, argument, _) in operators.items():
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is None:
                continue
            known += 1
            arguments = [a.name for overload in packet.overloads() for a in getattr(packet, overload)._schema.arguments]
            assert not argument or argument in arguments, name
    assert known >= 28
