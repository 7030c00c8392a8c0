"""Number formats of few bits: what each code means, and which code a number gets.

A format is a set of numbers that have a code. To encode is to find the nearest of
them, ties to the even code; what lies beyond the largest gets the largest
("saturates"), infinities too. Five kinds:

    Integer      bits                         code in two's complement, or from 0 up
    Fixed        integer bits . fraction      the same, in units of 2^−f ("Qm.f")
    Minifloat    sign | exponent | mantissa   (−1)^s · 2^(e − bias) · (1 + m / 2^M), e > 0
                                              (−1)^s · 2^(1 − bias) · m / 2^M,       e = 0 ("subnormal")
    Codebook     index into a table           NF4: equally likely pieces of a normal distribution
    PowerOfTwo   exponent alone               2^(code − 127): the scales of the MX formats

       fp32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm        e4m3   s eeee mmm
       bf16   s eeeeeeee mmmmmmm                        e5m2   s eeeee mm
       fp16   s eeeee mmmmmmmmmm                        e2m1   s ee m      0 ½ 1 1½ 2 3 4 6

Formats know nothing of scales: `mlsys.quant.quantize` divides by one first, so that a
group of weights fills the format's range.

How to round to a float of M mantissa bits by hand: between 2^e and 2^(e+1) such floats are
2^(e−M) apart, so cut x off to its power of two, 2^e, which is one `&` on its bits; then
x / 2^(e−M) is a whole number of steps once it is rounded. Below the smallest normal number
the step stays as it is: clamp 2^e from below. If rounding carries over to 2^(e+1), adding the
steps to the exponent carries too.

Stochastic rounding goes up with the probability of the part that is cut off, so the mean of
many roundings is x: where a small update is added to a large number again and again,
rounding to the nearest loses each of them, stochastic rounding none on average.

Cost:
    About ten operations a number to encode, one look-up in a table of 2^bits numbers to decode.

Memory:
    One byte a code while it is worked on (four for formats above 8 bits); `packing` puts small ones side by side.

Papers:
    Micikevicius et al. 2022, arXiv:2209.05433, table 1 (FP8: e4m3 without infinities, e5m2 with them).
    Rouhani et al. 2023, arXiv:2310.10537 (microscaling: the concrete MX formats).
    Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E (NF4).
    Dettmers et al. 2021, arXiv:2110.02861, section 2 (dynamic 8-bit quantization).
    Gupta et al. 2015, arXiv:1502.02551, section 3 (fixed point; stochastic rounding).

See also:
    `mlsys.quant.rtn` (scales, and rounding a whole matrix), `mlsys.quant.packing` (codes side by side).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Format(Protocol):
    """What all formats answer to. Codes are uint8, or int32 above 8 bits."""

    @property
    def name(self) -> str:
        """As in a `Scheme`."""

    @property
    def bits(self) -> int:
        """Of one code."""

    @property
    def largest(self) -> float:
        """The largest number that has a code; larger ones saturate to it."""

    def encode(self, x: Tensor) -> Tensor:
        """The code of the nearest number that has one, for each of x. ValueError for a NaN if it has no code."""

    def decode(self, codes: Tensor) -> Tensor:
        """What each code stands for, float32."""


@dataclass(frozen=True)
class Integer:
    """Whole numbers: 0 … 2^bits − 1, or if `signed` −(2^(bits−1) − 1) … 2^(bits−1) − 1 in two's complement.

    The signed range leaves out −2^(bits−1), which has no positive twin: a scale that made use of it would
    clip the largest positive weight.
    """

    bits: int
    signed: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.signed else 1
        if type(self.bits) is not int or not least <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r} must be {least} … 8, so that a code fits into a byte")

    @property
    def name(self) -> str:
        """As in a `Scheme`."""
        return f"int{self.bits}"

    @property
    def largest(self) -> float:
        """The largest code."""
        return float((1 << (self.bits - self.signed)) - 1)

    @property
    def smallest(self) -> float:
        """The smallest number that has a code."""
        return -self.largest if self.signed else 0.0

    def encode(self, x: Tensor) -> Tensor:
        """Rounded to the nearest whole number (ties to the even one), clamped, and cut to `bits`."""
        refuse_nan(x, self.name)
        whole = x.round().clamp(self.smallest, self.largest)
        if not self.signed:
            return whole.to(torch.uint8)
        return whole.to(torch.int8).view(torch.uint8) & ((1 << self.bits) - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """As float32; the sign bit counts negative."""
        if not self.signed:
            return codes.float()
        above = 8 - self.bits  # the sign to the top of the byte, and back with copies of it
        return ((codes << above).view(torch.int8) >> above).float()


@dataclass(frozen=True)
class Fixed:
    """Multiples of 2^−fraction in two's complement: `integer` bits before the point, the sign among them.

    −2^(integer−1) … 2^(integer−1) − 2^−fraction. As `named`: "q8.8".
    """

    integer: int
    fraction: int

    def __post_init__(self) -> None:
        whole = type(self.integer) is int and type(self.fraction) is int
        if not whole or self.integer < 1 or self.fraction < 0 or not 2 <= self.bits <= 16:
            raise ValueError(
                f"q{self.integer}.{self.fraction}: there must be an integer bit (the sign), no negative number of "
                "fraction bits, and 2 … 16 together"
            )

    @property
    def name(self) -> str:
        """Bits before and after the point."""
        return f"q{self.integer}.{self.fraction}"

    @property
    def bits(self) -> int:
        """Of one code."""
        return self.integer + self.fraction

    @property
    def largest(self) -> float:
        """The largest number that has a code."""
        return 2.0 ** (self.integer - 1) - 2.0**-self.fraction

    @property
    def smallest(self) -> float:
        """The smallest number that has a code."""
        return -(2.0 ** (self.integer - 1))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The nearest multiple, ties to the even one; with a generator, one of the two neighbours (stochastic).

        The upper one with probability (x − lower) / step, so that the mean is x.
        """
        refuse_nan(x, self.name)
        steps = x.double().clamp(self.smallest, self.largest) * 2.0**self.fraction  # bf16 has not all of these numbers
        if generator is None:
            whole = steps.round()
        else:
            draws = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
            whole = (steps + draws).floor()
        codes = whole.to(torch.int32) & ((1 << self.bits) - 1)
        return codes.to(torch.uint8) if self.bits <= 8 else codes

    def decode(self, codes: Tensor) -> Tensor:
        """The multiples, float32."""
        sign = 1 << (self.bits - 1)
        return ((codes.to(torch.int32) ^ sign) - sign).float() * 2.0**-self.fraction


