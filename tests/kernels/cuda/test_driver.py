"""What a launch says to the driver, held against a library of the driver's names that writes down how it was called."""

import contextlib
import ctypes
import subprocess
import sys
import types

import pytest
import torch

from mlsys.kernels.cuda import CompileError, _build, _driver, _gpu, _nvrtc, load

# Compiled as C: what ctypes passes is read back by the C calling convention, not by ctypes.
LIBRARY = r"""
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>
typedef struct Handle { int number; } *H;
static struct Handle context = {1}, module_ = {2}, functions[8];
static char told[1 << 16], fails[64];
static int status, n_functions, depth;
static int tell(const char *name, const char *form, ...) {
  va_list rest;
  va_start(rest, form);
  size_t at = strlen(told);
  at += snprintf(told + at, sizeof told - at, "%s ", name);
  at += vsnprintf(told + at, sizeof told - at, form, rest);
  snprintf(told + at, sizeof told - at, "\n");
  va_end(rest);
  return strcmp(name, fails) ? 0 : status;
}
const char *mlsys_told(void) { return told; }
void mlsys_reset(void) { told[0] = fails[0] = 0; n_functions = depth = 0; }
void mlsys_fail(const char *name, int with) { snprintf(fails, sizeof fails, "%s", name); status = with; }
int mlsys_depth(void) { return depth; }
int cuInit(unsigned flags) { return tell("cuInit", "%u", flags); }
int cuDriverGetVersion(int *v) { *v = 13020; return tell("cuDriverGetVersion", ""); }
int cuGetErrorName(int e, const char **s) { *s = e == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : NULL; return 0; }
int cuGetErrorString(int e, const char **s) { *s = e == 701 ? "too many resources requested" : NULL; return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = ordinal + 40; return tell("cuDeviceGet", "%d", ordinal); }
int cuDevicePrimaryCtxRetain(H *c, int device) { *c = &context; return tell("cuDevicePrimaryCtxRetain", "%d", device); }
int cuCtxPushCurrent_v2(H c) { depth++; return tell("push", "%d", c->number); }
int cuCtxPopCurrent_v2(H *c) { *c = &context; depth--; return tell("pop", ""); }
int cuModuleLoadData(H *m, const char *image) { *m = &module_; return tell("cuModuleLoadData", "%.3s", image + 1); }
int cuModuleGetFunction(H *f, H m, const char *name) {
  *f = &functions[n_functions];
  (*f)->number = 10 + n_functions++;
  return tell("cuModuleGetFunction", "%d %s", m->number, name);
}
int cuFuncSetAttribute(H f, int which, int value) {
  return tell("cuFuncSetAttribute", "%d %d %d", f->number, which, value);
}
int cuLaunchKernel(H f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **args, void **extra) {
  return tell("cuLaunchKernel",
              "%d grid %u %u %u block %u %u %u shared %u stream %zu depth %d args %d %g %p extra %d", f->number, gx, gy,
              gz, bx, by, bz, shared, (size_t)stream, depth, *(int *)args[0], (double)*(float *)args[1],
              *(void **)args[2], extra != NULL);
}
"""
SCALE = """template <int N> __global__ void again(int n, float a, float *x) {}
__global__ void scale(int n, float a, float *x) { if (threadIdx.x < n) x[threadIdx.x] *= a; }
extern "C" __global__ void plain(int n, float a, float *x) {}
"""


@pytest.fixture(scope="session")
def compiled_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(LIBRARY)
    command = [
        _build.compiler(),
        "-x",
        "c",
        "-shared",
        "-fPIC",
        str(folder / "driver.c"),
        "-o",
        str(folder / "driver.so"),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "driver.so"))
    library.mlsys_told.restype = ctypes.c_char_p
    return library


@pytest.fixture
def library(compiled_library):
    compiled_library.mlsys_reset()
    return compiled_library


def told(library):
    return library.mlsys_told().decode().splitlines()


def arguments(n, a, address):
    values = (ctypes.c_int(n), ctypes.c_float(a), ctypes.c_void_p(address))
    return (ctypes.c_void_p * 3)(*map(ctypes.addressof, values)), values


