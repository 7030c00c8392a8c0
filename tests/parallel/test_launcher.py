"""launch: results, errors that name the culprit, and nothing left running, whatever happens."""

import ctypes
import io
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from mlsys.loading import import_file
from mlsys.parallel import _caller, _notes, _travel, launcher
from mlsys.parallel.launcher import LaunchError, launch

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0


def until(condition, what):
    """Poll; a test that waits for ever says for what."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


def others():
    """Processes under this one, beside the warm server itself and what is dead already."""
    servers = {server.process.pid for server in _caller.servers}
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in servers and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def warm():
    """The server that is in use; tests of another environment may have left one of their own."""
    return _caller.Server.current(dict(os.environ))


def variable(name):
    return os.environ.get(name)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """After each test there are no processes, no folders, and no descriptors of a launch."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    warm()  # the server and its socket are there to stay
    known = set(others())  # such as the fork server that a benchmark, tested in this process, has started
    before = psutil.Process().num_fds()
    yield
    until(lambda: known.issuperset(others()), "all ranks gone")
    assert [path.name for path in tmp_path.glob("mlsys-launch-*")] == []
    assert psutil.Process().num_fds() <= before


# --- results ----------------------------------------------------------------------------------------------------------


def whoami():
    return dist.get_rank(), dist.get_world_size(), os.getpid()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_results_come_in_order_of_rank_from_n_processes(n):
    ranks, sizes, pids = zip(*launch(whoami, n))
    assert ranks == tuple(range(n))
    assert sizes == (n,) * n
    assert len({*pids, os.getpid()}) == n + 1


def test_arguments_arrive_and_collectives_work():
    def total(x, factor):
        x = x * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return x * factor

    for result in launch(total, 3, torch.tensor([1.0, 2.0]), 10):
        assert result.tolist() == [60.0, 120.0]


def test_the_callers_tensors_are_not_touched():
    x = torch.zeros(4)
    launch(lambda t: t.add_(1), 2, x)
    assert x.tolist() == [0, 0, 0, 0]


def test_lambdas_closures_builtins_methods_and_partials_can_be_launched():
    seven = 7
    assert launch(lambda: seven, 2) == [7, 7]
    assert launch(len, 2, "abc") == [3, 3]
    assert launch("a,b".split, 2, ",") == [["a", "b"], ["a", "b"]]


def test_names_that_are_also_modules_of_torch_can_be_launched():
    def program(settings):  # there is a torch.distributed.config, which is no ordinary module
        return settings.config + dist.get_rank()

    assert launch(program, 2, types.SimpleNamespace(config=5)) == [5, 6]


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_results_of_any_size(size):
    small, large = launch(lambda: torch.full((size,), float(dist.get_rank())), 2)
    assert small.shape == large.shape == (size,)
    assert bool((small == 0).all())
    assert bool((large == 1).all())


def test_large_arguments_arrive_whole():
    x = torch.arange(5_000_000)
    assert launch(lambda t: int(t.sum()), 2, x) == [int(x.sum())] * 2


def test_a_view_takes_only_its_own_bytes_and_keeps_its_kind():
    whole = torch.arange(1_000_000, dtype=torch.float32, requires_grad=True)
    view = whole.detach()[::100_000]
    assert len(_travel.dumps(view)) < 10_000
    back = _travel.loads(_travel.dumps({"view": view, "whole": whole, "parameter": torch.nn.Parameter(view)}))
    assert torch.equal(back["view"], view)
    assert back["whole"].requires_grad
    assert isinstance(back["parameter"], torch.nn.Parameter)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch 2.11, of its own loading
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
        torch.ones(1).expand(3, 2),
        torch.arange(6).reshape(3, 2)[:, 1:],
        torch.tensor([True, False]),
        torch.tensor([1.5, -2], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]).conj(),
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=str,
)
def test_tensors_of_every_kind_come_back_as_they_are(tensor):
    back = _travel.loads(_travel.dumps(tensor))
    assert (back.dtype, back.shape, back.layout, back.device) == (
        tensor.dtype,
        tensor.shape,
        tensor.layout,
        tensor.device,
    )
    if tensor.device.type == "meta":
        return
    back, tensor = (x.to_dense() if x.is_sparse else x for x in (back, tensor))
    assert torch.equal(back, tensor)
    if tensor.is_contiguous():
        before = tensor.clone()
        back.zero_()  # memory of its own
        assert torch.equal(tensor, before)


