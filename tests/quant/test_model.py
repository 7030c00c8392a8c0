"""mlsys.quant.model: which layers, what they become, what happens when something fails, and the file."""

import copy
import json
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlsys.contracts import check
from mlsys.contracts.quant import CONTRACTS
from mlsys.models import _checkpoint
from mlsys.models.transformer import Transformer
from mlsys.perf.configs import llama
from mlsys.quant import Scheme, _file, qlinear, quantize
from mlsys.quant.model import QuantizedLinear, load, quantize_, save

METHODS = ["rtn", "hqq", "gptq", "awq", "smoothquant", "llm_int8"]
CALIBRATED = ["gptq", "awq", "smoothquant", "llm_int8"]


@pytest.fixture(autouse=True)
def no_gradients():
    """Integer products have none."""
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Two branches of unequal widths, one layer without bias, one in a list."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.norm = nn.LayerNorm(24)
        self.up = nn.Linear(24, 40)
        self.dropout = nn.Dropout(0.5)
        self.rest = nn.ModuleList([nn.Linear(40, 24, bias=False), nn.Linear(24, 7)])

    def forward(self, tokens, scale=1.0):
        x = self.norm(self.embedding(tokens)) * scale
        x = self.dropout(torch.relu(self.up(x)))
        return self.rest[1](self.rest[0](x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (3, 9), generator=generator) for _ in range(4)]


def state(module):
    """All that a module holds, and what its parts are."""
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parts = {name: (id(part), part.training, dict(part._forward_pre_hooks)) for name, part in module.named_modules()}
    return tensors, parts


def assert_same(before, module):
    tensors, parts = state(module)
    assert parts == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)


