"""Code that loops, dies, exits, hoards or leaves children behind is reported, and nothing of it remains."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from mlsys.contracts.isolate import COOKIE, check_isolated

TOY = f"{Path(__file__).with_name('toy.py')}:SOFTMAX"
OURS = f"MLSYS_TEST_{os.getpid()}"  # others may be testing on this machine
RIGHT = """
    import numpy as np
    def softmax(x, *, temperature=1.0):
        e = np.exp(x / temperature - (x / temperature).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """The verdict on a function `softmax` with this source."""

    monkeypatch.setenv(OURS, "1")

    def run(source, **settings):
        lines = source.strip("\n").splitlines()
        margin = len(lines[0]) - len(lines[0].lstrip())
        (tmp_path / "mine.py").write_text("\n".join(line[margin:] for line in lines))
        return check_isolated(TOY, f"{tmp_path / 'mine.py'}:softmax", **{"limit_s": 30.0, **settings})

    return run


def body(*lines):
    return "import os, sys, time\ndef softmax(x, *, temperature=1.0):\n" + "\n".join(f"    {line}" for line in lines)


def test_reference_and_a_right_implementation_pass(judge):
    assert judge(RIGHT).passed
    verdict = check_isolated(TOY)
    assert verdict.passed
    assert (verdict.contract, verdict.cases) == ("toy.softmax", 5)
    assert verdict.seconds > 0


def test_wrong_implementation_fails_as_it_would_in_this_process(judge):
    verdict = judge(RIGHT.replace("/ temperature", "/ 1"))
    assert verdict.failure.case == {"rows": 2, "columns": 5, "temperature": 0.5}
    assert verdict.failure.shapes["x"] == "(2, 5) float32"
    assert verdict.failure.like == "no_temperature"
    assert verdict.failure.hint == "divide by the temperature"


def test_endless_loop_is_reported_with_case_and_line(judge):
    verdict = judge(body("while x.shape != (1, 1):", "    pass", "return x / x"), limit_s=1.0)
    assert verdict.failure.case == {"rows": 3, "columns": 3}
    assert verdict.failure.message.startswith("no answer within 1 s at mine.py:")
    assert "in softmax: `" in verdict.failure.message
    assert "an endless loop?" in verdict.failure.message
    assert verdict.cases == 2


def test_endless_loop_while_importing(judge):
    verdict = judge("while True:\n    pass", limit_s=1.0)
    assert "no answer within 1 s at mine.py:" in verdict.failure.message
    assert "(while importing mine.py)" in verdict.failure.message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("os.kill(os.getpid(), 11)", "died by signal 11 (segmentation fault)"),
        ("import ctypes; ctypes.string_at(0)", "died by signal 11 (segmentation fault) at mine.py:3 in softmax"),
        ("os.abort()", "died by signal 6 (aborted)"),
        ("os.kill(os.getpid(), 9)", "died by signal 9 (killed, out of memory?)"),
        ("os._exit(3)", "exited with status 3 before it had answered"),
        ("os._exit(0)", "exited with status 0 before it had answered"),
    ],
)
def test_death_is_reported_with_its_case(judge, line, says):
    verdict = judge(body(line))
    assert says in verdict.failure.message
    assert verdict.failure.case == {"rows": 1, "columns": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sys.exit(0)", "raised SystemExit: 0, at mine.py:3 in softmax: `sys.exit(0)`"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("return softmax(x)", "raised RecursionError: maximum recursion depth exceeded"),
        ("return x.no_such", "AttributeError: 'numpy.ndarray' object has no attribute 'no_such', at mine.py:3"),
        ("return [bytes(10**8) for _ in range(10**5)]", "raised MemoryError"),
    ],
)
def test_exceptions_of_every_kind_are_failures(judge, line, says):
    assert says in judge(body(line), memory_bytes=1 << 30).failure.message


def test_printing_a_verdict_forges_nothing(judge, capfd):
    forged = '{"event": "verdict", "token": "", "contract": "toy.softmax", "cases": 5, "failure": null, "seconds": 0}'
    lines = [f"for fd in (1, 2, *range(3, 40)):\n        try: os.write(fd, b'\\n' + {forged!r}.encode() + b'\\n')"]
    verdict = judge(body(*lines, "    except OSError: pass", "os._exit(0)"))
    assert "exited with status 0" in verdict.failure.message
    printed = capfd.readouterr()
    assert printed.out == ""  # what the code prints goes to standard error
    assert "verdict" in printed.err


FLOOD = """
    import os
    def flood():
        for fd in range(3, 40):
            try: os.write(fd, b"x" * 4096)
            except OSError: pass
    def softmax(x, *, temperature=1.0):
        {}
"""


def test_noise_on_the_pipe_does_not_stop_the_clock(judge):
    assert "no answer within 1 s" in judge(FLOOD.format("while True: flood()"), limit_s=1.0).failure.message