def test_loading_and_launching_through_ctypes(library):
    driver = _driver.Library(library)
    assert driver.version() == (13, 2)
    found = driver.functions(3, b"\x7fELF and\0zeros", ["_Z1a", "_Z1b"])
    assert told(library) == [
        "cuInit 0",
        "cuDriverGetVersion ",
        "cuDeviceGet 3",
        "cuDevicePrimaryCtxRetain 43",
        "push 1",
        "cuModuleLoadData ELF",
        "cuModuleGetFunction 2 _Z1a",
        "cuModuleGetFunction 2 _Z1b",
        "pop ",
    ]
    library.mlsys_reset()
    pointers, values = arguments(-7, 0.5, 0x7F0123456789)
    found["_Z1b"].launch((70000, 2, 3), (32, 4, 1), 100, 0xABCDEF012345, pointers)
    assert told(library) == [
        "push 1",
        "cuFuncSetAttribute 11 8 100",
        f"cuLaunchKernel 11 grid 70000 2 3 block 32 4 1 shared 100 stream {0xABCDEF012345} depth 1 "
        "args -7 0.5 0x7f0123456789 extra 0",
        "pop ",
    ]
    assert values[0].value == -7


def test_shared_memory_is_asked_for_once(library):
    function = _driver.Library(library).functions(0, b"\x7fELF", ["_Z1a"])["_Z1a"]
    library.mlsys_reset()
    pointers, _values = arguments(1, 1.0, 0)
    for shared in (0, 1024, 512, 1024, 200_000):
        function.launch((1, 1, 1), (1, 1, 1), shared, 0, pointers)
    asked = [line for line in told(library) if "Attribute" in line]
    assert asked == ["cuFuncSetAttribute 10 8 1024", "cuFuncSetAttribute 10 8 200000"]
    assert sum("stream 0 " in line for line in told(library)) == 5


