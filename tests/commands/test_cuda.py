"""`mlsys cuda`: a student's file run, checked and profiled, with a driver or with inputs that are made up, and said."""

import json

import pytest
import torch

from mlsys import cli
from mlsys.commands import UsageError, _cuda_inputs

FILE = """#include <cmath>
template <int T>
__global__ void product(int M, int N, int K, const float *A, const float *B, float *C) {
  __shared__ float a[T][T], b[T][T];
  int x = threadIdx.x, y = threadIdx.y;
  int row = blockIdx.y * T + y, col = blockIdx.x * T + x;
  float sum = 0;
  for (int first = 0; first < K; first += T) {
    a[y][x] = row < M && first + x < K ? A[row * K + first + x] : 0;
    b[y][x] = col < N && first + y < K ? B[(first + y) * N + col] : 0;
    __syncthreads();
    for (int i = 0; i < T; i++) sum += a[y][i] * b[i][x];
    __syncthreads();
  }
  if (row < M && col < N) C[row * N + col] = sum;
}

__global__ void add(const float *x, const float *y, float *z, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) z[i] = x[i] + y[i];
}

__global__ void add_wrong(const float *x, const float *y, float *z, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) z[i] = x[i] + y[i];
}

__global__ void mixed(float *in, int *counts, float4 *out, float alpha, bool on, int rows, int cols) {
  if (on && threadIdx.x < rows * cols) out[threadIdx.x] = make_float4(alpha * in[threadIdx.x], 0, 0, NAN);
}

__global__ void stuck(int *x) {
  while (*(volatile int *)x == 0) ;
}

struct Pair { int a, b; };
__global__ void with_pair(Pair p, int *x) { x[0] = p.a; }

__global__ void reversed(int *x, int n) {
  extern __shared__ int kept[];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = kept[n - 1 - threadIdx.x];
}
"""
DRIVER = """import torch
KERNEL = "product<8>"
def arguments():
    m, n, k = 19, 13, 11
    a, b = torch.randn(m, k), torch.randn(k, n)
    return (2, 3), (8, 8), (m, n, k, a, b, torch.zeros(m, n))
def expected(m, n, k, a, b, c):
    return {"C": a @ b}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """One folder for all tests: a file that stays where it is is compiled once."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "my.cu").write_text(FILE)
    return folder


@pytest.fixture
def folder(kernels, monkeypatch):
    monkeypatch.chdir(kernels)
    (kernels / "driver.py").write_text(DRIVER)
    return kernels


@pytest.fixture
def mlsys(folder, capsys):
    def run(kind, *arguments):
        status = cli.main(["cuda", kind, *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_driver_says_what_is_expected(mlsys, folder):
    status, out, err = mlsys("run", "my.cu", "--driver", "driver.py")
    assert (status, err) == (0, "")
    assert "product<8> has run: 2 × 3 blocks of 8 × 8 threads" in out
    assert "C [19 × 13]: as expected, largest difference" in out
    (folder / "driver.py").write_text(DRIVER.replace("a @ b", "2 * a @ b"))
    status, out, _ = mlsys("run", "my.cu", "--driver", "driver.py")
    assert status == 1
    assert "C [19 × 13]: wrong in 247 of 247 elements, first at [0, 0]: " in out


def test_a_driver_without_an_expectation_shows_what_was_written(mlsys, folder):
    (folder / "driver.py").write_text(DRIVER.split("def expected")[0])
    status, out, _ = mlsys("run", "my.cu", "--driver", "driver.py", "--order", "7")
    assert status == 0
    assert "C [19 × 13]: 247 of 247 elements changed; from " in out
    assert "A [" not in out


def test_options_come_before_the_driver(mlsys):
    status, out, _ = mlsys(
        "run", "my.cu", "--driver", "driver.py", "--kernel", "product<16>", "--grid", "1,2", "--block", "16,16"
    )
    assert status == 0
    assert "product<16> has run: 1 × 2 blocks of 16 × 16 threads" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "no function arguments()"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("def arguments():\n    return undefined\n", "driver.py:2 in arguments: `return undefined`: NameError"),
        ("def arguments():\n    return 1, 32\n", "must return grid, block, (the kernel's arguments"),
        ("def arguments():\n    return 1, 32, 5\n", "must return grid, block"),
        (DRIVER.replace('{"C": a @ b}', "a @ b"), 'by the names of parameters, {"C": …}; it returned Tensor'),
        (DRIVER.replace('"C":', '"D":'), "expected() names 'D'; the kernel's tensors are A, B, C"),
        (DRIVER.replace("a @ b", "a"), "expected() gives C the shape (19, 11), arguments() (19, 13)"),
        (DRIVER.replace("a @ b", "a @ a"), "driver.py:8 in expected: "),
        (DRIVER.replace("(m, n, k, a", "(m, n, a"), "product takes 6 arguments, got 5"),
    ],
)
def test_what_is_wrong_in_a_driver_is_said(mlsys, folder, text, words):
    (folder / "driver.py").write_text(text)
    status, out, err = mlsys("run", "my.cu", "--driver", "driver.py", "--kernel", "product<8>")
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_inputs_are_made_up_and_said(mlsys):
    status, out, _ = mlsys("check", "my.cu", "--kernel", "product<8>", "--grid", "(N+7)/8,(M+7)/8", "--block", "8,8")
    assert status == 0
    for line in (
        "M = 67",
        "K = 29",
        "A = random numbers, float32, 67 × 29 (M · K)",
        "C = zeros, float32, 67 × 45 (M · N)",
    ):
        assert f"  {line}\n" in out
    assert "product<8>: nothing was found" in out


