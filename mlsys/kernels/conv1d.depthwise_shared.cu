// Depthwise 1-D convolution, rung 2: a block reads its numbers once, and the filter once, into shared memory.
//
// What changed. A block of blockDim.x results needs blockDim.x + width − 1 numbers of x: its own places and a halo
// beside them. They are read once, by neighbours from neighbours, with zeros where the row has ended; then each thread
// takes its `width` numbers from shared memory. The padding is dealt with on the way in, so the inner loop asks no
// questions.
// What it moves. One read of x (and the halo, (width − 1) / blockDim.x more), one write.
// What to look at. In `profile`: the line that reads x is near its ideal now. Lanes read neighbouring words of the
// tile, and all the same word of the filter, which is sent to all of them at once: no bank conflicts.
//
// instances: conv1d_shared<float>, conv1d_shared<__nv_bfloat16>
#include <cuda_bf16.h>

// As conv1d_naive; dynamic shared memory: width + blockDim.x + width − 1 floats.
template <class T>
__global__ void conv1d_shared(int channels, int length, int out_length, int width, int left, int across,
                              const T *__restrict__ x, const T *__restrict__ weight, const T *__restrict__ bias,
                              T *__restrict__ out) {
  extern __shared__ float filter[];
  float *tile = filter + width;  // tile[i] is x at first + i
  long long row = blockIdx.x / across;
  int channel = row % channels, start = blockIdx.x % across * blockDim.x, first = start - left;
  for (int k = threadIdx.x; k < width; k += blockDim.x) filter[k] = (float)weight[channel * width + k];
  for (int i = threadIdx.x; i < (int)blockDim.x + width - 1; i += blockDim.x) {
    int from = first + i;
    tile[i] = from >= 0 && from < length ? (float)x[row * length + from] : 0.0f;
  }
  __syncthreads();
  int t = start + threadIdx.x;
  if (t >= out_length) return;  // not before the barrier
  float sum = bias ? (float)bias[channel] : 0.0f;
  for (int k = 0; k < width; k++) sum += filter[k] * tile[threadIdx.x + k];
  out[row * out_length + t] = (T)sum;
}
