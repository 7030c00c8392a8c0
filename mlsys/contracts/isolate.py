"""The same check, in a process that can be killed.

Someone's code may loop for ever, eat the memory, call `exit`, or crash the interpreter.
So it runs in a child process, which says over a pipe which case it is about to run and,
at the end, the verdict. When the child is silent for too long or dies, the parent knows
the case, asks Python's fault handler for the line, and ends the child with everything it started.

    parent                         child (own session, own process group)
      ── what to check, stdin ──▶    import the contract
      ◀── ready ─────────────────    (the time limit starts here)
      ◀── case 0, case 1, … ─────    import the file, run the cases
      ◀── verdict ───────────────

Messages are lines of JSON on a pipe of their own, each with a token that only these two know:
what the code prints goes to the parent's standard error and is not mistaken for a verdict. This
stops accidents and cheap tricks. It is no sandbox: code that sets out to attack the checker shares
a process with it.

Cost:
    One start of Python and of torch, 1 to 3 s, and the check itself.

See also:
    `mlsys.contracts.core` (the check), `mlsys.loading` (how the file is imported), `mlsys.bench.isolate` (someone's
    code timed in such a process).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import linecache
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import psutil

from mlsys import loading
from mlsys.contracts import find
from mlsys.contracts.core import Contract, Failure, Verdict, check

START = "import sys, json, importlib; spec = json.loads(sys.stdin.buffer.read()); sys.path[:] = spec['path']; "
START += "importlib.import_module(spec['server']).serve(spec)"
COOKIE = "MLSYS_CHECK"  # in the environment of the child and so of all that it starts: how they are found again
RAISED = {kind.__name__: kind for kind in (ValueError, TypeError, LookupError, ImportError, FileNotFoundError)}
LONGEST_LINE = 1 << 20


def check_isolated(
    name: str,
    target: str | None = None,
    *,
    seed: int = 0,
    limit_s: float = 60.0,
    device: str = "cpu",
    start_limit_s: float = 300.0,
    memory_bytes: int | None = None,
) -> Verdict:
    """The verdict of the contract `name` on `target`, "FILE.py:FUNCTION" (None: the library's own reference).

    `name` is a technique ("attention.flash") or, for a contract of one's own, "FILE.py:CONTRACT". Importing
    the file and running the cases may take `limit_s` seconds and, on the CPU, `memory_bytes` beyond what
    Python and torch take (None: three quarters of the machine's memory); starting Python and importing the
    contract, `start_limit_s`. Passing a limit, dying, or exiting is a failure of the case that was running.

    Raises what `loading.load_function` raises if the target cannot be loaded, LookupError for an unknown
    contract, and RuntimeError if the check itself breaks, which is not the implementation's fault.
    """
    if os.name != "posix":
        raise OSError(f"isolated checks need POSIX process groups, and this is {os.name!r}")
    if not limit_s > 0:
        raise ValueError(f"limit_s must be positive, got {limit_s}")
    path = loading.split(target)[0] if target else None  # say what is wrong with it before starting anything
    spec = {"name": name, "target": target, "seed": seed, "device": device, "memory_bytes": memory_bytes}
    with child(__name__, spec) as started:
        return _verdict(started, name, limit_s, start_limit_s, path)


# --- the parent -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(server: str, spec: dict[str, Any]) -> Iterator[Child]:
    """A child that calls `serve` of the module `server` with this spec; at the end it is gone, with all it started.

    So it is where this process is told to end (SIGTERM, unless it has a handler of its own for that, or this is not
    the main thread). On Linux the child also ends with the thread that started it, however that ends.
    """
    token, cookie = secrets.token_hex(16), secrets.token_hex(16)
    read_end, write_end = os.pipe()
    with _leaving_on_sigterm(), tempfile.TemporaryFile() as stack, os.fdopen(read_end, "rb", buffering=0) as channel:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", START],  # -P: a file here named `random.py` is not to be imported
                stdin=subprocess.PIPE,
                stdout=2,  # what the code prints is for the reader, not for whoever parses our output
                pass_fds=(write_end, stack.fileno()),
                start_new_session=True,
                env={**os.environ, COOKIE: cookie},
            )
        finally:
            os.close(write_end)
        try:
            spec = {
                **spec,
                "server": server,
                "path": [entry for entry in sys.path if entry],
                "token": token,
                "parent": os.getpid(),
                "channel": write_end,
                "stack": stack.fileno(),
            }
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; whoever reads its messages says so
                process.stdin.write(json.dumps(spec).encode())
                process.stdin.close()
            yield Child(process, channel, stack, token)
        finally:
            _end(process, cookie)


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit in here, so that what is to be cleaned up is."""
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)  # as a shell reports it

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Child:
    """The parent's view of the child: what it says, where it is stuck, how it ended."""

    def __init__(self, process: subprocess.Popen[bytes], channel: IO[bytes], stack: IO[bytes], token: str):
        self.process = process
        self.channel = channel
        self.stack = stack
        self.token = token

    def messages(self, wait_s: float = 0.05) -> Iterator[dict[str, Any] | None]:
        """What the child says, None whenever it is time to look at the clock; ends when the child has."""
        os.set_blocking(self.channel.fileno(), False)
        buffer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ)
            while True:
                ended = self.process.poll() is not None  # first: what it said before it ended is in the pipe by now
                ready = selector.select(0 if ended else wait_s)
                data = self.channel.read(1 << 16) if ready else None
                if data:
                    *lines, buffer = (buffer + data)[-LONGEST_LINE:].split(b"\n")
                    yield from filter(None, map(self.parse, lines))
                elif ended:
                    return
                elif data == b"":  # it closed the pipe and lives on
                    time.sleep(wait_s)
                yield None

    def parse(self, line: bytes) -> dict[str, Any] | None:
        """A message of ours, or None for anything else that was written to the pipe."""
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) and message.get("token") == self.token else None

    def ending(self) -> str:
        """How it ended, in words; waits for it."""
        return _ending(self.process.wait())

    def exited(self) -> bool:
        """Whether it ended by leaving, with whatever status, not by a signal; waits for it."""
        return self.process.wait() >= 0

    def stuck_at(self, path: Path | None) -> str:
        """Ask the child's fault handler which line it is at: ", at my.py:12 in my_flash"."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        size, patience = -1, time.monotonic() + 1.0
        while time.monotonic() < patience:
            now = os.fstat(self.stack.fileno()).st_size
            if now and now == size:  # it has written, and has stopped writing
                break
            size = now
            time.sleep(0.02)
        return self.last_line(path)

    def last_line(self, path: Path | None) -> str:
        """The innermost line of this file in the stacks that the fault handler wrote, if it wrote any."""
        self.stack.seek(0)
        text = self.stack.read().decode(errors="replace")
        if path is None:
            return ""
        escaped = str(path).encode("ascii", "backslashreplace").decode()  # as the fault handler writes it
        current = text[text.find("Current thread") :] if "Current thread" in text else text
        frame = re.search(rf'File "{re.escape(escaped)}", line (\d+) in (\S+)', current)
        frame = frame or re.search(rf'File "{re.escape(escaped)}", line (\d+) in (\S+)', text)
        if frame is None:
            return ""
        code = linecache.getline(str(path), int(frame[1])).strip()
        inside = "" if frame[2] == "<module>" else f" in {frame[2]}"
        return f" at {path.name}:{frame[1]}{inside}" + (f": `{code}`" if code else "")


def reraise(message: dict[str, Any]) -> NoReturn:
    """Raise here what the child's message "error" says was raised there."""
    raise RAISED.get(message["kind"], RuntimeError)(message["message"])