# --- what a layer computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["int8", "int4:g16", "int3:g5", "nf4:g16:dq", "mxfp4", "nvfp4", "bf16", "int2:g8:sym:bf16"]
)
def test_a_layer_multiplies_with_what_its_codes_stand_for(scheme):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 7), torch.randn(2, 3, 40)
    module = nn.Sequential(linear)
    report = quantize_(module, scheme)
    qw = quantize(linear.weight, scheme)
    torch.testing.assert_close(module(x), F.linear(x, qw.dequantize(), linear.bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module[0].weight, qw.dequantize())
    assert module[0].bits_per_weight == report.bits_per_weight == qw.bits_per_weight
    assert report.layers[0].weight_error == pytest.approx(
        float(((qw.dequantize() - linear.weight).norm() / linear.weight.norm()).detach()), rel=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_outputs_near(net, batches, method):
    net.eval()
    want = net(batches[0])
    before = [batch.clone() for batch in batches]
    scheme = "int8" if method in ("smoothquant", "llm_int8") else "int4:g8"
    report = quantize_(net, scheme, method, batches)
    assert [type(net.get_submodule(name)) for name in ("up", "rest.0", "rest.1")] == [QuantizedLinear] * 3
    assert type(net.norm) is nn.LayerNorm
    assert float((net(batches[0]) - want).norm() / want.norm()) < 0.15
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    assert [layer.name for layer in report.layers] == ["up", "rest.0", "rest.1"]
    assert all(layer.output_error < 0.15 for layer in report.layers)
    assert not net.up.training


def test_gptq_beats_rounding_on_its_calibration_inputs(net, batches):
    nearest = quantize_(copy.deepcopy(net), "int3", "rtn", batches)
    chosen = quantize_(net, "int3", "gptq", batches)
    for ours, theirs in zip(chosen.layers, nearest.layers, strict=True):
        assert ours.output_error < theirs.output_error


def test_gptq_notes_what_it_lacks(net, batches):
    few = copy.deepcopy(net)
    assert all(layer.note == "" for layer in quantize_(net, "int4", "gptq", batches).layers)
    few.norm.weight[5] = few.norm.bias[5] = 0
    report = quantize_(few, "int4", "gptq", [batches[0][:1]])
    assert report.layers[0].note == "1 column without input, 9 inputs for 24 columns: give it more"


def test_sequential_layers_are_calibrated_on_what_quantized_ones_give(net, batches):
    """The second layer's H is that of the first's new outputs, number for number."""
    from mlsys.quant.gptq import gptq, hessian

    twin = copy.deepcopy(net).eval()
    quantize_(net, "int2", "gptq", iter(batches), sequential=True)
    given = []
    twin.up = copy.deepcopy(net.up)
    twin.rest[0].register_forward_pre_hook(lambda _, x: given.append(x[0].detach()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    H = None
    for x in given:
        H = hessian(x, H)
    want = gptq(twin.rest[0].weight, H, "int2")
    assert torch.equal(net.rest[0].quantized.codes, want.codes)


def test_int8_activations_round_inputs(net, batches):
    linear = copy.deepcopy(net.up)
    quantize_(net, "int8", activations="int8", include="up")
    x = torch.randn(5, 24)
    t = x.abs().amax(1, keepdim=True) / 127
    want = F.linear((x / t).round() * t, net.up.weight, linear.bias)
    torch.testing.assert_close(net.up(x), want, atol=1e-5, rtol=1e-5)


def test_llm_int8_keeps_outlier_columns_as_they_are():
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 9), torch.randn(50, 32)
    x[:, [3, 20]] *= 40
    module = nn.Sequential(linear)
    report = quantize_(module, "int8", "llm_int8", [x])
    assert module[0].outlier_columns.tolist() == [3, 20]
    assert torch.equal(module[0].weight[:, [3, 20]], linear.weight[:, [3, 20]])
    assert report.layers[0].note == "2 outlier columns"
    rounded = quantize_(nn.Sequential(linear), "int8", calibration=[x], activations="int8")
    assert report.layers[0].output_error < rounded.layers[0].output_error / 5


def test_an_awq_layer_divides_its_inputs(monkeypatch):
    linear, x = nn.Linear(12, 5), torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(linear)
    quantize_(module, "int8", "awq", [x])
    s = module[0].divisor
    want = F.linear(x / s, module[0].quantized.dequantize(), linear.bias)
    torch.testing.assert_close(module(x), want, atol=1e-5, rtol=1e-5)


# --- which layers -----------------------------------------------------------------------------------------------------


def test_include_and_exclude(net):
    report = quantize_(net, "int8", include=["rest.*", "up"], exclude="*.1")
    assert [layer.name for layer in report.layers] == ["up", "rest.0"]
    assert report.left == ("rest.1",)
    assert type(net.rest[1]) is nn.Linear


def test_include_as_a_function(net):
    report = quantize_(net, "int8", include=lambda name, layer: layer.out_features == 7)
    assert [layer.name for layer in report.layers] == ["rest.1"]


@pytest.mark.parametrize("wrong", [5, [5], ["up", None], (name for name in ["up"])])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_choices_that_are_no_names_are_refused(net, argument, wrong):
    before = state(net)
    with pytest.raises(TypeError, match=f"{argument} must be a name or pattern .* a list of them, or a function"):
        quantize_(net, "int8", **{argument: wrong})
    assert_same(before, net)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"include": "upp"}, "'upp' is the name of none"),
        ({"exclude": "norm"}, "'norm' is a LayerNorm"),
        ({"exclude": "*"}, "no nn.Linear layer is left"),
    ],
)
def test_patterns_without_a_match_are_refused(net, options, says):
    with pytest.raises(ValueError, match=says.replace("*", r"\*")):
        quantize_(net, "int8", **options)


def test_attention_of_torch_which_reads_its_weights_itself_is_left():
    module = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 3))
    report = quantize_(module, "int8")
    assert [layer.name for layer in report.layers] == ["1"]
    assert report.left == ("0.out_proj",)
    assert "left as they are: 0.out_proj" in str(report)


