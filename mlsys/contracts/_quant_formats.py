"""The contract of `quant.formats`: the nearest number that has a code, and what each code means.

The implementation is a function `make(name)`; it gives an object with `encode(x)` (float32 tensor → integer codes) and
`decode(codes)` (→ numbers). The names and the numbers that are looked at stand in `CASES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, as_array

SIGNATURE = "make(name) -> object with encode(x) -> codes, decode(codes) -> numbers"
FLOATS = {  # exponent bits, mantissa bits, what the codes of the largest exponent are
    "bf16": (8, 7, "ieee"), "fp16": (5, 10, "ieee"), "e5m2": (5, 2, "ieee"), "e4m3": (4, 3, "nan"),
    "e3m2": (3, 2, "numbers"), "e2m3": (2, 3, "numbers"), "e2m1": (2, 1, "numbers"),
}  # fmt: skip
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def bits(name: str) -> int:
    """Of one code."""
    if name in FLOATS:
        return 1 + sum(FLOATS[name][:2])
    fixed = re.fullmatch(r"q(\d+)\.(\d+)", name)
    if fixed:
        return int(fixed[1]) + int(fixed[2])
    return {"nf4": 4, "e8m0": 8, "dynamic8": 8}.get(name) or int(name[-1])


@cache
def table(name: str, bias: int = 0, numbers_only: bool = False) -> np.ndarray:
    """What each code means, in code order, float64; `bias` is added to the right one."""
    codes = np.arange(1 << bits(name))
    if name in FLOATS:
        e, m, special = FLOATS[name]
        right = (1 << (e - 1)) - 1 + bias
        power, fraction = (codes >> m) & ((1 << e) - 1), codes & ((1 << m) - 1)
        normal = np.ldexp(1 + fraction / (1 << m), power - right)
        values = np.where(power == 0, np.ldexp(fraction / (1 << m), 1 - right), normal)
        top = power == (1 << e) - 1
        if special == "ieee" and not numbers_only:
            values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
        if special == "nan" and not numbers_only:
            values[top & (fraction == (1 << m) - 1)] = np.nan
        return np.where(codes >> (e + m), -values, values)
    if name == "nf4":
        return np.array(NF4, np.float32).astype(np.float64)
    if name == "dynamic8":
        return dynamic()
    if name == "e8m0":
        return np.append(np.ldexp(1.0, codes[:-1] - 127), np.nan)
    if name.startswith("u"):
        return codes.astype(np.float64)
    whole = np.where(codes >> (bits(name) - 1), codes - len(codes), codes)
    return whole / 2.0 ** (int(name.partition(".")[2]) if name.startswith("q") else 0)


def dynamic() -> np.ndarray:
    """Dynamic 8-bit numbers: in the decade that ends at 10^(i − 6), the middles of 2^i equal pieces of 0.1 … 1."""
    values = [0.0, 1.0]
    for i in range(7):
        pieces = 0.1 + 0.9 * (np.arange(1 << i) + 0.5) / (1 << i)
        values += [sign * 10.0 ** (i - 6) * piece for sign in (-1, 1) for piece in pieces]
    return np.sort(np.array(values))


class Plain:
    """The nearest by search in the table of all codes. Each further option is one place to go wrong."""

    def __init__(
        self,
        name: str,
        *,
        pick: str = "even",
        flush: bool = False,
        infinite: bool = False,
        bias: int = 0,
        numbers_only: bool = False,
        twinless: bool = False,
        round_powers: bool = False,
        unsigned: bool = False,
    ) -> None:
        self.name, self.pick, self.round_powers = name, pick, round_powers
        self.values = table(name, bias if name in FLOATS else 0, numbers_only)
        if unsigned and name in ("int4", "int8"):
            self.values = np.arange(len(self.values), dtype=np.float64)
        v = self.values
        usable = np.isfinite(v) & ~((v == 0) & np.signbit(v))
        if flush and name in FLOATS:
            usable &= (v == 0) | (np.abs(v) >= 2.0 ** (2 - (1 << (FLOATS[name][0] - 1)) - bias))
        if name.startswith("int") and not twinless:
            usable &= v != v.min()
        self.codes = np.flatnonzero(usable)
        self.codes = self.codes[np.argsort(v[self.codes])]
        self.infinite = infinite and name in FLOATS and FLOATS[name][2] != "numbers"

    def encode(self, x: Any) -> np.ndarray:
        """Codes as int64."""
        x = as_array(x)
        v = self.values[self.codes]
        low = np.clip(np.searchsorted(v, x, side="right") - 1, 0, len(v) - 1)
        high = np.minimum(low + 1, len(v) - 1)
        below, above = x - v[low], v[high] - x
        if self.name == "e8m0":
            up = (x >= 1.5 * v[low]) if self.round_powers else np.zeros(x.shape, bool)
        elif self.pick == "zero":
            up = (x < 0) & (below > 0)
        elif self.pick == "away":
            up = (above < below) | ((above == below) & (x > 0))
        elif self.pick == "below":
            up = np.zeros(x.shape, bool)
        else:
            up = (above < below) | ((above == below) & (self.codes[high] % 2 == 0))
        code = self.codes[np.where(up, high, low)]
        if self.infinite:
            special = np.flatnonzero(np.isinf(self.values) if np.isinf(self.values).any() else np.isnan(self.values))
            beyond = np.abs(x) > v[-1] + (v[-1] - v[-2]) / 2
            code = np.where(beyond, np.where(x > 0, special[0], special[-1]), code)
        return code.astype(np.int64)

    def decode(self, codes: Any) -> np.ndarray:
        """By the table."""
        return self.values[as_array(codes).astype(np.int64)]


NAMES = (
    "e4m3",
    "e2m1",
    "e5m2",
    "bf16",
    "fp16",
    "e3m2",
    "e2m3",
    "nf4",
    "e8m0",
    "int4",
    "int8",
    "uint3",
    "q4.4",
    "q2.10",
)
CASES: list[Case] = [{"format": name, "numbers": kind} for name in NAMES for kind in ("ordinary", "edges")]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Ordinary numbers; or every number that has a code, what lies between, and what lies beyond."""
    import torch

    rng, name = np.random.default_rng(seed), case["format"]
    values = np.unique(table(name)[np.isfinite(table(name))])
    if case["numbers"] == "ordinary":
        x = rng.choice(values, 200) * rng.uniform(0.7, 1.0, 200)
    else:
        some = values if len(values) < 300 else np.unique(rng.choice(values, 300))
        some = some[(some > values[0]) & (some < values[-1])]
        next_ones = values[np.searchsorted(values, some) + 1]
        middle = (some + next_ones) / 2 if name not in ("nf4", "e8m0") else (some + 2 * next_ones) / 3
        small = np.unique(np.abs(values))[1] * rng.uniform(0, 4, 30)
        beyond = (1.003,) if name == "bf16" else (1.2, 3) if name == "e8m0" else (1.2, 3, 90)
        ends = np.concatenate([values[[0, -1]] * by for by in beyond])
        x = np.concatenate([some, middle, small, *([-small] if values[0] < 0 else []), ends])
    x = x[(np.abs(x) < 3.4e38) & (x >= (2.0**-126 if name == "e8m0" else -np.inf))].astype(np.float32)
    codes = np.flatnonzero(np.isfinite(table(name)))
    kind = torch.uint8 if bits(name) <= 8 else torch.int32
    return {
        "format": name,
        "x": torch.from_numpy(x).to(device),
        "codes": torch.from_numpy(codes).to(device=device, dtype=kind),
    }


