"""The contracts of `perf`: oracles against numbers counted by hand, and a student's own formulas, right and wrong."""

import re
from fractions import Fraction
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys import cli
from mlsys.contracts import check
from mlsys.contracts._perf_activations import _block_oracle, _block_plain
from mlsys.contracts._perf_checkpointing import _again, execute, fewest_runs
from mlsys.contracts._perf_collectives import PROCEDURES, _collective_oracle, _collective_plain, _Ranks, simulate
from mlsys.contracts._perf_device import _matmul_oracle, _matmul_plain, _optimal_oracle, _optimal_plain
from mlsys.contracts._perf_model import (
    LLAMA_2_13B,
    WITH_LATENT,
    _config,
    _decode_oracle,
    _decode_plain,
    _model,
    _parameters_oracle,
    _parameters_plain,
)
from mlsys.contracts._perf_parallel import (
    _bubble_plain,
    _layer_oracle,
    _layer_plain,
    _state_oracle,
    _state_plain,
    idle_share,
)
from mlsys.contracts.perf import CONTRACTS
from mlsys.loading import import_file

# --- a student's own formulas, from the definitions in the contract's docstring --------------------------------------

STUDENT = dedent("""
    import math


    def roofline(m, n, k, itemsize, peak, bandwidth):
        arithmetic = 2.0 * m * n * k / peak
        traffic = (m * k + k * n + m * n) * itemsize / bandwidth
        return (arithmetic, "compute") if arithmetic > traffic else (traffic, "memory")


    def transformer(c):
        def layer(d_in, d_out):
            return d_in * d_out + (d_out if c.bias else 0)

        def mlp(hidden):
            up = layer(c.d_model, hidden)
            return up + layer(hidden, c.d_model) + (up if c.activation == "swiglu" else 0)

        norm = c.d_model + (c.d_model if c.norm == "layernorm" and c.bias else 0)
        attention = layer(c.d_model, c.heads * c.head_dim) + layer(c.heads * c.head_dim, c.d_model)
        attention += 2 * layer(c.d_model, c.kv_heads * c.head_dim)
        total = c.vocab * c.d_model * (1 if c.tied else 2) + norm
        if c.positions == "learned":
            total += c.context * c.d_model
        active = total
        for i in range(c.layers):
            total += attention + 2 * norm
            active += attention + 2 * norm
            e = c.experts
            if e and i >= e.first_dense and (i - e.first_dense) % e.interval == e.interval - 1:
                router = e.count * (c.d_model + (1 if e.router_bias else 0))
                total += router + (e.count + e.shared) * mlp(e.d_ff)
                active += router + (e.per_token + e.shared) * mlp(e.d_ff)
            else:
                total += mlp(c.d_ff)
                active += mlp(c.d_ff)
        return total, active


    def inference(c, parameters, batch, cached, itemsize, kv_itemsize, bandwidth):
        per_layer = c.latent.kv_rank + c.latent.rope_dim if c.latent else 2 * c.kv_heads * c.head_dim
        cache = per_layer * c.layers * cached * batch * kv_itemsize
        seconds = (itemsize * parameters + cache) / bandwidth
        return cache, seconds, batch / seconds


    def collectives(operation, algorithm, n, size):
        if n == 1:
            return 0, 0
        log = math.ceil(math.log2(n))
        share = size * (n - 1) / n
        if operation == "all_reduce":
            return {
                "ring": (2 * (n - 1), 2 * share),
                "halving_doubling": (2 * log, 2 * share),
                "recursive_doubling": (log, log * size),
                "tree": (2 * log, log * size),
            }[algorithm]
        if operation == "broadcast":
            return log, log * size
        return (n - 1 if algorithm in ("ring", "pairwise") else log), share


    def activations(batch, seq, d_model, heads, tp, sequence_parallel, recompute):
        whole = 1 / tp if sequence_parallel else 1
        sbh = seq * batch * d_model
        if recompute == "full":
            return 2 * sbh * whole
        scores = 5 * heads * seq / (d_model * tp) if recompute == "none" else 0
        return sbh * (10 * whole + 24 / tp + scores)


    def zero(parameters, n, stage):
        sizes = {"weights": 2 * parameters, "gradients": 2 * parameters, "optimizer": 12 * parameters}
        for name in ["optimizer", "gradients", "weights"][:stage]:
            sizes[name] /= n
        return sizes["weights"], sizes["gradients"], sizes["optimizer"]


    def pipeline(schedule, stages, microbatches, chunks):
        waits = stages - 1
        ticks = 3 * waits / chunks
        if schedule == "zb-h1":
            ticks = 2 * waits - min(waits, microbatches - 1)
        return ticks / (ticks + 3 * microbatches)


    def tensor_parallel(batch, seq, d_model, tp, itemsize, sequence_parallel, recompute):
        one_pass = batch * seq * d_model * itemsize * (tp - 1) / tp
        forward = 4 * one_pass
        return forward, (6 if sequence_parallel else 4) * one_pass + (forward if recompute == "full" else 0)


    def checkpointing(layers, snapshots):
        best = {}

        def cost(length, slots):
            if length == 1:
                return 0, 0
            if slots == 1:
                return length * (length - 1) // 2, 0
            if (length, slots) not in best:
                best[length, slots] = min(
                    (k + cost(length - k, slots - 1)[0] + cost(k, slots)[0], k) for k in range(1, length)
                )
            return best[length, slots]

        steps = [("store", 0)]

        def reverse(length, slots):
            slot = snapshots - slots
            if length == 1:
                steps.append(("reverse",))
            elif slots == 1:
                for distance in reversed(range(length)):
                    steps.extend([("advance", distance)] * (distance > 0) + [("reverse",)])
                    steps.extend([("restore", slot)] * (distance > 0))
            else:
                k = cost(length, slots)[1]
                steps.extend([("advance", k), ("store", slot + 1)])
                reverse(length - k, slots - 1)
                steps.append(("restore", slot))
                reverse(k, slots)

        reverse(layers, snapshots)
        return steps


    def scaling_laws(flops, E, A, B, alpha, beta):
        low, high = 0.0, math.log(flops / 6)  # of log N; more parameters as long as that lowers the loss
        for _ in range(200):
            n = (low + high) / 2
            d = math.log(flops / 6) - n
            if alpha * A * math.exp(-alpha * n) > beta * B * math.exp(-beta * d):
                low = n
            else:
                high = n
        return math.exp(n), math.exp(d)
""")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "mine.py"
    path.write_text(STUDENT, encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", [0, 1000, 2000])
@pytest.mark.parametrize("name", CONTRACTS)
def test_a_students_own_formula_passes(student, name, seed):
    verdict = check(CONTRACTS[name], getattr(import_file(student), name), seed=seed)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", ["zero", "checkpointing"])
def test_a_file_passes_on_the_command_line(student, capsys, name):
    assert cli.main(["check", f"perf.{name}", f"{student}:{name}"]) == 0
    assert "pass" in capsys.readouterr().out


def test_a_file_with_a_mistake_gets_its_hint_on_the_command_line(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("def memory(parameters, n, stage):\n    return 2 * parameters, 2 * parameters, 8 * parameters\n")
    assert cli.main(["check", "perf.zero", f"{mine}:memory"]) == 1
    printed = capsys.readouterr().out
    assert "case    parameters=1000, n=1, stage=0" in printed
    assert "optimizer: largest error 4e+03: 8000, expected 12000" in printed
    assert "`no_float32_copy`: in mixed precision" in printed


# --- wrong variants ---------------------------------------------------------------------------------------------------

PLAIN = {
    "activations": _block_plain,
    "roofline": _matmul_plain,
    "transformer": _parameters_plain,
    "inference": _decode_plain,
    "collectives": _collective_plain,
    "zero": _state_plain,
    "pipeline": _bubble_plain,
    "tensor_parallel": _layer_plain,
    "scaling_laws": _optimal_plain,
}
VARIANTS = [(name, wrong) for name, contract in CONTRACTS.items() for wrong in contract.wrong]


@pytest.mark.parametrize("name", PLAIN)
def test_the_code_behind_the_wrong_variants_passes_without_a_mistake(name):
    verdict = check(CONTRACTS[name], PLAIN[name], seed=3000)
    assert verdict.passed, verdict


@pytest.mark.parametrize("seed", [0, 1000])
@pytest.mark.parametrize(("name", "wrong"), VARIANTS)
def test_every_wrong_variant_is_named_on_every_seed(name, wrong, seed):
    failure = check(CONTRACTS[name], CONTRACTS[name].wrong[wrong].impl, seed=seed).failure
    assert failure is not None
    assert failure.like == wrong
    assert failure.hint == CONTRACTS[name].wrong[wrong].hint


SETTINGS = {
    "norm": 'c.norm == "layernorm"',
    "activation": 'c.activation == "gelu"',
    "positions": 'c.positions == "learned"',
    "bias": "c.bias",
    "tied": "c.tied",
}
FEATURES = {  # a feature of a model → the student's line, the same with another condition, and the setting that it is
    "shift": ('c.norm == "layernorm" and c.bias', "{}", None),
    "gate": ('c.activation == "swiglu"', "{}", "activation"),
    "table of positions": ('c.positions == "learned"', "{}", "positions"),
    "biases": ("if c.bias else 0", "if {} else 0", "bias"),
    "output matrix": ("1 if c.tied else 2", "1 if {} else 2", "tied"),
}


def student_with(changes):
    """The student's `transformer` with some of its text replaced."""
    text = STUDENT
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    scope = {}
    exec(text, scope)
    return scope["transformer"]


@pytest.mark.parametrize("seed", [0, 1000])
@pytest.mark.parametrize(
    ("feature", "setting"), [(f, s) for f, (_, _, own) in FEATURES.items() for s in SETTINGS if s != own]
)
def test_no_setting_of_a_model_can_stand_in_for_another(feature, setting, seed):
    """A solution that reads one feature off a setting that often goes with it, or against it, fails."""
    line, form, _ = FEATURES[feature]
    for guess in (SETTINGS[setting], f"not ({SETTINGS[setting]})"):
        wrong = student_with({line: form.format(guess)})
        assert not check(CONTRACTS["transformer"], wrong, seed=seed).passed, guess


def test_a_bundle_of_settings_does_not_pass():
    """Norms by the biases, the gate by the positions and the positions by the activation, all at once."""
    wrong = student_with(
        {
            'c.norm == "layernorm" and c.bias': "c.bias",
            'c.positions == "learned"': 'c.activation == "gelu"',
            'c.activation == "swiglu"': 'c.positions == "rope"',
        }
    )
    assert not check(CONTRACTS["transformer"], wrong).passed


@pytest.mark.parametrize("seed", range(0, 40, 5))
def test_drawn_models_mix_the_styles(seed):
    contract = CONTRACTS["transformer"]
    drawn = [contract.inputs({"drawn": 1}, seed + i, "cpu")["config"] for i in range(60)]
    assert len({(c.norm, c.activation, c.positions, c.bias, c.tied) for c in drawn}) > 20
    assert {c.experts.router_bias for c in drawn if c.experts} == {False, True}


@pytest.mark.parametrize("name", CONTRACTS)
def test_there_are_enough_wrong_variants_and_each_has_a_hint_of_its_own(name):
    hints = [wrong.hint for wrong in CONTRACTS[name].wrong.values()]
    assert len(hints) == len(set(hints)) >= 7


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_drawn_cases_follow_the_seed(name):
    contract = CONTRACTS[name]
    drawn = [contract.inputs({"drawn": 1}, seed, "cpu") for seed in range(20)]
    assert drawn[0] == contract.inputs({"drawn": 1}, 0, "cpu")
    assert any(other != drawn[0] for other in drawn)
    assert all(list(one) == list(contract.inputs(contract.cases[0], 0, "cpu")) for one in drawn)


def test_fewer_microbatches_than_stages_are_asked_for():
    """What passed when m was drawn from p up: all the waits but one left, for any m below p."""

    def mine(schedule, stages, microbatches, chunks):
        idle = (stages - 1) / chunks
        if schedule == "zb-h1":
            idle = (stages - 1) / 3 if microbatches >= stages else (2 * (stages - 1) - 1) / 3
        return idle / (microbatches + idle)

    failure = check(CONTRACTS["pipeline"], mine).failure
    assert failure.case["schedule"] == "zb-h1"
    assert failure.like == "zb-h1_fills_one_or_all"
    contract = CONTRACTS["pipeline"]
    drawn = [contract.inputs({"drawn": 1}, seed, "cpu") for seed in range(300)]
    for schedule in ("gpipe", "1f1b", "zb-h1"):
        few = {one["microbatches"] for one in drawn if one["schedule"] == schedule and one["stages"] == 6}
        assert few & {1, 2, 3, 4, 5}
        assert few & {6, 7, 8, 9, 10, 11, 12}


HELPFUL = {
    "another signature": ("zero", lambda parameters, n: 0, r"called as memory\(parameters, n, stage\): too many"),
    "one number of three": (
        "zero",
        lambda p, n, s: 16 * p,
        r"returned int, expected the tuple \(weights, gradients, o",
    ),
    "two of three": ("zero", lambda p, n, s: (2 * p, 2 * p), r"returned 2 values, expected the tuple \(weights"),
    "None": ("zero", lambda p, n, s: (2 * p, 2 * p, None), "optimizer is None, expected a number"),
    "text": ("pipeline", lambda *_: "27%", "bubble is '27%', expected a number"),
    "not a number": ("pipeline", lambda *_: float("nan"), "bubble: .*nan"),
    "no side": ("roofline", lambda *_: (4.8, "bandwidth"), "side is 'bandwidth', expected 'compute' or 'memory'"),
    "wrong side": ("roofline", lambda *_: (4.8, "memory"), "side: 'memory', expected 'compute'"),
    "dividing by zero": ("tensor_parallel", lambda *_: 1 / 0, "raised ZeroDivisionError"),
    "nothing planned": ("checkpointing", lambda *_: None, "returned NoneType, expected a list of"),
}


@pytest.mark.parametrize("name", HELPFUL)
def test_other_mistakes_are_told_plainly(name):
    contract, impl, message = HELPFUL[name]
    failure = check(CONTRACTS[contract], impl).failure
    assert failure is not None
    assert re.search(message, failure.message), failure.message


# --- the oracles against what was counted by hand ---------------------------------------------------------------------


def test_roofline_counts_a_small_matmul():
    """2 × 4 times 4 × 3: 24 products and as many additions; 8 + 12 + 6 numbers."""
    assert _matmul_oracle(2, 3, 4, 1, 10, 1000) == (4.8, "compute")
    assert _matmul_oracle(2, 3, 4, 2, 1000, 10) == (5.2, "memory")


def test_parameters_of_models_that_were_counted_elsewhere():
    """A tiny one by hand: 40 + 32 embeddings, 4·20 attention, 80 + 68 MLP, 3·8 norms. The others by their numel()."""
    assert _parameters_oracle(_config(_model("gpt", 1, 4, 1, 16, 10, 8))) == (324, 324)
    assert _parameters_oracle(_config(_model("gpt", 12, 768, 12, 3072, 50257, 1024)))[0] == 124_439_808
    llama = _model("llama", 32, 4096, 32, 14336, 128256, 8192, kv_heads=8)
    assert _parameters_oracle(_config(llama))[0] == 8_030_261_248
    experts = {"count": 8, "per_token": 2, "d_ff": 14336}
    mixtral = _model("llama", 32, 4096, 32, 14336, 32000, 32768, kv_heads=8, experts=experts)
    assert _parameters_oracle(_config(mixtral)) == (46_702_792_704, 12_879_925_248)


@pytest.mark.parametrize(("interval", "first_dense", "sparse"), [(1, 0, 6), (2, 0, 3), (4, 0, 1), (2, 1, 2), (3, 3, 1)])
def test_which_layers_have_experts(interval, first_dense, sparse):
    """Six layers; a sparse one has 3 experts of 3·8·10 numbers and a router of 3·8 for a plain MLP of 3·8·24."""
    moe = {"count": 3, "per_token": 1, "d_ff": 10, "interval": interval, "first_dense": first_dense}
    sizes = (6, 8, 2, 24, 17, 8)
    dense, _ = _parameters_oracle(_config(_model("llama", *sizes)))
    total, active = _parameters_oracle(_config(_model("llama", *sizes, experts=moe)))
    assert total - dense == sparse * (3 * 240 + 24 - 576)
    assert total - active == sparse * 2 * 240


def test_decoding_reads_what_was_counted_elsewhere():
    """Llama-2-13B keeps 819,200 bytes a token, DeepSeek-V3 70,272; one token on an H100 takes 8.021 ms."""
    parameters = 13_015_864_320
    cache, seconds, rate = _decode_oracle(_config(LLAMA_2_13B), parameters, 1, 1024, 2, 2, 3.35e12)
    assert cache == 1024 * 819_200
    assert seconds == pytest.approx(8.021e-3, abs=5e-7)
    assert rate == pytest.approx(124.7, abs=0.05)
    assert _decode_oracle(_config(LLAMA_2_13B), parameters, 64, 1024, 2, 2, 3.35e12)[2] == pytest.approx(
        2689.5, abs=0.05
    )
    assert _decode_oracle(_config(WITH_LATENT), 1, 1, 1, 1, 2, 1.0) == (70_272, 70_273, 1 / 70_273)


WANTED = {  # operation → the blocks that a rank must have in the end, each with whose numbers
    "all_reduce": lambda r, n: {block: set(range(n)) for block in range(n)},
    "all_gather": lambda r, n: {block: set(range(n)) for block in range(n)},
    "broadcast": lambda r, n: {block: set(range(n)) for block in range(n)},
    "reduce_scatter": lambda r, n: {r: set(range(n))},
    "all_to_all": lambda r, n: {source * n + r: {source} for source in range(n)},
}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize(("operation", "algorithm"), PROCEDURES)
def test_simulated_collectives_do_what_they_are_for(operation, algorithm, n):
    if n & (n - 1) and algorithm not in ("ring", "tree", "pairwise"):
        n = 1 << n.bit_length()  # the next power of two
    for r, held in enumerate(simulate(operation, algorithm, n).held):
        for block, sources in WANTED[operation](r, n).items():
            assert held[block] == sources


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([(0, 1, {0}), (0, 2, {0})], "rank 0 sends twice"),
        ([(0, 2, {0}), (1, 2, {0})], "rank 2 receives twice"),
        ([(0, 0, {0})], "added twice"),
    ],
)
def test_a_simulated_rank_can_do_only_so_much(messages, complaint):
    ranks = _Ranks([{0: frozenset({r})} for r in range(3)])
    with pytest.raises(AssertionError, match=complaint):
        ranks.step(messages, add=True)


