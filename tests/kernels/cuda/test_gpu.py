"""On an NVIDIA GPU: launches through cuda.core and through ctypes, streams, shared memory above 48 KB, errors."""

import ctypes
import struct

import pytest
import torch

from mlsys.kernels.cuda import _driver, _gpu, _nvrtc, _report, check, load
from mlsys.kernels.cuda._occupancy import occupancy

pytestmark = pytest.mark.gpu

KERNELS = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
struct Pair { int a; float b; };
__global__ void scalars(bool a, unsigned char b, short c, int d, long long e, float f, double g, __half h,
                        __nv_bfloat16 i, Pair j, double *out) {
  out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = (double)e, out[5] = f, out[6] = g;
  out[7] = __half2float(h), out[8] = __bfloat162float(i), out[9] = j.a, out[10] = j.b;
}
template <class T> __global__ void scale(int n, float a, T *x) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x[i] = (T)(a * (float)x[i]);
}
__global__ void reversed(int n, const float *x, float *y) {
  extern __shared__ float s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = s[n - 1 - i];
}
__global__ void spin(long long cycles, int *done) {
  for (long long start = clock64(); clock64() - start < cycles;) continue;
  *done = 1;
}
__global__ void places(int *out) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
"""


@pytest.fixture(params=["ctypes", "cuda.core"])
def file(request, tmp_path, monkeypatch):
    """Through the driver's library; and through cuda.core where it is installed, else through the library once more."""
    library = _driver.Library() if request.param == "ctypes" else _driver.driver()
    monkeypatch.setattr(_gpu, "driver", lambda: library)
    _gpu._loaded.cache_clear()
    path = tmp_path / "kernels.cu"
    path.write_text(KERNELS)
    yield load(path)
    _gpu._loaded.cache_clear()


def test_each_kind_of_argument_arrives(file):
    out = torch.zeros(11, dtype=torch.float64, device="cuda")
    pair = struct.pack("=if", -5, 0.375)
    file["scalars"](1, 1, True, 200, -3, -70000, 2**40, 0.1, 0.1, 0.1, 0.1, pair, out)
    single, half, brain = (torch.tensor(0.1, dtype=t).item() for t in (torch.float32, torch.float16, torch.bfloat16))
    assert out.tolist() == [1, 200, -3, -70000, 2.0**40, single, 0.1, half, brain, -5, 0.375]


@pytest.mark.parametrize(("name", "dtype"), [("scale<float>", torch.float32), ("scale<__nv_bfloat16>", torch.bfloat16)])
def test_template_instances(file, name, dtype):
    x = torch.arange(1000, device="cuda").to(dtype)
    expected = (x.float() * 0.5).to(dtype)
    file[name]((3,), 96, 1000, 0.5, x)
    assert torch.equal(x, expected)


def test_blocks_and_threads_are_where_they_say(file):
    out = torch.empty(2 * 3 * 2 * 24, dtype=torch.int32, device="cuda")
    file["places"]((2, 3, 2), (4, 3, 2), out)
    assert out.tolist() == [block * 1000 + thread for block in range(12) for thread in range(24)]


def test_shared_memory_above_48_kilobytes(file):
    n = 15_000
    x = torch.randn(n, device="cuda")
    y = torch.empty_like(x)
    file["reversed"](1, 256, n, x, y, shared=4 * n)
    assert torch.equal(y, x.flip(0))


def test_more_shared_memory_than_there_is_is_refused(file):
    x = torch.zeros(4, device="cuda")
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    if most >= 227 * 1024:
        most = 227 * 1024 - 4  # the launcher itself refuses more
    with pytest.raises((_driver.CudaError, ValueError), match="shared"):
        file["reversed"](1, 256, 4, x, x, shared=most + 1024)


def test_a_launch_is_on_the_stream_given_and_does_not_wait(file):
    done = torch.zeros(1, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    file["spin"](1, 1, 200_000_000, done, stream=side)
    assert not side.query()
    side.synchronize()
    assert done.item() == 1
    with torch.cuda.stream(side):
        file["spin"](1, 1, 200_000_000, done)
    assert not side.query()
    side.synchronize()


def test_a_launch_can_be_captured_in_a_graph(file):
    x = torch.ones(64, device="cuda")
    file["scale<float>"](1, 64, 64, 1.0, x)  # compiled and loaded before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        file["scale<float>"](1, 64, 64, 2.0, x)
    x.fill_(1.0)
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, torch.full_like(x, 8.0))


def test_the_same_file_runs_alike_on_the_processor(file):
    x = torch.randn(777)
    here, there = x.clone(), x.cuda()
    file["scale<float>"](4, 64, 777, 0.3, here)
    file["scale<float>"](4, 64, 777, 0.3, there)
    assert torch.equal(here, there.cpu())
    assert check(file["scale<float>"], 4, 64, 777, 0.3, here) == []


def test_the_driver_counts_as_the_report_does(file):
    """Registers and blocks on a multiprocessor, asked of the driver."""
    arch, driver = _gpu.architecture(), _driver.Library()
    names = ["scalars", "reversed", "places"]
    compiled = _nvrtc.compile(file.text, file.path, names, arch, toolkit=_nvrtc.newest(driver.version()[0]))
    found = driver.functions(0, compiled.cubin, list(compiled.names.values()))
    for kernel in _report.compile_report(file.path, arch, instances=names, block=128):
        function, number = found[compiled.names[kernel.kernel]], ctypes.c_int()
        with driver.current(function.context):
            driver.call("cuFuncGetAttribute", ctypes.byref(number), 4, function.handle)  # CU_FUNC_ATTRIBUTE_NUM_REGS
            assert number.value == kernel.registers
            for threads, shared in ((128, 0), (512, 20_000), (1024, 0)):
                blocks = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
                driver.call(blocks, ctypes.byref(number), function.handle, threads, ctypes.c_size_t(shared))
                mine = occupancy(arch, threads, kernel.registers, kernel.shared + shared, barriers=kernel.barriers)
                assert number.value == mine.blocks
