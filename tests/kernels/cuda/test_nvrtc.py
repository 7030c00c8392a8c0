"""Kernels compiled for GPUs that are not there: machine code, names, errors, what is kept; and parameters' types."""

import subprocess
from pathlib import Path

import pytest

from mlsys.kernels.cuda import CompileError, _nvrtc, _signature, _source, load

SAXPY = """template <class T, int N>
__global__ void saxpy(int n, T a, const T *x, T *y) {
  int i = blockIdx.x * N + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}
__global__ void zero(float *y) { y[threadIdx.x] = 0; }
"""
SIGNATURES = """#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Shape { int sizes[6]; };
enum Order { ROWS, COLUMNS };
enum class Wide : long long { A };
using Index = long long;
__global__ void numbers(bool a, char b, unsigned char c, short d, unsigned short e, int f, unsigned g, long h,
                        unsigned long i, long long j, unsigned long long k, float l, double m, size_t n, int64_t o) {}
__global__ void pointers(const float *a, float *const b, const float *const *c, volatile int *d, void *e, const void *f,
                         unsigned char *__restrict__ g, const double *__restrict__ h, uint32_t *i, int j[]) {}
__global__ void structures(Shape a, Order b, Wide c, const Shape d) {}
__global__ void halves(__half a, __nv_bfloat16 b, const half *c, __nv_bfloat16 *d, __half2 *e,
                       const __nv_bfloat162 *f) {}
__global__ void vectors(float2 *a, const float3 *b, float4 *c, int2 *d, const uint4 *e, char4 *f, float4 g,
                        double2 *h) {}
__global__ void nothing() {}
extern "C" __global__ void plain(const float *x, unsigned n, size_t bytes, float4 *v, float a) {}
template <class T, int N> __global__ void generic(Index n, T a, const T *x, T *const *y) {}
"""
HEADERS = """#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>
static_assert(std::is_same_v<int32_t, int> && sizeof(uint64_t) == 8 && sizeof(CUtensorMap) == 128);
__constant__ float LOWEST = -INFINITY;
constexpr float NONE = NAN;
__global__ void everything(const __grid_constant__ CUtensorMap map, float *x, uint n) {
  namespace groups = cooperative_groups;
  assert(n < INT_MAX);
  if (n == 3) printf("%d\\n", (int)n);
  groups::this_thread_block().sync();
  x[n] = fmaxf(LOWEST, FLT_MAX) + NONE + __half2float(__float2half(1.0f));
}
"""


def compiled(text, *instances, arch="sm_80", folder=Path("/nowhere"), **options):
    return _nvrtc.compile(text, folder / "kernel.cu", instances, arch, **options)


@pytest.fixture
def no_compiler(monkeypatch):
    """From here on what is not kept cannot be had."""

    def refuse(*args):
        raise AssertionError("compiled again")

    return lambda: monkeypatch.setattr(_nvrtc._Program, "compile", refuse)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_machine_code_ptx_and_names_for_each_architecture(arch):
    found = compiled(SAXPY, "saxpy<float, 32>", "saxpy<double,8>", "zero", arch=arch)
    assert found.arch == arch
    assert found.cubin.startswith(b"\x7fELF")
    assert f".target {arch}" in found.ptx
    demangled = {name: _signature.demangled(mangled) for name, mangled in found.names.items()}
    assert demangled == {
        "saxpy<float, 32>": "void saxpy<float, 32>(int, float, float const*, float*)",
        "saxpy<double,8>": "void saxpy<double, 8>(int, double, double const*, double*)",
        "zero": "zero(float*)",
    }
    assert all(mangled.encode() in found.cubin for mangled in found.names.values())


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_standard_and_cuda_headers_are_there(arch):
    found = compiled(HEADERS, "everything", arch=arch)
    assert "warning" not in found.log


