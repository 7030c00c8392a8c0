"""wmma, mma.sync and ldmatrix on the processor: the products are torch's, the misuse is found."""

from pathlib import Path

import pytest
import torch

import mlsys.kernels.cuda
from mlsys.kernels.cuda import KernelError, check, load

INCLUDE = Path(mlsys.kernels.cuda.__file__).parent / "include"
FILE = load(Path(__file__).parent / "files" / "tensor_cores.cu", includes=[INCLUDE])
FORMATS = {"half": torch.float16, "bfloat16": torch.bfloat16}


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 8), (8, 32)])
def test_wmma_multiplies_matrices_in_any_layout(m, n, name, by_rows):
    a, b, c = drawn(m, 16, dtype=FORMATS[name]), drawn(16, n, dtype=FORMATS[name], seed=1), drawn(m, n, seed=2)
    want = (c.double() + 2 * a.double() @ b.double()).float()
    laid = [x if by_rows else x.T.contiguous() for x in (a, b, c)]
    kernel = FILE[f"product_{m}_{n}_{name}"]
    assert check(kernel, 1, 32, int(by_rows), *laid) == []
    kernel(1, 32, int(by_rows), *laid)
    torch.testing.assert_close(laid[2] if by_rows else laid[2].T, want, rtol=1e-5, atol=1e-5)


def test_wmma_with_a_sum_of_half_rounds_once_a_product():
    a, b, c = (drawn(16, 16, dtype=torch.float16, seed=s) for s in range(3))
    want = (c.float() + (2 * (a.double() @ b.double()).half()).float()).half()
    FILE["product_in_half"](1, 32, 1, a, b, c)
    torch.testing.assert_close(c.float(), want.float(), rtol=2**-9, atol=2**-9)


def test_wmma_of_tf32_takes_ten_bits_of_the_fraction():
    a, b, c = drawn(16, 8), drawn(8, 16, seed=1), torch.zeros(16, 16)
    FILE["product_tf32"](1, 32, a, b, c)
    near = [torch.frexp(x.double()) for x in (a, b)]
    x, y = (
        torch.ldexp((mantissa * 2**11 + mantissa.sign() * 0.5).trunc() / 2**11, exponent) for mantissa, exponent in near
    )
    torch.testing.assert_close(c, (x @ y).float(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(c, a @ b, rtol=1e-5, atol=1e-5)


def test_products_add_up():
    a, b, c = drawn(16, 16, dtype=torch.float16), drawn(16, 16, dtype=torch.float16, seed=1), torch.zeros(16, 16)
    FILE["many"](1, 32, 50, a, b, c)
    torch.testing.assert_close(c, 50 * (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", ["crooked", "crooked_rows"])
def test_wmma_wants_aligned_matrices(kernel):
    (finding,) = check(FILE[kernel], 1, 32, drawn(20, 17, dtype=torch.float16), torch.zeros(32))
    assert "load_matrix_sync" in finding.source
    assert "multiple of" in finding.message


def test_wmma_reads_no_row_too_many():
    (finding,) = check(FILE["one_row_too_many"], 1, 32, drawn(15, 16, dtype=torch.float16), torch.zeros(32))
    assert finding.kind == "out-of-bounds"
    assert "load_matrix_sync" in finding.source


def test_half_a_warp_can_not_multiply():
    with pytest.raises(KernelError, match="mma_sync"):
        FILE["half_a_warp"](1, 32, drawn(16, 16, dtype=torch.float16), torch.zeros(32))
    with pytest.raises(KernelError, match="all 32 lanes"):
        FILE["many"](
            1, 16, 1, drawn(16, 16, dtype=torch.float16), drawn(16, 16, dtype=torch.float16), torch.zeros(16, 16)
        )


@pytest.mark.parametrize("name", FORMATS)
def test_mma_with_ldmatrix(name):
    a, b, d = drawn(16, 16, dtype=FORMATS[name]), drawn(16, 8, dtype=FORMATS[name], seed=1), drawn(16, 8, seed=2)
    want = (d.double() + a.double() @ b.double()).float()
    kernel = FILE[f"mma_{name}"]
    assert check(kernel, 1, 32, a, b, d) == []
    kernel(1, 32, a, b, d)
    torch.testing.assert_close(d, want, rtol=1e-5, atol=1e-5)


def test_mma_of_tf32():
    a, b, d = drawn(16, 8).bfloat16().float(), drawn(8, 8, seed=1).bfloat16().float(), torch.zeros(16, 8)
    FILE["mma_tf32"](1, 32, a, b, d)
    torch.testing.assert_close(d, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_mma_in_a_swizzled_tile():
    a, d = drawn(16, 64, dtype=torch.float16), torch.zeros(16, 16)
    assert check(FILE["mma_swizzled"], 1, 32, a, d) == []
    FILE["mma_swizzled"](1, 32, a, d)
    torch.testing.assert_close(d, (a.double() @ a.double().T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_where_ldmatrix_leaves_what(count):
    x = torch.arange(256).half()
    y = torch.zeros(count, 8, 8, dtype=torch.float16)
    FILE[f"matrices_{count}"](1, 32, 0, x, y)
    assert torch.equal(y, x.view(4, 8, 8)[:count])
    FILE[f"matrices_{count}"](1, 32, 1, x, y)
    assert torch.equal(y, x.view(4, 8, 8)[:count].transpose(1, 2))


def test_ldmatrix_wants_rows_of_16_bytes():
    with pytest.raises(
        KernelError, match=r"ldmatrix: a row has to lie at a multiple of 16 bytes, and lies 8 bytes after"
    ):
        FILE["ldmatrix_crooked"](1, 32, torch.zeros(32, dtype=torch.float16))


def test_ldmatrix_before_other_lanes_have_written():
    findings = check(
        FILE["ldmatrix_too_early"], 1, 32, drawn(8, 8, dtype=torch.float16), torch.zeros(32, dtype=torch.float16)
    )
    assert {f.kind for f in findings} == {"race"}
    lines = FILE.text.splitlines()
    assert any("ldmatrix(" in lines[line - 1] for f in findings for line in (f.line, f.other_line))
