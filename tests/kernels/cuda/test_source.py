"""What is read in a kernel file: its kernels, however they are written; what is hidden; what is rewritten in place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.kernels.cuda import _source


def only(text):
    (declared,) = _source.kernels(text).values()
    return declared


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__global__ void k() {}", "k()"),
        ("__global__ void k(void) {}", "k()"),
        ("__global__ void k(int n, float *x) {}", "k(int n, float * x)"),
        (
            "__global__ void k(const float* __restrict__ x, float const *const y) {}",
            "k(const float * x, float const *const y)",
        ),
        ("__global__ void __launch_bounds__(256, 2) k(int n) {}", "k(int n)"),
        ("__launch_bounds__(32 * (2 + 2)) __global__ void k(int n) {}", "k(int n)"),
        ('extern "C" __global__ void k(int n) {}', "k(int n)"),
        ('static __global__\nvoid\nk\n(\n  int n  // how many, not "("\n)\n{}', "k(int n)"),
        ("__global__ void k(float x[], const float y[16]) {}", "k(float * x, const float * y)"),
        ("__global__ void k(unsigned long long n, long m) {}", "k(unsigned long long n, long m)"),
        ("__global__ void k(const __grid_constant__ CUtensorMap map) {}", "k(const CUtensorMap map)"),
        ("template <int T, typename U = float> __global__ void k(U *x) {}", "k<int T, typename U = float>(U * x)"),
        ("template <class T>\nstatic __global__ void k(T a) {}", "k<class T>(T a)"),
        ("template <class T> struct S {}; __global__ void k(S<float, 3> s) {}", "k(S<float, 3> s)"),
        ("__global__ void k(int); __global__ void k(int n) {}", "k(int n)"),
        ("// __global__ void a() {}\n/* __global__ void b() {} */\n__global__ void k() {}", "k()"),
        ("#define MAKE(name) \\\n  __global__ void name(float *x) {}\n__global__ void k() {}", "k()"),
    ],
)
def test_a_kernel_is_read_as_it_is_declared(text, expected):
    assert str(only(text)) == expected


def test_lines_are_those_of_the_name():
    text = "\n/* two\nlines */\ntemplate <int T>\n__global__ void\nfirst(int n) {}\n\n__global__ void second() {}\n"
    assert {name: d.line for name, d in _source.kernels(text).items()} == {"first": 6, "second": 8}


@pytest.mark.parametrize(
    ("text", "asked", "expected"),
    [
        ("__global__ void k() {}", "k", "k"),
        ("template <int T = 4> __global__ void k() {}", "k", "k<>"),
        ("template <int T> __global__ void k() {}", "k<32>", "k<32>"),
        ("namespace a { namespace { namespace b::c { __global__ void k() {} } } }", "k", "a::b::c::k"),
        ("namespace a { struct S { int x; }; }\n__global__ void k() {}", "k", "k"),
        ("namespace a { template <class T> __global__ void k() {} }", "k<b::S>", "a::k<b::S>"),
        ("namespace a { __global__ void k() {} }", "a::k", "a::k"),
    ],
)
def test_a_kernel_is_named_from_outside_its_namespace(text, asked, expected):
    assert only(text).spelled(asked) == expected


def test_host_code_is_hidden_by_ifndef():
    nested = "#if X\n#else\nmore\n#endif\n"
    text = f"a\n#ifndef MLSYS\nhost <<<1, 2>>>\n{nested}still\n#endif\nb\n#ifndef MLSYS\nhost\n#else\nc\n#endif\nd\n"
    shown = _source.for_device_only(text)
    assert [line for line in shown.splitlines() if line and not line.startswith("#")] == ["a", "b", "c", "d"]
    assert shown.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extern __shared__ float s[];", "float *const s = (float *)mlsys_dynamic_shared;"),
        ("extern __shared__ __align__(16) char s[];", "char *const s = (char *)mlsys_dynamic_shared;"),
        ("extern  __shared__\nT s[ ];", "T *const s = (T *)mlsys_dynamic_shared;\n"),
        ("__shared__ float s[3] = {};", "__shared__ float s[3] = {};"),
        ("// extern __shared__ float s[];", "// extern __shared__ float s[];"),
    ],
)
def test_dynamic_shared_memory_becomes_a_pointer(text, expected):
    assert _source.for_processor(text) == expected


pieces = st.sampled_from(
    [
        "/*",
        "*/",
        "//",
        '"',
        "'",
        "\\",
        "\n",
        "#define A \\\n",
        "__global__ void k",
        "(int n)",
        "{",
        "}",
        "<",
        ">",
        ";",
        "namespace a",
        "template <int T>",
        " x ",
    ]
)


@settings(deadline=None)
@given(st.lists(pieces, max_size=20).map("".join))
def test_any_text_is_read_without_losing_its_place(text):
    blanked = _source.without_comments(text)
    assert len(blanked) == len(text)
    assert [i for i, c in enumerate(blanked) if c == "\n"] == [i for i, c in enumerate(text) if c == "\n"]
    for declared in _source.kernels(text).values():
        assert text.splitlines()[declared.line - 1].count(declared.name)
    assert _source.for_processor(text).count("\n") == text.count("\n")