def test_tied_weights_stay_tied():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    (model,) = launch(Tied, 1)
    assert model.a.weight is model.b.weight
    assert type(model) is Tied


def test_the_server_is_warm_the_second_time():
    first = launch(os.getppid, 2)
    server = warm().process.pid
    second = launch(os.getppid, 2)
    assert warm().process.pid == server
    assert len({*first, *second}) == 2  # one supervisor a launch, the ranks' common parent


def test_launches_from_several_threads_do_not_meet():
    results = {}

    def run(name):
        def body():
            parts = [None, None]
            dist.all_gather_object(parts, name)
            return parts

        results[name] = launch(body, 2)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [[name, name], [name, name]] for name in "abc"}


# --- what ranks take over ---------------------------------------------------------------------------------------------


def test_ranks_have_the_callers_directory_environment_path_arguments_and_warnings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLSYS_TEST", "here")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setattr(sys, "argv", ["program", "--flag"])

    def body():
        with pytest.raises(UserWarning):  # "error" is what pytest is configured with
            warnings.warn("loud", stacklevel=1)
        warnings.warn("quiet", DeprecationWarning, stacklevel=1)
        return str(Path.cwd()), os.environ.get("MLSYS_TEST"), os.environ.get("OMP_NUM_THREADS"), sys.path[0], sys.argv

    assert launch(body, 2) == [(str(tmp_path), "here", None, str(tmp_path / "lib"), ["program", "--flag"])] * 2
    monkeypatch.delenv("MLSYS_TEST")
    assert launch(variable, 1, "MLSYS_TEST") == [None]


def test_a_variable_that_is_read_at_import_needs_a_server_of_its_own():
    environ = dict(os.environ)
    assert _caller.Server.current(environ | {"ANY": "1", "OMP_NUM_THREADS": "7"}) is warm()  # set in each rank
    for name in ("NUMBA_TEST_OF_LAUNCH", "TORCH_LOGS", "PYTHONHASHSEED"):
        assert _caller._signature(environ | {name: "1"}) != warm().signature


def test_ranks_can_be_told_apart_as_under_torchrun():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert launch(lambda: [os.environ[name] for name in names], 2) == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


def policies(name):
    """How the kernel schedules the threads of this process that are called so."""
    threads = [thread for thread in Path("/proc/self/task").iterdir() if (thread / "comm").read_text().strip() == name]
    return [os.sched_getscheduler(int(thread.name)) for thread in threads]


def test_an_error_raised_from_an_echo_is_an_echo_too():
    def program():
        if dist.get_rank() == 1:
            time.sleep(
                0.5
            )  # longer than failures that happen together are apart, shorter than an echo waits for its cause
            os._exit(3)
        try:
            raise RuntimeError("gloo: Connection closed by peer")
        except RuntimeError as error:
            raise LookupError("told in other words") from error

    with pytest.raises(LaunchError, match="rank 1 of 2 exited with status 3") as caught:
        launch(program, 2)
    assert (caught.value.rank, caught.value.kind) == (1, "died")
    assert "then rank 0: raised LookupError" in str(caught.value)


def test_gloos_event_loops_preempt_nobody():
    from mlsys.parallel.collectives import Communicator, Links

    def body():
        first = policies("gloo_tcp_loop")
        with Communicator(dist.new_group(), links=Links()):
            return first, policies("gloo_tcp_loop"), os.sched_getscheduler(0)

    found = launch(body, 2)
    if not any(first for first, _, _ in found):
        pytest.skip(f"torch {torch.__version__} gives gloo's threads no names to know them by; 2.13 does")
    for first, second, own in found:
        assert first
        assert len(second) > len(first)
        assert {*first, *second} == {os.SCHED_BATCH}
        assert own == os.SCHED_OTHER


def test_ranks_run_on_the_cores_that_the_caller_may_use():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert launch(os.sched_getaffinity, 2, 0) == [{min(allowed)}] * 2
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads():
    assert launch(torch.get_num_threads, 1) == [1]
    assert launch(torch.get_num_threads, 2, threads=2) == [2, 2]


