// y = x Wᵀ where W is read as the few bits that it is stored in.
//
// A product with one vector reads each weight once and computes next to nothing with it: its time is that of the bytes.
// So codes are decoded in registers, between the load and the multiply-add, and never written back. Which sixteen
// weights a register holds is the order in which they come out of the bytes; x is put into the same order once.
//
//   float_linear    x stays float: code → float → fma, one scale for the sum of a group. One row of x and groups of
//                   integers of 4 bits: x in fixed point, integer products
//   int8_linear     x is quantized too, a scale per row: integer products (VNNI, dpbusd), exact within a group
//   dequantize      rows of W as float32 or bfloat16, for a matrix product of torch's
//
// The vectors are AVX-512's. Without them, and for groups that do not fall on whole lanes, plain loops do the same.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VECTORS 1
#include <immintrin.h>
#else
#define VECTORS 0
#endif
#if VECTORS && defined(__AVX512VNNI__)
#define VNNI 1
#else
#define VNNI 0
#endif

namespace {

enum Kind : int32_t { BYTE = 0, NIBBLE = 1, E5M2 = 2, E4M3 = 3 };                           // what a code is
enum Stored : int32_t { NONE = 0, F32 = 1, F16 = 2, BF16 = 3, E8M0 = 4, FP8 = 5, U8 = 6 };  // what a scale or zero is

// As mlsys/quant/_native.py lays it out.
struct Weight {
  const uint8_t *codes;
  const void *scale;
  const void *zero;
  const float *table;             // what the 16 codes of a NIBBLE stand for
  int64_t rows, columns, stride;  // stride: bytes of a row
  int64_t group, groups;          // columns that share a scale, scales of a row
  int32_t shared_scale;           // one scale (and zero) for all rows
  int32_t kind, scale_type, zero_type;
  int32_t is_signed;  // two's complement, of BYTE; of NIBBLE in int8_linear
  float factor;       // of all scales
  float centre;       // what `table`, or a BYTE read as signed, has already taken off the code
};

float bits_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float half(uint32_t h) {  // finite only; the multiplication makes subnormals right
  return bits_as_float((h & 0x8000u) << 16 | (h & 0x7fffu) << 13) * 0x1p112f;
}

// n numbers from the i-th on, as float. A loop for each type, so that each can be vectorised.
void load(const void *from, int32_t type, int64_t i, int64_t n, float *out) {
  const auto each = [&](auto *at, auto as_float) {
    for (int64_t j = 0; j < n; j++) out[j] = as_float(at[i + j]);
  };
  const auto *bytes = static_cast<const uint8_t *>(from);
  const auto *halves = static_cast<const uint16_t *>(from);
  switch (type) {
    case F32:
      return each(static_cast<const float *>(from), [](float v) { return v; });
    case F16:
      return each(halves, [](uint32_t h) { return half(h); });
    case BF16:
      return each(halves, [](uint32_t h) { return bits_as_float(h << 16); });
    case E8M0:
      return each(bytes, [](uint32_t e) { return bits_as_float(e ? e << 23 : 1u << 22); });
    case FP8:
      return each(bytes, [](uint32_t b) { return bits_as_float((b & 0x80u) << 24 | (b & 0x7fu) << 20) * 0x1p120f; });
    case U8:
      return each(bytes, [](uint32_t b) { return float(b); });
    default:
      std::fill(out, out + n, 0.f);
  }
}

// Scales and zero points of a row as float; `zeros` for the codes less `centre`.
void row_scales(const Weight &w, int64_t row, float *scales, float *zeros) {
  const int64_t first = w.shared_scale ? 0 : row * w.groups;
  load(w.scale, w.scale_type, first, w.groups, scales);
  load(w.zero, w.zero_type, first, w.groups, zeros);
  if (w.factor != 1)
    for (int64_t g = 0; g < w.groups; g++) scales[g] *= w.factor;
  if (w.centre != 0)
    for (int64_t g = 0; g < w.groups; g++) zeros[g] -= w.centre;
}

float value(const Weight &w, const uint8_t *row, int64_t k) {
  switch (w.kind) {
    case NIBBLE:
      return w.table[(row[k / 2] >> (k % 2 * 4)) & 15];
    case BYTE:
      return float(w.is_signed ? int8_t(row[k]) : int8_t(row[k] ^ 0x80));
    case E5M2:
      return half(uint32_t(row[k]) << 8);
    default:
      return half((row[k] & 0x80u) << 8 | (row[k] & 0x7fu) << 7) * 0x1p8f;
  }
}

// One row as float, (value − zero) · scale.
void dequantize_row(const Weight &w, int64_t row, float *scales, float *zeros, float *out) {
  row_scales(w, row, scales, zeros);
  const uint8_t *codes = w.codes + row * w.stride;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t end = std::min(w.columns, (g + 1) * w.group);
    int64_t k = g * w.group;
    const float s = scales[g], z = zeros[g];
#if VECTORS
    if (w.kind == NIBBLE && k % 2 == 0) {
      const __m512 table = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w.table), _mm512_set1_ps(z)), _mm512_set1_ps(s));
      for (; k + 16 <= end; k += 16) {  // byte → (low nibble, high nibble) side by side; the look-up ignores other bits
        const __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + k / 2)));
        _mm512_storeu_ps(out + k, _mm512_permutexvar_ps(_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28)), table));
      }
    }
