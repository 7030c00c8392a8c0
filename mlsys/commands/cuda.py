"""`mlsys cuda run|check|profile|report FILE.cu`: a CUDA kernel run, checked or measured, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.commands._cuda_inputs import Launch
    from mlsys.kernels.cuda import File, Finding, Kernel

EXAMPLES = """examples:
  mlsys cuda check my.cu --grid '(n+255)/256' --block 256             inputs are made up, and said
  mlsys cuda check my.cu --size m=64,n=65,a=64x32 --grid 3,2 --block 32,32
  mlsys cuda run my.cu --driver my_driver.py                          ... or come from a driver
  mlsys cuda profile my.cu --kernel 'sgemm<32>' --driver my_driver.py
  mlsys cuda profile matmul.tiled --kernel 'matmul_tiled<32>' --grid 3,3 --block 32,32 --size m=96,n=96,k=96
  mlsys cuda report my.cu --arch sm_80,sm_90a                         registers, spills, occupancy

A driver is a Python file:

  import torch

  KERNEL = "sgemm<32>"                    # if --kernel does not say it

  def arguments():                        # grid, block, the arguments, and bytes of dynamic shared memory if any
      m, n, k = 65, 33, 17
      a, b, c = torch.randn(m, k), torch.randn(k, n), torch.zeros(m, n)
      return (2, 3), (32, 32), (m, n, k, a, b, c)

  def expected(m, n, k, a, b, c):         # if it is there, `run` compares: what the kernel has to write,
      return {"c": a @ b}                 # by the name of the parameter

exit status: 0 all is well; 1 there are findings, or the result is wrong; 2 it could not be run
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `mlsys cuda`."""
    parser.description = (
        "Run the kernels of a CUDA file on this machine's processor: a race, an access out of bounds or a deadlock is "
        "reported with its line and thread; traffic and bank conflicts are counted by line. Times mean nothing here."
    )
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(dest="kind", metavar="run|check|profile|report", required=True)
    style = argparse.RawDescriptionHelpFormatter

    def add(name: str, line: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=line, description=line, epilog=EXAMPLES, formatter_class=style)
        sub.add_argument("file", metavar="FILE.cu", help="a kernel file, or one of the library's, such as matmul.tiled")
        sub.add_argument("--kernel", metavar="NAME", help="which kernel; a template's instance, 'sgemm<32>'")
        sub.add_argument("--include", action="append", default=[], metavar="FOLDER", help="for #include (repeatable)")
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    run_ = add("run", "run a kernel and say what it wrote; with a driver, whether that is right")
    run_.add_argument("--order", type=int, default=0, help="of threads: 0 up, 1 down, else warps at random (0)")
    check = add("check", "look for races, accesses out of bounds, missing barriers, deadlocks")
    profile = add("profile", "count the memory traffic and bank conflicts of each line")
    for sub in (run_, check, profile):
        sub.add_argument("--driver", type=Path, metavar="FILE.py", help="makes the arguments; see below")
        sub.add_argument("--grid", metavar="X[,Y[,Z]]", help="blocks; may be a formula of the sizes, '(n+31)/32'")
        sub.add_argument("--block", metavar="X[,Y[,Z]]", help="threads of a block")
        sub.add_argument("--shared", metavar="BYTES", help="dynamic shared memory (0)")
        sub.add_argument(
            "--size", action="append", default=[], metavar="NAME=N,…", help="of ints and floats; tensors: a=64x32"
        )
        sub.add_argument("--seed", type=int, default=0, help="of made-up inputs (0)")
        sub.add_argument("--limit", type=seconds, default=60.0, metavar="S", help="seconds it may take (60)")

    report = add("report", "compile for GPUs that need not be here: registers, spills, shared memory, occupancy")
    report.add_argument("--arch", default="sm_80,sm_90a", metavar="SM,…", help="for which (sm_80,sm_90a)")
    report.add_argument("--block", metavar="X[,Y[,Z]]", help="threads of a block, for occupancy")
    report.add_argument("--shared", metavar="BYTES", help="dynamic shared memory (0)")


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Do what is asked; what the compiler says is shown as it says it."""
    from mlsys.kernels.cuda import CompileError, NoCompiler

    try:
        return _report(args) if args.kind == "report" else _launch(args)
    except NoCompiler as missing:
        raise UsageError(str(missing)) from missing
    except CompileError as refused:
        print(refused, file=sys.stderr)
        return 2


