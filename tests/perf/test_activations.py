"""`mlsys.perf.activations` against the paper's closed forms, and what autograd keeps of modules that run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys.contracts._perf_parallel import _order
from mlsys.loading import import_file
from mlsys.perf.activations import activation_bytes, activation_bytes_per_layer, head_bytes, saved_tensors
from mlsys.perf.configs import MODELS, Experts, gpt, llama

oracle = import_file(Path(__file__).parent / "oracle.py")


def kept(run, model):
    """Bytes of the tensors that autograd keeps: not the parameters, not whole numbers, not one number a row."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage().data_ptr()
        statistic = tensor.ndim == 0 or tensor.shape[-1] == 1
        whole_numbers = not tensor.is_floating_point() and tensor.dtype != torch.bool
        if storage not in own and not statistic and not whole_numbers:
            found.setdefault(storage, []).append(tensor)  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(max(t.numel() * t.element_size() for t in views) for views in found.values())


# --- what autograd keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("config", oracle.SMALL.values(), ids=oracle.SMALL)
def test_saved_tensors_are_those_that_autograd_keeps(config, dropout, layer):
    if layer >= config.layers:
        layer = config.layers - 1
    torch.manual_seed(0)
    block = oracle.Block(config, layer, dropout).bfloat16()
    x = torch.randn(2, 8, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    saved = saved_tensors(config, 2, 8, layer=layer, dropout=dropout)
    assert sum(tensor.bytes for tensor in saved) == kept(lambda: block(x), block)
    assert len({tensor.name for tensor in saved}) == len(saved)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("config", [oracle.GPT, oracle.GQA, oracle.MOE, oracle.MLA], ids=["gpt", "gqa", "moe", "mla"])
def test_activation_bytes_are_what_autograd_keeps_of_the_model(config, recompute):
    torch.manual_seed(0)
    dropout = config is oracle.GPT
    model = oracle.Model(config, dropout=dropout).bfloat16()
    model.recompute = recompute
    tokens = oracle.draw_tokens(config, 2, 8)
    expected = activation_bytes(config, 2, 8, recompute=recompute)
    assert expected == kept(lambda: oracle.loss(model, tokens), model)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "s", "h", "a"), [(1, 2048, 12288, 96), (4, 512, 1024, 16), (3, 40, 64, 8)])
@pytest.mark.parametrize("t", [1, 2, 8])
def test_closed_forms_of_korthikanti(b, s, h, a, t):
    """Table 2, for every combination, exactly."""
    config = gpt(2, h, a, vocab=51200, context=s)
    sbh, scores = s * b * h, 5 * a * s * s * b

    def ours(**settings):
        return activation_bytes_per_layer(config, b, s, tp=t, **settings)

    assert ours() == 10 * sbh + (24 * sbh + scores) // t
    assert ours(sequence_parallel=True) == (34 * sbh + scores) // t
    assert ours(recompute="selective") == 10 * sbh + 24 * sbh // t
    assert ours(recompute="selective", sequence_parallel=True) == 34 * sbh // t
    assert ours(recompute="full") == 2 * sbh
    assert ours(recompute="full", sequence_parallel=True) == 2 * sbh // t


def test_korthikanti_gpt3_factors():
    config, sbh = MODELS["gpt3"], 2048 * 12288
    settings = [
        ({}, 114),
        ({"tp": 8}, 23),
        ({"tp": 8, "sequence_parallel": True}, 14.25),
        ({"tp": 8, "recompute": "selective"}, 13),
        ({"tp": 8, "sequence_parallel": True, "recompute": "selective"}, 4.25),
        ({"recompute": "full"}, 2),
    ]
    for given_, factor in settings:
        assert activation_bytes_per_layer(config, 1, 2048, **given_) == factor * sbh


def test_activation_bytes_of_korthikanti_section_4_3():
    """sbhL/t·(34 + 5as/h) and for the ends sbh/t·(p + 4·(1 + v/h) if p = 1), with sequence parallelism."""
    s, h, a, layers, t, v = 2048, 12288, 96, 96, 8, 51200
    config = gpt(layers, h, a, vocab=v, context=s)
    sbh = s * h
    blocks = layers * (34 * sbh + 5 * a * s * s) // t
    shared = {"tp": t, "sequence_parallel": True}
    assert activation_bytes(config, 1, s, **shared) == blocks + sbh // t + 4 * sbh // t + 4 * s * v // t
    assert activation_bytes(config, 1, s, pp=8, **shared) == blocks + 8 * sbh // t
    interleaved = activation_bytes(config, 1, s, pp=8, chunks=3, **shared)
    # Times 1 + (p-1)/(p·chunks); the first chunk is given two rounds of p before its first backward pass.
    assert interleaved == blocks * (8 * 3 + 7) // (8 * 3) + 16 * sbh // t
    few = activation_bytes(config, 1, s, pp=8, microbatches=2, **shared)
    assert few == blocks // 4 + 2 * sbh // t
    assert activation_bytes(config, 1, s, pp=8, chunks=3, microbatches=8, **shared) == blocks + 8 * sbh // t


