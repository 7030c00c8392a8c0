// Prefix sums, rung 1: log2(n) steps, in each of which every thread adds what lies 1, 2, 4 … places before it.
//
// What it does. After the step of distance d, place i holds the sum of the 2d numbers up to i. All threads work in
// every step, so there are few steps, log2(blockDim), but blockDim · log2(blockDim) additions where one thread needs
// blockDim. Two copies of the row take turns, so a thread never overwrites what its neighbour has yet to read: one
// barrier a step.
// Blocks do not talk to each other. Each scans its own numbers and leaves its total; the totals are scanned by the
// same kernel (and their totals, and so on); add_offsets adds to each block what came before it.
// What it moves. Two reads and two writes of n numbers, 16 bytes a number: scan_blocks and add_offsets both pass over
// all.
// What to look at. In `profile`: shared memory is read and written log2(blockDim) times a number.

// One number a thread; totals may be null.
__global__ void scan_blocks(long long n, const float *__restrict__ x, float *__restrict__ out,
                            float *__restrict__ totals, int exclusive) {
  __shared__ float row[2][1024];
  int t = threadIdx.x, now = 0;
  long long i = blockIdx.x * (long long)blockDim.x + t;
  float mine = i < n ? x[i] : 0.0f;
  row[0][t] = mine;
  __syncthreads();
  for (int distance = 1; distance < (int)blockDim.x; distance *= 2) {
    row[1 - now][t] = t >= distance ? row[now][t] + row[now][t - distance] : row[now][t];
    now = 1 - now;
    __syncthreads();
  }
  // The sum before a number is the sum up to the one before it: no subtraction, which would round once more.
  if (i < n) out[i] = !exclusive ? row[now][t] : t > 0 ? row[now][t - 1] : 0.0f;
  if (totals && t == (int)blockDim.x - 1) totals[blockIdx.x] = row[now][t];
}

// offsets[b] is the sum of all numbers before block b; as many threads a block as scan_blocks has numbers a block.
__global__ void add_offsets(long long n, float *__restrict__ out, const float *__restrict__ offsets) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) out[i] += offsets[blockIdx.x];
}
