// Rung 6 of the matmul ladder: four floats an instruction, from global memory and from shared.
//
// Changed against `tiled_2d`: loads and stores of float4, and the tile of A lies transposed in shared memory, so that
// the TM elements that a thread needs of one column of A are neighbours and come as float4 too. A quarter of the
// instructions move the same bytes; the instructions that are saved are free for multiply-adds.
//
// A float4 has to be aligned to 16 bytes, and where k or n is no multiple of 4 most rows are not. `load4` and
// `store4` then go element by element, as they do at an edge. With `Whole` (m, n and k are multiples of the tile)
// there is nothing to ask.
//
// Moves per FLOP: as `tiled_2d`, in a quarter of the instructions; C is stored in 2 times the sectors it fills, not
// in 8.
// Look at, in `profile`: requests, a quarter; the stores into a_tile, which meet in pairs since two threads hold
// parts of one row of A 4 · BM floats apart, in the same bank; the reads of b_tile, in pairs as well.
//
// instances: matmul_vectorized<128, 128, 8, 8, 8, true>, matmul_vectorized<128, 128, 8, 8, 8, false>

// Four elements of row `row` of a matrix with `rows` × `cols` elements; 0 beyond its edges.
template <bool Whole>
__device__ __forceinline__ float4 load4(const float *matrix, int rows, int cols, int row, int col) {
  const float *from = matrix + (size_t)row * cols + col;
  if (Whole) return *reinterpret_cast<const float4 *>(from);
  if (row >= rows || col >= cols) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (cols % 4 == 0) return *reinterpret_cast<const float4 *>(from);
  return make_float4(from[0], col + 1 < cols ? from[1] : 0.0f, col + 2 < cols ? from[2] : 0.0f,
                     col + 3 < cols ? from[3] : 0.0f);
}

template <bool Whole>
__device__ __forceinline__ void store4(float *matrix, int rows, int cols, int row, int col, float4 v) {
  float *to = matrix + (size_t)row * cols + col;
  if (Whole || (row < rows && col < cols && cols % 4 == 0)) {
    *reinterpret_cast<float4 *>(to) = v;
  } else if (row < rows) {
    if (col < cols) to[0] = v.x;
    if (col + 1 < cols) to[1] = v.y;
    if (col + 2 < cols) to[2] = v.z;
    if (col + 3 < cols) to[3] = v.w;
  }
}

template <int BM, int BN, int BK, int TM, int TN, bool Whole>
__global__ void __launch_bounds__(BM *BN / (TM * TN))
    matmul_vectorized(int m, int n, int k, const float *a, const float *b, float *c) {
  constexpr int threads = BM * BN / (TM * TN);
  static_assert(BK % 4 == 0 && BM % TM == 0 && BN % TN == 0 && TM % 4 == 0 && TN % 4 == 0, "tiles are made of float4");
  __shared__ __align__(16) float a_tile[BK][BM], b_tile[BK][BN];  // a_tile transposed: k first
  int x = threadIdx.x % (BN / TN) * TN, y = threadIdx.x / (BN / TN) * TM;
  int first_row = blockIdx.y * BM, first_col = blockIdx.x * BN;
  float sum[TM][TN] = {};
  for (int first = 0; first < k; first += BK) {
#pragma unroll
    for (int i = threadIdx.x; i < BM * BK / 4; i += threads) {
      int row = i / (BK / 4), col = i % (BK / 4) * 4;
      float4 v = load4<Whole>(a, m, k, first_row + row, first + col);
      a_tile[col][row] = v.x;
      a_tile[col + 1][row] = v.y;
      a_tile[col + 2][row] = v.z;
      a_tile[col + 3][row] = v.w;
    }
#pragma unroll
    for (int i = threadIdx.x; i < BK * BN / 4; i += threads) {
      int row = i / (BN / 4), col = i % (BN / 4) * 4;
      *reinterpret_cast<float4 *>(&b_tile[row][col]) = load4<Whole>(b, k, n, first + row, first_col + col);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BK; i++) {
      __align__(16) float a_part[TM], b_part[TN];
#pragma unroll
      for (int r = 0; r < TM; r += 4)
        *reinterpret_cast<float4 *>(&a_part[r]) = *reinterpret_cast<const float4 *>(&a_tile[i][y + r]);
#pragma unroll
      for (int s = 0; s < TN; s += 4)
        *reinterpret_cast<float4 *>(&b_part[s]) = *reinterpret_cast<const float4 *>(&b_tile[i][x + s]);
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
    for (int s = 0; s < TN; s += 4)
      store4<Whole>(c, m, n, first_row + y + r, first_col + x + s,
                    make_float4(sum[r][s], sum[r][s + 1], sum[r][s + 2], sum[r][s + 3]));
}
