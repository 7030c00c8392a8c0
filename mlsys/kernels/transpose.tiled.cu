// Transpose, rung 2: a tile is turned in shared memory, so that both the read and the write go along rows.
//
// What changed. A block reads a tile of 32 × 32 numbers row by row, waits, and writes it column by column: what one
// thread has read another one writes. Shared memory does not mind in which order its words are used, as global memory
// does.
// What it moves. 4 bytes a number to read and 4 to write: all that a transpose must.
// What to look at. In `profile`: sectors are ideal now, but a column of the tile is 32 words that lie 32 words apart,
// all in one bank: reading it takes 32 passes instead of 1. The next rung differs in one character.
//
// instances: transpose_tiled<float>, transpose_tiled<__nv_bfloat16>
#include <cuda_bf16.h>

// Blocks of 32 × 8 threads, each for a tile of 32 × 32; tiles are numbered along the rows of x.
template <class T>
__global__ void transpose_tiled(int rows, int columns, const T *__restrict__ x, T *__restrict__ out) {
  __shared__ T tile[32][32];
  int across = (columns + 31) / 32;
  int left = blockIdx.x % across * 32, top = blockIdx.x / across * 32;
  int column = left + threadIdx.x;
  for (int y = threadIdx.y; y < 32; y += blockDim.y)
    if (top + y < rows && column < columns) tile[y][threadIdx.x] = x[(long long)(top + y) * columns + column];
  __syncthreads();
  int row = top + threadIdx.x;  // threadIdx.x now counts along a column of the tile, which is a row of out
  for (int y = threadIdx.y; y < 32; y += blockDim.y)
    if (left + y < columns && row < rows) out[(long long)(left + y) * rows + row] = tile[threadIdx.x][y];
}
