// What is moved in one piece: structures, and what memcpy, memmove and memset move, whether a kernel calls them or a
// compiler makes them of a loop or of a structure's copy. Each kernel has a wrong sibling.

struct Item {
  float values[5];
};
struct Pair {
  float x, y;
};

__global__ void copy_items(const Item *x, Item *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}
__global__ void copy_items_wrong(const Item *x, Item *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];  // MISTAKE out-of-bounds
}

__global__ void reverse_items(const Item *x, Item *y) {
  __shared__ Item items[64];
  int t = threadIdx.x;
  items[t] = x[t];
  __syncthreads();
  y[t] = items[63 - t];
}
__global__ void reverse_items_wrong(const Item *x, Item *y) {
  __shared__ Item items[64];
  int t = threadIdx.x;
  items[t] = x[t];       // MISTAKE race
  y[t] = items[63 - t];  // MISTAKE race
}

// A pair of floats need not lie at a multiple of its size.
__global__ void reverse_pairs(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) ((Pair *)(y + 1))[i] = ((const Pair *)(x + 1))[n - 1 - i];
}
__global__ void reverse_pairs_wrong(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) ((Pair *)(y + 1))[i] = ((const Pair *)(x + 1))[n - i];  // MISTAKE out-of-bounds
}

// One thread clears the array, in a loop that is a memset.
__global__ void count(const int *x, float *y, int n) {
  __shared__ float counts[256];
  if (threadIdx.x == 0)
    for (int i = 0; i < 256; i++) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&counts[x[i]], 1.0f);
  __syncthreads();
  y[threadIdx.x] = counts[threadIdx.x];
}
__global__ void count_wrong(const int *x, float *y, int n) {
  __shared__ float counts[256];
  if (threadIdx.x == 0)
    for (int i = 0; i < 256; i++) counts[i] = 0;                                            // MISTAKE race
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&counts[x[i]], 1.0f);  // MISTAKE race
  __syncthreads();
  y[threadIdx.x] = counts[threadIdx.x];
}

// And one copies a row, in a loop that is a memcpy.
__global__ void reverse_row(const float *x, float *y) {
  __shared__ float row[256];
  if (threadIdx.x == 0)
    for (int i = 0; i < 256; i++) row[i] = x[i];
  __syncthreads();
  y[threadIdx.x] = row[255 - threadIdx.x];
}
__global__ void reverse_row_wrong(const float *x, float *y) {
  __shared__ float row[256];
  if (threadIdx.x == 0)
    for (int i = 0; i < 256; i++) row[i] = x[i + 1];  // MISTAKE out-of-bounds
  __syncthreads();
  y[threadIdx.x] = row[255 - threadIdx.x];
}

__global__ void pad(const float *x, float *y, int n) {
  __shared__ float row[256];
  if (threadIdx.x == 0) memset(row, 0, sizeof row);
  __syncthreads();
  if (threadIdx.x == 32) std::memcpy(row, x, n * sizeof(float));
  __syncthreads();
  if (threadIdx.x == 64) memmove(row + 1, row, 255 * sizeof(float));
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x];
}
__global__ void pad_wrong(const float *x, float *y, int n) {
  __shared__ float row[256];
  if (threadIdx.x == 0) memset(row, 0, sizeof row);               // MISTAKE race
  if (threadIdx.x == 32) std::memcpy(row, x, n * sizeof(float));  // MISTAKE race
  __syncthreads();
  if (threadIdx.x == 64) memmove(row + 1, row, 255 * sizeof(float));
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x];
}
