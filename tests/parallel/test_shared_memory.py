"""SharedMemory: the bits of a plain reduction in rank order, on every rank; or an error on every rank."""

import errno
import functools
import gc
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numba
import psutil
import pytest
import torch
import torch.distributed as dist

from mlsys.loading import import_file
from mlsys.parallel import _atomics, launch
from mlsys.parallel._segment import _make
from mlsys.parallel.shared_memory import SMALL_BYTES, DifferentCallsError, SharedMemory

REDUCED = {
    torch.float32: ("sum", "mean", "max", "min", "product"),
    torch.float64: ("sum", "mean", "max", "min", "product"),
    torch.float16: ("sum", "mean", "max", "min", "product"),
    torch.bfloat16: ("sum", "mean", "max", "min", "product"),
    torch.uint8: ("sum", "max", "min", "product"),
    torch.int8: ("sum", "max", "min", "product"),
    torch.int16: ("sum", "max", "min", "product"),
    torch.int32: ("sum", "max", "min", "product"),
    torch.int64: ("sum", "max", "min", "product"),
    torch.bool: ("sum", "max", "min", "product"),
    torch.complex64: ("sum", "mean", "product"),
    torch.complex128: ("sum", "mean", "product"),
}
MOVED = (*REDUCED, torch.float8_e4m3fn, torch.uint16)
SLOT = 4096  # small, so that short vectors need many segments
FUNCTIONS = {"sum": torch.add, "mean": torch.add, "max": torch.maximum, "min": torch.minimum, "product": torch.mul}


# --- the oracle: what every rank has is a function of a seed, so each rank can say what all of them should get --------


def values(seed, rank, count, dtype):
    """`count` numbers of `dtype`: those of `rank`."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_complex:
        return torch.randn(count, dtype=torch.complex128, generator=generator).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 256, (count,), generator=generator).to(torch.uint8).to(dtype)


def reduced(parts, op):
    """The parts combined in rank order: 16 bits in float32, rounded once."""
    dtype = parts[0].dtype
    wide = [part.float() if dtype in (torch.float16, torch.bfloat16) else part for part in parts]
    total = functools.reduce(FUNCTIONS[op], wide)
    return (total / len(parts) if op == "mean" else total).to(dtype)


def same(a, b):
    """Bit for bit (NaNs, which products of 16-bit numbers can give, included)."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- the operations against it, each a function from a memory to the cases that went wrong ----------------------------


def all_reduce(memory):
    wrong = []
    most = SLOT // 4
    borders = [0, 1, 2, 15, 17, most - 1, most, most + 1, 2 * most, 2 * most + 1, 3 * most - 5, 7 * most + 3]
    cases = [(torch.float32, op, size) for op in ("sum", "max") for size in borders]
    cases += [(dtype, op, size) for dtype, ops in REDUCED.items() for op in ops for size in (3, 333, 5001)]
    for seed, (dtype, op, size) in enumerate(cases):
        inputs = [values(seed, rank, size, dtype) for rank in range(memory.size)]
        tensor = inputs[memory.rank].clone()
        memory.all_reduce(tensor, op)
        if not same(tensor, reduced(inputs, op)):
            wrong.append((dtype, op, size))
    return wrong