def test_a_linear_layer_cannot_be_replaced_within_itself():
    with pytest.raises(ValueError, match="Sequential"):
        quantize_(nn.Linear(3, 2), "int8")


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_all_that_do_not_fit_are_named_before_calibration(net):
    net.embedding.weight = nn.Parameter(torch.randn(11, 24))
    net.tied = nn.Linear(24, 11, bias=False)
    net.tied.weight = net.embedding.weight
    net.twice = net.up
    net.void = nn.Linear(3, 3, device="meta")
    net.broken = nn.Linear(4, 3)
    net.hooked = nn.Linear(4, 3)
    net.hooked.register_forward_hook(lambda *a: None)
    with torch.no_grad():
        net.broken.weight[1, 2] = math.nan
    parts = {name: id(part) for name, part in net.named_modules()}

    def never():
        raise AssertionError("calibrated before all layers were checked")
        yield

    with pytest.raises(ValueError, match="nothing was quantized") as told:
        quantize_(net, "int8", "gptq", never())
    text = str(told.value)
    for words in (
        "tied: its weight is also embedding.weight",
        "up: its weight is also twice.weight",
        "twice: its weight is also up.weight",
        "void: its weight has no data",
        r"broken: weight must be finite, got nan at [1, 2]",
        "hooked: it has hooks",
    ):
        assert words in text
    assert "rest.0" not in text
    assert {name: id(part) for name, part in net.named_modules()} == parts


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (("int4", "best"), {}, ValueError, "must be one of rtn, hqq"),
        (("int44",), {}, ValueError, "no format"),
        (("nf4", "llm_int8"), {"calibration": [1]}, ValueError, "integers"),
        (("nf4",), {"activations": "int8"}, ValueError, "integers"),
        (("int4",), {"activations": "int4"}, ValueError, "activations='int4'"),
        (("int4", "rtn"), {"steps": 3}, ValueError, "steps"),
        (("int4", "gptq"), {"calibration": [1], "order": "random"}, ValueError, "order='random'"),
        (("int8", "llm_int8"), {"calibration": [1], "threshold": -1}, ValueError, "threshold"),
        (("int4",), {"sequential": True}, ValueError, "calibration"),
        (("int4", "gptq"), {"calibration": torch.zeros(2, 3)}, TypeError, "put it into a list"),
        (("int4", "gptq"), {"calibration": {"tokens": 1}}, TypeError, "put it into a list"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_and_changes_nothing(net, arguments, options, error, says):
    before = state(net)
    with pytest.raises(error, match=says):
        quantize_(net, *arguments, **options)
    assert_same(before, net)


@pytest.mark.parametrize(
    ("scheme", "options", "says"),
    [
        ("int2:g8:sym:fp16", {}, "up: a scale of 1e\\+06 is beyond fp16's"),
        ("int4:g8", {"groups": "dynamic", "order": "activation"}, 'groups="dynamic" needs order="natural"'),
        ("nf4:dq", {"groups": "dynamic"}, 'groups="static"'),
    ],
)
def test_what_the_method_cannot_do_is_found_before_calibration(net, scheme, options, says):
    if not options:
        net.up.weight[3, 2] = 1e6
    before = state(net)

    def never():
        raise AssertionError("calibrated before scheme and options were checked")
        yield

    with pytest.raises(ValueError, match=says):
        quantize_(net, scheme, "gptq", never(), **options)
    assert_same(before, net)


def test_a_layer_that_is_left_out_once_others_are_quantized_is_named():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            return self.second(x) if type(self.first) is nn.Linear else x

    module, x = Routed(), torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    before = state(module)
    with pytest.raises(ValueError, match="second gets no inputs once the layers before it are quantized"):
        quantize_(module, "int4", "gptq", [x], sequential=True)
    assert_same(before, module)
    assert len(quantize_(module, "int4", "gptq", [x]).layers) == 2


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(("calibration", "says"), [(None, "pass calibration="), ([], "holds no inputs")])
def test_a_method_that_needs_inputs_says_so(net, method, calibration, says):
    before = state(net)
    with pytest.raises(ValueError, match=says):
        quantize_(net, "int8", method, calibration)
    assert_same(before, net)


@pytest.mark.parametrize("sequential", [False, True])
def test_layers_that_no_input_reached_are_named(net, batches, sequential):
    net.idle = nn.Linear(24, 5)
    before = state(net)
    with pytest.raises(ValueError, match="no calibration input reached idle:"):
        quantize_(net, "int8", "gptq", batches, sequential=sequential)
    assert_same(before, net)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [1, 5, 9])
