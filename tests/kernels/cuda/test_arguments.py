"""Arguments: converted by the kernel's own signature, or refused with the parameter's name and the remedy."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.kernels.cuda import _source
from mlsys.kernels.cuda._arguments import convert, copied, device_of


def one(code, arg, kind="int", name="n"):
    declared = _source.kernels(f"__global__ void kernel({kind} {name}) {{}}")["kernel"]
    return convert(declared, [code], [arg]).values[0]


@pytest.mark.parametrize(
    ("code", "arg", "expected"),
    [
        ("f4", 0.1, ctypes.c_float(0.1).value),
        ("f4", 2, 2.0),
        ("f8", 0.1, 0.1),
        ("i4", -(2**31), -(2**31)),
        ("u4", 2**32 - 1, 2**32 - 1),
        ("i8", 2**40, 2**40),
        ("u1", 255, 255),
        ("?1", True, True),
        ("?1", 0, False),
        ("h2", 1.5, 0x3E00),
        ("b2", 1.5, 0x3FC0),
    ],
)
def test_a_number_becomes_what_the_parameter_is(code, arg, expected):
    value = one(code, arg)
    assert value.value == expected
    assert ctypes.sizeof(value) == int(code[1])


@settings(deadline=None)
@given(st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]), st.integers(-(2**70), 2**70))
def test_an_int_that_does_not_fit_is_refused_and_none_is_cut(code, number):
    bits = 8 * int(code[1])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if code[0] == "i" else (0, 2**bits - 1)
    if low <= number <= high:
        assert one(code, number).value == number
    else:
        with pytest.raises(ValueError, match=f"cannot hold {number}"):
            one(code, number)


@pytest.mark.parametrize(
    ("code", "arg", "error", "words"),
    [
        ("i4", 3.0, TypeError, "argument n of kernel is an int: give an int, got 3.0"),
        ("i4", True, TypeError, "give an int, got True"),
        ("f4", "3", TypeError, "a float: give a float, got '3'"),
        ("f4", True, TypeError, "give a float, got True"),
        ("f4", torch.ones(1), TypeError, r"not a pointer: got a tensor, give n.item\(\)"),
        ("?1", 1.0, TypeError, "give True or False"),
        ("h2", "x", TypeError, "__half: give a float"),
        ("*f4", 3, TypeError, "is a pointer: give a tensor, got 3"),
        ("*f4", torch.ones(2, dtype=torch.float64), TypeError, "pointer to float.*got torch.float64; x.to"),
        ("*ci8", torch.ones(2, dtype=torch.int32), TypeError, "pointer to long long"),
        ("*v4f4", torch.ones(4, dtype=torch.float16), TypeError, "pointer to float"),
        ("*f4", torch.ones(4, 4).t()[:2], ValueError, r"must be contiguous.*shape \(2, 4\).*x.contiguous\(\)"),
        ("*f4", torch.ones(8)[::2], ValueError, r"strides \(2,\)"),
        ("s8", b"1234567", TypeError, "structure of 8 bytes"),
        ("s8", 3, TypeError, "structure of 8 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(code, arg, error, words):
    with pytest.raises(error, match=words):
        one(code, arg)


def test_the_number_of_arguments_is_said_with_the_signature():
    declared = _source.kernels("__global__ void kernel(int n, float *x) {}")["kernel"]
    with pytest.raises(TypeError, match=r"kernel takes 2 arguments, got 1: kernel\(int n, float \* x\)"):
        convert(declared, ["i4", "*f4"], [3])


def test_pointers_are_the_tensors_own_memory():
    x = torch.arange(8.0)
    assert one("*f4", x[2:]).value == x.data_ptr() + 8
    assert one("*cv4f4", x).value == x.data_ptr()
    assert one("*void", x).value == x.data_ptr()
    assert one("*f4", None).value is None
    assert one("*f4", torch.empty(0)).value in (None, 0)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("u4", torch.int32),
        ("u1", torch.int8),
        ("h2", torch.float16),
        ("b2", torch.bfloat16),
        ("?1", torch.bool),
        ("i8", torch.int64),
    ],
)
def test_elements_that_torch_has_by_another_name(code, dtype):
    x = torch.zeros(4, dtype=dtype)
    assert one(f"*{code}", x).value == x.data_ptr()


def test_a_structure_is_its_bytes():
    class Shape(ctypes.Structure):
        _fields_ = (("rows", ctypes.c_int), ("scale", ctypes.c_float))

    assert bytes(one("s8", Shape(3, 1.5))) == bytes(Shape(3, 1.5))
    assert bytes(one("s8", b"12345678")) == b"12345678"


def test_copies_share_what_the_tensors_share():
    x = torch.arange(6.0)
    y, n, z, w = copied([x, 3, x[2:], x.view(2, 3)])
    assert n == 3
    z[0] = math.pi
    assert y[2] == w[0, 2] == torch.tensor(math.pi)
    assert x[2] == 2
    assert z.storage_offset() - y.storage_offset() == 2
    assert w.shape == (2, 3)


def test_the_device_is_that_of_all_tensors():
    assert device_of([1, 2.0]) == torch.device("cpu")
    assert device_of([torch.ones(1), 3]) == torch.device("cpu")
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        device_of([torch.ones(1), torch.ones(1, device="meta")])
