// Right numbers, moved badly, each beside its better twin: `name_wrong` and `name`. The profile shows them.
//
// A comment MISTAKE with a kind stands on each line that moves more than it has to.

// --- y = 2 x for a matrix --------------------------------------------------------------------------------------------

__global__ void scale(const float *x, float *y, int rows, int cols) {
  int col = blockIdx.x * 32 + threadIdx.x;
  int row = blockIdx.y * 8 + threadIdx.y;
  if (row < rows && col < cols)
    y[row * cols + col] = 2.0f * x[row * cols + col];
}

// Neighbours in a warp are a row apart: 32 sectors a request, of each of which 4 bytes are used.
__global__ void scale_wrong(const float *x, float *y, int rows, int cols) {
  int row = blockIdx.x * 32 + threadIdx.x;
  int col = blockIdx.y * 8 + threadIdx.y;
  if (row < rows && col < cols)
    y[row * cols + col] = 2.0f * x[row * cols + col];  // MISTAKE uncoalesced
}

// --- out(col, row) = in(row, col) ------------------------------------------------------------------------------------

__global__ void transpose(const float *in, float *out, int n) {
  __shared__ float tile[32][33];
  int col = blockIdx.x * 32 + threadIdx.x;
  int row = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    tile[threadIdx.y + k][threadIdx.x] = in[(row + k) * n + col];
  __syncthreads();
  col = blockIdx.y * 32 + threadIdx.x;
  row = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    out[(row + k) * n + col] = tile[threadIdx.x][threadIdx.y + k];
}

// A column of the tile lies in one bank: its 32 elements are read one after the other.
__global__ void transpose_wrong(const float *in, float *out, int n) {
  __shared__ float tile[32][32];
  int col = blockIdx.x * 32 + threadIdx.x;
  int row = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    tile[threadIdx.y + k][threadIdx.x] = in[(row + k) * n + col];
  __syncthreads();
  col = blockIdx.y * 32 + threadIdx.x;
  row = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    out[(row + k) * n + col] = tile[threadIdx.x][threadIdx.y + k];  // MISTAKE bank-conflict
}

// --- the sum of a block's numbers ------------------------------------------------------------------------------------

__global__ void block_sum(const float *x, float *sums) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[blockIdx.x * 256 + t];
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (t < half)
      part[t] += part[t + half];
    __syncthreads();
  }
  if (t == 0)
    sums[blockIdx.x] = part[0];
}

// Neighbours first: in the later rounds all of a warp's elements lie in a few banks.
__global__ void block_sum_wrong(const float *x, float *sums) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[blockIdx.x * 256 + t];
  __syncthreads();
  for (int step = 1; step < 256; step *= 2) {
    int at = 2 * step * t;
    if (at < 256)
      part[at] += part[at + step];  // MISTAKE bank-conflict
    __syncthreads();
  }
  if (t == 0)
    sums[blockIdx.x] = part[0];
}

// --- the x of points (x, y, z, w) ------------------------------------------------------------------------------------

__global__ void norms(const float4 *points, float *norm, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float4 p = points[i];
    norm[i] = sqrtf(p.x * p.x + p.y * p.y + p.z * p.z + p.w * p.w);
  }
}

// One float at a time: four requests, each of which moves all four sectors' worth again.
__global__ void norms_wrong(const float4 *points, float *norm, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float *p = reinterpret_cast<const float *>(points);
  if (i < n) {
    float sum = 0.0f;
    for (int k = 0; k < 4; k++)
      sum += p[4 * i + k] * p[4 * i + k];  // MISTAKE uncoalesced
    norm[i] = sqrtf(sum);
  }
}