def test_an_interruption_leaves_the_module_as_it_was(net, batches, sequential, error, calls):
    net.train()
    net.up.eval()
    left = [calls]

    class Last(nn.Module):
        def forward(self, x):
            left[0] -= 1
            if not left[0]:
                raise error
            return x

    net.norm.register_forward_hook(lambda module, arguments, x: Last()(x))
    before = state(net)
    if not sequential and calls > len(batches):
        batches = [*batches, *batches, *batches]
    with pytest.raises(error):
        quantize_(net, "int4", "gptq", batches, sequential=sequential)
    assert_same(before, net)


def test_inputs_that_are_not_finite_are_told_by_layer(net, batches):
    net.norm.weight.data[3] = math.inf
    before = state(net)
    with pytest.raises(ValueError, match="layer up"):
        quantize_(net, "int4", "gptq", batches)
    assert_same(before, net)


def test_calibration_takes_tensors_tuples_and_dicts(net, batches):
    a, b, c = batches[:3]
    mixed = quantize_(copy.deepcopy(net), "int4", "gptq", [a, (b, 0.5), {"tokens": c, "scale": 2.0}])
    assert mixed.layers[0].output_error > 0


def test_calibration_is_in_eval_mode_and_modes_come_back(net, batches):
    net.train()
    net.norm.eval()
    torch.manual_seed(5)
    one = quantize_(copy.deepcopy(net), "int4", "gptq", batches)
    two = quantize_(net, "int4", "gptq", batches)
    assert [layer.output_error for layer in one.layers] == [layer.output_error for layer in two.layers]
    assert net.dropout.training
    assert net.up.training
    assert not net.norm.training


# --- the layer as a module --------------------------------------------------------------------------------------------


def test_a_cast_leaves_what_the_scheme_says(net, batches):
    quantize_(net, "int4:g8")
    scale = net.up.scale.clone()
    net.to(torch.bfloat16)
    assert net.up.scale.dtype == torch.float32
    assert torch.equal(net.up.scale, scale)
    assert net.norm.weight.dtype == torch.bfloat16
    assert net(batches[0]).dtype == torch.bfloat16


def test_a_layer_can_be_copied_after_it_was_used(net, batches):
    net.eval()
    quantize_(net, "int3:g8")
    want = net(batches[0])
    twin = copy.deepcopy(net)
    net.up.scale.zero_()
    assert torch.equal(twin(batches[0]), want)


def test_loading_a_state_forgets_what_was_prepared(net, batches):
    """Formats of 3 bits are widened on first use: that copy must not outlive the codes."""
    net.eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.up.weight.mul_(-1)
    for module in (net, other):
        quantize_(module, "int3:g8")
        module(batches[0])
    net.load_state_dict(other.state_dict())
    assert torch.equal(net(batches[0]), other(batches[0]))


