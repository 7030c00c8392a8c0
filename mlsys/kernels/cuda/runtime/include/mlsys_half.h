// `__half`, `__nv_bfloat16` and pairs of them, with the names of cuda_fp16.h and cuda_bf16.h.
//
// Arithmetic is done in float and rounded after each operation: for + - * / the double rounding changes nothing, as a
// float has more than twice the places; __hfma rounds once.
#pragma once
#include "../mlsys_numbers.h"
#include "mlsys_cuda.h"

namespace mlsys {

struct HalfBits {
  static constexpr Format format = Format::half;
  static float widen(uint16_t x) { return half_to_float(x); }
  static uint16_t narrow(float x) { return float_to_half(x); }
};
struct BfloatBits {
  static constexpr Format format = Format::bfloat16;
  static float widen(uint16_t x) { return bfloat16_to_float(x); }
  static uint16_t narrow(float x) { return float_to_bfloat16(x); }
};

// No default value: a shared array of these needs no initialiser.
template <class B>
struct Short {
  uint16_t __x;

  Short() = default;
  __forceinline__ Short(float x) : __x(B::narrow(x)) {}
  __forceinline__ Short(double x) : __x(B::narrow(round_to_odd(x))) {}
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>
  __forceinline__ Short(I x) : __x(B::narrow(round_to_odd(x))) {}
  static __forceinline__ Short of(uint16_t bits) {
    Short r;
    r.__x = bits;
    return r;
  }

  __forceinline__ operator float() const { return B::widen(__x); }
  explicit __forceinline__ operator bool() const { return (__x & 0x7fff) != 0; }
  template <class I, class = std::enable_if_t<std::is_integral_v<I> && !std::is_same_v<I, bool>>, class = void>
  explicit __forceinline__ operator I() const {
    return (I)(float)*this;
  }
  explicit __forceinline__ operator double() const { return (float)*this; }

  friend __forceinline__ Short operator+(const Short &a, const Short &b) { return Short((float)a + (float)b); }
  friend __forceinline__ Short operator-(const Short &a, const Short &b) { return Short((float)a - (float)b); }
  friend __forceinline__ Short operator*(const Short &a, const Short &b) { return Short((float)a * (float)b); }
  friend __forceinline__ Short operator/(const Short &a, const Short &b) { return Short((float)a / (float)b); }
  friend __forceinline__ Short operator+(const Short &a) { return a; }
  friend __forceinline__ Short operator-(const Short &a) { return of(a.__x ^ 0x8000); }
  friend __forceinline__ Short &operator+=(Short &a, const Short &b) { return a = a + b; }
  friend __forceinline__ Short &operator-=(Short &a, const Short &b) { return a = a - b; }
  friend __forceinline__ Short &operator*=(Short &a, const Short &b) { return a = a * b; }
  friend __forceinline__ Short &operator/=(Short &a, const Short &b) { return a = a / b; }
  friend __forceinline__ Short &operator++(Short &a) { return a = a + Short(1.0f); }
  friend __forceinline__ Short &operator--(Short &a) { return a = a - Short(1.0f); }
  friend __forceinline__ bool operator==(const Short &a, const Short &b) { return (float)a == (float)b; }
  friend __forceinline__ bool operator!=(const Short &a, const Short &b) { return (float)a != (float)b; }
  friend __forceinline__ bool operator<(const Short &a, const Short &b) { return (float)a < (float)b; }
  friend __forceinline__ bool operator>(const Short &a, const Short &b) { return (float)a > (float)b; }
  friend __forceinline__ bool operator<=(const Short &a, const Short &b) { return (float)a <= (float)b; }
  friend __forceinline__ bool operator>=(const Short &a, const Short &b) { return (float)a >= (float)b; }
};

template <class B>
struct alignas(4) Pair {
  Short<B> x, y;

#ifdef MLSYS_CHECK
  MLSYS_WHOLE(Pair)
#else
  Pair() = default;
#endif
  __forceinline__ Pair(Short<B> x, Short<B> y) : x(x), y(y) {}
  friend __forceinline__ Pair operator+(const Pair &a, const Pair &b) { return {a.x + b.x, a.y + b.y}; }
  friend __forceinline__ Pair operator-(const Pair &a, const Pair &b) { return {a.x - b.x, a.y - b.y}; }
  friend __forceinline__ Pair operator*(const Pair &a, const Pair &b) { return {a.x * b.x, a.y * b.y}; }
  friend __forceinline__ Pair operator/(const Pair &a, const Pair &b) { return {a.x / b.x, a.y / b.y}; }
  friend __forceinline__ Pair operator-(const Pair &a) { return {-a.x, -a.y}; }
  friend __forceinline__ Pair &operator+=(Pair &a, const Pair &b) { return a = a + b; }
  friend __forceinline__ Pair &operator-=(Pair &a, const Pair &b) { return a = a - b; }
  friend __forceinline__ Pair &operator*=(Pair &a, const Pair &b) { return a = a * b; }
  friend __forceinline__ Pair &operator/=(Pair &a, const Pair &b) { return a = a / b; }
  friend __forceinline__ bool operator==(const Pair &a, const Pair &b) { return a.x == b.x && a.y == b.y; }
  friend __forceinline__ bool operator!=(const Pair &a, const Pair &b) { return a.x != b.x && a.y != b.y; }
};

}  // namespace mlsys