def test_random_numbers_of_numpy_differ_and_those_of_torch_start_from_the_same_seed():
    def draw():
        import numpy as np

        return float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    (a, x), (b, y) = launch(draw, 2)
    assert a != b
    assert x == y


def test_output_goes_where_the_callers_goes(capfd):
    def talk():
        print(f"out of rank {dist.get_rank()}")
        print(f"err of rank {dist.get_rank()}", file=sys.stderr)
        os.system("echo from a child")

    print("before")
    launch(talk, 2)
    print("after")
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert sorted(lines[1:-1]) == ["from a child", "from a child", "out of rank 0", "out of rank 1"]
    assert (lines[0], lines[-1]) == ("before", "after")
    assert sorted(captured.err.splitlines()) == ["err of rank 0", "err of rank 1"]


def test_output_reaches_an_object_in_place_of_stdout():
    """As in a notebook, where only the parent's Python can print into the cell."""

    def talk():
        if dist.get_rank() == 0:
            print("é" * 40_000)
        print("oops", end="", file=sys.stderr)

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        launch(talk, 2)
    assert out.getvalue() == "é" * 40_000 + "\n"
    assert err.getvalue() == "oopsoops"


class Full(io.StringIO):
    def write(self, text):
        raise OSError("disk full")


def test_a_stdout_that_raises_ends_the_ranks_first(tmp_path):
    def body():
        (tmp_path / str(os.getpid())).touch()
        dist.barrier()
        print("x" * 1_000_000)
        time.sleep(1000)

    with redirect_stdout(Full()), pytest.raises(OSError, match="disk full"):
        launch(body, 2)
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(pids) == 2
    assert not any(running(pid) for pid in pids)
    with redirect_stdout(Full()), pytest.raises(OSError, match="disk full"):
        launch(print, 1, "heard only after the result, or before")

    def fail():
        print("x")
        raise Unlucky

    with redirect_stdout(Full()), pytest.raises((OSError, LaunchError)):
        launch(fail, 1)
    with redirect_stdout(Full()):
        assert launch(int, 2) == [0, 0]  # nobody prints


def test_what_a_rank_printed_before_it_was_killed_is_printed(capsys):
    def body():
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LaunchError):
        launch(body, 1)
    assert capsys.readouterr().out == "last words\n"


def test_a_host_whose_name_does_not_resolve(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    device = launch(variable, 1, "GLOO_SOCKET_IFNAME")
    assert device[0] in {name for _, name in socket.if_nameindex()}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", device[0])
    assert launch(variable, 1, "GLOO_SOCKET_IFNAME") == device


# --- code that a fresh Python could not import ------------------------------------------------------------------------


def run_script(text, tmp_path, *, command=(sys.executable,), timeout=120):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, str(path)], capture_output=True, text=True, env=environ, timeout=timeout, cwd=tmp_path
    )


def test_a_script_without_guard(tmp_path):
    """At its end it also kills its server: the ranks do not outlive that."""
    done = run_script(
        """
        from dataclasses import dataclass
        import os, signal, time
        from pathlib import Path
        from mlsys.parallel import LaunchError, launch, _caller
        import torch.distributed as dist

        @dataclass
        class Point:
            x: int

        def helper(p):
            parts = [None, None]
            dist.all_gather_object(parts, p)  # by plain pickle, which looks for __main__.Point
            assert parts == [p, p]
            return Point(p.x + dist.get_rank())

        print("once")
        results = launch(lambda p: helper(p), 2, Point(5))
        assert results == [Point(5), Point(6)], results

        def kill(server):
            Path(str(os.getpid())).touch()
            dist.barrier()
            if dist.get_rank() == 0:
                os.kill(server, signal.SIGKILL)
            time.sleep(1000)

        try:
            launch(kill, 2, _caller.servers[0].process.pid)
        except LaunchError as error:
            print(error.kind, error)
        """,
        tmp_path,
    )
    said = "died the launch's supervisor was killed, and its ranks with it"
    assert (done.stdout, done.stderr, done.returncode) == (f"once\n{said}\n", "", 0)
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(pids) == 2
    until(lambda: not any(running(pid) for pid in pids), "ranks gone")


