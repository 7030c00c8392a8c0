"""Load a CUDA kernel file and launch its kernels: on an NVIDIA GPU, or on the processor, where mistakes are explained.

One file, three ways to run it. On a GPU it is compiled by NVRTC for that GPU and launched on torch's stream. On
the CPU it is compiled as C++: each CUDA thread is a fiber, which runs until it has to wait for others, and blocks are
spread over the cores. `check` runs it with every access to memory watched. Where a kernel runs is decided by where its
tensors are.

    kernels = load("my.cu")
    kernels["sgemm<32>"]((n // 32, n // 32), (32, 32), n, n, n, a, b, c)
    for finding in check(kernels["sgemm<32>"], (n // 32, n // 32), (32, 32), n, n, n, a, b, c):
        print(finding)

Arguments are torch tensors, ints and floats, each converted by what the kernel's own signature says: a Python float
given to a `float` parameter is one, never a double, and a tensor of another type than the pointer's is refused.

Cost:
    On the CPU a barrier or a shuffle costs each thread some 10 to 20 ns, arithmetic what it costs a processor's core.
    Compiling a kernel takes half a second to a second, and the runtime some seconds, once each: what is compiled is
    kept. `check` takes several times as long.

Memory:
    64 KiB of stack a thread, 1,024 threads a core, touched only where used. `check` keeps 32 bytes for each 4 bytes
    of the tensors that are touched, and each core its own.

Where it differs from a GPU: blocks run one after the other on a core, threads of a warp one after the other between two
meetings. A program that is right under CUDA's rules is right here; one that breaks them may look right here and not
there, which is what `check` is for. The time it takes says nothing of a GPU's: count traffic with `profile` instead.

Papers:
    Stratton, Stone & Hwu 2008, "MCUDA: An Efficient Implementation of CUDA Kernels for Multi-core CPUs", LCPC (threads
    of a block as loops between barriers; here they are fibers).
    Flanagan & Freund 2009, "FastTrack: Efficient and Precise Dynamic Race Detection", PLDI (epochs in place of clocks).
    Serebryany & Iskhodzhanov 2009, "ThreadSanitizer: Data Race Detection in Practice", WBIA (the instrumentation).

See also:
    `mlsys.kernels.matmul_cuda` (a ladder of kernels); compute-sanitizer and Nsight Compute ask the same on a GPU.
"""

from mlsys.kernels.cuda._build import CompileError, NoCompiler
from mlsys.kernels.cuda._driver import CudaError
from mlsys.kernels.cuda._findings import Finding
from mlsys.kernels.cuda._nvrtc import NoNVRTC
from mlsys.kernels.cuda._occupancy import Occupancy, occupancy
from mlsys.kernels.cuda._profile import Access, Profile
from mlsys.kernels.cuda._report import KernelReport, Report, compile_report
from mlsys.kernels.cuda._runner import File, Kernel, KernelError, check, load, profile, source
from mlsys.kernels.cuda._tensor_map import TensorMap, tensor_map

__all__ = [
    "Access",
    "CompileError",
    "CudaError",
    "File",
    "Finding",
    "Kernel",
    "KernelError",
    "KernelReport",
    "NoCompiler",
    "NoNVRTC",
    "Occupancy",
    "Profile",
    "Report",
    "TensorMap",
    "check",
    "compile_report",
    "load",
    "occupancy",
    "profile",
    "source",
    "tensor_map",
]