def call(make: Callable[[str], Any], given: Inputs) -> Results:
    """What the codes it gives mean, and what it says that all codes mean."""
    form = make(given["format"])
    codes = as_array(form.encode(given["x"]))
    meaning = table(given["format"])
    if codes.shape != tuple(given["x"].shape) or codes.dtype.kind not in "iu":
        raise Mismatch(f"encode gave {codes.dtype} {codes.shape}, expected integers {tuple(given['x'].shape)}")
    if codes.size and (codes.min() < 0 or codes.max() >= len(meaning)):
        raise Mismatch(f"encode gave code {codes.max() if codes.max() >= len(meaning) else codes.min()}, expected 0 … "
                       f"{len(meaning) - 1}")  # fmt: skip
    return {"rounded": meaning[codes.astype(np.int64)], "decoded": as_array(form.decode(given["codes"]))}


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """By search in the table."""
    meaning = table(given["format"])
    codes = Plain(given["format"]).encode(given["x"])
    return {"rounded": meaning[codes], "decoded": meaning[as_array(given["codes"]).astype(np.int64)]}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """None: all of these numbers are exact in float32."""
    return 0.0


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(Plain, **knobs), hint)


WRONG = {
    "ties_away": _wrong("halfway between two, take the one with the even code (1.25 in e2m1 becomes 1)", pick="away"),
    "truncated": _wrong("round to the nearest; cutting bits off makes every number smaller", pick="zero"),
    "rounded_down": _wrong("round to the nearest, not to the number below", pick="below"),
    "subnormals_flushed": _wrong("exponent 0 has numbers too: 2^(1 − bias) · m / 2^M", flush=True),
    "not_saturated": _wrong("what lies beyond the largest becomes the largest, not infinity or NaN", infinite=True),
    "bias_off_by_one": _wrong("the bias is 2^(exponent bits − 1) − 1", bias=1),
    "no_special_codes": _wrong(
        "e4m3's last code is NaN (so the largest number is 448), and e5m2, fp16 and bf16 end with infinity and NaNs",
        numbers_only=True,
    ),
    "negative_without_twin": _wrong(
        "leave out −2^(bits − 1): it has no positive twin, and a scale that counts it in clips the largest weight",
        twinless=True,
    ),
    "e8m0_rounded": _wrong("e8m0 keeps the exponent as it is: 1.5 becomes 1, not 2", round_powers=True),
    "sign_bit_counts_positive": _wrong("the first bit of a signed integer counts −2^(bits − 1)", unsigned=True),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of number formats, for one implementation of them."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