@pytest.mark.parametrize(
    ("operation", "algorithm", "n", "steps", "sent"),
    [
        ("all_reduce", "ring", 4, 6, 1800),  # a quarter, six times
        ("all_reduce", "halving_doubling", 8, 6, 2100),  # ½ + ¼ + ⅛, and back
        ("all_reduce", "recursive_doubling", 8, 3, 3600),
        ("all_reduce", "tree", 5, 6, 3600),  # three children
        ("reduce_scatter", "ring", 3, 2, 800),
        ("all_gather", "doubling", 4, 2, 900),  # a quarter, then a half
        ("all_to_all", "pairwise", 6, 5, 1000),
        ("broadcast", "tree", 3, 2, 2400),
        ("broadcast", "tree", 1, 0, 0),
    ],
)
def test_collectives_counted_by_hand(operation, algorithm, n, steps, sent):
    assert _collective_oracle(operation, algorithm, n, 1200) == (steps, sent)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "recompute", "units"),
    [(1, False, "none", 114), (8, False, "none", 23), (8, True, "none", 14.25), (8, False, "selective", 13)]
    + [(8, True, "selective", 4.25), (1, False, "full", 2)],
)
def test_activations_of_gpt_3(tp, sequence_parallel, recompute, units):
    # Korthikanti et al. 2022, Table 2 with 5as/h = 80
    assert _block_oracle(1, 2048, 12288, 96, tp, sequence_parallel, recompute) == (units * 2048 * 12288,)


