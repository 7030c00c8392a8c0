// Sum of n numbers, rung 1: each block folds its part in shared memory, half onto half.
//
// What it does. A thread first adds up every (gridDim · blockDim)-th number, so neighbours read neighbours and each
// warp reads whole sectors. The blockDim partial sums then meet in shared memory: at every step the upper half is
// added to the lower half, log2(blockDim) steps with a barrier after each. The block's sum goes to
// partial[blockIdx.x]; the same kernel, launched once more with one block, adds those. No atomics, so the same numbers
// give the same bits on every run.
// What it moves. The n numbers, once; and one float a block.
// What to look at. In `profile`: no bank conflicts, since thread t uses word t and word t + step (threads t and 2t, as
// the first textbook version has it, would meet in the same bank). 8 barriers for 256 threads: the next rung has one.
//
// instances: sum_shared<float>, sum_shared<__nv_bfloat16>
#include <cuda_bf16.h>

// blockDim.x is a power of two, at most 1024.
template <class T> __global__ void sum_shared(long long n, const T *__restrict__ x, float *__restrict__ partial) {
  __shared__ float part[1024];
  float sum = 0.0f;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
    sum += (float)x[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    __syncthreads();  // by all threads of the block, also those that had nothing to add
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = part[0];
}