def test_code_of_a_notebook_and_its_lines_in_the_traceback():
    import linecache

    cell = "def body():\n    value = 1\n    raise KeyError(value)  # in the cell\n"
    namespace = {"__name__": "__main__"}
    exec(compile(cell, "<cell 3>", "exec"), namespace)
    linecache.cache["<cell 3>"] = (len(cell), None, cell.splitlines(keepends=True), "<cell 3>")
    try:
        with pytest.raises(LaunchError, match="in the cell") as caught:
            launch(namespace["body"], 1)
    finally:
        del linecache.cache["<cell 3>"]
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_file_loaded_by_path_and_a_module_made_by_hand(tmp_path, monkeypatch):
    file = tmp_path / "theirs.py"
    file.write_text("import os\nclass Own: pass\nconstant = 3\ndef f(): return constant, Own\n")
    module = import_file(file)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    ((constant, own),) = launch(module.f, 1)
    assert (constant, own) == (3, module.Own)
    made = types.ModuleType("made_by_hand")
    exec("def g(): return h() + 1\ndef h(): return 1", vars(made))
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    assert launch(made.g, 1) == [2]


@dataclass
class Settings:
    lr: float


def test_plain_pickle_works_in_a_rank_for_what_came_by_value():
    assert launch(lambda settings: pickle.loads(pickle.dumps(settings)), 2, Settings(0.1)) == [Settings(0.1)] * 2


def test_what_can_be_imported_goes_by_name_and_nothing_stays_registered():
    import cloudpickle

    assert _travel.importable(torch)
    assert _travel.importable(torch.distributed)
    assert _travel.importable(torch.ops)  # has no file of its own
    assert _travel.importable(sys)
    assert _travel.importable(launcher)
    assert not _travel.importable(sys.modules[__name__])
    assert not _travel.importable(sys.modules["__main__"])
    before = cloudpickle.list_registry_pickle_by_value()
    assert launch(whoami, 1)
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_threads_that_pack_at_once_do_not_undo_each_others_choice(monkeypatch):
    made = types.ModuleType("made_by_hand")
    exec("def f(): return 1\ndef g(): return 2", vars(made))
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    inside, second_inside, first_done = threading.Event(), threading.Event(), threading.Event()

    class First:
        def __reduce__(self):
            inside.set()
            second_inside.wait(0.2)
            return int, ()

    class Second:
        def __reduce__(self):
            second_inside.set()
            first_done.wait(PATIENCE_S)
            return int, ()

    def pack_first():
        _travel.pack([made.f, First()])
        first_done.set()

    thread = threading.Thread(target=pack_first)
    thread.start()
    inside.wait(PATIENCE_S)
    parcel = _travel.pack([made.f, Second(), made.g])
    thread.join()
    monkeypatch.delitem(sys.modules, "made_by_hand")  # as in another process
    _, _, g = _travel.unpack(parcel)
    assert g() == 2


# --- errors -----------------------------------------------------------------------------------------------------------


class Unlucky(Exception):
    pass


def test_a_rank_that_raises():
    def body():
        if dist.get_rank() == 1:
            raise Unlucky("bad batch")
        dist.barrier()

    with pytest.raises(LaunchError, match=r"rank 1 of 3 raised Unlucky: bad batch") as caught:
        launch(body, 3)
    error = caught.value
    assert (error.rank, error.kind) == (1, "raised")
    assert isinstance(error.__cause__, Unlucky)
    assert 'raise Unlucky("bad batch")' in error.rank_traceback
    assert "_server.py" not in str(error)