def test_own_headers_are_found_beside_the_file_and_in_the_folders_given(tmp_path):
    (tmp_path / "beside.h").write_text("#define A 1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "apart.cuh").write_text("#define B 2\n")
    text = '#include "beside.h"\n#include <apart.cuh>\nstatic_assert(A + B == 3);\n__global__ void k() {}\n'
    assert compiled(text, "k", folder=tmp_path, includes=[tmp_path / "other"]).names == {"k": "_Z1kv"}


def test_the_macro_that_hides_host_code_is_set():
    assert compiled("#ifndef MLSYS\nint main() {}\n#endif\n__global__ void k() {}\n", "k").names


def test_what_is_compiled_is_kept_and_read_back(empty_cache, no_compiler):
    first = compiled(SAXPY, "zero")
    no_compiler()
    assert compiled(SAXPY, "zero") == first
    assert [p.suffix for p in (empty_cache / "cuda").iterdir()] == [".json"]


@pytest.mark.parametrize("change", ["text", "instances", "arch", "folder", "include"])
def test_whatever_goes_into_it_makes_another(change, empty_cache, no_compiler, tmp_path):
    header = tmp_path / "deep.h"
    (tmp_path / "shallow.h").write_text('#include "deep.h"\n')
    header.write_text("#define N 1\n")
    text = '#include "shallow.h"\n__global__ void k(int *x) { x[0] = N; }\n__global__ void l() {}\n'
    compiled(text, "k", folder=tmp_path)
    no_compiler()
    instances, arch, folders = ["k"], "sm_80", []
    if change == "text":
        text += " "
    elif change == "instances":
        instances = ["k", "l"]
    elif change == "arch":
        arch = "sm_75"
    elif change == "folder":
        folders = [tmp_path]
    else:  # in a header that a header includes
        header.write_text("#define N 2\n")
    with pytest.raises(AssertionError, match="compiled again"):
        compiled(text, *instances, arch=arch, folder=tmp_path, includes=folders)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"arch": "sm_80"}', b"\xff\xfe"])
def test_a_damaged_file_is_compiled_again(damage, empty_cache):
    first = compiled(SAXPY, "zero")
    (kept,) = (empty_cache / "cuda").iterdir()
    kept.write_bytes(damage)
    assert compiled(SAXPY, "zero").cubin == first.cubin
    assert kept.read_bytes() != damage


def test_a_mistake_is_told_with_file_and_line():
    text = "__global__ void k(int *x) {\n  x[0] = nothing;\n}\n"
    with pytest.raises(CompileError, match=r"/nowhere/kernel\.cu\(2\): error: identifier \"nothing\" is undefined"):
        compiled(text, "k")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("#include <vector>\n__global__ void k() {}\n", "NVRTC has no C++ standard library"),
        ("#include <atomic>\n__global__ void k() {}\n", r"include <cuda/std/atomic>"),
        ("#include <cuda_nothing.h>\n__global__ void k() {}\n", r"cuda_nothing.h is CUDA's: pip install"),
        ("__global__ void k() {}\nint main() { return 0; }\n", "#ifndef MLSYS"),
    ],
)
def test_what_a_kernel_file_cannot_have_is_told_with_the_remedy(text, hint):
    with pytest.raises(CompileError) as error:
        compiled(text, "k")
    assert str(error.value).startswith("NVRTC 13")
    assert hint in str(error.value)
    assert "ptxas info" not in str(error.value)


def test_a_failed_compilation_is_not_kept(empty_cache):
    with pytest.raises(CompileError):
        compiled("__global__ void k() { x; }", "k")
    assert not list((empty_cache / "cuda").iterdir())