using __half = mlsys::Short<mlsys::HalfBits>;
using __half2 = mlsys::Pair<mlsys::HalfBits>;
using __nv_bfloat16 = mlsys::Short<mlsys::BfloatBits>;
using __nv_bfloat162 = mlsys::Pair<mlsys::BfloatBits>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
static_assert(sizeof(__half) == 2 && std::is_trivial_v<__half>, "as in CUDA");
static_assert(sizeof(__half2) == 4 && alignof(__half2) == 4, "as in CUDA");
MLSYS_NAMED(__half, "h2")
MLSYS_NAMED(__half2, "v2h2")
MLSYS_NAMED(__nv_bfloat16, "b2") MLSYS_NAMED(__nv_bfloat162, "v2b2")
// --- conversions -----------------------------------------------------------------------------------------------------
#define MLSYS_F __forceinline__
    MLSYS_F float __half2float(__half h) {
  return h;
}
MLSYS_F __half __float2half(float x) { return x; }
MLSYS_F __half __float2half_rn(float x) { return x; }
MLSYS_F __half __double2half(double x) { return x; }
MLSYS_F __half __int2half_rn(int x) { return x; }
MLSYS_F __half __uint2half_rn(unsigned x) { return x; }
MLSYS_F int __half2int_rn(__half h) { return (int)nearbyintf(h); }
MLSYS_F int __half2int_rz(__half h) { return (int)(float)h; }
MLSYS_F __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
MLSYS_F __half2 __float2half2_rn(float x) { return {x, x}; }
MLSYS_F __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
MLSYS_F float2 __half22float2(__half2 v) { return {v.x, v.y}; }
MLSYS_F __half2 __half2half2(__half h) { return {h, h}; }
MLSYS_F __half2 __halves2half2(__half x, __half y) { return {x, y}; }
MLSYS_F __half2 make_half2(__half x, __half y) { return {x, y}; }
MLSYS_F unsigned short __half_as_ushort(__half h) { return h.__x; }
MLSYS_F short __half_as_short(__half h) { return (short)h.__x; }
MLSYS_F __half __ushort_as_half(unsigned short bits) { return __half::of(bits); }
MLSYS_F __half __short_as_half(short bits) { return __half::of((uint16_t)bits); }

MLSYS_F float __bfloat162float(__nv_bfloat16 b) { return b; }
MLSYS_F __nv_bfloat16 __float2bfloat16(float x) { return x; }
MLSYS_F __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
MLSYS_F __nv_bfloat16 __double2bfloat16(double x) { return x; }
MLSYS_F __nv_bfloat16 __int2bfloat16_rn(int x) { return x; }
MLSYS_F __nv_bfloat16 __uint2bfloat16_rn(unsigned x) { return x; }
MLSYS_F __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
MLSYS_F __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
MLSYS_F __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
MLSYS_F float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
MLSYS_F __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 b) { return {b, b}; }
MLSYS_F __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
MLSYS_F __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
MLSYS_F unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
MLSYS_F short __bfloat16_as_short(__nv_bfloat16 b) { return (short)b.__x; }
MLSYS_F __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::of(bits); }
MLSYS_F __nv_bfloat16 __short_as_bfloat16(short bits) { return __nv_bfloat16::of((uint16_t)bits); }

