// Depthwise 1-D convolution, rung 1: each thread reads the `width` numbers that its result is made of.
//
// What it does. Every channel has a filter of its own: out[b][c][t] = bias[c] + Σ_k weight[c][k] · x[b][c][t + k −
// left]. As in all of deep learning the filter is not turned round. `left` zeros stand before the row: width − 1 make
// it causal.
// What it moves. Neighbours share all but one of their numbers, and each reads them all: `width` reads a result. The
// L1 cache answers most of them, but every one is a request.
// What to look at. In `profile`: the line that reads x has `width` times the ideal sectors.
//
// instances: conv1d_naive<float>, conv1d_naive<__nv_bfloat16>
#include <cuda_bf16.h>

// blockDim.x results a block; blocks are numbered along the rows, `across` blocks a row. bias may be null.
template <class T>
__global__ void conv1d_naive(int channels, int length, int out_length, int width, int left, int across,
                             const T *__restrict__ x, const T *__restrict__ weight, const T *__restrict__ bias,
                             T *__restrict__ out) {
  long long row = blockIdx.x / across;  // of batch · channels
  int channel = row % channels, t = blockIdx.x % across * blockDim.x + threadIdx.x;
  if (t >= out_length) return;
  float sum = bias ? (float)bias[channel] : 0.0f;
  for (int k = 0; k < width; k++) {
    int from = t + k - left;
    if (from >= 0 && from < length) sum += (float)weight[channel * width + k] * (float)x[row * length + from];
  }
  out[row * out_length + t] = (T)sum;
}
