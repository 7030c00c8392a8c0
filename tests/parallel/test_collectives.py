"""`mlsys.parallel.collectives`: every algorithm computes the same, sends what the formulas say, and finds disagreement.

Values are small whole numbers, so that every sum is exact in every dtype and any order of additions gives the same
bits. A launch runs many cases, and each rank returns what was wrong with them.
"""

import hashlib
import random
import warnings
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mlsys.parallel import _backend, _choose, _measure, _p2p, traffic
from mlsys.parallel import collectives as c
from mlsys.parallel.launcher import launch
from mlsys.perf import collectives as perf

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
BYTES_ONLY = (torch.float8_e4m3fn, torch.uint16)  # torch has no arithmetic for them
OPS = {
    "sum": (*FLOATS, *INTEGERS, *COMPLEX),
    "mean": (*FLOATS, *COMPLEX),
    "max": (*FLOATS, *INTEGERS, torch.bool),
    "min": (*FLOATS, *INTEGERS, torch.bool),
    "product": (*FLOATS, *INTEGERS, *COMPLEX),
}
MOVED = (*FLOATS, *INTEGERS, *COMPLEX, torch.bool, *BYTES_ONLY)


# --- what a rank runs -------------------------------------------------------------------------------------------------


def vector(seed, rank, elements, dtype=torch.float32, top=2):
    """Whole numbers from 1 to `top`, the same wherever they are computed."""
    values = torch.randint(1, top + 1, (elements,), generator=torch.Generator().manual_seed(1000 * seed + rank))
    return values > top // 2 if dtype == torch.bool else values.to(dtype)


def reduced(op, dtype, seed, elements, n):
    """What n ranks' vectors come to, by integer arithmetic."""
    every = torch.stack([vector(seed, rank, elements, torch.int64) for rank in range(n)])
    if dtype == torch.bool:
        every = (every > 1).long()
    if op == "product":
        every = every.prod(0)
        return (every % 256).to(dtype) if dtype == torch.uint8 else every.to(dtype)
    return {"sum": every.sum, "mean": every.double().mean, "max": every.amax, "min": every.amin}[op](0).to(dtype)


def same(got, want):
    """Whether two tensors hold the same values: to one rounding, which a division costs."""
    if got.dtype in BYTES_ONLY:
        return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    if got.dtype.is_floating_point or got.dtype.is_complex:
        return torch.allclose(got, want, rtol=torch.finfo(got.dtype).eps, atol=0)
    return torch.equal(got, want)


def algorithms(operation, n):
    """Those of ours that can serve n ranks."""
    return [name for name in perf.ALGORITHMS[operation] if not (name in ("halving", "doubling") and n & (n - 1))]


@dataclass
class Cases:
    """Runs collectives through `group`, with all of our algorithms or with `names`, and remembers what was wrong."""

    group: object
    n: int
    rank: int
    rng: random.Random
    names: tuple = ()
    check: bool = False
    wrong: list = field(default_factory=list)

    def which(self, operation):
        return self.names or algorithms(operation, self.n)

    def expect(self, got, want, *what):
        if not same(got, want):
            self.wrong.append(" ".join(map(str, what)))

    def parts(self, elements):
        """Equal parts of so many elements, and parts of any size."""
        ends = sorted(self.rng.randint(0, elements * self.n) for _ in range(self.n - 1))
        uneven = [end - start for start, end in zip([0, *ends], [*ends, elements * self.n], strict=True)]
        return (None, [elements] * self.n), (uneven, uneven)

    def reductions(self, elements, dtype, op, seed):
        n, rank, options = self.n, self.rank, {"op": op, "check": self.check}
        for name in self.which("all_reduce"):
            tensor = vector(seed, rank, elements, dtype)
            c.all_reduce(tensor, self.group, algorithm=name, **options)
            self.expect(tensor, reduced(op, dtype, seed, elements, n), "all_reduce", name, op, dtype, elements)
        for sizes, lengths in self.parts(elements):
            whole = vector(seed, rank, elements * n, dtype)
            want = reduced(op, dtype, seed, elements * n, n).split(lengths)[rank]
            for name in self.which("reduce_scatter"):
                given, output = whole.clone(), torch.empty_like(want)
                c.reduce_scatter(output, given, self.group, algorithm=name, sizes=sizes, **options)
                self.expect(output, want, "reduce_scatter", name, op, dtype, lengths)
                self.expect(given, whole, "the input of reduce_scatter", name, op, dtype, lengths)
                place = given.split(lengths)[rank]  # in place: output is this rank's part of the input
                c.reduce_scatter(place, given, self.group, algorithm=name, sizes=sizes, **options)
                self.expect(place, want, "reduce_scatter in place", name, op, dtype, lengths)

    def moves(self, elements, dtype, seed):
        n, rank, options = self.n, self.rank, {"check": self.check}
        root = self.rng.randrange(n)
        for sizes, lengths in self.parts(elements):
            whole = vector(seed, n, elements * n, dtype)
            part = whole.split(lengths)[rank]
            for name in self.which("all_gather"):
                output = torch.zeros_like(whole)
                c.all_gather(output, part.clone(), self.group, algorithm=name, sizes=sizes, **options)
                self.expect(output, whole, "all_gather", name, dtype, lengths)
                output = torch.zeros_like(whole)
                place = output.split(lengths)[rank].copy_(part)
                c.all_gather(output, place, self.group, algorithm=name, sizes=sizes, **options)
                self.expect(output, whole, "all_gather in place", name, dtype, lengths)
            output = torch.zeros_like(whole) if rank == root else None
            c.gather(output, part.clone(), self.group, dst=root, sizes=sizes, **options)
            if output is not None:
                self.expect(output, whole, "gather", dtype, lengths)
            output = torch.zeros_like(part)
            c.scatter(output, whole if rank == root else None, self.group, src=root, sizes=sizes, **options)
            self.expect(output, part, "scatter", dtype, lengths)
        for name in self.which("broadcast"):
            tensor = vector(seed, rank, elements, dtype)
            c.broadcast(tensor, self.group, src=root, algorithm=name, **options)
            self.expect(tensor, vector(seed, root, elements, dtype), "broadcast", name, dtype, elements)
        # Row i of a table says what rank i sends to each: any table will do, if both sides read the same.
        table = [[self.rng.randint(0, elements) for _ in range(n)] for _ in range(n)]
        for sizes in ([[elements] * n] * n, table):
            sent = [vector(seed, source, sum(sizes[source]), dtype).split(sizes[source]) for source in range(n)]
            want = torch.cat([sent[source][rank] for source in range(n)])
            given = {}
            if sizes is table:
                given = {"output_sizes": [sizes[source][rank] for source in range(n)], "input_sizes": sizes[rank]}
            for name in self.which("all_to_all"):
                if name == "bruck" and sizes is table:
                    continue
                output = torch.zeros_like(want)
                c.all_to_all(output, torch.cat(sent[rank]), self.group, algorithm=name, **given, **options)
                self.expect(output, want, "all_to_all", name, dtype, sizes)


