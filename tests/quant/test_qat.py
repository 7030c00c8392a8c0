"""`mlsys.quant.qat`: rounding as it will be, gradients straight through, learned steps, and networks on the grid."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn import functional

from mlsys.contracts.core import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.quant import Scheme, qlinear, quantize
from mlsys.quant._tensor import Grid
from mlsys.quant.qat import convert_, fake_quantize, first_step, lsq, prepare_

CONTRACT = CONTRACTS["qat"]
SCHEMES = [
    "int4", "int3:g16", "int2:g7:sym", "int8", "int4:tensor", "int4:g32:fp16", "int4:g16:bf16:sym", "int4:g16:dq",
    "nf4:g16", "nf4:g16:dq", "e2m1:g8", "fp8_e4m3", "fp8_e5m2:tensor", "mxfp4", "mxfp8_e5m2", "nvfp4", "bf16", "fp16",
]  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3, bias=False))


@pytest.mark.parametrize("name", sorted(CONTRACT.wrong))
def test_contract_names_the_wrong_variant(name):
    assert check(CONTRACT, CONTRACT.wrong[name].impl, seed=1).failure.like == name


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 6), columns=st.integers(1, 50), scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 99)
)
def test_it_is_what_quantize_gives(rows, columns, scheme, seed):
    x = draw(rows, columns, seed=seed).requires_grad_()
    before = x.detach().clone()
    y = fake_quantize(x, scheme)
    assert torch.equal(y, quantize(x, scheme).dequantize())
    assert torch.equal(x, before)
    y.backward(draw(rows, columns, seed=seed + 1))
    straight = x.grad == draw(rows, columns, seed=seed + 1)
    assert straight.all() or Scheme.parse(scheme).scales in ("dq", "e4m3", "e8m0")


def test_range_that_is_given_clamps_and_stops_the_gradient():
    x = torch.tensor([[0.2, 3.4, 3.6, -3.6, 9.0, -3.0]], requires_grad=True)
    one = torch.ones(1, 1)
    y = fake_quantize(x, "int3:sym", Grid(one, None, one))
    assert y.tolist() == [[0, 3, 3, -3, 3, -3]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0, 0, 1]]


def test_floats_are_clamped_half_a_step_beyond_their_largest():
    x = torch.tensor([[6.9, 7.1, -7.1]], requires_grad=True)
    one = torch.ones(1, 1)
    y = fake_quantize(x, "e2m1", Grid(one, None, one))
    assert y.tolist() == [[6, 6, -6]]
    y.sum().backward()
    assert x.grad.tolist() == [[1, 0, 0]]


def test_other_dtypes_and_dimensions():
    x = draw(2, 3, 20).bfloat16().requires_grad_()
    y = fake_quantize(x, "int4:g8")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantize(x, "int4:g8").dequantize(torch.bfloat16))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("scheme", ["int3:sym", "int2:sym:g8", "int4:sym:tensor"])
def test_learned_step_has_the_papers_gradient(scheme):
    x, parsed = draw(3, 20).requires_grad_(), Scheme.parse(scheme)
    step = (0.4 * first_step(x, scheme)).requires_grad_()
    gradient, largest = draw(3, 20, seed=1), parsed.element.largest
    y = lsq(x, step, scheme)
    y.backward(gradient)
    wide = step.detach().expand(3, -1).repeat_interleave(parsed.group_size(20), dim=1)[:, :20]
    ratio = x.detach() / wide
    inside = ratio.abs() < largest
    assert not inside.all()
    torch.testing.assert_close(y, ratio.clamp(-largest, largest).round() * wide)
    torch.testing.assert_close(x.grad, gradient * inside)
    each = gradient * torch.where(inside, ratio.round() - ratio, largest * ratio.sign())
    if parsed.group == "tensor":
        want = each.sum().reshape(1, 1) / (60 * largest) ** 0.5
    else:
        size = parsed.group_size(20)
        want = torch.stack([part.sum(dim=1) for part in each.split(size, dim=1)], dim=1) / (size * largest) ** 0.5
    torch.testing.assert_close(step.grad, want)


def test_first_step():
    x = torch.tensor([[1.0, -3, 0, 0, 0, 2]])
    torch.testing.assert_close(first_step(x, "int3:sym:g2"), torch.tensor([[4 / 3**0.5, 1.0, 2 / 3**0.5]]))
    torch.testing.assert_close(first_step(x, "int2:sym:tensor"), torch.tensor([[2.0]]))


@pytest.mark.parametrize(("scheme", "ranges"), [("int3:g4", "minmax"), ("int2:sym", "learned"), ("nf4", "minmax")])
def test_prepare_train_convert(scheme, ranges):
    net, x = network(), draw(40, 8)
    labels, own = x[:, :3].argmax(dim=1), net[0].weight
    start = own.detach().clone()
    assert prepare_(net, scheme, ranges=ranges) == ["0", "2"]
    assert any(parameter is own for parameter in net.parameters())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(own, start)
    want = net.eval()(x).detach()
    codes = convert_(net)
    assert list(codes) == ["0", "2"]
    assert type(net[0]) is nn.Linear
    assert isinstance(net[0].weight, nn.Parameter)
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "2.weight"]
    torch.testing.assert_close(net(x), want)
    assert torch.equal(net[0].weight, codes["0"].dequantize())
    assert codes["0"].scheme == Scheme.parse(scheme)


def test_steps_are_trained():
    net = network()
    prepare_(net, "int3:sym", ranges="learned")
    net(draw(5, 8)).square().sum().backward()
    steps = [p for name, p in net.named_parameters() if name.endswith("step")]
    assert [tuple(step.shape) for step in steps] == [(12, 1), (3, 1)]
    assert all(step.grad.abs().max() > 0 for step in steps)


def test_inputs_are_rounded_as_qlinear_does():
    layer, x = nn.Linear(20, 6), draw(5, 20)
    prepare_(layer, "int8", activations="int8")
    with torch.no_grad():
        got = layer(x)
    codes = convert_(layer)[""]
    torch.testing.assert_close(got, qlinear(x, codes, layer.bias.detach(), activations="int8"))
    torch.testing.assert_close(layer(x), functional.linear(x, codes.dequantize(), layer.bias))


def test_inputs_given_by_name_are_rounded_too():
    layer, x = nn.Linear(20, 6), draw(5, 20)
    prepare_(layer, "int8", activations="int8")
    assert torch.equal(layer(input=x), layer(x))
    assert not torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(TypeError, match="input"):
        layer()


def test_shared_weight_stays_float_elsewhere():
    net = nn.ModuleDict({"in": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False)})
    net["out"].weight = net["in"].weight
    floats = net["in"].weight.detach().clone()
    prepare_(net, "int4")
    assert net["out"].parametrizations.weight.original is net["in"].weight
    convert_(net)
    assert torch.equal(net["in"].weight, floats)
    assert torch.equal(net["out"].weight, quantize(floats, "int4").dequantize())


def test_include_and_copies():
    net = network()
    assert prepare_(net, "int4", include=lambda name: name != "0") == ["2"]
    twin = copy.deepcopy(net)
    convert_(twin)
    assert torch.equal(twin[0].weight, net[0].weight)
    assert "2.parametrizations.weight.original" in net.state_dict()


def test_nothing_is_changed_if_a_layer_is_refused():
    net = network()
    with torch.no_grad():
        net[2].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="2 cannot be quantized: weight must be finite"):
        prepare_(net, "int4")
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "2.weight"]
    ready = network()
    prepare_(ready, "int4")
    with pytest.raises(ValueError, match="0 has a parametrized weight already"):
        prepare_(ready, "int4")


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
def test_nothing_is_converted_if_a_later_layer_cannot_be(ranges):
    net, x = network(), draw(5, 8)
    prepare_(net, "int4:sym", ranges=ranges, activations="int8")
    before, want = copy.deepcopy(net.state_dict()), net[0](x)
    with torch.no_grad():
        net[2].parametrizations.weight.original[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^2 cannot be quantized, and nothing was changed: weight must be finite"):
        convert_(net)
    assert net.state_dict().keys() == before.keys()
    assert torch.equal(net[0].parametrizations.weight.original, before["0.parametrizations.weight.original"])
    assert torch.equal(net[0](x), want)  # activations are still rounded, too
    with torch.no_grad():
        net[2].parametrizations.weight.original[1, 2] = 0.5
    assert list(convert_(net)) == ["0", "2"]


def test_steps_that_diverged_are_refused():
    net = network()
    prepare_(net, "int3:sym", ranges="learned")
    with torch.no_grad():
        net[2].parametrizations.weight[0].step[0] = torch.nan
    with pytest.raises(ValueError, match="2 cannot be quantized, and nothing was changed: its learned steps"):
        convert_(net)


@pytest.mark.parametrize(
    ("scheme", "grid", "error", "message"),
    [
        ("int3:sym", Grid(torch.ones(2, 1), None, None), ValueError, r"scale must be \(1, 1\) or \(3, 1\).*\(2, 1\)"),
        ("int3:sym:g2", Grid(torch.ones(3, 3), None, None), ValueError, r"\(1, 1\) or \(3, 2\).*got \(3, 3\)"),
        ("int3:sym:tensor", Grid(torch.ones(3), None, None), ValueError, r"got \(3,\)"),
        ("int3", Grid(torch.ones(1, 1), None, None), ValueError, r"grid\.zero must be a tensor for int3:chann"),
        ("int3", Grid(torch.ones(3, 1), torch.ones(4, 1), None), ValueError, r"zero must be \(1, 1\) or \(3, 1\)"),
        ("int3:sym", Grid(torch.ones(1, 1), torch.ones(1, 1), None), ValueError, r"grid\.zero must be None"),
        ("bf16", Grid(torch.ones(1, 1), None, None), ValueError, r"grid\.scale must be None for bf16"),
        ("int3:sym", Grid(torch.ones(1, 1, dtype=torch.int32), None, None), TypeError, r"got torch\.int32"),
        ("int3:sym", Grid(torch.ones(1, 1, device="meta"), None, None), ValueError, "on cpu as x is, got meta"),
        ("int3:sym", torch.ones(1, 1), TypeError, "grid must be a Grid, as from choose_grid, got Tensor"),
    ],
)  # fmt: skip
def test_a_grid_that_is_not_one_of_the_matrix_is_refused(scheme, grid, error, message):
    with pytest.raises(error, match=message):
        fake_quantize(torch.ones(3, 4), scheme, grid)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fake_quantize(torch.tensor([[torch.nan]]), "int4"), ValueError, "finite"),
        (lambda: fake_quantize(torch.ones(2, 2), "int99"), ValueError, "no format"),
        (lambda: lsq(torch.ones(2, 4), torch.ones(2, 1), "int4"), ValueError, "symmetric integers"),
        (lambda: lsq(torch.ones(2, 4), torch.ones(2, 2), "int4:sym"), ValueError, r"step must be \(2, 1\)"),
        (lambda: lsq(torch.ones(4), torch.ones(1, 1), "int4:sym"), ValueError, "matrix"),
        (lambda: first_step(torch.ones(2, 4), "nf4"), ValueError, "not of nf4"),
        (lambda: prepare_(nn.ReLU(), "int4"), ValueError, "no linear layer"),
        (lambda: prepare_(network(), "int4", ranges="learned"), ValueError, "symmetric"),
        (lambda: prepare_(network(), "int4", ranges="ema"), ValueError, "ranges='ema'"),
        (lambda: prepare_(network(), "int4", activations="int4"), ValueError, "activations"),
        (lambda: prepare_(network(), "int4", include="0"), TypeError, "include must be a function of a layer's name"),
        (lambda: convert_(network()), ValueError, "prepared"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
