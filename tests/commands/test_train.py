"""`mlsys train`: killed at any moment it goes on to the very same file; it says what it did and what it will not do."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mlsys.cli import main
from mlsys.commands import train
from mlsys.data import text
from mlsys.models import training, transformer

pytestmark = pytest.mark.usefixtures("own_cache")

TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--seq", "16", "--batch", "4", "--lr", "0.02"]
TINY += ["--threads", "1", "--sample-tokens", "5"]
STEPS = 12


def arguments(data, out, *more, steps=STEPS):
    return ["train", "--data", data, "--steps", str(steps), "--out", str(out), *TINY, *more]


def checkpoint(out):
    return (out / "checkpoint.safetensors").read_bytes()


@pytest.fixture
def uninterrupted(data, tmp_path, capsys):
    """The bytes of the checkpoint at the end of a run that nothing disturbed."""
    assert main(arguments(data, tmp_path / "straight")) == 0
    capsys.readouterr()
    return checkpoint(tmp_path / "straight")


# --- killed -----------------------------------------------------------------------------------------------------------

# Runs `mlsys` with a fault: after argv[1] whole saves of the file argv[3], the process is killed in the next one: with
# argv[2] "before", while half of the new file is on the disk; with "after", when it has just been put in place.
FAULTY = """
import os, signal, sys
from mlsys import cli
left, when, name = int(sys.argv[1]), *sys.argv[2:4]
replace = os.replace
def faulty(source, target):
    global left
    if os.path.basename(target) == name:
        left -= 1
        if left < 0:
            os.truncate(source, os.path.getsize(source) // 2) if when == "before" else replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = faulty
sys.exit(cli.main(sys.argv[4:]))
"""


def kill(saves, when, name, mlsys):
    command = [sys.executable, "-c", FAULTY, str(saves), when, name, *mlsys]
    killed = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def resumed(out, capsys):
    assert main(["train", "--out", str(out), "--resume", "--sample-tokens", "5"]) == 0
    told = capsys.readouterr().err
    assert not list(out.glob(".*")), "what the killed save left is gone"
    return told, checkpoint(out)


def test_killed_from_outside(data, tmp_path, capsys, uninterrupted):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "mlsys", *arguments(data, out, "--save-every", "0")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        for line in process.stderr:
            if line.startswith("saved at step 2"):
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
        assert process.wait() in (-signal.SIGKILL, 0)  # 0: it was quicker than the signal
    told, final = resumed(out, capsys)
    assert "going on from step" in told
    assert final == uninterrupted


def test_killed_in_the_middle_of_a_save_and_again(data, tmp_path, capsys, uninterrupted):
    out = tmp_path / "killed"
    start = arguments(data, out, "--save-every", "0")
    again = ["train", "--out", str(out), "--save-every", "0", "--resume"]
    for saves, when, mlsys, done in ((3, "before", start, 2), (4, "after", again, 7)):
        kill(saves, when, "checkpoint.safetensors", mlsys)
        assert training.read(out / "checkpoint.safetensors").done == done
        assert len(list(out.glob(".*.tmp"))) == (when == "before")
    told, final = resumed(out, capsys)
    assert f"going on from step 7 of {STEPS}" in told
    assert final == uninterrupted


@pytest.mark.parametrize(("when", "name"), [("after", "run.json"), ("before", "checkpoint.safetensors")])
def test_killed_before_there_is_anything_to_go_on_from(when, name, data, tmp_path, capsys, uninterrupted):
    out = tmp_path / "killed"
    kill(0, when, name, arguments(data, out))
    assert not (out / "checkpoint.safetensors").exists()
    told, final = resumed(out, capsys)
    assert f"no checkpoint in {out} yet: starting what run.json asks for" in told
    assert final == uninterrupted


def interrupt(when, name, mlsys):
    """Ctrl-C while a file is being put in place, before there are steps to finish: as a kill, but without a process."""
    replace = os.replace

    def interrupted(source, target):
        if when == "after" or Path(target).name != name:
            replace(source, target)
        if Path(target).name == name:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        assert main(mlsys) == 130


def test_interrupted_before_its_first_file_there_is_nothing_of_it(data, tmp_path, capsys, uninterrupted):
    out = tmp_path / "stopped"
    interrupt("before", "run.json", arguments(data, out))
    assert not out.exists()
    assert main(arguments(data, out, "--resume")) == 0  # as in a loop that restarts it
    assert f"no checkpoint in {out} yet: starting\n" in capsys.readouterr().err
    assert checkpoint(out) == uninterrupted


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("when", "name", "begun"),
    [
        ("before", "run.json", False),
        ("after", "run.json", False),
        ("before", "tokenizer.json", True),
        ("after", "tokenizer.json", True),
        ("before", "checkpoint.safetensors", True),
        ("after", "checkpoint.safetensors", True),
    ],
)
def test_interrupted_early_one_run_or_the_other_is_there(
    when, name, begun, overwrite, data, tmp_path, capsys, uninterrupted
):
    """Overwriting: the old one until the new one is ready. Not overwriting: the new one as soon as it has a file."""
    out = tmp_path / "stopped"
    if overwrite:
        assert main(arguments(data, out, "--seed", "3")) == 0
        old = checkpoint(out)
    interrupt(when, name, arguments(data, out, *["--overwrite"] * overwrite))
    if overwrite or (when, name) != ("before", "run.json"):
        assert resumed(out, capsys)[1] == (old if overwrite and not begun else uninterrupted)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", ["text_of", "model_of"])
def test_interrupted_while_it_prepares(at, overwrite, data, tmp_path, capsys, uninterrupted, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "stopped"
    if overwrite:
        assert main(arguments(data, out, "--seed", "3")) == 0
        old = checkpoint(out)
    with monkeypatch.context() as patched:
        patched.setattr(train, at, interrupted)
        assert main(arguments(data, out, *["--overwrite"] * overwrite)) == 130
    capsys.readouterr()
    told, final = resumed(out, capsys)
    assert ("starting what run.json asks for" in told) != overwrite
    assert final == (old if overwrite else uninterrupted)


def test_what_was_asked_for_outlives_a_failed_beginning(data, tmp_path, capsys, uninterrupted):
    out = tmp_path / "stopped"
    interrupt("after", "run.json", arguments(data, out))
    asked = (out / "run.json").read_bytes()
    Path(data).rename(tmp_path / "away")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert f"{data}: No such file or directory" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == asked
    (tmp_path / "away").rename(data)
    assert resumed(out, capsys)[1] == uninterrupted


def test_budget_and_settings_of_a_run_that_has_no_checkpoint_yet_hold(data, tmp_path, capsys):
    out = tmp_path / "stopped"
    interrupt("after", "tokenizer.json", ["train", "--data", data, "--minutes", "0.01", "--out", str(out), *TINY])
    for more, told in (
        (["--steps", "5"], f"--steps: the run in {out} was planned for 0.01 minutes"),
        (["--minutes", "2"], f"--minutes: the run in {out} was planned for 0.01 minutes"),
        (["--layers", "2"], f"--layers: the run in {out} has 1"),
    ):
        assert main(["train", "--out", str(out), "--resume", *more]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_goes_on(number, data, tmp_path, capsys, uninterrupted, monkeypatch):
    out = tmp_path / "stopped"
    step = training.Trainer.step

    def interrupted(self):
        if self.done == 4:
            signal.raise_signal(number)
        return step(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(training.Trainer, "step", interrupted)
        assert main(arguments(data, out)) == 128 + number
    assert signal.getsignal(number) is before
    told = capsys.readouterr().err
    assert f"stopped by {number.name} at step 5 of {STEPS}" in told
    assert f"mlsys train --out {out} --resume" in told
    assert not (out / "model.safetensors").exists()
    assert resumed(out, capsys)[1] == uninterrupted


def test_second_interrupt_does_not_wait(data, tmp_path, capsys, monkeypatch):
    def stuck(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Trainer, "step", stuck)
    assert main(arguments(data, tmp_path / "out")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert training.read(tmp_path / "out" / "checkpoint.safetensors").done == 0


def test_saving_more_often_changes_nothing(data, tmp_path, uninterrupted):
    assert main(arguments(data, tmp_path / "often", "--save-every", "0")) == 0
    assert checkpoint(tmp_path / "often") == uninterrupted


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", text.KINDS)
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_learns_and_leaves_what_can_be_used(tokenizer, style, data, tmp_path, capsys):
    out = tmp_path / "run"
    more = ["--tokenizer", tokenizer, "--style", style, "--json"] + ["--vocab", "270"] * (tokenizer == "bpe")
    assert main(arguments(data, out, *more, steps=60)) == 0
    results = json.loads(capsys.readouterr().out)
    tokens = text.load(out / "tokenizer.json")
    model = transformer.load(out / "model.safetensors")
    assert model.config.vocab == tokens.vocab
    assert (model.config.norm, model.config.tied) == ("layernorm" if style == "gpt" else "rmsnorm", True)
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["steps"] == 60

    _, held_out = text.split(text.corpus(data))
    stream = text.tokens(held_out, tokens)
    loss = training.evaluate(model, stream, 16, windows=train.FINAL_WINDOWS)
    assert results["validation_nats_per_token"] == pytest.approx(loss, rel=1e-5)
    assert results["validation_nats_per_byte"] == pytest.approx(loss * len(stream) / text.size(held_out), rel=1e-5)
    assert results["validation_bits_per_byte"] == pytest.approx(
        results["validation_nats_per_byte"] / 0.693147, rel=1e-5
    )
    assert results["validation_perplexity"] == pytest.approx(2.718281828**loss, rel=1e-5)
    assert results["validation_nats_per_byte"] < 2.6  # a uniform guess has 5.5, single letters' frequencies 2.7


def test_prints_losses_and_a_sample(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "run", "--prompt", "the \x1b[c", "--sample-tokens", "70")) == 0
    printed = capsys.readouterr()
    first, second, third, *sample = printed.out.splitlines()
    assert first.startswith("validation loss ")
    assert "nats a byte" in first
    assert "perplexity" in first
    assert str(tmp_path / "run" / "model.safetensors") in second
    assert third == "sample"
    assert all(line.startswith("  ") for line in sample)
    shown = "\n".join(line[2:] for line in sample)
    assert shown.startswith("the ·[c")  # a terminal would obey the escape sequence
    assert len(shown) >= 40  # longer than the context of 16 bytes; bytes that are no text shorten it
    assert "12 steps of 4 × 16 tokens, 1 thread" in printed.err
    assert "step 12 of 12: loss " in printed.err
    assert "validation" in printed.err


def test_sample_is_the_same_for_the_same_seed(data, tmp_path, capsys):
    samples = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(arguments(data, tmp_path / out, "--seed", seed, "--json", "--sample-tokens", "20"))
        samples.append(json.loads(capsys.readouterr().out)["sample"])
    assert samples[0] == samples[1] != samples[2]


def test_seed_decides_the_weights(data, tmp_path, uninterrupted):
    assert main(arguments(data, tmp_path / "other", "--seed", "1")) == 0
    assert checkpoint(tmp_path / "other") != uninterrupted


def test_minutes_become_steps_once(data, tmp_path, capsys, monkeypatch):
    clock = iter(range(10**6))
    slow = types.SimpleNamespace(perf_counter=lambda: next(clock) * 0.25, monotonic=lambda: 0.0)
    out = tmp_path / "run"
    with monkeypatch.context() as patched:  # each step seems to take a quarter of a second
        patched.setattr(train, "time", slow)
        main(["train", "--data", data, "--minutes", "0.05", "--out", str(out), *TINY])
    planned = training.read(out / "checkpoint.safetensors").config.steps
    assert planned == int(train.TRAINING_SHARE * 3 / 0.25)
    main(arguments(data, tmp_path / "by steps", steps=planned))
    assert checkpoint(out) == checkpoint(tmp_path / "by steps")  # measuring took steps on a copy
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--minutes", "5"]) == 2
    assert f"--minutes: the run in {out} was planned for {planned} steps" in capsys.readouterr().err


def test_resuming_restores_the_number_of_threads(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(data, out))
    torch.set_num_threads(2)
    again = ["train", "--out", str(out), "--resume", "--sample-tokens", "0"]
    assert main(again) == 0
    assert torch.get_num_threads() == 1
    assert "note" not in capsys.readouterr().err
    assert main([*again, "--threads", "2"]) == 0
    assert "cannot be continued bit-equally: threads 1 then, 2 now" in capsys.readouterr().err


def test_overwrite_starts_anew(data, tmp_path, uninterrupted):
    out = tmp_path / "run"
    main(arguments(data, out, "--seed", "3"))
    assert main(arguments(data, out, "--overwrite")) == 0
    assert checkpoint(out) == uninterrupted


def test_other_folder_to_go_on_from(data, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments("words", Path("run"))) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--out", "../run", "--resume", "--data", "../words", "--sample-tokens", "0"]) == 0
    assert checkpoint(tmp_path / "run") == uninterrupted


# --- the progress bar -------------------------------------------------------------------------------------------------


def test_bar_on_a_terminal(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(arguments(data, tmp_path / "run", "--save-every", "0")) == 0
    told = capsys.readouterr().err
    assert "step 12 of 12" in told
    assert "saved at step" not in told


def test_lines_where_rich_is_missing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(arguments(data, tmp_path / "run")) == 0
    assert "step 12 of 12: loss " in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--heads", "3"], "--width 16 is not a multiple of --heads 3"),
        (["--heads", "16"], "heads of odd width: rotary positions turn pairs; choose an even one, or --style gpt"),
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (["--steps", "many"], "argument --steps: invalid count value: 'many'"),
        (["--minutes", "1"], "argument --minutes: not allowed with argument --steps"),
        (["--threads", "1000000"], "argument --threads: expected at most "),
        (["--seed", str(2**64)], "argument --seed: expected a whole number below 2**64"),
        (["--vocab", "300"], "--vocab 300: the vocabulary of --tokenizer bytes has a size of its own"),
        (["--prompt", "\udcff"], "--prompt '\\udcff' is not UTF-8 text"),
        (["--data", os.devnull], f"{os.devnull} is not a regular file but a pipe or a device"),
        (["--lr", "nan"], "argument --lr: expected a number above 0, got 'nan'"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (["--save-every", "-1"], "argument --save-every: expected a number of seconds, got '-1'"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--data", "nowhere"], "nowhere: No such file or directory"),
        (["--seq", "5000"], "the training text has 1762 tokens, fewer than --seq 5000 needs"),
        (["--lr", "1e30"], "a learning rate below lr=1e+30"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(more, told, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(data, tmp_path / "run", *more)) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("mlsys: ")
    assert told in last
    assert printed.out == ""
    if "1e30" not in more:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "holds a run at step 12 of 12: give --resume to go on, --overwrite to start anew, or another --out"),
        (["--resume", "--layers", "2"], "--layers: the run in"),
        (["--resume", "--heads", "3"], "--heads: the run in"),
        (["--resume", "--vocab", "4096"], "--vocab 4096: the vocabulary of --tokenizer bytes has a size of its own"),
        (["--overwrite", "--seed", str(2**64)], "argument --seed: expected"),
        (["--overwrite", "--heads", "3"], "--width 128 is not a multiple of --heads 3"),
        (["--overwrite", "--data", "nowhere"], "nowhere: No such file or directory"),
        (["--overwrite", "--data", __file__, "--seq", "100000"], "fewer than --seq 100000 needs"),
        (["--resume", "--data", "docs"], "--data: the run in"),
        (["--resume", "--steps", "13"], "--steps: the run in"),
    ],
)
def test_run_that_is_there_is_kept(more, told, data, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(data, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["checkpoint.safetensors", "model.safetensors", "run.json", "tokenizer.json"]
    capsys.readouterr()
    assert main(["train", "--out", str(out), *more]) == 2
    assert told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_run_goes_on_with_its_own_options(data, tmp_path, capsys):
    own = ["--width", "90", "--heads", "3"]
    assert main([*arguments(data, tmp_path / "run", steps=1), *own]) == 0
    for option, value in (("--heads", "3"), ("--width", "90"), ("--steps", "1")):
        assert main(["train", "--out", str(tmp_path / "run"), "--resume", option, value, "--sample-tokens", "0"]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "run.json"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_what_is_no_run_is_not_destroyed(name, more, data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("mine")
    assert main(arguments(data, out, *more)) == 2
    told = capsys.readouterr().err
    assert name in told
    assert "--overwrite" in told
    assert (out / name).read_text() == "mine"
    assert len(list(out.iterdir())) == 1
    assert main(arguments(data, out, "--overwrite")) == 0


def test_only_what_a_killed_save_left_is_cleared_away(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    mine = [".notes.tmp", ".checkpoint.safetensors.tmp", ".other.0123456789ab.tmp", ".tokenizer.json.0123456789abc.tmp"]
    left = [f".{name}.0123456789ab.tmp" for name in ("tokenizer.json", "model.safetensors", "checkpoint.safetensors")]
    for name in mine + left:
        (out / name).touch()
    assert main(arguments(data, out)) == 0
    assert sorted(path.name for path in out.glob(".*")) == sorted(mine)


def test_second_run_in_the_folder_is_refused(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    step, told = training.Trainer.step, []

    def another_starts(self):
        for more in ([], ["--resume"], ["--overwrite"]):
            assert main(["train", "--out", str(out), *more]) == 2
            told.append(capsys.readouterr().err)
        return step(self)

    monkeypatch.setattr(training.Trainer, "step", another_starts)
    assert main(arguments(data, out, steps=1)) == 0
    assert len(told) == 3
    for line in told:
        assert f"another `mlsys train` (pid {os.getpid()}) is at work in {out}" in line.splitlines()[-1]
    assert not list(out.glob(".*"))


def test_full_disk_names_the_file_and_what_is_safe(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    save = training.Trainer.save

    def full(self, path):
        if self.done:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(training.Trainer, "save", full)
        assert main(arguments(data, out, "--save-every", "0")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"mlsys: {out / 'checkpoint.safetensors'}: No space left on device; the checkpoint of step 0 "
    )
    assert f"is intact; to go on from it: mlsys train --out {out} --resume" in told
    assert resumed(out, capsys)[0]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_stdout_cannot_show_does_not_end_the_run(more, data, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert main(arguments(data, tmp_path / "rún", "--prompt", "the é", *more)) == 0
    printed = stdout.buffer.getvalue().decode()
    if more:
        assert json.loads(printed)["sample"].startswith("the é")
    else:
        assert "\n  the ?" in printed


def test_changed_text_is_noticed(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(data, out))
    with (Path(data) / "0.txt").open("a") as file:
        file.write("more\n")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "other tokens: the text or the tokenizer has changed" in capsys.readouterr().err


def test_damaged_and_foreign_checkpoints_are_named(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(arguments(data, out))
    whole = checkpoint(out)
    (out / "checkpoint.safetensors").write_bytes(whole[:-1])
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "checkpoint.safetensors is no checkpoint, or is damaged" in capsys.readouterr().err

    model = transformer.load(out / "model.safetensors")
    stream = text.tokens(text.corpus(data), text.Bytes())
    training.Trainer(model, stream, training.TrainConfig(3, 1, 16)).save(out / "checkpoint.safetensors")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "was not written by this version of `mlsys train`" in capsys.readouterr().err


def test_file_in_place_of_the_folder_is_named(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(arguments(data, tmp_path / "file")) == 2
    assert "file is a file; name a folder" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from mlsys.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--resume" in told
    assert os.environ["OMP_NUM_THREADS"]  # so the children above have the thread count that the runs here have
