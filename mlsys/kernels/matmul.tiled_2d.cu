// Rung 5 of the matmul ladder: a thread computes TM × TN elements, an outer product at a time.
//
// Changed against `tiled_1d`: a square of sums instead of a column. For each step along k a thread reads TM elements
// of A and TN of B into registers, and multiplies all with all: 16 reads for 64 multiply-adds where TM = TN = 8,
// instead of 72. Fewer threads with more work each: registers, the fastest memory of all, now hold what is used again
// and again.
//
// Moves per FLOP: 2 · (1/BM + 1/BN) bytes of global memory (1/32 for 128 × 128), 2 · (1/TM + 1/TN) of shared (1/2).
// Look at, in `profile`: neighbouring threads are TN floats apart, and it shows twice. At the read of b_tile, where
// the 16 of a row use but 4 of the 32 banks; and at the store of C, 32 sectors a request where 4 would do.
// `vectorized` mends a part of both, and `warp_tiled` all of it.
//
// instances: matmul_tiled_2d<128, 128, 8, 8, 8>, matmul_tiled_2d<32, 32, 8, 4, 4>
template <int BM, int BN, int BK, int TM, int TN>
__global__ void __launch_bounds__(BM *BN / (TM * TN), 2)
    matmul_tiled_2d(int m, int n, int k, const float *a, const float *b, float *c) {
  constexpr int threads = BM * BN / (TM * TN);
  static_assert(BM % TM == 0 && BN % TN == 0, "the elements of a thread are in one tile");
  __shared__ float a_tile[BM][BK], b_tile[BK][BN];
  int x = threadIdx.x % (BN / TN) * TN, y = threadIdx.x / (BN / TN) * TM;  // first element of this thread, in the tile
  int first_row = blockIdx.y * BM, first_col = blockIdx.x * BN;
  float sum[TM][TN] = {};
  for (int first = 0; first < k; first += BK) {
    for (int i = threadIdx.x; i < BM * BK; i += threads) {
      int row = first_row + i / BK, col = first + i % BK;
      a_tile[i / BK][i % BK] = row < m && col < k ? a[(size_t)row * k + col] : 0.0f;
    }
    for (int i = threadIdx.x; i < BK * BN; i += threads) {
      int row = first + i / BN, col = first_col + i % BN;
      b_tile[i / BN][i % BN] = row < k && col < n ? b[(size_t)row * n + col] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BK; i++) {
      float a_part[TM], b_part[TN];
#pragma unroll
      for (int r = 0; r < TM; r++) a_part[r] = a_tile[y + r][i];
#pragma unroll
      for (int s = 0; s < TN; s++) b_part[s] = b_tile[i][x + s];
#pragma unroll
      for (int r = 0; r < TM; r++)
#pragma unroll
        for (int s = 0; s < TN; s++) sum[r][s] += a_part[r] * b_part[s];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < TM; r++)
#pragma unroll
    for (int s = 0; s < TN; s++) {
      int row = first_row + y + r, col = first_col + x + s;
      if (row < m && col < n) c[(size_t)row * n + col] = sum[r][s];
    }
}
