"""Occupancy held against NVIDIA's own calculator; what kernels take, against NVIDIA's own reader of machine code."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.kernels.cuda import CompileError, _build, _nvrtc, _targets
from mlsys.kernels.cuda._occupancy import occupancy
from mlsys.kernels.cuda._report import compile_report, warnings

# the programming guide's table: threads an SM, shared memory an SM, the most of it for a block (both in KB)
GUIDE = {
    "sm_75": (1024, 64, 64),
    "sm_80": (2048, 164, 163),
    "sm_86": (1536, 100, 99),
    "sm_89": (1536, 100, 99),
    "sm_90": (2048, 228, 227),
    "sm_100": (2048, 228, 227),
    "sm_103": (2048, 228, 227),
    "sm_120": (1536, 100, 99),
}
CALCULATOR = """
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int threads_a_sm, int shared_a_sm, int shared_a_block,
                      int threads, int registers, int shared, int barriers) {
  cudaOccDeviceProp gpu;
  gpu.computeMajor = major, gpu.computeMinor = minor, gpu.maxThreadsPerBlock = 1024, gpu.warpSize = 32, gpu.numSms = 1;
  gpu.maxThreadsPerMultiprocessor = threads_a_sm, gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
  gpu.sharedMemPerBlock = 48 << 10, gpu.sharedMemPerMultiprocessor = shared_a_sm << 10;
  gpu.sharedMemPerBlockOptin = shared_a_block << 10;
  gpu.reservedSharedMemPerBlock = (shared_a_sm - shared_a_block) << 10;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared;
  kernel.numBlockBarriers = barriers;
  cudaOccDeviceState state;
  cudaOccResult result;
  int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, threads, shared);
  return error ? -error : result.activeBlocksPerMultiprocessor;
}
"""
KERNELS = """// instances: tile<16>,
//            tile<32>
#include <cuda_fp16.h>
#include <mma.h>
__constant__ float table[100];
__constant__ double two[2];
template <int T> __global__ void tile(int n, const float *a, float *b) {
  __shared__ float x[T][T + 1];
  x[threadIdx.y][threadIdx.x] = a[threadIdx.y * n + threadIdx.x];
  __syncthreads();
  b[threadIdx.x * n + threadIdx.y] = x[threadIdx.x][threadIdx.y] + table[n] + (float)two[n & 1];
}
__global__ void __launch_bounds__(512, 2) crowded(const float *x, float *y) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; i++) v[i] = x[threadIdx.x + i * 512];
#pragma unroll
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < i; j++) v[i] = v[i] * v[j] + v[63 - i];
#pragma unroll
  for (int i = 0; i < 64; i++) y[threadIdx.x + i * 512] = v[i];
}
__global__ void words(const float4 *x, float4 *y, float *sum) {
  // mma.sync, bar.sync and atom. in a comment are none
  float4 v = x[threadIdx.x];
  y[threadIdx.x] = v;
  atomicAdd(sum, __shfl_xor_sync(~0u, v.x, 1) + __shfl_xor_sync(~0u, v.y, 2));
}
__global__ void tensor(const half *a, const half *b, float *c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, half, row_major> x;
  fragment<matrix_b, 16, 16, 16, half, col_major> y;
  fragment<accumulator, 16, 16, 16, float> z;
  fill_fragment(z, 0.0f);
  load_matrix_sync(x, a, 16);
  load_matrix_sync(y, b, 16);
  mma_sync(z, x, y, z);
  store_matrix_sync(c, z, 16, mem_row_major);
}
"""
INSTRUCTIONS = """// arch: sm_90a
__global__ void k(int *p, unsigned s, unsigned long long m) {
  unsigned a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(s));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s), "l"(p));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(s), "l"(p));
  asm volatile("cp.async.commit_group; cp.async.wait_all;");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 16, [%0];"
               ::"r"(s), "l"(p));
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2}], [%0];"
               ::"r"(s), "l"(m), "r"(0));
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; }" ::"r"(s));
  asm volatile("bar.sync 1, 64;");
  asm volatile("wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned;");
  p[0] = a + b + c + d;
}
"""


@pytest.fixture(scope="session")
def calculator(tmp_path_factory):
    """NVIDIA's cuda_occupancy.h, compiled."""
    folder = tmp_path_factory.mktemp("calculator")
    (folder / "calculator.cpp").write_text(CALCULATOR)
    headers = [f"-I{path}" for path in _nvrtc.newest().includes]
    library = folder / "calculator.so"
    subprocess.run(
        [
            _build.compiler(),
            "-shared",
            "-fPIC",
            "-O1",
            "-w",
            *headers,
            str(folder / "calculator.cpp"),
            "-o",
            str(library),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library)).blocks