def local(n):
    """Ranks of a host, to pretend: the smallest divisor, so that there are several hosts where there can be."""
    return next(k for k in (2, 3, 5, 7, 1) if n % k == 0)


def everything(seed, rounds):
    """All algorithms on some sizes, dtypes and ops; what was wrong."""
    rank, n = dist.get_rank(), dist.get_world_size()
    with c.Communicator(shared_memory=False, links=c.Links(local=local(n))) as group:
        cases = Cases(group, n, rank, random.Random(seed))
        for number in range(rounds):
            # None, one, fewer than ranks, and many elements; uncut, or in segments of a few, so that there are many.
            elements = (0, 1, cases.rng.randint(2, 5), cases.rng.randint(20, 200))[number % 4]
            group.wire.segment = cases.rng.choice((64, _p2p.SEGMENT))
            op = list(OPS)[(number + seed) % len(OPS)]
            cases.reductions(elements, cases.rng.choice(OPS[op]), op, number)
            cases.moves(elements, cases.rng.choice(MOVED), number)
    return cases.wrong


@pytest.mark.parametrize("n", range(1, 9))
def test_every_algorithm_computes_what_it_should(n):
    assert launch(everything, n, n, 5) == [[]] * n


def every_dtype():
    """Each dtype with each op that it has, through ours and through auto."""
    rank, n = dist.get_rank(), dist.get_world_size()
    with c.Communicator(shared_memory=False) as group:
        for names in (("ring",), ("auto",)):
            cases = Cases(group, n, rank, random.Random(0), names)
            for op, dtypes in OPS.items():
                for dtype in dtypes:
                    tensor = vector(1, rank, 9, dtype)
                    c.all_reduce(tensor, group, op=op, algorithm=names[0])
                    cases.expect(tensor, reduced(op, dtype, 1, 9, n), "all_reduce", names, op, dtype)
            for dtype in MOVED:
                output, part = torch.zeros(n * 3, dtype=dtype), vector(1, 9, n * 3, dtype).split(3)[rank]
                c.all_gather(output, part, group, algorithm=names[0])
                cases.expect(output, vector(1, 9, n * 3, dtype), "all_gather", names, dtype)
    return cases.wrong


def test_every_dtype_and_op():
    assert launch(every_dtype, 3) == [[]] * 3


def rounded():
    """A hash of the results of sums that do not come out even, for each algorithm; and the values of two of them."""
    rank, n = dist.get_rank(), dist.get_world_size()
    found = {}
    with c.Communicator(links=c.Links(local=local(n))) as group:
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            for name in (*algorithms("all_reduce", n), "shared_memory"):
                generator = torch.Generator().manual_seed(rank)
                tensor = torch.randn(3001, dtype=torch.float64, generator=generator).to(dtype)
                c.all_reduce(tensor, group, op="mean", algorithm=name, check=False)
                found[name, str(dtype)] = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name in algorithms("all_reduce", n):
            zeros = torch.tensor([0.0 if rank % 2 else -0.0])
            c.all_reduce(zeros, group, op="max", algorithm=name, check=False)
            found[name, "zero"] = bool(zeros.signbit())
    return found


@pytest.mark.parametrize("n", [4, 5])
def test_all_ranks_get_the_same_bits(n):
    first, *others = launch(rounded, n)
    assert others == [first] * (n - 1)
    assert len({found for (_, dtype), found in first.items() if dtype == "torch.float32"}) > 1  # so it could differ


