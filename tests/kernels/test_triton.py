"""What the Triton kernels share: rounding, products and loops under the interpreter, devices, tuning, compiling."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from mlsys.commands.tune import modules
from mlsys.kernels import _triton, _triton_compile, _triton_tune, softmax_triton
from mlsys.kernels._triton import bound, config, dot, narrow, next_power_of_2, on_device
from mlsys.loading import import_file

Fences = import_file(Path(__file__).with_name("guards.py")).Fences
interpreted = pytest.mark.skipif(not _triton.INTERPRETED.value, reason="of the interpreter")


@triton.jit
def _round(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, narrow(tl.load(x + at, mask=at < n, other=0.0), out.dtype.element_ty), mask=at < n)


@triton.jit
def _product(a, b, c, n, BLOCK: tl.constexpr):
    i = tl.arange(0, 16)
    acc = tl.zeros((16, 16), c.dtype.element_ty)
    for start in tl.range(0, bound(n), BLOCK):
        k = start + tl.arange(0, BLOCK)
        acc = dot(tl.load(a + i[:, None] * n + k[None, :]), tl.load(b + k[:, None] * 16 + i[None, :]), acc, "ieee")
    tl.store(c + i[:, None] * 16 + i[None, :], acc)


@triton.jit
def _beyond(out):
    tl.store(out + tl.arange(0, 16), 1.0)


def device():
    return "cpu" if _triton.INTERPRETED.value else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_rounds_any_bits_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x[:6] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38])
    out = torch.empty(x.shape, dtype=dtype, device=device())
    with _triton.at(out.device):
        _round[(triton.cdiv(len(x), 1024),)](x.to(device()), out, len(x), BLOCK=1024)
    torch.testing.assert_close(out.cpu(), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_narrow_takes_the_even_one_of_two_as_near():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    out = torch.empty(3, dtype=torch.bfloat16, device=device())
    _round[(1,)](x.to(device()), out, 3, BLOCK=16)
    assert out.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_dot_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(-90, 90, (2, 16, 64), generator=generator)
    a, b = (x.to(dtype) if dtype == torch.int8 else (x / 64).to(dtype) for x in draw)
    b = b.reshape(64, 16)
    c = torch.zeros(16, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32, device=device())
    _product[(1,)](a.to(device()), b.to(device()), c, 64, BLOCK=32)
    torch.testing.assert_close(c.cpu().double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


def test_config_is_a_value():
    one = config(BLOCK=64, warps=8, stages=3)
    assert one == config(BLOCK=64, warps=8, stages=3)
    assert len({one, config(BLOCK=64, warps=8, stages=3)}) == 1
    assert one["BLOCK"] == 64
    assert str(one) == "BLOCK=64 warps=8 stages=3"
    assert one.options() == {"BLOCK": 64, "num_warps": 8, "num_stages": 3}
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]


def test_devices_are_refused_by_name():
    here = torch.ones(2, device=device())
    with pytest.raises(ValueError, match=r"weight must be on x's device .*, got meta: move it"):
        on_device("norm", x=here, weight=torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"x must be on a CUDA device, got meta: move it, or use mlsys.kernels.norm"):
        on_device("norm", x=torch.ones(2, device="meta"))
    assert on_device("norm", x=here, bias=None) == here.device


@interpreted
def test_interpreter_switched_off_too_late(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET was unset after Triton was imported"):
        softmax_triton.softmax(torch.ones(3))


def test_without_gpu_and_interpreter_the_error_names_both_ways():
    code = (
        "import torch\nfrom mlsys.kernels import softmax\n"
        "for variant in ('torch', 'triton'):\n"
        "    try: softmax(torch.ones(3), variant=variant)\n"
        "    except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == (
        "x is on a CPU, where Triton kernels run under Triton's interpreter only: set TRITON_INTERPRET=1 before Python "
        "starts, or use mlsys.kernels.softmax"
    )


# --- tuning -----------------------------------------------------------------------------------------------------------

TWO = (config(BLOCK=64), config(BLOCK=128))


def refuse(*args):
    raise AssertionError("nothing is timed here")


def test_given_config_is_taken_untimed():
    assert _triton_tune.tuned("k", "n", TWO, refuse, torch.device("cpu"), TWO[1]) is TWO[1]


@interpreted
def test_interpreter_takes_the_first():
    assert _triton_tune.tuned("k", "n", TWO, refuse, torch.device("cpu")) is TWO[0]


def test_no_config_is_an_error():
    with pytest.raises(RuntimeError, match="k has no config for n"):
        _triton_tune.tuned("k", "n", (), refuse, torch.device("cpu"))


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """As if there were one: its name is known, and `time_all` says which it found the fastest."""
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton_tune, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(_triton_tune, "_place", lambda device: "Some_GPU-sm90-triton3.9.0")
    _triton_tune.forget()
    timed = []

    def time_all(kernel, key, configs, run, device):
        timed.append(key)
        path = _triton_tune.entry_path(kernel, key, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"kernel": kernel, "key": key, "device": "Some GPU", "chosen": str(configs[-1]), "refused": []}
        path.write_text(json.dumps(entry | {"milliseconds": {str(one): 1.0 + i for i, one in enumerate(configs)}}))
        return configs[-1]

    monkeypatch.setattr(_triton_tune, "time_all", time_all)
    yield timed
    _triton_tune.forget()


def test_choice_is_made_once_and_remembered(on_a_gpu):
    gpu = torch.device("cuda", 0)
    for _ in range(3):
        assert _triton_tune.tuned("k", "n", TWO, refuse, gpu) is TWO[1]
    _triton_tune.forget()  # as a new process would
    assert _triton_tune.tuned("k", "n", TWO, refuse, gpu) is TWO[1]
    assert on_a_gpu == ["n"]
    assert _triton_tune.tuned("k", "m", TWO, refuse, gpu) is TWO[1]
    assert on_a_gpu == ["n", "m"]
    (first, second) = _triton_tune.remembered()
    assert (first.kernel, first.key, first.chosen) == ("k", "m", str(TWO[1]))
    assert second.key == "n"


def test_other_configs_are_another_question(on_a_gpu):
    gpu = torch.device("cuda", 0)
    _triton_tune.tuned("k", "n", TWO, refuse, gpu)
    more = (*TWO, config(BLOCK=256))
    assert _triton_tune.tuned("k", "n", more, refuse, gpu) is more[2]
    assert on_a_gpu == ["n", "n"]


def test_only_one_config_is_not_timed(on_a_gpu):
    assert _triton_tune.tuned("k", "n", TWO[:1], refuse, torch.device("cuda", 0)) is TWO[0]
    assert on_a_gpu == []


# --- compiling --------------------------------------------------------------------------------------------------------


def test_problems_are_named():
    row = _triton_compile.Compiled("m", "k", "BLOCK=1", "", 90)
    assert row.problems() == []
    of = {**vars(row), "spilled": 8, "local": 2}
    assert _triton_compile.Compiled(**of).problems() == [
        "k, BLOCK=1, sm_90: 8 bytes of spills, 2 local loads and stores"
    ]
    assert _triton_compile.Compiled(**of | {"why_spills": "many numbers"}).problems() == []
    of = {**vars(row), "shared": 300_000, "missing": ("wgmma", "TMA")}
    assert _triton_compile.Compiled(**of).problems() == [
        "k, BLOCK=1, sm_90: 300000 bytes of shared memory, of 232448",
        "k, BLOCK=1, sm_90: no wgmma and no TMA",
    ]
    assert _triton_compile.Compiled(**vars(row) | {"failed": "no"}).problems() == ["k, BLOCK=1, sm_90: no"]


def test_a_module_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"compiling no.such.module ended with 1"):
        _triton_compile.compiled(["no.such.module"])


def test_every_module_with_kernels_has_specimens():
    found = {module: importlib.import_module(module).specimens() for module in modules().values()}
    assert {"mlsys.kernels.softmax_triton", "mlsys.attention.flash_triton"} <= set(found)
    assert all(found.values())


def test_a_specimen_is_compiled_for_the_targets_that_it_is_launched_on(monkeypatch, capsys):
    kept = [replace(softmax_triton.specimens()[0], name=name, targets=some) for name, some in (("a", ()), ("b", (90,)))]
    seen = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(softmax_triton, "specimens", lambda: kept)
    monkeypatch.setattr(_triton_compile, "compile_one", lambda module, one, target: seen.append((one.name, target)))
    monkeypatch.setattr(_triton_compile, "asdict", lambda row: {})
    assert _triton_compile.main(["mlsys.kernels.softmax_triton"]) == 0
    assert seen == [("a", 80), ("a", 90), ("b", 90)]


# --- guards -----------------------------------------------------------------------------------------------------------


@interpreted
def test_fences_see_a_store_beyond():
    with pytest.raises(AssertionError, match="6 numbers were stored after a tensor of 10"), Fences():
        _beyond[(1,)](torch.empty(10))
