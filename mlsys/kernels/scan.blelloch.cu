// Prefix sums, rung 2: up a tree and down again, as many additions as there are numbers, twice.
//
// What changed. The up-sweep adds pairs, then pairs of pairs: a tree of sums, in place, n − 1 additions. The
// down-sweep puts 0 at the root; every node then hands its value to its left child, and its value plus the left
// child's sum to its right child. n − 1 additions more, and each leaf holds the sum of all leaves before it. Work is
// linear, but 2 · log2(n) steps instead of log2(n), and most threads idle in most of them: on hardware that runs 32
// lanes anyway less work is not always less time. Blocks are joined as in the rung before.
// What it moves. 16 bytes a number, as before; but each thread now has two numbers, so half the threads do the same.
// What to look at. The nodes of a level lie 2, 4, 8 … words apart, so without care they meet in the same banks, 32 at
// once in the end. One unused word after every 32 (`padded`) moves them apart: in `profile`, set it to `return i` and
// see.

__device__ int padded(int i) { return i + i / 32; }

// Two numbers a thread, blockDim.x a power of two, at most 512; totals may be null.
__global__ void scan_blocks(long long n, const float *__restrict__ x, float *__restrict__ out,
                            float *__restrict__ totals, int exclusive) {
  __shared__ float tree[1024 + 32];
  int t = threadIdx.x, size = 2 * blockDim.x;
  long long first = blockIdx.x * (long long)size;
  float mine[2];
  for (int k = 0; k < 2; k++) {
    int place = t + k * blockDim.x;  // not 2t and 2t + 1: neighbours read neighbours
    mine[k] = first + place < n ? x[first + place] : 0.0f;
    tree[padded(place)] = mine[k];
  }
  for (int distance = 1; distance < size; distance *= 2) {  // up: nodes of 2 · distance leaves
    __syncthreads();
    int right = 2 * distance * (t + 1) - 1;
    if (right < size) tree[padded(right)] += tree[padded(right - distance)];
  }
  __syncthreads();
  if (t == 0) {
    if (totals) totals[blockIdx.x] = tree[padded(size - 1)];
    tree[padded(size - 1)] = 0.0f;
  }
  for (int distance = size / 2; distance > 0; distance /= 2) {  // down
    __syncthreads();
    int right = 2 * distance * (t + 1) - 1;
    if (right < size) {
      float before = tree[padded(right)], left = tree[padded(right - distance)];
      tree[padded(right - distance)] = before;
      tree[padded(right)] = before + left;
    }
  }
  __syncthreads();
  for (int k = 0; k < 2; k++) {
    int place = t + k * blockDim.x;
    if (first + place < n) out[first + place] = tree[padded(place)] + (exclusive ? 0.0f : mine[k]);
  }
}

// offsets[b] is the sum of all numbers before block b; as many threads a block as scan_blocks has numbers a block.
__global__ void add_offsets(long long n, float *__restrict__ out, const float *__restrict__ offsets) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) out[i] += offsets[blockIdx.x];
}