def test_made_up_inputs_are_as_long_as_the_size_says_so_that_one_too_many_is_found(mlsys):
    status, out, _ = mlsys("check", "my.cu", "--kernel", "add_wrong", "--grid", "(n+31)/32", "--block", "32")
    assert status == 1
    assert "x = random numbers, float32, 67 (n)" in out
    assert "my.cu:25: out-of-bounds: thread (3,0,0) of block (2,0,0)" in out
    assert mlsys("check", "my.cu", "--kernel", "add", "--grid", "(n+31)/32", "--block", "32")[0] == 0


def test_findings_are_json_if_asked(mlsys):
    status, out, _ = mlsys("check", "my.cu", "--kernel", "add_wrong", "--grid", "3", "--block", "32", "--json")
    (finding,) = json.loads(out)
    assert status == 1
    assert (finding["kind"], finding["line"], finding["thread"], finding["block"]) == (
        "out-of-bounds",
        25,
        [3, 0, 0],
        [2, 0, 0],
    )
    status, out, _ = mlsys("check", "my.cu", "--kernel", "add", "--grid", "3", "--block", "32", "--json")
    assert (status, json.loads(out)) == (0, [])


def test_sizes_are_given_for_numbers_and_tensors(mlsys):
    sizes = "ROWS=3,cols=4,alpha=2.5,in=3x4"
    status, out, _ = mlsys(
        "run", "my.cu", "--kernel", "mixed", "--grid", "1", "--block", "rows*cols+4", "--size", sizes
    )
    assert status == 0
    assert "alpha = " not in out  # what was asked for need not be said
    assert "on = True" in out
    assert "in = random numbers, float32, 3 × 4\n" in out
    assert "counts = random integers below 3, int32, 12 (rows · cols; --size counts=… if it is shorter)" in out
    assert "out = zeros, float32, 12 × 4" in out  # none is const: the last one is taken for what is written
    assert "out [12 × 4]: 24 of 48 elements changed; from " in out
    assert "12 not finite" in out


def test_a_profile_is_shown_and_is_json_if_asked(mlsys):
    arguments = ("profile", "my.cu", "--kernel", "add", "--grid", "2", "--block", "32", "--size", "n=64")
    status, out, _ = mlsys(*arguments)
    assert status == 0
    assert "z[i] = x[i] + y[i];" in out
    assert "add: 64 FLOPs, 768 bytes in 24 sectors" in out
    counted = json.loads(mlsys(*arguments, "--json")[1])
    assert (counted["flops"], counted["bytes"], counted["conflicts"]) == (64, 768, 0)
    assert {access["line"] for access in counted["accesses"]} == {20}


def test_a_kernel_that_is_stopped_is_a_finding(mlsys):
    for kind in ("run", "check"):
        status, out, _ = mlsys(
            kind, "my.cu", "--kernel", "stuck", "--grid", "1", "--block", "1", "--limit", "0.2", "--json"
        )
        assert status == 1
        assert [finding["kind"] for finding in json.loads(out)] == ["endless-loop"]


def test_dynamic_shared_memory_is_a_formula_too(mlsys):
    arguments = ("check", "my.cu", "--kernel", "reversed", "--grid", "1", "--block", "n", "--size", "n=40")
    assert mlsys(*arguments, "--shared", "n*4")[0] == 0
    status, out, _ = mlsys(*arguments)
    assert status == 1
    assert "of which the launch asked for 0" in out


def test_a_kernel_of_the_library_by_name(mlsys):
    status, out, _ = mlsys(
        "check", "matmul.naive", "--grid", "(m+31)/32,(n+7)/8", "--block", "32,8", "--size", "m=33,n=9,k=5"
    )
    assert status == 0
    assert "matmul_naive: nothing was found" in out


