// LayerNorm and RMSNorm, rung 1: a block a row, one pass for each number that is wanted of it.
//
// What it does. LayerNorm: a pass for the mean, a second for the mean of (x − mean)², a third that writes (x − mean) /
// √(variance + ε) · weight + bias. RMSNorm has no mean: a pass for the mean of x², and one that writes.
// Why two passes and not Σx² / n − mean²: where the mean is large beside the spread, those two are nearly equal, and
// their difference is rounding. Subtracting the mean first costs a pass, and no digit.
// What it moves. Three reads of the row (RMSNorm two) and one write; only the first read has to come from memory if
// the rows in work fit into the caches.
// What to look at. In `profile`: the three lines that read x. Each pass ends with two barriers of the block.
//
// instances: layernorm_block<float>, rmsnorm_block<float>, layernorm_block<__nv_bfloat16>, rmsnorm_block<__nv_bfloat16>
#include <cuda_bf16.h>

// The sum over the block, known to all its threads. blockDim.x is a multiple of 32.
__device__ float block_sum(float value) {
  __shared__ float of_warp[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // of_warp may still be read from the call before
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < warps ? of_warp[lane] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// bias may be null.
template <class T>
__global__ void layernorm_block(int columns, const T *__restrict__ x, const T *__restrict__ weight,
                                const T *__restrict__ bias, float eps, T *__restrict__ out) {
  x += (long long)blockIdx.x * columns;
  out += (long long)blockIdx.x * columns;

  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += (float)x[i];
  float mean = block_sum(sum) / columns;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float away = (float)x[i] - mean;
    squares += away * away;
  }
  float scale = rsqrtf(block_sum(squares) / columns + eps);

  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float value = ((float)x[i] - mean) * scale * (float)weight[i];
    out[i] = (T)(bias ? value + (float)bias[i] : value);
  }
}

template <class T>
__global__ void rmsnorm_block(int columns, const T *__restrict__ x, const T *__restrict__ weight, float eps,
                              T *__restrict__ out) {
  x += (long long)blockIdx.x * columns;
  out += (long long)blockIdx.x * columns;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) squares += (float)x[i] * (float)x[i];
  float scale = rsqrtf(block_sum(squares) / columns + eps);

  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = (T)((float)x[i] * scale * (float)weight[i]);
}