def all_reduce_around_the_small_size(memory):
    wrong = []
    with SharedMemory(memory.group) as large:
        for size in [SMALL_BYTES // 4 // memory.size + extra for extra in (-1, 0, 1)]:
            inputs = [values(size, rank, size, torch.float32) for rank in range(memory.size)]
            tensor = inputs[memory.rank].clone().view(1, size, 1)
            large.all_reduce(tensor)
            if not same(tensor.view(-1), reduced(inputs, "sum")):
                wrong.append(size)
    return wrong


def all_sizes(n):
    """The lengths of the parts of n ranks: equal, uneven, empty, and longer than a slot."""
    yield from ([0] * n, [1] * n, [7] * n, [1500] * n)
    yield [3 * rank for rank in range(n)]
    yield [4100 if rank == n - 1 else 0 for rank in range(n)]
    yield [(613 * (rank + 1)) % 2000 for rank in range(n)]


def reduce_scatter(memory):
    wrong = []
    cases = [(torch.float32, "sum", sizes) for sizes in all_sizes(memory.size)]
    uneven = [rank * 700 + 5 for rank in range(memory.size)]
    cases += [(dtype, op, uneven) for dtype, ops in REDUCED.items() for op in ops]
    for seed, (dtype, op, sizes) in enumerate(cases):
        start, size = sum(sizes[: memory.rank]), sizes[memory.rank]
        inputs = [values(seed, rank, sum(sizes), dtype) for rank in range(memory.size)]
        expected = reduced([part[start : start + size] for part in inputs], op)
        own = inputs[memory.rank].clone()
        output = torch.zeros(size, dtype=dtype)
        even = len(set(sizes)) == 1
        memory.reduce_scatter(output, own, op, None if even else sizes)
        untouched = same(own, inputs[memory.rank])
        inside = own[start : start + size]
        memory.reduce_scatter(inside, own, op, sizes)
        if not (same(output, expected) and same(inside, expected) and untouched):
            wrong.append((dtype, op, sizes))
    return wrong


def all_gather(memory):
    wrong = []
    cases = [(torch.float32, sizes) for sizes in all_sizes(memory.size)]
    cases += [(dtype, [rank * 1900 + 5 for rank in range(memory.size)]) for dtype in MOVED]
    for seed, (dtype, sizes) in enumerate(cases):
        parts = [values(seed, rank, size, dtype) for rank, size in enumerate(sizes)]
        expected = torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)
        output, inside = torch.zeros_like(expected), torch.zeros_like(expected)
        even = len(set(sizes)) == 1
        memory.all_gather(output, parts[memory.rank], None if even else sizes)
        start = sum(sizes[: memory.rank])
        own = inside[start : start + sizes[memory.rank]]
        own.copy_(parts[memory.rank])
        memory.all_gather(inside, own, sizes)
        if not (same(output, expected) and same(inside, expected)):
            wrong.append((dtype, sizes))
    return wrong


def broadcast(memory):
    wrong = []
    for dtype in MOVED:
        for src in range(memory.size):
            for size in (0, 1, 4095, 4096, 4097, 9001):
                expected = values(size, src, size, dtype)
                tensor = values(size, memory.rank, size, dtype)
                memory.broadcast(tensor, src)
                if not same(tensor, expected):
                    wrong.append((dtype, src, size))
    return wrong


def all_to_all(memory):
    wrong = []
    n, own = memory.size, memory.rank
    for seed, dtype in enumerate(MOVED):
        for scale in (0, 1, 40, 900):
            sizes = [[scale * ((3 * i + 5 * j) % 4) for j in range(n)] for i in range(n)]  # i sends j so many
            parts = [[values(seed + i * n + j, i, sizes[i][j], dtype) for j in range(n)] for i in range(n)]
            sends, expected = flat(parts[own], dtype), flat([parts[i][own] for i in range(n)], dtype)
            output = torch.zeros_like(expected)
            memory.all_to_all(output, sends, [sizes[i][own] for i in range(n)], sizes[own])
            if not same(output, expected):
                wrong.append((dtype, scale))
        rows = torch.arange(n * 3).to(dtype) if dtype != torch.bool else torch.ones(n * 3, dtype=dtype)
        output = torch.zeros_like(rows)
        memory.all_to_all(output, rows)
        if not same(output, flat([rows[own * 3 : own * 3 + 3]] * n, dtype)):
            wrong.append((dtype, "even"))
    return wrong


def flat(parts, dtype):
    return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)


def mixed(memory):
    """Many calls of all kinds in a row: no call may see what another left in the buffers, or be overtaken by it."""
    wrong = []
    choose = random.Random(7)
    n, own = memory.size, memory.rank
    for seed in range(250):
        kind = choose.choice(("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier"))
        size = choose.choice((1, 5, 300, 1024, 1025, 3000))
        inputs = [values(seed, rank, n * size, torch.float32) for rank in range(n)]
        parts = [part.view(n, size) for part in inputs]
        tensor, output = inputs[own].clone(), torch.zeros(n, size)
        if kind == "barrier":
            memory.barrier()
            continue
        if kind == "all_reduce":
            memory.all_reduce(tensor)
            got, expected = tensor, reduced(inputs, "sum")
        elif kind == "reduce_scatter":
            memory.reduce_scatter(output[0], tensor)
            got, expected = output[0], reduced([part[own] for part in parts], "sum")
        elif kind == "all_gather":
            memory.all_gather(output, parts[own][0])
            got, expected = output.view(-1), torch.cat([part[0] for part in parts])
        elif kind == "broadcast":
            src = choose.randrange(n)
            memory.broadcast(tensor, src)
            got, expected = tensor, inputs[src]
        else:
            memory.all_to_all(output, tensor)
            got, expected = output.view(-1), torch.cat([part[own] for part in parts])
        if not same(got, expected):
            wrong.append((seed, kind, size))
    return wrong


