"""The caller's side of `_server`: the handle on the warm process, and what ranks take over from who launches them.

One server is kept for as long as the caller lives. It is the only thing that outlives a launch; a fork of the caller
does not inherit it, and another is started beside it when the environment changes in a way that a running Python
cannot follow, such as a variable that torch reads when it is imported.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

START_LIMIT_S = 300.0  # for a fresh Python to import torch, on a cold disk
FINAL_S = 10.0  # for killed processes to be gone
# Read when torch, numpy and numba are imported: with other values, another server is needed.
_AT_IMPORT = re.compile(r"^(TORCH|PYTORCH|NUMBA|NUMPY|OMP|OPENBLAS|MKL|KMP|GOMP|TRITON|PYTHON|LD_)")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_SERVER = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); "
    "from mlsys.parallel._server import serve; serve(int(sys.argv.pop()))"
)


def surroundings() -> dict[str, Any]:
    """The caller's environment, directory, import path, arguments, warning filters and cores."""
    try:
        cwd = str(Path.cwd())
    except FileNotFoundError:  # removed while we are in it
        cwd = None
    filters = [
        (action, _pattern(message), category.__module__, category.__name__, _pattern(module), line)
        for action, message, category, module, line in warnings.filters
        if isinstance(category, type)  # a tuple of them may be there too, but no function of warnings puts it there
    ]
    path = [os.fspath(entry) for entry in sys.path]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return {
        "environ": dict(os.environ),
        "cwd": cwd,
        "path": path,
        "argv": list(sys.argv),
        "filters": filters,
        "cores": cores,
    }


def _pattern(regex: Any) -> str | None:
    return getattr(regex, "pattern", regex)


def flush() -> None:
    """What the caller has printed comes before what the ranks print."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


class Output:
    """Where a rank's stdout or stderr goes: the caller's own file, or through a pipe to what stands in its place.

    In a notebook, or in a test that captures output, `sys.stdout` is an object of Python's; only this process can
    write to it.
    """

    def __init__(self, name: str) -> None:
        self.stream = getattr(sys, name)
        self.near: int | None = None
        self.error: Exception | None = None  # of a stream that does not take what the ranks print
        if isinstance(self.stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                self.far = os.dup(self.stream.fileno())
                return
        if self.stream is None:
            self.far = os.open(os.devnull, os.O_WRONLY)
            return
        self.near, self.far = os.pipe()
        os.set_blocking(self.near, False)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def close_far(self) -> None:
        if self.far >= 0:
            os.close(self.far)
            self.far = -1

    def forward(self) -> bool:
        """Print what has come; False at the end.

        If the stream raises, the error is kept in `self.error`, and what else comes is read and dropped: a rank must
        not wait for ever with a full pipe.
        """
        assert self.near is not None
        try:
            data = os.read(self.near, 1 << 16)
        except BlockingIOError:
            return False
        text = self.decoder.decode(data, final=not data)
        if text and self.error is None:
            try:
                self.stream.write(text)
            except Exception as error:
                self.error = error
        return bool(data)

    def close(self) -> None:
        self.close_far()
        if self.near is not None:
            while self.forward():
                pass
            os.close(self.near)
            self.near = None
            with contextlib.suppress(Exception):
                self.stream.flush()


# --- the server, from the caller's side -------------------------------------------------------------------------------


class Server:
    """A warm process and the socket to it."""

    def __init__(self, environ: dict[str, str], signature: dict[str, str]) -> None:
        self.signature = signature
        self.control, far = socket.socketpair()
        # macOS kills forked processes that touch some of its libraries, unless told not to.
        apple = {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}
        arguments = [str(far.fileno()), json.dumps([os.fspath(entry) for entry in sys.path])]
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        with far:
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-c", _SERVER, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environ | _ONE_THREAD | apple,
                pass_fds=[far.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is for the caller alone
            )
        try:
            self.control.settimeout(START_LIMIT_S)
            if self.control.recv(1) != b"+":
                raise RuntimeError(f"the launch server ended with status {self.process.wait()}; stderr says why")
            self.control.settimeout(None)
        except BaseException:
            self.process.kill()
            self.process.wait()
            self.control.close()
            raise

    @staticmethod
    def current(environ: dict[str, str]) -> Server:
        """The server for this environment, started if need be."""
        signature = _signature(environ)
        with _lock:
            for server in [server for server in servers if server.process.poll() is not None]:
                servers.remove(server)
                server.close()
            for server in servers:
                if server.signature == signature:
                    return server
            servers.append(Server(environ, signature))
            return servers[-1]

    def hand_over(self, end: socket.socket) -> None:
        """Give it one end of a socket pair; it will read a request from it."""
        with _lock:
            socket.send_fds(self.control, [b"."], [end.fileno()])

    def settle(self) -> None:
        """After an error on its socket: wait until `poll` knows of its death, if it has died."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)

    def close(self) -> None:
        """End it, and with it whatever it runs."""
        self.control.close()
        try:
            self.process.wait(FINAL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def forget(self) -> None:
        """In a fork of the caller: the server is not this process's, and must not be kept alive by it."""
        self.control.close()
        self.process.returncode = 0


def _signature(environ: dict[str, str]) -> dict[str, str]:
    """The settings that a server cannot change after its start."""
    fixed = {name: value for name, value in environ.items() if _AT_IMPORT.match(name) and name not in _ONE_THREAD}
    return fixed | {"": sys.executable}


# What outlives a launch: starting Python and importing torch takes 50 times as long as the rest. It is one server,
# unless the environment changes in a way that a running Python cannot follow.
servers: list[Server] = []
_lock = threading.Lock()


@atexit.register
def _close_servers() -> None:
    while servers:
        servers.pop().close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    while servers:
        servers.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