@pytest.mark.parametrize("name", ["cuInit", "cuDeviceGet", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_what_the_driver_refuses_is_told_by_its_name(library, name):
    library.mlsys_fail(name.encode(), 701)
    pointers, _values = arguments(1, 1.0, 0)
    with pytest.raises(
        _driver.CudaError, match=rf"^{name}: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested$"
    ):
        _driver.Library(library).functions(0, b"\x7fELF", ["_Z1a"])["_Z1a"].launch((1, 1, 1), (1, 1, 1), 0, 0, pointers)
    assert library.mlsys_depth() == 0  # the caller's context is current again


def test_an_error_that_the_driver_has_no_words_for(library):
    library.mlsys_fail(b"cuInit", 12345)
    with pytest.raises(_driver.CudaError, match=r"^cuInit: unknown: unknown$"):
        _driver.Library(library)


def test_without_a_driver_the_error_says_so(monkeypatch):
    def nothing(name, *args, **options):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    with pytest.raises(_driver.CudaError, match=r"NVIDIA's driver is not installed.*libcuda\.so\.1"):
        _driver.Library()


# --- cuda.core, where it is installed ---------------------------------------------------------------------------------


class Number(int):
    """A handle of the bindings: an int of its own type."""

    def __repr__(self):
        return f"{type(self).__name__}({int(self)})"


class CUfunction(Number):
    pass


class CUkernel(Number):
    pass


class CUstream(Number):
    pass


class CUdevice(Number):
    pass


@pytest.fixture
def core(monkeypatch):
    """Modules of cuda.core's names, as far as they are used; what was called."""
    calls, failing = [], {}

    def call(name, *result):
        def answer(*args):
            calls.append((name, *args))
            return (failing.get(name, 0), *result)

        return answer

    bindings = types.ModuleType("cuda.bindings.driver")
    bindings.CUfunction, bindings.CUkernel, bindings.CUstream, bindings.CUdevice = (
        CUfunction,
        CUkernel,
        CUstream,
        CUdevice,
    )
    bindings.CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="MAX_DYNAMIC")
    bindings.cuDriverGetVersion = call("cuDriverGetVersion", 12080)
    bindings.cuKernelSetAttribute = call("cuKernelSetAttribute")
    bindings.cuLaunchKernel = call("cuLaunchKernel")
    bindings.cuGetErrorName = lambda status: (0, b"CUDA_ERROR_INVALID_VALUE")
    bindings.cuGetErrorString = lambda status: (0, b"invalid argument")

    class Device:
        def __init__(self, ordinal):
            self.ordinal = ordinal

        def set_current(self):
            calls.append(("set_current", self.ordinal))

    class ObjectCode:
        @staticmethod
        def from_cubin(cubin):
            calls.append(("from_cubin", cubin))
            return ObjectCode()

        def get_kernel(self, name):
            calls.append(("get_kernel", name))
            return types.SimpleNamespace(handle=CUkernel(77))

    package, cuda = types.ModuleType("cuda.bindings"), types.ModuleType("cuda")
    package.driver = bindings
    module = types.ModuleType("cuda.core")
    module.Device, module.ObjectCode = Device, ObjectCode
    for name, each in {
        "cuda": cuda,
        "cuda.bindings": package,
        "cuda.bindings.driver": bindings,
        "cuda.core": module,
    }.items():
        monkeypatch.setitem(sys.modules, name, each)
    return types.SimpleNamespace(calls=calls, failing=failing, module=module)


def test_loading_and_launching_through_cuda_core(core):
    driver = _driver.Core()
    assert driver.version() == (12, 8)
    function = driver.functions(1, b"code", ["_Z1a"])["_Z1a"]
    pointers, _values = arguments(3, 1.0, 0)
    function.launch((5, 6, 7), (8, 9, 10), 60_000, 99, pointers)
    function.launch((5, 6, 7), (8, 9, 10), 50_000, 99, pointers)
    launched = ("cuLaunchKernel", CUfunction(77), 5, 6, 7, 8, 9, 10)
    last = (CUstream(99), ctypes.addressof(pointers), 0)
    assert core.calls == [
        ("cuDriverGetVersion",),
        ("set_current", 1),
        ("from_cubin", b"code"),
        ("get_kernel", "_Z1a"),
        ("set_current", 1),
        ("cuKernelSetAttribute", "MAX_DYNAMIC", 60_000, CUkernel(77), CUdevice(1)),
        (*launched, 60_000, *last),
        ("set_current", 1),
        (*launched, 50_000, *last),
    ]


def test_what_cuda_cores_bindings_refuse_is_told_by_its_name(core):
    core.failing["cuLaunchKernel"] = 1
    pointers, _values = arguments(3, 1.0, 0)
    with pytest.raises(_driver.CudaError, match=r"^cuLaunchKernel: CUDA_ERROR_INVALID_VALUE: invalid argument$"):
        _driver.Core().functions(0, b"code", ["k"])["k"].launch((1, 1, 1), (1, 1, 1), 0, 0, pointers)


@pytest.fixture
def fresh_driver():
    _driver.driver.cache_clear()
    yield
    _driver.driver.cache_clear()


def test_cuda_core_is_taken_where_it_is_installed(core, fresh_driver):
    assert isinstance(_driver.driver(), _driver.Core)


def test_an_older_cuda_core_is_passed_over(core, fresh_driver, monkeypatch, library):
    del core.module.ObjectCode
    monkeypatch.setattr(_driver, "Library", lambda: "through ctypes")
    assert _driver.driver() == "through ctypes"


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, library):
    """A GPU as torch would show it, in front of the library that writes down. Its memory is the processor's."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=555))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_gpu, "driver", lambda: driver)
    driver = _driver.Library(library)
    _gpu._loaded.cache_clear()
    library.mlsys_reset()
    yield library
    _gpu._loaded.cache_clear()


@pytest.fixture
def kernels(tmp_path):
    def write(text=SCALE):
        path = tmp_path / "scale.cu"
        path.write_text(text)
        return load(path)

    return write


def launch(kernel, *args, shared=0, stream=None, device="cuda"):
    _gpu.launch(kernel, torch.device(device), (4, 1, 1), (64, 1, 1), args, shared, stream)


@pytest.mark.parametrize(
    ("name", "mangled"), [("scale", "_Z5scaleifPf"), ("plain", "plain"), ("again<3>", "_Z5againILi3EEvifPf")]
)
def test_arguments_reach_the_driver_as_the_kernel_wants_them(gpu, kernels, name, mangled):
    x = torch.ones(8)
    launch(kernels()[name], 8, 1.5, x)
    lines = told(gpu)
    assert f"cuModuleGetFunction 2 {mangled}" in lines
    (launched,) = (line for line in lines if line.startswith("cuLaunchKernel"))
    assert f"grid 4 1 1 block 64 1 1 shared 0 stream 555 depth 1 args 8 1.5 {x.data_ptr():#x} extra 0" in launched
    assert "cuDeviceGet 2" in lines


def test_a_file_is_loaded_once_a_device(gpu, kernels):
    file = kernels()
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        launch(file["scale"], 8, 1.5, torch.ones(8), device=device)
        launch(file["plain"], 8, 1.5, torch.ones(8), device=device)
    assert [line for line in told(gpu) if "cuDeviceGet" in line] == ["cuDeviceGet 0", "cuDeviceGet 1"]
    assert sum("cuLaunchKernel" in line for line in told(gpu)) == 8


def test_wrong_arguments_are_refused_as_on_the_processor(gpu, kernels):
    kernel = kernels()["scale"]
    with pytest.raises(TypeError, match=r"argument n of scale is an int: give an int, got 2\.0"):
        launch(kernel, 2.0, 1.0, torch.ones(8))
    with pytest.raises(TypeError, match=r"argument x of scale is a pointer to float.*got torch\.float64"):
        launch(kernel, 2, 1.0, torch.ones(8, dtype=torch.float64))
    assert not any("cuLaunchKernel" in line for line in told(gpu))


def test_a_launch_that_the_driver_refuses_says_what_was_asked(gpu, kernels):
    kernel = kernels()["scale"]
    gpu.mlsys_fail(b"cuLaunchKernel", 701)
    words = r"scale cannot be launched with grid \(4, 1, 1\), block \(64, 1, 1\) and 99 bytes.*OUT_OF_RESOURCES.*sm_90a"
    with pytest.raises(_driver.CudaError, match=words):
        launch(kernel, 8, 1.5, torch.ones(8), shared=99)


def test_a_file_for_other_gpus_is_refused(gpu, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match=r"scale\.cu is for sm_90a only, and this GPU is sm_80"):
        launch(kernels("// arch: sm_90a\n" + SCALE)["scale"], 8, 1.5, torch.ones(8))


def test_the_compiler_is_no_newer_than_the_driver(gpu, kernels, monkeypatch):
    asked = []

    def newest(most=None):
        asked.append(most)
        raise _nvrtc.NoNVRTC("none")

    monkeypatch.setattr(_nvrtc, "newest", newest)
    with pytest.raises(_nvrtc.NoNVRTC):
        launch(kernels()["scale"], 8, 1.5, torch.ones(8))
    assert asked == [13]


def test_a_mistake_in_the_file_is_the_compilers(gpu, kernels):
    with pytest.raises(CompileError, match=r"scale\.cu\(1\): error"):
        launch(kernels("__global__ void k(int n) { nothing; }\n")["k"], 1)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), "sm_75"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_the_architecture_of_a_gpu(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert _gpu.architecture() == arch
    assert arch in _nvrtc.architectures(_nvrtc.newest())


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, 555),
        (0, 0),
        (7, 7),
        (types.SimpleNamespace(cuda_stream=8), 8),
        (types.SimpleNamespace(__cuda_stream__=lambda: (0, 9)), 9),
    ],
)
def test_a_stream_is_torchs_or_anyones(gpu, stream, handle):
    assert _gpu.stream_handle(stream, torch.device("cuda")) == handle


@pytest.mark.parametrize("stream", [True, "default", 1.5])
def test_what_is_no_stream_is_refused(gpu, stream):
    with pytest.raises(TypeError, match=r"stream must be a torch\.cuda\.Stream"):
        _gpu.stream_handle(stream, torch.device("cuda"))