// --- what both formats have, named alike -----------------------------------------------------------------------------
MLSYS_F __half __low2half(__half2 v) { return v.x; }
MLSYS_F __half __high2half(__half2 v) { return v.y; }
MLSYS_F __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
MLSYS_F __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
template <class B>
MLSYS_F float __low2float(mlsys::Pair<B> v) {
  return v.x;
}
template <class B>
MLSYS_F float __high2float(mlsys::Pair<B> v) {
  return v.y;
}

#define MLSYS_SHORT1(NAME, PAIR, EXPR)              \
  template <class B>                                \
  MLSYS_F mlsys::Short<B> NAME(mlsys::Short<B> h) { \
    float a = h;                                    \
    return (float)(EXPR);                           \
  }                                                 \
  template <class B>                                \
  MLSYS_F mlsys::Pair<B> PAIR(mlsys::Pair<B> v) {   \
    return {NAME(v.x), NAME(v.y)};                  \
  }
MLSYS_SHORT1(hexp, h2exp, expf(a))
MLSYS_SHORT1(hexp2, h2exp2, exp2f(a))
MLSYS_SHORT1(hlog, h2log, logf(a)) MLSYS_SHORT1(hlog2, h2log2, log2f(a)) MLSYS_SHORT1(hsqrt, h2sqrt, sqrtf(a))
    MLSYS_SHORT1(hrsqrt, h2rsqrt, 1.0f / sqrtf(a)) MLSYS_SHORT1(hrcp, h2rcp, 1.0f / a)
        MLSYS_SHORT1(hsin, h2sin, sinf(a)) MLSYS_SHORT1(hcos, h2cos, cosf(a)) MLSYS_SHORT1(htanh, h2tanh, tanhf(a))
            MLSYS_SHORT1(htanh_approx, h2tanh_approx, tanhf(a)) MLSYS_SHORT1(hfloor, h2floor, floorf(a))
                MLSYS_SHORT1(hceil, h2ceil, ceilf(a)) MLSYS_SHORT1(hrint, h2rint, nearbyintf(a))
                    MLSYS_SHORT1(htrunc, h2trunc, truncf(a))
#undef MLSYS_SHORT1

#define MLSYS_SHORT2(NAME, EXPR)                                       \
  template <class B>                                                   \
  MLSYS_F mlsys::Short<B> NAME(mlsys::Short<B> a, mlsys::Other<B> b) { \
    return EXPR;                                                       \
  }                                                                    \
  template <class B>                                                   \
  MLSYS_F mlsys::Pair<B> NAME##2(mlsys::Pair<B> a, mlsys::Pair<B> b) { \
    return {NAME(a.x, b.x), NAME(a.y, b.y)};                           \
  }
                        namespace mlsys {
  template <class B>
  MLSYS_F bool nan(Short<B> h) {
    return (float)h != (float)h;
  }
  template <class B>
  MLSYS_F bool below(Short<B> a, Short<B> b) {  // −0 is below +0
    return (float)a < (float)b || ((float)a == (float)b && (a.__x >> 15) > (b.__x >> 15));
  }
  template <class B>
  using Other = typename mlsys_same<Short<B>>::type;  // may be converted: the first says the format
}  // namespace mlsys
MLSYS_SHORT2(__hadd, a + b)
MLSYS_SHORT2(__hsub, a - b)
MLSYS_SHORT2(__hmul, a *b) MLSYS_SHORT2(__hmax, mlsys::nan(a)        ? b
                                                : mlsys::nan(b)      ? a
                                                : mlsys::below(a, b) ? b
                                                                     : a)  // the one that is no NaN
    MLSYS_SHORT2(__hmin, mlsys::nan(a)        ? b
                         : mlsys::nan(b)      ? a
                         : mlsys::below(b, a) ? b
                                              : a) MLSYS_SHORT2(__hmax_nan, mlsys::nan(a)        ? a
                                                                            : mlsys::nan(b)      ? b
                                                                            : mlsys::below(a, b) ? b
                                                                                                 : a)
        MLSYS_SHORT2(__hmin_nan, mlsys::nan(a)        ? a
                                 : mlsys::nan(b)      ? b
                                 : mlsys::below(b, a) ? b
                                                      : a)
