// Accesses beyond an array, each beside its correct twin: `name_wrong` and `name`.
//
// A comment MISTAKE with a kind stands on each line that the finding has to name.

// --- z = x + y ------------------------------------------------------------------------------------------------------

__global__ void add(const float *x, const float *y, float *z, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    z[i] = x[i] + y[i];
}

__global__ void add_wrong(const float *x, const float *y, float *z, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n)
    z[i] = x[i] + y[i];  // MISTAKE out-of-bounds
}

// --- the sum of each row --------------------------------------------------------------------------------------------

__global__ void row_sums(const float *x, float *sums, int rows, int cols) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows)
    return;
  float sum = 0.0f;
  for (int col = 0; col < cols; col++)
    sum += x[row * cols + col];
  sums[row] = sum;
}

// Rows are `cols` apart, not `rows`: a square matrix would have hidden it.
__global__ void row_sums_wrong(const float *x, float *sums, int rows, int cols) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows)
    return;
  float sum = 0.0f;
  for (int col = 0; col < cols; col++)
    sum += x[row * rows + col];  // MISTAKE out-of-bounds
  sums[row] = sum;
}

// --- y[i] = x[i] − x[i−1] -------------------------------------------------------------------------------------------

__global__ void difference(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float before = i > 0 ? x[i - 1] : 0.0f;
    y[i] = x[i] - before;
  }
}

__global__ void difference_wrong(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float before = x[i - 1];  // MISTAKE out-of-bounds
    y[i] = x[i] - before;
  }
}

// --- a block turns its numbers round, in dynamic shared memory ------------------------------------------------------

__global__ void reverse(const int *x, int *y) {
  extern __shared__ int turned[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  turned[blockDim.x - 1 - threadIdx.x] = x[i];
  __syncthreads();
  y[i] = turned[threadIdx.x];
}

// One more than the launch has asked for: shared=4 * blockDim.x.
__global__ void reverse_wrong(const int *x, int *y) {
  extern __shared__ int turned[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  turned[blockDim.x - threadIdx.x] = x[i];  // MISTAKE out-of-bounds
  __syncthreads();
  y[i] = turned[threadIdx.x + 1];
}

// --- the mean of each element and its right neighbour, in tiles of 8 × 16 -------------------------------------------

__global__ void smooth(const float *x, float *y, int cols) {
  __shared__ float tile[8][17];
  int col = threadIdx.x, row = threadIdx.y;
  tile[row][col] = x[row * cols + col];
  if (col == 15)
    tile[row][16] = x[row * cols + 16];
  __syncthreads();
  y[row * cols + col] = 0.5f * (tile[row][col] + tile[row][col + 1]);
}

// Beyond a row of the tile lies the next row: a wrong number, and no crash.
__global__ void smooth_wrong(const float *x, float *y, int cols) {
  __shared__ float tile[8][16];
  int col = threadIdx.x, row = threadIdx.y;
  tile[row][col] = x[row * cols + col];
  __syncthreads();
  y[row * cols + col] = 0.5f * (tile[row][col] + tile[row][col + 1]);  // MISTAKE out-of-bounds
}

// --- a table of eight numbers, looked up by a hash of the index -----------------------------------------------------

__global__ void look_up(const float *table, float *y, int n) {
  __shared__ float kept[8];
  if (threadIdx.x < 8)
    kept[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] = kept[i * 5 % 8];
}

// The array's length is 8, and the remainder's divisor 9.
__global__ void look_up_wrong(const float *table, float *y, int n) {
  __shared__ float kept[8];
  if (threadIdx.x < 8)
    kept[threadIdx.x] = table[threadIdx.x];
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] = kept[i * 5 % 9];  // MISTAKE out-of-bounds
}

// --- rows scaled, four numbers at a time ----------------------------------------------------------------------------

__global__ void scale_rows(const float *x, const float *factor, float *y, int rows, int cols) {
  int row = blockIdx.x;
  bool whole = cols % 4 == 0;
  int vectors = whole ? cols / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float4 v = reinterpret_cast<const float4 *>(x + row * cols)[i];
    float f = factor[row];
    reinterpret_cast<float4 *>(y + row * cols)[i] = make_float4(f * v.x, f * v.y, f * v.z, f * v.w);
  }
  for (int i = 4 * vectors + threadIdx.x; i < cols; i += blockDim.x)
    y[row * cols + i] = factor[row] * x[row * cols + i];
}

// The second row starts at a multiple of 16 bytes only if a row has a multiple of four floats.
__global__ void scale_rows_wrong(const float *x, const float *factor, float *y, int rows, int cols) {
  int row = blockIdx.x;
  int vectors = cols / 4;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float4 v = reinterpret_cast<const float4 *>(x + row * cols)[i];  // MISTAKE misaligned
    float f = factor[row];
    reinterpret_cast<float4 *>(y + row * cols)[i] = make_float4(f * v.x, f * v.y, f * v.z, f * v.w);
  }
  for (int i = 4 * vectors + threadIdx.x; i < cols; i += blockDim.x)
    y[row * cols + i] = factor[row] * x[row * cols + i];
}

// --- y = 2 x, four numbers at a time and any n ----------------------------------------------------------------------

__global__ void twice(const float *x, float *y, int n) {
  int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i + 3 < n) {
    float4 v = *reinterpret_cast<const float4 *>(x + i);
    *reinterpret_cast<float4 *>(y + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
  } else {
    for (int k = i; k < n; k++)
      y[k] = 2 * x[k];
  }
}

// The last vector has three numbers that belong to it.
__global__ void twice_wrong(const float *x, float *y, int n) {
  int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    float4 v = *reinterpret_cast<const float4 *>(x + i);  // MISTAKE out-of-bounds
    *reinterpret_cast<float4 *>(y + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
  }
}

// --- pairs (row, col) of a 60,000 × 60,000 matrix counted by bucket -------------------------------------------------

__global__ void count_pairs(const int *rows, int *buckets, int pairs, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < pairs) {
    long long at = (long long)rows[i] * 60000 + i;
    atomicAdd(&buckets[at % size], 1);
  }
}

// 60,000² needs more than 31 bits; what is left of it is negative.
__global__ void count_pairs_wrong(const int *rows, int *buckets, int pairs, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < pairs) {
    int at = rows[i] * 60000 + i;
    atomicAdd(&buckets[at % size], 1);  // MISTAKE out-of-bounds
  }
}
