// nvcuda::wmma: a warp's product of small matrices, of which each lane holds a part.
//
// Which lane holds what is nobody's business in CUDA either. Here lane l holds elements l·n … l·n + n − 1 of the tile,
// counted along its rows. Products and sums are floats; a sum of half is rounded once a call.
#pragma once
#include "mlsys_half.h"

namespace mlsys {
// This lane's operands, those of the other lanes come by themselves; d may be c.
void wmma_product(int m, int n, int k, Format factors, Format sum, const void *a, const void *b, const void *c, void *d,
                  const char *file, int line);
void kernel_access(const void *p, unsigned bytes, int kind, const void *pc);
void need_aligned(const void *p, unsigned alignment, const char *what, const char *file, int line);
}  // namespace mlsys

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32;
}

template <class T>
struct element {
  using type = T;
  static constexpr mlsys::Format format = mlsys::Format::float32;
};
template <>
struct element<__half> {
  using type = __half;
  static constexpr mlsys::Format format = mlsys::Format::half;
};
template <>
struct element<__nv_bfloat16> {
  using type = __nv_bfloat16;
  static constexpr mlsys::Format format = mlsys::Format::bfloat16;
};
template <>
struct element<precision::tf32> {
  using type = float;
  static constexpr mlsys::Format format = mlsys::Format::tf32;
};

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  using element_type = typename element<T>::type;
  static constexpr bool is_factor = !std::is_same_v<Use, accumulator>;
  static constexpr bool tf32 = std::is_same_v<T, precision::tf32>;
  static_assert((M == 16 && N == 16 && K == (tf32 || std::is_same_v<T, float> ? K : 16)) ||
                    (K == 16 && ((M == 32 && N == 8) || (M == 8 && N == 32))),
                "wmma has the shapes 16x16x16, 32x8x16 and 8x32x16, and 16x16x8 for tf32");
  static_assert(K == 16 || K == 8, "wmma has K = 16, and K = 8 for tf32");
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M, cols = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = rows * cols / 32, num_storage_elements = num_elements;
  element_type x[num_elements];
};

inline float __float_to_tf32(float x) { return mlsys::float_to_tf32(x); }

template <class U, int M, int N, int K, class T, class L>
__forceinline__ void fill_fragment(fragment<U, M, N, K, T, L> &f, const typename element<T>::type &v) {
  for (int i = 0; i < f.num_elements; i++) f.x[i] = v;
}

// A lane's elements lie side by side along a row; in memory they do so if that is row-major.
template <class F, class T>
MLSYS_RAW inline void walk(const F &, T *p, unsigned ld, bool by_rows, T **at, unsigned &step) {
  unsigned first = mlsys::lane() * F::num_elements, r = first / F::cols, c = first % F::cols;
  *at = by_rows ? p + (size_t)r * ld + c : p + (size_t)c * ld + r;
  step = by_rows ? 1 : ld;
}

#ifdef MLSYS_CHECK
template <class T>
MLSYS_RAW inline void check(const T *p, unsigned ldm, const char *what, const char *file, int line) {
  mlsys::need_aligned(p, 32, what, file, line);
  if (ldm * sizeof(T) % 16) mlsys::fail("ldm has to be a multiple of 16 bytes", file, line);
}
// Which bytes each lane touches as a GPU's code does, not as this header does: bank conflicts depend on it. Factors of 16
// bits come by ldmatrix, a lane for each row of eight; a sum's lane 4g + j has two columns, 2j and the next, of row g in
// each 8 × 8 block.
template <class F, class T>
MLSYS_RAW inline void tell(const T *p, unsigned ld, bool by_rows, int kind, const void *pc) {
  const int lane = mlsys::lane(), rows = by_rows ? F::rows : F::cols, cols = by_rows ? F::cols : F::rows;  // in memory
  if (F::is_factor && sizeof(T) == 2) {
    for (int n = lane; n < rows * cols / 8; n += 32)
      mlsys::kernel_access(p + (size_t)(n % rows) * ld + n / rows * 8, 16, kind, pc);
    return;
  }
  for (int r = lane / 4; r < F::rows; r += 8)
    for (int c = lane % 4 * 2; c < F::cols; c += 8) {
      if (by_rows)
        mlsys::kernel_access(p + (size_t)r * ld + c, 2 * sizeof(T), kind, pc);
      else
        for (int e = 0; e < 2; e++) mlsys::kernel_access(p + (size_t)(c + e) * ld + r, sizeof(T), kind, pc);
    }
}
#else
template <class T>
inline void check(const T *, unsigned, const char *, const char *, int) {}
template <class F, class T>
inline void tell(const T *, unsigned, bool, int, const void *) {}
#endif

// No lane waits for another here: what another lane has written needs a __syncwarp() on a GPU too.
template <class F, class T>
MLSYS_OP void load(F &f, const T *p, unsigned ldm, bool by_rows) {
  const T *at;
  unsigned step;
  walk(f, p, ldm, by_rows, &at, step);
  tell<F>(p, ldm, by_rows, 0, __builtin_return_address(0));
  for (int i = 0; i < F::num_elements; i++) __builtin_memcpy(&f.x[i], at + (size_t)i * step, sizeof(T));
}
template <class F, class T>
MLSYS_OP void store(const F &f, T *p, unsigned ldm, bool by_rows) {
  T *at;
  unsigned step;
  walk(f, p, ldm, by_rows, &at, step);
  tell<F>((const T *)p, ldm, by_rows, 1, __builtin_return_address(0));
  for (int i = 0; i < F::num_elements; i++) __builtin_memcpy((void *)(at + (size_t)i * step), &f.x[i], sizeof(T));
}

template <class U, int M, int N, int K, class T, class L>
__forceinline__ void load_matrix_sync(fragment<U, M, N, K, T, L> &f, const typename element<T>::type *p, unsigned ldm,
                                      MLSYS_AT) {
  static_assert(!std::is_void_v<L>,
                "load_matrix_sync of an accumulator needs a layout: mem_row_major or mem_col_major");
  check(p, ldm, "load_matrix_sync", file, line);
  load(f, p, ldm, std::is_same_v<L, row_major>);
}
template <int M, int N, int K, class T>
__forceinline__ void load_matrix_sync(fragment<accumulator, M, N, K, T> &f, const T *p, unsigned ldm, layout_t layout,
                                      MLSYS_AT) {
  check(p, ldm, "load_matrix_sync", file, line);
  load(f, p, ldm, layout == mem_row_major);
}
template <int M, int N, int K, class T>
__forceinline__ void store_matrix_sync(T *p, const fragment<accumulator, M, N, K, T> &f, unsigned ldm, layout_t layout,
                                       MLSYS_AT) {
  check(p, ldm, "store_matrix_sync", file, line);
  store(f, p, ldm, layout == mem_row_major);
}

// d = a · b + c
template <int M, int N, int K, class D, class A, class B, class LA, class LB, class C>
__forceinline__ void mma_sync(fragment<accumulator, M, N, K, D> &d, const fragment<matrix_a, M, N, K, A, LA> &a,
                              const fragment<matrix_b, M, N, K, B, LB> &b, const fragment<accumulator, M, N, K, C> &c,
                              MLSYS_AT) {
  static_assert(std::is_same_v<A, B>, "mma_sync: both factors have the same type");
  static_assert(std::is_same_v<C, D>, "mma_sync: the sum before and after has the same type");
  mlsys::wmma_product(M, N, K, element<A>::format, element<D>::format, a.x, b.x, c.x, d.x, file, line);
}

}  // namespace wmma
}  // namespace nvcuda