#undef MLSYS_SHORT2
            template <class B>
            MLSYS_F mlsys::Short<B> __hdiv(mlsys::Short<B> a, mlsys::Other<B> b) {
  return a / b;
}
template <class B>
MLSYS_F mlsys::Pair<B> __h2div(mlsys::Pair<B> a, mlsys::Pair<B> b) {
  return a / b;
}
template <class B>
MLSYS_F mlsys::Short<B> __hneg(mlsys::Short<B> a) {
  return -a;
}
template <class B>
MLSYS_F mlsys::Pair<B> __hneg2(mlsys::Pair<B> a) {
  return -a;
}
template <class B>
MLSYS_F mlsys::Short<B> __habs(mlsys::Short<B> a) {
  return mlsys::Short<B>::of(a.__x & 0x7fff);
}
template <class B>
MLSYS_F mlsys::Pair<B> __habs2(mlsys::Pair<B> a) {
  return {__habs(a.x), __habs(a.y)};
}
template <class B>
MLSYS_F mlsys::Short<B> __hfma(mlsys::Short<B> a, mlsys::Other<B> b, mlsys::Other<B> c) {
  return mlsys::Short<B>(mlsys::fma_to_odd(a, b, c));
}
template <class B>
MLSYS_F mlsys::Pair<B> __hfma2(mlsys::Pair<B> a, mlsys::Pair<B> b, mlsys::Pair<B> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class B>
MLSYS_F mlsys::Short<B> __hfma_relu(mlsys::Short<B> a, mlsys::Other<B> b, mlsys::Other<B> c) {
  return __hmax_nan(__hfma(a, b, c), mlsys::Short<B>::of(0));
}
template <class B>
MLSYS_F bool __hisnan(mlsys::Short<B> a) {
  return mlsys::nan(a);
}
template <class B>
MLSYS_F int __hisinf(mlsys::Short<B> a) {
  return std::isinf((float)a) ? ((float)a < 0 ? -1 : 1) : 0;
}
#define MLSYS_COMPARE(NAME, OP)                                             \
  template <class B>                                                        \
  MLSYS_F bool __h##NAME(mlsys::Short<B> a, mlsys::Other<B> b) {            \
    return a OP b;                                                          \
  }                                                                         \
  template <class B>                                                        \
  MLSYS_F bool __hb##NAME##2(mlsys::Pair<B> a, mlsys::Pair<B> b) {          \
    return a.x OP b.x && a.y OP b.y;                                        \
  }                                                                         \
  template <class B>                                                        \
  MLSYS_F mlsys::Pair<B> __h##NAME##2(mlsys::Pair<B> a, mlsys::Pair<B> b) { \
    return {a.x OP b.x ? 1.0f : 0.0f, a.y OP b.y ? 1.0f : 0.0f};            \
  }
MLSYS_COMPARE(eq, ==)
MLSYS_COMPARE(ne, !=) MLSYS_COMPARE(lt, <) MLSYS_COMPARE(le, <=) MLSYS_COMPARE(gt, >) MLSYS_COMPARE(ge, >=)
#undef MLSYS_COMPARE
#undef MLSYS_F

#define CUDART_INF_FP16 __ushort_as_half(0x7c00)
#define CUDART_NAN_FP16 __ushort_as_half(0x7fff)
#define CUDART_MAX_NORMAL_FP16 __ushort_as_half(0x7bff)
#define CUDART_ZERO_FP16 __ushort_as_half(0)
#define CUDART_ONE_FP16 __ushort_as_half(0x3c00)
#define CUDART_INF_BF16 __ushort_as_bfloat16(0x7f80)
#define CUDART_NAN_BF16 __ushort_as_bfloat16(0x7fff)
#define CUDART_ZERO_BF16 __ushort_as_bfloat16(0)
#define CUDART_ONE_BF16 __ushort_as_bfloat16(0x3f80)
