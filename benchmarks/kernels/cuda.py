"""CUDA on a processor: how long does a student wait for a kernel, run, checked or profiled, where there is no GPU?

Not how fast a kernel is: time here says nothing of a GPU's. The peer is numba's simulator, which runs CUDA kernels that
are written in Python, each thread as a thread of Python.

What to look at: run, a tiled product costs little more than the same loops in C; a barrier costs a switch between
fibers. Checked, each access to memory costs a look into the checker's notes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mlsys.bench import Benchmark, Impl, Plot, Work
from mlsys.kernels import cuda

Case = Mapping[str, Any]
TILE = 16
SOURCE = """
constexpr int TILE = 16;

__global__ void product(const float *a, const float *b, float *c, int n) {
  __shared__ float tile_a[TILE][TILE];
  __shared__ float tile_b[TILE][TILE];
  int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += TILE) {
    tile_a[threadIdx.y][threadIdx.x] = a[row * n + k + threadIdx.x];
    tile_b[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + column];
    __syncthreads();
    for (int i = 0; i < TILE; i++) sum += tile_a[threadIdx.y][i] * tile_b[i][threadIdx.x];
    __syncthreads();
  }
  c[row * n + column] = sum;
}

__global__ void meet(float *x, int n) {
  for (int i = 0; i < n; i++) __syncthreads();
  x[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void exchange(float *x, int n) {
  float v = 1;
  for (int i = 0; i < n; i++) v = __shfl_xor_sync(0xffffffff, v, 1);
  x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
"""
THREADS = 256  # of the blocks that only meet


@cache
def kernels() -> cuda.File:
    folder = Path(tempfile.mkdtemp())
    (folder / "emulated.cu").write_text(SOURCE, encoding="utf-8")
    return cuda.load(folder / "emulated.cu")


def case(what: str, n: int) -> Case:
    return {"what": what, "n": n, "dtype": "float32"}


def inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(case["n"])
    n = case["n"] if case["what"] == "product" else 1
    a, b = (torch.randn(n, n, generator=generator, device=device) for _ in range(2))
    return {"a": a, "b": b, "x": torch.zeros(THREADS)}


def work(case: Case, given: dict[str, Tensor]) -> Work:
    n = case["n"]
    if case["what"] == "product":
        return Work(flops=2 * n**3, bytes=12 * n**2, items=n**2, unit="thread")
    return Work(flops=0, bytes=0, items=THREADS * n, unit="meeting")


def expected(case: Case, given: dict[str, Tensor]) -> Tensor:
    return given["a"] @ given["b"] if case["what"] == "product" else torch.ones(THREADS)


def launch(how: Callable[..., Any], case: Case, given: dict[str, Tensor]) -> Tensor:
    n = case["n"]
    if case["what"] == "product":
        c = torch.empty_like(given["a"])
        how(kernels()["product"], (n // TILE, n // TILE), (TILE, TILE), given["a"], given["b"], c, n)
        return c
    how(kernels()[case["what"]], 1, THREADS, given["x"], n)
    return given["x"]


def run(case: Case, given: dict[str, Tensor]) -> Tensor:
    return launch(lambda kernel, *args: kernel(*args), case, given)


def checked(case: Case, given: dict[str, Tensor]) -> Tensor:
    launch(lambda kernel, *args: cuda.check(kernel, *args), case, given)
    return expected(case, given)  # it works on copies


def profiled(case: Case, given: dict[str, Tensor]) -> Tensor:
    launch(lambda kernel, *args: cuda.profile(kernel, *args), case, given)
    return expected(case, given)


simulator: Any = None  # numba's module: its simulator looks for it among the globals of a kernel


def product(a: Any, b: Any, c: Any, n: int) -> None:
    """The same kernel in Python."""
    tile_a = simulator.shared.array((TILE, TILE), "float32")
    tile_b = simulator.shared.array((TILE, TILE), "float32")
    column, row = simulator.grid(2)
    x, y = simulator.threadIdx.x, simulator.threadIdx.y
    total = 0.0
    for k in range(0, n, TILE):
        tile_a[y, x] = a[row, k + x]
        tile_b[y, x] = b[k + y, column]
        simulator.syncthreads()
        for i in range(TILE):
            total += tile_a[y, i] * tile_b[i, x]
        simulator.syncthreads()
    c[row, column] = total


@cache
def simulated() -> Any:
    from numba import config

    vars(config)["ENABLE_CUDASIM"] = 1
    from numba import cuda as module

    return module.jit(FunctionType(product.__code__, {"simulator": module, "TILE": TILE, "range": range}, "product"))


def in_numba(case: Case, given: dict[str, Tensor]) -> Tensor:
    n, c = case["n"], torch.empty_like(given["a"])
    simulated()[(n // TILE, n // TILE), (TILE, TILE)](given["a"].numpy(), given["b"].numpy(), c.numpy(), n)
    return c


def prepare(function: Callable[..., Any], case: Case, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: function(case, given)


def verify(case: Case, given: dict[str, Tensor], got: Tensor, want: Tensor) -> tuple[float, float]:
    return (got - want).abs().max().item(), 1e-5 * case["n"] if case["what"] == "product" else 0.0


bench = Benchmark(
    __file__,
    cases={
        "quick": [case("product", 16), case("product", 256), case("product", 512), case("meet", 20_000)],
        "default": [
            *(case("product", n) for n in (16, 32, 64, 128, 256, 512)),
            case("meet", 20_000),
            case("exchange", 20_000),
        ],
        "full": [
            *(case("product", n) for n in (16, 32, 64, 128, 256, 512, 1024)),
            case("meet", 20_000),
            case("exchange", 20_000),
        ],
    },
    inputs=inputs,
    work=work,
    impls={
        "torch": Impl(lambda: expected, "reference"),
        "run": Impl(lambda: run, "ours"),
        "check": Impl(lambda: checked, "variant", only=lambda case: case["what"] == "product"),
        "profile": Impl(lambda: profiled, "variant", only=lambda case: case["what"] == "product" and case["n"] <= 256),
        "numba simulator": Impl(
            lambda: in_numba, "peer", only=lambda case: case["what"] == "product" and case["n"] <= 32
        ),
    },
    subject="run",
    prepare=prepare,
    verify=verify,
    plots=(Plot(x="n", xlabel="n of an n × n product", only=lambda case: case["what"] == "product"),),
)

if __name__ == "__main__":
    bench.main()
