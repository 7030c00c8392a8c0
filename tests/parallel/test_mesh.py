"""A transformer on any mesh takes the step of one process, sends what it must once, and comes back whole."""

import copy
import doctest
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from mlsys.contracts import check, find
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel import LaunchError, _mesh_grid, launch, ledger
from mlsys.parallel._mesh_replicas import gradients_of
from mlsys.parallel._tensor_shards import cut_of
from mlsys.parallel.mesh import KINDS, Grid, Parallel, Place, groups, mesh, show
from mlsys.parallel.schedules import gpipe, interleaved, one_f_one_b, sequential, zb_h1, zb_h2, zb_v
from mlsys.perf import zero as formulas
from mlsys.perf.configs import gpt, llama

CONFIGS = {
    "gpt": gpt(2, 16, 4, vocab=29, context=12),  # tied, learned positions, biases; a vocabulary that nothing divides
    "llama": llama(2, 16, 4, 24, vocab=28, context=12, kv_heads=2),
    "one key/value head, tied": replace(llama(2, 16, 4, 24, vocab=13, context=12, kv_heads=1), tied=True),
}


def model_of(name, dtype=torch.float64, seed=0):
    """With weights, biases and norms that all matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(CONFIGS[name], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + 0.2 * noise)
    return model


def batch(name, rows=9, t=8, seed=1):
    """Tokens and targets, the same on all ranks: 9 rows are 5 and 4 on two replicas, and uneven microbatches."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, CONFIGS[name].vocab, (2, rows, t), generator=generator)
    return tokens, targets


def mean_loss(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def close(got, want, tolerance=1e-10):
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max())


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_examples_in_docstrings():
    assert doctest.testmod(_mesh_grid).failed == 0


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_groups_share_out_all_ranks_and_meet_in_one(dp, pp, tp):
    grid = Grid(dp, pp, tp)
    assert groups(dp, pp, tp) == {kind: grid.groups(kind) for kind in KINDS}
    for kind in KINDS:
        members = grid.groups(kind)
        assert sorted(rank for group in members for rank in group) == list(range(dp * pp * tp))
        assert {len(group) for group in members} == {getattr(grid, kind)}
        for group in members:
            places = [grid.place(rank) for rank in group]
            assert [getattr(place, kind) for place in places] == list(range(len(group)))
            assert len({place._replace(**{kind: 0}) for place in places}) == 1
    assert all(grid.rank(grid.place(rank)) == rank for rank in range(grid.ranks))
    assert all(group == list(range(group[0], group[0] + tp)) for group in grid.groups("tp"))


def test_grid_says_what_is_wrong():
    with pytest.raises(ValueError, match="dp must be at least 1"):
        groups(0, 1, 1)
    with pytest.raises(ValueError, match="kind"):
        Grid(2, 1, 1).groups("ep")
    with pytest.raises(ValueError, match="rank=8"):
        Grid(2, 2, 2).place(8)
    with pytest.raises(ValueError, match=r"place.tp=2"):
        Grid(2, 2, 2).rank(Place(0, 0, 2))
    assert show(Grid(12, 1, 1)).splitlines()[-4].startswith("replica 11") or "replica 11" in show(Grid(12, 1, 1))
    with pytest.raises(RuntimeError, match="no process group"):
        mesh()


def test_the_contract():
    contract = find("parallel.mesh")
    assert check(contract, groups).passed
    for name, wrong in contract.wrong.items():
        assert not check(contract, wrong.impl).passed, name


# --- a step -----------------------------------------------------------------------------------------------------------


def schedules_of(pp):
    """Those that this many ranks run in the tests: all of them are tables of one executor."""
    if pp == 1:
        return [None, one_f_one_b(1, 3), zb_h1(1, 2)]
    return [one_f_one_b(pp, 3), zb_h1(pp, 4), interleaved(pp, 4, 2), zb_v(pp, 3)]


def gradients(model, whole):
    """Each of this rank's against its part of one process's."""
    want = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        share = cut_of(name, whole.config, model.grid.tp).share(want[name], model.place.tp, model.grid.tp)
        assert parameter.grad is not None, name
        close(parameter.grad, share)