@pytest.mark.parametrize("arch", ["sm_70", "sm_75a", "compute_80", "hopper", "", "sm_90 "])
def test_an_architecture_that_it_does_not_know_is_refused_by_name(arch):
    with pytest.raises(ValueError, match=r"arch must be one that NVRTC 13\.\d+ knows, sm_75, sm_80.*sm_90a"):
        compiled(SAXPY, "zero", arch=arch)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that these files are installed, and no others; versions by folder."""

    def pretend(*libraries):
        for name in libraries:
            path = tmp_path / "nvidia" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        versions = {"cu13": (13, 5), "cuda_nvrtc": (12, 9)}
        monkeypatch.setattr(_nvrtc, "_roots", lambda: [tmp_path / "nvidia"])
        monkeypatch.setattr(_nvrtc, "_version", lambda path: versions[path.parent.parent.name])
        _nvrtc.toolkits.cache_clear()
        return tmp_path / "nvidia"

    yield pretend
    monkeypatch.undo()
    _nvrtc.toolkits.cache_clear()


def test_wheels_of_cuda_13_share_a_folder_and_those_of_12_have_one_each(installed):
    root = installed("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.5", "cuda_nvrtc/lib/libnvrtc.so.12")
    new, old = _nvrtc.toolkits()
    assert new == _nvrtc.Toolkit(
        root / "cu13/lib/libnvrtc.so.13", (13, 5), (root / "cu13/include", root / "cu13/include/cccl")
    )
    assert old.version == (12, 9)
    assert old.includes == tuple(root / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl"))
    assert _nvrtc.newest() == new
    assert _nvrtc.newest(12) == old
    assert str(old) == "NVRTC 12.9"


def test_without_nvrtc_the_error_names_the_wheel_and_the_command(installed):
    installed()
    with pytest.raises(
        _nvrtc.NoNVRTC, match=r"wheel nvidia-cuda-nvrtc, on Linux: pip install 'mlsys-reference\[cuda\]'$"
    ):
        compiled(SAXPY, "zero")


def test_an_nvrtc_newer_than_the_driver_is_not_taken(installed):
    installed("cu13/lib/libnvrtc.so.13")
    with pytest.raises(
        _nvrtc.NoNVRTC, match=r"nvidia-cuda-nvrtc-cu12.*there is NVRTC 13\.5, too new for a driver of CUDA 12"
    ):
        _nvrtc.newest(12)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_parameters_are_read_for_a_gpu_as_for_the_processor(arch, tmp_path):
    """Two compilers say what the parameters are; the converter of arguments serves both."""
    path = tmp_path / "signatures.cu"
    path.write_text(SIGNATURES)
    declared = _source.kernels(SIGNATURES)
    names = (*(n for n in declared if n != "generic"), "generic<float, 4>", "generic<__nv_bfloat16, 1>")
    file = load(path)
    found = _nvrtc.compile(SIGNATURES, path, names, arch)
    for name in names:
        codes = _signature.codes(found.names[name], found.ptx, declared[_source.base_name(name)])
        assert codes == file._library(name, "run")[2], name
    assert _signature.codes(found.names["structures"], found.ptx, declared["structures"]) == ["s24", "i4", "i8", "s24"]


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("float const*", "*cf4"),
        ("const float *", "*cf4"),
        ("float *const", "*f4"),
        ("float const* const*", "*c*cf4"),
        ("const volatile int *", "*ci4"),
        ("float const* __restrict__", "*cf4"),
        ("unsigned", "u4"),
        ("long unsigned int", "u8"),
        ("unsigned short", "u2"),
        ("size_t", "u8"),
        ("std::pair<const int, float>*", "*s"),
        ("Shape const*", "*cs"),
        ("struct Shape", "s"),
        ("void const*", "*cvoid"),
    ],
)
def test_codes_of_types_as_they_are_spelled(spelled, code):
    assert _signature.code(spelled) == code


def test_a_name_that_is_not_there_is_refused():
    found = compiled(SAXPY, "zero")
    with pytest.raises(ValueError, match="no kernel one in the compiled code"):
        _signature.codes("one", found.ptx, _source.kernels(SAXPY)["zero"])
    with pytest.raises(ValueError, match="'_Zx' is no mangled name"):
        _signature.demangled("_Zx")
    with pytest.raises(ValueError, match="has 4 parameters by its name, and 1 by its code"):
        _signature.codes("k", ".visible .entry k(\n .param .u64 k_param_0\n)\n{", _source.kernels(SAXPY)["saxpy"])


def test_names_are_demangled_as_by_the_compilers_own_tool():
    found = compiled(SIGNATURES, "numbers", "pointers", "generic<float, 4>")
    for mangled in found.names.values():
        said = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
        assert _signature.demangled(mangled) == said
