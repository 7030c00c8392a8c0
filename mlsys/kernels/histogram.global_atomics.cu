// Histogram, rung 1: every number adds 1 to its bin, in memory that all threads share.
//
// What it does. counts[v] += 1 from many threads at once loses counts: two read the same old value, and both write it
// plus one. atomicAdd does the three steps as one. Atomics on one address happen one after the other, in the L2 cache.
// What it moves. The n numbers, once; and an atomic for each of them.
// What to look at. In `profile`: as many atomics as numbers. It is the data that decides: if all fall into one bin,
// all wait in one queue. Leave the atomic out, and `check` says which line loses counts.
//
// instances: histogram_global<unsigned char>, histogram_global<int>

// Numbers that are no bin, below 0 or not below `bins`, are not counted. counts is 0 at the start.
template <class T>
__global__ void histogram_global(long long n, const T *__restrict__ x, int bins, int *__restrict__ counts) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    int bin = x[i];
    if (bin >= 0 && bin < bins) atomicAdd(&counts[bin], 1);
  }
}
