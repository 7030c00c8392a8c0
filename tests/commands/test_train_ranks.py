"""`mlsys train --parallel`: the training of one process on several, stopped and killed as one process is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlsys.cli import main
from mlsys.commands import UsageError
from mlsys.commands._train_options import Settings, check_divides
from mlsys.commands._train_ranks import RanksTrainer
from mlsys.models import training, transformer
from mlsys.parallel._sharded import Sharded

pytestmark = pytest.mark.usefixtures("own_cache")

TINY = ["--layers", "2", "--width", "16", "--heads", "2", "--seq", "16", "--batch", "4", "--lr", "0.02"]
TINY += ["--threads", "1", "--sample-tokens", "5"]
STEPS = 12
KINDS = ("ddp", "zero1", "zero2", "zero3")


def arguments(data, out, *more, steps=STEPS):
    return ["train", "--data", data, "--steps", str(steps), "--out", str(out), *TINY, *more]


def on(kind, ranks=2):
    return ["--parallel", kind, "--ranks", str(ranks)]


def weights(out):
    """By name, as bytes: of what is saved, but not how, for the order of a file's metadata changes."""
    found = transformer.load(out / "model.safetensors").state_dict()
    return {name: weight.numpy().tobytes() for name, weight in found.items()}


def results(capfd):
    return json.loads(capfd.readouterr().out)


# --- the same training ------------------------------------------------------------------------------------------------


