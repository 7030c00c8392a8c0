"""What students write runs, and is right in any order; what cannot run says why; a kernel that fails harms nothing."""

import ctypes
import math
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mlsys.kernels.cuda import CompileError, KernelError, _build, _nvrtc, _source, check, load, profile, source

FILES = Path(__file__).parent / "files"
INT = torch.int32


@pytest.fixture(scope="module")
def kernels():
    return load(FILES / "runner.cu", includes=[FILES / "include"])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


# --- right ------------------------------------------------------------------------------------------------------------


def test_numbers_arrive_as_the_signature_says(kernels):
    y = zeros(7, dtype=torch.float64)
    kernels["numbers"](1, 7, y, 0.1, 0.1, 2**40, 2**32 - 1, True, -3, 200)
    assert y.tolist() == [ctypes.c_float(0.1).value, 0.1, 2**40, 2**32 - 1, 1, -3, 200]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("grid", "block"), [(7, 33), ((3, 2), (8, 4)), ((2, 3, 2), (4, 3, 2)), ([5], [1])])
def test_every_thread_of_every_block_runs_once(kernels, grid, block, threads):
    size = math.prod(grid if not isinstance(grid, int) else [grid]) * math.prod(
        block if not isinstance(block, int) else [block]
    )
    y = torch.full((size,), -1, dtype=INT)
    kernels["index"](grid, block, y, threads=threads)
    assert y.tolist() == list(range(size))


def test_constants_and_device_variables_have_their_values(kernels):
    y = zeros(4)
    kernels["constants"](1, 4, y)
    assert y.tolist() == [11, 22, 33, 44]


def test_functions_lambdas_and_headers(kernels):
    x, y, z = torch.arange(8.0), zeros(8), zeros(8)
    kernels["functions"](1, 8, x, y)
    torch.testing.assert_close(y, x * x)
    kernels["plain"](1, 8, x, z, 5)
    assert z.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("name", ["in_namespace", "course::in_namespace"])
def test_a_kernel_in_a_namespace(kernels, name):
    y = zeros(4)
    kernels[name](1, 4, y)
    assert y.tolist() == [7] * 4


def test_a_device_variable_is_one_for_all_workers(kernels):
    y = zeros(512, dtype=INT)
    kernels["draw"](16, 32, y, threads=4)
    drawn = sorted(y.tolist())
    assert drawn == list(range(drawn[0], drawn[0] + 512))
    kernels["draw"](16, 32, y, threads=1)
    assert min(y.tolist()) == drawn[-1] + 1  # it keeps its value between launches, as on a GPU


@pytest.mark.parametrize(("name", "dtype"), [("float", torch.float32), ("int", INT), ("double", torch.float64)])
def test_dynamic_shared_memory_of_any_type(kernels, name, dtype):
    x, y = torch.arange(32).to(dtype), zeros(32, dtype=dtype)
    kernels[f"reversed<{name}>"](1, 32, x, y, shared=32 * x.element_size())
    assert torch.equal(y, x.flip(0))


def test_two_arrays_in_dynamic_shared_memory(kernels):
    y = zeros(32)
    kernels["two_arrays"](1, 32, y, 32, shared=256)
    assert torch.equal(y, 3.0 * torch.arange(32).flip(0))


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        ("defaults", torch.float32, 4),
        ("defaults<>", torch.float32, 4),
        ("defaults<6, double>", torch.float64, 6),
        ("by_mode<Mode::multiply>", torch.float32, 2),
    ],
)
def test_template_arguments(kernels, name, dtype, value):
    y = zeros(4, dtype=dtype)
    kernels[name](1, 4, y)
    assert y.tolist() == [value] * 4


def test_unions_structures_and_halves(kernels):
    class Shape(ctypes.Structure):
        _fields_ = (("rows", ctypes.c_int), ("cols", ctypes.c_int), ("scale", ctypes.c_float))

    x = torch.arange(32.0)
    sums, scaled = zeros(8), zeros(32)
    kernels["sums_of_four"](1, 8, x, sums)
    torch.testing.assert_close(sums, x.view(8, 4).sum(1))
    kernels["with_struct"](1, 32, Shape(4, 5, 2.0), x, scaled)
    torch.testing.assert_close(scaled, torch.where(x < 20, 2 * x, 0))
    half, twice = zeros(32, dtype=torch.float16), zeros(32, dtype=torch.bfloat16)
    kernels["halves"](1, 32, x.half(), half, x.bfloat16(), twice)
    torch.testing.assert_close(half.float(), x + 1)
    torch.testing.assert_close(twice.float(), 2 * x)


def test_mathematics(kernels):
    y = zeros(5)
    kernels["mathematics"](1, 1, y)
    assert y.tolist() == [0.5, 5, 0.5, 1, 6]


