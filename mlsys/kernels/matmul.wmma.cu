// Rung 8 of the matmul ladder: tensor cores, by the portable way. Now bfloat16 in, sums in float, Out (bfloat16 or
// float) out.
//
// Changed against `warp_tiled`: no thread multiplies any more. A warp holds 16 × 16 pieces of A, B and C in
// fragments, spread over its registers in a way that is nobody's business, and one call multiplies two of them: 8,192
// FLOPs. An SM does 16 times as many of these as of ordinary float FLOPs, so that it has to be fed 16 times as fast;
// half the bytes an element are only part of that. This rung does not keep up, and that is its lesson: load, barrier,
// multiply, barrier.
//
// Rows of the tiles are 8 elements longer than needed, so that the 16 rows of a fragment do not all begin in one bank.
// wmma stores a fragment of C to any memory, but only whole and aligned, so each goes through shared memory on its way.
//
// Moves per FLOP: (1/BM + 1/BN) bytes of global memory, half of float's (1/64 for 128 × 128).
// Look at, in `profile`: requests of shared memory, now by whole fragments; the store of C, which passes through it.
//
// arch: sm_80, sm_90a
// instances: matmul_wmma<128, 128, 32, 32, 64, __nv_bfloat16>, matmul_wmma<128, 128, 32, 32, 64, float>
#include <cuda_bf16.h>
#include <mma.h>

using namespace nvcuda;

// Eight elements of row `row` of a matrix with `rows` × `cols` elements; 0 beyond its edges.
__device__ __forceinline__ uint4 load8(const __nv_bfloat16 *matrix, int rows, int cols, int row, int col) {
  const __nv_bfloat16 *from = matrix + (size_t)row * cols + col;
  if (row >= rows || col >= cols) return make_uint4(0, 0, 0, 0);
  if (cols % 8 == 0) return *reinterpret_cast<const uint4 *>(from);
  __align__(16) __nv_bfloat16 v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = col + i < cols ? from[i] : __float2bfloat16(0.0f);
  return *reinterpret_cast<const uint4 *>(v);
}

__device__ __forceinline__ void put(float *to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16 *to, float x) { *to = __float2bfloat16(x); }

template <int BM, int BN, int BK, int WM, int WN, class Out>
__global__ void __launch_bounds__(BM / WM *(BN / WN) * 32)
    matmul_wmma(int m, int n, int k, const __nv_bfloat16 *a, const __nv_bfloat16 *b, Out *c) {
  constexpr int warps = BM / WM * (BN / WN), threads = warps * 32, down = WM / 16, right = WN / 16;
  static_assert(BM % WM == 0 && BN % WN == 0, "warps fill the tile");
  static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0, "tiles are made of 16 × 16");
  __shared__ __align__(32) __nv_bfloat16 a_tile[BM][BK + 8], b_tile[BK][BN + 8];
  __shared__ __align__(32) float c_piece[warps][16][16];
  int first_row = blockIdx.y * BM, first_col = blockIdx.x * BN;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int y = warp / (BN / WN) * WM, x = warp % (BN / WN) * WN;  // first element of this warp, in the tile
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[down][right];
#pragma unroll
  for (int r = 0; r < down; r++)
#pragma unroll
    for (int s = 0; s < right; s++) wmma::fill_fragment(sum[r][s], 0.0f);

  for (int first = 0; first < k; first += BK) {
    for (int i = threadIdx.x; i < BM * BK / 8; i += threads) {
      int row = i / (BK / 8), col = i % (BK / 8) * 8;
      *reinterpret_cast<uint4 *>(&a_tile[row][col]) = load8(a, m, k, first_row + row, first + col);
    }
    for (int i = threadIdx.x; i < BK * BN / 8; i += threads) {
      int row = i / (BN / 8), col = i % (BN / 8) * 8;
      *reinterpret_cast<uint4 *>(&b_tile[row][col]) = load8(b, k, n, first + row, first_col + col);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BK; i += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> a_part[down];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major> b_part[right];
#pragma unroll
      for (int r = 0; r < down; r++) wmma::load_matrix_sync(a_part[r], &a_tile[y + r * 16][i], BK + 8);
#pragma unroll
      for (int s = 0; s < right; s++) wmma::load_matrix_sync(b_part[s], &b_tile[i][x + s * 16], BN + 8);
#pragma unroll
      for (int r = 0; r < down; r++)
#pragma unroll
        for (int s = 0; s < right; s++) wmma::mma_sync(sum[r][s], a_part[r], b_part[s], sum[r][s]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < down; r++)
#pragma unroll
    for (int s = 0; s < right; s++) {
      wmma::store_matrix_sync(&c_piece[warp][0][0], sum[r][s], 16, wmma::mem_row_major);
      __syncwarp();
      for (int i = lane; i < 256; i += 32) {
        int row = first_row + y + r * 16 + i / 16, col = first_col + x + s * 16 + i % 16;
        if (row < m && col < n) put(&c[(size_t)row * n + col], c_piece[warp][i / 16][i % 16]);
      }
      __syncwarp();
    }
}
