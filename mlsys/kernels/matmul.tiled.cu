// Rung 3 of the matmul ladder: what a block reads, it keeps in shared memory.
//
// Changed against `coalesced`: the T × T threads of a block compute a T × T tile of C together. They walk along k in
// steps of T; at each step every thread loads one element of A and one of B into shared memory, and reads 2 · T from
// there. So each element that is loaded serves T threads.
//
// Two barriers a step. The first: nobody reads a tile before all have written it. The second: nobody overwrites it
// before all have read it. What lies beyond the edge is loaded as 0, which adds nothing to a sum; no thread may leave
// early, since the others count on its loads and on its arrival at the barriers.
//
// Moves per FLOP: 4 / T bytes of global memory, 1/8 for T = 32; shared memory now takes the 4 bytes a FLOP.
// Look at, in `profile`: sectors fall by T, and the line of the products reads shared memory without a conflict: a
// row of b_tile is 32 banks, and an element of a_tile is read by the whole warp at once.
//
// instances: matmul_tiled<32>, matmul_tiled<16>
template <int T>
__global__ void __launch_bounds__(T *T) matmul_tiled(int m, int n, int k, const float *a, const float *b, float *c) {
  __shared__ float a_tile[T][T], b_tile[T][T];
  int x = threadIdx.x, y = threadIdx.y;
  int row = blockIdx.y * T + y, col = blockIdx.x * T + x;
  float sum = 0.0f;
  for (int first = 0; first < k; first += T) {
    a_tile[y][x] = row < m && first + x < k ? a[(size_t)row * k + first + x] : 0.0f;
    b_tile[y][x] = first + y < k && col < n ? b[(size_t)(first + y) * n + col] : 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T; i++) sum += a_tile[y][i] * b_tile[i][x];
    __syncthreads();
  }
  if (row < m && col < n) c[(size_t)row * n + col] = sum;
}
