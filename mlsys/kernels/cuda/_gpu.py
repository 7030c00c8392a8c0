"""Launch kernels on an NVIDIA GPU: compile a file for the GPU at hand, load it once, convert arguments, launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlsys.kernels.cuda import _nvrtc, _signature, _source, _targets
from mlsys.kernels.cuda._arguments import convert
from mlsys.kernels.cuda._driver import CudaError, Function, driver

if TYPE_CHECKING:
    from mlsys.kernels.cuda._runner import Kernel


def launch(
    kernel: Kernel,
    device: torch.device,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared: int,
    stream: Any,
) -> None:
    """Onto `stream`, torch's current one if None, without waiting for it to end.

    TypeError or ValueError naming the argument, CompileError, NoNVRTC, or CudaError if the driver refuses the launch:
    what goes wrong while a kernel runs is said by torch's next call that waits.
    """
    file, name = kernel.file, kernel.name
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    handle = stream_handle(stream, device)
    # all kernels that are no templates are compiled together; an instance by itself
    plain = tuple(n for n, d in file.declared.items() if not d.template)
    names = plain if name in plain else (name,)
    with torch.cuda.device(ordinal):
        function, codes = _loaded(file.text, file.path, names, file.includes, ordinal)[name]
        arguments = convert(kernel.declared, codes, args)
        try:
            function.launch(grid, block, shared, handle, arguments.pointers)
        except CudaError as error:
            raise CudaError(
                f"{name} cannot be launched with grid {tuple(grid)}, block {tuple(block)} and {shared} bytes of "
                f"dynamic shared memory: {error}; see compile_report({str(file.path)!r}, {architecture(ordinal)!r})"
            ) from None


def architecture(device: int | torch.device | None = None) -> str:
    """What to compile for on a device: `sm_90a` on an H100. The `a`, from Hopper on: with what only that GPU has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def stream_handle(stream: Any, device: torch.device) -> int:
    """The driver's handle of a stream: torch's, of anything with `__cuda_stream__`, or the number itself. TypeError."""
    if stream is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise TypeError(
        f"stream must be a torch.cuda.Stream, an object with __cuda_stream__, or its address, got {stream!r}"
    )


@cache
def _loaded(
    text: str, path: Path, names: tuple[str, ...], includes: tuple[Path, ...], ordinal: int
) -> dict[str, tuple[Function, list[str]]]:
    """A file's kernels on a device, and the codes of their parameters."""
    arch = architecture(ordinal)
    if not _targets.runs_on(text, arch):
        raise ValueError(f"{path.name} is for {', '.join(_targets.architectures(text))} only, and this GPU is {arch}")
    toolkit = _nvrtc.newest(
        driver().version()[0]
    )  # a driver loads code of its own major version of CUDA, and of older ones
    compiled = _nvrtc.compile(text, path, names, arch, includes=includes, toolkit=toolkit)
    declared = _source.kernels(text)
    found = driver().functions(ordinal, compiled.cubin, list(compiled.names.values()))
    return {
        name: (
            found[mangled],
            _signature.codes(mangled, compiled.ptx, declared[_source.base_name(name).split("::")[-1]]),
        )
        for name, mangled in compiled.names.items()
    }
