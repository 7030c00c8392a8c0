"""The process that is warm: it has torch imported, and becomes n ranks by forking, in less than a tenth of a second.

Three kinds of process, each the parent of the next:

    the user's process ── server (one, idle) ── supervisor (one a launch) ── ranks

The *server* is started on first use by a fresh Python that imports torch and stays single-threaded, so that forking it
is safe: no OpenMP pool, no BLAS threads, no CUDA. It forks a *supervisor* for each launch, which takes on the caller's
directory, environment, `sys.path` and output, forks the ranks, and tells the caller which of them ended and how. A
rank runs the function and sends its result to the caller through a socket of its own.

multiprocessing's forkserver would do for the forking, but its children import `__main__` again (so a script needs a
guard, and a notebook fails) and outlive a parent that was killed. Here nothing outlives anything:

- The user's process dies, even by kill -9: its end of the server's socket closes. The server kills all and exits.
- The server dies: the kernel tells each supervisor (PR_SET_PDEATHSIG), which kills its process group.
- The supervisor dies: the kernel kills its ranks, and the server what they had spawned: all are one process group.

Where there is no PR_SET_PDEATHSIG (macOS), a supervisor looks once a second whether its parent is still the same, and a
thread in each rank waits for a pipe to the supervisor to close.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

FRAME = struct.Struct("<cQ")  # from a rank: what follows, and its bytes
ACCEPTED = b"+"  # from the server, just before it forks: until then nothing of a launch has run
RESULT, RAISED = b"R", b"E"
# What may be imported before forking: it starts no threads and touches no GPU.
PRELOAD = frozenset({"attention", "data", "files", "kernels", "models", "parallel", "perf", "quant", "retrieval"})
_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Fork a supervisor for each message on this socket, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    control = socket.socket(fileno=descriptor)
    parent, own = os.getppid(), os.getpid()

    from mlsys.parallel import _notes

    _notes.watch_torch()
    import torch._dynamo  # noqa: F401 (the first optimizer of a process imports it: more than a second, in each rank)

    import mlsys.parallel  # noqa: F401

    gc.collect()
    gc.freeze()  # the collector would write to every object, and so copy every page into every rank
    wake = _wake_on_child()
    supervisors: set[int] = set()
    control.sendall(b"+")
    try:
        while os.getppid() == parent:
            readable, _, _ = select.select([control, wake], [], [], 1.0)
            if wake in readable:
                wake.recv(4096)
                _reap(supervisors)
            if control in readable:
                received = _receive_descriptors(control, 1)
                if not received:
                    break
                channel = socket.socket(fileno=received[0])
                request = receive_request(channel)
                if request is not None:
                    for name in request["parcel"].modules:
                        if (name.startswith("mlsys.") and name.split(".")[1] in PRELOAD) or name == "pytest":
                            with contextlib.suppress(Exception):
                                importlib.import_module(name)
                    with contextlib.suppress(OSError):
                        channel.sendall(ACCEPTED)
                    pid = os.fork()
                    if pid == 0:
                        control.close()
                        _in_child(partial(supervise, channel, request, own))
                    with contextlib.suppress(OSError):
                        os.setpgid(pid, pid)  # here too: which of the two comes first is not known
                    supervisors.add(pid)
                    for descriptor in request["descriptors"]:
                        os.close(descriptor)
                channel.close()
    finally:
        until = time.monotonic() + 2.0  # the supervisors also see that their caller is gone, and tidy up
        while supervisors and time.monotonic() < until:
            _reap(supervisors)
            time.sleep(0.005)
        for pid in supervisors:
            _kill_group(pid)
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        os._exit(0)  # there is nothing to tidy up, and some extensions complain when Python does


def supervise(channel: socket.socket, request: dict[str, Any], server: int) -> None:
    """Fork the ranks of one launch, report how each ends, and leave nothing running."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    _die_with_parent(signal.SIGTERM)
    wake = _wake_on_child()
    alive_read, alive_write = os.pipe()  # its write end is open as long as this process lives
    pids: dict[int, int] = {}
    own = os.getpid()
    try:
        _become(request)
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.close(alive_write)
                channel.close()
                _in_child(partial(run_rank, rank, request, alive_read, own))
            pids[pid] = rank
        for descriptor in request["descriptors"]:
            os.close(descriptor)
        while pids and os.getppid() == server:
            readable, _, _ = select.select([channel, wake], [], [], 1.0)
            if wake in readable:
                wake.recv(4096)
                _report(channel, pids, os.WNOHANG)
            if channel in readable:
                if channel.recv(1) != b"d":
                    break  # the caller has gone, or has had enough
                for pid in pids:
                    os.kill(pid, signal.SIGUSR1)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _report(channel, pids, 0)
        if not _is_open(channel):
            shutil.rmtree(request["folder"], ignore_errors=True)  # its owner was killed
        os.killpg(0, signal.SIGKILL)  # what the ranks have spawned, and this process