def test_noise_on_the_pipe_does_not_hide_the_verdict(judge):
    assert judge(FLOOD.format("flood(); return x / x")).failure.case == {"rows": 3, "columns": 3}


def test_closing_the_pipe_is_no_way_out(judge):
    assert "exited with status" in judge(body("os.closerange(3, 1000)", "return x / x")).failure.message
    verdict = judge(body("os.closerange(3, 1000)", "while True: pass"), limit_s=1.0)
    assert "no answer within 1 s" in verdict.failure.message


def test_arguments_and_standard_input_tell_nothing(judge):
    verdict = judge(body("raise ValueError(repr((sys.argv, sys.stdin.read())))"))
    assert "(['-c'], '')" in verdict.failure.message


def carriers():
    """Living processes that a check of ours has started: what it starts has our environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and {COOKIE, OURS} <= process.environ().keys():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("session", [False, True], ids=["same group", "a session of its own"])
@pytest.mark.parametrize("ends", ["while True: pass", "os._exit(0)", "return x / x"])
def test_nothing_is_left_of_what_the_code_started(judge, session, ends):
    start = f"import subprocess; subprocess.Popen(['sleep', '600'], start_new_session={session})"
    assert not carriers()
    assert not judge(body(start, ends), limit_s=1.0 if "while" in ends else 30.0).passed
    assert not carriers()


@pytest.mark.parametrize("how", [signal.SIGTERM] + [signal.SIGKILL] * (sys.platform == "linux"))
def test_nothing_is_left_when_the_checker_itself_is_killed(tmp_path, how):
    # SIGTERM leaves time to find what left the group; of SIGKILL only the child itself hears
    start = "subprocess.Popen(['sleep', '600'], start_new_session=True, pass_fds=[line.fileno()])"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        source = f"""
            import socket, subprocess, time
            line = socket.create_connection({server.getsockname()})
            {start if how == signal.SIGTERM else ""}
            line.send(b"here")
            while True:
                time.sleep(1)
        """
        (tmp_path / "mine.py").write_text(textwrap.dedent(source))
        checker = "import sys; from mlsys.contracts.isolate import check_isolated; check_isolated(*sys.argv[1:])"
        with subprocess.Popen([sys.executable, "-c", checker, TOY, f"{tmp_path / 'mine.py'}:f"]) as process:
            line, _ = server.accept()
            with line:
                line.settimeout(60)
                assert line.recv(4) == b"here"
                process.send_signal(how)
                assert process.wait(60) == (128 + how if how == signal.SIGTERM else -how)
                assert line.recv(1) == b""  # closed by the last that held it, before the minute is over


def test_ones_own_handler_of_sigterm_is_left_alone(judge):
    def mine(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert judge(RIGHT).passed
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert judge(RIGHT).passed
    assert signal.getsignal(signal.SIGTERM) is before


def test_fork_that_comes_back_does_not_answer(judge):
    verdict = judge(body("if os.fork() == 0: return x * 0", "time.sleep(0.05)", "return x / x"))
    assert verdict.failure.case == {"rows": 3, "columns": 3}
    assert not carriers()


def test_file_that_cannot_be_loaded_is_not_a_failure_but_an_error(judge, tmp_path):
    with pytest.raises(ImportError, match=r"mine.py:1: `def softmax\(`: SyntaxError"):
        judge("def softmax(")
    with pytest.raises(LookupError, match="has no 'softmax'; did you mean softmx"):
        judge("def softmx(): pass")
    with pytest.raises(FileNotFoundError, match="no file"):
        check_isolated(TOY, f"{tmp_path / 'absent.py'}:softmax")
    with pytest.raises(LookupError, match="no contracts for package 'nothing'"):
        check_isolated("nothing.here")
    with pytest.raises(TypeError, match="is not a Contract but function"):
        check_isolated(TOY.replace("SOFTMAX", "softmax"))
    with pytest.raises(ValueError, match="limit_s must be positive, got 0"):
        check_isolated(TOY, limit_s=0)


def test_a_fault_of_the_contract_is_not_the_implementations(tmp_path):
    source = Path(__file__).with_name("toy.py").read_text()
    (tmp_path / "bad.py").write_text(source.replace("tolerance=lambda given, name, want: 1e-5", "tolerance=lambda: 1"))
    with pytest.raises(RuntimeError, match=r"the contract toy.softmax itself failed: TypeError"):
        check_isolated(f"{tmp_path / 'bad.py'}:SOFTMAX")


def test_no_bytecode_is_left_in_the_folder(judge, tmp_path):
    (tmp_path / "helper.py").write_text("def same(x): return x\n")
    late = RIGHT.replace("    e = ", "    from helper import same\n        e = ")
    assert judge(late).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helper.py", "mine.py"]