def two_at_once(memory):
    """Calls of two objects, one inside the other in time, from the main thread and from a worker."""
    wrong = []
    with SharedMemory(memory.group, slot_bytes=SLOT) as other:
        for size in (1, 5000):
            inputs = [values(size, rank, size, torch.float32) for rank in range(memory.size)]
            a, b = inputs[memory.rank].clone(), inputs[memory.rank].clone()
            worker = threading.Thread(target=other.all_reduce, args=(a, "max"))
            worker.start()
            memory.all_reduce(b)
            worker.join()
            if not (same(a, reduced(inputs, "max")) and same(b, reduced(inputs, "sum"))):
                wrong.append(size)
    return wrong


CHECKS = (
    all_reduce,
    all_reduce_around_the_small_size,
    reduce_scatter,
    all_gather,
    broadcast,
    all_to_all,
    mixed,
    two_at_once,
)


def check_everything():
    """By size of the group and by name, what each check found wrong on this rank. Groups are the first n of 5 ranks."""
    found = {}
    for n in range(1, 6):
        group = dist.new_group(list(range(n)))
        if dist.get_rank() < n:
            with SharedMemory(group, slot_bytes=SLOT) as memory:
                for check in CHECKS:
                    found[n, check.__name__] = check(memory)
    return found


@functools.cache
def findings():
    return launch(check_everything, 5)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_against_the_oracle(n, name):
    assert [found[n, name] for found in findings()[:n]] == [[]] * n


def test_a_subgroup_is_taken_by_its_own_ranks():
    def body():
        group = dist.new_group([2, 1])
        if dist.get_rank() == 0:
            with pytest.raises(ValueError, match="not a rank"):
                SharedMemory(group)
            return None
        with SharedMemory(group) as memory:
            tensor = torch.tensor([float(dist.get_rank())])
            memory.broadcast(tensor, src=dist.get_group_rank(group, 2))
            return memory.size, tensor.item()

    assert launch(body, 3) == [None, (2, 2.0), (2, 2.0)]


def test_gradients_and_shapes_do_not_matter():
    def body():
        weight = torch.nn.Parameter(torch.full((2, 3), float(dist.get_rank())))
        scalar = torch.tensor(float(dist.get_rank()))
        with SharedMemory() as memory:
            memory.all_reduce(weight, "mean")
            memory.all_reduce(scalar)
        return weight.detach().tolist(), weight.requires_grad, scalar.item()

    assert launch(body, 2) == [([[0.5] * 3] * 2, True, 1.0)] * 2


def test_sixteen_bits_are_rounded_once():
    def body():
        one, least = 1.0, 2.0**-9  # bfloat16 has 8 bits: 1 + 2⁻⁹ rounds to 1, 1 + 2 · 2⁻⁹ + 2⁻⁹ does not
        with SharedMemory() as memory:
            tensor = torch.tensor([one if dist.get_rank() == 0 else least], dtype=torch.bfloat16)
            memory.all_reduce(tensor)
            large = torch.tensor([60000.0], dtype=torch.float16)
            memory.all_reduce(large, "mean")  # whose sum float16 cannot hold
            return tensor.item(), large.item()

    assert launch(body, 4) == [(1 + 2.0**-7, 60000.0)] * 4


# --- calls that do not fit each other ---------------------------------------------------------------------------------


def f32(count):
    return torch.zeros(count)


