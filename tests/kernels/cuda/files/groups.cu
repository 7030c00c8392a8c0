// Cooperative groups; test_async.py has the tests.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

namespace cg = cooperative_groups;

// A row for each: the sum and the largest of a tile, the sum by shuffles, what a ballot says, the neighbour's value.
template <int Size> __device__ void tiles(const int *x, int *y) {
  cg::thread_block block = cg::this_thread_block();
  auto tile = cg::tiled_partition<Size>(block);
  int n = block.size(), i = block.thread_rank(), v = x[i];
  y[i] = cg::reduce(tile, v, cg::plus<int>());
  y[n + i] = cg::reduce(tile, v, cg::greater<int>());
  int sum = v;
  for (int by = tile.size() / 2; by; by /= 2) sum += tile.shfl_xor(sum, by);
  y[2 * n + i] = sum;
  y[3 * n + i] = tile.ballot(v % 3 == 0);
  y[4 * n + i] = tile.shfl_up(v, 1);
  y[5 * n + i] = tile.shfl(v, tile.meta_group_rank() % Size);
  y[6 * n + i] = tile.any(v > 90) * 2 + tile.all(v > 3);
  y[7 * n + i] = cg::inclusive_scan(tile, v, cg::plus<int>());
  block.sync();
}
__global__ void tiles_1(const int *x, int *y) { tiles<1>(x, y); }
__global__ void tiles_4(const int *x, int *y) { tiles<4>(x, y); }
__global__ void tiles_16(const int *x, int *y) { tiles<16>(x, y); }
__global__ void tiles_32(const int *x, int *y) { tiles<32>(x, y); }

// Lanes with odd numbers count themselves, twice.
__global__ void coalesced(int *total, int *y) {
  if (threadIdx.x % 2) {
    cg::coalesced_group group = cg::coalesced_threads();
    int first = 0;
    if (group.thread_rank() == 0) first = atomicAdd(total, (int)group.size());
    y[threadIdx.x] = group.shfl(first, 0) + group.thread_rank();
  } else {
    y[threadIdx.x] = -1;
  }
  __syncthreads();
  y[threadIdx.x] += 1000 * cg::coalesced_threads().size();
}
// One warp, of which half is one tile and half returns.
__global__ void half_a_warp(int *y) {
  auto tile = cg::tiled_partition<16>(cg::this_thread_block());
  if (tile.meta_group_rank() == 1) return;
  y[threadIdx.x] = cg::reduce(tile, (int)threadIdx.x, cg::less<int>()) + tile.shfl_down((int)threadIdx.x, 3);
}
__global__ void ranks(long long *y) {
  auto grid = cg::this_grid();
  y[grid.thread_rank()] = grid.size() * 1000 + cg::this_thread_block().group_index().x;
}
