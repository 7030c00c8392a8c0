// Rung 7 of the matmul ladder: a tile for each warp, and the next tile is on its way while this one is multiplied.
//
// Changed against `vectorized`:
// 1. Between block and thread stands the warp, with WM × WN elements of its own. Its lanes lie 4 × 8, each with
//    pieces of 4 × 4 that repeat every 16 rows and 32 columns: eight neighbouring lanes read eight neighbouring
//    float4 of B, which are all 32 banks once, and store eight neighbouring float4 of C, which are four full sectors.
// 2. A warp that spans a 64 × 64 square needs 128 numbers of shared memory a step for 4,096 products; a strip of 128
//    × 32 would need 160. So the tile of a warp should be as square as that of a block.
// 3. The transposed tile of A is swizzled: the rows that one warp stores at a time go to different banks.
// 4. Two buffers. The loads of the next step are issued before the products of this one, into registers, and stored
//    after them: their way from memory takes no time of its own. That leaves one barrier a step instead of two.
//
// Moves per FLOP: 2 · (1/BM + 1/BN) bytes of global memory, as before; of shared memory 2 · (1/WM + 1/WN), counted
// once for a warp (1/16 for 64 × 64).
// Look at, in `profile`: no bank conflict is left, at any line; in the report of `mlsys.kernels.cuda.compile_report`,
// registers: 128 sums, the fragments and the next step's loads have to fit in 255 without a spill.
//
// instances: matmul_warp_tiled<128, 128, 16, 64, 64, true>, matmul_warp_tiled<128, 128, 16, 64, 64, false>

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

// Where row `row` of A lies in line i of the transposed tile. The 32 lanes of a warp store 128 / BK rows at a time, and
// BK / 4 lanes hold parts of the same row: those go 128 / BK banks apart. Groups of four rows stay together, as float4.
template <int BK>
__device__ __forceinline__ constexpr int swizzled(int i, int row) {
  return row ^ (i / 4 * (128 / BK));
}

template <int BM, int BN, int BK, int WM, int WN, bool Whole>
__global__ void __launch_bounds__(BM / WM *(BN / WN) * 32)
    matmul_warp_tiled(int m, int n, int k, const float *a, const float *b, float *c) {
  constexpr int threads = BM / WM * (BN / WN) * 32;
  constexpr int a_loads = BM * BK / 4 / threads, b_loads = BK * BN / 4 / threads;  // float4 a thread and step
  constexpr int down = WM / 16, right = WN / 32;                                   // pieces of a thread
  static_assert(a_loads * threads * 4 == BM * BK && b_loads * threads * 4 == BK * BN, "all threads load equally much");
  static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 32 == 0, "warps and pieces fill their tiles");
  static_assert((BK == 8 || BK == 16) && BM % 32 == 0, "a swizzled row stays in its tile");
  __shared__ __align__(16) float a_tile[2][BK][BM], b_tile[2][BK][BN];
  int first_row = blockIdx.y * BM, first_col = blockIdx.x * BN;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int y = warp / (BN / WN) * WM + lane / 8 * 4;  // first element of this thread's first piece, in the tile
  int x = warp % (BN / WN) * WN + lane % 8 * 4;
  float4 a_next[a_loads], b_next[b_loads];
  float sum[down * 4][right * 4] = {};

  auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < a_loads; i++) {
      int at = threadIdx.x + i * threads;
      a_next[i] = load4<Whole>(a, m, k, first_row + at / (BK / 4), first + at % (BK / 4) * 4);
    }
#pragma unroll
    for (int i = 0; i < b_loads; i++) {
      int at = threadIdx.x + i * threads;
      b_next[i] = load4<Whole>(b, k, n, first + at / (BN / 4), first_col + at % (BN / 4) * 4);
    }
  };
  auto keep = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < a_loads; i++) {
      int at = threadIdx.x + i * threads, row = at / (BK / 4), col = at % (BK / 4) * 4;
      int to = swizzled<BK>(col, row);
      a_tile[buffer][col][to] = a_next[i].x;
      a_tile[buffer][col + 1][to] = a_next[i].y;
      a_tile[buffer][col + 2][to] = a_next[i].z;
      a_tile[buffer][col + 3][to] = a_next[i].w;
    }
#pragma unroll
    for (int i = 0; i < b_loads; i++) {
      int at = threadIdx.x + i * threads;
      *reinterpret_cast<float4 *>(&b_tile[buffer][at / (BN / 4)][at % (BN / 4) * 4]) = b_next[i];
    }
  };
  auto multiply = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < BK; i++) {
      __align__(16) float a_part[down * 4], b_part[right * 4];
#pragma unroll
      for (int p = 0; p < down; p++)
        *reinterpret_cast<float4 *>(&a_part[p * 4]) =
            *reinterpret_cast<const float4 *>(&a_tile[buffer][i][swizzled<BK>(i, y + p * 16)]);
#pragma unroll
      for (int q = 0; q < right; q++)
        *reinterpret_cast<float4 *>(&b_part[q * 4]) = *reinterpret_cast<const float4 *>(&b_tile[buffer][i][x + q * 32]);
#pragma unroll
      for (int r = 0; r < down * 4; r++)
#pragma unroll
        for (int s = 0; s < right * 4; s++) sum[r][s] += a_part[r] * b_part[s];
    }
  };

  fetch(0);
  keep(0);
  __syncthreads();
  for (int first = 0, buffer = 0; first < k; first += BK, buffer ^= 1) {
    bool more = first + BK < k;
    if (more) fetch(first + BK);
    multiply(buffer);
    if (more) keep(buffer ^ 1);
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < down * 4; r++)
#pragma unroll
    for (int q = 0; q < right; q++)
      store4<Whole>(c, m, n, first_row + y + r / 4 * 16 + r % 4, first_col + x + q * 32,
                    make_float4(sum[r][q * 4], sum[r][q * 4 + 1], sum[r][q * 4 + 2], sum[r][q * 4 + 3]));
}
