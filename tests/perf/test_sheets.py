"""The sheets say what the functions that they are about say, and the lines add up."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.perf import (
    activations,
    collectives,
    hardware,
    inference,
    pipeline,
    sheets,
    tensor_parallel,
    transformer,
    zero,
)
from mlsys.perf.configs import MODELS

A100, H100 = hardware.find("a100-80"), hardware.find("h100")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_add_up_by_the_formulas_shown(name):
    sheet = sheets.train(MODELS[name], H100, gpus=1)
    assert sheet.values["N"] == transformer.parameters(MODELS[name]).total
    untied = replace(MODELS[name], tied=not MODELS[name].tied, bias=not MODELS[name].bias)
    assert sheets.train(untied, H100, gpus=1).values["N"] == transformer.parameters(untied).total


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", ["gpt3", "llama-3-70b", "mixtral-8x7b"])
def test_activations_are_those_counted_tensor_by_tensor(model, recompute, sequence_parallel):
    config = MODELS[model]
    sheet = sheets.train(config, A100, gpus=64, tp=8, pp=8, recompute=recompute, sequence_parallel=sequence_parallel)
    options = {"recompute": recompute, "tp": 8, "sequence_parallel": sequence_parallel}
    block = activations.activation_bytes_per_layer(config, 1, config.context, layer=config.layers - 1, **options)
    assert sheet.values["block"] == pytest.approx(block, rel=1e-12)


@pytest.mark.parametrize("model", ["gpt3", "llama-3-8b"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("pp", "chunks"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_activations_of_the_fullest_device_are_those_of_the_library(model, sequence_parallel, pp, chunks, rounds):
    config = MODELS[model]
    layout = {"tp": 4, "pp": pp, "chunks": chunks, "sequence_parallel": sequence_parallel, "recompute": "full"}
    sheet = sheets.train(config, A100, gpus=4 * pp, batch=rounds * pp, **layout)
    want = activations.activation_bytes(config, 1, config.context, microbatches=rounds * pp, **layout)
    assert sheet.values["activations"] == pytest.approx(want, rel=1e-12)


def test_a_long_context_does_not_fit_because_of_its_logits():
    sheet = sheets.train(MODELS["llama-3-8b"], H100, gpus=64, zero=3, recompute="full", seq=131072)
    assert sheet.values["full"] > 1
    assert {line.name: line.note for line in sheet.lines}["full"] == "DOES NOT FIT"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_model_state_is_zeros(stage):
    sheet = sheets.train(MODELS["llama-2-7b"], A100, gpus=64, tp=2, pp=4, zero=stage)
    want = zero.memory(sheet.values["N"] / 8, 8, stage)
    assert sheet.values["weights"] == pytest.approx(want.weights)
    assert sheet.values["gradients"] == pytest.approx(want.gradients)
    assert sheet.values["optimizer"] == pytest.approx(want.optimizer)
    sent = zero.communication(sheet.values["N"] / 8, 8, stage, microbatches=int(sheet.values["m"]))
    assert sheet.values["data"] == pytest.approx(sent / A100.network.bandwidth)


@pytest.mark.parametrize(("chunks", "schedule"), [(1, "1f1b"), (2, "interleaved")])
def test_step_is_that_of_the_schedule(chunks, schedule):
    sheet = sheets.train(MODELS["gpt3"], A100, gpus=64, tp=8, pp=8, chunks=chunks, batch=32)
    stage = pipeline.Times(*[sheet.values["stage"] / 3] * 3)
    want = pipeline.makespan(schedule, 8, 32, chunks=chunks, times=stage)
    assert sheet.values["lower"] == pytest.approx(want)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_time_is_that_of_its_traffic(recompute, sequence_parallel):
    options = {"recompute": recompute, "sequence_parallel": sequence_parallel}
    sheet = sheets.train(MODELS["gpt3"], A100, gpus=8, tp=8, batch=3, **options)
    traffic = tensor_parallel.layer_traffic(1, 2048, 12288, 8, **options)
    assert sheet.values["tensor"] == pytest.approx(3 * 96 * traffic.seconds(0, 1 / A100.link.bandwidth))


def test_megatrons_run_comes_out_between_the_bounds():
    # Narayanan et al. 2021, Table 1 and section 5.1: 175 B on 1,024 A100 reached 140 of 312 TFLOP/s, about 34 days
    sheet = sheets.train(
        MODELS["gpt3"], A100, gpus=1024, tp=8, pp=16, batch=1536, recompute="full", efficiency=0.55, tokens=300e9
    )
    assert sheet.values["time_best"] < 34 * 86400 < sheet.values["time_worst"]
    assert sheet.values["full"] < 1


def test_one_device_has_nothing_to_send():
    sheet = sheets.train(MODELS["gpt2"], A100, gpus=1)
    assert not {"tensor", "pipeline", "data", "upper"} & set(sheet.values)
    assert sheet.values["mfu_best"] == pytest.approx(0.5 * 4 / 4)  # what efficiency says, with nothing else to lose


@settings(deadline=None, max_examples=30)
@given(gpus=st.sampled_from([1, 2, 4, 8, 16]), batch=st.integers(1, 4), tokens=st.floats(1e9, 1e13))
def test_more_work_takes_longer_and_more_devices_hold_less(gpus, batch, tokens):
    base = sheets.train(MODELS["llama-2-7b"], A100, gpus=gpus, batch=batch * gpus, tokens=tokens, zero=3)
    more = sheets.train(MODELS["llama-2-7b"], A100, gpus=2 * gpus, batch=2 * batch * gpus, tokens=2 * tokens, zero=3)
    assert more.values["weights"] == pytest.approx(base.values["weights"] / 2)
    assert more.values["time_best"] == pytest.approx(base.values["time_best"])  # twice the work on twice the devices
    parts = [base.values[part] for part in ("weights", "gradients", "optimizer", "activations")]
    assert base.values["memory"] == pytest.approx(sum(parts))


@pytest.mark.parametrize("model", MODELS)
def test_serving_is_what_inference_says(model):
    config = MODELS[model]
    context = min(config.context, 1000)
    sheet = sheets.serve(config, H100, gpus=1, batch=8, context=context)
    step = inference.decode_step(config, 8, context, H100.bandwidth, peak=H100.peak["bfloat16"], devices=1)
    assert sheet.values["cache"] == step.kv_bytes == 8 * context * inference.kv_cache_bytes_per_token(config)
    assert max(sheet.values["memory"], sheet.values["compute"]) * sheet.values["n"] == pytest.approx(step.seconds)
    assert sheet.values["rate"] == pytest.approx(8 * sheet.values["each"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prompt", [1, 16, 1000])
@pytest.mark.parametrize("gpus", [1, 4])
def test_the_first_token_does_not_depend_on_the_batch_that_is_decoded(model, prompt, gpus):
    config = MODELS[model]
    if config.heads % gpus or ((config.kv_heads < gpus or config.latent) and gpus > 1):
        gpus = 1
    peak = H100.peak["bfloat16"]
    want = inference.prefill_seconds(config, 1, prompt, peak, hardware_bandwidth=H100.bandwidth, devices=gpus)
    for batch in (1, 64):
        sheet = sheets.serve(config, H100, gpus=gpus, batch=batch, context=1000, prompt=prompt)
        assert sheet.values["first"] == pytest.approx(want)


def test_more_devices_than_key_value_heads_hold_copies():
    at = {n: sheets.serve(MODELS["llama-3-70b"], H100, gpus=n, context=8192).values for n in (8, 16, 64)}
    assert [at[n]["copies"] for n in at] == [1, 2, 8]
    assert at[64]["sequence"] == 8 * at[8]["sequence"]
    latent = sheets.serve(MODELS["deepseek-v3"], H100, gpus=16, context=8192).values
    assert latent["copies"] == 16


@pytest.mark.parametrize(("batch", "gpus", "side"), [(1, 1, "memory"), (512, 1, "compute"), (512, 16, "link")])
def test_what_binds_is_what_takes_longest(batch, gpus, side):
    sheet = sheets.serve(MODELS["llama-3-70b"], H100, gpus=gpus, batch=batch, context=16)
    assert {line.name: line.note for line in sheet.lines}["step"] == f"{side} binds"


def test_what_fits_and_what_does_not():
    notes = {line.name: line.note for line in sheets.serve(MODELS["llama-2-70b"], H100).lines}
    assert notes["most"] == "THE WEIGHTS DO NOT FIT"
    fits = sheets.serve(MODELS["llama-2-7b"], H100, batch=4)
    assert {line.name: line.note for line in fits.lines}["cache"] == "fits"
    most = int(fits.values["most"])
    assert most == inference.max_batch(MODELS["llama-2-7b"], H100.memory, 4096)
    over = sheets.serve(MODELS["llama-2-7b"], H100, batch=most + 1)
    assert {line.name: line.note for line in over.lines}["cache"] == "DOES NOT FIT"


def test_four_bit_weights_are_a_quarter():
    full, quarter = (sheets.serve(MODELS["llama-2-7b"], H100, weight_bits=bits) for bits in (16, 4))
    assert quarter.values["weights"] == full.values["weights"] / 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 8, 64])
def test_all_reduce_rows_are_the_costs_and_the_formulas_are_those_of_the_counts(ranks):
    rows = sheets.all_reduce(ranks, 2**20, 5e-6, 1e9)
    assert [row["fastest"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    for row in rows:
        cost = collectives.cost("all_reduce", row["algorithm"], ranks, 2**20)
        assert row["steps"] == cost.steps
        assert row["seconds"] == pytest.approx(cost.seconds(5e-6, 1e-9))
    if ranks in (2, 8, 64):
        assert all("steps_formula" in row and "bytes_formula" in row for row in rows)


def test_hierarchical_needs_to_know_the_node():
    names = [row["algorithm"] for row in sheets.all_reduce(8, 2**20, 5e-6, 1e9, local=4)]
    assert "hierarchical" in names
    assert "hierarchical" not in [row["algorithm"] for row in sheets.all_reduce(8, 2**20, 5e-6, 1e9)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gpus": 0}, "gpus=0"),
        ({"gpus": 7, "tp": 2}, "gpus=7"),
        ({"gpus": 5, "tp": 5}, "tp=5"),
        ({"gpus": 5, "pp": 5}, "pp=5"),
        ({"gpus": 8, "chunks": 2}, "chunks=2"),
        ({"gpus": 8, "pp": 8, "chunks": 2, "batch": 12}, "batch=12"),
        ({"gpus": 8, "batch": 12}, "batch=12"),
        ({"gpus": 8, "efficiency": 1.5}, "efficiency=1.5"),
        ({"gpus": 8, "zero": 4}, "zero=4"),
        ({"gpus": 8, "tokens": -1}, "tokens=-1"),
        ({"gpus": 8, "tokens": float("nan")}, "tokens=nan"),
        ({"gpus": 8, "dtype": "float3"}, "float3"),
    ],
)
def test_bad_layout_is_named(options, named):
    with pytest.raises((ValueError, LookupError), match=named):
        sheets.train(MODELS["gpt3"], A100, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 0}, "batch=0"),
        ({"gpus": 3}, "gpus=3"),
        ({"weight_bits": 0}, "weight_bits=0"),
        ({"context": 0}, "context=0"),
    ],
)
def test_bad_serving_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        sheets.serve(MODELS["llama-2-7b"], H100, **options)


def test_a_machine_without_a_link_cannot_be_laid_out():
    alone = replace(A100, link=None, network=None)
    with pytest.raises(ValueError, match="no link"):
        sheets.train(MODELS["gpt2"], alone, gpus=2)
    with pytest.raises(ValueError, match="bandwidth=0"):
        sheets.all_reduce(8, 1024, 1e-6, 0)