def by_calculator(calculator, arch, threads, registers, shared, barriers):
    major, minor = divmod(int(arch[3:]), 10)
    return calculator(major, minor, *GUIDE[arch], threads, registers, shared, barriers)


@settings(max_examples=400)
@given(
    arch=st.sampled_from(sorted(GUIDE)),
    threads=st.integers(1, 1024),
    registers=st.integers(0, 255),
    shared=st.one_of(st.integers(0, 4096), st.integers(0, 240 * 1024)),
    barriers=st.integers(0, 16),
)
def test_occupancy_is_what_nvidias_calculator_says(calculator, arch, threads, registers, shared, barriers):
    if arch == "sm_103" and _nvrtc.newest().version < (13, 5):
        barriers = min(barriers, 1)  # the calculator of CUDA 13.0 has twice as many for it as that of 13.5
    found = occupancy(arch, threads, registers, shared, barriers=barriers)
    assert found.blocks == by_calculator(calculator, arch, threads, registers, shared, barriers)
    assert found.warps == found.blocks * -(-threads // 32)
    assert found.most_warps * 32 == GUIDE[arch][0]


@pytest.mark.parametrize("arch", sorted(GUIDE))
def test_occupancy_at_every_edge(calculator, arch):
    """One thread, register or byte more or less, where the quotient changes."""
    most = GUIDE[arch][2] * 1024
    for threads in (31, 32, 33, 96, 97, 512, 513, 1023, 1024):
        for registers in (0, 1, 8, 9, 31, 32, 33, 64, 65, 127, 128, 129, 255):
            for shared in (
                0,
                1,
                128,
                129,
                48 * 1024,
                48 * 1024 + 1,
                most // 2 - 1024,
                most // 2,
                most - 1,
                most,
                most + 1,
            ):
                found = occupancy(arch, threads, registers, shared).blocks
                assert found == by_calculator(calculator, arch, threads, registers, shared, 1), (
                    threads,
                    registers,
                    shared,
                )


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        ("sm_90a", 128, 168, 0, 3, 12 / 64, "registers"),  # 168 · 32 = 5,376 a warp, 3 warps a quarter
        ("sm_90a", 384, 168, 200 * 1024, 1, 12 / 64, "registers, shared memory"),
        ("sm_80", 256, 32, 0, 8, 1.0, "warps, registers"),  # 2,048 threads of 32 registers are all 65,536
        ("sm_80", 256, 33, 0, 6, 48 / 64, "registers"),  # 33 are given as 40
        ("sm_80", 32, 16, 0, 32, 0.5, "blocks"),
        ("sm_75", 256, 64, 32 * 1024, 2, 0.5, "shared memory"),
        ("sm_75", 256, 32, 0, 4, 1.0, "warps"),
        ("sm_75", 64, 32, 65 * 1024, 0, 0.0, "shared memory"),
        ("sm_86", 1024, 32, 0, 1, 32 / 48, "warps"),
        ("sm_90", 1024, 72, 0, 0, 0.0, "registers"),
    ],
)
def test_occupancy_by_hand(arch, threads, registers, shared, blocks, share, limit):
    found = occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.share, found.limit) == (blocks, share, limit)


def test_named_barriers_limit_from_hopper_on():
    assert occupancy("sm_90", 32, 16, barriers=16).limit == "barriers"
    assert occupancy("sm_90", 32, 16, barriers=16).blocks == 4
    assert occupancy("sm_80", 32, 16, barriers=16).blocks == 32


