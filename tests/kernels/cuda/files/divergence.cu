// Barriers and shuffles that not all reach, each beside its correct twin: `name_wrong` and `name`.
//
// A comment MISTAKE with a kind stands on each line that the finding has to name.

// --- each block turns its numbers round; the last block is not full --------------------------------------------------

__global__ void reverse(const float *x, float *y, int n) {
  __shared__ float kept[64];
  int i = blockIdx.x * 64 + threadIdx.x;
  int filled = min(64, n - blockIdx.x * 64);
  if (i < n)
    kept[threadIdx.x] = x[i];
  __syncthreads();
  if (i < n)
    y[i] = kept[filled - 1 - threadIdx.x];
}

__global__ void reverse_wrong(const float *x, float *y, int n) {
  __shared__ float kept[64];
  int i = blockIdx.x * 64 + threadIdx.x;
  int filled = min(64, n - blockIdx.x * 64);
  if (i < n) {
    kept[threadIdx.x] = x[i];
    __syncthreads();  // MISTAKE divergent-barrier
    y[i] = kept[filled - 1 - threadIdx.x];
  }
}

// --- the same, by threads that leave --------------------------------------------------------------------------------

__global__ void mirror(const float *x, float *y, int n) {
  __shared__ float kept[64];
  int i = blockIdx.x * 64 + threadIdx.x;
  bool mine = i < n;
  int filled = min(64, n - blockIdx.x * 64);
  kept[threadIdx.x] = mine ? x[i] : 0.0f;
  __syncthreads();
  if (mine)
    y[i] = kept[filled - 1 - threadIdx.x];
}

__global__ void mirror_wrong(const float *x, float *y, int n) {
  __shared__ float kept[64];
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i >= n)
    return;
  int filled = min(64, n - blockIdx.x * 64);
  kept[threadIdx.x] = x[i];
  __syncthreads();  // MISTAKE divergent-barrier
  y[i] = kept[filled - 1 - threadIdx.x];
}

// --- running maxima over n numbers, one block's width at a time ------------------------------------------------------

__global__ void column_maxima(const float *x, float *y, int n) {
  __shared__ float most[64];
  int t = threadIdx.x;
  most[t] = -INFINITY;
  __syncthreads();
  for (int first = 0; first < n; first += 64) {
    if (first + t < n)
      most[t] = fmaxf(most[t], x[first + t]);
    __syncthreads();
    if (t == 0)
      y[first / 64] = fmaxf(most[0], most[63]);
    __syncthreads();
  }
}

// A thread counts its own rounds: those behind the end of x make one less.
__global__ void column_maxima_wrong(const float *x, float *y, int n) {
  __shared__ float most[64];
  int t = threadIdx.x;
  most[t] = -INFINITY;
  __syncthreads();
  for (int i = t; i < n; i += 64) {
    most[t] = fmaxf(most[t], x[i]);
    __syncthreads();  // MISTAKE divergent-barrier
    if (t == 0)
      y[i / 64] = fmaxf(most[0], most[63]);
    __syncthreads();
  }
}

// --- producers and consumers: half the block loads, the other half adds ----------------------------------------------

__global__ void halves(const float *x, float *y) {
  __shared__ float kept[32];
  int t = threadIdx.x;
  if (t < 32)
    kept[t] = x[t];
  __syncthreads();
  if (t >= 32)
    y[t - 32] = 2.0f * kept[63 - t];
}

// Both halves come to a barrier, though not to the same one: some GPUs let it pass, and CUDA's rules do not.
__global__ void halves_wrong(const float *x, float *y) {
  __shared__ float kept[32];
  int t = threadIdx.x;
  if (t < 32) {
    kept[t] = x[t];
    __syncthreads();  // MISTAKE divergent-barrier
  } else {
    __syncthreads();  // MISTAKE divergent-barrier
    y[t - 32] = 2.0f * kept[63 - t];
  }
}

// --- the sum of each warp's numbers ----------------------------------------------------------------------------------

__global__ void warp_sums(const float *x, float *sums) {
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_down_sync(0xffffffff, sum, step);
  if (threadIdx.x % 32 == 0)
    sums[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = sum;
}

// The mask names the lower half of the warp, and all lanes call.
__global__ void warp_sums_wrong(const float *x, float *sums) {
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_down_sync(0x0000ffff, sum, step);  // MISTAKE divergent-shuffle
  if (threadIdx.x % 32 == 0)
    sums[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = sum;
}

// --- the sum of the even lanes' numbers ------------------------------------------------------------------------------

__global__ void even_sum(const float *x, float *sum) {
  int lane = threadIdx.x;
  float value = lane % 2 == 0 ? x[lane] : 0.0f;
  for (int step = 16; step > 1; step /= 2)
    value += __shfl_xor_sync(0xffffffff, value, step);
  if (lane == 0)
    *sum = value;
}

// The odd lanes are in the mask, and never come.
__global__ void even_sum_wrong(const float *x, float *sum) {
  int lane = threadIdx.x;
  float value = x[lane];
  if (lane % 2 == 0) {
    for (int step = 16; step > 1; step /= 2)
      value += __shfl_xor_sync(0xffffffff, value, step);  // MISTAKE divergent-shuffle
  }
  __syncwarp();
  if (lane == 0)
    *sum = value;
}

// --- the first value of the warp for all lanes, where the last warp is not full --------------------------------------

__global__ void broadcast_last(const int *x, int *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  int value = i < n ? x[i] : 0;
  int last = min(31, n - 1 - (i - i % 32));
  int got = __shfl_sync(0xffffffff, value, last);
  if (i < n)
    y[i] = got;
}

// Lane 31 of the last warp has returned: its register is nobody's.
__global__ void broadcast_last_wrong(const int *x, int *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n)
    return;
  int value = x[i];
  y[i] = __shfl_sync(0xffffffff, value, 31);  // MISTAKE divergent-shuffle
}

// --- positive numbers kept, in order: lanes count those before them by a vote ----------------------------------------

__global__ void compact(const int *x, int *kept, int *count) {
  int lane = threadIdx.x;
  unsigned positive = __ballot_sync(0xffffffff, x[lane] > 0);
  if (x[lane] > 0)
    kept[__popc(positive & ((1u << lane) - 1))] = x[lane];
  if (lane == 0)
    *count = __popc(positive);
}

// The vote is taken under the very condition that is voted on.
__global__ void compact_wrong(const int *x, int *kept, int *count) {
  int lane = threadIdx.x;
  if (x[lane] > 0) {
    unsigned positive = __ballot_sync(0xffffffff, true);  // MISTAKE divergent-shuffle
    kept[__popc(positive & ((1u << lane) - 1))] = x[lane];
    if (lane == 0)
      *count = __popc(positive);
  }
  __syncwarp();
}