@pytest.mark.parametrize(
    ("n", "stage", "gigabytes"),
    [(64, 0, 120), (64, 1, 31.4), (64, 2, 16.6), (64, 3, 1.88), (1024, 1, 30.1), (4, 2, 41.25)],
)
def test_zero_figure_1(n, stage, gigabytes):
    assert sum(_state_oracle(7.5e9, n, stage)) / 1e9 == pytest.approx(gigabytes, rel=4e-3)


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "chunks", "idle"),
    [
        ("gpipe", 1, 3, 1, Fraction(0)),
        ("gpipe", 2, 1, 1, Fraction(1, 2)),  # F · · B B to F · B B ·: half of six ticks
        ("gpipe", 4, 8, 1, Fraction(3, 11)),
        ("1f1b", 4, 8, 1, Fraction(3, 11)),
        ("interleaved", 4, 8, 2, Fraction(3, 19)),
        ("interleaved", 4, 8, 4, Fraction(3, 35)),
        ("zb-h1", 4, 8, 1, Fraction(1, 9)),
        ("zb-h1", 2, 1, 1, Fraction(2, 5)),  # F · · B W: two ticks of five
    ],
)
def test_bubbles_drawn_by_hand(schedule, stages, microbatches, chunks, idle):
    assert idle_share(schedule, stages, microbatches, chunks) == idle


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "factors"),
    [
        (False, "none", (4, 4)),
        (False, "selective", (4, 4)),
        (False, "full", (4, 8)),
        (True, "none", (4, 6)),
        (True, "full", (4, 10)),
    ],
)
def test_tensor_parallel_traffic_of_gpt3(sequence_parallel, recompute, factors):
    """8·b·s·h·(t−1)/t numbers a layer (Narayanan et al. 2021), half of them forward."""
    one = 2048 * 12288 * 7 / 8
    got = _layer_oracle(1, 2048, 12288, 8, 2, sequence_parallel, recompute)
    assert got == tuple(2 * factor * one for factor in factors)