def test_occupancy_in_words():
    assert str(occupancy("sm_90", 128, 255)) == "2 blocks an SM, 8 of 64 warps (12%), limited by registers"
    assert str(occupancy("sm_90", 1024, 64)).startswith("1 block an SM, 32 of 64 warps (50%)")
    assert str(occupancy("sm_75", 64, 32, 65 * 1024)) == "does not fit on an SM: too much of shared memory"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 0}, "threads must be an int from 1 to 1024, got 0"),
        ({"threads": 1025}, "threads must be an int from 1 to 1024, got 1025"),
        ({"registers": 256}, "registers must be an int from 0 to 255, got 256"),
        ({"registers": 3.0}, r"registers must be an int from 0 to 255, got 3\.0"),
        ({"shared": -1}, "shared must be an int from 0, got -1"),
        ({"barriers": 17}, "barriers must be an int from 0 to 16, got 17"),
        ({"arch": "sm_70"}, "arch must be one of sm_75, sm_80, .*, got 'sm_70'"),
        ({"arch": "hopper"}, "got 'hopper'"),
        ({"arch": 90}, "got 90"),
    ],
)
def test_occupancy_names_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=words):
        occupancy(**{"arch": "sm_90", "threads": 128, "registers": 32} | change)


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    def write(text, name="kernels.cu"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_resources_are_what_the_machine_code_says(written, tmp_path, arch):
    """cuobjdump, which Triton brings, reads them from the code: from Hopper on with the kilobyte that is kept back."""
    import triton

    path = written(KERNELS)
    report = compile_report(path, arch)
    compiled = _nvrtc.compile(KERNELS, path, [k.kernel for k in report], arch)
    (tmp_path / "code.cubin").write_bytes(compiled.cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "code.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"Function (\S+):\n\s+(.*)", said))
    for kernel in report:
        about = lines[compiled.names[kernel.kernel]]
        registers, stack, shared = (int(re.search(rf"{name}:(\d+)", about)[1]) for name in ("REG", "STACK", "SHARED"))
        kept = 1024 if arch == "sm_90a" and shared else 0
        assert (kernel.registers, kernel.stack, kernel.shared) == (registers, stack, shared - kept)
        assert f"CONSTANT[3]:{kernel.constant}" in said


def test_a_report_of_each_kernel_in_its_order(written):
    report = compile_report(written(KERNELS), "sm_80", shared=1000)
    assert [k.kernel for k in report] == ["crowded", "words", "tensor", "tile<16>", "tile<32>"]
    crowded, words, tensor, small, large = report
    assert (small.shared, large.shared) == (16 * 17 * 4, 32 * 33 * 4)
    assert {k.dynamic_shared for k in report} == {1000}
    assert {k.constant for k in report} == {100 * 4 + 2 * 8}
    assert [k.parameters for k in report] == [16, 24, 24, 20, 20]
    assert (crowded.max_threads, crowded.block) == (512, 512)
    assert (words.max_threads, words.block) == (1024, 256)
    assert crowded.registers <= 64  # of 65,536, for two blocks of 512 threads
    assert crowded.spill_stores > 0 < crowded.spill_loads
    assert crowded.stack > 0
    assert words.spill_stores == words.spill_loads == words.stack == 0
    assert (small.barriers, words.barriers) == (1, 0)
    assert large.occupancy == occupancy("sm_80", 256, large.registers, 32 * 33 * 4 + 1000)
    assert dict(words.instructions) == {"shuffle": 2, "atomic": 1, "16-byte load": 1}
    assert dict(small.instructions) == {"barrier": 1}
    assert dict(tensor.instructions)["mma"] == 1
    assert "shuffle" not in dict(tensor.instructions)


def test_hoppers_instructions_are_counted(written):
    (kernel,) = compile_report(written(INSTRUCTIONS))
    assert dict(kernel.instructions) == {"ldmatrix": 1, "cp.async": 2, "TMA": 2, "mbarrier": 1, "barrier": 1}


def test_printed_it_is_a_table(written):
    report = compile_report(written(KERNELS), "sm_80", instances=["tile<16>", "words"], shared=64)
    title, table, *rest = str(report).split("\n\n")
    assert title == f"kernels.cu for sm_80, {_nvrtc.newest()}"
    head, _, first, second, *used = table.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")][:5] == [
        "kernel",
        "registers",
        "spilled",
        "stack",
        "shared",
    ]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[0] == "tile<16>"
    assert cells[4] == "1088 B + 64 B"
    assert cells[8] == f"{report[0].occupancy.warps} of 64"
    assert second.startswith("| words")
    assert used == ["tile<16>: 1 barrier", "words: 2 shuffle, 1 atomic, 1 16-byte load"]
    assert rest == []


def test_what_the_compiler_warns_of_is_shown(written):
    report = compile_report(written("__global__ void k(int *p) { int unused; p[0] = 1; }\n"), "sm_80")
    assert len(report.warnings) == 1
    assert '"unused" was declared but never referenced' in report.warnings[0]
    assert str(report).endswith(report.warnings[0])


def test_warnings_are_each_told_once():
    log = (
        "a.cu(3): warning #177-D: x\n  code\nptxas info    : Used 3\nptxas warning : y\nPotential Performance Loss: z\n"
    )
    log += "Remark: The warnings can be suppressed\nptxas warning : y\n"
    assert warnings(log) == ("a.cu(3): warning #177-D: x", "ptxas warning : y", "Potential Performance Loss: z")


@pytest.mark.parametrize(("block", "threads"), [(64, 64), ((16, 16), 256), ((8, 8, 16), 1024)])
def test_occupancy_is_of_the_block_given(written, block, threads):
    (kernel,) = compile_report(written(KERNELS), "sm_90a", instances=["words"], block=block)
    assert kernel.block == threads
    assert kernel.occupancy == occupancy("sm_90a", threads, kernel.registers, barriers=0)


def test_a_kernel_of_the_library_by_its_name():
    (kernel, *_) = compile_report("matmul.naive", "sm_75")
    assert kernel.kernel.startswith("matmul_naive")
    assert kernel.arch == "sm_75"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "sm_75"}, "arch must be one that kernels.cu is for, sm_80, got 'sm_75'"),
        ({"arch": "sm_70"}, "arch must be one of sm_75"),
        ({"instances": []}, r"instances must be a list of kernels, such as \['sgemm<32>'\], got \[\]"),
        ({"instances": "words"}, "instances must be a list"),
        ({"block": 0}, "block must be one to three positive ints, got 0"),
        ({"block": (1, 1, 1, 1)}, "block must be one to three positive ints"),
        ({"block": (32, 64)}, r"block must have at most 1024 threads, got \(32, 64\)"),
        (
            {"block": 1024, "instances": ["crowded"]},
            "block must be at most 512 threads, by the __launch_bounds__ of crowded",
        ),
        ({"shared": -1}, "shared must be an int from 0, got -1"),
    ],
)
def test_a_report_names_what_is_wrong(written, options, words):
    with pytest.raises(ValueError, match=words):
        compile_report(written("// arch: sm_80\n" + KERNELS), **{"arch": "sm_80"} | options)