def test_what_a_kernel_prints_is_printed(kernels, capfd):
    kernels["says"](1, 32, 1.5)
    assert capfd.readouterr().out == "x = 1.500000, 42%\n"


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_right_kernel_is_right_in_any_order(kernels, order, threads):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    y = zeros(6)
    kernels["maximum"](6, 128, x, y, 1000, order=order, threads=threads)
    assert y.tolist() == [x.max().item()] * 6


def test_orders_differ(kernels):
    found = []
    for order in (0, 1, 7):
        y = zeros(128, dtype=INT)
        kernels["order_of_threads"](1, 128, zeros(1, dtype=INT), y, order=order)
        assert sorted(y.tolist()) == list(range(128))
        found.append(y.tolist())
    assert found[0] == list(range(128))
    assert found[1] == found[0][::-1]
    assert found[2] not in found[:2]


def test_checking_and_profiling_leave_the_tensors_as_they_are(kernels):
    y = zeros(1)
    args = (1, 128, torch.arange(1000.0), y, 1000)
    assert check(kernels["maximum"], *args) == []
    assert profile(kernels["maximum"], *args).bytes >= 4000
    assert y.item() == 0
    kernels["maximum"](*args)
    assert y.item() == 999


def test_the_librarys_own_kernels_are_found_by_name():
    assert source("matmul.naive").name == "matmul.naive.cu"
    with pytest.raises(ValueError, match=r"name must be one of .*matmul\.tiled.*, got 'matmul\.nave'"):
        source("matmul.nave")


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_kernel_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is none at .*none\.cu"):
        load(tmp_path / "none.cu")
    path = tmp_path / "host.cu"
    path.write_text("int main() {}\n// __global__ void k() {}\n")
    with pytest.raises(ValueError, match="must be a file with __global__ functions"):
        load(path)
    path.write_text("__global__ void k() {}\nint main() {\n  k<<<1, 32>>>();\n}\n")
    with pytest.raises(ValueError, match=r"host\.cu:3 launches a kernel.*#ifndef MLSYS"):
        load(path)
    path.write_text("__global__ void k() {}\n#ifndef MLSYS\nint main() {\n  k<<<1, 32>>>();\n}\n#endif\n")
    load(path)["k"](1, 1)


def test_a_kernel_that_is_not_there(kernels):
    with pytest.raises(KeyError, match=r"runner\.cu has no kernel 'maximun', it has: .*maximum\(const float \* x"):
        kernels["maximun"]
    with pytest.raises(KeyError, match=r"reversed<class T>.* is a template: ask for an instance, such as reversed<32>"):
        kernels["reversed"]
    assert "maximum" in kernels
    assert len(kernels) == len(list(kernels))


def test_an_error_of_the_compiler_is_shown_with_the_students_line(tmp_path):
    path = tmp_path / "typo.cu"
    path.write_text("__global__ void k(float *x) {\n  x[0] = y;\n}\n")
    with pytest.raises(CompileError, match=r"typo\.cu:2:.*y.* was not declared|undeclared identifier 'y'"):
        load(path)["k"](1, 1, zeros(1))


def test_a_library_that_a_processor_has_not_is_named(tmp_path):
    path = tmp_path / "scan.cu"
    path.write_text("#include <cub/cub.cuh>\n__global__ void k(float *x) { x[0] = 0; }\n")
    with pytest.raises(CompileError, match=r"(?s)scan\.cu:1:.*cub/cub\.cuh belongs to a library for GPUs.*MLSYS_CPU"):
        load(path)["k"](1, 1, zeros(1))


@pytest.mark.parametrize("header", ["cuda/std/array", "thrust/device_ptr.h", "cutlass/cutlass.h", "curand_kernel.h"])
def test_so_is_any_other(tmp_path, header):
    path = tmp_path / "k.cu"
    path.write_text(f"#include <{header}>\n__global__ void k(float *x) {{ x[0] = 0; }}\n")
    with pytest.raises(CompileError, match=f"{header} belongs to a library for GPUs"):
        load(path)["k"](1, 1, zeros(1))


def test_a_header_that_is_not_there_is_named_with_the_remedy(tmp_path):
    path = tmp_path / "k.cu"
    path.write_text('#include "mine/tiles.cuh"\n__global__ void k(float *x) { x[0] = 0; }\n')
    with pytest.raises(CompileError, match=r"mine/tiles\.cuh is not beside the file: .*includes="):
        load(path)["k"](1, 1, zeros(1))