def test_ranks_that_raise_together_are_all_named(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", PATIENCE_S)  # however busy the machine is

    def body():
        dist.barrier()
        raise ValueError(f"of rank {dist.get_rank()}")

    with pytest.raises(LaunchError) as caught:
        launch(body, 3)
    assert all(f"ValueError: of rank {rank}" in str(caught.value) for rank in range(3))


def test_a_rank_that_works_on_does_not_keep_an_error_waiting():
    def body():
        if dist.get_rank() == 0:
            raise Unlucky
        time.sleep(1000)

    with pytest.raises(LaunchError, match="rank 0 of 2 raised Unlucky"):
        launch(body, 2)


class Two(Exception):
    """It cannot be unpickled in the usual way: that calls it with its one `arg`."""

    def __init__(self, step, loss):
        super().__init__(f"loss {loss} at step {step}")
        self.step = step


def test_an_exception_whose_class_wants_other_arguments_than_it_keeps_is_the_cause_all_the_same():
    def body():
        raise Two(3, 0.5)

    with pytest.raises(LaunchError, match=r"rank 0 of 1 raised Two: loss 0\.5 at step 3") as caught:
        launch(body, 1)
    cause = caught.value.__cause__
    assert type(cause) is Two
    assert (str(cause), cause.step) == ("loss 0.5 at step 3", 3)


def test_an_exception_that_cannot_be_sent_is_told_in_words():
    def body():
        error = Unlucky("odd one")
        error.lock = threading.Lock()
        raise error

    with pytest.raises(LaunchError, match="raised Unlucky: odd one") as caught:
        launch(body, 1)
    assert type(caught.value.__cause__) is RuntimeError
    assert str(caught.value.__cause__).startswith("Unlucky: odd one (in place of the exception itself")


def test_an_exception_that_cannot_say_what_it_is():
    class Mute(Exception):
        def __str__(self):
            raise KeyError("no words")

    def body():
        raise Mute

    with pytest.raises(LaunchError, match=r"rank 0 of 1 raised Mute: \(its __str__ raised KeyError\)") as caught:
        launch(body, 1)
    assert caught.value.kind == "raised"
    assert "raise Mute" in caught.value.rank_traceback
    assert type(caught.value.__cause__).__name__ == "Mute"


@pytest.mark.parametrize(
    ("end", "said", "kind"),
    [
        (lambda: os._exit(3), "rank 1 of 2 exited with status 3 before the function returned", "died"),
        (lambda: os._exit(0), "rank 1 of 2 exited with status 0 before the function returned", "died"),
        (lambda: sys.exit(4), "rank 1 of 2 raised SystemExit: 4", "raised"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"rank 1 of 2 was killed by SIGKILL \(signal 9\)", "died"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), r"rank 1 of 2 was killed by SIGTERM \(signal 15\)", "died"),
        (lambda: ctypes.string_at(1), r"rank 1 of 2 was killed by SIGSEGV \(signal 11\)", "died"),
    ],
    ids=["exit 3", "exit 0", "sys.exit", "kill -9", "SIGTERM", "segmentation fault"],
)
def test_a_rank_that_ends(end, said, kind):
    """The other rank sees its connection close, and may say so before the death is known: it is not the culprit."""

    def body():
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            end()
        dist.all_reduce(torch.ones(1))

    with pytest.raises(LaunchError, match=said) as caught:
        launch(body, 2)
    error = caught.value
    assert (error.rank, error.kind) == (1, kind)
    if kind == "died":
        assert "has finished its 1st collective, all_reduce of float32 (1,) at " in str(error)
    if "SIGSEGV" in said:
        assert "ctypes.string_at(1)" in error.rank_traceback


def test_a_rank_that_never_arrives_is_found():
    def body():
        dist.all_reduce(torch.ones(3))
        if dist.get_rank() == 2:
            time.sleep(1000)  # the culprit
        dist.all_reduce(torch.ones(2, 4))

    with pytest.raises(LaunchError) as caught:
        launch(body, 3, timeout=2.0)
    error = caught.value
    text = str(error)
    assert (error.rank, error.kind) == (2, "hung")
    assert text.startswith("3 of 3 ranks had not finished after 2 s; rank 2 is behind\n")
    for rank in (0, 1):
        assert f"rank {rank} is in its 2nd collective, all_reduce of float32 (2, 4) at {__file__}:" in text
    assert f"rank 2 has finished its 1st collective, all_reduce of float32 (3,) at {__file__}:" in text
    assert "time.sleep(1000)  # the culprit" in error.rank_traceback


def test_ranks_in_different_collectives_are_told():
    def body():
        if dist.get_rank() == 1:
            dist.all_reduce(torch.zeros(6))
        else:
            dist.barrier()
        time.sleep(1000)

    with pytest.raises(
        LaunchError, match="ranks had not finished after 1 s; they are in different collectives"
    ) as caught:
        launch(body, 3, timeout=1)
    assert caught.value.rank == 1


