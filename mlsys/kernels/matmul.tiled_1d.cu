// Rung 4 of the matmul ladder: a thread computes a column of TM elements, so that shared memory is asked less often.
//
// Changed against `tiled`: there two reads of shared memory fed one multiply-add, and shared memory was the limit.
// Here a thread holds TM sums in registers. For each step along k it reads one element of B, and uses it TM times.
// The tile of C is BM × BN, larger than before with as many threads; the step BK is short, so that both tiles stay
// small.
//
// Moves per FLOP: 2 · (1/BM + 1/BN) bytes of global memory (1/16 for 64 × 64); of shared memory 2 · (1 + 1/TM) bytes
// instead of 4, of which the reads of A are one address for the whole warp.
// Look at, in `profile`: requests to shared memory per multiply-add, 9/8 where there were 2.
//
// instances: matmul_tiled_1d<64, 64, 8, 8>, matmul_tiled_1d<32, 32, 8, 4>
template <int BM, int BN, int BK, int TM>
__global__ void __launch_bounds__(BM *BN / TM)
    matmul_tiled_1d(int m, int n, int k, const float *a, const float *b, float *c) {
  constexpr int threads = BM * BN / TM;
  static_assert(BM % TM == 0 && BN % 32 == 0, "a thread's rows are in one tile, a warp's columns in one row");
  __shared__ float a_tile[BM][BK], b_tile[BK][BN];
  int x = threadIdx.x % BN, y = threadIdx.x / BN * TM;  // first element of this thread, in the tile
  int first_row = blockIdx.y * BM, first_col = blockIdx.x * BN;
  float sum[TM] = {};
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
      float factor = b_tile[i][x];
#pragma unroll
      for (int r = 0; r < TM; r++) sum[r] += a_tile[y + r][i] * factor;
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < TM; r++) {
    int row = first_row + y + r, col = first_col + x;
    if (row < m && col < n) c[(size_t)row * n + col] = sum[r];
  }
}