def run_rank(rank: int, request: dict[str, Any], alive: int, supervisor: int) -> NoReturn:
    """One rank: join the others, call the function, hand over what it returns or raises, and wait for the end."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _die_with_parent(signal.SIGKILL, alive)
    if os.getppid() != supervisor:
        os._exit(1)  # it ended before the kernel was told
    stdout, stderr, *sockets = request["descriptors"]
    own = socket.socket(fileno=sockets.pop(rank))
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in (stdout, stderr, *sockets):
        os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    folder = Path(request["folder"])
    stacks = (folder / f"stack-{rank}").open("w", encoding="utf-8")
    faulthandler.enable(stacks)  # a segmentation fault leaves its Python stack there
    faulthandler.register(signal.SIGUSR1, stacks)  # and a hang, when the launcher asks
    pid = os.getpid()
    try:
        kind, data = RESULT, _call(rank, request, folder)
    except BaseException as error:
        if os.getpid() != pid:
            traceback.print_exc()
        kind, data = RAISED, _describe(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C code has printed
    if os.getpid() != pid:  # the function has forked, and its child came back here too: it is no rank, and has no say
        os._exit(int(kind == RAISED))
    with contextlib.suppress(OSError):  # the caller has heard enough, or is gone
        own.sendall(FRAME.pack(kind, len(data)))
        own.sendall(data)
        # Stay until all have finished: a peer may still be reading what this rank has sent it, and would otherwise
        # fail too, with a message about a closed connection that hides the cause.
        own.recv(1)
    os._exit(0)


def _call(rank: int, request: dict[str, Any], folder: Path) -> bytes:
    import torch
    import torch.distributed as dist

    from mlsys.parallel import _loops, _notes, _travel

    ranks, backend, timeout = request["ranks"], request["backend"], request["timeout"]
    _notes.attach(folder / "notes", rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    _set_threads(request["threads"])
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # a forked copy of one state in every rank would be a trap
    fn, args = _travel.unpack(request["parcel"])
    device = None
    if "nccl" in backend:
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    # Longer than the launch's own limit, so that a hang is reported by the launcher, which knows where all ranks are.
    patience = timedelta(seconds=timeout + 60.0)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience, device_id=device)
    _loops.calm()
    result = fn(*args)
    try:
        return _travel.dumps(result)
    except Exception as error:
        raise TypeError(
            f"rank {rank} returned {type(result).__name__} that cannot be pickled ({error}); "
            "return tensors, numbers, strings, or containers of them"
        ) from error


def _describe(error: BaseException) -> bytes:
    """An exception for the caller: when it came, its traceback without our own frames, and itself if it travels."""
    from mlsys.parallel import _travel

    moment = time.monotonic()
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    try:
        words = str(error)
    except Exception as second:
        words = f"(its __str__ raised {type(second).__name__})"
    summary = f"raised {type(error).__name__}: {' '.join(words.split())}".removesuffix(": ")
    report = (moment, summary, text, _travel.dump_error(error), _is_communication(error))
    return pickle.dumps(report)


def _is_communication(error: BaseException) -> bool:
    """Whether this, or what it was raised from, looks like the echo of another rank's failure."""
    pattern = r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|gloo|NCCL|remote process"
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and not any(at is other for other in seen):
        if isinstance(at, ConnectionError | RuntimeError):
            with contextlib.suppress(Exception):  # a __str__ that raises
                if re.search(pattern, str(at)):
                    return True
        seen.append(at)
        at = at.__cause__
    return False


