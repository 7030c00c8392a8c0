// Mistakes with shared memory and barriers, each beside its correct twin: `name_wrong` and `name`.
//
// A comment MISTAKE with a kind stands on each line that the finding has to name.

// --- out(col, row) = in(row, col), through a tile -------------------------------------------------------------------

__global__ void transpose(const float *in, float *out, int rows, int cols) {
  __shared__ float tile[16][17];
  int col = blockIdx.x * 16 + threadIdx.x;
  int row = blockIdx.y * 16 + threadIdx.y;
  if (row < rows && col < cols)
    tile[threadIdx.y][threadIdx.x] = in[row * cols + col];
  __syncthreads();
  col = blockIdx.y * 16 + threadIdx.x;
  row = blockIdx.x * 16 + threadIdx.y;
  if (row < cols && col < rows)
    out[row * rows + col] = tile[threadIdx.x][threadIdx.y];
}

// The barrier between writing and reading the tile is missing.
__global__ void transpose_wrong(const float *in, float *out, int rows, int cols) {
  __shared__ float tile[16][17];
  int col = blockIdx.x * 16 + threadIdx.x;
  int row = blockIdx.y * 16 + threadIdx.y;
  if (row < rows && col < cols)
    tile[threadIdx.y][threadIdx.x] = in[row * cols + col];  // MISTAKE race
  col = blockIdx.y * 16 + threadIdx.x;
  row = blockIdx.x * 16 + threadIdx.y;
  if (row < cols && col < rows)
    out[row * rows + col] = tile[threadIdx.x][threadIdx.y];  // MISTAKE race
}

// --- c = a · b, tile by tile ----------------------------------------------------------------------------------------

__global__ void matmul(int m, int n, int k, const float *a, const float *b, float *c) {
  __shared__ float a_tile[16][16];
  __shared__ float b_tile[16][16];
  int x = threadIdx.x, y = threadIdx.y;
  int row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
  float sum = 0.0f;
  for (int first = 0; first < k; first += 16) {
    a_tile[y][x] = row < m && first + x < k ? a[row * k + first + x] : 0.0f;
    b_tile[y][x] = first + y < k && col < n ? b[(first + y) * n + col] : 0.0f;
    __syncthreads();
    for (int i = 0; i < 16; i++)
      sum += a_tile[y][i] * b_tile[i][x];
    __syncthreads();
  }
  if (row < m && col < n)
    c[row * n + col] = sum;
}

// The barrier at the loop's end is missing: a quick warp overwrites the tile that a slow one still reads.
__global__ void matmul_wrong(int m, int n, int k, const float *a, const float *b, float *c) {
  __shared__ float a_tile[16][16];
  __shared__ float b_tile[16][16];
  int x = threadIdx.x, y = threadIdx.y;
  int row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
  float sum = 0.0f;
  for (int first = 0; first < k; first += 16) {
    a_tile[y][x] = row < m && first + x < k ? a[row * k + first + x] : 0.0f;  // MISTAKE race
    b_tile[y][x] = first + y < k && col < n ? b[(first + y) * n + col] : 0.0f;  // MISTAKE race
    __syncthreads();
    for (int i = 0; i < 16; i++)
      sum += a_tile[y][i] * b_tile[i][x];  // MISTAKE race
  }
  if (row < m && col < n)
    c[row * n + col] = sum;
}

// --- the sum of each block's 256 numbers, as a tree -----------------------------------------------------------------

__global__ void block_sum(const float *x, float *sums, int n) {
  __shared__ float part[256];
  int t = threadIdx.x;
  int i = blockIdx.x * 256 + t;
  part[t] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (t < half)
      part[t] += part[t + half];
    __syncthreads();
  }
  if (t == 0)
    sums[blockIdx.x] = part[0];
}

// The barrier of each round stands after the loop, where it comes once.
__global__ void block_sum_wrong(const float *x, float *sums, int n) {
  __shared__ float part[256];
  int t = threadIdx.x;
  int i = blockIdx.x * 256 + t;
  part[t] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2)
    if (t < half)
      part[t] += part[t + half];  // MISTAKE race
  __syncthreads();
  if (t == 0)
    sums[blockIdx.x] = part[0];
}

// --- the last 32 numbers summed by one warp, "which runs in step anyhow" --------------------------------------------