def test_every_kind_trains_as_one_process_does(data, tmp_path, capfd):
    assert main(arguments(data, tmp_path / "alone", "--json")) == 0
    alone = results(capfd)
    want = transformer.load(tmp_path / "alone" / "model.safetensors").state_dict()
    state = 16 * alone["parameters"]  # float32 weights, gradients and two means
    for kind, ranks in (("ddp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)):
        trace = tmp_path / "trace.json"
        more = [*on(kind, ranks), "--json", "--timeline", str(trace)]
        assert main(arguments(data, tmp_path / f"{kind} {ranks}", *more)) == 0
        got = results(capfd)
        assert got["validation_nats_per_token"] == pytest.approx(alone["validation_nats_per_token"], rel=1e-4)
        there = transformer.load(tmp_path / f"{kind} {ranks}" / "model.safetensors").state_dict()
        for name, weight in want.items():
            assert (there[name] - weight).abs().max() < 1e-3, (kind, ranks, name)  # AdamW amplifies roundings

        assert (got["parallel"], got["traced_steps"]) == (kind, STEPS - 2)
        assert [row["rank"] for row in got["ranks"]] == list(range(ranks))
        assert got["tokens_per_second"] > 0
        share = {"ddp": 1, "zero1": 1 / 2 + 1 / 2 / ranks, "zero2": 1 / 4 + 3 / 4 / ranks, "zero3": 1 / ranks}[kind]
        for row in got["ranks"]:
            # A tensor of a shard begins at a multiple of 16 numbers, which shows in one as small as this.
            assert sum(row["model_state_bytes"].values()) == pytest.approx(share * state, rel=0.1)
            assert row["seconds"]["compute"] > 0
            assert row["seconds"]["optimizer"] > 0
        events = json.loads(trace.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == set(range(ranks))
        assert sum(event["name"] == "backward" for event in events) == ranks * (STEPS - 2)


def test_says_where_the_time_went(data, tmp_path, capfd):
    assert main(arguments(data, tmp_path / "run", *on("zero1"), steps=3)) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("validation loss ")
    assert lines[2].startswith("ranks           2 zero1, ")
    assert lines[2].endswith(" tokens/s; where the time of 1 step went:")
    assert " ".join(lines[3].split()) == "rank compute optimizer communication waiting other hidden model state"
    assert [line.split()[0] for line in lines[5:7]] == ["0", "1"]
    assert all(line.endswith(" MiB") for line in lines[5:7])
    assert "3 steps of 4 × 16 tokens, 2 ranks (zero1) of 1 thread\n" in printed.err
    assert printed.err.count("step 3 of 3: loss ") == 1  # the first rank alone speaks
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["parallel"], run["ranks"]) == ("zero1", 2)


def test_minutes_become_the_same_number_of_steps_on_all_ranks(data, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["train", "--data", data, "--minutes", "0.02", "--out", str(out), *TINY, *on("ddp"), "--json"]) == 0
    planned = training.read(out / "checkpoint.safetensors").config.steps
    assert results(capfd)["steps"] == planned >= 1


# --- stopped and killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number"),
    [("ddp", signal.SIGTERM), ("zero2", signal.SIGINT), ("zero2", signal.SIGKILL)],
)
def test_stopped_or_killed_it_goes_on_to_the_same_weights(kind, number, data, tmp_path, capfd):
    assert main(arguments(data, tmp_path / "straight", *on(kind), steps=40)) == 0
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "mlsys", *arguments(data, out, *on(kind), "--save-every", "0", steps=40)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("saved at step 2\n"):
                process.send_signal(number)
                break
        told += process.stderr.read()
        status = process.wait()
    if number == signal.SIGKILL:
        assert status == -number, told
    else:
        assert status == 128 + number, told
        assert f"stopped by {number.name} at step " in told
        assert f"mlsys train --out {out} --resume" in told
    assert not (out / "model.safetensors").exists()
    capfd.readouterr()
    # A run whose parent is killed lets go of the folder a moment later.
    deadline = time.monotonic() + 30
    while (ended := main(["train", "--out", str(out), "--resume", "--sample-tokens", "5"])) and "is at work" in (
        said := capfd.readouterr().err
    ):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    assert ended == 0
    assert weights(out) == weights(tmp_path / "straight")
    assert [path.name for path in out.glob(".*")] == []


def test_goes_on_with_other_ranks_and_keeps_them(data, tmp_path, capfd):
    for then, now, ranks in (("ddp", "ddp", 1), ("zero1", "zero3", 4)):
        out = tmp_path / then
        assert main(arguments(data, out, *on(then), steps=2)) == 0
        before = weights(out)
        capfd.readouterr()
        again = ["train", "--out", str(out), "--resume", "--sample-tokens", "0"]
        assert main([*again, *on(now, ranks)]) == 0
        told = capfd.readouterr().err
        assert f"ranks 2 then, {ranks} now" in told
        assert "cannot be continued bit-equally" in told
        assert "going on from step 2 of 2" in told
        assert weights(out) == before
        run = json.loads((out / "run.json").read_text())
        assert (run["parallel"], run["ranks"], run["steps"]) == (now, ranks, 2)


def test_torchrun_runs_the_same(data, tmp_path, capfd):
    assert main(arguments(data, tmp_path / "launched", *on("ddp"), steps=3)) == 0
    capfd.readouterr()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mlsys"]
    done = subprocess.run(
        [*command, *arguments(data, tmp_path / "torchrun", *on("ddp"), "--json", steps=3)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3  # printed once
    assert weights(tmp_path / "torchrun") == weights(tmp_path / "launched")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--ranks", "2"], "--ranks 2 is for several processes: add --parallel ddp"),
        (["--timeline", "t.json"], "--timeline t.json is for several processes: add --parallel ddp"),
        (["--parallel", "ddp", "--ranks", "0"], "argument --ranks: expected a whole number of at least 1, got '0'"),
        (["--parallel", "ddp", "--ranks", "1000"], "argument --ranks: expected at most 128, got '1000'"),
        (["--parallel", "fsdp"], "argument --parallel: invalid choice: 'fsdp'"),
        ([*on("ddp", 3)], "--batch 4 windows cannot be divided evenly over --ranks 3: choose a multiple of 3, such as"),
        ([*on("ddp"), "--timeline", "no/t.json"], "--timeline no/t.json: name a file in a folder that there is"),
        ([*on("ddp"), "--heads", "3"], "--width 16 is not a multiple of --heads 3"),
        ([*on("ddp"), "--data", "nowhere"], "nowhere: No such file or directory"),
        ([*on("zero3"), "--lr", "1e30"], "a learning rate below lr=1e+30"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(more, told, data, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(data, tmp_path / "run", *more)) == 2
    printed = capfd.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("mlsys: ")
    assert told in last
    assert printed.out == ""
    if "1e30" not in more:
        assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_divide_a_settled_batch_are_refused_with_those_that_do(data, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(arguments(data, out, *on("ddp"), steps=1)) == 0
    capfd.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--ranks", "3"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        "mlsys: --ranks 3: the run has batches of 4 windows, which cannot be divided evenly; "
        "go on with --ranks 1, 2 or 4"
    )


@pytest.mark.parametrize(("batch", "advice"), [(1, "--ranks 1"), (3, "--ranks 1 or 3"), (384, "64, 96 or 128")])
def test_advice_is_of_ranks_that_there_can_be(batch, advice):
    with pytest.raises(UsageError, match=f"{advice}$"):
        check_divides(Settings(batch=batch), 5, going_on=True)


def test_torchrun_without_parallel_is_refused(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(data, tmp_path / "run")) == 2
    assert "torchrun started 2 processes, which would all do the same: add --parallel ddp" in capfd.readouterr().err


def test_checkpoint_of_the_other_kind_is_named(data, tmp_path, capfd):
    for kind, other, told in (
        ("ddp", "zero1", "is in one piece: to go on from it, give --parallel ddp\n"),
        ("zero1", "ddp", "is in shards: to go on from it, give --parallel zero1, zero2 or zero3\n"),
    ):
        out = tmp_path / kind
        assert main(arguments(data, out, *on(kind), steps=1)) == 0
        before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        capfd.readouterr()
        assert main(["train", "--out", str(out), "--resume", *on(other)]) == 2
        assert told in capfd.readouterr().err
        assert main(["train", "--out", str(out)]) == 2
        assert "holds a run at step 1 of 1: give --resume to go on" in capfd.readouterr().err
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        # and a new run of the other kind takes its place
        assert main(arguments(data, out, *on(other), "--overwrite", steps=1)) == 0
        assert (out / "checkpoint").exists() == (other == "zero1")
        assert (out / "checkpoint.safetensors").exists() == (other == "ddp")


def test_rank_that_dies_is_named_with_what_to_do(data, tmp_path, capfd):
    out = tmp_path / "run"
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "fault.py").write_text(
        "import sys, torch.distributed as dist\n"
        "from mlsys.commands import _train_ranks\n"
        "from mlsys.cli import main\n"
        "work = _train_ranks.on_rank\n"
        "def faulty(*args):\n"
        "    step = _train_ranks.RanksTrainer.step\n"
        "    def dying(self):\n"
        "        if self.rank == 1 and self.done == 3:\n"
        f"            {kill}\n"
        "        return step(self)\n"
        "    _train_ranks.RanksTrainer.step = dying\n"
        "    return work(*args)\n"
        "_train_ranks.on_rank = faulty\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(tmp_path / "fault.py"), *arguments(data, out, *on("zero2"), "--save-every", "0")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    last = next(line for line in done.stderr.splitlines() if line.startswith("mlsys: "))
    assert last.startswith("mlsys: rank 1 of 2 ")
    assert "SIGKILL" in last
    assert last.endswith(f"to go on from it: mlsys train --out {out} --resume")
    assert main(["train", "--out", str(out), "--resume", "--sample-tokens", "0"]) == 0
    assert "going on from step 3" in capfd.readouterr().err


# --- what is left to subclasses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "name"),
    [(RanksTrainer, name) for name in ("wrap", "clip", "whole", "memory")]
    + [(Sharded, name) for name in ("_arrived", "_finish", "_publish")],
)
def test_a_kind_without_one_of_its_methods_cannot_be_made(base, name):
    others = dict.fromkeys(base.__abstractmethods__ - {name}, lambda *_: None)
    with pytest.raises(TypeError, match=f"abstract method '?{name}'?$"):
        type("Half", (base,), others)()
