// Softmax of each row, rung 2: maximum and sum in the same pass.
//
// What changed. A thread keeps the largest number so far and the sum of exponentials relative to it. A larger number
// rescales the sum by exp(old maximum − new maximum) and goes on. Two such pairs are put together by the same rule, so
// a row can be split over lanes and warps and merged in any order: the idea behind flash attention
// (`mlsys.attention.merge`).
// What it moves. Two reads and a write of every number instead of three and one.
// What to look at. In `profile`: two lines that read x. More exponentials than before; memory is what a softmax waits
// for.
// The trap: a pair that has seen nothing, or only −∞, has the maximum −∞, and −∞ − (−∞) is NaN. It counts as 0.
//
// instances: softmax_online<float>, softmax_online<__nv_bfloat16>
#include <cuda_bf16.h>

constexpr unsigned EVERYBODY = 0xffffffffu;

// The largest number seen, and the sum of exp(number − top) over those seen.
struct Seen {
  float top, sum;
};

__device__ Seen merged(Seen a, Seen b) {
  float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return {top, a.sum + b.sum};  // both 0, or NaN if a NaN was seen
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}

__device__ Seen over_warp(Seen mine) {
  for (int step = 16; step > 0; step /= 2)
    mine = merged(mine, {__shfl_xor_sync(EVERYBODY, mine.top, step), __shfl_xor_sync(EVERYBODY, mine.sum, step)});
  return mine;
}

// A row a block. A row of nothing but −∞ has no softmax: it becomes NaN, as in torch.
template <class T> __global__ void softmax_online(int columns, const T *__restrict__ x, T *__restrict__ out) {
  __shared__ float tops[32], sums[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x += (long long)blockIdx.x * columns;
  out += (long long)blockIdx.x * columns;

  Seen mine = {-INFINITY, 0.0f};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float next = (float)x[i];
    if (next != -INFINITY) mine = merged(mine, {next, next == next ? 1.0f : next});  // a NaN stays one
  }
  mine = over_warp(mine);
  if (lane == 0) {
    tops[warp] = mine.top;
    sums[warp] = mine.sum;
  }
  __syncthreads();
  mine = lane < warps ? Seen{tops[lane], sums[lane]} : Seen{-INFINITY, 0.0f};
  mine = over_warp(mine);

  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = (T)(expf((float)x[i] - mine.top) / mine.sum);
}