def one_step(grid, name, schedule, sequence_parallel=False):
    """Loss, gradients, and their norm; then another backward pass on top, and the mean loss by forward passes."""
    whole, (tokens, targets) = model_of(name), batch(name)
    model = Parallel(whole, grid, schedule, sequence_parallel=sequence_parallel)
    held, all_of_it = (sum(p.numel() for p in one.parameters()) for one in (model, whole))
    assert held < all_of_it if model.grid.pp * model.grid.tp > 1 else held == all_of_it
    loss = mean_loss(whole, tokens, targets)
    loss.backward()
    close(model.step(*model.part(tokens, targets)), loss)
    gradients(model, whole)
    mean_loss(whole, tokens, targets).backward()
    model.step(*model.part(tokens, targets))
    gradients(model, whole)
    for norm_type, most in ((float("inf"), 1e9), (2.0, 0.3)):
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), most, norm_type)
        close(model.clip_grad_norm(most, norm_type), norm)
    gradients(model, whole)
    close(model.evaluate(*model.part(tokens, targets)), loss)
    full = model.full_state_dict()
    assert list(full) == list(whole.state_dict())
    assert all(torch.equal(full[key], value) for key, value in whole.state_dict().items())
    model.close()


def three_steps(grid, name, schedule, zero):
    """AdamW with clipping: the weights of one process, and its loss from then on."""
    whole, (tokens, targets) = model_of(name), batch(name)
    model = Parallel(copy.deepcopy(whole), grid, schedule, zero=zero)
    own, one = model.optimizer(torch.optim.AdamW, lr=0.01), torch.optim.AdamW(whole.parameters(), lr=0.01)
    for _ in range(3):
        own.zero_grad()
        one.zero_grad()
        loss = mean_loss(whole, tokens, targets)
        loss.backward()
        close(model.step(*model.part(tokens, targets)), loss)
        close(model.clip_grad_norm(0.3), torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.3))
        own.step()
        one.step()
    full = model.full_state_dict(rank0_only=True)
    assert bool(full) is (dist.get_rank() == 0)
    for key, value in full.items():
        close(value, whole.state_dict()[key], 1e-7)  # Adam's first steps divide a small gradient by its own size
    states = sum(t.numel() for state in own.state.values() for t in state.values() if t.ndim)
    shares = 2 * sum(p.numel() for p in model.parameters())
    assert states <= shares / model.grid.dp + 2 * 1024 if zero else states == shares
    model.close()


def on_mesh(dp, pp, tp):
    grid = mesh(dp, pp, tp)
    names = list(CONFIGS)
    for i, schedule in enumerate(schedules_of(pp)):
        one_step(grid, names[i % 3], schedule)
        if tp > 1:
            one_step(grid, names[(i + 1) % 3], schedule, sequence_parallel=True)
    for zero in (None, 1, 2):
        if zero != 2 or pp == 1:
            three_steps(grid, "gpt", schedules_of(pp)[0], zero)


MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_takes_the_step_of_one_process(shape):
    launch(partial(on_mesh, *shape), shape[0] * shape[1] * shape[2], timeout=120)


def all_three():
    grid = mesh(2, 2, 2)
    assert (grid.get_group("tp").size(), dist.get_process_group_ranks(grid.get_group("pp"))[1] >= 4) == (2, True)
    own = Grid(2, 2, 2)
    for kind in KINDS:
        assert dist.get_process_group_ranks(grid.get_group(kind)) == own.group_of(dist.get_rank(), kind)
    one_step(grid, "one key/value head, tied", zb_h1(2, 3), sequence_parallel=True)
    three_steps(grid, "gpt", one_f_one_b(2, 3), 1)


def test_all_three_on_eight_ranks():
    launch(all_three, 8, timeout=120)


def alone():
    grid = mesh()
    one_step(grid, "llama", None)
    one_step(grid, "gpt", sequential(1, 2))
    three_steps(grid, "gpt", gpipe(1, 2), 1)


def test_one_rank_is_a_mesh_too():
    launch(alone, 1, timeout=60)


# --- details ----------------------------------------------------------------------------------------------------------


def when_weights_get_their_gradients(sequence_parallel):
    """Of the matrices in W and in no other operation, of the norms in B; and each W computes something."""
    whole, (tokens, targets) = model_of("llama"), batch("llama")
    model = Parallel(whole, mesh(1, 2, 2), zb_h1(2, 3), sequence_parallel=sequence_parallel)
    pipe, now, seen = model.pipeline, [], []
    do = pipe._do

    def watched(position, op, step):
        now[:] = [op]
        do(position, op, step)

    pipe._do = watched
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((now[0].kind, name)))
    loss = mean_loss(whole, tokens, targets)
    loss.backward()
    close(model.step(tokens, targets), loss)
    gradients(model, whole)
    for name, _ in model.named_parameters():
        matrix = "norm" not in name and "token_embedding" not in name
        assert [kind for kind, one in seen if one == name] == 3 * ["W" if matrix else "B"], name
    model.close()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_w_computes_the_gradients_of_tensor_parallel_layers(sequence_parallel):
    launch(partial(when_weights_get_their_gradients, sequence_parallel), 4, timeout=120)