def _verdict(child: Child, name: str, limit_s: float, start_limit_s: float, path: Path | None) -> Verdict:
    """Wait for the verdict, or for the end of time or of the process, which is one too."""
    running: dict[str, Any] | None = None  # the case that was last begun
    failure: Failure | None = None  # known before the search for its hint, and kept if that dies
    cases = 0
    started: float | None = None
    deadline = time.monotonic() + start_limit_s

    def broken(message: str, since: float) -> Verdict:
        """The verdict when the child could not give one."""
        if running is None:
            message += f" (while importing {path.name})" if path else " (before the first case)"
        return Verdict(name, cases, failure or Failure(running or {}, {}, message), time.monotonic() - since)

    for message in child.messages():
        if message is None:  # nothing new
            if time.monotonic() < deadline:
                continue
            if started is None:
                raise RuntimeError(f"the check did not start within {start_limit_s:g} s")
            return broken(f"no answer within {limit_s:g} s{child.stuck_at(path)}; an endless loop?", started)
        match message["event"]:
            case "ready":
                started = time.monotonic()
                deadline = started + limit_s
            case "case":
                running, cases = message["case"], message["index"] + 1
            case "failure":
                failure = Failure(**message["failure"])
            case "error":
                reraise(message)
            case "verdict":
                found = Failure(**message["failure"]) if message["failure"] else None
                return Verdict(message["contract"], message["cases"], found, message["seconds"])
    how = child.ending()
    if started is None:
        raise RuntimeError(f"the check did not start: its process {how}")
    return broken(f"the process {how}{child.last_line(path)}", started)


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exited with status {status} before it had answered"
    number = -status
    words = signal.strsignal(number) or "unknown"
    note = ", out of memory?" if number == signal.SIGKILL else ""
    return f"died by signal {number} ({words.lower()}{note})"


