// Rung 1 of the matmul ladder: C = A · B, one thread an element, as the formula says.
//
// A is m × k, B is k × n, C is m × n, all float and row-major. Thread x computes row x of C: the most natural choice,
// and the worst. The 32 threads of a warp then stand in one column of C and in 32 rows of A, so that each load of A
// is 32 addresses that lie k floats apart: 32 sectors of 32 bytes to use 4 bytes of each.
//
// Moves per FLOP: 2 floats for 2 FLOPs, 4 bytes, all of it asked of the memory system; caches are the only help.
// Look at, in `profile`: the load of A and the store of C, 32 sectors a request where 4 would do.
//
// instances: matmul_naive
__global__ void matmul_naive(int m, int n, int k, const float *a, const float *b, float *c) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  int col = blockIdx.y * blockDim.y + threadIdx.y;
  if (row >= m || col >= n) return;
  float sum = 0.0f;
  for (int i = 0; i < k; i++) sum += a[(size_t)row * k + i] * b[(size_t)i * n + col];
  c[(size_t)row * n + col] = sum;
}