def test_one_device_has_nothing_to_send():
    assert _layer_oracle(1, 8, 8, 1, 2, True, "full") == (0, 0)


@pytest.mark.parametrize("snapshots", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", range(1, 10))
def test_trying_all_schedules_finds_what_the_recursion_does(layers, snapshots):
    assert fewest_runs(layers, snapshots) == _again(layers, snapshots)


def test_the_recursion_finds_what_is_published():
    """Griewank & Walther 2000: the fewest runs for (layers, snapshots)."""
    assert (_again(20, 3), _again(100, 5), _again(100, 10)) == (45, 316, 222)


def test_a_schedule_executed_by_hand():
    store, restore, reverse = ("store", 0), ("restore", 0), ("reverse",)
    assert execute([reverse], 1, 1) == 0
    schedule = [store, ("advance", 2), reverse, restore, ("advance", 1), reverse, restore, reverse]
    assert execute(schedule, 3, 1) == 3


def test_a_schedule_of_numpys_numbers_is_executed():
    schedule = [("store", np.int64(0)), ["advance", np.int32(2)], ("reverse",), ("restore", np.int64(0))]
    schedule += [("advance", np.int8(1)), ("reverse",), ("restore", np.uint8(0)), ("reverse",)]
    assert execute(schedule, 3, 1) == 3
    theirs = CONTRACTS["checkpointing"].reference
    verdict = check(CONTRACTS["checkpointing"], lambda *sizes: _with_numpys_numbers(theirs(*sizes)))
    assert verdict.passed, verdict


def _with_numpys_numbers(schedule):
    return [tuple(np.int64(part) if isinstance(part, int) else part for part in step) for step in schedule]


IMPOSSIBLE = {
    "nothing": ([], "ends with 2 of 2 layers not reversed"),
    "forwards": ([("store", 0), ("reverse",)], r"step 1, \('reverse',\), .*layer 0 is at hand, and 1 is next"),
    "no state left": ([("advance", 1), ("reverse",), ("reverse",)], "step 2, .*no state is at hand after a reverse"),
    "advance from nothing": ([("advance", 1), ("reverse",), ("advance", 1)], "step 2, .*no state is at hand"),
    "never stored": ([("advance", 1), ("reverse",), ("restore", 0)], "step 2, .*nothing was stored there"),
    "a slot too many": ([("store", 1)], r"step 0, \('store', 1\), cannot run: the slots are 0 to 0"),
    "a negative slot": ([("restore", -1)], "the slots are 0 to 0"),
    "too far": ([("advance", 2)], "it leads to layer 2 of 2"),
    "backwards": ([("advance", 1), ("advance", -1)], "step 1, .*it goes -1 layers forward, and must at least one"),
    "nowhere": ([("advance", 0)], r"step 0, \('advance', 0\), cannot run: it goes 0 layers forward"),
    "a fraction": ([("advance", 1.0)], r"step 0, \('advance', 1.0\), cannot run: steps are"),
    "another word": ([("save", 0)], r"step 0, \('save', 0\), cannot run: steps are \('store', slot\)"),
    "no tuple": (["reverse"], "step 0, 'reverse', cannot run: steps are"),
    "no list": ("reverse", "returned str, expected a list of"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_schedule_that_cannot_run_is_told_where(name):
    schedule, message = IMPOSSIBLE[name]
    failure = check(
        CONTRACTS["checkpointing"], lambda layers, snapshots: [("reverse",)] if layers == 1 else schedule
    ).failure
    assert failure.case == {"layers": 2, "snapshots": 1}
    assert re.search(message, failure.message), failure.message


@given(
    budget=st.floats(1e18, 1e26),
    alpha=st.floats(0.25, 0.5),
    beta=st.floats(0.25, 0.5),
    A=st.floats(100, 1000),
    B=st.floats(100, 1000),
)
def test_the_lowest_point_balances_the_slopes(budget, alpha, beta, A, B):
    parameters, tokens = _optimal_oracle(budget, 1.69, A, B, alpha, beta)
    assert 6 * parameters * tokens == pytest.approx(budget, rel=1e-9)
    assert alpha * A / parameters**alpha == pytest.approx(beta * B / tokens**beta, rel=1e-9)


def test_the_lowest_point_where_it_is_known():
    assert _optimal_oracle(6e12, 1.0, 1.0, 1.0, 0.5, 0.5) == pytest.approx((1e6, 1e6), rel=1e-12)
    assert _optimal_oracle(6e12, 3.0, 4.0, 1.0, 0.5, 0.5) == pytest.approx((4e6, 0.25e6), rel=1e-12)