@dataclass(frozen=True)
class Minifloat:
    """A sign, `exponent` bits and `mantissa` bits. What the codes of the largest exponent mean differs:

    special = "ieee": infinity and NaN (e5m2, fp16, bf16); "nan": numbers, but for the last code, which is
    NaN (e4m3, called "fn"); "none": numbers (e2m1, e2m3, e3m2).
    """

    name: str
    exponent: int
    mantissa: int
    special: str = "none"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken off the stored exponent."""
        return (1 << (self.exponent - 1)) - 1

    @cached_property
    def largest(self) -> float:
        """The largest number that has a code."""
        top = (1 << (self.exponent + self.mantissa)) - 1  # all ones
        if self.special == "nan":
            top -= 1
        elif self.special == "ieee":
            top -= 1 << self.mantissa
        return self._value(top)

    def _value(self, code: int) -> float:
        """Of a code without its sign."""
        exponent, mantissa = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        if exponent == 0:
            return float(mantissa * 2.0 ** (1 - self.bias - self.mantissa))
        return float(((1 << self.mantissa) + mantissa) * 2.0 ** (exponent - self.bias - self.mantissa))

    def encode(self, x: Tensor) -> Tensor:
        """The nearest number's code; ties to the even mantissa; beyond the largest, ± the largest. NaN stays NaN.

        ValueError for a NaN if the format has none. A float64 is rounded once, not by way of float32.
        """
        if self.special == "none":
            refuse_nan(x, self.name)
        if x.dtype != torch.float64:
            x = x.float()
        whole, mask, point, bias = FIELDS[x.dtype]
        # |x| as steps of the format: below 2^(1 − bias) they do not get smaller ("subnormal")
        magnitude = x.abs().clamp(max=self.largest)
        power = (magnitude.view(whole) & mask).view(x.dtype).clamp(min=2.0 ** (1 - self.bias))
        steps = (magnitude / (power * 2.0**-self.mantissa)).round().int()  # 2^M … 2^(M + 1), below if subnormal
        exponent = (power.view(whole) >> point).int() - (bias - self.bias)
        code = steps + ((exponent - 1) << self.mantissa)  # steps of 2^M are the exponent's lowest bit, if not subnormal
        if self.special != "none":
            code = torch.where(x.isnan(), (1 << (self.exponent + self.mantissa)) - 1, code)
        code = code | (torch.signbit(x).int() << (self.bits - 1))
        return code.to(torch.uint8) if self.bits <= 8 else code

    @cached_property
    def table(self) -> Tensor:
        """What each code stands for, float32 (2^bits,)."""
        positive = [self._value(code) for code in range(1 << (self.bits - 1))]
        top = (1 << self.exponent) - 1
        if self.special == "ieee":
            positive[top << self.mantissa] = float("inf")
            for code in range((top << self.mantissa) + 1, len(positive)):
                positive[code] = float("nan")
        elif self.special == "nan":
            positive[-1] = float("nan")
        half = torch.tensor(positive, dtype=torch.float32)
        return torch.cat((half, -half))

    def decode(self, codes: Tensor) -> Tensor:
        """What each code stands for, float32."""
        return look_up(self.table, codes)


@dataclass(frozen=True)
class Codebook:
    """A table of numbers in ascending order; a code is an index."""

    name: str
    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Of one code."""
        return (len(self.values) - 1).bit_length()

    @property
    def largest(self) -> float:
        """The largest magnitude in the table."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @cached_property
    def table(self) -> Tensor:
        """The values as float32."""
        return torch.tensor(self.values, dtype=torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        """The index of the nearest value; halfway between two, the lower one."""
        refuse_nan(x, self.name)
        x = x.float()  # fewer bits have not all middles
        middles = (self.table[1:] + self.table[:-1]) / 2
        if len(middles) > 15:
            return torch.bucketize(x.contiguous(), middles.to(x.device), out_int32=True).to(torch.uint8)
        code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for middle in middles.tolist():  # few: to compare with all of them is quicker than to search
            code += x > middle
        return code

    def decode(self, codes: Tensor) -> Tensor:
        """The values at these indices, float32."""
        return look_up(self.table, codes)


@dataclass(frozen=True)
class PowerOfTwo:
    """An exponent and nothing else, 2^(code − 127); code 255 is NaN."""

    name: str = "e8m0"
    bits: int = 8
    largest: float = 2.0**127

    def encode(self, x: Tensor) -> Tensor:
        """The power of two below or at x ≥ 0 (the exponent is cut off, not rounded), saturated at both ends.

        ValueError for a negative x. NaN stays NaN; 0 gets the smallest, 2^−127.
        """
        if bool((x < 0).any()):
            raise ValueError("x holds a negative number; e8m0 has no sign: encode magnitudes")
        code = (torch.frexp(x.double().clamp(2.0**-127, self.largest)).exponent + 126).to(torch.uint8)
        return code.masked_fill(x.isnan(), 255)

    def decode(self, codes: Tensor) -> Tensor:
        """2^(code − 127), float32."""
        values = torch.ldexp(torch.ones(codes.shape, dtype=torch.float64, device=codes.device), codes.long() - 127)
        return values.masked_fill(codes == 255, float("nan")).float()


def refuse_nan(x: Tensor, name: str) -> None:
    """ValueError if there is one: it has no code."""
    if x.numel() and bool(x.max().isnan()):  # NaN wins a maximum, and one pass finds it
        raise ValueError(f"x holds NaN, which {name} has no code for: remove it first")


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes], by indices of 32 bits rather than 64."""
    return table.to(codes.device).index_select(0, codes.flatten().int()).reshape(codes.shape)


