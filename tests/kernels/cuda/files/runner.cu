// What students write, in one file: each kernel is a way to say something in CUDA that the runner has to understand.
#include <cassert>
#include <cstdio>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "scaled.cuh"

__constant__ float weights[4] = {1.0f, 2.0f, 3.0f, 4.0f};
__device__ int tickets;
__device__ float table[4] = {10.0f, 20.0f, 30.0f, 40.0f};
static __device__ float square(float x) { return x * x; }

// --- right ----------------------------------------------------------------------------------------------------------

__global__ void numbers(double *y, float a, double b, long long c, unsigned d, bool e, short f, unsigned char g) {
  double all[] = {a, b, (double)c, (double)d, (double)e, (double)f, (double)g};
  y[threadIdx.x] = all[threadIdx.x];
}

__global__ void index(int *y) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  y[i] = i;
}

__global__ void constants(float *y) {
  y[threadIdx.x] = weights[threadIdx.x] + table[threadIdx.x];
}

__global__ void functions(const float *__restrict__ x, float *__restrict__ y) {
  auto third = [](float v) { return v / 3.0f; };
  y[threadIdx.x] = third(scaled(square(x[threadIdx.x])));
}

extern "C" __global__ void plain(float const *const __restrict__ x, float *y, int n) {
  int i = threadIdx.x;
  if (i < n)
    y[i] = x[i];
}

namespace course {
namespace {
__global__ void in_namespace(float *y) {
  y[threadIdx.x] = 7.0f;
}
}  // namespace
}  // namespace course

// A ticket for each thread of the grid, whatever worker runs its block.
__global__ void draw(int *y) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(&tickets, 1);
}

template <class T> __global__ void reversed(const T *x, T *y) {
  extern __shared__ T kept[];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}

__global__ void two_arrays(float *y, int n) {
  extern __shared__ __align__(16) unsigned char raw[];
  float *a = reinterpret_cast<float *>(raw);
  int *b = reinterpret_cast<int *>(a + n);
  a[threadIdx.x] = threadIdx.x;
  b[threadIdx.x] = 2 * threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = a[n - 1 - threadIdx.x] + b[n - 1 - threadIdx.x];
}

template <int Value = 4, class T = float> __global__ void defaults(T *y) {
  y[threadIdx.x] = Value;
}

enum class Mode { add, multiply };
template <Mode M> __global__ void by_mode(float *y) {
  y[threadIdx.x] = M == Mode::add ? 1.0f : 2.0f;
}

union Four {
  float4 vector;
  float each[4];
};
__global__ void sums_of_four(const float4 *x, float *y) {
  Four four;
  four.vector = x[threadIdx.x];
  y[threadIdx.x] = four.each[0] + four.each[1] + four.each[2] + four.each[3];
}

struct Shape {
  int rows, cols;
  float scale;
};
__global__ void with_struct(Shape shape, const float *x, float *y) {
  int i = threadIdx.x;
  if (i < shape.rows * shape.cols)
    y[i] = shape.scale * x[i];
}

__global__ void halves(const __half *x, __half *y, const __nv_bfloat16 *a, __nv_bfloat16 *b) {
  int i = threadIdx.x;
  y[i] = __hadd(x[i], __float2half(1.0f));
  b[i] = __float2bfloat16(2.0f * __bfloat162float(a[i]));
}

__global__ void mathematics(float *y) {
  dim3 size(2, 3);
  y[0] = __fdividef(1.0f, 2.0f);
  y[1] = max(3, 4) + min(1u, 2u);
  y[2] = rsqrtf(4.0f);
  y[3] = isnan(NAN) && isinf(INFINITY) && isfinite(1.0f);
  y[4] = size.x * size.y * size.z;
}

__global__ void says(float x) {
  if (threadIdx.x == 0)
    printf("x = %f, %d%%\n", x, 42);
}

// The maximum of all numbers in shared memory: many barriers, any order.
__global__ void maximum(const float *x, float *y, int n) {
  __shared__ float most[128];
  float mine = -INFINITY;
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    mine = fmaxf(mine, x[i]);
  most[threadIdx.x] = mine;
  __syncthreads();
  for (int half = 64; half > 0; half /= 2) {
    if (threadIdx.x < half)
      most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0)
    y[blockIdx.x] = most[0];
}

__global__ void order_of_threads(int *next, int *y) {
  y[threadIdx.x] = atomicAdd(next, 1);
}

// --- stopped --------------------------------------------------------------------------------------------------------

__global__ void crashes(float *x) {
  x[threadIdx.x + (1ll << 40)] = 0.0f;  // STOPS
}

__global__ void divides(int *x) {
  x[0] = x[1] / x[2];  // STOPS
}

__device__ int depth(int *x, int n) {
  volatile int kept[64];
  kept[n % 64] = n;
  return x[0] == 0 ? depth(x, n + 1) + kept[n % 64] : 0;
}
__global__ void recurses(int *x) {
  x[1] = depth(x, 0);
}

__global__ void loops(int *x) {
  while (x[1] == 0)
    x[0]++;  // STOPS
}

__global__ void asserts(const int *x) {
  assert(x[threadIdx.x] >= 0);  // STOPS
}
