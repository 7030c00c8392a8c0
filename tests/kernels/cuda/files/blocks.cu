// Mistakes between blocks and with atomics, and what never ends, each beside its correct twin: `name_wrong` and `name`.
//
// A comment MISTAKE with a kind stands on each line that the finding has to name.

// --- a histogram of bytes --------------------------------------------------------------------------------------------

__global__ void histogram(const int *x, int *counts, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&counts[x[i]], 1);
}

__global__ void histogram_wrong(const int *x, int *counts, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    counts[x[i]]++;  // MISTAKE race
}

// --- the same with a histogram a block, in shared memory -------------------------------------------------------------

__global__ void histogram_shared(const int *x, int *counts, int n) {
  __shared__ int mine[16];
  if (threadIdx.x < 16)
    mine[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&mine[x[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16)
    atomicAdd(&counts[threadIdx.x], mine[threadIdx.x]);
}

__global__ void histogram_shared_wrong(const int *x, int *counts, int n) {
  __shared__ int mine[16];
  if (threadIdx.x < 16)
    mine[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    mine[x[i]] += 1;  // MISTAKE race
  __syncthreads();
  if (threadIdx.x < 16)
    atomicAdd(&counts[threadIdx.x], mine[threadIdx.x]);
}

// --- the sum of all blocks, added up by the block that finishes last -------------------------------------------------

__global__ void grid_sum(const float *x, float *partial, unsigned *finished, float *sum, int n) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    float mine = 0.0f;
    for (int i = blockIdx.x; i < n; i += gridDim.x)
      mine += x[i];
    partial[blockIdx.x] = mine;
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    float all = 0.0f;
    for (int i = 0; i < gridDim.x; i++)
      all += partial[i];
    *sum = all;
  }
}

// The counter may be seen before what it counts.
__global__ void grid_sum_wrong(const float *x, float *partial, unsigned *finished, float *sum, int n) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    float mine = 0.0f;
    for (int i = blockIdx.x; i < n; i += gridDim.x)
      mine += x[i];
    partial[blockIdx.x] = mine;  // MISTAKE race
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float all = 0.0f;
    for (int i = 0; i < gridDim.x; i++)
      all += partial[i];  // MISTAKE race
    *sum = all;
  }
}

// --- x smoothed in place of y: each block writes its own part --------------------------------------------------------

__global__ void tiles(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n - 1)
    y[i] = 0.5f * (x[i] + x[i + 1]);
}

// Tiles overlap by one: its last element is also the next block's first.
__global__ void tiles_wrong(const float *x, float *y, int n) {
  int i = blockIdx.x * (blockDim.x - 1) + threadIdx.x;
  if (i < n - 1)
    y[i] = 0.5f * (x[i] + x[i + 1]);  // MISTAKE race
}

// --- x smoothed in place ---------------------------------------------------------------------------------------------

__global__ void smooth(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] = 0.5f * (x[i] + x[i + 1 < n ? i + 1 : i]);
}

// y is x: the first number of a block is read by the block before it.
__global__ void smooth_wrong(float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float right = 0.0f;
  if (i < n)
    right = y[i + 1 < n ? i + 1 : i];  // MISTAKE race
  __syncthreads();
  if (i < n)
    y[i] = 0.5f * (y[i] + right);  // MISTAKE race
}

// --- how many are negative: counted by all, read by one -------------------------------------------------------------

__global__ void count_negative(const float *x, int *share) {
  __shared__ int count;
  if (threadIdx.x == 0)
    count = 0;
  __syncthreads();
  if (x[threadIdx.x] < 0.0f)
    atomicAdd(&count, 1);
  __syncthreads();
  share[threadIdx.x] = count;
}

// An atomic operation protects from other atomic operations only.
__global__ void count_negative_wrong(const float *x, int *share) {
  __shared__ int count;
  if (threadIdx.x == 0)
    count = 0;
  __syncthreads();
  if (x[threadIdx.x] < 0.0f)
    atomicAdd(&count, 1);  // MISTAKE race
  share[threadIdx.x] = count;  // MISTAKE race
}

// --- the largest number: there is no atomicMax of floats -------------------------------------------------------------

__global__ void largest_float(const float *x, float *most, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n)
    return;
  int *bits = reinterpret_cast<int *>(most);
  int old = *bits, assumed;
  do {
    assumed = old;
    float larger = fmaxf(x[i], __int_as_float(assumed));
    old = atomicCAS(bits, assumed, __float_as_int(larger));
  } while (old != assumed);
}

// Between looking and writing, another thread has written.
__global__ void largest_float_wrong(const float *x, float *most, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n)
    return;
  if (x[i] > *most)  // MISTAKE race
    *most = x[i];  // MISTAKE race
}

// --- the largest number and its place, behind a lock -----------------------------------------------------------------

__global__ void largest(const float *x, float *best, int *place, int *lock, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  bool waiting = i < n;
  while (waiting) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      if (x[i] > *best) {
        *best = x[i];
        *place = i;
      }
      __threadfence();
      atomicExch(lock, 0);
      waiting = false;
    }
  }
}

// Who has nothing to write leaves with the lock in his pocket.
__global__ void largest_wrong(const float *x, float *best, int *place, int *lock, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n)
    return;
  while (atomicCAS(lock, 0, 1) != 0)  // MISTAKE endless-loop
    ;
  __threadfence();
  if (x[i] <= *best)
    return;
  *best = x[i];
  *place = i;
  __threadfence();
  atomicExch(lock, 0);
}

// --- how many numbers of a sorted array are smaller ------------------------------------------------------------------

__global__ void rank(const float *sorted, const float *x, int *ranks, int n) {
  float mine = x[threadIdx.x];
  int low = 0, high = n;
  while (low < high) {
    int middle = (low + high) / 2;
    if (sorted[middle] < mine)
      low = middle + 1;
    else
      high = middle;
  }
  ranks[threadIdx.x] = low;
}

// With low + 1 == high, middle is low, and stays.
__global__ void rank_wrong(const float *sorted, const float *x, int *ranks, int n) {
  float mine = x[threadIdx.x];
  int low = 0, high = n;
  while (low < high) {  // MISTAKE endless-loop
    int middle = (low + high) / 2;  // MISTAKE endless-loop
    if (sorted[middle] < mine)  // MISTAKE endless-loop
      low = middle;  // MISTAKE endless-loop
    else
      high = middle;  // MISTAKE endless-loop
  }
  ranks[threadIdx.x] = low;
}
