// Products of small matrices by a warp; test_tensor_cores.py compares with torch.
#include <mlsys/ptx.cuh>
#include <mma.h>

using namespace nvcuda;
using namespace mlsys;

// c = 2 · (a · b) + c: a is M x K, b K x N, in memory by rows or by columns
template <int M, int N, int K, class T, class D, bool by_rows> __device__ void product(const T *a, const T *b, D *c) {
  using layout = std::conditional_t<by_rows, wmma::row_major, wmma::col_major>;
  wmma::layout_t of_c = by_rows ? wmma::mem_row_major : wmma::mem_col_major;
  wmma::fragment<wmma::matrix_a, M, N, K, T, layout> x;
  wmma::fragment<wmma::matrix_b, M, N, K, T, layout> y;
  wmma::fragment<wmma::accumulator, M, N, K, D> z, sum;
  wmma::load_matrix_sync(x, a, by_rows ? K : M);
  wmma::load_matrix_sync(y, b, by_rows ? N : K);
  wmma::load_matrix_sync(z, c, by_rows ? N : M, of_c);
  wmma::fill_fragment(sum, 0.0f);
  wmma::mma_sync(sum, x, y, sum);
  for (int i = 0; i < z.num_elements; i++) z.x[i] += D(2.0f) * sum.x[i];
  wmma::store_matrix_sync(c, z, by_rows ? N : M, of_c);
}

__global__ void product_16_16_half(int by_rows, const __half *a, const __half *b, float *c) {
  if (by_rows) product<16, 16, 16, __half, float, true>(a, b, c);
  else product<16, 16, 16, __half, float, false>(a, b, c);
}
__global__ void product_16_16_bfloat16(int by_rows, const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) {
  if (by_rows) product<16, 16, 16, __nv_bfloat16, float, true>(a, b, c);
  else product<16, 16, 16, __nv_bfloat16, float, false>(a, b, c);
}
__global__ void product_32_8_half(int by_rows, const __half *a, const __half *b, float *c) {
  if (by_rows) product<32, 8, 16, __half, float, true>(a, b, c);
  else product<32, 8, 16, __half, float, false>(a, b, c);
}
__global__ void product_32_8_bfloat16(int by_rows, const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) {
  if (by_rows) product<32, 8, 16, __nv_bfloat16, float, true>(a, b, c);
  else product<32, 8, 16, __nv_bfloat16, float, false>(a, b, c);
}
__global__ void product_8_32_half(int by_rows, const __half *a, const __half *b, float *c) {
  if (by_rows) product<8, 32, 16, __half, float, true>(a, b, c);
  else product<8, 32, 16, __half, float, false>(a, b, c);
}
__global__ void product_8_32_bfloat16(int by_rows, const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) {
  if (by_rows) product<8, 32, 16, __nv_bfloat16, float, true>(a, b, c);
  else product<8, 32, 16, __nv_bfloat16, float, false>(a, b, c);
}
__global__ void product_in_half(int by_rows, const __half *a, const __half *b, __half *c) {
  if (by_rows) product<16, 16, 16, __half, __half, true>(a, b, c);
  else product<16, 16, 16, __half, __half, false>(a, b, c);
}

// tf32, 16 x 16 x 8
__global__ void product_tf32(const float *a, const float *b, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> y;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> z;
  wmma::load_matrix_sync(x, a, 8);
  wmma::load_matrix_sync(y, b, 16);
  for (int i = 0; i < x.num_elements; i++) x.x[i] = wmma::__float_to_tf32(x.x[i]);
  for (int i = 0; i < y.num_elements; i++) y.x[i] = wmma::__float_to_tf32(y.x[i]);
  wmma::fill_fragment(z, 0.0f);
  wmma::mma_sync(z, x, y, z);
  wmma::store_matrix_sync(c, z, 16, wmma::mem_row_major);
}

__global__ void many(int n, const __half *a, const __half *b, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> y;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> z;
  wmma::load_matrix_sync(x, a, 16);
  wmma::load_matrix_sync(y, b, 16);
  wmma::fill_fragment(z, 0.0f);
  for (int i = 0; i < n; i++) wmma::mma_sync(z, x, y, z);
  wmma::store_matrix_sync(c, z, 16, wmma::mem_row_major);
}
// The address is that of an element too far.
__global__ void crooked(const __half *a, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
  wmma::load_matrix_sync(x, a + 1, 16);
  c[threadIdx.x] = (float)x.x[0];
}
__global__ void crooked_rows(const __half *a, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
  wmma::load_matrix_sync(x, a, 17);
  c[threadIdx.x] = (float)x.x[0];
}
// Reads sixteen rows of a matrix that has fifteen.
__global__ void one_row_too_many(const __half *a, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
  wmma::load_matrix_sync(x, a, 16);
  c[threadIdx.x] = (float)x.x[0];
}
// Half a warp multiplies.
__global__ void half_a_warp(const __half *a, float *c) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> y;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> z;
  wmma::load_matrix_sync(x, a, 16);
  wmma::load_matrix_sync(y, a, 16);
  wmma::fill_fragment(z, 0.0f);
  if (threadIdx.x < 16) wmma::mma_sync(z, x, y, z);
  c[threadIdx.x] = z.x[0];
}