#endif
    if (w.kind == BYTE) {
      const uint8_t flip = w.is_signed ? 0 : 0x80;
      for (; k < end; k++) out[k] = (float(int8_t(codes[k] ^ flip)) - z) * s;
    }
    for (; k < end; k++) out[k] = (value(w, codes, k) - z) * s;
  }
}

// Rows first … last − 1, cut into pieces for `threads` threads.
template <class Work>
void split(int64_t rows, int64_t threads, int64_t multiple, const Work &work) {
  const int64_t pieces = std::max<int64_t>(1, std::min(threads, (rows + multiple - 1) / multiple));
  const int64_t each = (rows + pieces * multiple - 1) / (pieces * multiple) * multiple;
  std::vector<std::thread> others;
  for (int64_t p = 1; p < pieces; p++)
    if (p * each < rows) others.emplace_back([=, &work] { work(p * each, std::min(rows, (p + 1) * each)); });
  work(0, std::min(rows, each));
  for (auto &other : others) other.join();
}

// ---- plain loops -----------------------------------------------------------------------------------------------------

void plain_float(const Weight &w, const float *x, int64_t m, float *y, int64_t first, int64_t last) {
  std::vector<float> scales(w.groups), zeros(w.groups), row(w.columns);
  for (int64_t n = first; n < last; n++) {
    dequantize_row(w, n, scales.data(), zeros.data(), row.data());
    for (int64_t i = 0; i < m; i++) {
      float sum = 0;
      for (int64_t k = 0; k < w.columns; k++) sum += row[k] * x[i * w.columns + k];
      y[i * w.rows + n] = sum;
    }
  }
}

// The integers that BYTE and NIBBLE codes are, from 0 up: those of two's complement are moved up by half the range.
int unsigned_code(const Weight &w, const uint8_t *row, int64_t k) {
  if (w.kind == NIBBLE) return ((row[k / 2] >> (k % 2 * 4)) & 15) ^ (w.is_signed ? 8 : 0);
  return row[k] ^ (w.is_signed ? 0x80 : 0);
}

// Zero points of these codes.
void unsigned_zeros(const Weight &w, float *zeros) {
  const float moved = w.is_signed ? (w.kind == NIBBLE ? 8.f : 128.f) : 0.f;
  for (int64_t g = 0; g < w.groups; g++) zeros[g] += w.centre + moved;
}

constexpr int64_t LONGEST = 1 << 16;  // products of 255 · 127 whose sum fits into 32 bits

void plain_int8(const Weight &w, const int8_t *x, const float *x_scale, int64_t m, float *y, int64_t first,
                int64_t last) {
  std::vector<float> scales(w.groups), zeros(w.groups);
  std::vector<int32_t> row(w.columns);
  for (int64_t n = first; n < last; n++) {
    row_scales(w, n, scales.data(), zeros.data());
    unsigned_zeros(w, zeros.data());
    for (int64_t k = 0; k < w.columns; k++) row[k] = unsigned_code(w, w.codes + n * w.stride, k);
    for (int64_t i = 0; i < m; i++) {
      double sum = 0;
      for (int64_t g = 0; g < w.groups; g++) {
        const int64_t end = std::min(w.columns, (g + 1) * w.group);
        for (int64_t begin = g * w.group; begin < end; begin += LONGEST) {
          int32_t products = 0, inputs = 0;
          for (int64_t k = begin; k < std::min(end, begin + LONGEST); k++) {
            products += row[k] * x[i * w.columns + k];
            inputs += x[i * w.columns + k];
          }
          sum += double(scales[g]) * (products - double(zeros[g]) * inputs);
        }
      }
      y[i * w.rows + n] = float(sum * x_scale[i]);
    }
  }
}

// ---- AVX-512, float activations --------------------------------------------------------------------------------------

#if VECTORS

// The rows that come next are asked for while these are worked on: a row is a page, and processors do not by themselves
// read ahead into the next page. Into the second-level cache, for eight rows with x would be more than the first holds.
void ask_for(const uint8_t *at) { _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T1); }

// How scales and zero points get to the weights.
enum Grid {
  TABLES,  // NIBBLE: the table of a row's group is (table − zero) · scale, made once for each group
  LANES,   // NIBBLE, several groups in a step: on the sum of a step, a scale for each lane
  EACH,    // others: one more fma for each weight
  AT_END,  // others with one group: on the sum
};

// How many columns a step takes: 64 bytes of NIBBLE, 16 of the others.
constexpr int64_t float_columns(int kind) { return kind == NIBBLE ? 128 : 16; }

bool in_pieces(int64_t group) { return group == 16 || group == 32 || group == 64; }