def test_a_file_or_kernel_that_is_not_there(written, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is none at .*none\.cu"):
        compile_report(tmp_path / "none.cu")
    with pytest.raises(ValueError, match=r"name must be one of .*matmul\.naive.*got 'matmul\.nonesuch'"):
        compile_report("matmul.nonesuch")
    with pytest.raises(CompileError, match="nonesuch"):
        compile_report(written(KERNELS), "sm_80", instances=["nonesuch"])


# --- what a file says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ("sm_75", "sm_80", "sm_90a")),
        ("// arch: sm_90a\n", ("sm_90a",)),
        ("// A kernel.\n//\n  //arch:  sm_80 , sm_90a  \n", ("sm_80", "sm_90a")),
        ("\n" * 60 + "// arch: sm_90a\n", ("sm_75", "sm_80", "sm_90a")),  # only among the first lines
    ],
)
def test_architectures_of_a_file(text, found):
    assert _targets.architectures(text) == found


@pytest.mark.parametrize("said", ["", "hopper", "sm_80 sm_90", "90a"])
def test_a_comment_that_names_no_architecture_is_refused(said):
    with pytest.raises(ValueError, match="// arch:` must name architectures such as sm_90a"):
        _targets.architectures(f"// arch: {said}\n")


@pytest.mark.parametrize(
    ("said", "arch", "runs"),
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_86", True),
        ("sm_80", "sm_90a", True),
        ("sm_80", "sm_75", False),
        ("sm_90a", "sm_90a", True),
        ("sm_90a", "sm_90", False),  # an architecture's own instructions are on no other
        ("sm_90a", "sm_100a", False),
        ("sm_75, sm_90a", "sm_100a", True),
    ],
)
def test_where_a_file_runs(said, arch, runs):
    assert _targets.runs_on(f"// arch: {said}\n", arch) is runs
    assert _targets.runs_on("", arch)


def test_instances_of_a_file():
    assert _targets.instances(KERNELS) == ("crowded", "words", "tensor", "tile<16>", "tile<32>")
    both = "// instances: f<1, float>, g\ntemplate <int N, class T> __global__ void f() {}\n__global__ void g() {}\n"
    assert _targets.instances(both) == ("f<1, float>", "g")
    with pytest.raises(
        ValueError, match=r"only templates: name instances, instances=\['f<32, 32>'\].*// instances: f<32, 32>"
    ):
        _targets.instances(both.partition("\n")[2].replace("__global__ void g() {}", ""))
    with pytest.raises(ValueError, match="`// instances:` names h<3>, the file has f, g"):
        _targets.instances(both.replace("f<1, float>, g", "h<3>"))
    with pytest.raises(ValueError, match="the file has no kernels"):
        _targets.instances("int x;\n")


def test_braces_of_inline_assembly_end_no_kernel():
    (hopper,) = compile_report("matmul.hopper", "sm_90a")
    assert dict(hopper.instructions)["wgmma"] > 0