DIFFERENT = {
    "operation": (
        lambda m: m.all_reduce(f32(10)),
        lambda m: m.broadcast(f32(10), 1),
        "rank 0 calls all_reduce of 10 float32, op='sum'; rank 1 calls broadcast of 10 float32, src=1",
    ),
    "size": (
        lambda m: m.all_reduce(f32(10)),
        lambda m: m.all_reduce(f32(100_000)),
        "rank 0 calls all_reduce of 10 float32, op='sum'; rank 1 calls all_reduce of 100000 float32, op='sum'",
    ),
    "dtype": (
        lambda m: m.all_reduce(f32(10)),
        lambda m: m.all_reduce(f32(10).int()),
        "rank 0 calls all_reduce of 10 float32, op='sum'; rank 1 calls all_reduce of 10 int32, op='sum'",
    ),
    "op": (
        lambda m: m.reduce_scatter(f32(5), f32(15), "max"),
        lambda m: m.reduce_scatter(f32(5), f32(15), "min"),
        "op='max'; rank 1 calls reduce_scatter of 15 float32, op='min'",
    ),
    "source": (
        lambda m: m.broadcast(f32(10), 0),
        lambda m: m.broadcast(f32(10), 2),
        "src=0; rank 1 calls broadcast of 10 float32, src=2",
    ),
    "sizes": (
        lambda m: m.all_gather(f32(6), f32(2), [2, 2, 2]),
        lambda m: m.all_gather(f32(6), f32(2), [1, 2, 3]),
        "rank 0 calls all_gather of 6 float32; rank 1 calls the same with other sizes",
    ),
    "barrier": (
        lambda m: m.barrier(),
        lambda m: m.all_reduce(f32(0)),
        "rank 0 calls barrier; rank 1 calls all_reduce of 0 float32, op='sum'",
    ),
    "expected": (
        lambda m: m.all_to_all(f32(6), f32(6), [2, 2, 2], [2, 2, 2]),
        lambda m: m.all_to_all(f32(7), f32(6), [3, 2, 2], [2, 2, 2]),
        "rank 0 sends 2 elements to rank 1, which expects 3",
    ),
    "refused": (
        lambda m: m.all_reduce(f32(3)),
        lambda m: m.all_reduce(torch.zeros(3, 2)[:, 0]),
        "rank 0 calls all_reduce of 3 float32, op='sum'; rank 1 calls all_reduce with arguments that it refused",
    ),
}


@functools.cache
def differences():
    def body():
        said = {}
        with SharedMemory(slot_bytes=SLOT, timeout=30) as memory:
            for name, (usual, other, _) in DIFFERENT.items():
                try:
                    (other if memory.rank == 1 else usual)(memory)
                    said[name] = "nothing"
                except ValueError as error:
                    tensor = torch.full((5000,), float(memory.rank))
                    memory.all_reduce(tensor)  # which must work as if nothing had been
                    said[name] = f"{type(error).__name__}: {error}; then {set(tensor.tolist())}"
        return said

    return launch(body, 3)


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_call_different_things_all_get_an_error(name):
    for rank, said in enumerate(differences()):
        if name == "refused" and rank == 1:
            assert "ValueError: tensor of shape (3,) is not contiguous" in said[name]
        else:
            assert DifferentCallsError.__name__ in said[name]
            assert DIFFERENT[name][2] in said[name]
        assert said[name].endswith("then {3.0}")


def test_different_calls_write_nothing():
    def body():
        with SharedMemory(slot_bytes=SLOT) as memory:
            tensor = torch.full((3000 + memory.rank,), 7.0)
            with pytest.raises(DifferentCallsError, match="nothing was written"):
                memory.all_reduce(tensor)
            return set(tensor.tolist())

    assert launch(body, 2) == [{7.0}] * 2


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to do without them one day
        return torch.quantize_per_tensor(f32(4), 0.1, 0, torch.qint8)


