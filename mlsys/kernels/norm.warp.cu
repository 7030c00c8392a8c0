// LayerNorm and RMSNorm, rung 2: a warp a row, and mean and variance in one pass.
//
// What changed. The rows of a transformer have some hundred to some thousand numbers: a warp can do one by itself, and
// then nothing goes through shared memory and no warp waits for another. LayerNorm's statistics are Welford's: count,
// mean, and the sum of squares about the mean, all three put right with every number. Two such triples are merged by
// the formula of Chan, Golub and LeVeque, first number by number, then lane by lane. It subtracts the mean of what was
// seen so far and so keeps the digits that Σx² − n · mean² loses, without the second pass.
// What it moves. Two reads of the row and one write. The price: a division a number; memory is slower than that.
// What to look at. In `profile`: two lines that read x instead of three, no shared memory at all. For rows of tens of
// thousands of numbers one warp is too few to keep memory busy: there the rung before is the faster one.
//
// instances: layernorm_warp<float>, rmsnorm_warp<float>, layernorm_warp<__nv_bfloat16>, rmsnorm_warp<__nv_bfloat16>
#include <cuda_bf16.h>

constexpr unsigned EVERYBODY = 0xffffffffu;

struct Moments {
  float count, mean, squares;  // squares: the sum of (x − mean)²
};

__device__ Moments merged(Moments a, Moments b) {
  float count = a.count + b.count;
  if (count == 0.0f) return a;  // lanes beyond a short row have seen nothing
  float away = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + away * share, a.squares + b.squares + away * away * a.count * share};
}

// Blocks of 32 × rows-a-block threads; bias may be null.
template <class T>
__global__ void layernorm_warp(int rows, int columns, const T *__restrict__ x, const T *__restrict__ weight,
                               const T *__restrict__ bias, float eps, T *__restrict__ out) {
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // the whole warp leaves, so no lane is missing at the shuffles
  x += row * columns;
  out += row * columns;

  Moments seen = {0.0f, 0.0f, 0.0f};
  for (int i = threadIdx.x; i < columns; i += 32) {
    float value = (float)x[i], away = value - seen.mean;
    seen.count += 1.0f;
    seen.mean += away / seen.count;
    seen.squares += away * (value - seen.mean);
  }
  for (int step = 16; step > 0; step /= 2)
    seen = merged(seen, {__shfl_xor_sync(EVERYBODY, seen.count, step), __shfl_xor_sync(EVERYBODY, seen.mean, step),
                         __shfl_xor_sync(EVERYBODY, seen.squares, step)});
  float scale = rsqrtf(seen.squares / columns + eps);

  for (int i = threadIdx.x; i < columns; i += 32) {
    float value = ((float)x[i] - seen.mean) * scale * (float)weight[i];
    out[i] = (T)(bias ? value + (float)bias[i] : value);
  }
}

// Blocks of 32 × rows-a-block threads.
template <class T>
__global__ void rmsnorm_warp(int rows, int columns, const T *__restrict__ x, const T *__restrict__ weight, float eps,
                             T *__restrict__ out) {
  long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  x += row * columns;
  out += row * columns;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < columns; i += 32) squares += (float)x[i] * (float)x[i];
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(EVERYBODY, squares, step);
  float scale = rsqrtf(squares / columns + eps);

  for (int i = threadIdx.x; i < columns; i += 32) out[i] = (T)((float)x[i] * scale * (float)weight[i]);
}