@pytest.mark.parametrize("scheme", ["int3:g8", "int8", "nf4:g8:dq", "nvfp4"])
def test_buffers_that_are_changed_or_replaced_are_what_is_multiplied_with(scheme):
    torch.manual_seed(0)
    module, other, x = nn.Sequential(nn.Linear(16, 5)), nn.Sequential(nn.Linear(16, 5)), torch.randn(3, 16)
    for one in (module, other):
        quantize_(one, scheme)
        one(x)
    codes = module[0].codes.clone()
    own = module(x)
    module[0].codes.copy_(other[0].codes)
    torch.testing.assert_close(module(x), F.linear(x, module[0].weight, module[0].bias), atol=1e-5, rtol=1e-5)
    assert not torch.equal(module(x), own)
    module[0].codes = codes
    assert torch.equal(module(x), own)


def test_inputs_are_divided_in_float32_in_models_of_16_bits():
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(48, 5), torch.randn(30, 48, generator=generator)
    x[:, ::5] *= 12
    module = nn.Sequential(linear)
    quantize_(module, "int4:g16", "awq", [x])
    module.to(torch.bfloat16)
    s, narrow = module[0].divisor, x.bfloat16()
    assert s.dtype == torch.float32
    want = (narrow.float() / s).bfloat16()
    assert not torch.equal(want, narrow / s.bfloat16())
    assert torch.equal(module(narrow), qlinear(want, module[0].quantized, module[0].bias))


def test_a_state_of_another_scheme_or_dtype_is_refused_by_name():
    """Codes of nf4 and e2m1 have the same shapes and dtypes, and mean other numbers."""
    torch.manual_seed(0)
    x, parts = torch.randn(3, 16), [nn.Sequential(nn.Linear(16, 4)) for _ in range(2)]
    for part, scheme in zip(parts, ("nf4:g8", "e2m1:g8"), strict=True):
        quantize_(part, scheme)
    mine, other = parts
    want = mine(x)
    with pytest.raises(RuntimeError, match="0: the state is of e2m1:g8, and the layer nf4:g8"):
        mine.load_state_dict(other.state_dict())
    assert torch.equal(mine(x), want)
    wide = dict(mine.state_dict())  # without metadata, as from a file of tensors alone
    wide["0.scale"] = wide["0.scale"].double()
    with pytest.raises(RuntimeError, match=r"0\.scale: torch\.float64 in the state, torch\.float32 in the layer"):
        mine.load_state_dict(wide)
    assert torch.equal(mine(x), want)
    again = nn.Sequential(nn.Linear(16, 4))
    quantize_(again, "nf4:g8")
    again.load_state_dict(mine.state_dict())
    assert torch.equal(again(x), want)


def test_the_report_is_a_table(net, batches):
    text = str(quantize_(net, "int4:g8", "gptq", batches, exclude="rest.1"))
    assert "rest.0" in text
    assert "24 × 40" in text
    assert "left as they are: rest.1" in text
    assert "gptq: 2 layers" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_may_read_the_weight_itself(dtype, tmp_path):
    """Its head is never called: F.linear(x, head.weight)."""
    config = llama(1, 16, 2, 24, vocab=20, context=16)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    tokens = torch.arange(10)[None]
    with pytest.raises(ValueError, match="no calibration input reached head:"):
        quantize_(model, "int4", "gptq", [tokens])
    want = model(tokens)
    quantize_(model, "int8", "rtn", [tokens])
    model.to(dtype)
    assert model.head.weight.dtype == model(tokens).dtype == dtype
    assert float((model(tokens) - want).norm() / want.norm()) < 0.05
    save(model, tmp_path / "model")
    other = load(tmp_path / "model", Transformer(config, dtype=dtype).eval())
    assert torch.equal(other(tokens), model(tokens))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_computes_the_same(net, batches, tmp_path, method):
    net.eval()
    quantize_(net, "int8:g12" if method in ("smoothquant", "llm_int8") else "int4:g8:dq", method, batches, **(
        {"threshold": 1.5} if method == "llm_int8" else {}
    ))  # fmt: skip
    save(net, tmp_path / "net")
    torch.manual_seed(9)
    other = Net().eval()
    assert load(tmp_path / "net", other) is other
    assert torch.equal(other(batches[0]), net(batches[0]))
    assert str(other) == str(net)
    again = load(tmp_path / "net", load(tmp_path / "net", Net()).eval())  # into one that is quantized already
    assert torch.equal(again(batches[0]), net(batches[0]))