def tied_copies():
    """Three replicas, whose sums depend on the order: the copies of a tied weight must not."""
    for zero in (None, 1):
        model = Parallel(model_of("gpt", torch.float32), mesh(3, 2, 1), one_f_one_b(2, 2), zero=zero)
        optimizer = model.optimizer(torch.optim.AdamW, lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            model.step(*model.part(*batch("gpt", rows=8, seed=step)))
            optimizer.step()
        own = dict(model.named_parameters())["token_embedding.weight"].detach().clone()
        everyone = [torch.empty_like(own) for _ in range(6)]
        dist.all_gather(everyone, own)
        assert all(torch.equal(other, everyone[0]) for other in everyone)
        model.close()


def test_copies_of_a_tied_weight_stay_equal_to_the_bit():
    launch(tied_copies, 6, timeout=60)


def traffic_of(zero):
    """Bytes between replicas, for one microbatch and for four: once a step, whatever their number."""
    grid, found = mesh(2, 2, 1), []
    for m in (1, 4):
        model = Parallel(model_of("llama"), grid, gpipe(2, m), zero=zero, algorithm="ring" if zero is None else "auto")
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        model.step(*model.part(*batch("llama")))
        optimizer.zero_grad()
        loss = model.backward(*model.part(*batch("llama")))
        assert loss.ndim == 0
        with ledger() as book:
            model.reduce()
            optimizer.step()
        found.append(sum(book.size.values()))
        own = 8 * sum(p.numel() for p in model.parameters())
        passes = 2 if zero else 1  # a reduce-scatter and an all-gather, or an all-reduce
        assert passes * own <= found[-1] <= passes * (own + 8 * 32 * 40), (book, own)
        if zero is None:
            assert book.calls["all_reduce"] == 1
            volume = formulas.communication(sum(p.numel() for p in model.parameters()), 2, 0, bytes_gradients=8)
            assert abs(book.sent - volume) < 64
        model.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("zero", [None, 1])
def test_replicas_meet_once_a_step(zero):
    launch(partial(traffic_of, zero), 4, timeout=60)


def accumulated():
    """Two backward passes before one meeting are the mean of both batches' sums."""
    whole = model_of("llama")
    model = Parallel(whole, mesh(2, 1, 1))
    for seed in (1, 2):
        tokens, targets = batch("llama", seed=seed)
        mean_loss(whole, tokens, targets).backward()
        model.backward(*model.part(tokens, targets))
    model.reduce()
    gradients(model, whole)
    model.close()
    # What a backward pass has left is gone after zero_grad, in slices too.
    model = Parallel(whole, mesh(2, 1, 1), zero=1)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    model.backward(*model.part(*batch("llama", seed=3)))
    optimizer.zero_grad()
    model.step(*model.part(*batch("llama", seed=1)))
    whole.zero_grad()
    mean_loss(whole, *batch("llama", seed=1)).backward()
    close(model.clip_grad_norm(1e9), torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9))
    model.close()
    # Lists of microbatches of different lengths, and more tokens on one replica than on the other.
    first, second = batch("llama", rows=2, t=8), batch("llama", rows=3, t=4, seed=5)
    third = batch("llama", rows=1, t=12, seed=6)
    model = Parallel(whole, mesh(2, 1, 1), one_f_one_b(1, 2))
    mine = [first, second] if dist.get_rank() == 0 else [third, third]
    got = model.step([tokens for tokens, _ in mine], [targets for _, targets in mine])
    whole.zero_grad()
    parts = (first, second, third, third)
    total = sum(tokens.numel() for tokens, _ in parts)
    want = sum(mean_loss(whole, *one) * one[0].numel() / total for one in parts)
    want.backward()
    close(got, want)
    gradients(model, whole)
    model.close()


def test_accumulation_and_the_mean_over_all_tokens():
    launch(accumulated, 2, timeout=60)


