// half and bfloat16 as kernels use them; test_formats.py compares with torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T> __device__ T make(float x);
template <> __device__ __half make<__half>(float x) { return __float2half(x); }
template <> __device__ __nv_bfloat16 make<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

template <class T> __device__ void widen(int n, const T *x, float *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = (float)x[i];
}
template <class T> __device__ void narrow(int n, const float *x, T *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = make<T>(x[i]);
}
template <class T> __device__ void narrow_double(int n, const double *x, T *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = T(x[i]);
}
template <class T> __device__ void narrow_int(int n, const int *x, T *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = T(x[i]);
}

// y: a row for each operation
template <class T> __device__ void arithmetic(int n, const T *a, const T *b, const T *c, T *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  T r[] = {a[i] + b[i], a[i] - b[i], a[i] * b[i], a[i] / b[i], -a[i], __hfma(a[i], b[i], c[i]), __hmax(a[i], b[i]),
           __hmin(a[i], b[i]), __habs(a[i]), hexp(a[i]), hsqrt(__habs(a[i])), hrcp(a[i])};
  for (int k = 0; k < 12; k++) y[k * n + i] = r[k];
}
template <class T> __device__ void compare(int n, const T *a, const T *b, int *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[i] = (a[i] < b[i]) | (a[i] <= b[i]) << 1 | (a[i] == b[i]) << 2 | (a[i] != b[i]) << 3 | __hgt(a[i], b[i]) << 4 |
         __hge(a[i], b[i]) << 5 | __hisnan(a[i]) << 6;
}

// Each for both formats.
__global__ void widen_half(int n, const __half *x, float *y) { widen(n, x, y); }
__global__ void narrow_half(int n, const float *x, __half *y) { narrow(n, x, y); }
__global__ void narrow_double_half(int n, const double *x, __half *y) { narrow_double(n, x, y); }
__global__ void narrow_int_half(int n, const int *x, __half *y) { narrow_int(n, x, y); }
__global__ void arithmetic_half(int n, const __half *a, const __half *b, const __half *c, __half *y) { arithmetic(n, a,
    b, c, y); }
__global__ void compare_half(int n, const __half *a, const __half *b, int *y) { compare(n, a, b, y); }
__global__ void widen_bfloat16(int n, const __nv_bfloat16 *x, float *y) { widen(n, x, y); }
__global__ void narrow_bfloat16(int n, const float *x, __nv_bfloat16 *y) { narrow(n, x, y); }
__global__ void narrow_double_bfloat16(int n, const double *x, __nv_bfloat16 *y) { narrow_double(n, x, y); }
__global__ void narrow_int_bfloat16(int n, const int *x, __nv_bfloat16 *y) { narrow_int(n, x, y); }
__global__ void arithmetic_bfloat16(int n, const __nv_bfloat16 *a, const __nv_bfloat16 *b, const __nv_bfloat16 *c,
    __nv_bfloat16 *y) { arithmetic(n, a, b, c, y); }
__global__ void compare_bfloat16(int n, const __nv_bfloat16 *a, const __nv_bfloat16 *b, int *y) { compare(n, a, b, y); }

// Pairs: b · a + a, then both halves swapped, through shared memory.
__global__ void pairs(const __half2 *a, const __half2 *b, __half2 *y, float2 *wide) {
  __shared__ __half2 s[32];
  s[threadIdx.x] = __hfma2(a[threadIdx.x], b[threadIdx.x], a[threadIdx.x]);
  __syncthreads();
  __half2 v = s[threadIdx.x];
  y[threadIdx.x] = __halves2half2(__high2half(v), __low2half(v));
  wide[threadIdx.x] = __half22float2(v);
}
__global__ void pairs_bfloat16(const __nv_bfloat162 *a, const __nv_bfloat162 *b, __nv_bfloat162 *y, float *wide) {
  __nv_bfloat162 v = __hmul2(a[threadIdx.x], b[threadIdx.x]);
  y[threadIdx.x] = __float22bfloat162_rn(__bfloat1622float2(v));
  wide[threadIdx.x] = __low2float(v) + __high2float(v);
}

__global__ void sums(const __half *x, __half *sum, __half2 *sum2, __nv_bfloat16 *sum_b) {
  atomicAdd(sum, x[threadIdx.x]);
  atomicAdd(sum2, __halves2half2(x[threadIdx.x], __float2half(1.0f)));
  atomicAdd(sum_b, __float2bfloat16(1.0f));
}
__global__ void shuffles(const __half *x, __half *y) {
  __half v = x[threadIdx.x];
  for (int by = 16; by; by /= 2) v = __hadd(v, __shfl_xor_sync(0xffffffff, v, by));
  y[threadIdx.x] = v;
}

// Arrays of half in shared memory, static and dynamic.
__global__ void reversed(const __half *x, __half *y) {
  __shared__ __half a[256];
  extern __shared__ __half b[];
  a[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  b[threadIdx.x] = a[255 - threadIdx.x] + __half(1);
  __syncthreads();
  y[threadIdx.x] = b[threadIdx.x];
}
__global__ void unordered(const __half *x, __half *y) {
  __shared__ __half a[256];
  a[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = a[255 - threadIdx.x];
}
__global__ void scaled(int n, __half factor, const __half *x, __half *y) {
  if (threadIdx.x < n) y[threadIdx.x] = factor * x[threadIdx.x];
}
