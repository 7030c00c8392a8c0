"""Published statements about running quantized: what decides the time of a product with one vector is its bytes."""

from __future__ import annotations

from mlsys.claims.core import Claim

FRANTAR = "Frantar et al. 2022, arXiv:2210.17323"
WIDTH = 12288  # of OPT-175B


def bytes_ratio(scheme: str, columns: int = WIDTH, rows: int = 16) -> float:
    """Bytes of a matrix in fp16 over those that one product with the quantized one reads: a bound on its speed-up."""
    import torch

    from mlsys.quant import prepare, quantize

    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return 2 * w.numel() / prepare(quantize(w, scheme)).weight.nbytes


CLAIMS = [
    Claim(
        name="gptq-kernel-speedup",
        area="quant.qlinear",
        source=f"{FRANTAR}, abstract (about 3.25 times on an A100 over fp16, generating with 3-bit weights)",
        what="bytes of OPT-175B's rows in fp16 over those in 3 bits with a scale a row: the bound on the speed-up",
        unit="×",
        published=3.25,
        digits=2,
        compute=lambda: bytes_ratio("int3:channel:affine:fp16"),
        expected="disagrees",
        reason=(
            "ours is the bound by the bytes of the weights, 16 / 3 bits; the paper's is what was measured with all "
            "else that a model does for a token, which is as long with 3 bits as with 16"
        ),
    ),
    Claim(
        name="gptq-kernel-speedup-a6000",
        area="quant.qlinear",
        source=f"{FRANTAR}, abstract (about 4.5 times on A6000s over fp16, 3-bit weights)",
        what="the same bound; the paper reaches 84% of it on the cheaper GPU",
        unit="×",
        published=4.5,
        digits=1,
        compute=lambda: bytes_ratio("int3:channel:affine:fp16"),
        tolerance=0.2,
        expected="approximate",
        reason="ours is the bound, which a measured speed-up can only come near to",
    ),
]