def ignored():
    """Targets of −100 here and there, in a whole microbatch, and in a whole replica; none in the last round."""
    whole = model_of("llama")
    for shape, sequence_parallel, zero in (
        ((2, 2, 1), False, None), ((2, 1, 2), True, None), ((4, 1, 1), False, None), ((1, 2, 2), True, None),
        ((2, 2, 1), False, 1), ((2, 1, 2), False, 2),
    ):  # fmt: skip
        grid = mesh(*shape)
        model = Parallel(whole, grid, one_f_one_b(shape[1], 2), sequence_parallel=sequence_parallel, zero=zero)
        optimizer = model.optimizer(torch.optim.SGD, lr=0.0)
        tokens, targets = batch("llama")
        for rows, columns in ((slice(None), slice(2)), (slice(3), slice(None)), (slice(5), slice(None))):
            targets[rows, columns] = -100
            whole.zero_grad()
            optimizer.zero_grad()
            want = mean_loss(whole, tokens, targets)
            want.backward()
            close(model.step(*model.part(tokens, targets.int())), want)
            if zero is None:
                gradients(model, whole)
            close(model.clip_grad_norm(1e9), torch.nn.utils.clip_grad_norm_(whole.parameters(), 1e9))
            close(model.evaluate(*model.part(tokens, targets)), want)
        with pytest.raises(ValueError, match="targets are −100 in all replicas"):
            model.step(*model.part(tokens, torch.full_like(targets, -100)))
        close(model.step(*model.part(tokens, targets)), want)
        model.close()


def test_targets_that_do_not_count():
    launch(ignored, 4, timeout=120)


def frozen():
    whole = model_of("gpt")
    whole.blocks[0].requires_grad_(False)
    whole.position_embedding.requires_grad_(False)
    for zero in (None, 1):
        model = Parallel(whole, mesh(2, 2, 1), one_f_one_b(2, 2), zero=zero)
        optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
        loss = mean_loss(whole, *batch("gpt"))
        loss.backward()
        model.step(*model.part(*batch("gpt")))
        if zero:
            want = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
            for name, piece in gradients_of(model._replicas):
                assert name in want
                assert piece.abs().max() <= want[name].abs().max() + 1e-12
        optimizer.step()
        full = model.full_state_dict()
        for name, parameter in whole.named_parameters():
            moved = parameter.detach() - (0.1 * parameter.grad if parameter.requires_grad else 0.0)
            close(full[name], moved)
        whole.zero_grad()
        model.close()


def test_frozen_parameters_stay():
    launch(frozen, 4, timeout=60)


def saves(path):
    model = Parallel(model_of("gpt"), mesh(1, 2, 2), zb_h2(2, 3), sequence_parallel=True)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    model.step(*model.part(*batch("gpt")))
    optimizer.step()
    full = model.full_state_dict(rank0_only=True)
    if dist.get_rank() == 0:
        whole = Transformer(CONFIGS["gpt"], dtype=torch.float64)
        whole.load_state_dict(full)
        transformer.save(whole, path)
    loss = model.evaluate(*model.part(*batch("gpt"))).item()
    # A model on rank 0 alone.
    there = model_of("gpt") if dist.get_rank() == 0 else Transformer(CONFIGS["gpt"], device="meta", dtype=torch.float64)
    again = Parallel(there, mesh(2, 1, 2))
    close(again.full_state_dict()["norm.weight"], model_of("gpt").norm.weight.detach())
    again.close()
    model.close()
    return loss


