// The 16-bit formats, bit by bit: what they hold as a float, and a float rounded to them, to nearest, ties to even.
//
//   half      s eeeee mmmmmmmmmm     largest 65504, smallest normal 2^-14, smallest subnormal 2^-24
//   bfloat16  s eeeeeeee mmmmmmm     the upper half of a float
//
// No branches and no processor's own instruction: a loop over these is vectorised on every processor. A NaN becomes
// 0x7fff, as on a GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mlsys {

enum class Format : int { half, bfloat16, float32, tf32 };

template <class To, class From>
inline To as_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_bits keeps the size");
  To r;
  __builtin_memcpy(&r, &x, sizeof r);
  return r;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = (rest << 13) + (112u << 23);  // another bias of the exponent
  bits += rest >= 0x7c00 ? 112u << 23 : 0;      // infinity, NaN
  bits = rest < 0x0400 ? as_bits<uint32_t>((float)(int)rest * 0x1p-24f) : bits;
  return as_bits<float>(bits | sign);
}

inline uint16_t float_to_half(float x) {
  uint32_t bits = as_bits<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
  // Next to 0.5 a float's last place is 2^-24: the addition rounds as a subnormal half does.
  uint32_t subnormal = as_bits<uint32_t>(as_bits<float>(rest) + 0.5f) - as_bits<uint32_t>(0.5f);
  uint32_t r = rest < 0x38800000 ? subnormal : normal;
  r = rest >= 0x477ff000 ? 0x7c00 : r;  // 65520 and more
  return (uint16_t)(rest > 0x7f800000 ? 0x7fff : r | sign);
}

inline float bfloat16_to_float(uint16_t b) { return as_bits<float>((uint32_t)b << 16); }

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits = as_bits<uint32_t>(x);
  uint32_t r = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : r);
}

// Tensor cores take a float's upper 19 bits as tf32; conversion by hand rounds to nearest, ties away from zero.
inline float tf32_read(float x) { return as_bits<float>(as_bits<uint32_t>(x) & 0xffffe000); }
inline float float_to_tf32(float x) {
  uint32_t bits = as_bits<uint32_t>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? x : as_bits<float>((bits + 0x1000) & 0xffffe000);
}

// Rounded to a float "to odd": rounding that once more, to fewer places, is as good as rounding once.
inline float round_to_odd(long double x) {
  float f = (float)x;
  uint32_t bits = as_bits<uint32_t>(f);
  if (f == x || x != x || (bits & 1)) return f;
  return as_bits<float>(((long double)f < x) == (x > 0) ? bits + 1 : bits - 1);
}

// a * b + c, rounded only where the result is rounded to at most 11 places. The product of two is exact in a double.
inline float fma_to_odd(float a, float b, float c) {
  double p = (double)a * b, s = p + c, of_c = s - p, error = (p - (s - of_c)) + (c - of_c);
  if (!std::isfinite(s) || error == 0) return round_to_odd(s);
  uint64_t bits = as_bits<uint64_t>(s);
  if (!(bits & 1)) s = as_bits<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
  return round_to_odd(s);
}

}  // namespace mlsys
