// Transpose, rung 1: each thread carries one number from x[row][column] to out[column][row].
//
// What it does. Neighbouring threads take neighbouring columns, so a warp reads 32 numbers in a row: 128 bytes, 4
// sectors. It writes them `rows` apart: 32 sectors of 32 bytes, of which 4 bytes each are wanted.
// What it moves. 4 bytes a number to read, and up to 32 to write.
// What to look at. In `profile`: the line that writes has 8 times its ideal sectors. Exchanging the roles of row and
// column only moves the trouble from the write to the read.
//
// instances: transpose_naive<float>, transpose_naive<__nv_bfloat16>
#include <cuda_bf16.h>

// Blocks of 32 × 8 threads, each for a tile of 32 × 32; tiles are numbered along the rows of x.
template <class T>
__global__ void transpose_naive(int rows, int columns, const T *__restrict__ x, T *__restrict__ out) {
  int across = (columns + 31) / 32;
  int column = blockIdx.x % across * 32 + threadIdx.x, top = blockIdx.x / across * 32;
  for (int row = top + threadIdx.y; row < top + 32 && row < rows; row += blockDim.y)
    if (column < columns) out[(long long)column * rows + row] = x[(long long)row * columns + column];
}