# --- what is sent -----------------------------------------------------------------------------------------------------

ELEMENTS = 1680  # divided by all numbers up to 8 and, twice over, by what hosts and folds make of them
POST, SEND = _p2p.Wire.post, _p2p.Exchange.send


def sent():
    """For each operation and algorithm: how many messages this rank posted after one another, and bytes it sent."""
    n, found, posts = dist.get_world_size(), {}, []

    def post(wire, sends, receives):
        size = sum(tensor.numel() * tensor.element_size() for tensor, _ in sends)
        if any(tensor.numel() for tensor, _ in (*sends, *receives)):
            posts.append(size)
        return POST(wire, sends, receives)

    def send(exchange, tensor, peer):  # each with one that is expected
        posts.append(tensor.numel() * tensor.element_size())
        SEND(exchange, tensor, peer)

    tensor, part, other = torch.zeros(ELEMENTS), torch.zeros(ELEMENTS // n), torch.zeros(ELEMENTS)
    with c.Communicator(shared_memory=False, links=c.Links(local=local(n))) as group:
        calls = {
            "all_reduce": lambda name: c.all_reduce(tensor, group, algorithm=name, check=False),
            "reduce_scatter": lambda name: c.reduce_scatter(part, tensor, group, algorithm=name, check=False),
            "all_gather": lambda name: c.all_gather(tensor, part, group, algorithm=name, check=False),
            "all_to_all": lambda name: c.all_to_all(other, tensor, group, algorithm=name, check=False),
            "broadcast": lambda name: c.broadcast(tensor, group, algorithm=name, check=False),
        }
        with mock.patch.object(_p2p.Wire, "post", post), mock.patch.object(_p2p.Exchange, "send", send):
            for operation, call in calls.items():
                for name in algorithms(operation, n):
                    posts.clear()
                    call(name)
                    found[operation, name] = len(posts), sum(posts)
    return found


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
def test_steps_and_bytes_are_those_of_the_formulas(n):
    ranks = launch(sent, n)
    links = c.Links()
    for operation, name in ranks[0]:
        options = {"hierarchical": {"local": local(n)}, "chain": {}}.get(name, {})
        if name == "chain":
            options = {"segments": perf.chain_segments(n, ELEMENTS * 4, links.alpha, links.beta)}
        cost = perf.cost(operation, name, n, ELEMENTS * 4, **options)
        steps = max(found[operation, name][0] for found in ranks)
        nbytes = max(found[operation, name][1] for found in ranks)
        assert (operation, name, nbytes) == (operation, name, cost.bytes_per_rank)
        # Of a chain every rank has its own steps, the path has them all; in scatter_all_gather the root is not last.
        if name != "chain":
            assert (operation, name, steps) == (operation, name, cost.steps)


def segments(length):
    """The messages of a ring that cuts vectors into segments of 1000 bytes."""
    posts = []

    def send(exchange, tensor, peer):
        posts.append(tensor.numel() * tensor.element_size())
        SEND(exchange, tensor, peer)

    with c.Communicator(shared_memory=False, links=c.Links()) as group:
        group.wire.segment = 1000
        with mock.patch.object(_p2p.Exchange, "send", send):
            c.all_reduce(torch.zeros(length), group, algorithm="ring", check=False)
    return max(posts), sum(posts)


def test_long_vectors_are_cut_into_segments_of_as_many_bytes():
    for longest, total in launch(segments, 2, 10_000):
        assert longest <= 1000
        assert total == perf.cost("all_reduce", "ring", 2, 40_000).bytes_per_rank


# --- what a group is --------------------------------------------------------------------------------------------------


def through_each():
    """The same calls, checked, through a plain group, a communicator, and one with shared memory."""
    rank, n, wrong, chosen = dist.get_rank(), dist.get_world_size(), [], {}
    with c.Communicator() as shared, c.Communicator(shared_memory=False) as messages:
        for kind, group in {"plain": None, "shared": shared, "messages": messages}.items():
            cases = Cases(group, n, rank, random.Random(0), ("auto",), check=True)
            if group is shared:
                cases.names = ("auto", "shared_memory")
            for elements, dtype in ((3, torch.bfloat16), (20_000, torch.float32)):
                cases.reductions(elements, dtype, "mean", 1)
                cases.moves(elements, dtype, 1)
            wrong += cases.wrong
            with traffic.ledger() as book:
                c.all_reduce(torch.ones(1000), group)
                c.reduce_scatter(torch.ones(1000), torch.ones(1000 * n), group)
            chosen[kind] = {row.operation: row.algorithm for row in book.rows}
            c.barrier(group)
        choice = messages.choose("all_reduce", 4000)
        assert messages.choose("all_reduce", 4000) is choice
    return wrong, (chosen, choice, messages.links)


def test_plain_groups_communicators_and_shared_memory_compute_the_same():
    results = launch(through_each, 3)
    assert [wrong for wrong, _ in results] == [[]] * 3
    first, *others = [rest for _, rest in results]
    assert others == [first] * 2  # all ranks go by the same measurements
    chosen, choice, _ = first
    assert chosen["plain"] == {"all_reduce": "backend", "reduce_scatter": "ring"}
    assert chosen["messages"]["all_reduce"] in (*perf.ALGORITHMS["all_reduce"], "backend")
    assert str(choice).startswith("all_reduce of 4000 B over 3 ranks: ")
    assert choice.measured == {"backend"}


def within_subgroup():
    world = dist.get_rank()
    group = dist.new_group([1, 3])
    if world not in (1, 3):
        return None
    with c.Communicator(group) as communicator:
        wrong = []
        for there in (group, communicator):
            cases = Cases(there, 2, communicator.rank, random.Random(1), ("auto",), wrong=wrong)
            cases.reductions(50, torch.float32, "sum", 1)
            cases.moves(50, torch.float32, 1)
        cases = Cases(group, 2, communicator.rank, random.Random(1), wrong=wrong)
        cases.moves(50, torch.float32, 1)
    return communicator.rank, wrong


def test_subgroup_counts_its_own_ranks():
    assert launch(within_subgroup, 4) == [None, (0, []), None, (1, [])]


def outsider():
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="no process group of this rank"):
            c.all_reduce(torch.zeros(1), group)
    with c.Communicator(shared_memory=False, links=c.Links()) as communicator:
        with pytest.raises(TypeError, match="is a Communicator already"):
            c.Communicator(communicator)
        with pytest.raises(ValueError, match=r"shared_memory.*takes a Communicator all of whose ranks are on one host"):
            c.all_reduce(torch.zeros(1), communicator, algorithm="shared_memory")
        with pytest.raises(ValueError, match=r"hierarchical.*Links\(local=…\)"):
            c.all_reduce(torch.zeros(1), algorithm="hierarchical")
    with pytest.raises(RuntimeError, match=r"of no more use.*it was closed"):
        c.all_reduce(torch.zeros(1), communicator)
    with pytest.raises(TypeError, match="links must be"):
        c.Communicator(links=3)


