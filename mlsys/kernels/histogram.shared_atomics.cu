// Histogram, rung 2: each block counts for itself in shared memory, and adds its counts to the others' at the end.
//
// What changed. The block's own copy of the bins is near: an atomic there takes a fraction of the time, and only the
// block's threads queue for it. In the end each block does one atomic a bin, not one a number: with 256 bins and
// 65,536 numbers a block that is 1 for 256.
// What it moves. The n numbers, once, and one atomic a bin and block.
// What to look at. In `profile`: hardly any atomics on memory. Two barriers, and both are needed: the bins must be 0
// before the first count, and complete before they are added.
//
// instances: histogram_shared<unsigned char>, histogram_shared<int>

// As histogram_global; dynamic shared memory: bins ints.
template <class T>
__global__ void histogram_shared(long long n, const T *__restrict__ x, int bins, int *__restrict__ counts) {
  extern __shared__ int mine[];
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) mine[bin] = 0;
  __syncthreads();
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    int bin = x[i];
    if (bin >= 0 && bin < bins) atomicAdd(&mine[bin], 1);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x)
    if (mine[bin] > 0) atomicAdd(&counts[bin], mine[bin]);
}