def test_a_rank_that_waits_for_one_that_has_returned():
    def body():
        if dist.get_rank() == 1:
            dist.recv(torch.zeros(5), src=0)

    with pytest.raises(LaunchError, match="1 of 2 ranks had not finished after 1 s") as caught:
        launch(body, 2, timeout=1)
    assert caught.value.rank == 1
    assert "rank 0 has returned; has called no collective" in str(caught.value)
    assert "rank 1 is in its 1st message, recv of float32 (5,) at " in str(caught.value)


def test_a_stopped_rank_gives_no_stack_and_is_killed():
    with pytest.raises(LaunchError, match="is it stopped") as caught:
        launch(lambda: os.kill(os.getpid(), signal.SIGSTOP), 1, timeout=1)
    assert caught.value.kind == "hung"


def test_a_result_that_cannot_be_sent_or_loaded():
    with pytest.raises(LaunchError, match="rank 0 returned lock that cannot be pickled") as caught:
        launch(threading.Lock, 2)
    assert isinstance(caught.value.__cause__, TypeError)

    class Stubborn:
        def __reduce__(self):
            return (int, ("no number",))

    with pytest.raises(LaunchError, match="rank 0 returned something that cannot be loaded here: ValueError"):
        launch(Stubborn, 1)


def test_arguments_that_cannot_be_sent():
    with pytest.raises(TypeError, match="must be made inside the function"):
        launch(print, 2, threading.Lock())


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((3, 2), {}, "fn=3 cannot be called"),
        ((int, 0), {}, "n=0: at least 1"),
        ((int, 1000), {}, "n=1000: at least 1 and at most 128"),
        ((int, 2.0), {}, "n=2.0: a whole number"),
        ((int, True), {}, "n=True: a whole number"),
        ((int, 1), {"timeout": 0}, "timeout=0: a positive number"),
        ((int, 1), {"timeout": float("inf")}, "timeout=inf"),
        ((int, 1), {"timeout": "1"}, "timeout='1': seconds"),
        ((int, 1), {"threads": 0}, "threads=0: at least 1"),
        ((int, 1), {"backend": "nonsense"}, "backend='nonsense'"),
    ],
)
def test_bad_arguments_are_named(arguments, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        launch(*arguments, **options)


@pytest.mark.parametrize("timeout", [None, 1e15, 10**400], ids=["None", "1e15", "10**400"])
def test_no_limit(timeout):
    assert launch(dist.get_rank, 2, timeout=timeout) == [0, 1]


def test_a_launch_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(LaunchError("why", 3, "died", "where")))
    assert (str(error), error.rank, error.kind, error.rank_traceback) == ("why", 3, "died", "where")


# --- nothing stays behind ---------------------------------------------------------------------------------------------