// mma.sync with its factors loaded by ldmatrix: d = a · b + d, a 16 x 16 by rows, b 16 x 8
template <class T> __device__ void mma(const T *a, const T *b, float *d) {
  __shared__ __align__(16) T sa[16][16], sb[16][8];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
  __syncwarp();
  unsigned x[4], y[2];
  ptx::ldmatrix(x, &sa[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_trans(y, &sb[lane % 16][0]);
  float z[4];
  int row = lane / 4, col = lane % 4 * 2;
  for (int i = 0; i < 4; i++) z[i] = d[(row + i / 2 * 8) * 8 + col + i % 2];
  ptx::mma_m16n8k16<T>(z, x, y);
  for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + col + i % 2] = z[i];
}
__global__ void mma_half(const __half *a, const __half *b, float *d) { mma(a, b, d); }
__global__ void mma_bfloat16(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *d) { mma(a, b, d); }
__global__ void mma_tf32(const float *a, const float *b, float *d) {
  int lane = threadIdx.x, row = lane / 4, col = lane % 4;
  unsigned x[4], y[2];
  for (int i = 0; i < 4; i++) x[i] = ptx::to_tf32(a[(row + i % 2 * 8) * 8 + col + i / 2 * 4]);
  for (int i = 0; i < 2; i++) y[i] = ptx::to_tf32(b[(col + i * 4) * 8 + row]);
  float z[4] = {};
  ptx::mma_m16n8k8_tf32(z, x, y);
  for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + 2 * col + i % 2] = z[i];
}
// All matrices that ldmatrix loads, as it leaves them: y[matrix][lane][2]
template <int Count, bool Trans> __device__ void matrices(const __half *x, __half *y) {
  __shared__ __align__(16) __half s[32][8];
  for (int i = threadIdx.x; i < 256; i += 32) s[i / 8][i % 8] = x[i];
  __syncwarp();
  unsigned r[Count];
  if constexpr (Trans) ptx::ldmatrix_trans(r, s[threadIdx.x]);
  else ptx::ldmatrix(r, s[threadIdx.x]);
  for (int m = 0; m < Count; m++) {
    y[m * 64 + 2 * threadIdx.x] = __ushort_as_half(r[m] & 0xffff);
    y[m * 64 + 2 * threadIdx.x + 1] = __ushort_as_half(r[m] >> 16);
  }
}
__global__ void matrices_1(int trans, const __half *x, __half *y) {
  if (trans) matrices<1, true>(x, y);
  else matrices<1, false>(x, y);
}
__global__ void matrices_2(int trans, const __half *x, __half *y) {
  if (trans) matrices<2, true>(x, y);
  else matrices<2, false>(x, y);
}
__global__ void matrices_4(int trans, const __half *x, __half *y) {
  if (trans) matrices<4, true>(x, y);
  else matrices<4, false>(x, y);
}
__global__ void ldmatrix_crooked(__half *y) {
  __shared__ __align__(16) __half s[32][12];
  unsigned r[1];
  ptx::ldmatrix(r, s[threadIdx.x % 8]);
  y[threadIdx.x] = __ushort_as_half(r[0] & 0xffff);
}
// The matrix is loaded before other lanes have written it.
__global__ void ldmatrix_too_early(const __half *x, __half *y) {
  __shared__ __align__(16) __half s[8][8];
  for (int i = threadIdx.x; i < 64; i += 32) s[i / 8][i % 8] = x[i];
  unsigned r[1];
  ptx::ldmatrix(r, s[threadIdx.x % 8]);
  y[threadIdx.x] = __ushort_as_half(r[0] & 0xffff);
}

// Warp tiles of a matrix product with rows of 128 bytes, in a swizzle of the kernel's own: no bank conflicts.
__global__ void mma_swizzled(const __half *a, float *d) {
  __shared__ __align__(128) __half s[16][64];
  int lane = threadIdx.x;
  for (int i = lane; i < 16 * 8; i += 32)
    *(uint4 *)&s[i / 8][(i % 8 ^ i / 8 % 8) * 8] = *(const uint4 *)&a[i * 8];
  __syncwarp();
  float z[2][4] = {};
  for (int k = 0; k < 4; k++) {
    unsigned x[4], y[4];
    int r = lane % 16, c = k * 2 + lane / 16;
    ptx::ldmatrix(x, &s[r][(c ^ r % 8) * 8]);
    r = lane % 8 + lane / 16 * 8, c = k * 2 + lane / 8 % 2;
    ptx::ldmatrix(y, &s[r][(c ^ r % 8) * 8]);
    for (int n = 0; n < 2; n++) {
      unsigned part[2] = {y[2 * n], y[2 * n + 1]};
      ptx::mma_m16n8k16<__half>(z[n], x, part);
    }
  }
  for (int n = 0; n < 2; n++)
    for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = z[n][i];
}