# --- over devices, and in general -------------------------------------------------------------------------------------


def test_vocabulary_is_padded_to_the_devices():
    """The logits of 50 or 51 words take what those of 51 take, 17 on each of three devices."""
    sizes = [activation_bytes(replace(oracle.GPT, vocab=vocab), 2, 6, tp=3) for vocab in (50, 51, 52)]
    assert sizes[0] == sizes[1] == sizes[2] - 2 * 6 * 4


def test_head_is_what_one_stage_keeps_beyond_its_blocks():
    """In bf16 with Llama 3's vocabulary: two inputs of 4096 wide, and logits that weigh 31 times as much."""
    config = MODELS["llama-3-8b"]
    assert head_bytes(config, 1, 8192) == 2 * 8192 * 4096 * 2 + 8192 * 128256 * 4
    assert head_bytes(config, 3, 8192, tp=8) == 3 * (2 * 8192 * 4096 * 2 + 8192 * 128256 * 4 // 8)
    assert head_bytes(config, 1, 8192, tp=8, sequence_parallel=True) == head_bytes(config, 1, 8192) // 8
    assert head_bytes(config, 1, 8192, itemsize=4) == 2 * 8192 * 4096 * 4 + 8192 * 128256 * 4
    for settings in ({}, {"tp": 4}, {"tp": 4, "sequence_parallel": True}, {"itemsize": 1}):
        blocks = sum(activation_bytes_per_layer(config, 2, 8192, layer=layer, **settings) for layer in range(32))
        assert activation_bytes(config, 2, 8192, **settings) == blocks + head_bytes(config, 2, 8192, **settings)


def test_last_stage_holds_most_where_logits_outweigh_blocks():
    """Llama-3-8B over two stages: the last has 16 blocks' inputs for one microbatch, and the logits of it."""
    config = MODELS["llama-3-8b"]
    one = 8192 * 4096 * 2  # a block's input
    full = activation_bytes(config, 1, 8192, pp=2, recompute="full")
    assert full == 16 * one + 2 * one + 8192 * 128256 * 4 == 5_410_652_160
    interleaved = activation_bytes(config, 1, 8192, pp=2, chunks=4, recompute="full")
    assert interleaved == (3 * 2 + 1) * 4 * one + 2 * one + 8192 * 128256 * 4  # one microbatch of the last chunk
    none = activation_bytes(config, 1, 8192, pp=2)  # the first stage has twice as much of its blocks
    assert none == 32 * activation_bytes_per_layer(config, 1, 8192)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize(("pp", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4), (2, 8)])
@pytest.mark.parametrize(("vocab", "interval"), [(8, 1), (8, 3), (9000, 1), (9000, 3)])
def test_the_fullest_device_is_that_of_the_schedule(pp, chunks, microbatches, vocab, interval):
    """Against the order of operations by which the contract of `pipeline` runs its schedules."""
    if chunks > 1:
        microbatches *= pp
    experts = Experts(4, 2, 40, first_dense=2, interval=interval)
    config = replace(llama(16, 16, 2, 24, vocab=vocab, context=16), experts=experts)
    blocks = [activation_bytes_per_layer(config, 1, 8, layer=layer, dropout=True) for layer in range(16)]
    blocks[0] += 8 * 16
    blocks[-1] += 2 * 8 * 16 * 2 + 8 * vocab * 4
    held, most = 16 // (pp * chunks), 0
    for rank in range(pp):
        here = 0
        schedule = "interleaved" if chunks > 1 else "1f1b"
        for kind, chunk, _ in _order(schedule, pp, microbatches, chunks, rank):
            size = sum(blocks[(chunk * pp + rank) * held :][:held])
            here += size if kind == "forward" else -size
            most = max(most, here)
        assert here == 0
    got = activation_bytes(config, 1, 8, pp=pp, chunks=chunks, microbatches=microbatches, dropout=True)
    assert got == most


def test_a_stage_holds_its_own_layers():
    """Of five blocks, the third and the fifth have experts: a stage is not an average."""
    stages = activation_bytes(oracle.MOE, 1, 8, pp=5, microbatches=5)
    plain, sparse = (activation_bytes_per_layer(oracle.MOE, 1, 8, layer=layer) for layer in (0, 2))
    assert stages == max(5 * plain, 3 * sparse, sparse + head_bytes(oracle.MOE, 1, 8))
    many = replace(oracle.MOE, experts=replace(oracle.MOE.experts, per_token=4))
    assert activation_bytes(many, 1, 8, pp=5) == 3 * activation_bytes_per_layer(many, 1, 8, layer=2) > 5 * plain
    four = replace(oracle.MOE, layers=4, experts=replace(oracle.MOE.experts, first_dense=0, interval=3))
    chunked = activation_bytes(four, 1, 8, pp=2, chunks=2, microbatches=4)  # layers 0 and 2
    first, third = (activation_bytes_per_layer(four, 1, 8, layer=layer) for layer in (0, 2))
    assert chunked == 3 * first + 2 * third