def test_what_a_rank_has_spawned_goes_with_it(tmp_path):
    """Also after success, and if it has outlived its own parent."""

    def body(fail):
        child = subprocess.Popen("sleep 1000 & echo $! ; sleep 1000", shell=True, stdout=subprocess.PIPE)
        grandchild = int(child.stdout.readline())
        (tmp_path / f"{fail}-{dist.get_rank()}").write_text(f"{child.pid} {grandchild}")
        if fail:
            raise Unlucky
        os.environ["PYTHONWARNINGS"] = "ignore"
        child.stdout.close()

    launch(body, 2, False)
    with pytest.raises(LaunchError):
        launch(body, 2, True)
    pids = [int(word) for path in tmp_path.glob("*-?") for word in path.read_text().split()]
    assert len(pids) >= 6  # of a rank that raised, the other may have been killed before it wrote
    until(lambda: not any(running(pid) for pid in pids), "children of ranks gone")


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_rank_may_launch_ranks_and_be_killed_and_leaves_nothing(tmp_path, monkeypatch):
    """A caller that is killed; it is a rank itself, and has a server of its own, in its own environment."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def inner(caller):
        pids = [None, None]
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 0:
            (tmp_path / "pids").write_text(f"{pids[0]} {pids[1]} {os.getppid()}")
            os.kill(caller, signal.SIGKILL)
            dist.recv(torch.zeros(1), src=1)
        while True:
            time.sleep(1)

    def outer():
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        assert launch(lambda: (dist.get_rank(), sys.dont_write_bytecode), 2) == [(0, True), (1, True)]
        (tmp_path / "server").write_text(str(warm_one()))
        launch(inner, 2, os.getpid(), timeout=None)

    def warm_one():
        from mlsys.parallel import _caller

        return _caller.servers[0].process.pid

    with pytest.raises(LaunchError, match="rank 0 of 1 was killed by SIGKILL"):
        launch(outer, 1)
    pids = [int(word) for name in ("pids", "server") for word in (tmp_path / name).read_text().split()]
    assert len({*pids, warm().process.pid}) == 5
    until(lambda: not any(running(pid) for pid in pids), "all of the inner launch gone")
    until(lambda: not list(tmp_path.glob("mlsys-launch-*")), "folder removed")


def test_a_fork_of_the_caller_does_not_take_its_server_for_its_own():
    own = warm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        child = os.fork()
    if child == 0:
        os._exit(len(_caller.servers) + 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert launch(int, 1) == [0]
    assert warm() is own


# Stand-ins for a warm server that dies at an unlucky moment; each has said that it is ready.
DYING = {
    "before": "control.recv(1, socket.MSG_PEEK)",
    "at once": "control.recv(1)",
    "with the request": """
end = socket.socket(fileno=socket.recv_fds(control, 1, 1)[1][0])
end.recv(12, socket.MSG_WAITALL)
socket.recv_fds(end, 1, 64)
end.sendall(b".")
end.recv(1)
""",
}


@pytest.mark.parametrize("moment", DYING)
def test_a_server_that_dies_before_it_forks_is_replaced(moment, monkeypatch):
    ready = "import os, socket, sys; control = socket.socket(fileno=int(sys.argv[1])); control.sendall(b'+')"
    own = warm()
    with monkeypatch.context() as patch:
        patch.setattr(_caller, "_SERVER", f"{ready}\n{DYING[moment]}\nos._exit(1)")
        dying = _caller.Server(dict(os.environ), own.signature)
    others = list(_caller.servers)
    _caller.servers.insert(0, dying)
    assert launch(dist.get_rank, 2) == [0, 1]
    assert _caller.servers == others
    assert dying.process.returncode == 1


def test_a_server_that_always_dies_is_an_error(monkeypatch):
    class Dead:
        def hand_over(self, end):
            raise BrokenPipeError("gone")

        def settle(self):
            pass

    monkeypatch.setattr(_caller.Server, "current", lambda environ: Dead())
    with pytest.raises(RuntimeError, match=r"ended twice before it forked \(gone\)"):
        launch(int, 2)


def test_ctrl_c_ends_the_ranks_and_passes_on(tmp_path):
    def body(caller):
        (tmp_path / str(os.getpid())).touch()
        dist.barrier()
        if dist.get_rank() == 0:
            os.kill(caller, signal.SIGINT)
        time.sleep(1000)

    with pytest.raises(KeyboardInterrupt):
        launch(body, 2, os.getpid())
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(pids) == 2
    assert not any(running(pid) for pid in pids)


def test_a_fork_of_a_rank_keeps_nobody_waiting():
    """It holds copies of the rank's descriptors, as the workers of a DataLoader do."""

    def body(end):
        if os.fork() == 0:
            time.sleep(1000)
        end()
        return 1

    assert launch(body, 2, lambda: None) == [1, 1]
    with pytest.raises(LaunchError, match="exited with status 3"):
        launch(body, 2, lambda: os._exit(3))


def test_a_fork_that_returns_into_the_rank_has_no_say(capfd, tmp_path):
    def body(fail):
        rank = dist.get_rank()
        child = os.fork()
        if child == 0:
            if fail:
                raise Unlucky("only the child")
            return "child"
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return rank, status

    assert launch(body, 2, False) == [(0, 0), (1, 0)]
    assert capfd.readouterr().err == ""
    assert launch(body, 1, True) == [(0, 1)]
    assert "Unlucky: only the child" in capfd.readouterr().err