def test_what_is_no_group_is_refused():
    launch(outsider, 2)
    with pytest.raises(RuntimeError, match=r"no process group: run inside mlsys\.parallel\.launch"):
        c.all_reduce(torch.zeros(1))


# --- not waiting ------------------------------------------------------------------------------------------------------


class Timeline:
    def __init__(self):
        self.spans = []

    def add(self, kind, name, start_s, end_s):
        assert start_s <= end_s
        self.spans.append((kind, name))


def asynchronous():
    rank, n, line = dist.get_rank(), dist.get_world_size(), Timeline()
    with c.Communicator(shared_memory=False, links=c.Links(), timeline=line) as group, traffic.ledger() as book:
        # Each reads what the one before it has written: right only if they run in the order of their calls.
        tensor, doubled, whole = torch.ones(30_000), torch.empty(10_000), torch.empty(30_000)
        works = [
            c.all_reduce(tensor, group, algorithm="ring", async_op=True),
            c.all_reduce(tensor, group, algorithm="backend", async_op=True, op="mean"),
            c.all_reduce(tensor, group, algorithm="tree", async_op=True),
            c.reduce_scatter(doubled, tensor, group, async_op=True, algorithm="ring"),
            c.all_gather(whole, doubled, group, async_op=True),
        ]
        c.all_reduce(whole, group, algorithm="ring")  # not asynchronous: the others are done before it
        for work in works:
            work.wait()
            work.wait()
        assert whole.eq(n**4).all()
    assert book.calls == {"all_reduce": 4, "reduce_scatter": 1, "all_gather": 1}
    ring = perf.cost("all_reduce", "ring", n, 120_000).bytes_per_rank
    assert next(row for row in book.rows if row.algorithm == "ring" and row.operation == "all_reduce").sent == 2 * ring
    assert [name.split()[:2] for _, name in line.spans] == [
        ["all_reduce", "ring"],
        ["all_reduce", "backend"],
        ["all_reduce", "tree"],
        ["reduce_scatter", "ring"],
        ["all_gather", "ring"],
        ["all_reduce", "ring"],
    ]
    assert line.spans[0] == ("communication", "all_reduce ring 0.1 MB")

    tensor = torch.full((4,), float(rank))
    for algorithm in ("ring", "backend"):  # without a thread: done already, or the backend's own
        c.all_reduce(tensor, op="mean", algorithm=algorithm, async_op=True).wait()
        assert tensor.eq((n - 1) / 2).all()
    with c.Communicator() as group:
        work = c.all_reduce(torch.zeros(5 + (rank == 1)), group, async_op=True)
        with pytest.raises(ValueError, match="rank 1 calls all_reduce of 6 float32"):
            work.wait()
        c.all_reduce(tensor, group)


def test_asynchronous_collectives_run_in_order_and_raise_when_waited_for():
    launch(asynchronous, 3)


def beginnings():
    """Rank 1 comes to both collectives only when rank 0 has begun both."""
    rank, n, other = dist.get_rank(), dist.get_world_size(), dist.new_group()
    with c.Communicator(shared_memory=False, links=c.Links()) as group:
        one, two = torch.ones(10), torch.ones(10)
        if rank == 1:
            dist.barrier(other)
        works = [c.all_reduce(tensor, group, algorithm="backend", async_op=True, check=False) for tensor in (one, two)]
        if rank == 0:
            dist.barrier(other)
        for work in works:
            work.wait()
    return one.eq(n).all() and two.eq(n).all()