def test_a_report_is_for_gpus_that_are_not_here(mlsys):
    status, out, _ = mlsys("report", "my.cu", "--kernel", "add", "--arch", "sm_80,sm_90a", "--block", "128")
    assert status == 0
    assert "my.cu for sm_80" in out
    assert "my.cu for sm_90a" in out
    rows = json.loads(mlsys("report", "my.cu", "--kernel", "add", "--arch", "sm_80", "--json")[1])
    assert [(row["kernel"], row["arch"]) for row in rows] == [("add", "sm_80")]


LAUNCH = ("--grid", "1", "--block", "32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("my.cu", *LAUNCH), "my.cu has several kernels, choose one with --kernel: product, add, add_wrong"),
        (("my.cu", "--kernel", "sub", *LAUNCH), "my.cu has no kernel 'sub'"),
        (("my.cu", "--kernel", "product", *LAUNCH), "is a template: ask for an instance, such as product<32>"),
        (("my.cu", "--kernel", "add"), "--grid and --block, or a --driver"),
        (("none.cu", *LAUNCH), "there is none at 'none.cu'"),
        (("matmul.nave", *LAUNCH), "did you mean matmul.naive?"),
        (("my.cu", "--kernel", "add", "--driver", "none.py"), "--driver none.py: there is no such file"),
        (("my.cu", "--kernel", "with_pair", *LAUNCH), "p is a structure: a --driver has to make it"),
        (("my.cu", "--kernel", "add", *LAUNCH, "--size", "m=3"), "--size m=3: the kernel's parameters are x, y, z, n"),
        (("my.cu", "--kernel", "add", *LAUNCH, "--size", "n"), "--size n: expected NAME=NUMBER"),
        (("my.cu", "--kernel", "add", *LAUNCH, "--size", "n=2.5"), "n is a whole number"),
        (("my.cu", "--kernel", "add", *LAUNCH, "--size", "x=axb"), "give its shape, x=64x32"),
        (("my.cu", "--kernel", "mixed", *LAUNCH, "--size", "rows=9999,cols=9999"), "would have 99,980,001 elements"),
        (("my.cu", "--kernel", "add", "--grid", "m", "--block", "32"), "--grid m: there is no size m; there are n"),
        (("my.cu", "--kernel", "add", "--grid", "n/0", "--block", "32"), "it divides by zero"),
        (("my.cu", "--kernel", "add", "--grid", "n(", "--block", "32"), "--grid n(: expected whole numbers"),
        (("my.cu", "--kernel", "add", "--grid", "f(n)", "--block", "32"), "whole numbers, sizes and + - * / %"),
        (("my.cu", "--kernel", "add", "--grid", "0", "--block", "32"), "grid must be one to three positive ints"),
    ],
)
def test_what_cannot_be_done_is_one_line(mlsys, arguments, words):
    status, _, err = mlsys("check", *arguments)
    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_what_the_compiler_says_is_shown_as_it_says_it(mlsys, folder):
    (folder / "typo.cu").write_text("__global__ void k(int *x) {\n  x[0] = y;\n}\n")
    status, _, err = mlsys("check", "typo.cu", "--grid", "1", "--block", "1")
    assert status == 2
    assert "typo.cu:2:" in err
    assert len(err.splitlines()) > 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", (8,)), ("8,9,10", (8, 9, 10)), ("(n+31)/32,m", (3, 5)), ("n%32*2 - 1", (5,)), ("n//m/2", (6,))],
)
def test_formulas_divide_as_in_c(text, expected):
    assert _cuda_inputs.sizes("--grid", text, {"n": 67, "m": 5}) == expected


@pytest.mark.parametrize("text", ["", "1.5", "True", "n**2", "-n", "'a'", "__import__('os')", "[1]", "n if n else 1"])
def test_a_formula_is_no_program(text):
    with pytest.raises(UsageError, match="--grid"):
        _cuda_inputs.sizes("--grid", text, {"n": 67})


def test_results_are_compared_to_the_precision_of_their_type():
    x = torch.linspace(1, 2, 10)
    assert _cuda_inputs.compare(x, x + 1e-6)[0]
    assert not _cuda_inputs.compare(x, x + 1e-4)[0]
    assert _cuda_inputs.compare(x.bfloat16(), x)[0]
    nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert _cuda_inputs.compare(nan, nan)[0]
    right, text = _cuda_inputs.compare(nan, torch.tensor([1.0, 2.0, torch.inf]))
    assert not right
    assert text == "wrong in 1 of 3 elements, first at [1]: nan, expected 2"
    assert _cuda_inputs.compare(torch.tensor([1, 2]), torch.tensor([1, 3])) == (
        False,
        "wrong in 1 of 2 elements, first at [1]: 2, expected 3",
    )