def test_a_rank_that_finishes_when_nobody_listens_says_nothing(capfd):
    """Its pipe is broken, which is no news: the launch has failed already."""

    def body():
        if dist.get_rank() == 0:
            raise Unlucky
        own = next(c for c in fds() if c)
        own.recv(1)  # until the caller hangs up
        return 1

    def fds():
        for frame in iterate():
            if frame.f_code.co_name == "run_rank":
                yield frame.f_locals["own"]

    def iterate():
        frame = sys._getframe()
        while frame is not None:
            yield frame
            frame = frame.f_back

    for _ in range(3):
        with pytest.raises(LaunchError, match="rank 0 of 2 raised Unlucky"):
            launch(body, 2)
    assert capfd.readouterr().err == ""


def test_ranks_do_not_outlive_their_supervisor():
    def body():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)

    with pytest.raises(LaunchError, match="supervisor was killed"):
        launch(body, 2)


# --- inside torchrun --------------------------------------------------------------------------------------------------


def test_inside_torchrun_the_function_runs_in_the_processes_that_are_there(tmp_path):
    done = run_script(
        """
        import os
        import torch
        import torch.distributed as dist
        from mlsys.parallel import launch

        own = os.getpid()

        def body(x):
            dist.all_reduce(x)
            assert os.getpid() == own
            return int(x), dist.get_rank()

        assert launch(body, 2, torch.ones(())) == [(2, 0), (2, 1)]
        assert launch(body, 2, torch.ones(())) == [(2, 0), (2, 1)]
        try:
            launch(body, 3, torch.ones(()))
        except ValueError as error:
            os.write(1, f"{error}\\n".encode())  # a line in one piece: both processes write into one pipe
        """,
        tmp_path,
        command=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["n=3, but torchrun has started 2 processes; make the two equal"] * 2


# --- notes ------------------------------------------------------------------------------------------------------------


def test_notes_of_a_library_that_says_what_it_does():
    """Its own collectives count as collectives, the messages they are made of as messages."""

    def body(path):
        launcher.note("ring all_reduce of 12 bytes")
        rank, other = dist.get_rank(), 1 - dist.get_rank()
        x = torch.zeros(3)
        requests = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, x + 0, other)])
        for request in requests:
            request.wait()
        dist.barrier()
        before = _notes.read(path(), 2)[rank]
        launcher.note("second")
        launcher.note(None)
        after = _notes.read(path(), 2)[rank]
        return before, after

    def own_file():
        import mlsys.parallel._notes as notes

        return notes._OWN.path

    for (collective, message), (second, _) in launch(body, 2, own_file):
        assert (collective.count, second.count, second.state) == (2, 3, _notes.FINISHED)
        assert collective.text.startswith(f"barrier at {__file__}:")
        assert message.text.startswith(f"batch_isend_irecv of float32 (3,) at {__file__}:")
        assert message.state == _notes.ISSUED
        assert second.text.startswith(f"second at {__file__}:")


def test_a_note_outside_of_a_launch_is_nothing():
    launcher.note("all_reduce")
    launcher.note(None)
    assert not _notes.inside_launch()


def test_an_entry_holds_any_text_and_nothing_spills(tmp_path):
    path = tmp_path / "notes"
    _notes.create(path, 2)
    notes = _notes.Notes(path, 0)
    notes.start(_notes.MESSAGE, "é".encode() * 1000)
    (collective, message), other = _notes.read(path, 2)
    assert collective is None
    assert message.text.startswith("ééé")
    assert other == (None, None)


def test_a_rank_that_ended_may_be_heard_of_twice_at_once(monkeypatch):
    """Its last words and its end wait together, and who hears of the end first takes in the words."""
    select = selectors.DefaultSelector.select

    def late(self, timeout=None):
        until = time.monotonic() + min(timeout, 60.0)
        while time.monotonic() < until:
            found = select(self, 0.01)
            first = [event for event in found if getattr(event[0].data, "__name__", "") == "_hear_supervisor"]
            if first:
                return first + [event for event in found if event not in first]
        return select(self, 0.0)

    monkeypatch.setattr(selectors.DefaultSelector, "select", late)
    with pytest.raises(LaunchError, match="exited with status 3"):
        launch(os._exit, 2, 3)
    assert launch(os.getpid, 1)
