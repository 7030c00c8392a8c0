// Rung 2 of the matmul ladder: neighbouring threads take neighbouring columns.
//
// Changed against `naive`: thread x computes column x of C instead of row x, nothing else. The 32 threads of a warp
// now read 32 neighbouring floats of B, which are 4 sectors, and all the same float of A, which is one; they store 4
// sectors.
//
// Moves per FLOP: 4 bytes are still asked for, but 5 sectors serve a warp's 64 FLOPs where 33 did.
// Look at, in `profile`: the same two lines as before, now with as many sectors as there are bytes to move.
//
// instances: matmul_coalesced
__global__ void matmul_coalesced(int m, int n, int k, const float *a, const float *b, float *c) {
  int col = blockIdx.x * blockDim.x + threadIdx.x;
  int row = blockIdx.y * blockDim.y + threadIdx.y;
  if (row >= m || col >= n) return;
  float sum = 0.0f;
  for (int i = 0; i < k; i++) sum += a[(size_t)row * k + i] * b[(size_t)i * n + col];
  c[(size_t)row * n + col] = sum;
}
