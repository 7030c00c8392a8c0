"""The profile counts what a GPU would move, by line: sectors, passes over the banks and FLOPs are the closed form's."""

from pathlib import Path

import pytest
import torch

from mlsys.kernels.cuda import KernelError, load, profile, source

FILES = Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def traffic():
    return load(FILES / "traffic.cu")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def zeros(*shape):
    return torch.zeros(*shape)


CASES = {
    "scale": ((2, 8), (32, 8), lambda: [random(64, 64), zeros(64, 64), 64, 64]),
    "transpose": ((2, 2), (32, 8), lambda: [random(64, 64), zeros(64, 64), 64]),
    "block_sum": (2, 256, lambda: [random(512), zeros(2)]),
    "norms": (2, 64, lambda: [random(128, 4), zeros(128), 128]),
}


def marked(file, name):
    """The kind and the line of the mistake that is planted in a kernel."""
    start = file.declared[name].line
    rows = file.text.splitlines()
    line = next(n for n in range(start, len(rows) + 1) if "// MISTAKE" in rows[n - 1])
    return rows[line - 1].split("// MISTAKE ")[1], line


def measured(file, name):
    grid, block, arguments = CASES[name.removesuffix("_wrong")]
    return profile(file[name], grid, block, *arguments())


@pytest.mark.parametrize("name", CASES)
def test_wasted_traffic_is_seen_in_its_line_and_nowhere_else(traffic, name):
    kind, line = marked(traffic, f"{name}_wrong")
    space = {"uncoalesced": "global", "bank-conflict": "shared"}[kind]
    wrong, right = measured(traffic, f"{name}_wrong"), measured(traffic, name)
    at_line = [a for a in wrong.accesses if a.line == line and a.space == space]
    assert min(a.efficiency for a in at_line) < 0.5
    others = [a for a in wrong.accesses if a not in at_line] + list(right.accesses)
    assert all(a.efficiency == 1 for a in others)
    assert right.conflicts == 0
    assert right.bytes == right.ideal_bytes


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_of_traffic_computes_the_same(traffic, name):
    grid, block, arguments = CASES[name]
    right, wrong = arguments(), arguments()
    traffic[name](grid, block, *right)
    traffic[f"{name}_wrong"](grid, block, *wrong)
    torch.testing.assert_close(right[1], wrong[1])


def test_sectors_of_a_warp_are_the_closed_form(traffic):
    # 64 × 64 floats are 128 warps' reads: 4 sectors each where lanes are neighbours, 32 where they are rows apart
    right, wrong = measured(traffic, "scale"), measured(traffic, "scale_wrong")
    assert right.requests == wrong.requests == 2 * 128
    assert right.sectors == 2 * 128 * 4
    assert wrong.sectors == 2 * 128 * 32
    assert right.ideal_bytes == wrong.ideal_bytes == right.bytes
    assert right.least_bytes == wrong.least_bytes == 2 * 64 * 64 * 4
    assert right.tensors == wrong.tensors == {"x": (16384, 0), "y": (0, 16384)}


def test_bank_conflicts_are_the_closed_form(traffic):
    # 4 tiles · 8 warps · 4 rounds: each column's read takes 32 passes instead of 1
    right, wrong = measured(traffic, "transpose"), measured(traffic, "transpose_wrong")
    assert right.shared_passes == 2 * 128
    assert wrong.shared_passes == 128 + 128 * 32
    assert wrong.conflicts == 128 * 31
    assert right.sectors == wrong.sectors


def test_a_float4_is_one_request_of_full_sectors(traffic):
    right, wrong = measured(traffic, "norms"), measured(traffic, "norms_wrong")
    reads = [a for a in right.accesses if a.space == "global" and a.kind == "read"]
    assert [(a.bytes, a.requests, a.lanes, a.transactions) for a in reads] == [(16, 4, 128, 64)]
    assert wrong.sectors - right.sectors == (4 * 4 - 4) * 16  # the same 16 sectors a warp, four times as often


@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 32), (33, 17, 40)])
def test_flops_of_a_product_are_two_a_step(m, n, k):
    a, b, c = random(m, k), random(k, n), zeros(m, n)
    kernel = load(source("matmul.naive"))["matmul_naive"]
    block = (32, 8)
    counted = profile(kernel, ((m + 31) // 32, (n + 7) // 8), block, m, n, k, a, b, c)
    assert counted.flops == 2 * m * n * k
    assert counted.intensity == counted.flops / counted.bytes


def test_the_source_is_shown_with_the_counts(traffic):
    _, line = marked(traffic, "transpose_wrong")
    text = str(measured(traffic, "transpose_wrong"))
    row = next(row for row in text.splitlines() if f"| {line:>4} " in row or f"|  {line} " in row)
    assert "out[(row + k) * n + col] = tile[threadIdx.x][threadIdx.y + k];" in row
    assert "32.0" in text
    assert "3,968 of them for bank conflicts" in text
    assert "in: 16,384 bytes read, 0 written" in text


def test_a_kernel_that_is_not_finished_has_no_profile(tmp_path):
    path = tmp_path / "wrong.cu"
    path.write_text("__global__ void k(float *x) {\n  x[threadIdx.x] = 1;\n}\n")
    with pytest.raises(KernelError, match="out-of-bounds"):
        profile(load(path)["k"], 1, 32, zeros(31))


PAGE = Path(__file__).parents[3] / "docs" / "kernels" / "cuda.md"


def test_the_page_shows_what_is_printed(traffic):
    text = PAGE.read_text(encoding="utf-8")
    page = text.split("<!-- profile traffic.transpose_wrong -->\n```text\n")[1].split("\n```")[0]
    assert page == str(measured(traffic, "transpose_wrong")).replace("  // MISTAKE bank-conflict", "")
