// Sum of n numbers, rung 3: a thread reads 16 bytes at a time.
//
// What changed. One instruction loads four floats, or eight bfloat16, so a warp asks for 512 bytes at once and there
// are a quarter as many loads to issue. Two such loads are under way before the first is added: what limits a sum is
// not the adder but how many bytes are on their way at the same time.
// What it moves. The n numbers, once, as before; in fewer and larger requests.
// What to look at. In `profile`: the same sectors from a quarter (an eighth) of the requests. A 16-byte load must
// start at a multiple of 16: numbers before the first such address, and those after the last whole one, are added one
// by one. Leave that out, and x[1:] is a misaligned access on a GPU, and a finding of `check`.
//
// instances: sum_vectorized<float>, sum_vectorized<__nv_bfloat16>
#include <cuda_bf16.h>

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// 16 bytes, and the sum of the numbers in them.
template <class T> struct Pack;
template <> struct Pack<float> {
  using Type = float4;
  static __device__ float sum(const float4 &v) { return (v.x + v.y) + (v.z + v.w); }
};
template <> struct Pack<__nv_bfloat16> {
  using Type = uint4;
  // A bfloat16 is the upper half of the float of the same value.
  static __device__ float pair(unsigned v) { return __uint_as_float(v << 16) + __uint_as_float(v & 0xffff0000u); }
  static __device__ float sum(const uint4 &v) { return (pair(v.x) + pair(v.y)) + (pair(v.z) + pair(v.w)); }
};

// blockDim.x is a multiple of 32.
template <class T> __global__ void sum_vectorized(long long n, const T *__restrict__ x, float *__restrict__ partial) {
  using Load = typename Pack<T>::Type;
  constexpr int width = 16 / sizeof(T);
  __shared__ float of_warp[32];
  unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x, stride = (long long)gridDim.x * blockDim.x;

  long long head = (16 - (unsigned long long)x % 16) % 16 / sizeof(T);  // numbers before the first whole 16 bytes
  if (head > n) head = n;
  const Load *packs = (const Load *)(x + head);
  long long count = (n - head) / width, tail = head + count * width;

  float sum = 0.0f, other = 0.0f;
  long long i = first;
  for (; i + stride < count; i += 2 * stride) {
    Load a = packs[i], b = packs[i + stride];
    sum += Pack<T>::sum(a);
    other += Pack<T>::sum(b);
  }
  if (i < count) sum += Pack<T>::sum(packs[i]);
  if (first < head) sum += (float)x[first];
  if (first < n - tail) sum += (float)x[tail + first];

  sum = warp_sum(sum + other);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < warps ? of_warp[lane] : 0.0f);
    if (lane == 0) partial[blockIdx.x] = sum;
  }
}
