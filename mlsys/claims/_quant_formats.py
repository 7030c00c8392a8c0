"""Published numbers about number formats, what they take, and what packing saves."""

from __future__ import annotations

from mlsys.claims.core import Claim

FP8 = "Micikevicius et al. 2022, arXiv:2209.05433"
QLORA = "Dettmers et al. 2023, arXiv:2305.14314"
GPTQ = "Frantar et al. 2022, arXiv:2210.17323"
MX = "OCP Microscaling Formats (MX) Specification v1.0, 2023"
LAYERS, WIDTH, INNER, VOCABULARY, POSITIONS = 96, 12288, 49152, 50272, 2050  # of OPT-175B


def values(name: str) -> list[float]:
    """The finite numbers above 0 that have a code, ascending."""
    import torch

    from mlsys.quant.formats import named

    form = named(name)
    found = form.decode(torch.arange(1 << form.bits).to(torch.uint8))
    return sorted({value for value in found.tolist() if 0 < value < float("inf")})


def with_infinities() -> float:
    """The largest number that e4m3 would have if its last exponent meant infinity and NaN."""
    from mlsys.quant.formats import Minifloat

    return Minifloat("e4m3 as in IEEE 754", 4, 3, "ieee").largest


def scale_bits(scheme: str) -> float:
    """Bits a weight for scales alone, of a matrix that is a multiple of all groups."""
    import torch

    from mlsys.quant import quantize

    rows, columns = 256, 4096
    q = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), scheme)
    assert q.scale is not None
    return 8 * q.scale.nbytes / (rows * columns)


def bits(scheme: str) -> float:
    """Bits a weight, scales counted."""
    import torch

    from mlsys.quant import quantize

    return quantize(torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)), scheme).bits_per_weight


def formula_of_nf4() -> float:
    """The largest difference of the published table and the quantiles that it is made of."""
    from mlsys.quant.formats import NF4, normal_float

    return max(abs(a - b) for a, b in zip(NF4, normal_float(), strict=True))


def opt_175b() -> float:
    """GiB of OPT-175B with 3-bit matrices, a 16-bit scale and zero point a row, and embeddings in 16 bits."""
    from mlsys.quant.packing import packed_bytes

    matrices = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]
    layer = sum(rows * (packed_bytes(columns, 3) + 4) for rows, columns in matrices)
    return (LAYERS * layer + 2 * WIDTH * (VOCABULARY + POSITIONS)) / 2**30


def _format(name: str, what: str, published: float, digits: int, value: str, index: int) -> Claim:
    return Claim(
        name=name,
        area="quant.formats",
        source=f"{FP8}, Table 1",
        what=what,
        unit="",
        published=published,
        digits=digits,
        compute=lambda: values(value)[index],
    )


CLAIMS = [
    _format("e4m3-largest", "largest number of e4m3", 448, 0, "e4m3", -1),
    _format("e5m2-largest", "largest number of e5m2", 57344, 0, "e5m2", -1),
    _format("e4m3-smallest", "smallest subnormal of e4m3, 2^−9", 2.0**-9, 9, "e4m3", 0),
    _format("e5m2-smallest", "smallest subnormal of e5m2, 2^−16", 2.0**-16, 12, "e5m2", 0),
    Claim(
        name="e4m3-with-infinities",
        area="quant.formats",
        source=f"{FP8}, section 3.1 (without infinities the largest is 448 rather than 240)",
        what="largest number of e4m3 if its last exponent were kept for infinity and NaN",
        unit="",
        published=240,
        digits=0,
        compute=with_infinities,
    ),
    Claim(
        name="nf4-formula",
        area="quant.formats",
        source=f"{QLORA}, section 3 and appendix E (the values; quantiles of the normal distribution)",
        what="largest difference of the 16 published values and quantiles that we compute",
        unit="",
        published=0.0,
        digits=5,
        compute=formula_of_nf4,
        formula=True,
    ),
    Claim(
        name="opt-175b-3-bit",
        area="quant.packing",
        source=f"{GPTQ}, section 5, practical speedups (about 63 GB, embeddings and output layer in FP16)",
        what="memory of OPT-175B with its matrices packed in 3 bits, in units of 2³⁰ bytes",
        unit="GB",
        published=63,
        digits=0,
        compute=opt_175b,
        tolerance=0.02,
        expected="approximate",
        reason="the paper says approximately; biases and norms are not counted here",
    ),
    Claim(
        name="nf4-scales",
        area="quant.rtn",
        source=f"{QLORA}, section 3 (32 / 64 bits a parameter for the constants)",
        what="bits a weight that the scales of nf4 take, groups of 64",
        unit="bits",
        published=0.5,
        digits=1,
        compute=lambda: scale_bits("nf4"),
    ),
    Claim(
        name="double-quantization",
        area="quant.rtn",
        source=f"{QLORA}, section 3 (8 / 64 + 32 / (64 · 256))",
        what="the same with double quantization",
        unit="bits",
        published=0.127,
        digits=3,
        compute=lambda: scale_bits("nf4:dq"),
    ),
    Claim(
        name="double-quantization-saves",
        area="quant.rtn",
        source=f"{QLORA}, section 3",
        what="bits a weight that double quantization saves",
        unit="bits",
        published=0.373,
        digits=3,
        compute=lambda: scale_bits("nf4") - scale_bits("nf4:dq"),
    ),
    *[
        Claim(
            name=f"{scheme.replace('_', '-')}-bits",
            area="quant.rtn",
            source=f"{MX}, section 5 (32 codes and a scale of 8 bits: 8 + 32·{each} bits a block)",
            what=f"bits a weight of {scheme}",
            unit="bits",
            published=(8 + 32 * each) / 32,
            digits=2,
            compute=lambda scheme=scheme: bits(scheme),  # type: ignore[misc]
            formula=True,
        )
        for scheme, each in (("mxfp4", 4), ("mxfp6_e2m3", 6), ("mxfp8_e4m3", 8))
    ],
]
