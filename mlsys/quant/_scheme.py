"""How a matrix is quantized, in one line of text: "int4:g128", "int8", "nf4:g64:dq", "mxfp4", "fp8_e4m3:tensor".

    FORMAT[:tensor|:channel|:gN][:sym|:affine][:fp16|:bf16][:dq]

- FORMAT: int2 … int8; nf4; dynamic8; e2m1, e3m2, e2m3; fp8_e4m3, fp8_e5m2; mxfp4, mxfp6_e3m2, mxfp6_e2m3, mxfp8_e4m3,
  mxfp8_e5m2, nvfp4; bf16, fp16.
- Who shares a scale: all (`tensor`), a row (`channel`, the default but for those below), or N neighbours of a row
  (`gN`; tables 64, mx… 32, nvfp4 16). The last group of a row may be shorter.
- `affine` (integers only): a zero point beside the scale, so that the codes span min … max. The default below 8 bits,
  where a level matters; int8 is `sym`.
- `fp16`, `bf16`: how scales are kept; otherwise float32.
- `dq`: the scales are quantized themselves, to 8 bits in groups of 256 ("double quantization").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlsys.quant.formats import CODEBOOKS, FLOATS, Format, Integer

# name → element format, group, format of the scales
BLOCKS = {
    "mxfp4": ("e2m1", 32, "e8m0"),
    "mxfp6_e3m2": ("e3m2", 32, "e8m0"),
    "mxfp6_e2m3": ("e2m3", 32, "e8m0"),
    "mxfp8_e4m3": ("e4m3", 32, "e8m0"),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}
SCALED = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2", "e2m1": "e2m1", "e3m2": "e3m2", "e2m3": "e2m3"}
UNSCALED = ("bf16", "fp16")
INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
FORMATS = (*INTEGERS, *CODEBOOKS, *SCALED, *BLOCKS, *UNSCALED)

Group = int | str  # N, "tensor" or "channel"


@dataclass(frozen=True)
class Scheme:
    """A format, who shares a scale, and how scales are kept. `Scheme.parse` reads it from text, `str` writes it.

    group:   "tensor", "channel" (a row), or how many neighbours of a row.
    affine:  whether there is a zero point.
    scales:  "fp32", "fp16", "bf16", "e8m0", "e4m3" (with one float32 for all of them), "dq" or "none".
    """

    format: str
    group: Group = "channel"
    affine: bool = False
    scales: str = "fp32"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} is unknown; there are {', '.join(FORMATS)}")
        group = self.group
        whole = isinstance(group, int) and not isinstance(group, bool)
        if not (group in ("tensor", "channel") or (whole and int(group) >= 1)):
            raise ValueError(f"group={group!r} must be 'tensor', 'channel' or a number of neighbours ≥ 1 (text: g128)")
        if not isinstance(self.affine, bool):
            raise TypeError(f"affine must be True or False, got {self.affine!r}")
        if self.affine and self.format not in INTEGERS:
            raise ValueError(f"affine=True: {self.format} has no zero point, only integers do; leave it out")
        if self.format in BLOCKS:
            _, size, scales = BLOCKS[self.format]
            if (group, self.scales) != (size, scales):
                raise ValueError(
                    f"{self.format} has groups of {size} and scales in {scales} by its definition; add nothing"
                )
        elif self.format in UNSCALED:
            if (group, self.scales) != ("tensor", "none"):
                raise ValueError(f"{self.format} has no scales by its definition; add nothing")
        elif self.scales not in ("fp32", "fp16", "bf16", "dq"):
            raise ValueError(f"scales={self.scales!r} must be fp32, fp16, bf16 or dq")

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """From text such as "int4:g128". ValueError that says which part is wrong and what it could be."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f'scheme must be text such as "int4:g128", or a Scheme, got {type(text).__name__}')
        name, *options = text.strip().lower().split(":")
        if name not in FORMATS:
            raise ValueError(f"scheme={text!r}: no format {name!r}; there are {', '.join(FORMATS)}")
        group: Group = "channel"
        affine, scales = name in INTEGERS and name != "int8", "fp32"
        if name in BLOCKS:
            _, group, scales = BLOCKS[name]
        elif name in UNSCALED:
            group, scales = "tensor", "none"
        elif name in CODEBOOKS:
            group = 64
        seen: dict[str, str] = {}
        for option in options:
            kind = _kind(option)
            if kind is None:
                raise ValueError(
                    f"scheme={text!r}: {option!r} is none of tensor, channel, g<number> (such as g128), sym, affine, "
                    "fp16, bf16, dq"
                )
            if kind in seen:
                raise ValueError(f"scheme={text!r}: {seen[kind]!r} and {option!r} exclude each other; keep one")
            seen[kind] = option
            if kind == "group":
                group = int(option[1:]) if option[0] == "g" else option
            elif kind == "range":
                affine = option == "affine"
            else:
                scales = option
        return cls(name, group, affine, scales)

    def __str__(self) -> str:
        if self.format in BLOCKS or self.format in UNSCALED:
            return self.format
        group = f"g{self.group}" if isinstance(self.group, int) else self.group
        parts = [self.format, group]
        if self.format in INTEGERS:
            parts.append("affine" if self.affine else "sym")
        return ":".join(parts if self.scales == "fp32" else [*parts, self.scales])

    @property
    def element(self) -> Format:
        """The format of a single code."""
        if self.format in INTEGERS:
            return Integer(int(self.format[3:]), signed=not self.affine)
        if self.format in CODEBOOKS:
            return CODEBOOKS[self.format]
        name = BLOCKS[self.format][0] if self.format in BLOCKS else SCALED.get(self.format, self.format)
        return FLOATS[name]

    @property
    def bits(self) -> int:
        """Of a code, scales not counted."""
        return self.element.bits

    def group_size(self, columns: int) -> int:
        """How many columns share a scale in rows of `columns` numbers; for "tensor", too, all of them."""
        return min(self.group, max(columns, 1)) if isinstance(self.group, int) else max(columns, 1)

    def groups(self, columns: int) -> int:
        """How many scales a row of `columns` numbers has."""
        return -(-columns // self.group_size(columns))


def _kind(option: str) -> str | None:
    if option in ("tensor", "channel") or re.fullmatch(r"g[1-9]\d*", option):
        return "group"
    if option in ("sym", "affine"):
        return "range"
    return "scales" if option in ("fp16", "bf16", "dq") else None
