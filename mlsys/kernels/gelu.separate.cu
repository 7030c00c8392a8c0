// GELU of x + bias, rung 1: one kernel adds the bias, another one takes the GELU.
//
// What it does. What a framework does when it runs its operations one by one: x + bias is written to memory, and read
// again. GELU(x) = x · Φ(x), with Φ the normal distribution: exactly by erf, or nearly by tanh, as GPT-2 has it.
// What it moves. Two reads and two writes of every number, 16 bytes for floats; the bias besides, which stays in a
// cache.
// What to look at. In `profile`: the sectors of both kernels together, twice those of the next rung. The result of the
// first is rounded to the type of x, so in bfloat16 the two rungs differ in the last place: the fused one is the more
// exact.
//
// instances: add_bias<float>, gelu<float>, add_bias<__nv_bfloat16>, gelu<__nv_bfloat16>
#include <cuda_bf16.h>

// A row a block, blockDim.x numbers at a time.
template <class T>
__global__ void add_bias(int columns, const T *__restrict__ x, const T *__restrict__ bias, T *__restrict__ out) {
  long long row = (long long)blockIdx.x * columns;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[row + i] = (T)((float)x[row + i] + (float)bias[i]);
}

// √½ and √(2/π); approximate: by tanh instead of erf.
template <class T> __global__ void gelu(long long n, const T *__restrict__ x, T *__restrict__ out, int approximate) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    float v = (float)x[i];
    float phi = approximate ? 0.5f + 0.5f * tanhf(0.7978845608f * (v + 0.044715f * v * v * v))
                            : 0.5f * erfcf(-0.7071067812f * v);
    out[i] = (T)(v * phi);
  }
}
