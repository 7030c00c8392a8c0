// Rung 10 of the matmul ladder: Hopper, where one thread moves tiles and 128 threads multiply them in one instruction.
//
// Changed against `mma`:
// 1. TMA: a single thread orders a whole box of a matrix into shared memory, swizzled, its edges filled with zeros.
//    Addresses, bounds and swizzle are the hardware's work; 255 other threads have nothing to compute for it.
// 2. An mbarrier for each stage counts the bytes that have arrived (`full`), another the warps that have read them
//    (`empty`). No barrier of the whole block is left in the loop.
// 3. wgmma reads its factors from shared memory itself and runs on its own: the sums are in registers, nothing else is.
//    One is always under way while the next is issued; a stage is given back when the product after it has begun.
// 4. Warps are specialised: one warpgroup only loads, two only multiply, 64 × BN each. The loader gives its registers
//    away.
// 5. The grid is persistent: as many blocks as SMs walk over all tiles. The next tile's loads begin while the last
//    one's sums are still being stored.
// 6. C is stored by TMA as well, from shared memory: full rows of 128 bytes, without a wait.
//
// The rows of a TMA matrix are multiples of 16 bytes: matmul_cuda pads k and n to multiples of 8, where they are not.
//
// Moves per FLOP: (1/BM + 1/BN) bytes of global memory, 3/256 for 128 × 256, of which the L2 cache serves most.
// Look at, in the report: no spill with 128 sums a thread; wgmma without a wait between (ptxas says if it has to
// serialise).
//
// arch: sm_90a
// instances: matmul_hopper<256, 4>
#include <cuda_bf16.h>
#include <mlsys/ptx.cuh>

namespace ptx = mlsys::ptx;

constexpr int consumers = 2, BM = consumers * 64, BK = 64;  // a row of 64 bfloat16 is what the 128-byte swizzle spans
constexpr int store_cols = 128;                             // columns of C that a consumer stores at a time

// The tile with this number: down a group of 16 rows of tiles, then along the next column of it, so that blocks that
// run at the same time share tiles of A and B in the L2 cache.
__device__ __forceinline__ void place(int tile, int tiles_m, int tiles_n, int &tile_m, int &tile_n) {
  constexpr int group = 16;
  int first = tile / (group * tiles_n) * group, rows = min(tiles_m - first, group), within = tile % (group * tiles_n);
  tile_m = first + within % rows;
  tile_n = within / rows;
}

// a_map: boxes of BM × 64; b_map: of 64 × 64; c_map: of 64 × 64, all swizzled.
template <int BN, int Stages>
__global__ void __launch_bounds__((consumers + 1) * 128, 1)
    matmul_hopper(int m, int n, int k, const __grid_constant__ CUtensorMap a_map,
                  const __grid_constant__ CUtensorMap b_map, const __grid_constant__ CUtensorMap c_map) {
  constexpr int a_bytes = BM * BK * 2, b_bytes = BK * BN * 2, box = 64 * 64;  // of a stage; elements of a box
  constexpr int part = BN < store_cols ? BN : store_cols;
  extern __shared__ unsigned char dynamic[];
  __shared__ ptx::mbarrier full[Stages], empty[Stages];
  // Swizzled tiles begin at multiples of 1,024 bytes.
  unsigned char *start = dynamic + (1024 - reinterpret_cast<size_t>(dynamic) % 1024) % 1024;
  __nv_bfloat16 *a_tiles = reinterpret_cast<__nv_bfloat16 *>(start);
  __nv_bfloat16 *b_tiles = reinterpret_cast<__nv_bfloat16 *>(start + Stages * a_bytes);
  __nv_bfloat16 *c_tiles = reinterpret_cast<__nv_bfloat16 *>(start + Stages * (a_bytes + b_bytes));

  int tiles_m = (m + BM - 1) / BM, tiles_n = (n + BN - 1) / BN, steps = (k + BK - 1) / BK;
  int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages; i++) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], consumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  int stage = 0, phase = 0;  // the next stage, and how often, modulo 2, all of them have been gone through
  auto next_stage = [&] {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == consumers) {  // the producer
    ptx::setmaxnreg_dec<40>();
    if (thread != 0) return;
    ptx::prefetch_tensor_map(&a_map);
    ptx::prefetch_tensor_map(&b_map);
    for (int tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
      int tile_m, tile_n;
      place(tile, tiles_m, tiles_n, tile_m, tile_n);
      for (int step = 0; step < steps; step++, next_stage()) {
        ptx::mbarrier_wait(&empty[stage], phase ^ 1);  // of a fresh mbarrier the phase before the first is over
        ptx::mbarrier_arrive_expect_tx(&full[stage], a_bytes + b_bytes);
        ptx::tma_load_2d(a_tiles + stage * BM * BK, &a_map, &full[stage], step * BK, tile_m * BM);
#pragma unroll
        for (int i = 0; i < BN / 64; i++)
          ptx::tma_load_2d(b_tiles + stage * BK * BN + i * box, &b_map, &full[stage], tile_n * BN + i * 64, step * BK);
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();
  int warp = thread / 32, lane = thread % 32;
  __nv_bfloat16 *c_tile = c_tiles + warpgroup * 64 * part;
  float sum[BN / 2];
  for (int tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
    int tile_m, tile_n;
    place(tile, tiles_m, tiles_n, tile_m, tile_n);
    int before = 0;
    for (int step = 0; step < steps; step++, next_stage()) {
      ptx::mbarrier_wait(&full[stage], phase);
      const __nv_bfloat16 *a_tile = a_tiles + stage * BM * BK + warpgroup * box, *b_tile = b_tiles + stage * BK * BN;
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < BK; i += 16)  // 16 of k: 32 bytes further in A's rows, 16 rows of 128 bytes in B
        ptx::wgmma<BN, __nv_bfloat16, 0, 1>(sum, ptx::wgmma_desc(a_tile + i),
                                            ptx::wgmma_desc(b_tile + i * 64, box * 2), step > 0 || i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the products of the step before are done: its stage may be filled again
      if (step > 0 && lane == 0) ptx::mbarrier_arrive(&empty[before]);
      before = stage;
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::mbarrier_arrive(&empty[before]);

    // Sums to shared memory, swizzled as TMA reads them, and from there to C, `part` columns at a time.
#pragma unroll
    for (int first = 0; first < BN; first += part) {
      if (thread == 0) ptx::bulk_wait_read<0>();  // the store before has read the tile,
      ptx::bar_sync(1 + warpgroup, 128);          // and all know it
#pragma unroll
      for (int i = 0; i < part / 8; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int row = warp * 16 + half * 8 + lane / 4, piece = i % 8 ^ row % 8, at = (first / 8 + i) * 4 + half * 2;
          *reinterpret_cast<__nv_bfloat162 *>(c_tile + i / 8 * box + row * 64 + piece * 8 + lane % 4 * 2) =
              __floats2bfloat162_rn(sum[at], sum[at + 1]);
        }
      ptx::fence_proxy_async();
      ptx::bar_sync(1 + warpgroup, 128);
      if (thread == 0) {
#pragma unroll
        for (int i = 0; i < part / 64; i++)
          ptx::tma_store_2d(&c_map, c_tile + i * box, tile_n * BN + first + i * 64, tile_m * BM + warpgroup * 64);
        ptx::bulk_commit();
      }
    }
  }
  if (thread == 0) ptx::bulk_wait<0>();
}