BAD = {
    "type": (lambda m: m.all_reduce([1.0]), TypeError, "tensor must be a tensor, not list"),
    "quantized": (lambda m: m.broadcast(quantized()), ValueError, r"pass tensor\.int_repr\(\)"),
    "inference": (lambda m: m.all_reduce(torch.inference_mode()(torch.zeros)(3)), ValueError, "torch.inference_mode"),
    "device": (lambda m: m.all_reduce(torch.zeros(2, device="meta")), ValueError, "tensor is on meta.*copy it there"),
    "expanded": (lambda m: m.all_reduce(torch.zeros(1).expand(4)), ValueError, r"pass tensor.contiguous\(\)"),
    "sparse": (lambda m: m.all_reduce(torch.zeros(2).to_sparse()), ValueError, "not contiguous"),
    "conjugate": (lambda m: m.broadcast(torch.zeros(2, dtype=torch.complex64).conj()), ValueError, "resolve_conj"),
    "op": (lambda m: m.all_reduce(f32(2), "average"), ValueError, "op='average' is unknown: take one of sum, mean"),
    "mean of integers": (lambda m: m.all_reduce(f32(2).int(), "mean"), TypeError, "no mean of torch.int32"),
    "order of complex": (lambda m: m.all_reduce(f32(2).cfloat(), "max"), TypeError, "no max of torch.complex64"),
    "no arithmetic": (lambda m: m.all_reduce(torch.zeros(2, dtype=torch.uint16)), TypeError, "no sum of torch.uint16"),
    "src": (lambda m: m.broadcast(f32(2), 2), ValueError, "src=2 is not a rank of this group: take 0 to 1"),
    "uneven": (lambda m: m.reduce_scatter(f32(2), f32(5)), ValueError, "5 elements, which 2 ranks cannot share"),
    "part": (lambda m: m.all_gather(f32(6), f32(2)), ValueError, "input has 2 elements, and the part of rank . is 3"),
    "sum of sizes": (lambda m: m.all_gather(f32(6), f32(2), [2, 3]), ValueError, r"\[2, 3\] must be 2.*its 6 elements"),
    "negative": (lambda m: m.all_gather(f32(6), f32(2), [8, -2]), ValueError, "none negative"),
    "number of sizes": (lambda m: m.all_gather(f32(6), f32(2), [2, 2, 2]), ValueError, "must be 2, one a rank"),
    "dtypes": (
        lambda m: m.all_gather(f32(4), f32(2).double()),
        TypeError,
        "output is torch.float32 and input torch.fl",
    ),
    "dtypes of all_to_all": (lambda m: m.all_to_all(f32(4).int(), f32(4)), TypeError, "make them the same"),
    "shared": (lambda m: (lambda t: m.all_to_all(t, t))(f32(4)), ValueError, "share memory: give all_to_all an output"),
    "misplaced": (lambda m: (lambda t: m.all_gather(t, t[1:3]))(f32(4)), ValueError, "lies in output, but not where"),
}


@functools.cache
def refusals():
    def body():
        said = {}
        with SharedMemory(timeout=30) as memory:
            for name, (call, _, _) in BAD.items():
                try:
                    call(memory)
                except Exception as error:
                    said[name] = type(error).__name__, str(error)
            memory.barrier()
        return said

    return launch(body, 2)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_with_the_remedy(name):
    for said in refusals():
        kind, text = said[name]
        assert kind == BAD[name][1].__name__
        with pytest.raises(ValueError, match=BAD[name][2]):
            raise ValueError(text)


@pytest.mark.parametrize(("options", "match"), [({"slot_bytes": 5000}, "multiple of 4096"), ({"timeout": 0}, "0 sec")])
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SharedMemory(**options)


# --- ranks that do not come -------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_come_is_named_and_hears_of_it():
    def body():
        memory = SharedMemory(timeout=60)
        memory.all_reduce(torch.zeros(3))
        memory._segment.timeout = 0.2 if memory.rank != 1 else 60
        said = []
        if memory.rank == 1:
            dist.barrier()  # the others have given up
        for _ in range(2 if memory.rank != 1 else 3):  # of rank 1 the first goes well: the others had arrived
            try:
                memory.broadcast(torch.zeros(2), 0)
            except (TimeoutError, RuntimeError) as error:
                said.append(f"{type(error).__name__}: {error}")
        if memory.rank != 1:
            dist.barrier()
        memory.close()
        return said

    zero, one, two = launch(body, 3)
    late = "rank 1 has not come; it was last seen in call 1, all_reduce of 3 float32, op='sum'"
    for rank, said in ((0, zero), (2, two)):
        assert said[0].startswith(f"TimeoutError: broadcast of 2 float32, src=0 (call 2), rank {rank}: waited")
        assert late in said[0] or "gave up" in said[0]  # whoever is first tells the other
    assert late in zero[0] or late in two[0]
    assert one[0].startswith("TimeoutError")
    assert "rank 0 gave up" in one[0]
    for said in (zero, one, two):
        assert (
            said[1] == "RuntimeError: broadcast: this SharedMemory is of no use, TimeoutError ended it: make a new one"
        )