def test_loading_into_a_model_without_data(tmp_path):
    config = llama(2, 32, 2, 48, vocab=20, context=16, tied=True)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    quantize_(model, "int4:g16")
    save(model, tmp_path / "model")
    other = load(tmp_path / "model", Transformer(config, device="meta").eval())
    tokens = torch.arange(10)[None]
    assert torch.equal(other(tokens), model(tokens))
    assert isinstance(other.token_embedding.weight, nn.Parameter)


def test_tied_tensors_are_saved_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self, device=None):
            super().__init__()
            self.embedding = nn.Embedding(200, 64, device=device)
            self.body = nn.Linear(64, 64, device=device)
            self.head = nn.Linear(64, 200, bias=False, device=device)
            self.head.weight = self.embedding.weight

    model = Tied()
    quantize_(model, "int8", exclude="head")
    save(model, tmp_path / "tied")
    assert (tmp_path / "tied").stat().st_size < 200 * 64 * 4 + 2 * 64 * 64 + 2000
    other = load(tmp_path / "tied", Tied("meta"))
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_file_with_different_numbers_for_tied_tensors_is_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 9, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

    loose, tied = Net(False), Net(True)
    quantize_(loose, "int8", include="body")
    save(loose, tmp_path / "net")
    before = state(tied)
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight: one tensor in the module, different"):
        load(tmp_path / "net", tied)
    assert_same(before, tied)
    loose.head.weight.copy_(loose.embedding.weight)
    save(loose, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", tied).head.weight, loose.embedding.weight)
    assert tied.head.weight is tied.embedding.weight


def test_a_bias_that_only_file_or_module_has_is_named(net, tmp_path):
    quantize_(net, "int8")
    save(net, tmp_path / "net")
    other = Net()
    other.up, other.rest[0] = nn.Linear(24, 40, bias=False), nn.Linear(40, 24)
    before = state(other)
    with pytest.raises(ValueError, match="was not changed") as told:
        load(tmp_path / "net", other)
    assert "up.bias: the module has no such tensor" in str(told.value)
    assert "rest.0.bias: the file does not have it" in str(told.value)
    assert_same(before, other)


def test_a_bias_of_other_floats_stays_and_one_of_integers_is_refused(net, batches, tmp_path):
    path = tmp_path / "net"
    net.eval()
    quantize_(net, "int8", include="up")
    net.up.bias = net.up.bias.half()
    save(net, path)
    other = load(path, Net().eval())
    assert other.up.bias.dtype == torch.float16
    assert torch.equal(other(batches[0]), net(batches[0]))
    config, tensors = _checkpoint.read(path, kind=_file.KIND)
    tensors["up.bias"] = tensors["up.bias"].int()
    _checkpoint.write(path, config, tensors, kind=_file.KIND)
    before = state(other)
    with pytest.raises(ValueError, match=r"up\.bias: torch\.int32 in the file"):
        load(path, other)
    assert_same(before, other)


@pytest.mark.parametrize("scheme", ["int8", "int4:g128:fp16", "int3:g64", "int2:g32", "nf4:dq", "mxfp4"])
def test_the_file_is_as_large_as_the_bits_say(tmp_path, scheme):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 512, bias=False))
    report = quantize_(module, scheme)
    save(module, tmp_path / "file")
    computed = report.bits_per_weight * 2 * 512 * 1024 / 8
    assert (tmp_path / "file").stat().st_size == pytest.approx(computed, rel=0.01)
    # and by hand: codes, and scales and zero points of each group
    s = Scheme.parse(scheme)
    zero = s.affine * 8
    bits = {"int8": 32 / 768, "mxfp4": 8 / 32, "nf4:dq": 8 / 64}.get(scheme)
    if bits is None:
        bits = ({"fp16": 16, "fp32": 32}[s.scales] + zero) / s.group
    assert report.bits_per_weight == pytest.approx(s.bits + bits, rel=0.01)


