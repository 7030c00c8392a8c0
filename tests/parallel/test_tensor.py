"""A model shared out to n ranks computes what one process does, sends what the formula says, and comes back whole."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from mlsys.attention import flash
from mlsys.contracts import _parallel_tensor, check, find
from mlsys.models import transformer
from mlsys.models.transformer import Transformer
from mlsys.parallel import DataParallel, launch
from mlsys.parallel._tensor_operators import Ranks, shared
from mlsys.parallel._tensor_products import columns, rows
from mlsys.parallel._tensor_shards import Cut, cut_of
from mlsys.parallel._weight_gradients import Store, deferring
from mlsys.parallel.collectives import Communicator
from mlsys.parallel.tensor import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    apply_columns,
    f,
    f_bar,
    g,
    g_bar,
    gather,
    parallelize,
    part,
    vocab_cross_entropy,
)
from mlsys.parallel.traffic import ledger
from mlsys.perf import activations, tensor_parallel
from mlsys.perf.configs import Config, gpt, llama

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
CONFIGS = {
    "gpt": gpt(2, 16, 4, vocab=29, context=24),  # learned positions, biases, tied; a vocabulary that nothing divides
    "llama": llama(2, 16, 4, 24, vocab=28, context=24),
    "few key/value heads": llama(2, 16, 4, 24, vocab=29, context=24, kv_heads=2),
    "one key/value head": llama(1, 16, 4, 24, vocab=29, context=24, kv_heads=1),
    "llama with biases": Config(
        vocab=5, context=24, layers=1, d_model=16, heads=4, kv_heads=2, head_dim=6, d_ff=24,
        norm="rmsnorm", activation="swiglu", positions="rope", tied=True, bias=True,
    ),  # of five tokens, four ranks have 2, 2, 1 and 0
}  # fmt: skip
SHARED = []  # in the ranks: one Communicator for all scenarios


def model_of(config, dtype=torch.float64, seed=0):
    """With weights, biases and norms that all matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + 0.3 * noise)
    return model


def batch(config, b=3, t=8, seed=1):
    """Tokens and targets, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab, (2, b, t), generator=generator)


def shared_out(model, **options):
    return parallelize(model, SHARED[0], **options)


def same_gradients(whole, made, dtype=torch.float64):
    """Each share against that of one process; the scale is that of the largest gradient, since some are 0 in truth."""
    scale = max(p.grad.abs().max() for p in whole.parameters())
    mine = dict(made.named_parameters())
    for name, parameter in whole.named_parameters():
        want = cut_of(name, whole.config, made.size).share(parameter.grad, made.rank, made.size)
        assert mine[name].grad.shape == want.shape, name
        assert mine[name].grad.dtype == want.dtype
        error = (mine[name].grad - want).abs().max() / scale
        assert error < TOLERANCE[dtype], (name, error)


def close(got, want, dtype=torch.float64):
    error = (got - want).abs().max() / want.abs().max()
    assert error < TOLERANCE[dtype], error


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def over(**choices):
    """A scenario for each of the choices of one argument."""
    ((name, values),) = choices.items()

    def register(function):
        for value in values:
            SCENARIOS[f"{function.__name__}-{value}"] = partial(function, **{name: value})
        return function

    return register


# --- operators --------------------------------------------------------------------------------------------------------


@scenario
def operators_do_what_they_say():
    n, rank = dist.get_world_size(), dist.get_rank()
    parts = [random(4 * n, 3, seed=r) for r in range(n)]
    for group in (None, SHARED[0]):
        total = torch.stack(parts).sum(0)
        assert torch.equal(f(parts[rank], group), parts[rank])
        close(f_bar(parts[rank], group), total)
        assert torch.equal(g(parts[rank], group), torch.cat(parts))
        close(g_bar(parts[rank], group), total[4 * rank : 4 * rank + 4])
        assert torch.equal(gather(parts[rank], group), torch.cat(parts))
        assert torch.equal(part(parts[0], group), parts[0][4 * rank : 4 * rank + 4])


@scenario
def pairs_are_transposes():
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩ over all ranks together, where Aᵀ is what backward does."""
    n, rank = dist.get_world_size(), dist.get_rank()

    def everywhere(a, b):
        value = (a * b).sum()
        dist.all_reduce(value)
        return value

    for seed in range(3):
        for operator, grows in ((f, 1), (f_bar, 1), (g, n), (g_bar, 1 / n)):
            # f and f̄ of what all ranks have: the copies on the ranks are one vector, so it counts once
            same_in, same_out = operator is f, operator is f_bar
            x = random(2 * n, 3, seed=100 * seed + (0 if same_in else rank)).requires_grad_()
            y = random(int(2 * n * grows), 3, seed=50 + 100 * seed + (0 if same_out else rank))
            out = operator(x, SHARED[0])
            (back,) = torch.autograd.grad(out, x, y)
            left, right = everywhere(out.detach(), y), everywhere(x.detach(), back)
            left, right = left / (n if same_out else 1), right / (n if same_in else 1)
            assert abs(left - right) < 1e-9, operator.__name__