def test_a_rank_that_has_closed_or_left_is_not_waited_for():
    def body():
        memory = SharedMemory(timeout=60)
        memory.barrier()
        if memory.rank == 1:
            memory.close()
            memory.close()  # again, which does nothing
            with pytest.raises(RuntimeError, match="it was closed: make a new one"):
                memory.barrier()
            return None
        with pytest.raises(TimeoutError, match=r"rank 1 has closed its shared memory$"):
            memory.barrier()
        return "told"

    assert launch(body, 2) == ["told", None]


def test_forgotten_memory_counts_as_closed():
    def body():
        memory = SharedMemory(timeout=60)
        memory.barrier()
        if memory.rank == 1:
            del memory
            gc.collect()
            dist.barrier()
            return None
        dist.barrier()
        with pytest.raises(TimeoutError, match="rank 1 has closed its shared memory, or its process has ended"):
            memory.barrier()
        return "told"

    assert launch(body, 2) == ["told", None]


def test_what_interrupts_a_call_breaks_the_object():
    def body():
        memory = SharedMemory(timeout=60)
        if memory.rank == 0:

            def interrupt():
                while not (memory._turn.locked() and memory._segment.epoch):
                    pass
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                memory.barrier()
            with pytest.raises(RuntimeError, match="KeyboardInterrupt ended it"):
                memory.barrier()
            dist.barrier()
        else:
            dist.barrier()
            memory.barrier()  # rank 0 had arrived
            with pytest.raises(TimeoutError, match="rank 0 gave up"):
                memory.barrier()

    launch(body, 2)