@pytest.mark.parametrize("header", ["vector", "iostream", "string", "algorithm"])
def test_a_kernel_has_no_standard_library(tmp_path, header):
    path = tmp_path / "host.cu"
    path.write_text(f"#include <cstdint>\n#include <{header}>\n__global__ void k(float *x) {{ x[0] = 0; }}\n")
    with pytest.raises(CompileError, match=rf"host\.cu:2: .*<{header}>: leave it out, or put it.*#ifndef MLSYS"):
        load(path)["k"](1, 1, zeros(1))


def test_a_header_for_host_code_is_hidden_with_it(tmp_path):
    path = tmp_path / "both.cu"
    hidden = "#ifndef MLSYS\n#include <vector>\nint main() { return (int)std::vector<int>(1).size(); }\n#endif\n"
    path.write_text(f"{hidden}// #include <iostream>\n__global__ void k(float *x) {{ x[0] = 2; }}\n")
    x = zeros(1)
    load(path)["k"](1, 1, x)
    assert x.item() == 2


def test_a_file_may_name_the_same_standard_headers_here_and_on_a_gpu():
    assert {name for name in _nvrtc._HEADERS if "." not in name} == _source.STANDARD


@pytest.mark.parametrize(
    ("grid", "block", "shared", "words"),
    [
        (0, 32, 0, "grid must be one to three positive ints, got 0"),
        ((1, 2, 3, 4), 32, 0, r"grid must be .*, got \(1, 2, 3, 4\)"),
        ((), 32, 0, "grid must be"),
        (1.0, 32, 0, "grid must be"),
        (True, 32, 0, "grid must be"),
        ((1, 65536), 32, 0, "grid must be at most"),
        (1, 0, 0, "block must be"),
        (1, (32, 33), 0, r"block must be at most 1024 threads.*1056"),
        (1, (1, 1, 65), 0, "64 in z"),
        (1, (2, -1), 0, "block must be"),
        (1, 32, -1, "shared must be between 0 and 232448 bytes, got -1"),
        (1, 32, 2**20, "shared must be"),
        (1, 32, 1.0, "shared must be"),
    ],
)
def test_a_launch_that_no_gpu_takes(kernels, grid, block, shared, words):
    for launch in (
        kernels["index"],
        lambda *a, **k: check(kernels["index"], *a, **k),
        lambda *a, **k: profile(kernels["index"], *a, **k),
    ):
        with pytest.raises(ValueError, match=words):
            launch(grid, block, zeros(32, dtype=INT), shared=shared)


def test_arguments_that_do_not_fit(kernels):
    x = torch.arange(8.0)
    with pytest.raises(TypeError, match=r"plain takes 3 arguments, got 2: plain\("):
        kernels["plain"](1, 8, x, x)
    with pytest.raises(TypeError, match=r"argument n of plain is an int: give an int, got 8\.0"):
        kernels["plain"](1, 8, x, x, 8.0)
    with pytest.raises(TypeError, match=r"argument y of plain is a pointer to float.*got torch\.float64"):
        kernels["plain"](1, 8, x, x.double(), 8)
    with pytest.raises(ValueError, match="argument x of plain must be contiguous"):
        kernels["plain"](1, 4, x[::2], x, 4)
    with pytest.raises(ValueError, match="must be on the CPU or an NVIDIA GPU, got meta"):
        kernels["plain"](1, 8, x.to("meta"), x.to("meta"), 8)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        kernels["plain"](1, 8, x, x.to("meta"), 8)


# --- stopped ----------------------------------------------------------------------------------------------------------

STOPPED = [
    ("crashes", "invalid-address", lambda: torch.ones(8)),
    ("divides", "division-by-zero", lambda: zeros(8, dtype=INT)),
    ("recurses", "stack-overflow", lambda: zeros(8, dtype=INT)),
    ("loops", "endless-loop", lambda: zeros(8, dtype=INT)),
    ("asserts", "assertion", lambda: -torch.ones(8, dtype=INT)),
]


def line_of(file, name):
    start = file.declared[name].line
    return next(
        (n for n, row in enumerate(file.text.splitlines()[start - 1 : start + 4], start) if "// STOPS" in row), 0
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "kind", "arg"), STOPPED)
def test_a_kernel_that_fails_is_stopped_and_the_next_one_runs(kernels, name, kind, arg, threads):
    with pytest.raises(KernelError, match=f"{name} was stopped") as caught:
        kernels[name](4, 8, arg(), limit=0.3, threads=threads)
    found = caught.value.findings
    assert {finding.kind for finding in found} == {kind}
    line = line_of(kernels, name)
    assert kind == "endless-loop" or not line or {finding.line for finding in found} == {line}
    y = zeros(3)
    kernels["maximum"](3, 128, torch.arange(300.0), y, 300, threads=threads)
    assert y.tolist() == [299] * 3