def test_a_damaged_file_is_refused_and_changes_nothing(net, batches, tmp_path):
    path = tmp_path / "net"
    quantize_(net, "int4:g8")
    save(net, path)
    data = path.read_bytes()
    other = Net()
    before = state(other)
    for damaged in (b"", data[:50], data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], b"no file of ours"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load(path, other)
        assert_same(before, other)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", other)


@pytest.mark.parametrize(
    ("part", "made"),
    [
        ("codes", lambda t: t[:1, :1].contiguous()),
        ("codes", lambda t: t.to(torch.int16)),
        ("scale", lambda t: t[:, :1].contiguous()),
        ("zero", lambda t: t[:-1].contiguous()),
        ("bias", lambda t: t[:-1].contiguous()),
        ("codes", None),
    ],
)
def test_a_whole_file_with_parts_of_wrong_sizes_is_refused_and_changes_nothing(net, tmp_path, part, made):
    """Its checksum is right: compiled code would read beyond what is there."""
    path = tmp_path / "net"
    quantize_(net, "int4:g8", include=["up"])
    save(net, path)
    config, tensors = _checkpoint.read(path, kind=_file.KIND)
    whole = tensors.pop(f"up.{part}")
    if made is not None:
        tensors[f"up.{part}"] = made(whole)
    _checkpoint.write(path, config, tensors, kind=_file.KIND)
    other = Net()
    before = state(other)
    with pytest.raises(ValueError, match="up: the file's parts do not make a layer"):
        load(path, other)
    assert_same(before, other)


def test_a_file_of_another_kind_is_refused(tmp_path):
    from mlsys.models import transformer

    model = Transformer(llama(1, 16, 2, 24, vocab=8, context=4))
    transformer.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"no model that mlsys\.quant\.model\.save wrote"):
        load(tmp_path / "model", model)


def test_what_does_not_fit_is_named_and_changes_nothing(net, tmp_path):
    quantize_(net, "int4:g8", include=["up", "rest.1"])
    save(net, tmp_path / "net")
    other = Net()
    other.up = nn.Linear(24, 41)
    other.norm = nn.LayerNorm(24, bias=False)
    other.rest[1] = nn.ReLU()
    other.more = nn.Linear(2, 2)
    other.embedding = nn.Embedding(12, 24)
    before = state(other)
    with pytest.raises(ValueError, match="was not changed") as told:
        load(tmp_path / "net", other)
    for words in (
        "up: the file has a linear layer 40 × 24, and the module Linear(in_features=24, out_features=41",
        "rest.1: the file has a linear layer 7 × 24, and the module ReLU()",
        "norm.bias: the module has no such tensor",
        "more.weight: the file does not have it",
        "embedding.weight: (11, 24) in the file, (12, 24) in the module",
    ):
        assert words in str(told.value)
    assert_same(before, other)


def test_saving_what_is_not_quantized_is_refused(net, tmp_path):
    with pytest.raises(ValueError, match="no quantized layer"):
        save(net, tmp_path / "net")
    assert os.listdir(tmp_path) == []  # noqa: PTH208  (an empty folder)


def test_the_file_says_its_schemes(net, tmp_path):
    from safetensors import safe_open

    quantize_(net, "nf4:g16:dq", include="up")
    save(net, tmp_path / "net")
    with safe_open(tmp_path / "net", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["layers"]["up"]["scheme"] == "nf4:g16:dq"
    assert config["layers"]["up"]["shape"] == [40, 24]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_the_contract_accepts_ours():
    verdict = check(CONTRACTS["model"], quantize_)
    assert verdict.passed, verdict
