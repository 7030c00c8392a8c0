// Rung 9 of the matmul ladder: tensor cores by their own instructions, fed by copies that nobody waits for.
//
// Changed against `wmma`:
// 1. cp.async copies from global to shared memory past the registers, while the warps multiply. Stages tiles are
//    there or on their way; each step waits for the oldest, and orders one more into the place that the step before
//    has left.
// 2. ldmatrix loads four 8 × 8 matrices an instruction into just the lanes where mma.sync wants them; the tile of B
//    lies row-major, and comes transposed.
// 3. Instead of longer rows, a swizzle: pieces of 16 bytes are moved within their row, by what row it is, so that eight
//    pieces in one column of a tile lie in different banks. No byte of shared memory is lost, which Stages tiles need.
// 4. Larger tiles, 128 × 256 a block and 64 × 64 a warp: less to move per FLOP. The 128 sums of a thread fill half of
//    its registers, so one block fills an SM; what hides the waiting is the pipeline, no longer other blocks.
// 5. Blocks that run at the same time lie in groups of rows, so that they share tiles of A and B in the L2 cache.
//
// A copy of 16 bytes has to be aligned: where k or n is no multiple of 8, the rows are not, and elements go one by one.
//
// Moves per FLOP: (1/BM + 1/BN) bytes of global memory (3/256 for 128 × 256), of shared (1/WM + 1/WN) (1/32 for
// 64 × 64).
// Look at, in `profile`: no conflict at copies nor at ldmatrix (take the swizzle out, and see); and the store of C,
// where four lanes fill 16 bytes of a row, half a sector. `hopper` stores whole ones.
//
// arch: sm_80, sm_90a
// instances: matmul_mma<128, 256, 32, 64, 64, 4, __nv_bfloat16>, matmul_mma<128, 256, 32, 64, 64, 4, float>
#include <cuda_bf16.h>
#include <mlsys/ptx.cuh>

namespace ptx = mlsys::ptx;

// Where piece `piece` (8 elements, 16 bytes) of row `row` is, in elements. 128 bytes are all banks: of shorter rows
// several share them, and only their number counts.
template <int Cols>
__device__ __forceinline__ int swizzled(int row, int piece) {
  constexpr int pieces = Cols / 8;
  return row * Cols + (piece ^ (pieces >= 8 ? row % 8 : row / (8 / pieces) % pieces)) * 8;
}

// Eight elements of row `row` of a matrix with `rows` × `cols` elements to shared memory; 0 beyond its edges.
__device__ __forceinline__ void copy8(__nv_bfloat16 *to, const __nv_bfloat16 *matrix, int rows, int cols, int row,
                                      int col) {
  int there = row < rows ? max(0, min(8, cols - col)) : 0;
  const __nv_bfloat16 *from = there ? matrix + (size_t)row * cols + col : matrix;
  if (cols % 8 == 0) {
    ptx::cp_async<16>(to, from, there * 2);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = i < there ? from[i] : __float2bfloat16(0.0f);
  }
}

