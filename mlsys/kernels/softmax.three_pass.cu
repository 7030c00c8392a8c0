// Softmax of each row, rung 1: the maximum, the sum of the exponentials, the quotients; three passes over the row.
//
// What it does. A block has a row. exp overflows above 88, so the row's maximum is subtracted first; that needs a pass
// of its own, since the maximum is only known when all has been seen. Each pass ends in a sum or maximum over the
// block: five shuffles in each warp, one number a warp through shared memory.
// What it moves. Three reads and a write of every number. Rows that fit into L2, or even L1, cost one read of memory;
// the other two are still requests that the memory system answers.
// What to look at. In `profile`: three lines that read x, with the same sectors each. The next rung does without one.
//
// instances: softmax_three_pass<float>, softmax_three_pass<__nv_bfloat16>
#include <cuda_bf16.h>

constexpr unsigned EVERYBODY = 0xffffffffu;

__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ float sum_of(float a, float b) { return a + b; }

// `value` of all threads of the block put together, known to all of them. blockDim.x is a multiple of 32.
template <class Op> __device__ float over_block(float value, float neutral, Op op) {
  __shared__ float of_warp[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) value = op(value, __shfl_xor_sync(EVERYBODY, value, step));
  __syncthreads();  // of_warp may still be read from the call before
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < warps ? of_warp[lane] : neutral;
  for (int step = 16; step > 0; step /= 2) value = op(value, __shfl_xor_sync(EVERYBODY, value, step));
  return value;
}

// A row a block. A row of nothing but −∞ has no softmax: it becomes NaN, as in torch.
template <class T> __global__ void softmax_three_pass(int columns, const T *__restrict__ x, T *__restrict__ out) {
  x += (long long)blockIdx.x * columns;
  out += (long long)blockIdx.x * columns;

  float top = -INFINITY;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) top = fmaxf(top, (float)x[i]);
  top = over_block(top, -INFINITY, larger);

  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += expf((float)x[i] - top);
  sum = over_block(sum, 0.0f, sum_of);

  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = (T)(expf((float)x[i] - top) / sum);
}