def _launch(args: argparse.Namespace) -> int:
    from mlsys.commands import _cuda_inputs
    from mlsys.kernels.cuda import KernelError

    file = _file(args)
    given = _cuda_inputs.from_driver(args.driver) if args.driver else None
    kernel = _kernel(file, args.kernel or (given.kernel if given else None))
    launch = given.launch(args) if given else _cuda_inputs.made_up(kernel, args)
    if launch.notes and not args.json:
        print("made up, since there is no --driver:")
        print("".join(f"  {note}\n" for note in launch.notes))
    try:
        return {"run": _run, "check": _check, "profile": _profile}[args.kind](kernel, launch, args)
    except KernelError as stopped:
        _show(stopped.findings, args.json)
        return 1


def _run(kernel: Kernel, launch: Launch, args: argparse.Namespace) -> int:
    from mlsys.commands import _cuda_inputs

    before = _cuda_inputs.copies(launch.args)
    kernel(launch.grid, launch.block, *launch.args, shared=launch.shared, order=args.order, limit=args.limit)
    results = _cuda_inputs.results(kernel, before, launch)
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        where = f"{_sizes(launch.grid)} blocks of {_sizes(launch.block)} threads"
        print(f"{kernel.name} has run: {where}, {launch.shared} bytes of dynamic shared memory")
        print("".join(f"  {result}\n" for result in results) or "  it wrote to no tensor\n", end="")
    return 0 if all(result.right is not False for result in results) else 1


def _check(kernel: Kernel, launch: Launch, args: argparse.Namespace) -> int:
    from mlsys.kernels.cuda import check

    found = check(kernel, launch.grid, launch.block, *launch.args, shared=launch.shared, limit=args.limit)
    _show(found, args.json)
    if not found and not args.json:
        print(f"{kernel.name}: nothing was found")
    return 1 if found else 0


def _profile(kernel: Kernel, launch: Launch, args: argparse.Namespace) -> int:
    from mlsys.kernels.cuda import profile

    counted = profile(kernel, launch.grid, launch.block, *launch.args, shared=launch.shared, limit=args.limit)
    if not args.json:
        print(counted)
        return 0
    names = ("flops", "bytes", "ideal_bytes", "least_bytes", "sectors", "shared_passes", "conflicts")
    totals = {name: getattr(counted, name) for name in names}
    rows = [asdict(access) for access in counted.accesses]
    print(json.dumps({"kernel": counted.kernel, **totals, "accesses": rows}, indent=2))
    return 0


def _report(args: argparse.Namespace) -> int:
    from mlsys.commands._cuda_inputs import sizes
    from mlsys.kernels.cuda import NoNVRTC, compile_report

    file = _file(args)
    instances = [_kernel(file, args.kernel).name] if args.kernel else None
    block = sizes("--block", args.block, {}) if args.block else None
    (shared,) = sizes("--shared", args.shared or "0", {})
    reports = []
    for arch in args.arch.split(","):
        try:
            reports.append(
                compile_report(
                    file.path, arch.strip(), instances=instances, block=block, shared=shared, includes=file.includes
                )
            )
        except NoNVRTC as missing:
            raise UsageError(str(missing)) from missing
    if args.json:
        print(json.dumps([asdict(kernel) for report in reports for kernel in report], indent=2))
    else:
        print("\n\n".join(map(str, reports)))
    return 0


def _file(args: argparse.Namespace) -> File:
    """The student's file; where there is none, the library's of that name."""
    from mlsys.kernels.cuda import load, source

    path = Path(args.file)
    if not path.is_file() and path.suffix != ".cu":
        from mlsys import catalog

        own = [kernel.stem for kernel in (catalog.PACKAGE / "kernels").glob("*.cu")]
        if args.file not in own:
            near = catalog.nearest(args.file, own)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(own))}"
            raise UsageError(f"{args.file!r} is neither a file nor one of the library's kernels; {remedy}")
        path = source(args.file)
    return load(path, includes=args.include)


def _kernel(file: File, name: str | None) -> Kernel:
    """The kernel of this name; without one, the file's only kernel."""
    if name is None:
        if len(file) > 1:
            raise UsageError(f"{file.path.name} has several kernels, choose one with --kernel: {', '.join(file)}")
        (name,) = file
    return file[name]


def _show(found: list[Finding], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n\n".join(map(str, found)))


def _sizes(sizes: tuple[int, ...]) -> str:
    return " × ".join(map(str, sizes))
