// Transpose, rung 3: one unused word at the end of each row of the tile.
//
// What changed. A row of the tile is 33 words, so the words of a column lie 33 apart: one bank further each time, 32
// different banks. That costs 128 bytes of shared memory.
// What it moves. As before 4 bytes a number to read and 4 to write.
// What to look at. In `profile`: no bank conflicts are left. Of numbers of 2 bytes two lie in a word, so a row of 33 is
// 16.5 words: every second column still takes 2 passes, where the rung before takes 16.
//
// instances: transpose_padded<float>, transpose_padded<__nv_bfloat16>
#include <cuda_bf16.h>

// Blocks of 32 × 8 threads, each for a tile of 32 × 32; tiles are numbered along the rows of x.
template <class T>
__global__ void transpose_padded(int rows, int columns, const T *__restrict__ x, T *__restrict__ out) {
  __shared__ T tile[32][33];
  int across = (columns + 31) / 32;
  int left = blockIdx.x % across * 32, top = blockIdx.x / across * 32;
  int column = left + threadIdx.x;
  for (int y = threadIdx.y; y < 32; y += blockDim.y)
    if (top + y < rows && column < columns) tile[y][threadIdx.x] = x[(long long)(top + y) * columns + column];
  __syncthreads();
  int row = top + threadIdx.x;
  for (int y = threadIdx.y; y < 32; y += blockDim.y)
    if (left + y < columns && row < rows) out[(long long)(left + y) * rows + row] = tile[threadIdx.x][y];
}