@scenario
def gradients_given_are_never_changed():
    n = dist.get_world_size()
    ranks = Ranks(SHARED[0])
    linear = nn.Linear(4, 4 * n, dtype=torch.float64)
    back = nn.Linear(4 * n, 4, dtype=torch.float64)
    x = random(2 * n, 4).requires_grad_()
    weight, wide = linear.weight[:4], back.weight[:, :4]
    runs = [partial(op, group=SHARED[0]) for op in (f, f_bar, g, g_bar, gather, part)]
    runs += [lambda x, cut=cut: columns(x, [weight], [None], ranks, cut=cut)[0] for cut in (False, True)]
    runs += [lambda x, cut=cut: rows(x, wide, back.bias, ranks, cut=cut) for cut in (False, True)]
    runs += [lambda x: shared(x, ranks, copies=n, index=ranks.rank)]
    for run in runs:
        for layout in ("plain", "transposed", "expanded"):
            out = run(x)
            gradient = random(*out.shape, seed=1)
            if layout == "transposed":
                gradient = gradient.T.contiguous().T
            if layout == "expanded":
                gradient = gradient[:1, :1].expand(out.shape)
            before = gradient.clone()
            (got,) = torch.autograd.grad(out, x, gradient)
            assert torch.equal(gradient, before)
            (want,) = torch.autograd.grad(run(x), x, before)
            close(got, want)
        kept = x.detach().clone()
        run(x)
        assert torch.equal(x, kept)