def test_backend_collectives_begin_while_those_before_them_run():
    assert launch(beginnings, 2, timeout=30) == [True, True]


def inference():
    """Tensors of inference mode inside of it, also in the thread; and what was kept from there, outside."""
    rank, n, found = dist.get_rank(), dist.get_world_size(), []
    with c.Communicator() as group:
        for inside in (True, False):
            with torch.inference_mode(inside):
                for name in ("ring", "backend", "shared_memory"):
                    tensor, part = torch.ones(3 * n, dtype=torch.bfloat16), torch.empty(3, dtype=torch.bfloat16)
                    c.reduce_scatter(part, tensor, group, op="mean", algorithm=name)
                    c.all_reduce(tensor, group, algorithm=name, op="sum", async_op=True).wait()
                    found += [part.eq(1).all(), tensor.eq(n).all()]
        with torch.inference_mode():
            made = torch.full((2,), rank)
        whole = torch.empty(2 * n, dtype=made.dtype)
        c.all_gather(whole, made, group)  # what is only read may be of any mode
        found.append(whole.tolist() == [rank for rank in range(n) for _ in range(2)])
    return all(found)


def test_inference_mode():
    assert launch(inference, 3) == [True] * 3


def largest():
    """Per group, op and dtype: NaN where a rank has one; and whether the backend still serves integers and sums."""
    rank, n, wrong = dist.get_rank(), dist.get_world_size(), []
    with c.Communicator(shared_memory=False) as messages:
        for group in (None, messages):
            for op in ("max", "min"):
                for dtype in FLOATS:
                    tensor = torch.ones(2 * n, dtype=dtype)
                    tensor[rank] = float("nan")
                    part = torch.empty(2, dtype=dtype)
                    c.reduce_scatter(part, tensor, group, op=op)
                    c.all_reduce(tensor, group, op=op)
                    want = [index < n for index in range(2 * n)]
                    if tensor.isnan().tolist() != want or part.isnan().tolist() != want[2 * rank : 2 * rank + 2]:
                        wrong.append((group, op, dtype))
    with traffic.ledger() as book:
        c.all_reduce(torch.ones(2), op="max")
        c.all_reduce(torch.ones(2), op="sum")
        c.all_reduce(torch.ones(2, dtype=torch.int32), op="max")
        c.all_reduce(torch.ones(2), op="max", algorithm="backend")  # who asks for it gets it
    return wrong, {row.algorithm: row.calls for row in book.rows}


def test_largest_and_smallest_keep_nan():
    for wrong, calls in launch(largest, 2):
        assert wrong == []
        assert calls.pop("backend") == 3
        assert list(calls.values()) == [1]


# --- ranks that disagree ----------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, and says so
        return torch.nested.nested_tensor([zeros(12)])


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to do without them one day
        return torch.quantize_per_tensor(zeros(12), 0.1, 0, torch.qint8)


def inferred():
    with torch.inference_mode():
        return zeros(12)