def loads(path):
    first = Parallel(path, mesh(2, 2, 1), one_f_one_b(2, 2))
    other = Parallel(model_of("gpt", seed=3), mesh(2, 1, 2), zero=1)
    found = [first.evaluate(*first.part(*batch("gpt"))).item()]
    optimizer = other.optimizer(torch.optim.SGD, lr=0.1)
    other.load_state_dict(path)
    found.append(other.evaluate(*other.part(*batch("gpt"))).item())
    other.step(*other.part(*batch("gpt")))
    optimizer.step()  # the slices that it keeps are those that were loaded
    found.append(other.evaluate(*other.part(*batch("gpt"))).item())
    whole = transformer.load(path, dtype=torch.float64)
    with torch.enable_grad():
        mean_loss(whole, *batch("gpt")).backward()
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    found.append(mean_loss(whole, *batch("gpt")).item())
    state = whole.state_dict()
    for wrong, words in (
        ({**state, "head.weight": state["norm.weight"]}, "unknown"),
        ({name: t for name, t in state.items() if name != "norm.weight"}, r"missing \['norm.weight'\]"),
        ({**state, "norm.weight": torch.ones(3)}, "norm.weight of shape"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(wrong)
    first.close()
    other.close()
    return found


def test_a_checkpoint_goes_to_another_mesh(tmp_path):
    path = str(tmp_path / "model.safetensors")
    saved = launch(partial(saves, path), 4, timeout=60)[0]
    for a, b, c, d in launch(partial(loads, path), 4, timeout=60):
        assert a == pytest.approx(saved, rel=1e-12)
        assert b == pytest.approx(saved, rel=1e-12)
        assert c == pytest.approx(d, rel=1e-10)
        assert abs(c - b) > 1e-6


# --- what is refused --------------------------------------------------------------------------------------------------


def refusals():
    whole = model_of("llama")
    for wrong, words in (
        (lambda: mesh(3, 1, 1), "dp=3, pp=1, tp=1 are 3 ranks, and there are 4"),
        (lambda: Parallel(whole, mesh(2, 2, 1)), "schedule=None with pp=2"),
        (lambda: Parallel(whole, mesh(2, 2, 1), one_f_one_b(4, 4)), "schedule is for 4 ranks, and the mesh has pp=2"),
        (lambda: Parallel(whole, mesh(2, 2, 1), one_f_one_b(2, 4), zero=2), "zero=2 with pp=2 would reduce"),
        (lambda: Parallel(whole, mesh(4, 1, 1), zero=3), "zero=3 would gather"),
        (lambda: Parallel(whole, mesh(4, 1, 1), zero="1"), "zero='1'"),
        (lambda: Parallel(whole, init_device_mesh("cpu", (4,), mesh_dim_names=("x",))), "dimensions"),
        (lambda: Parallel(3, mesh(4, 1, 1)), "rank 0 cannot take part: model must be"),
        (lambda: Parallel("/nowhere", mesh(4, 1, 1)), "cannot take part: FileNotFoundError"),
        (lambda: Parallel(Transformer(CONFIGS["llama"], device="meta"), mesh(4, 1, 1)), "meta device"),
        (lambda: Parallel(model_of("llama" if dist.get_rank() else "gpt"), mesh(4, 1, 1)), "disagree about config"),
        (lambda: Parallel(whole, mesh(2, 2, 1), one_f_one_b(2, 2 + dist.get_rank())), "disagree about schedule"),
        (lambda: Parallel(whole, mesh(2, 2, 1), interleaved(2, 4, 4)), "only 4 layers"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    model = Parallel(whole, mesh(2, 1, 2), one_f_one_b(1, 2), sequence_parallel=True)
    tokens, targets = batch("llama")
    for bad, words in (
        ((tokens[0], targets[0]), "tokens must be a tensor"),
        ((tokens[:1], targets[:1]), "too few for 2 microbatches"),
        ((tokens[:, :7], targets[:, :7]), "needs a length that 2 divides"),
        ((tokens, targets[:, :6]), "targets must have the shapes"),
        (([tokens], [targets]), "a list of 1"),
        ((tokens, targets + 28), "targets"),
        ((tokens, targets.numpy()), "targets must be tensors .* on every rank, .* got ndarray"),
        ((tokens, None), "targets must be tensors"),
        ((tokens, targets.to("meta")), "a tensor without numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            model.step(*bad)
    # What one replica cannot use, all refuse, and the next batch is fine.
    first = model.place.dp == 0
    with pytest.raises(ValueError, match="too few" if first else "another rank"):
        model.step(*(one[:1] if first else one for one in (tokens, targets)))
    close(model.step(*model.part(tokens, targets)), mean_loss(whole, tokens, targets))
    model.close()


def test_refusals_come_on_every_rank_and_nothing_hangs():
    launch(refusals, 4, timeout=60)


def other_tokens():
    model = Parallel(model_of("llama"), mesh(1, 2, 1), one_f_one_b(2, 2))
    tokens, targets = batch("llama", seed=dist.get_rank())
    first = dist.get_rank() == 0
    with pytest.raises(TypeError if first else ValueError, match="targets must be" if first else "another rank"):
        model.step(tokens, None if first else targets)  # which leaves the comparison for the next time
    model.step(tokens, targets)


def test_ranks_of_a_replica_must_have_its_batch():
    with pytest.raises(LaunchError, match="tokens on rank 1 differ from those on rank 0, and both are of replica 0"):
        launch(other_tokens, 2, timeout=60)