bool float_lanes(const Weight &w) {
  return w.groups == 1 || w.group % float_columns(w.kind) == 0 || (w.kind == NIBBLE && in_pieces(w.group));
}

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// x (m, columns), padded with zeros, in the order in which weights come out of a register. Of nibbles that is, in each
// block of 128 columns, each `ways`-th column from the first on, then each from the second on, and so forth.
template <class Number>
std::vector<Number> in_order(const Number *x, int64_t m, int64_t columns, int64_t padded, int64_t ways) {
  std::vector<Number> out(m * padded);
  const int64_t each = 128 / ways;
  for (int64_t i = 0; i < m; i++) {
    Number *to = out.data() + i * padded;
    const Number *from = x + i * columns;
    if (ways == 1) {
      std::memcpy(to, from, columns * sizeof(Number));
      continue;
    }
    for (int64_t block = 0; block < columns; block += 128) {
      const int64_t here = std::min<int64_t>(128, columns - block);
      for (int64_t way = 0; way < ways; way++)
        for (int64_t j = 0; way + j * ways < here; j++) to[block + way * each + j] = from[block + way + j * ways];
    }
  }
  return out;
}

// For each of 16 lanes the number of its piece, of so many pieces from `of` on; there may be fewer left.
__m512 lane_pieces(const float *of, int64_t pieces, int64_t left) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 there = __mmask16((1u << std::min(pieces, left)) - 1);
  const __m512i piece = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(pieces == 8 ? 1 : pieces == 4 ? 2 : 3));
  return _mm512_permutexvar_ps(piece, _mm512_maskz_loadu_ps(there, of));
}

// 16 bytes as float, of formats of 8 bits.
template <int KIND>
__m512 decoded(__m128i bytes, __m128i flip) {
  if constexpr (KIND == BYTE) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(bytes, flip)));
  const __m256i bits = _mm256_cvtepu8_epi16(bytes);
  if constexpr (KIND == E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(bits, 8));  // the upper half of an fp16
  // e4m3: exponent and mantissa where fp16 has them; the exponents' origins are 8 apart, which `factor` makes up for
  return _mm512_cvtph_ps(_mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8),
                                         _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7)));
}