# The values of the paper's appendix E; `normal_float` is the way to them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float() -> tuple[float, ...]:
    """The 16 values of NF4 by their formula, to six digits those that were published.

    Quantiles of the normal distribution over the largest of them: eight above 0 and seven below, so that each is met
    about equally often by normal weights, and 0 itself, which must be exact. The outermost quantile is halfway between
    those of 30 and 32 pieces, as infinity would be the last of 16.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    return tuple((torch.cat((below, above.new_zeros(1), above.flip(0))) / above[0]).tolist())


def dynamic_map() -> tuple[float, ...]:
    """The 256 values of dynamic 8-bit quantization: the smaller the number, the more bits tell its exponent.

    For each decade 10^−6 … 10^0, 2^i numbers (i = 0 … 6) evenly over it, with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (1 << i) + 1, dtype=torch.float32)
        decade = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*decade.tolist(), *(-decade).tolist()]
    return tuple(sorted(values))


# dtype → integers of its width, mask of the exponent, where it begins, bias
FIELDS: dict[torch.dtype, tuple[torch.dtype, int, int, int]] = {
    torch.float32: (torch.int32, 0x7F800000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023),
}
FLOATS = {
    form.name: form
    for form in (
        Minifloat("bf16", 8, 7, "ieee"),
        Minifloat("fp16", 5, 10, "ieee"),
        Minifloat("e5m2", 5, 2, "ieee"),
        Minifloat("e4m3", 4, 3, "nan"),
        Minifloat("e3m2", 3, 2),
        Minifloat("e2m3", 2, 3),
        Minifloat("e2m1", 2, 1),
    )
}
CODEBOOKS = {"nf4": Codebook("nf4", NF4), "dynamic8": Codebook("dynamic8", dynamic_map())}
E8M0 = PowerOfTwo()


def named(name: str) -> Format:
    """The format of this name: int2 … int8, uint2 … uint8, nf4, dynamic8, e2m1 … e5m2, fp16, bf16, e8m0, q8.8."""
    if not isinstance(name, str):
        raise TypeError(f'name must be text such as "e4m3", got {type(name).__name__}')
    fixed = re.fullmatch(r"q(\d+)\.(\d+)", name)
    if fixed:
        return Fixed(int(fixed[1]), int(fixed[2]))
    whole = re.fullmatch(r"(u?)int([2-8])", name)
    if whole:
        return Integer(int(whole[2]), signed=not whole[1])
    formats: dict[str, Format] = {**FLOATS, **CODEBOOKS, "e8m0": E8M0}
    if name not in formats:
        raise ValueError(f"no format {name!r}; there are int2 … int8, uint2 … uint8, {', '.join(formats)}, and q8.8")
    return formats[name]
