"""Published numbers, reproduced: `mlsys claims` prints them, the tests insist on them."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys.claims.core import Claim, Reproduced, reproduce

__all__ = ["Claim", "Reproduced", "all_claims", "as_markdown", "reproduce", "rows"]


def all_claims() -> list[Claim]:
    """Every claim, in the order of the packages."""
    from mlsys.claims import attention, kernels, models, parallel, perf, quant, retrieval

    return [
        *perf.CLAIMS,
        *parallel.CLAIMS,
        *kernels.CLAIMS,
        *attention.CLAIMS,
        *models.CLAIMS,
        *quant.CLAIMS,
        *retrieval.CLAIMS,
    ]


def rows(done: Sequence[Reproduced]) -> list[dict[str, str]]:
    """One row a claim, for a table."""
    return [
        {
            "claim": r.claim.name,
            "technique": r.claim.area,
            "what": r.claim.what,
            "published": f"{number(r.claim.published, r.claim.digits)} {r.claim.unit}".strip()
            + (" (formula)" if r.claim.formula else ""),
            "ours": f"{number(r.ours, r.claim.digits + 1)} {r.claim.unit}".strip(),
            "status": r.status,
            "source": r.claim.source,
            "why they differ": r.claim.reason,
        }
        for r in done
    ]


def number(value: float, digits: int) -> str:
    """With so many digits after the point, and without a point where there is nothing after it."""
    return f"{value:,.{max(0, digits)}f}" if not float(value).is_integer() or 0 < digits < 3 else f"{value:,.0f}"


def as_markdown(claims: Sequence[Claim] | None = None) -> str:
    """The claims, computed now, as a Markdown table."""
    from tabulate import tabulate

    table = rows([reproduce(c) for c in (all_claims() if claims is None else claims)])
    return str(tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True))