// R rows of W times M rows of x: R · M sums in registers. x_sums: (m,), or of LANES (m, padded / 8), those of 8 columns.
template <int KIND, Grid GRID, int R, int M>
void float_tile(const Weight &w, const float *x, int64_t padded, const float *x_sums, int64_t row, float *scratch,
                float *y) {
  constexpr int64_t columns = float_columns(KIND), bytes = KIND == NIBBLE ? 64 : 16;
  const int64_t groups = w.groups, steps = padded / columns;
  const int64_t behind = KIND == NIBBLE && M > 1 && row + R == w.rows ? 3 : 0;  // that loads reach over their 64 bytes
  const int64_t full = (w.stride - behind) / bytes;
  const __m512 plain_table = KIND == NIBBLE ? _mm512_loadu_ps(w.table) : _mm512_setzero_ps();
  const __m128i flip = _mm_set1_epi8(w.is_signed ? 0 : char(0x80));
  float *scales = scratch;
  float *zeros = scratch + R * groups;
  const uint8_t *codes[R];
  for (int r = 0; r < R; r++) {
    row_scales(w, row + r, scales + r * groups, zeros + r * groups);
    codes[r] = w.codes + (row + r) * w.stride;
  }
  const bool moved = w.zero || w.centre != 0;
  if (GRID == LANES && moved)
    for (int64_t g = 0; g < R * groups; g++) zeros[g] *= scales[g];
  __m512 sum[R][M], total[R][M], table[R], scale[R], offset[R];
  for (int r = 0; r < R; r++) {
    table[r] = plain_table;
    for (int i = 0; i < M; i++) sum[r][i] = total[r][i] = _mm512_setzero_ps();
  }

  const auto enter = [&](int64_t g) {  // a group
    for (int r = 0; r < R; r++) {
      const __m512 s = _mm512_set1_ps(scales[r * groups + g]), z = _mm512_set1_ps(zeros[r * groups + g]);
      if constexpr (GRID == TABLES) table[r] = _mm512_mul_ps(_mm512_sub_ps(plain_table, z), s);
      if constexpr (GRID == EACH) scale[r] = s, offset[r] = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), s);
    }
  };
  const auto ahead = [&](int64_t s) {
    for (int r = 0; R > 1 && M < 4 && r < R; r++) ask_for(codes[r] + s * bytes + R * w.stride);
  };
  const auto step = [&](int64_t s, auto partial) {
    const uint8_t *at[R];
    for (int r = 0; r < R; r++) at[r] = codes[r] + s * bytes;
    // Of the last row, what lies behind is not ours to read
    const uint64_t there = partial ? ~uint64_t(0) >> (64 - std::min<int64_t>(64, w.stride - s * bytes)) : 0;
    if constexpr (KIND == NIBBLE) {
      // 16 lanes of 8 nibbles; the look-up takes the lowest, and ignores the others. Shifts bring down the next; with
      // several rows of x the bytes are loaded again, one further on, which costs less then.
      if constexpr (M == 1) {
        __m512i wide[R];
        for (int r = 0; r < R; r++)
          wide[r] = partial ? _mm512_maskz_loadu_epi8(there, at[r]) : _mm512_loadu_si512(at[r]);
        for (int p = 0; p < 8; p++) {
          const __m512 input = _mm512_loadu_ps(x + s * columns + p * 16);
          for (int r = 0; r < R; r++) {
            sum[r][0] = _mm512_fmadd_ps(_mm512_permutexvar_ps(wide[r], table[r]), input, sum[r][0]);
            wide[r] = _mm512_srli_epi32(wide[r], 4);
          }
        }
      } else {
        for (int p = 0; p < 8; p++) {
          __m512 inputs[M];
          for (int i = 0; i < M; i++) inputs[i] = _mm512_loadu_ps(x + i * padded + s * columns + p * 16);
          for (int r = 0; r < R; r++) {
            const uint8_t *from = at[r] + p / 2;
            const __m512i wide = partial ? _mm512_maskz_loadu_epi8(there >> p / 2, from) : _mm512_loadu_si512(from);
            const __m512 number = _mm512_permutexvar_ps(p % 2 ? _mm512_srli_epi32(wide, 4) : wide, table[r]);
            for (int i = 0; i < M; i++) sum[r][i] = _mm512_fmadd_ps(number, inputs[i], sum[r][i]);
          }
        }
      }
    } else {
      __m512 inputs[M];
      for (int i = 0; i < M; i++) inputs[i] = _mm512_loadu_ps(x + i * padded + s * columns);
      for (int r = 0; r < R; r++) {
        const __m128i raw = partial ? _mm_maskz_loadu_epi8(__mmask16(there), at[r])
                                    : _mm_loadu_si128(reinterpret_cast<const __m128i *>(at[r]));
        __m512 number = decoded<KIND>(raw, flip);
        if constexpr (GRID == EACH) number = _mm512_fmadd_ps(number, scale[r], offset[r]);
        for (int i = 0; i < M; i++) sum[r][i] = _mm512_fmadd_ps(number, inputs[i], sum[r][i]);
      }
    }
  };
  const int64_t pieces = GRID == LANES ? columns / w.group : 1;  // 2, 4 or 8
  const auto leave = [&](int64_t g, int64_t s) {                 // a step of LANES
    for (int r = 0; r < R; r++) {
      const __m512 of_lane = lane_pieces(scales + r * groups + g, pieces, groups - g);
      for (int i = 0; i < M; i++) {
        total[r][i] = _mm512_fmadd_ps(sum[r][i], of_lane, total[r][i]);
        sum[r][i] = _mm512_setzero_ps();
      }
      if (!moved) continue;
      const __m512 off = lane_pieces(zeros + r * groups + g, pieces, groups - g);
      for (int i = 0; i < M; i++)
        total[r][i] = _mm512_fnmadd_ps(_mm512_loadu_ps(x_sums + i * (padded / 8) + s * 16), off, total[r][i]);
    }
  };
  const int64_t in_group = groups == 1 ? steps : std::max<int64_t>(1, w.group / columns);
  for (int64_t g = 0, s = 0; s < steps; g += pieces) {
    enter(g);
    const int64_t end = std::min(steps, s + in_group);
    constexpr int64_t line = 64 / bytes;  // steps of a line of the cache
    for (; s + line <= std::min(end, full); s += line) {
      ahead(s);
      for (int64_t i = 0; i < line; i++) step(s + i, std::false_type{});
    }
    if (s < end) ahead(s);
    for (; s < std::min(end, full); s++) step(s, std::false_type{});
    for (; s < end; s++) step(s, std::true_type{});
    if constexpr (GRID == LANES) leave(g, s - 1);
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) {
      float out = _mm512_reduce_add_ps(GRID == LANES ? total[r][i] : sum[r][i]);
      if constexpr (GRID == AT_END) out = (out - zeros[r] * x_sums[i]) * scales[r];
      y[i * w.rows + row + r] = out;
    }
}

template <int KIND, Grid GRID>
void float_rows(const Weight &w, const float *x, int64_t padded, const float *x_sums, int64_t m, float *y,
                int64_t first, int64_t last) {
  const int64_t sums = GRID == LANES ? padded / 8 : 1;
  std::vector<float> scratch(2 * 4 * w.groups);
  const auto pass = [&](auto many, int64_t i, int64_t from, int64_t to) {
    constexpr int M = many, R = GRID == LANES && M == 4 ? 2 : 4;  // the totals of LANES are in registers, too
    const auto tile = [&](auto run, int64_t row) {
      run(w, x + i * padded, padded, x_sums + i * sums, row, scratch.data(), y + i * w.rows);
    };
    int64_t row = from;
    for (; row + R <= to; row += R) tile(float_tile<KIND, GRID, R, M>, row);
    for (; row < to; row++) tile(float_tile<KIND, GRID, 1, M>, row);
  };
  // Rows of W that stay in the second-level cache while all of x passes.
  const int64_t chunk = m > 4 ? std::max<int64_t>(8, (1 << 18) / std::max<int64_t>(w.stride, 1) / 4 * 4) : last - first;
  for (int64_t from = first; from < last; from += chunk) {
    const int64_t to = std::min(last, from + chunk);
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) pass(std::integral_constant<int, 4>{}, i, from, to);
    if (i + 2 <= m) pass(std::integral_constant<int, 2>{}, i, from, to), i += 2;
    if (i < m) pass(std::integral_constant<int, 1>{}, i, from, to);
  }
}