def _become(request: dict[str, Any]) -> None:
    """Take on the caller's environment, directory, import path, arguments, warning filters and cores."""
    os.environ.clear()
    os.environ.update(request["environ"])
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # The ranks share a host. Gloo would look for the address of the host's name, which need not resolve.
        names = {name for _, name in socket.if_nameindex()}
        loopback = next((name for name in ("lo", "lo0") if name in names), None)
        if loopback is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = loopback
    if request["cwd"] is not None:
        os.chdir(request["cwd"])
    if request["cores"] is not None:
        os.sched_setaffinity(0, request["cores"])
    sys.path[:] = request["path"]
    sys.argv[:] = request["argv"]
    importlib.invalidate_caches()
    warnings.resetwarnings()
    for action, message, module, name, where, line in reversed(request["filters"]):
        category = getattr(sys.modules.get(module), name, None)
        if category is not None:  # else its package is not imported here, so that nobody can raise it
            warnings.filterwarnings(action, message or "", category, where or "", line)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if threads > 1:  # numpy's BLAS was loaded with one
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)


def _report(channel: socket.socket, pids: dict[int, int], options: int) -> None:
    """Tell the caller which ranks have ended, and forget them."""
    for pid in list(pids):
        ended, status = os.waitpid(pid, options)
        if ended:
            line = json.dumps([pids.pop(pid), os.waitstatus_to_exitcode(status), time.monotonic()])
            with contextlib.suppress(OSError):
                channel.sendall(line.encode() + b"\n")


def _reap(supervisors: set[int]) -> None:
    for pid in list(supervisors):
        if os.waitpid(pid, os.WNOHANG)[0]:
            _kill_group(pid)  # nothing is left, unless the supervisor itself was killed
            supervisors.discard(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _in_child(body: Any) -> NoReturn:
    """Run the child's part of a fork; never return into the parent's."""
    try:
        body()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _wake_on_child() -> socket.socket:
    """A socket that becomes readable when a child ends."""
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    signal.signal(signal.SIGCHLD, _nothing)
    signal.set_wakeup_fd(write.detach(), warn_on_full_buffer=False)
    return read


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler: an ignored signal would not wake `select`."""


def _die_with_parent(number: int, alive: int | None = None) -> None:
    """Have the kernel send this signal when the process that forked this one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, number, 0, 0, 0)
    elif alive is not None:

        def wait() -> None:
            os.read(alive, 1)  # returns when the last write end, the supervisor's, is closed
            os.kill(os.getpid(), number)

        threading.Thread(target=wait, daemon=True).start()


def _is_open(channel: socket.socket) -> bool:
    """Whether the other end still listens."""
    try:
        channel.sendall(b"\n")
    except OSError:
        return False
    return True


def send_request(channel: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    """The other half of `receive_request`: a length, the descriptors in batches, and the pickled request.

    An OSError means that nothing has run; when this returns, the ranks are about to be forked.
    """
    data = pickle.dumps(request)
    channel.sendall(struct.pack("<QI", len(data), len(descriptors)))
    for start in range(0, len(descriptors), 64):
        socket.send_fds(channel, [b"."], descriptors[start : start + 64])
        _receive(channel, 1)  # one batch a message
    channel.sendall(data)
    _receive(channel, len(ACCEPTED))


def receive_request(channel: socket.socket) -> dict[str, Any] | None:
    """What a caller wants launched; None if it went away."""
    try:
        size, count = struct.unpack("<QI", _receive(channel, 12))
        descriptors: list[int] = []
        while len(descriptors) < count:
            batch = _receive_descriptors(channel, 64)
            if not batch:
                return None
            descriptors += batch
            channel.sendall(b".")
        request: dict[str, Any] = pickle.loads(_receive(channel, size))
    except OSError:
        return None
    request["descriptors"] = descriptors
    return request


def _receive(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = channel.recv_into(view)
        if not got:
            raise ConnectionError("the other side is gone")
        view = view[got:]
    return data


def _receive_descriptors(channel: socket.socket, most: int) -> list[int]:
    message, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(most * array.array("i").itemsize))
    del message
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    for number in numbers:
        os.set_inheritable(number, False)
    return list(numbers)