@given(
    oracle.configs(divisible_by=4),
    st.sampled_from((1, 2, 4)),
    st.sampled_from(("none", "selective", "full")),
    st.integers(1, 3),
    st.integers(1, 4).map(lambda n: 4 * n),
)
def test_shards_with_sequence_parallelism_sum_to_the_whole(config, tp, recompute, batch, seq):
    for layer in range(config.layers):
        whole = activation_bytes_per_layer(config, batch, seq, layer=layer, recompute=recompute)
        shard = activation_bytes_per_layer(
            config, batch, seq, layer=layer, recompute=recompute, tp=tp, sequence_parallel=True
        )
        assert tp * shard == whole
    whole = activation_bytes(config, batch, seq, recompute=recompute)
    assert tp * activation_bytes(config, batch, seq, recompute=recompute, tp=tp, sequence_parallel=True) == whole


@given(oracle.configs(divisible_by=4), st.sampled_from((1, 2, 4)), st.booleans(), st.integers(1, 3))
def test_recomputation_and_parallelism_never_need_more(config, tp, sequence_parallel, batch):
    shared = {"tp": tp, "sequence_parallel": sequence_parallel}
    none, selective, full = (
        activation_bytes(config, batch, 8, recompute=recompute, **shared) for recompute in ("none", "selective", "full")
    )
    assert full < selective < none
    assert none <= activation_bytes(config, batch, 8)
    assert activation_bytes(config, batch, 8, dropout=False) <= activation_bytes(config, batch, 8, dropout=True)


def test_key_value_heads_are_copied_where_devices_are_more():
    by_name = {s.name: s.bytes for s in saved_tensors(oracle.GQA, 1, 12, tp=2)}
    copied = {s.name: s.bytes for s in saved_tensors(replace(oracle.GQA, heads=8, kv_heads=2), 1, 12, tp=8)}
    assert by_name["keys"] == 12 * 1 * 4 * 2  # one head of 4, two bytes
    assert copied["keys"] == 12 * 1 * 4 * 2


@given(oracle.configs(), st.integers(1, 4), st.integers(1, 31))
def test_activations_grow_with_batch_sequence_and_layers(config, batch, seq):
    here = activation_bytes(config, batch, seq)
    assert activation_bytes(config, batch + 1, seq) > here
    assert activation_bytes(config, batch, seq + 1) > here
    assert activation_bytes(replace(config, layers=config.layers + 1), batch, seq) > here
    assert activation_bytes(config, 2 * batch, seq) == 2 * here


def test_numpys_integers_are_counted_like_pythons():
    """And as Python's: bytes of small integers would wrap around."""
    config, small = MODELS["gpt3"], np.int8
    options = {"tp": 8, "pp": 8, "chunks": 2, "microbatches": 16, "itemsize": 2, "sequence_parallel": True}
    for function, names in ((activation_bytes, options), (head_bytes, ("tp", "itemsize", "sequence_parallel"))):
        settings = {name: options[name] for name in names}
        numpys = {name: value if value is True else small(value) for name, value in settings.items()}
        got = function(config, small(100), np.int16(2048), **numpys)
        assert type(got) is int
        assert got == function(config, 100, 2048, **settings)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: saved_tensors(oracle.GPT, 0, 4), "batch"),
        (lambda: activation_bytes(oracle.GPT, 1, 17), r"seq=17 is longer than the 16 positions.*context=17"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, layer=2), "layer=2.*layers=2"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, layer=-1), "layer"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, tp=0), "tp"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, tp=2), "tp=2 does not divide heads=3"),
        (lambda: saved_tensors(replace(oracle.GPT, d_ff=97), 1, 4, tp=3), "tp=3 does not divide d_ff=97"),
        (lambda: saved_tensors(replace(oracle.MOE, experts=Experts(4, 2, 13)), 1, 4, tp=2), r"experts\.d_ff=13"),
        (lambda: saved_tensors(oracle.GQA, 1, 4, tp=3, recompute="no"), "recompute"),
        (lambda: saved_tensors(replace(oracle.GQA, d_ff=42), 1, 6, tp=3), "tp=3 and kv_heads=2"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, tp=3, sequence_parallel=True), "tp=3 does not divide seq=4"),
        (lambda: saved_tensors(oracle.GPT, 1, 4, itemsize=0), "itemsize"),
        (lambda: head_bytes(oracle.GPT, 0, 4), "batch"),
        (lambda: head_bytes(oracle.GPT, 1, 4, tp=2), "tp=2 does not divide heads=3"),
        (lambda: head_bytes(oracle.GPT, 1, 4, itemsize=0), "itemsize"),
        (lambda: activation_bytes(oracle.GPT, 1, 4, pp=3), "layers=2 do not divide into pp=3"),
        (lambda: activation_bytes(oracle.GPT, 1, 4, chunks=2), "chunks=2 needs pp"),
        (
            lambda: activation_bytes(replace(oracle.GPT, layers=4), 1, 4, pp=2, chunks=2, microbatches=3),
            "multiple of pp=2",
        ),
        (lambda: activation_bytes(oracle.GPT, 1, 4, microbatches=0), "microbatches"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call()