// ---- AVX-512, integer activations ------------------------------------------------------------------------------------

#if VNNI

constexpr int64_t int8_columns(int kind) { return kind == NIBBLE ? 128 : 64; }

// Group sizes whose ends are those of lanes: a lane takes 4 bytes.
bool int8_lanes(const Weight &w) {
  if (w.groups == 1) return w.columns <= LONGEST;
  return w.group <= LONGEST && (w.group % int8_columns(w.kind) == 0 || in_pieces(w.group));
}

enum Flush { ONCE, GROUPS, PIECES };  // one group; groups of whole steps; several groups in a step

template <int KIND, Flush FLUSH, int R, int M>
void int8_tile(const Weight &w, const int8_t *x, const float *x_scale, int64_t padded, const int32_t *x_sums,
               int64_t row, float *scratch, float *y) {
  constexpr int64_t bytes = 64, columns = int8_columns(KIND);
  const int64_t groups = w.groups, steps = padded / columns, full = w.stride / bytes;
  const __m512i flip = _mm512_set1_epi8(w.is_signed ? char(KIND == NIBBLE ? 0x88 : 0x80) : 0);
  const __m512i low = _mm512_set1_epi8(15);
  float *scales = scratch;
  float *zeros = scratch + R * groups;
  const uint8_t *codes[R];
  for (int r = 0; r < R; r++) {
    row_scales(w, row + r, scales + r * groups, zeros + r * groups);
    unsigned_zeros(w, zeros + r * groups);
    codes[r] = w.codes + (row + r) * w.stride;
  }
  __m512i sum[R][M];
  __m512 total[R][M];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) sum[r][i] = _mm512_setzero_si512(), total[r][i] = _mm512_setzero_ps();

  const auto step = [&](int64_t s, auto partial) {  // unsigned codes times signed inputs, four neighbours to a lane
    __m512i wide[R];
    for (int r = 0; r < R; r++) {
      const uint8_t *at = codes[r] + s * bytes;
      if constexpr (R > 1 && M < 4) ask_for(at + R * w.stride);
      if constexpr (partial)
        wide[r] = _mm512_maskz_loadu_epi8((uint64_t(1) << (w.stride - s * bytes)) - 1, at);
      else
        wide[r] = _mm512_loadu_si512(at);
      wide[r] = _mm512_xor_si512(wide[r], flip);
    }
    for (int p = 0; p < (KIND == NIBBLE ? 2 : 1); p++) {
      __m512i inputs[M];
      for (int i = 0; i < M; i++) inputs[i] = _mm512_loadu_si512(x + i * padded + s * columns + p * bytes);
      for (int r = 0; r < R; r++) {
        __m512i number = wide[r];
        if constexpr (KIND == NIBBLE) number = _mm512_and_si512(p ? _mm512_srli_epi16(number, 4) : number, low);
        for (int i = 0; i < M; i++) sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], number, inputs[i]);
      }
    }
  };
  const auto flush = [&](auto scale_of) {
    for (int r = 0; r < R; r++) {
      const __m512 scale = scale_of(scales + r * groups);
      for (int i = 0; i < M; i++) {
        total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][i]), scale, total[r][i]);
        sum[r][i] = _mm512_setzero_si512();
      }
    }
  };
  const int64_t pieces = FLUSH == PIECES ? columns / w.group : 1;  // 2, 4 or 8
  const int64_t in_group = FLUSH == ONCE ? steps : FLUSH == GROUPS ? w.group / columns : 1;
  for (int64_t g = 0, s = 0; s < steps; g += pieces) {
    const int64_t end = std::min(steps, s + in_group);
    for (; s < std::min(end, full); s++) step(s, std::false_type{});
    for (; s < end; s++) step(s, std::true_type{});
    if constexpr (FLUSH == GROUPS) flush([&](const float *of) { return _mm512_set1_ps(of[g]); });
    if constexpr (FLUSH == PIECES) flush([&](const float *of) { return lane_pieces(of + g, pieces, groups - g); });
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < M; i++) {
      double out;
      if constexpr (FLUSH == ONCE) {
        out = (_mm512_reduce_add_epi32(sum[r][i]) - double(zeros[r]) * x_sums[i]) * scales[r];
      } else {
        float off = 0;
        for (int64_t g = 0; g < groups; g++)
          off += scales[r * groups + g] * zeros[r * groups + g] * x_sums[i * groups + g];
        out = _mm512_reduce_add_ps(total[r][i]) - off;
      }
      y[i * w.rows + row + r] = float(out * x_scale[i]);
    }
}

