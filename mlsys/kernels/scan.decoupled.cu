// Prefix sums, rung 3: one pass. A block does not wait for the sums before it to be known, it looks back for them.
//
// What changed. A tile (one block's numbers) publishes its own total as soon as it has it, and later the sum of
// everything up to its end. A tile that needs what came before it looks at its predecessors, nearest first: it adds up
// totals until it meets a tile that already knows the whole sum. So a tile waits for its neighbours to have read their
// numbers, not for all of a chain to have finished, and the numbers are read once and written once. A warp looks at 32
// predecessors at a time. Blocks may start in any order, so a tile's number is drawn at the start: those before it are
// then known to be running, and waiting for them ends. A flag and its value are one 64-bit word, written at once, so
// no fence has to order them.
// Inside the tile: 4 numbers a thread, shuffles within the warp, one number a warp through shared memory. A thread
// wants 4 neighbours, but a warp should read 32 neighbours at a time: the numbers change hands in shared memory, both
// ways.
// What it moves. One read and one write of n numbers, 8 bytes a number, and 8 bytes a tile of blockDim · 4 numbers.
// What to look at. In `profile`: half the sectors of the rungs before. Floating-point sums may differ in the last bits
// from run to run, since how far a tile has to look back, and so the order of its additions, is a matter of time.

constexpr int ITEMS = 4;  // numbers a thread: a float4
constexpr unsigned EVERYBODY = 0xffffffffu;
enum Flag : unsigned { NOTHING = 0, TOTAL = 1, UP_TO_HERE = 2 };

__device__ void publish(volatile unsigned long long *word, Flag flag, float value) {
  *word = (unsigned long long)flag << 32 | __float_as_uint(value);
}

// The sum of this lane's value and of those of all lanes before it.
__device__ float warp_scan(float value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    float before = __shfl_up_sync(EVERYBODY, value, distance);
    if (threadIdx.x % 32 >= distance) value += before;
  }
  return value;
}

// The sum of everything before `tile`, by all lanes of one warp.
__device__ float look_back(const volatile unsigned long long *words, long long tile) {
  int lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (long long nearest = tile - 1;; nearest -= 32) {  // lane 0 looks at the nearest tile, lane 31 at the farthest
    unsigned flag = UP_TO_HERE;  // before the first tile there is nothing: 0, and it is known
    float value = 0.0f;
    if (nearest - lane >= 0) {
      unsigned long long word = words[nearest - lane];
      while (word >> 32 == NOTHING) word = words[nearest - lane];
      flag = (unsigned)(word >> 32);
      value = __uint_as_float((unsigned)word);
    }
    unsigned known = __ballot_sync(EVERYBODY, flag == UP_TO_HERE);
    if (known && lane > __ffs((int)known) - 1) value = 0.0f;  // what is farther is in the known sum already
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(EVERYBODY, value, step);
    sum += value;
    if (known) return sum;
  }
}

// blockDim.x is a multiple of 32. words: one a tile, and drawn: one, all 0 at the start.
__global__ void scan_decoupled(long long n, const float *__restrict__ x, float *__restrict__ out,
                               volatile unsigned long long *words, unsigned *drawn, int exclusive) {
  __shared__ unsigned number;
  __shared__ float of_warp[32], before_tile;
  __shared__ __align__(16) float stage[1024 * ITEMS];
  int t = threadIdx.x, lane = t % 32, warp = t / 32, warps = blockDim.x / 32;
  if (t == 0) number = atomicAdd(drawn, 1u);
  __syncthreads();
  long long tile = number, first = tile * blockDim.x * ITEMS;

  for (int place = t; place < (int)blockDim.x * ITEMS; place += blockDim.x)
    stage[place] = first + place < n ? x[first + place] : 0.0f;
  __syncthreads();
  float4 own = *(const float4 *)&stage[ITEMS * t];  // 16 bytes a thread: 8 threads at a time use each bank once
  float item[ITEMS] = {own.x, own.x + own.y, (own.x + own.y) + own.z, ((own.x + own.y) + own.z) + own.w};
  float sum = item[ITEMS - 1];
  float up_to = warp_scan(sum);
  if (lane == 31) of_warp[warp] = up_to;
  __syncthreads();
  if (warp == 0) {
    float scanned = warp_scan(lane < warps ? of_warp[lane] : 0.0f);
    float total = __shfl_sync(EVERYBODY, scanned, warps - 1);
    if (lane == 0 && tile > 0) publish(&words[tile], TOTAL, total);
    float before = look_back(words, tile);
    if (lane == 0) {
      publish(&words[tile], UP_TO_HERE, before + total);
      before_tile = before;
    }
    if (lane < warps) of_warp[lane] = scanned;
  }
  __syncthreads();

  float before = __shfl_up_sync(EVERYBODY, up_to, 1);  // of the lanes before this one
  before = before_tile + (warp > 0 ? of_warp[warp - 1] : 0.0f) + (lane > 0 ? before : 0.0f);
  *(float4 *)&stage[ITEMS * t] =
      exclusive ? make_float4(before, before + item[0], before + item[1], before + item[2])
                : make_float4(before + item[0], before + item[1], before + item[2], before + item[3]);
  __syncthreads();
  for (int place = t; place < (int)blockDim.x * ITEMS; place += blockDim.x)
    if (first + place < n) out[first + place] = stage[place];
}