def test_python_threads_launch_at_once(kernels):
    x = torch.arange(100_000.0)

    def launch(n):
        for _ in range(10):  # long enough for all to be under way together
            y, z = zeros(8), zeros(128, dtype=INT)
            kernels["maximum"](8, 128, x, y, n)
            kernels["index"](4, 32, z)
            if y.tolist() != [n - 1] * 8 or z.tolist() != list(range(128)):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(launch, [70_000, 80_000, 90_000, 100_000]))


def test_a_failure_in_one_thread_leaves_a_launch_in_another_alone(kernels):
    started, wrong = threading.Event(), []

    def fail():
        for name, _, arg in STOPPED[:3] * 3:
            started.set()
            with pytest.raises(KernelError):
                kernels[name](2, 8, arg())

    def work():
        started.wait()
        for _ in range(30):
            y = zeros(4)
            kernels["maximum"](4, 128, torch.arange(1000.0), y, 1000)
            wrong.extend([] if y.tolist() == [999] * 4 else [y])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(fail), pool.submit(work)]:
            done.result()
    assert not wrong


# --- in processes of their own ----------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from mlsys.kernels.cuda import load
y = torch.zeros(4, dtype=torch.int32)
load(sys.argv[1])["k"](2, 2, y)
print(y.tolist())
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.cu"
    path.write_text("__global__ void k(int *y) { int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = i; }\n")
    return path


def test_two_processes_may_build_the_same_at_once(small, monkeypatch, tmp_path):
    runtime = _build.runtime(False)  # takes long to build, in the same way
    cache = tmp_path / "cache"
    monkeypatch.setenv("MLSYS_CACHE", str(cache))
    (cache / "cuda").mkdir(parents=True)
    shutil.copy(runtime, cache / "cuda")
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, small], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["[0, 1, 2, 3]\n"] * 2
    left = sorted(path.name for path in (cache / "cuda").iterdir())
    assert len(left) == 2, left  # the runtime and the kernel: nothing half-made
    assert all(name.endswith(".so") for name in left)


def test_without_a_compiler_it_says_what_to_install(small, empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    done = subprocess.run([sys.executable, "-c", PROGRAM, small], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "NoCompiler: running CUDA kernels on the processor needs a C++ compiler" in last
    assert "/nonexistent/c++" in last
    assert "apt install g++" in last


STOPPED_OFTEN = """
import sys, threading, torch
from mlsys.kernels.cuda import KernelError, load
kernels = load(sys.argv[1])
stopped, wrong, over = 0, 0, threading.Event()
def work():
    global wrong
    while not over.is_set():
        y = torch.zeros(64, dtype=torch.int32)
        kernels["k"](16, 4, y)
        wrong += y.tolist() != list(range(64))
other = threading.Thread(target=work)
other.start()
for _ in range(300):
    try:
        kernels["loops"](4, 1, torch.zeros(1, dtype=torch.int32), limit=0.001)
    except KernelError as error:
        stopped += {finding.kind for finding in error.findings} == {"endless-loop"}
over.set()
other.join()
print(stopped, wrong)
"""


def test_stopping_kernels_often_harms_no_other(tmp_path):
    path = tmp_path / "small.cu"
    path.write_text(
        "__global__ void k(int *y) { int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = i; }\n"
        "__global__ void loops(int *x) { while (*(volatile int *)x == 0); }\n"
    )
    command = [sys.executable, "-c", STOPPED_OFTEN, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "300 0\n", (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("code", "grid", "line"),
    [("while (*(volatile int *)x == 0)\n    __syncthreads();", 2, 3), ("(void)x;", 2**31 - 1, 0)],
    ids=["between barriers", "between blocks"],
)
def test_a_launch_whose_time_is_up_in_the_runtime_is_not_taken_for_finished(tmp_path, code, grid, line):
    path = tmp_path / "long.cu"
    path.write_text(f"__global__ void k(int *x) {{\n  {code}\n}}\n")
    kernel = load(path)["k"]
    with pytest.raises(KernelError, match=r"time (is|was) up") as error:
        kernel(grid, 64, torch.zeros(1, dtype=torch.int32), limit=0.05)
    assert {finding.kind for finding in error.value.findings} == {"endless-loop"}
    assert {finding.line for finding in error.value.findings} <= {0, line, max(line - 1, 0)}


FORKED = """
import os, sys, torch
from mlsys.kernels.cuda import load
y = torch.zeros(4, dtype=torch.int32)
kernel = load(sys.argv[1])["k"]
kernel(2, 2, y)
child = os.fork()
if child == 0:
    z = torch.zeros(4, dtype=torch.int32)
    kernel(2, 2, z)
    os._exit(0 if z.tolist() == [0, 1, 2, 3] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_can_launch(small):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, small], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "0\n", done.stderr