@scenario
def operators_have_second_derivatives():
    n = dist.get_world_size()
    for operator in (f, f_bar, g, g_bar, gather, part):
        x = random(2 * n, 3).requires_grad_()
        (first,) = torch.autograd.grad(operator(x, SHARED[0]).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.abs().sum() > 0


# --- layers -----------------------------------------------------------------------------------------------------------


@over(cut=[False, True])
def a_pair_of_layers(cut):
    n, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    up, gate, down = (nn.Linear(6, 12 * n), nn.Linear(6, 12 * n, bias=False), nn.Linear(12 * n, 6))
    for linear in (up, gate, down):
        linear.double()
    x = random(2 * n, 3, 6).requires_grad_()
    y = down(F.silu(gate(x)) * up(x))
    gradient = random(*y.shape, seed=1)
    y.backward(gradient)

    def own(whole):
        return whole[2 * rank : 2 * rank + 2] if cut else whole

    my_up, my_gate = (ColumnLinear(linear, SHARED[0], sequence_parallel=cut) for linear in (up, gate))
    my_down = RowLinear(down, SHARED[0], sequence_parallel=cut)
    assert my_up.weight.shape == (12, 6)
    assert my_down.weight.shape == (6, 12)
    mine = own(x.detach()).clone().requires_grad_()
    with ledger() as book:
        a, b = apply_columns(mine, [my_gate, my_up])
        z = my_down(F.silu(a) * b)
        z.backward(own(gradient))
    close(z, own(y))
    close(mine.grad, own(x.grad))
    hidden = slice(12 * rank, 12 * rank + 12)
    for got, want in (
        (my_up.weight.grad, up.weight.grad[hidden]),
        (my_up.bias.grad, up.bias.grad[hidden]),
        (my_gate.weight.grad, gate.weight.grad[hidden]),
        (my_down.weight.grad, down.weight.grad[:, hidden]),
        (my_down.bias.grad, down.bias.grad),
    ):
        close(got, want)
    if n > 1:  # the two that read x share one f
        want = {"all_gather": 3, "reduce_scatter": 2, "all_reduce": 1} if cut else {"all_reduce": 2}
        assert dict(book.calls) == want


@scenario
def frozen_layers_and_inputs():
    """What needs no gradient gets none, and is not sent."""
    torch.manual_seed(0)
    n = dist.get_world_size()
    for cut in (False, True):
        linear = nn.Linear(6, 4 * n).double().requires_grad_(False)
        layer = ColumnLinear(linear, SHARED[0], sequence_parallel=cut)
        x = random(2 * n, 6).requires_grad_()
        layer(x).sum().backward()
        assert layer.weight.grad is None
        assert x.grad is not None
        layer = ColumnLinear(linear.requires_grad_(), SHARED[0], sequence_parallel=cut)
        with ledger() as book:
            layer(x.detach()).sum().backward()
        assert layer.weight.grad is not None
        assert book.calls["all_reduce"] == book.calls["reduce_scatter"] == 0


@scenario
def key_value_heads_that_several_ranks_have():
    n, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    linear = nn.Linear(4, 4).double()
    for shares in {1, 2, n} - ({2} if n % 2 else set()):
        layer = ColumnLinear(nn.Linear(4, 4 * shares).double(), SHARED[0], shares=shares)
        index = rank * shares // n
        (layer(torch.ones(1, 4).double()).sum() * (rank + 1)).backward()
        want = sum(r + 1 for r in range(n) if r * shares // n == index)
        close(layer.weight.grad, torch.full((4, 4), float(want)).double())
        close(layer.bias.grad, torch.full((4,), float(want)).double())
    with pytest.raises(ValueError, match="equal shares"):
        ColumnLinear(linear, SHARED[0], shares=3 * n)


@scenario
def autocast_is_that_of_linear():
    n = dist.get_world_size()
    torch.manual_seed(0)
    up, down = nn.Linear(8, 8 * n), nn.Linear(8 * n, 8)
    x = random(4, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        want = down(up(x))
        made = RowLinear(down, SHARED[0])(ColumnLinear(up, SHARED[0])(x))
    assert made.dtype == want.dtype == torch.bfloat16
    made.sum().backward()
    close(made.float(), want.float(), torch.bfloat16)


@over(name=list(CONFIGS))
def weights_gradients_wait_for_w(name):
    """As those of plain linear layers: what has a gradient after B is no matrix of a product, and W has the rest."""
    n = dist.get_world_size()
    model = model_of(CONFIGS[name])
    tokens, targets = batch(CONFIGS[name])
    model.loss(tokens, targets).backward()
    for sequence_parallel in (False, True):
        made, store = shared_out(model, sequence_parallel=sequence_parallel), Store()
        hooked = []
        for each, parameter in made.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, each=each, to=hooked: to.append(each))
        with deferring(store):
            loss = made.loss(tokens, targets)
        with ledger() as ahead:
            loss.backward()
        products = {each for each, _ in made.named_parameters() if "norm" not in each and "embedding" not in each}
        assert {each for each, p in made.named_parameters() if p.grad is None} == products
        assert not products & set(hooked)
        before = made.token_embedding.weight.grad.clone()
        with ledger() as behind:
            store.run()
        assert len(store) == 0
        same_gradients(model, made)
        assert products <= set(hooked)
        # The lookup's gradient is there after B; that of a tied output matrix comes on top in W, where there are rows.
        more = CONFIGS[name].tied and made.token_embedding.stop > made.token_embedding.start
        assert torch.equal(made.token_embedding.weight.grad, before) is not more
        if n > 1:  # what the rank before waits for is sent in B; W gathers inputs, and sums copies
            layers, cut = CONFIGS[name].layers, sequence_parallel
            assert ahead.calls["reduce_scatter" if cut else "all_reduce"] >= 2 * layers
            assert behind.calls["all_gather"] == (2 * layers + 1 if cut else 0)
            assert behind.calls["reduce_scatter"] == 0
            copies = 2 * layers * (1 + CONFIGS[name].bias) if CONFIGS[name].kv_heads < n else 0
            biases = 2 * layers if cut and CONFIGS[name].bias else 0
            assert behind.calls["all_reduce"] == copies + biases


@scenario
def what_waits_beside_frozen_weights_and_without_a_gradient_of_x():
    n = dist.get_world_size()
    torch.manual_seed(0)
    up, down, x = nn.Linear(6, 4 * n).double(), nn.Linear(4 * n, 6).double(), random(2 * n, 6)
    for cut in (False, True):
        mine = x.tensor_split(n)[dist.get_rank()] if cut else x
        one = ColumnLinear(up, SHARED[0], sequence_parallel=cut)
        two = RowLinear(down, SHARED[0], sequence_parallel=cut)
        two.weight.requires_grad_(False)
        for frozen in (False, True):
            one.bias.requires_grad_(frozen)
            one.weight.requires_grad_(not frozen)
            waits = [one.bias if frozen else one.weight, two.bias]
            two(one(mine)).square().sum().backward()
            want = [p.grad.clone() for p in waits]
            one.zero_grad(), two.zero_grad()
            store = Store()
            with deferring(store):
                y = two(one(mine)).square().sum()
            y.backward()
            if n > 1:  # alone it is a plain linear layer, whose bias waits with its weight only
                assert all(p.grad is None for p in (*one.parameters(), *two.parameters()))
            store.run()
            for p, expected in zip(waits, want, strict=True):
                close(p.grad, expected)
            assert one.weight.grad is None or one.bias.grad is None
            one.zero_grad(), two.zero_grad()


@scenario
def a_weight_that_is_computed_does_not_wait():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    n = dist.get_world_size()
    torch.manual_seed(0)
    layer, x = ColumnLinear(nn.Linear(6, 4 * n).double(), SHARED[0]), random(2, 6)
    parametrize.register_parametrization(layer, "weight", Double())
    layer(x).sum().backward()
    original = layer.parametrizations.weight.original
    want = original.grad
    original.grad = layer.bias.grad = None
    store = Store()
    with deferring(store):
        y = layer(x).sum()
    y.backward()
    close(original.grad, want)
    if n > 1:  # alone it is a plain linear layer
        assert layer.bias.grad is None
    store.run()
    close(original.grad, want)
    assert layer.bias.grad is not None


@scenario
def autocast_where_w_is_apart():
    n = dist.get_world_size()
    torch.manual_seed(0)
    up, down, x = nn.Linear(8, 8 * n), nn.Linear(8 * n, 8), random(4, 8).float()
    pairs = [(ColumnLinear(up, SHARED[0]), RowLinear(down, SHARED[0])) for _ in range(2)]
    store = Store()
    with torch.autocast("cpu", torch.bfloat16):
        pairs[0][1](pairs[0][0](x)).sum().backward()
        with deferring(store):
            pairs[1][1](pairs[1][0](x)).sum().backward()
    assert all(p.grad is None for layer in pairs[1] for p in layer.parameters() if p.ndim == 2)
    store.run()
    for one, other in zip(*pairs, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert q.grad.dtype == torch.float32
            close(q.grad, p.grad, torch.bfloat16)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@over(vocab=[5, 16, 29])
def embedding_and_logits(vocab):
    n, rank = dist.get_world_size(), dist.get_rank()
    weight = random(vocab, 6).requires_grad_()
    made = VocabEmbedding(weight, SHARED[0])
    assert made.weight.shape == (-(-vocab // n), 6)
    tokens = torch.randint(0, vocab, (3, 7), generator=torch.Generator().manual_seed(1))
    x = F.embedding(tokens, weight)
    loss = (x @ weight.T).pow(2).sum()
    loss.backward()
    y = made(tokens)
    assert torch.equal(y, x)
    logits = made.logits(y)
    assert logits.shape == (3, 7, made.stop - made.start)
    logits.pow(2).sum().backward()
    want = Cut(0, n, vocab).share(weight.grad, rank, n)
    close(made.weight.grad, want) if want.any() else None
    assert not made.weight.grad[made.stop - made.start :].any()  # the padding


@over(vocab=[5, 16, 29])
def cross_entropy_of_a_cut_vocabulary(vocab):
    n, rank = dist.get_world_size(), dist.get_rank()
    cut = Cut(0, n, vocab)
    start, stop = cut.bounds(rank, n)
    for dtype, scale in ((torch.float64, 1.0), (torch.float64, 500.0), (torch.float32, 1.0), (torch.bfloat16, 1.0)):
        whole = (scale * random(6, 4, vocab)).to(dtype).requires_grad_()
        targets = torch.randint(0, vocab, (6, 4), generator=torch.Generator().manual_seed(1))
        targets[0, :2] = -100
        wide = whole.to(torch.promote_types(dtype, torch.float32))
        for reduction in ("mean", "sum", "none"):
            want = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction=reduction)
            weight = random(*want.shape, seed=2).to(want.dtype) if want.ndim else torch.ones((), dtype=want.dtype)
            (gradient,) = torch.autograd.grad((want * weight).sum(), whole, retain_graph=True)
            share = whole.detach()[..., start:stop].clone().requires_grad_()
            with ledger() as book:
                got = vocab_cross_entropy(share, targets, SHARED[0], vocab=vocab, reduction=reduction)
            assert got.dtype == want.dtype
            close(got.flatten(), want.flatten(), want.dtype)
            (mine,) = torch.autograd.grad((got.flatten() * weight.flatten()).sum(), share, retain_graph=True)
            (again,) = torch.autograd.grad((got.flatten() * weight.flatten()).sum(), share)
            assert torch.equal(mine, again)
            if stop > start:
                error = (mine - gradient[..., start:stop]).abs().max() / gradient.abs().max()
                assert error < TOLERANCE[dtype]
            assert book.calls["all_reduce"] == (3 if n > 1 else 0)
            assert sum(book.size.values()) == (3 * 24 * want.dtype.itemsize if n > 1 else 0)


# --- the model --------------------------------------------------------------------------------------------------------


@over(name=list(CONFIGS))
def loss_and_gradients(name):
    config = CONFIGS[name]
    for sequence_parallel in (False, True):
        for dtype in (torch.float64, torch.bfloat16) if name == "gpt" else (torch.float64,):
            model = model_of(config, dtype)
            made = shared_out(model, sequence_parallel=sequence_parallel)
            for seed in range(2):  # twice without clearing: gradients add up
                tokens, targets = batch(config, seed=seed)
                want, got = model.loss(tokens, targets), made.loss(tokens, targets)
                want.backward()
                got.backward()
                close(got, want, dtype)
            same_gradients(model, made, dtype)


@over(name=list(CONFIGS))
def logits_and_their_gradients(name):
    config = CONFIGS[name]
    tokens, _ = batch(config)
    for sequence_parallel in (False, True):
        model = model_of(config)
        made = shared_out(model, sequence_parallel=sequence_parallel)
        want, got = model(tokens), made(tokens)
        close(got, want)
        weight = random(*want.shape)
        (want * weight).sum().backward()
        (got * weight).sum().backward()
        same_gradients(model, made)
        close(made.hidden(tokens), model.hidden(tokens))


@over(name=["gpt", "few key/value heads"])
def training_keeps_the_copies_together(name):
    """Some steps of AdamW with clipped gradients; then the whole model is that of one process."""
    config = CONFIGS[name]
    model = model_of(config)
    made = shared_out(model, sequence_parallel=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, made)]
    for step in range(3):
        tokens, targets = batch(config, seed=step)
        for each, optimizer in zip((model, made), optimizers, strict=True):
            optimizer.zero_grad()
            each.loss(tokens, targets).backward()
        norms = nn.utils.clip_grad_norm_(model.parameters(), 0.3), made.clip_grad_norm(0.3)
        assert abs(norms[0] - norms[1]) < 1e-10
        same_gradients(model, made)
        for optimizer in optimizers:
            optimizer.step()
    for key, want in model.state_dict().items():
        if not key.endswith("k.bias"):  # whose gradient is 0 but for rounding, which Adam makes large
            torch.testing.assert_close(made.full_state_dict()[key], want, rtol=1e-7, atol=1e-8)
    for key, parameter in made.named_parameters():  # what several ranks have is the same to the bit
        cut = cut_of(key, config, made.size)
        shares = parameter.new_empty((made.size, *parameter.shape))
        dist.all_gather(list(shares), parameter.detach())
        first = [shares[0]]
        for r in range(1, made.size):
            first.append(shares[r] if cut.is_first(r, made.size) else first[-1])
        assert torch.equal(torch.stack(first), shares), key
    largest = max(p.grad.abs().max() for p in model.parameters())
    assert abs(made.clip_grad_norm(1e9, norm_type=float("inf")) - largest) < 1e-12


@over(name=["gpt", "one key/value head"])
def generation(name):
    config = CONFIGS[name]
    model = model_of(config)
    prompt, _ = batch(config, t=5)
    want = transformer.generate(model, prompt, 6, temperature=0)
    for sequence_parallel in (False, True):
        made = shared_out(model, sequence_parallel=sequence_parallel)
        assert torch.equal(transformer.generate(made, prompt, 6, temperature=0), want)
        sampled = [
            transformer.generate(each, prompt, 6, generator=torch.Generator().manual_seed(3)) for each in (model, made)
        ]
        assert torch.equal(*sampled)
    paged = made.paged_cache(16, 4)
    assert torch.equal(transformer.generate(made, prompt, 6, temperature=0, cache=paged), want)


@scenario
def another_attention():
    config = CONFIGS["few key/value heads"]
    model = model_of(config)
    tokens, targets = batch(config)
    made = shared_out(model, attention=flash.attention)
    close(made.loss(tokens, targets), model.loss(tokens, targets))


@scenario
def what_is_sent_is_the_formula():
    n = dist.get_world_size()
    for name in ("gpt", "llama"):
        for sequence_parallel in (False, True):
            config = CONFIGS[name]
            made = parallelize(
                model_of(config, torch.float32), sequence_parallel=sequence_parallel, algorithm="backend"
            )
            b, t = 3, 8
            tokens, targets = batch(config, b, t)
            made.loss(tokens, targets)  # the first one compares the tokens
            with ledger() as ahead:
                loss = made.loss(tokens, targets)
            with ledger() as back:
                loss.backward()
            want = tensor_parallel.model_traffic(config, b, t, n, sequence_parallel=sequence_parallel, itemsize=4)
            # beside the formula: gradients of what every rank has a copy of, if each sees a part of the sequence
            d, norms = config.d_model, 2 * config.layers + 1
            biases = 2 if config.norm == "layernorm" else 1
            extra = {"all_reduce": (norms * biases * d * 4, norms), "all_gather": (0, 0)}
            if config.bias:
                extra["all_reduce"] = (extra["all_reduce"][0] + 2 * config.layers * d * 4, norms + 2 * config.layers)
            if config.positions == "learned":
                extra["all_gather"] = (t * d * 4, 1)
            for book, calls, more in ((ahead, want.forward, {}), (back, want.backward, extra)):
                for operation in ("all_reduce", "all_gather", "reduce_scatter"):
                    count = sum(call.count for call in calls if call.operation == operation)
                    size = sum(call.count * call.size for call in calls if call.operation == operation)
                    more_size, more_count = more.get(operation, (0, 0)) if sequence_parallel else (0, 0)
                    assert book.calls[operation] == (count + more_count if n > 1 else 0), (name, operation)
                    assert book.size[operation] == (size + more_size if n > 1 else 0), (name, operation)
            if not sequence_parallel:
                assert ahead.sent == pytest.approx(want.forward_bytes, rel=1e-12)
                assert back.sent == pytest.approx(want.backward_bytes, rel=1e-12)


@scenario
def a_block_sends_four_all_reduces():
    n = dist.get_world_size()
    config = CONFIGS["gpt"]
    made = parallelize(model_of(config, torch.float32), algorithm="backend")
    x = torch.randn(3, 8, config.d_model, requires_grad=True)
    want = tensor_parallel.layer_traffic(3, 8, config.d_model, n, itemsize=4)
    with ledger() as ahead:
        y = made.blocks[0](x, None, None, 0)
    with ledger() as back:
        y.sum().backward()
    assert ahead.calls["all_reduce"] == back.calls["all_reduce"] == (2 if n > 1 else 0)
    assert (ahead.sent, back.sent) == (want.forward_bytes, want.backward_bytes)
    assert set(ahead.calls) | set(back.calls) <= {"all_reduce"}


@over(name=["gpt", "llama"])
def parameters_are_the_share_of_the_formula(name):
    n, config = dist.get_world_size(), CONFIGS[name]
    made = shared_out(Transformer(config, device="meta"))
    assert all(p.is_meta for p in made.parameters())
    assert sum(p.numel() for p in made.parameters()) == tensor_parallel.shard_parameters(config, n).total
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in model_of(config).named_parameters()]


def kept(run, weights):
    """Bytes that a forward pass leaves for the backward pass, beside weights; what is saved twice counts once."""
    found = {}
    addresses = {w.untyped_storage().data_ptr() for w in weights}

    def pack(tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in addresses and tensor.is_floating_point():
            found[key] = tensor  # alive, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(t.untyped_storage().nbytes() for t in found.values()), out


@scenario
def activations_between_the_layers_are_shared_out():
    """What sequence parallelism saves in a block is 1 − 1/n of the tensors that the formula calls "sequence"."""
    n, b, t = dist.get_world_size(), 2, 16
    config = gpt(1, 32, 4, vocab=29, context=16, bias=False)
    held = {}
    for sequence_parallel in (False, True):
        made = shared_out(model_of(config, torch.float32), sequence_parallel=sequence_parallel)
        x = torch.randn(b, t // n if sequence_parallel else t, config.d_model, requires_grad=True)
        held[sequence_parallel], _ = kept(partial(made.blocks[0], x, None, None, 0), list(made.parameters()))
    saved = activations.saved_tensors(config, b, t, tp=n, dropout=False, itemsize=4)
    between = sum(tensor.bytes for tensor in saved if tensor.kind == "sequence")
    statistics = 2 * 2 * b * t * 4  # mean and deviation of two norms, which the formula leaves out
    assert held[False] - held[True] == (between + statistics) * (n - 1) // n


# --- from and to the whole --------------------------------------------------------------------------------------------


@over(name=list(CONFIGS))
def whole_state(name):
    config = CONFIGS[name]
    model = model_of(config)
    made = shared_out(model)
    want = model.state_dict()
    for state in (made.full_state_dict(), made.state_dict()):
        assert list(state) == list(want)
        assert all(torch.equal(state[key], want[key]) for key in want)
    only_first = made.full_state_dict(rank0_only=True)
    assert list(only_first) == (list(want) if made.rank == 0 else [])
    assert all(torch.equal(only_first[key], want[key]) for key in only_first)
    other = model_of(config, seed=5)
    made.load_state_dict(other.state_dict())
    assert all(torch.equal(made.full_state_dict()[key], value) for key, value in other.state_dict().items())
    short = {key: value for key, value in want.items() if key != "norm.weight"}
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\], unknown none"):
        made.load_state_dict(short)
    with pytest.raises(
        ValueError, match=r"state\['norm.weight'\] must have the whole model's shape \(16,\), got \(3,\)"
    ):
        made.load_state_dict({**want, "norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="leave them out"):
        made.load_state_dict(want, strict=False)


@scenario
def weights_are_those_of_rank_0():
    config = CONFIGS["gpt"]
    first = model_of(config)
    given = model_of(config, seed=dist.get_rank())
    before = copy.deepcopy(given.state_dict())
    made = shared_out(given)
    assert all(torch.equal(made.full_state_dict()[key], value) for key, value in first.state_dict().items())
    assert all(torch.equal(given.state_dict()[key], value) for key, value in before.items())  # not changed
    if dist.get_rank():  # only rank 0 has to hold it
        given = Transformer(config, device="meta", dtype=torch.float64)
    made = shared_out(given, dtype=torch.float32)
    state = made.full_state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in first.state_dict().items())


@scenario
def frozen_and_evaluating_models_stay_so():
    model = model_of(CONFIGS["gpt"]).eval()
    model.token_embedding.weight.requires_grad_(False)
    made = shared_out(model)
    assert not made.training
    assert [n for n, p in made.named_parameters() if not p.requires_grad] == ["token_embedding.weight"]
    made.loss(*batch(CONFIGS["gpt"])).backward()
    assert made.token_embedding.weight.grad is None


@scenario
def meshes_and_groups():
    from torch.distributed.device_mesh import init_device_mesh

    n = dist.get_world_size()
    config = CONFIGS["llama"]
    model = model_of(config)
    tokens, targets = batch(config)
    want = model.loss(tokens, targets)
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("tp",))
    for group in (dist.group.WORLD, mesh["tp"]):
        made = parallelize(model, group)
        close(made.loss(tokens, targets), want)
        made.close()
    for group, options in (
        (None, {"algorithm": "backend"}),
        (SHARED[0], {"algorithm": "ring"}),
        (SHARED[0], {"overlap": True}),
    ):
        for sequence_parallel in (False, True):
            again = model_of(config)
            made = parallelize(again, group, sequence_parallel=sequence_parallel, **options)
            again.loss(tokens, targets).backward()
            made.loss(tokens, targets).backward()
            same_gradients(again, made)
    two = init_device_mesh("cpu", (1, n), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"a mesh of 2 dimensions \('dp', 'tp'\): pass .*mesh\[\"tp\"\]"):
        parallelize(model, two)


@scenario
def beside_data_parallelism():
    """Two replicas of two ranks each, with a batch of their own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    if n != 4:
        return
    tensor_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    data_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    config = CONFIGS["llama"]
    model = model_of(config)
    tokens, targets = batch(config, b=4)
    model.loss(tokens, targets).backward()
    for sequence_parallel in (False, True):
        made = parallelize(model_of(config), tensor_groups[rank // 2], sequence_parallel=sequence_parallel)
        wrapped = DataParallel(made, data_groups[rank % 2])
        mine = slice(rank // 2 * 2, rank // 2 * 2 + 2)
        made.loss(tokens[mine], targets[mine]).backward()
        same_gradients(model, made)
        wrapped.close()
        made.close()


# --- what is refused --------------------------------------------------------------------------------------------------


@scenario
def what_cannot_be_shared_out():
    n = dist.get_world_size()
    odd = gpt(1, 30, 5, vocab=29, context=24)
    with pytest.raises(TypeError, match="model must be a Transformer or the path of a saved one, got Linear"):
        parallelize(nn.Linear(3, 3))
    made = shared_out(model_of(CONFIGS["gpt"]))
    with pytest.raises(TypeError, match="TensorParallel already"):
        parallelize(made)
    with pytest.raises(ValueError, match="algorithm='bruck'"):
        parallelize(model_of(CONFIGS["gpt"]), algorithm="bruck")
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear"):
        ColumnLinear(nn.Identity())
    if n == 1:
        return
    with pytest.raises(ValueError, match=rf"config.heads=5 cannot be shared out to {n} ranks"):
        parallelize(Transformer(odd))
    three = llama(1, 24, 12, 24, vocab=29, context=24, kv_heads=3)
    if n in (2, 4):
        with pytest.raises(ValueError, match=rf"config.kv_heads=3 and {n} ranks: one must divide the other"):
            parallelize(Transformer(three))
    for layer, name in ((ColumnLinear, "out_features"), (RowLinear, "in_features")):
        with pytest.raises(ValueError, match=rf"{name}=5"):
            layer(nn.Linear(5, 5))
    for operator in (g_bar, part):
        with pytest.raises(ValueError, match=rf"cannot be cut along its first dimension over {n} ranks: pad it"):
            operator(torch.ones(n + 1, 2))
    made = shared_out(model_of(CONFIGS["llama"]), sequence_parallel=True)
    tokens, targets = batch(CONFIGS["llama"], t=n + 1)
    with pytest.raises(ValueError, match=rf"{n} ranks do not divide {n + 1}: pad or cut it to a multiple of {n}"):
        made.loss(tokens, targets)


@scenario
def ranks_that_disagree():
    n, rank = dist.get_world_size(), dist.get_rank()
    if n == 1:
        return
    last = rank == n - 1
    config = CONFIGS["gpt"]
    with pytest.raises(ValueError, match="disagree about sequence_parallel: rank 0 has False"):
        shared_out(model_of(config), sequence_parallel=last)
    with pytest.raises(ValueError, match="disagree about config"):
        shared_out(model_of(CONFIGS["llama"] if last else config))
    with pytest.raises(ValueError, match=rf"rank {n - 1} cannot take part: FileNotFoundError"):
        shared_out("/nowhere/at/all.safetensors" if last else model_of(config))
    made = shared_out(model_of(config))
    tokens, targets = batch(config, seed=int(last))
    with pytest.raises(ValueError, match=rf"tokens on rank {n - 1} .* differ from those on rank 0"):
        made.loss(tokens, targets)


@over(sequence_parallel=[False, True])
def targets_that_do_not_count(sequence_parallel):
    """The mean over all others, as F.cross_entropy takes it: also where a rank's part has none that count."""
    config = CONFIGS["llama"]
    model = model_of(config)
    tokens, targets = batch(config)
    made = shared_out(model, sequence_parallel=sequence_parallel)
    targets[:, :5] = -100
    targets[0, 6] = -100
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    mine = made.loss(tokens, targets)
    mine.backward()
    close(mine, loss)
    same_gradients(model, made)
    every = [torch.empty_like(mine) for _ in range(made.size)]
    dist.all_gather(every, mine.detach())
    assert all(torch.equal(one, mine) for one in every)
    assert made.loss(tokens, torch.full_like(targets, -100)).isnan()  # as F.cross_entropy
    with pytest.raises(ValueError, match="targets must lie between 0 and vocab − 1"):
        made.loss(tokens, targets - 1)


@scenario
def copies_of_a_model():
    """With weights of their own, over the same group: as for an average of the weights."""
    config = CONFIGS["gpt"]
    made = shared_out(model_of(config))
    tokens, targets = batch(config)
    before = made.loss(tokens, targets).item()
    other = copy.deepcopy(made)
    assert other.ranks is made.ranks
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.5)
    assert other.loss(tokens, targets).item() == before != made.loss(tokens, targets).item()
    assert copy.deepcopy(made.blocks[0].mlp.up).ranks is made.ranks
    alone = parallelize(model_of(config))  # with a communicator of its own
    copy.deepcopy(alone).close()
    alone.close()


@scenario
def losses_that_are_refused():
    logits, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    n = dist.get_world_size()
    with pytest.raises(ValueError, match="reduction='average'"):
        vocab_cross_entropy(logits, targets, reduction="average")
    with pytest.raises(TypeError, match="floating-point"):
        vocab_cross_entropy(logits.long(), targets)
    with pytest.raises(ValueError, match="targets must have the shape"):
        vocab_cross_entropy(logits, targets[:2])
    with pytest.raises(ValueError, match="logits have 4 columns, but of vocab=99"):
        vocab_cross_entropy(logits, targets, vocab=99)
    with pytest.raises(ValueError, match=rf"targets must lie between 0 and vocab − 1 = {4 * n - 1}"):
        vocab_cross_entropy(logits, targets + 4 * n)


# --- the tests --------------------------------------------------------------------------------------------------------


def run_all():
    """What went wrong on this rank, by scenario."""
    problems = {}
    with Communicator() as group:
        SHARED[:] = [group]
        for name, run in SCENARIOS.items():
            try:
                run()
            except AssertionError as error:
                problems[name] = str(error) or repr(error)
            dist.barrier()
    return problems


@pytest.fixture(scope="module", params=(1, 2, 4))
def problems(request):
    """What went wrong on each of n ranks."""
    return launch(run_all, request.param, timeout=120.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_ranks(problems, name):
    assert [problems_of_rank.get(name) for problems_of_rank in problems] == [None] * len(problems)


def three_ranks():
    config = llama(1, 24, 6, 27, vocab=29, context=24, kv_heads=3)
    model = model_of(config)
    made = parallelize(model, sequence_parallel=True)
    tokens, targets = batch(config, t=9)
    model.loss(tokens, targets).backward()
    made.loss(tokens, targets).backward()
    same_gradients(model, made)


def test_three_ranks():
    launch(three_ranks, 3)


def from_file(path, out, name):
    made = parallelize(path, sequence_parallel=True)
    transformer.save(made, out / f"{made.rank}-of-{made.size}")
    loss = made.loss(*batch(CONFIGS[name])).item()
    made.close()
    return loss


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_goes_through_any_number_of_ranks(name, tmp_path):
    model = model_of(CONFIGS[name])
    path = tmp_path / "whole"
    transformer.save(model, path)
    for n in (2, 4):
        losses = launch(from_file, n, path, tmp_path, name)
        assert losses == [pytest.approx(model.loss(*batch(model.config)).item(), rel=1e-12)] * n
        for rank in range(n):
            again = transformer.load(tmp_path / f"{rank}-of-{n}")
            assert again.config == model.config
            assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
        path = tmp_path / f"0-of-{n}"


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(b"no tensors")

    def refused():
        with pytest.raises(ValueError, match=r"rank 0 cannot take part: ValueError: .* is damaged, or no safetensors"):
            parallelize(path)

    launch(refused, 2)


def test_cuts_are_disjoint_and_complete():
    for config in CONFIGS.values():
        for n in (1, 2, 4):
            for name, parameter in model_of(config).named_parameters():
                cut = cut_of(name, config, n)
                shares = [cut.share(parameter.detach(), rank, n) for rank in range(n)]
                assert torch.equal(cut.joined(shares), parameter)
                assert len({share.shape for share in shares}) == 1
                assert sum(cut.is_first(rank, n) for rank in range(n)) == cut.shares


def test_the_contract_takes_another_right_implementation_and_names_mistakes_on_another_seed():
    contract = find("parallel.tensor")
    verdict = check(contract, _parallel_tensor._Plain, seed=1000)
    assert verdict.passed, verdict
    named = {name: check(contract, wrong.impl, seed=1000).failure.like for name, wrong in contract.wrong.items()}
    assert named == {name: name for name in contract.wrong}


class Sliced(nn.Module):
    """Parameters that are slices, of the wrong ranks; an empty one raises nothing."""

    def __init__(self, up, down, group=None):
        super().__init__()
        k = up.out_features // dist.get_world_size(group)
        mine = slice(dist.get_rank() * k, (dist.get_rank() + 1) * k)
        plain = _parallel_tensor._Plain(up, down, group)
        self.up, self.down, self.plain = plain.up, plain.down, plain
        self.up.weight = nn.Parameter(up.weight[mine])
        self.down.weight = nn.Parameter(down.weight[:, mine])

    def forward(self, x):
        return self.plain(x)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (_parallel_tensor.TOLD["global_rank"].impl, "rank 2 raised IndexError: index 8 is out of bounds"),
        (_parallel_tensor.TOLD["global_size"].impl, ": .up.weight has 2 rows of 8, expected 4. "),
        (Sliced, "rank 2: .up.weight has 0 rows of 8, expected 4. "),
    ],
)
def test_whoever_takes_ranks_of_all_for_those_of_a_group_is_told(impl, message):
    failure = check(find("parallel.tensor"), impl).failure
    assert failure.case == {"n": 3, "members": (1, 2)}
    assert message in failure.message
    assert f". {_parallel_tensor.OF_A_GROUP}" in failure.message


def no_shares(up, down, group=None):
    return nn.Sequential(up, nn.GELU(), down)


def test_a_single_vector_is_a_row():
    def program():
        torch.manual_seed(0)
        whole, x = nn.Linear(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64, requires_grad=True)
        back = nn.Linear(6, 4, dtype=torch.float64)
        RowLinear(back)(ColumnLinear(whole)(x)).sum().backward()
        mine, x.grad = x.grad, None
        back(whole(x)).sum().backward()
        return torch.allclose(mine, x.grad)

    assert launch(program, 2) == [True, True]


def test_a_module_without_the_names_is_told_what_is_missing():
    failure = check(find("parallel.tensor"), no_shares).failure
    assert "the module has no parameter up.weight; it has 0.weight, 0.bias, 2.weight, 2.bias" in failure.message