# What every rank calls, what rank 1 calls, and what everyone is told.
DIFFERENT = {
    "elements": (
        lambda group: c.all_reduce(zeros(1000), group),
        lambda group: c.all_reduce(zeros(999), group),
        ("999 float32", "1000 float32"),
    ),
    "dtype": (
        lambda group: c.all_reduce(zeros(10), group),
        lambda group: c.all_reduce(zeros(10, dtype=torch.float64), group),
        ("10 float32", "10 float64"),
    ),
    "operation": (
        lambda group: c.all_reduce(zeros(12), group),
        lambda group: c.reduce_scatter(zeros(4), zeros(12), group),
        ("all_reduce", "reduce_scatter"),
    ),
    "barrier": (
        lambda group: c.barrier(group),
        lambda group: c.all_reduce(zeros(12), group),
        ("barrier", "all_reduce"),
    ),
    "op": (
        lambda group: c.all_reduce(zeros(12), group),
        lambda group: c.all_reduce(zeros(12), group, op="max"),
        ("op='sum'", "op='max'"),
    ),
    "src": (
        lambda group: c.broadcast(zeros(12), group),
        lambda group: c.broadcast(zeros(12), group, src=1),
        ("src=0", "src=1"),
    ),
    "sizes": (
        lambda group: c.all_gather(zeros(12), zeros(4 + dist.get_rank() // 2), group, sizes=[4, 3, 5]),
        lambda group: c.all_gather(zeros(12), zeros(4), group, sizes=[4, 4, 4]),
        ("all_gather",),
    ),
    "sizes of an all-to-all": (
        lambda group: c.all_to_all(zeros(6), zeros(6), group, output_sizes=[2] * 3, input_sizes=[2] * 3),
        lambda group: c.all_to_all(zeros(7), zeros(6), group, output_sizes=[2, 2, 3], input_sizes=[2] * 3),
        ("rank 2 sends 2 elements to rank 1", "3"),
    ),
    "algorithm": (
        lambda group: c.all_reduce(zeros(12), group, algorithm="ring"),
        lambda group: c.all_reduce(zeros(12), group, algorithm="tree"),
        ("'ring'", "'tree'"),
    ),
}
# What rank 1 calls while the others call an all-reduce, and what its own error says.
REFUSED = {
    "column": (lambda group: c.all_reduce(zeros(4, 4)[:, 1], group), "tensor of shape (4,) is not contiguous"),
    "expanded": (lambda group: c.all_reduce(zeros(1).expand(12), group), "is not contiguous"),
    "unknown op": (lambda group: c.all_reduce(zeros(12), group, op="avg"), "op='avg' is not known"),
    "arithmetic": (
        lambda group: c.all_reduce(zeros(12, dtype=torch.uint16), group),
        "can be moved but not reduced: convert to",
    ),
    "type": (lambda group: c.all_reduce([1.0], group), "tensor must be a tensor, got list"),
    "nested": (lambda group: c.all_reduce(nested(), group), "tensor is a nested tensor: pass the tensors of"),
    "quantized": (lambda group: c.all_reduce(quantized(), group), "pass tensor.int_repr()"),
    "inference": (lambda group: c.all_reduce(inferred(), group), "made in torch.inference_mode"),
    "error of its own": (
        lambda group: c.all_gather(zeros(12), zeros(4), group, sizes=(4 // zero for zero in (0, 0, 0))),
        "division",
    ),
    "indivisible": (
        lambda group: c.reduce_scatter(zeros(4), zeros(13), group),
        "input has 13 elements, which 3 ranks do not divide: pass sizes=[…]",
    ),
}


def disagree(kind):
    """Everyone's error for each case, and whether the next call was right."""
    rank, told = dist.get_rank(), {}
    options = {"messages": {"shared_memory": False, "links": c.Links()}, "shared": {"links": c.Links()}}
    group = None if kind == "plain" else c.Communicator(**options[kind])
    cases = {name: (usual, odd) for name, (usual, odd, _) in DIFFERENT.items()}
    cases |= {name: (DIFFERENT["operation"][0], odd) for name, (odd, _) in REFUSED.items()}
    for name, (usual, odd) in cases.items():
        try:
            (odd if rank == 1 else usual)(group)
        except Exception as error:
            told[name] = f"{error}"
        for algorithm in ("auto", "ring"):
            after = torch.ones(100)
            c.all_reduce(after, group, algorithm=algorithm)
            assert after.eq(dist.get_world_size()).all()
    return told


@pytest.mark.parametrize("kind", ["plain", "messages", "shared"])
def test_disagreement_is_an_error_on_every_rank_and_nothing_is_broken(kind):
    ranks = launch(disagree, 3, kind)
    for name, (*_, named) in DIFFERENT.items():
        for told in ranks:
            assert all(text in told[name] for text in named), (name, told[name])
    for name, (_, said) in REFUSED.items():
        assert said in ranks[1][name], name
        for told in (ranks[0], ranks[2]):
            assert "rank 1" in told[name]
            assert "refused" in told[name]
            own = {"indivisible": "reduce_scatter", "error of its own": "all_gather"}.get(name, "all_reduce")
            assert own in told[name]
            assert "broadcast" not in told[name]


def alone():
    """Rank 0 calls, rank 1 does not."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    said = None
    if dist.get_rank() == 0:
        for algorithm in ("ring", "ring"):
            try:
                c.all_reduce(torch.zeros(10), group, algorithm=algorithm)
            except (TimeoutError, ConnectionError) as error:
                said = said or error
        assert said is not None
    dist.barrier()
    return type(said), str(said)


def test_a_rank_that_never_comes_is_named():
    (kind, said), _ = launch(alone, 2)
    assert kind is TimeoutError
    assert "rank 0 waited in vain to receive from rank 1" in said


def broken():
    """After a timeout a communicator refuses."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    communicator = c.Communicator(group, shared_memory=False, links=c.Links())
    if dist.get_rank() == 0:
        with pytest.raises(TimeoutError):
            c.all_reduce(torch.zeros(10), communicator, algorithm="ring", check=False)
        with pytest.raises(RuntimeError, match="make a new one: rank 0 waited in vain"):
            c.barrier(communicator)
        communicator.close()
    dist.barrier()


def test_a_communicator_that_timed_out_is_of_no_more_use():
    launch(broken, 2)


def late():
    """Of rank 0, whose backend waits in vain: what plain groups and communicators raise."""
    groups = [dist.new_group(timeout=timedelta(seconds=2)) for _ in range(3)]
    one, two = (c.Communicator(group, shared_memory=False, links=c.Links()) for group in groups[1:])
    said = []
    if dist.get_rank() == 0:
        options = {"algorithm": "backend", "check": False}
        works = [c.all_reduce(torch.zeros(10), group, async_op=True, **options) for group in (groups[0], one)]
        calls = [*(work.wait for work in works), lambda: c.all_reduce(torch.zeros(10), two, **options)]
        for call in calls:
            try:
                call()
            except OSError as error:
                said.append((type(error), str(error)))
        for group in (one, two):
            with pytest.raises(RuntimeError, match="make a new one: rank 0 waited in vain"):
                c.barrier(group)
            with pytest.raises(ValueError, match="op='avg'"):  # refused here, and nobody is told
                c.all_reduce(torch.zeros(10), group, op="avg")
            group.close()
    dist.barrier()
    return said


def test_the_backend_times_out_like_messages():
    said, _ = launch(late, 2)
    assert len(said) == 3
    for kind, text in said:
        assert kind is TimeoutError
        assert text.startswith("rank 0 waited in vain in all_reduce(op='sum') of 10 float32 elements, backend")


def lost():
    """A connection that is gone when a collective of the backend begins."""
    with c.Communicator(shared_memory=False, links=c.Links()) as group:
        with mock.patch.object(_backend, "_begun", side_effect=RuntimeError("Connection closed by peer")):
            for there in (None, group):
                with pytest.raises(ConnectionError, match=r"could not finish all_reduce.*has a rank ended\?"):
                    c.all_reduce(torch.zeros(10), there, algorithm="backend")
        with pytest.raises(RuntimeError, match=r"make a new one: rank . could not finish"):
            c.barrier(group)
        dist.barrier()


def test_the_backend_loses_a_connection_like_messages():
    launch(lost, 2)


def planned():
    """What is said of a rank that does not come to a call by messages, of ranks that also share memory."""
    group = c.Communicator(dist.new_group(timeout=timedelta(seconds=2)), links=c.Links())
    said = None
    c.all_reduce(torch.zeros(7), group, algorithm="ring")
    if dist.get_rank() == 0:
        with pytest.raises(TimeoutError) as caught:
            c.broadcast(torch.zeros(10), group, src=1, algorithm="tree")
        said = str(caught.value)
    dist.barrier()
    return group.shared.timeout, said


def test_shared_memory_waits_as_long_as_its_group_and_names_the_call():
    (seconds, said), _ = launch(planned, 2)
    assert seconds == 2
    assert said.startswith("broadcast of 10 float32, src=1, by messages (call 2), rank 0: waited 2")
    assert "rank 1 has not come; it was last seen in call 1, all_reduce of 7 float32, op='sum', by messages" in said


def patience():
    with c.Communicator(links=c.Links()) as group:
        return group.shared.timeout


def test_without_a_limit_shared_memory_has_none():
    assert min(launch(patience, 2, timeout=None)) > 365 * 24 * 3600


# --- arguments --------------------------------------------------------------------------------------------------------


def arguments():
    """What a group of one rank refuses: enough to see every message."""
    cases = [
        (lambda: c.all_reduce(zeros(3, dtype=torch.int64), op="mean"), "would round: convert to float"),
        (lambda: c.all_reduce(zeros(3, dtype=torch.complex64), op="max"), "complex numbers have no order"),
        (lambda: c.all_reduce(zeros(3, dtype=torch.bool)), "take 'max' for or, 'min' for and"),
        (lambda: c.all_reduce(zeros(3, dtype=torch.float8_e4m3fn)), "can be moved but not reduced"),
        (lambda: c.all_reduce(zeros(3, dtype=torch.complex64).conj()), "resolve_conj"),
        (lambda: c.all_reduce(zeros(3).to_sparse()), "not contiguous"),
        (lambda: c.all_reduce(zeros(3).to("meta")), "is on meta, but this group"),
        (lambda: c.all_reduce(zeros(3), algorithm="rign"), "did you mean 'ring'?"),
        (lambda: c.all_gather(zeros(3), zeros(3), algorithm="tree"), "algorithm='tree' is not known"),
        (lambda: c.all_gather(zeros(4), zeros(3)), "input has 3 elements, but this rank's part has 4"),
        (lambda: c.all_gather(zeros(4), zeros(4), sizes=[2, 2]), "sizes has 2 entries for 1 ranks"),
        (lambda: c.all_gather(zeros(4), zeros(4), sizes=[3]), "add up to 3, but output has 4"),
        (lambda: c.all_gather(zeros(4), zeros(4), sizes=[-4]), "sizes[0] must be at least 0"),
        (lambda: c.all_gather(zeros(4), zeros(4).half()), "output is torch.float32 and input torch.float16"),
        (lambda: c.all_to_all(zeros(4), zeros(4), input_sizes=[4]), "belong together"),
        (lambda: c.all_to_all(zeros(4), zeros(5)), "output has 4 elements, but input has 5"),
        (lambda: c.broadcast(zeros(4), src=1), "src=1, but the group has the ranks 0 to 0"),
        (lambda: c.gather(None, zeros(4)), "output is None on rank 0, which is dst"),
        (lambda: c.gather(zeros(5), zeros(4)), "output has 5 elements, but all parts together has 4"),
        (lambda: c.gather(zeros(3), zeros(4), sizes=[3]), "input has 4 elements, but this rank's part has 3"),
        (lambda: c.gather(zeros(4), zeros(4).half()), "output is torch.float32 and input torch.float16"),
        (lambda: c.scatter(zeros(4), None), "input is None on rank 0, which is src"),
        (lambda: c.scatter(zeros(4), zeros(5)), "input has 5 elements, but all parts together has 4"),
        (lambda: c.scatter(zeros(4), zeros(3), sizes=[3]), "output has 4 elements, but this rank's part has 3"),
        (lambda: c.scatter(zeros(4).half(), zeros(4)), "output is torch.float16 and input torch.float32"),
    ]
    overlapping = zeros(8)
    cases.append((lambda: c.all_to_all(overlapping[:5], overlapping[3:]), "overlap"))
    told = []
    for call, said in cases:
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        told.append((said, str(caught.value)))
    halves = c.all_to_all(overlapping[:4], overlapping[4:])  # side by side is fine
    parameter = torch.nn.Parameter(torch.ones(3))
    assert c.all_reduce(parameter, async_op=True).wait() is None  # a leaf that requires grad is a tensor like others
    return told, halves


def test_arguments_are_refused_with_a_remedy():
    ((told, _),) = launch(arguments, 1)
    assert [said for said, text in told if said not in text] == []


# --- choosing ---------------------------------------------------------------------------------------------------------

LINKS = c.Links(alpha=10e-6, beta=1e-9, gamma=0.1e-9)


@pytest.mark.parametrize("operation", perf.ALGORITHMS)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_without_hosts_or_measurements_the_choice_is_the_formulas(operation, n):
    for nbytes in (0, 100, 10**4, 10**8):
        choice = _choose.choose(operation, n, nbytes, LINKS)
        want = perf.ranking(operation, n, nbytes, 10e-6, 1e-9, gamma=0.1e-9)
        assert dict(choice.ranking) == want
        assert choice.algorithm == next(iter(want))
        assert choice.seconds == want[choice.algorithm]


def test_across_hosts_the_shared_card_counts():
    """Slow cards, fast memory: inside first. One ring would send 7/4 of the vector through a card, this sends 1."""
    links = c.Links(alpha=10e-6, beta=1e-8, local=4, local_alpha=10e-6, local_beta=1e-10)
    choice = _choose.choose("all_reduce", 8, 10**8, links)
    assert choice.algorithm == "hierarchical"
    inside, across = perf.hierarchical_parts(8, 10**8, 4)
    want = inside.seconds(10e-6, 1e-10, links.gamma) + across.seconds(10e-6, 4e-8, links.gamma)
    assert choice.seconds == pytest.approx(want)
    assert choice.ranking["ring"] / choice.seconds == pytest.approx(1.75, rel=0.05)


def test_what_was_measured_counts_for_more_than_what_was_computed():
    ring = perf.cost("all_reduce", "ring", 4, 10**8).seconds(10e-6, 1e-9, 0.1e-9)
    for seconds, algorithm in ((1.1 * ring, "backend"), (1.3 * ring, "ring"), (0.9 * ring, "backend")):
        choice = _choose.choose("all_reduce", 4, 10**8, LINKS, {("all_reduce", "backend"): (0.0, seconds / 10**8)})
        # Halving-doubling sends as many bytes in fewer steps; with four ranks the two are within a thousandth.
        assert choice.algorithm == {"ring": "halving_doubling"}.get(algorithm, algorithm)
        assert "backend" in choice.measured
    lines = {("all_reduce", "backend"): (0.0, 8e-10), ("all_reduce", "shared_memory"): (0.0, 1e-9)}
    assert _choose.choose("all_reduce", 4, 10**8, LINKS, lines).algorithm == "shared_memory"
    lines["all_reduce", "backend"] = (0.0, 1e-12)  # a moment's luck: memory is what decides on one host
    assert _choose.choose("all_reduce", 4, 10**8, LINKS, lines).algorithm == "shared_memory"
    other = _choose.choose("all_gather", 4, 10**8, LINKS, {("all_reduce", "backend"): (0.0, 0.0)})
    assert "backend" not in other.ranking


def test_choice_says_why():
    lines = {("all_reduce", "backend"): (0.0, 1e-9)}
    assert str(_choose.choose("all_reduce", 2, 2 * 2**20, LINKS, lines)) == (
        "all_reduce of 2 MiB over 2 ranks: backend 2.1 ms (measured); behind it ring 2.22 ms, "
        "halving_doubling 2.22 ms, recursive_doubling 2.32 ms, tree 4.42 ms"
    )


def test_links_are_checked():
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        c.Links(alpha=-1)
    with pytest.raises(ValueError, match="local must be at least 1"):
        c.Links(local=0)
    with pytest.raises(ValueError, match="operation='allreduce' is not known; did you mean 'all_reduce'"):
        _choose.choose("allreduce", 2, 10, LINKS)


def test_line_through_two_sizes():
    latency, slope = _measure._line(10e-6 + _measure.SMALL * 1e-9, 10e-6 + _measure.LARGE * 1e-9)
    assert (latency, slope) == (pytest.approx(10e-6), pytest.approx(1e-9))
    assert _measure._line(5.0, 4.0) == (5.0, 0.0)  # noise: the larger one was faster


def test_hosts_are_found_from_what_ranks_say():
    from mlsys.parallel._communicator import _per_host

    assert _per_host([7, 7, 7]) == 3
    assert _per_host([7, 7, 9, 9]) == 2
    assert _per_host([7, 9]) == 1
    assert _per_host([7, 9, 7, 9]) is None  # not host by host
    assert _per_host([7, 7, 9]) is None
    assert _per_host([7, 9, 9]) is None


def test_cuts_cover_parts_in_whole_waves():
    for longest, most in ((0, 10), (1, 10), (10, 10), (11, 10), (25, 10), (31, 10), (7, 0)):
        cut = _p2p.Cut.of(longest, most)
        part = torch.arange(longest)
        assert torch.equal(torch.cat([cut.piece(part, at) for at in range(cut.count)]), part)
        assert cut.step <= max(most, 1)
        assert cut.count % cut.width == 0
    assert Counter(_p2p.even(11, 4)) == {3: 3, 2: 1}