template <int KIND, Flush FLUSH>
void int8_rows(const Weight &w, const int8_t *x, const float *x_scale, int64_t padded, const int32_t *x_sums, int64_t m,
               float *y, int64_t first, int64_t last) {
  constexpr int R4 = FLUSH == ONCE ? 4 : 2;  // with four rows of x; the totals of groups are in registers, too
  std::vector<float> scratch(2 * 4 * w.groups);
  const auto pass = [&](auto rows, auto many, int64_t i, int64_t from, int64_t to) {
    constexpr int R = rows, M = many;
    const auto tile = [&](auto run, int64_t row) {
      run(w, x + i * padded, x_scale + i, padded, x_sums + i * w.groups, row, scratch.data(), y + i * w.rows);
    };
    int64_t row = from;
    for (; row + R <= to; row += R) tile(int8_tile<KIND, FLUSH, R, M>, row);
    for (; row < to; row++) tile(int8_tile<KIND, FLUSH, 1, M>, row);
  };
  const int64_t chunk = m > 4 ? std::max<int64_t>(8, (1 << 18) / std::max<int64_t>(w.stride, 1) / 4 * 4) : last - first;
  for (int64_t from = first; from < last; from += chunk) {
    const int64_t to = std::min(last, from + chunk);
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) pass(std::integral_constant<int, R4>{}, std::integral_constant<int, 4>{}, i, from, to);
    for (; i < m; i++) pass(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{}, i, from, to);
  }
}

// ---- AVX-512, one row of float activations as integers ---------------------------------------------------------------

// What takes the time with one row and codes of 4 bits is making floats of them. If they are integers, VNNI multiplies
// them as they are, with x in fixed point: a number of three digits to the base 256,
//
//     x_k ≈ unit_b 2^-23 q_k        q_k = 2^16 a_k + 2^8 b_k + c_k        a, b, c = −128 … 127
//
// with a power of two as unit for each block of at most 128 columns, so that no x is further off than about 2^-23
// of the largest in its block. Sums of a block are exact: in a lane, 8 products of 15 · 128, times 2^16 + 2^8 + 1, are
// less than 2^30.
struct Digits {
  int64_t block;                   // columns: those of a group, but no more than 128
  int64_t padded;                  // columns of a plane
  std::vector<int8_t> planes;      // a, b and c: (3, padded), in the order of weights
  std::vector<float> units, sums;  // of each block; the sum of its q
};

constexpr int32_t LARGEST_DIGITS = 0x7f7f7f;  // 127, 127, 127

// Whether W is one for `digit_linear`. With one scale a row there is nothing to gain: a table is made once, and is faster.
bool in_digits(const Weight &w) {
  const bool integers = w.kind == NIBBLE && (w.is_signed || w.centre != 0);
  return integers && w.columns >= 128 && w.groups > 1 && (w.group % 128 == 0 || in_pieces(w.group));
}

// x in digits. False if there are numbers in it that are not finite, or so large that sums of them may not be.
bool write_digits(const Weight &w, const float *x, Digits &out) {
  out.block = std::min<int64_t>(w.group, 128);
  out.padded = rounded_up(w.columns, 128);
  const int64_t blocks = (w.columns + out.block - 1) / out.block;
  out.units.resize(blocks);
  out.sums.resize(blocks);
  std::vector<int8_t> planes(3 * w.columns);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * out.block, last = std::min(w.columns, first + out.block);
    float largest = 0;
    int fits = 1;
    for (int64_t k = first; k < last; k++) {
      largest = std::max(largest, std::fabs(x[k]));
      fits &= std::fabs(x[k]) <= 0x1p100f;
    }
    if (!fits) return false;
    if (largest == 0) continue;
    int exponent;
    if (std::frexp(largest, &exponent) > LARGEST_DIGITS * 0x1p-23f) exponent++;
    const double per_unit = std::ldexp(1., 23 - exponent);
    int32_t sum = 0;
    for (int64_t k = first; k < last; k++) {
      const int32_t q = int32_t(std::nearbyint(x[k] * per_unit));
      const int8_t c = int8_t(q);
      const int32_t rest = (q - c) >> 8;
      const int8_t b = int8_t(rest);
      planes[k] = int8_t((rest - b) >> 8);
      planes[w.columns + k] = b;
      planes[2 * w.columns + k] = c;
      sum += q;
    }
    out.units[block] = std::ldexp(1.f, exponent);
    out.sums[block] = float(sum);
  }
  out.planes = in_order(planes.data(), 3, w.columns, out.padded, 2);
  return true;
}

