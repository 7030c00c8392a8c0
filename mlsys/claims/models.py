"""Published numbers about models, from the real module: on the meta device, so that nothing is allocated."""

from __future__ import annotations

from mlsys.claims.core import Claim
from mlsys.claims.perf import NANO, NANOGPT


def numel() -> int:
    """The numbers that the real module of GPT-2 124M without biases holds."""
    from mlsys.models.transformer import Transformer

    return sum(p.numel() for p in Transformer(NANO, device="meta").parameters())


def counted_flops() -> int:
    """What torch counts while the real module runs forward over 1,024 tokens, with naive attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mlsys.attention import naive
    from mlsys.models.transformer import Transformer

    model = Transformer(NANO, attention=naive.attention, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1024, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


CLAIMS = [
    Claim(
        name="nanogpt-module",
        area="models.transformer",
        source=NANOGPT,
        what="parameters of GPT-2 124M without biases: numel() of the module",
        unit="",
        published=124_337_664,
        digits=0,
        compute=numel,
    ),
    Claim(
        name="nanogpt-module-flops",
        area="models.transformer",
        source=NANOGPT,
        what="FLOPs of its forward pass over 1,024 tokens: as torch counts them while it runs",
        unit="",
        published=291_648_307_200,
        digits=0,
        compute=counted_flops,
    ),
]