__device__ __forceinline__ void put2(float *to, float x, float y) {
  *reinterpret_cast<float2 *>(to) = make_float2(x, y);
}
__device__ __forceinline__ void put2(__nv_bfloat16 *to, float x, float y) {
  *reinterpret_cast<__nv_bfloat162 *>(to) = __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ void put(float *to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16 *to, float x) { *to = __float2bfloat16(x); }

template <int BM, int BN, int BK, int WM, int WN, int Stages, class Out>
__global__ void __launch_bounds__(BM / WM *(BN / WN) * 32)
    matmul_mma(int m, int n, int k, const __nv_bfloat16 *a, const __nv_bfloat16 *b, Out *c) {
  constexpr int threads = BM / WM * (BN / WN) * 32, down = WM / 16, right = WN / 8;
  static_assert(BM % WM == 0 && BN % WN == 0, "warps fill the tile");
  static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0, "tiles are made of 16 × 16");
  static_assert(Stages >= 2, "one tile to multiply, and one on its way");
  extern __shared__ __align__(128) __nv_bfloat16 tiles[];  // Stages × (BM × BK of A, BK × BN of B)

  // Blocks are numbered down a group of 16 rows of tiles, then along the next column of it.
  constexpr int group = 16;
  int tiles_m = (m + BM - 1) / BM, tiles_n = (n + BN - 1) / BN;
  int first_tile = blockIdx.x / (group * tiles_n) * group, rows = min(tiles_m - first_tile, group);
  int within = blockIdx.x % (group * tiles_n);
  int first_row = (first_tile + within % rows) * BM, first_col = within / rows * BN;

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int y = warp / (BN / WN) * WM, x = warp % (BN / WN) * WN;  // first element of this warp, in the tile
  int steps = (k + BK - 1) / BK;
  float sum[down][right][4] = {};

  auto order = [&](int step) {
    if (step < steps) {
      __nv_bfloat16 *a_tile = tiles + step % Stages * (BM + BN) * BK, *b_tile = a_tile + BM * BK;
#pragma unroll
      for (int i = threadIdx.x; i < BM * BK / 8; i += threads) {
        int row = i / (BK / 8), piece = i % (BK / 8);
        copy8(a_tile + swizzled<BK>(row, piece), a, m, k, first_row + row, step * BK + piece * 8);
      }
#pragma unroll
      for (int i = threadIdx.x; i < BK * BN / 8; i += threads) {
        int row = i / (BN / 8), piece = i % (BN / 8);
        copy8(b_tile + swizzled<BN>(row, piece), b, k, n, step * BK + row, first_col + piece * 8);
      }
    }
    ptx::cp_async_commit();  // a group for each step, an empty one at the end, so that waiting can count
  };

#pragma unroll
  for (int step = 0; step < Stages - 1; step++) order(step);
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<Stages - 2>();  // this thread's part of the tile is there,
    __syncthreads();                   // everyone's is, and everyone has left the tile of the step before
    order(step + Stages - 1);
    const __nv_bfloat16 *a_tile = tiles + step % Stages * (BM + BN) * BK, *b_tile = a_tile + BM * BK;
#pragma unroll
    for (int i = 0; i < BK; i += 16) {
      unsigned a_part[down][4], b_part[right / 2][4];  // of b: two neighbouring 16 × 8 at a time
#pragma unroll
      for (int r = 0; r < down; r++)
        ptx::ldmatrix<4>(a_part[r], a_tile + swizzled<BK>(y + r * 16 + lane % 16, i / 8 + lane / 16));
#pragma unroll
      for (int s = 0; s < right / 2; s++)
        ptx::ldmatrix_trans<4>(b_part[s], b_tile + swizzled<BN>(i + lane % 16, x / 8 + s * 2 + lane / 16));
#pragma unroll
      for (int r = 0; r < down; r++)
#pragma unroll
        for (int s = 0; s < right; s++) {
          unsigned b_half[2] = {b_part[s / 2][s % 2 * 2], b_part[s / 2][s % 2 * 2 + 1]};
          ptx::mma_m16n8k16<__nv_bfloat16>(sum[r][s], a_part[r], b_half);
        }
    }
  }

#pragma unroll
  for (int r = 0; r < down; r++)
#pragma unroll
    for (int s = 0; s < right; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = first_row + y + r * 16 + half * 8 + lane / 4, col = first_col + x + s * 8 + lane % 4 * 2;
        Out *to = c + (size_t)row * n + col;
        float first = sum[r][s][half * 2], second = sum[r][s][half * 2 + 1];
        if (row >= m || col >= n) continue;
        if (n % 2 == 0) {
          put2(to, first, second);
        } else {
          put(to, first);
          if (col + 1 < n) put(to + 1, second);
        }
      }
}