def _end(process: subprocess.Popen[bytes], cookie: str) -> None:
    """Kill the child's group, then whatever has left the group but still carries the cookie."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()
    for _ in range(10):  # one of them may just be starting another
        strays = [other for other in psutil.process_iter() if _carries(other, cookie)]
        if not strays:
            return
        for stray in strays:
            with contextlib.suppress(psutil.Error):
                stray.kill()


def _carries(process: psutil.Process, cookie: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(COOKIE) == cookie
    except (psutil.Error, OSError):  # gone, or not ours
        return False


# --- the child --------------------------------------------------------------------------------------------------------


def serve(spec: dict[str, Any]) -> None:
    """Check what `spec` asks for; does not return."""
    answer(spec, _answer)


def answer(spec: dict[str, Any], work: Callable[[dict[str, Any], Callable[..., None]], None]) -> None:
    """Do `work(spec, send)`, which says what it does by `send(event, **fields)`; does not return."""
    own_pid = os.getpid()
    _die_with(spec["parent"])
    os.set_inheritable(spec["channel"], False)
    os.set_inheritable(spec["stack"], False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable(file=spec["stack"])
    faulthandler.register(signal.SIGUSR1, file=spec["stack"])

    def send(event: str, **fields: Any) -> None:
        if os.getpid() != own_pid:  # a fork of the code under check that came back here
            os._exit(1)
        _flush()  # who reads the last message ends this process, and what was printed before is to be seen
        # the first newline ends whatever else may have been written to the pipe
        line = f"\n{json.dumps({'token': spec['token'], 'event': event, **fields}, default=repr)}\n".encode()
        while line:
            line = line[os.write(spec["channel"], line) :]

    try:
        work(spec, send)
    except Exception as error:
        kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in RAISED), "RuntimeError")
        text = str(error) if type(error) in (*RAISED.values(), RuntimeError) else loading.one_line(error)
        send("error", kind=kind, message=text)
    _flush()
    os._exit(0)  # not by returning: the code under check may have left threads and exit handlers


def _flush() -> None:
    """Write out what was printed, if these are still files."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


def _die_with(parent: int) -> None:
    """End with the parent, however that ends: killed, it cannot end us. Only Linux has this."""
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent:  # it had ended before we asked
        os._exit(1)


def _answer(spec: dict[str, Any], send: Any) -> None:
    """Load and check, sending each step."""
    contract = resolve(spec["name"])
    if spec["device"] == "cpu":
        limit_memory(spec["memory_bytes"])
    send("ready")
    sys.dont_write_bytecode = True  # from here on it is someone else's folder
    impl = loading.load_function(spec["target"]) if spec["target"] else contract.reference
    running: tuple[int, dict[str, Any]] = (0, {})
    started = time.perf_counter()

    def on_case(index: int, case: Any) -> None:
        nonlocal running
        running = (index, dict(case))
        send("case", index=index, case=running[1])

    def on_failure(failure: Failure) -> None:
        send("failure", failure=asdict(failure))

    try:
        verdict = check(
            contract, impl, seed=spec["seed"], device=spec["device"], on_case=on_case, on_failure=on_failure
        )
    except Exception as error:  # `check` answers for what the implementation raises
        raise RuntimeError(f"the contract {contract.name} itself failed: {loading.one_line(error)}") from error
    except BaseException as error:  # KeyboardInterrupt and the like; nobody types Ctrl-C in this session
        failure = Failure(running[1], {}, f"raised {loading.one_line(error)}")
        verdict = Verdict(contract.name, running[0] + 1, failure, time.perf_counter() - started)
    send("verdict", **asdict(verdict))


def resolve(name: str) -> Contract:
    """The contract of a technique, or the one that "FILE.py:CONTRACT" names."""
    if ":" not in name:
        return find(name)
    found = loading.load_object(name)
    if not isinstance(found, Contract):
        raise TypeError(f"{name} is not a Contract but {type(found).__name__}")
    return found


def limit_memory(more: int | None) -> None:
    """Let this process map `more` bytes beyond what it has; an allocation past that raises MemoryError."""
    import resource

    if more is None:
        more = psutil.virtual_memory().total * 3 // 4
    limit = psutil.Process().memory_info().vms + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses: there, the system's own limit has to do
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
