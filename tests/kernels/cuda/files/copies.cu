// Mistakes with asynchronous copies, each beside its correct twin: `name_wrong` and `name`.
//
// A comment MISTAKE with a kind stands on each line that the finding has to name.
#include <mlsys/ptx.cuh>
using namespace mlsys;

// --- tiles of 64 numbers turned round: the next one is on its way while this one is used ------------------------------

__global__ void pipeline(const float *x, float *y, int tiles) {
  __shared__ float buffer[2][64];
  int t = threadIdx.x;
  ptx::cp_async<4>(&buffer[0][t], x + t);
  ptx::cp_async_commit();
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles)
      ptx::cp_async<4>(&buffer[(i + 1) % 2][t], x + (i + 1) * 64 + t);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    y[i * 64 + t] = buffer[i % 2][63 - t];
    __syncthreads();
  }
}

// Nobody waits for the copy: a barrier of threads says nothing of copies.
__global__ void pipeline_wrong(const float *x, float *y, int tiles) {
  __shared__ float buffer[2][64];
  int t = threadIdx.x;
  ptx::cp_async<4>(&buffer[0][t], x + t);
  ptx::cp_async_commit();
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles)
      ptx::cp_async<4>(&buffer[(i + 1) % 2][t], x + (i + 1) * 64 + t);
    ptx::cp_async_commit();
    __syncthreads();
    y[i * 64 + t] = buffer[i % 2][63 - t];  // MISTAKE not-waited-for
    __syncthreads();
  }
}

// --- the same, one tile a block --------------------------------------------------------------------------------------

__global__ void one_tile(const float *x, float *y) {
  __shared__ float kept[64];
  int t = threadIdx.x;
  ptx::cp_async<4>(&kept[t], x + blockIdx.x * 64 + t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  y[blockIdx.x * 64 + t] = kept[63 - t];
}

// A thread waits for its own copies, not for those of others.
__global__ void one_tile_wrong(const float *x, float *y) {
  __shared__ float kept[64];
  int t = threadIdx.x;
  ptx::cp_async<4>(&kept[t], x + blockIdx.x * 64 + t);  // MISTAKE race
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[blockIdx.x * 64 + t] = kept[63 - t];  // MISTAKE race
}

// --- a whole row in one bulk copy, whose end an mbarrier tells --------------------------------------------------------

__global__ void rows(const float *x, float *y, int count) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  int t = threadIdx.x;
  if (t == 0)
    ptx::mbarrier_init(&full, 1);
  ptx::fence_mbarrier_init();
  __syncthreads();
  for (int i = 0; i < count; i++) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, sizeof row);
      ptx::bulk_load(row, x + i * 64, sizeof row, &full);
    }
    ptx::mbarrier_wait(&full, i % 2);
    y[i * 64 + t] = 2.0f * row[63 - t];
    __syncthreads();
  }
}

// The barrier expects all 64 threads, and one arrives.
__global__ void rows_wrong(const float *x, float *y, int count) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  int t = threadIdx.x;
  if (t == 0)
    ptx::mbarrier_init(&full, blockDim.x);
  ptx::fence_mbarrier_init();
  __syncthreads();
  for (int i = 0; i < count; i++) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, sizeof row);
      ptx::bulk_load(row, x + i * 64, sizeof row, &full);
    }
    ptx::mbarrier_wait(&full, i % 2);  // MISTAKE deadlock
    y[i * 64 + t] = 2.0f * row[63 - t];
    __syncthreads();
  }
}

// --- the same with the phase counted by a variable -------------------------------------------------------------------

__global__ void phases(const float *x, float *y, int count) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  int t = threadIdx.x;
  if (t == 0)
    ptx::mbarrier_init(&full, 1);
  ptx::fence_mbarrier_init();
  __syncthreads();
  unsigned phase = 0;
  for (int i = 0; i < count; i++) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, sizeof row);
      ptx::bulk_load(row, x + i * 64, sizeof row, &full);
    }
    ptx::mbarrier_wait(&full, phase);
    phase ^= 1;
    y[i * 64 + t] = 2.0f * row[63 - t];
    __syncthreads();
  }
}

// The first phase is 0; who waits for 1 is told that the phase before it is over, and goes on at once.
__global__ void phases_wrong(const float *x, float *y, int count) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  int t = threadIdx.x;
  if (t == 0)
    ptx::mbarrier_init(&full, 1);
  ptx::fence_mbarrier_init();
  __syncthreads();
  unsigned phase = 1;
  for (int i = 0; i < count; i++) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, sizeof row);
      ptx::bulk_load(row, x + i * 64, sizeof row, &full);
    }
    ptx::mbarrier_wait(&full, phase);
    phase ^= 1;
    y[i * 64 + t] = 2.0f * row[63 - t];  // MISTAKE not-waited-for
    __syncthreads();
  }
}

// --- the byte count of a copy ----------------------------------------------------------------------------------------

__global__ void counted(const float *x, float *y) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&full, 64 * sizeof(float));
    ptx::bulk_load(row, x, 64 * sizeof(float), &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);
  y[threadIdx.x] = row[63 - threadIdx.x];
}

// Twice as many bytes are expected as ever come.
__global__ void counted_wrong(const float *x, float *y) {
  __shared__ alignas(16) float row[64];
  __shared__ ptx::mbarrier full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&full, 2 * 64 * sizeof(float));
    ptx::bulk_load(row, x, 64 * sizeof(float), &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);  // MISTAKE deadlock
  y[threadIdx.x] = row[63 - threadIdx.x];
}