def test_a_killed_rank_is_noticed_at_once(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys, time
        import torch, torch.distributed as dist
        from mlsys.parallel.shared_memory import SharedMemory

        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
        memory = SharedMemory(timeout=100)
        tensor = torch.ones(10_000_000)
        memory.all_reduce(tensor)
        if rank == 1:
            cross, left = memory._segment.cross, [5]
            def deadly(call):  # in the middle of the next call
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                cross(call)
            memory._segment.cross = deadly
        start = time.monotonic()
        try:
            memory.all_reduce(tensor)
        except TimeoutError as error:
            print(time.monotonic() - start < 50, error, flush=True)
        os._exit(0)  # without gloo's farewell
    """)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), f"file://{tmp_path}/store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    assert said[0].startswith("True all_reduce of 10000000 float32")
    assert "rank 1 has closed its shared memory, or its process has ended" in said[0]


def test_a_second_thread_is_refused():
    def body():
        memory = SharedMemory(timeout=60)
        if memory.rank == 0:
            worker = threading.Thread(target=memory.barrier)
            worker.start()
            while worker.is_alive() and not memory._turn.locked():
                pass
            with pytest.raises(RuntimeError, match="another thread"):
                memory.barrier()
            dist.barrier()
            worker.join()
        else:
            dist.barrier()
            memory.barrier()
        memory.barrier()
        memory.close()

    launch(body, 2)


# --- the memory itself -----------------------------------------------------------------------------------------------


def test_no_name_and_no_descriptor_is_left():
    def body():
        before = psutil.Process().num_fds()
        memory = SharedMemory()
        links = os.fstat(memory._segment._fd).st_nlink
        memory.close()
        return links, psutil.Process().num_fds() - before

    assert launch(body, 2) == [(0, 0)] * 2


def test_ranks_that_do_not_see_the_same_file_are_named():
    def body():
        if dist.get_rank() == 1:
            from mlsys.parallel import _segment

            _segment.os = type("Elsewhere", (), {**vars(os), "pread": lambda fd, count, at: b"another file"})
        with pytest.raises(ValueError, match=r"rank 1 on .* sees another .*; across hosts") as error:
            SharedMemory()
        with pytest.raises(ValueError, match=r"rank 1 on .* asks for \d+ bytes"):
            SharedMemory(slot_bytes=4096 * (1 + dist.get_rank()))
        return str(error.value)

    zero, one = launch(body, 2)
    assert zero == one


def test_a_full_folder_gives_way_to_another_and_then_to_an_error(tmp_path, monkeypatch):
    tried = []

    def full(fd, start, length):
        tried.append(length)
        if len(tried) != 2:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr("mlsys.parallel._segment.FOLDERS", (str(tmp_path / "none"), str(tmp_path), str(tmp_path)))
    fd, path = _make(4096)
    os.close(fd)
    assert [entry.name for entry in tmp_path.iterdir()] == [Path(path).name]
    Path(path).unlink()
    with pytest.raises(OSError, match=r"no room for 4096 bytes.*smaller slot_bytes"):
        _make(4096)
    assert list(tmp_path.iterdir()) == []
    assert tried == [4096] * 4


# --- the compiled part ------------------------------------------------------------------------------------------------


def test_flags_have_a_memory_order():
    """On x86 a plain store would pass every other test."""
    code = numba.njit("int64(int64, int64)")(_atomics.store.py_func)
    assert re.search(r"store atomic i64 %arg.value, \S+ \S+ release, align 8", only(code))
    code = numba.njit("int64(int64)")(_atomics.load.py_func)
    assert re.search(r"load atomic i64, \S+ \S+ acquire, align 8", only(code))


def only(function):
    (text,) = function.inspect_llvm().values()
    return text


def test_compiles_where_nothing_can_be_cached(monkeypatch):
    def njit(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(*args, **options)

    monkeypatch.setattr(_atomics, "njit", njit)

    def twice(x):
        return 2 * x

    assert _atomics._compiled("int64(int64)")(twice)(21) == 42


def test_waits_for_the_last_flag_only_so_long():
    check_waiting(_atomics)


def test_waits_where_there_is_no_futex(monkeypatch):
    compiled = numba.njit
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "path", sys.path[:])  # import_file adds to it
    monkeypatch.setattr(numba, "njit", lambda *args, cache=False, **options: compiled(*args, **options))
    elsewhere = import_file(Path(_atomics.__file__))
    assert elsewhere.FUTEX == 0
    check_waiting(elsewhere)


def check_waiting(atomics):
    words = torch.zeros(8, dtype=torch.int64)  # two flags, the count and its sleepers, a time
    flags, count, timeout = words.data_ptr(), words.data_ptr() + 2 * 8, words.data_ptr() + 6 * 8
    words[-1] = 1_000_000  # ns
    assert atomics.arrive(flags, 1, count, 2, 3, timeout) == 0
    assert atomics.wait(count, 2, 3, timeout) == 0
    assert atomics.arrive(flags + 8, 1, count, 2, 3, timeout) == 1
    assert atomics.wait(count, 2, 0, timeout) == 1
    assert atomics.arrive(flags + 8, 2, count, 2, 0, timeout) == 0  # one that is ahead
    assert atomics.wait(count, 2, 0, timeout) == 1
    assert words.tolist() == [1, 2, 3, 0, 0, 0, 0, 1_000_000]  # nobody sleeps any more


def test_a_sleeper_is_woken():
    words = torch.zeros(8, dtype=torch.int64)
    flags, count, timeout = words.data_ptr(), words.data_ptr() + 3 * 8, words.data_ptr() + 6 * 8
    words[6] = 60  # s

    def sleep():
        while not _atomics.wait(count, 3, 0, timeout):
            pass

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    while _atomics.load(count + _atomics.SLEEPERS) == 0:
        pass
    words[7] = 1000  # ns, and for these no seconds
    words[6] = 0
    assert _atomics.arrive(flags, 1, count, 3, 0, timeout) == 0  # not the last: nobody is woken
    assert _atomics.arrive(flags + 8, 1, count, 3, 0, timeout) == 0
    assert sleeper.is_alive()
    assert _atomics.arrive(flags + 16, 1, count, 3, 0, timeout) == 1
    sleeper.join(20)
    assert not sleeper.is_alive()