// R rows of W. Sums are 2^23 times too large until the end: a scale times 2^-23 might be too small for a float.
template <bool PIECES, int R>
void digit_tile(const Weight &w, const Digits &x, int64_t row, float *scratch, float *y) {
  const int64_t steps = x.padded / 128, full = w.stride / 64, blocks = int64_t(x.units.size());
  const int64_t pieces = PIECES ? 128 / x.block : 1, per_group = w.group / x.block;
  const __m512i flip = _mm512_set1_epi8(w.is_signed ? 8 : 0), low = _mm512_set1_epi8(15);
  float *scales = scratch;
  float *zeros = scratch + R * blocks;
  const uint8_t *codes[R];
  float off[R];
  __m512 total[R];
  for (int r = 0; r < R; r++) {
    float *scale = scales + r * blocks, *zero = zeros + r * blocks;
    row_scales(w, row + r, scale, zero);
    unsigned_zeros(w, zero);
    if (blocks > w.groups)
      for (int64_t g = w.groups - 1, b = blocks; g >= 0; g--)
        while (b > g * per_group) b--, scale[b] = scale[g], zero[b] = zero[g];
    float sum = 0;
    for (int64_t b = 0; b < blocks; b++) {
      scale[b] *= x.units[b];
      sum += scale[b] * zero[b] * x.sums[b];
    }
    off[r] = sum;
    codes[r] = w.codes + (row + r) * w.stride;
    total[r] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t s, auto partial) {
    __m512i even[R], odd[R], sum[R];
    for (int r = 0; r < R; r++) {
      const uint8_t *at = codes[r] + s * 64;
      if constexpr (R > 1) ask_for(at + R * w.stride);
      __m512i wide;
      if constexpr (partial)
        wide = _mm512_maskz_loadu_epi8((uint64_t(1) << (w.stride - s * 64)) - 1, at);
      else
        wide = _mm512_loadu_si512(at);
      constexpr int flipped_and_low = 0x28;  // (first ^ second) & third
      even[r] = _mm512_ternarylogic_epi32(wide, flip, low, flipped_and_low);
      odd[r] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(wide, 4), flip, low, flipped_and_low);
      sum[r] = _mm512_setzero_si512();
    }
    for (int digit = 0; digit < 3; digit++) {
      const int8_t *from = x.planes.data() + digit * x.padded + s * 128;
      const __m512i at_even = _mm512_loadu_si512(from), at_odd = _mm512_loadu_si512(from + 64);
      for (int r = 0; r < R; r++) {
        if (digit) sum[r] = _mm512_slli_epi32(sum[r], 8);
        sum[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum[r], even[r], at_even), odd[r], at_odd);
      }
    }
    for (int r = 0; r < R; r++) {
      const float *of = scales + r * blocks + s * pieces;
      const __m512 scale = PIECES ? lane_pieces(of, pieces, blocks - s * pieces) : _mm512_set1_ps(*of);
      total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), scale, total[r]);
    }
  };
  int64_t s = 0;
  for (; s < std::min(steps, full); s++) step(s, std::false_type{});
  for (; s < steps; s++) step(s, std::true_type{});
  for (int r = 0; r < R; r++) y[row + r] = (_mm512_reduce_add_ps(total[r]) - off[r]) * 0x1p-23f;
}

// y (rows,) = W x. False, and nothing of use in y, where numbers are too large for it; the other kernel takes them.
bool digit_linear(const Weight &w, const float *x, float *y, int64_t threads) {
  Digits digits;
  if (!write_digits(w, x, digits)) return false;
  const auto with = [&](auto pieces) {
    split(w.rows, threads, 4, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(2 * 4 * digits.units.size());
      int64_t row = first;
      for (; row + 4 <= last; row += 4) digit_tile<pieces, 4>(w, digits, row, scratch.data(), y);
      for (; row < last; row++) digit_tile<pieces, 1>(w, digits, row, scratch.data(), y);
    });
  };
  if (digits.block < 128)
    with(std::true_type{});
  else
    with(std::false_type{});
  int finite = 1;
  for (int64_t n = 0; n < w.rows; n++) finite &= std::fabs(y[n]) <= std::numeric_limits<float>::max();
  return finite;
}

#endif
#endif

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// What was compiled: 1 AVX-512, 2 VNNI.
int32_t features() { return VECTORS | VNNI << 1; }

// Whether the groups of W fall on whole lanes, in float_linear or, with `integers`, in int8_linear.
int32_t vectorised([[maybe_unused]] const Weight *w, [[maybe_unused]] int32_t integers) {
#if VNNI
  if (integers) return int8_lanes(*w);
#endif
#if VECTORS
  if (!integers) return float_lanes(*w);
#endif
  return 0;
}

// Whether one row of float x is multiplied with W in fixed point.
int32_t fixed_point([[maybe_unused]] const Weight *w) {
#if VNNI
  return in_digits(*w);
#endif
  return 0;
}

// Ask for memory in pages of 2 MiB instead of 4 KiB, of which a processor cannot keep all addresses of a matrix at hand.
// What is there stays, at the same addresses. A system that cannot says no, and all is as it was.
void use_large_pages([[maybe_unused]] const void *from, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 1 << 21;
  constexpr int collapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const uintptr_t start = reinterpret_cast<uintptr_t>(from), first = (start + page - 1) / page * page;
  const uintptr_t last = (start + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void *>(first), last - first, collapse);
#endif
}