__global__ void warp_sum(const float *x, float *sum) {
  __shared__ float part[64];
  int lane = threadIdx.x;
  part[lane] = x[lane];
  part[lane + 32] = x[lane + 32];
  __syncwarp();
  for (int step = 32; step > 0; step /= 2) {
    float mine = part[lane] + (lane < step ? part[lane + step] : 0.0f);
    __syncwarp();
    part[lane] = mine;
    __syncwarp();
  }
  if (lane == 0)
    *sum = part[0];
}

// Since Volta the lanes of a warp have program counters of their own: nothing keeps them in step.
__global__ void warp_sum_wrong(const float *x, float *sum) {
  __shared__ float part[64];
  int lane = threadIdx.x;
  part[lane] = x[lane];
  part[lane + 32] = x[lane + 32];
  __syncwarp();
  for (int step = 32; step > 0; step /= 2)
    part[lane] += lane < step ? part[lane + step] : 0.0f;  // MISTAKE race
  if (lane == 0)
    *sum = part[0];
}

// --- the same as it was written before Volta, through a volatile pointer --------------------------------------------

__device__ void last_warp(volatile float *part, int lane) {
  for (int step = 32; step > 0; step /= 2) {
    float other = part[lane + step];
    __syncwarp();
    part[lane] = part[lane] + other;
    __syncwarp();
  }
}

__global__ void volatile_sum(const float *x, float *sum) {
  __shared__ float part[96];
  int t = threadIdx.x;
  part[t] = x[t];
  if (t < 32)
    part[64 + t] = 0.0f;
  __syncthreads();
  if (t < 32)
    last_warp(part, t);
  if (t == 0)
    *sum = part[0];
}

// volatile makes the compiler read and write memory each time; it does not make lanes wait for each other.
__global__ void volatile_sum_wrong(const float *x, float *sum) {
  __shared__ float part[96];
  int t = threadIdx.x;
  part[t] = x[t];
  if (t < 32)
    part[64 + t] = 0.0f;
  __syncthreads();
  if (t < 32) {
    volatile float *mine = part;
    for (int step = 32; step > 0; step /= 2)
      mine[t] = mine[t] + mine[t + step];  // MISTAKE race
  }
  if (t == 0)
    *sum = part[0];
}

// --- each warp turns its 32 numbers round ---------------------------------------------------------------------------

__global__ void reverse_in_warp(const int *x, int *y) {
  __shared__ int exchange[4][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  exchange[warp][lane] = x[i];
  __syncwarp();
  y[i] = exchange[warp][31 - lane];
}

// Only lanes of one warp meet here; still they have to.
__global__ void reverse_in_warp_wrong(const int *x, int *y) {
  __shared__ int exchange[4][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  exchange[warp][lane] = x[i];  // MISTAKE race
  y[i] = exchange[warp][31 - lane];  // MISTAKE race
}

// --- softmax of rows, a block each: a maximum and a sum go through the same array -----------------------------------

__global__ void softmax(const float *x, float *y, int cols) {
  __shared__ float part[64];
  const float *row = x + blockIdx.x * cols;
  float most = -INFINITY;
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    most = fmaxf(most, row[i]);
  part[threadIdx.x] = most;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      part[threadIdx.x] = fmaxf(part[threadIdx.x], part[threadIdx.x + half]);
    __syncthreads();
  }
  most = part[0];
  __syncthreads();
  float sum = 0.0f;
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    sum += expf(row[i] - most);
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    y[blockIdx.x * cols + i] = expf(row[i] - most) / part[0];
}

// part[0] is read by all as the maximum, and by thread 0 overwritten with its sum.
__global__ void softmax_wrong(const float *x, float *y, int cols) {
  __shared__ float part[64];
  const float *row = x + blockIdx.x * cols;
  float most = -INFINITY;
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    most = fmaxf(most, row[i]);
  part[threadIdx.x] = most;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      part[threadIdx.x] = fmaxf(part[threadIdx.x], part[threadIdx.x + half]);
    __syncthreads();
  }
  most = part[0];  // MISTAKE race
  float sum = 0.0f;
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    sum += expf(row[i] - most);
  part[threadIdx.x] = sum;  // MISTAKE race
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    y[blockIdx.x * cols + i] = expf(row[i] - most) / part[0];
}

// --- sums of neighbours 64 apart, with two buffers ------------------------------------------------------------------

