// Sum of n numbers, rung 2: the lanes of a warp hand each other their sums in registers.
//
// What changed. __shfl_down_sync gives a lane the register of the lane `step` above it: 5 steps add up 32 lanes with
// no shared memory and no barrier, since the lanes of a warp meet at the shuffle itself. Only one number a warp goes
// through shared memory, and only one barrier is left; the first warp then adds up those numbers the same way.
// What it moves. As before the n numbers, once. Shared memory: 2 words a warp instead of 3 · blockDim words.
// What to look at. In `profile`: 9 passes over shared memory a block of 256 threads, there were 45. The mask names the
// lanes that take part, here all of them: a mask of lanes that are not there, or a lane that never comes, is an error
// that `check` finds.
//
// instances: sum_shuffle<float>, sum_shuffle<__nv_bfloat16>
#include <cuda_bf16.h>

// The sum over the warp's lanes, in lane 0; the others have sums of fewer lanes.
__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// blockDim.x is a multiple of 32, so that every warp is whole.
template <class T> __global__ void sum_shuffle(long long n, const T *__restrict__ x, float *__restrict__ partial) {
  __shared__ float of_warp[32];
  unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float sum = 0.0f;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
    sum += (float)x[i];
  sum = warp_sum(sum);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < warps ? of_warp[lane] : 0.0f);
    if (lane == 0) partial[blockIdx.x] = sum;
  }
}