// y (m, rows) = x (m, columns) Wᵀ
void float_linear(const Weight *weight, const float *x, int64_t m, float *y, int64_t threads) {
  Weight w = *weight;
#if VNNI
  if (m == 1 && in_digits(w) && digit_linear(w, x, y, threads)) return;
#endif
#if VECTORS
  if (float_lanes(w)) {
    const int64_t padded = rounded_up(w.columns, float_columns(w.kind));
    const bool one = w.groups == 1, lanes = w.kind == NIBBLE && !one && w.group % 128;
    const std::vector<float> inputs = in_order(x, m, w.columns, padded, w.kind == NIBBLE ? 8 : 1);
    std::vector<float> sums(lanes ? m * padded / 8 : m);
    for (int64_t i = 0; i < m; i++)
      for (int64_t k = 0; k < w.columns; k++) sums[lanes ? i * (padded / 8) + k / 8 : i] += x[i * w.columns + k];
    if (w.kind == E4M3) w.factor *= 0x1p8f;
    const auto with = [&](auto run) {
      split(w.rows, threads, 4,
            [&](int64_t first, int64_t last) { run(w, inputs.data(), padded, sums.data(), m, y, first, last); });
    };
    switch (w.kind) {
      case NIBBLE:
        return lanes ? with(float_rows<NIBBLE, LANES>) : with(float_rows<NIBBLE, TABLES>);
      case BYTE:
        return one ? with(float_rows<BYTE, AT_END>) : with(float_rows<BYTE, EACH>);
      case E5M2:
        return one ? with(float_rows<E5M2, AT_END>) : with(float_rows<E5M2, EACH>);
      default:
        return one ? with(float_rows<E4M3, AT_END>) : with(float_rows<E4M3, EACH>);
    }
  }
#endif
  split(w.rows, threads, 1, [&](int64_t first, int64_t last) { plain_float(w, x, m, y, first, last); });
}

// y (m, rows) = x_scale · (x (m, columns) Wᵀ), for BYTE and NIBBLE codes that are integers
void int8_linear(const Weight *weight, const int8_t *x, const float *x_scale, int64_t m, float *y, int64_t threads) {
  const Weight &w = *weight;
#if VNNI
  if (int8_lanes(w)) {
    const int64_t padded = rounded_up(w.columns, int8_columns(w.kind));
    const std::vector<int8_t> inputs = in_order(x, m, w.columns, padded, w.kind == NIBBLE ? 2 : 1);
    std::vector<int32_t> sums(m * w.groups);
    for (int64_t i = 0; i < m; i++)
      for (int64_t g = 0; g < w.groups; g++)
        for (int64_t k = g * w.group; k < std::min(w.columns, (g + 1) * w.group); k++)
          sums[i * w.groups + g] += x[i * w.columns + k];
    const auto with = [&](auto run) {
      split(w.rows, threads, 4, [&](int64_t first, int64_t last) {
        run(w, inputs.data(), x_scale, padded, sums.data(), m, y, first, last);
      });
    };
    const bool whole = w.group % int8_columns(w.kind) == 0;
    if (w.kind == NIBBLE)
      return w.groups == 1 ? with(int8_rows<NIBBLE, ONCE>)
             : whole       ? with(int8_rows<NIBBLE, GROUPS>)
                           : with(int8_rows<NIBBLE, PIECES>);
    return w.groups == 1 ? with(int8_rows<BYTE, ONCE>)
           : whole       ? with(int8_rows<BYTE, GROUPS>)
                         : with(int8_rows<BYTE, PIECES>);
  }
#endif
  split(w.rows, threads, 1, [&](int64_t first, int64_t last) { plain_int8(w, x, x_scale, m, y, first, last); });
}

// Rows first … last − 1 of W as float32, or as bfloat16.
void dequantize(const Weight *weight, int64_t begin, int64_t end, void *out, int32_t as_bfloat16, int64_t threads) {
  const Weight &w = *weight;
  split(end - begin, threads, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scales(w.groups), zeros(w.groups), wide(as_bfloat16 ? w.columns : 0);
    for (int64_t n = first; n < last; n++) {
      float *row = as_bfloat16 ? wide.data() : static_cast<float *>(out) + n * w.columns;
      dequantize_row(w, begin + n, scales.data(), zeros.data(), row);
      if (!as_bfloat16) continue;
      uint16_t *narrow = static_cast<uint16_t *>(out) + n * w.columns;
      for (int64_t k = 0; k < w.columns; k++) {  // round to nearest, ties to even; the numbers are finite
        uint32_t bits;
        std::memcpy(&bits, row + k, 4);
        narrow[k] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      }
    }
  });
}

// x (m, columns) → integers −127 … 127, and a scale for each row: the nearest of x / scale, ties to even.
void quantize_rows(const float *x, int64_t m, int64_t columns, int8_t *out, float *scales) {
  for (int64_t i = 0; i < m; i++) {
    const float *row = x + i * columns;
    float largest = 0, poison = 0;  // the latter becomes NaN by an infinity or NaN, which no integer can stand for
    for (int64_t k = 0; k < columns; k++) {
      largest = std::max(largest, std::fabs(row[k]));
      poison += row[k] * 0.f;
    }
    if (std::isnan(poison)) {
      scales[i] = poison;
      std::fill(out + i * columns, out + (i + 1) * columns, int8_t(0));
      continue;
    }
    const float scale = largest > 0 ? std::max(largest / 127.f, 0x1p-126f) : 1.f;
    scales[i] = scale;
    for (int64_t k = 0; k < columns; k++) out[i * columns + k] = int8_t(std::nearbyint(row[k] / scale));
  }
}
#pragma GCC visibility pop
}