__global__ void double_buffer(const float *x, float *y, int tiles) {
  __shared__ float buffer[2][64];
  int t = threadIdx.x;
  buffer[0][t] = x[t];
  __syncthreads();
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles)
      buffer[(i + 1) % 2][t] = x[(i + 1) * 64 + t];
    float left = buffer[i % 2][(t + 63) % 64];
    float right = buffer[i % 2][(t + 1) % 64];
    y[i * 64 + t] = left + right;
    __syncthreads();
  }
}

// The next tile is written where this one is still read.
__global__ void double_buffer_wrong(const float *x, float *y, int tiles) {
  __shared__ float buffer[2][64];
  int t = threadIdx.x;
  buffer[0][t] = x[t];
  buffer[1][t] = x[64 + t];
  __syncthreads();
  for (int i = 0; i < tiles; i++) {
    if (i + 2 < tiles)
      buffer[i % 2][t] = x[(i + 2) * 64 + t];  // MISTAKE race
    float left = buffer[i % 2][(t + 63) % 64];  // MISTAKE race
    float right = buffer[i % 2][(t + 1) % 64];  // MISTAKE race
    y[i * 64 + t] = left + right;
    __syncthreads();
  }
}

// --- running sums of a block's numbers: each round adds the number `step` before ------------------------------------

__global__ void running_sum(const int *x, int *y) {
  __shared__ int sums[128];
  int t = threadIdx.x;
  sums[t] = x[t];
  __syncthreads();
  for (int step = 1; step < 128; step *= 2) {
    int before = t >= step ? sums[t - step] : 0;
    __syncthreads();
    sums[t] += before;
    __syncthreads();
  }
  y[t] = sums[t];
}

// In place, one barrier a round is not enough: who is quick adds to what others have yet to read.
__global__ void running_sum_wrong(const int *x, int *y) {
  __shared__ int sums[128];
  int t = threadIdx.x;
  sums[t] = x[t];
  __syncthreads();
  for (int step = 1; step < 128; step *= 2) {
    int before = t >= step ? sums[t - step] : 0;  // MISTAKE race
    sums[t] += before;  // MISTAKE race
    __syncthreads();
  }
  y[t] = sums[t];
}

// --- the largest of each block, where the last block is not full ----------------------------------------------------

__global__ void block_largest(const float *x, float *largest, int n) {
  __shared__ float part[64];
  int t = threadIdx.x;
  int i = blockIdx.x * 64 + t;
  part[t] = i < n ? x[i] : -INFINITY;
  __syncthreads();
  for (int half = 32; half > 0; half /= 2) {
    if (t < half)
      part[t] = fmaxf(part[t], part[t + half]);
    __syncthreads();
  }
  if (t == 0)
    largest[blockIdx.x] = part[0];
}

// Who has no number of his own leaves his place as it was.
__global__ void block_largest_wrong(const float *x, float *largest, int n) {
  __shared__ float part[64];
  int t = threadIdx.x;
  int i = blockIdx.x * 64 + t;
  if (i < n)
    part[t] = x[i];
  __syncthreads();
  for (int half = 32; half > 0; half /= 2) {
    if (t < half)
      part[t] = fmaxf(part[t], part[t + half]);  // MISTAKE uninitialised
    __syncthreads();
  }
  if (t == 0)
    largest[blockIdx.x] = part[0];
}

// --- y[i] = x[i-1] + x[i] + x[i+1], zeros beyond: a tile with one more on either side -------------------------------

__global__ void stencil(const float *x, float *y, int n) {
  __shared__ float tile[66];
  int t = threadIdx.x;
  int i = blockIdx.x * 64 + t;
  tile[t + 1] = i < n ? x[i] : 0.0f;
  if (t == 0)
    tile[0] = i > 0 ? x[i - 1] : 0.0f;
  if (t == 63)
    tile[65] = i + 1 < n ? x[i + 1] : 0.0f;
  __syncthreads();
  if (i < n)
    y[i] = tile[t] + tile[t + 1] + tile[t + 2];
}

// Nobody loads the element to the right of the tile.
__global__ void stencil_wrong(const float *x, float *y, int n) {
  __shared__ float tile[66];
  int t = threadIdx.x;
  int i = blockIdx.x * 64 + t;
  tile[t + 1] = i < n ? x[i] : 0.0f;
  if (t == 0)
    tile[0] = i > 0 ? x[i - 1] : 0.0f;
  __syncthreads();
  if (i < n)
    y[i] = tile[t] + tile[t + 1] + tile[t + 2];  // MISTAKE uninitialised
}
