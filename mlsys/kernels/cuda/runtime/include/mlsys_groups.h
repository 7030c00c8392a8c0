// cooperative_groups: a block, tiles of its warps, and the lanes that come together.
#pragma once
#include "mlsys_cuda.h"

namespace mlsys {
unsigned coalesced_lanes(const char *file, int line);
}

namespace cooperative_groups {

inline unsigned mlsys_rank() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

struct thread_block {
  static void sync(MLSYS_AT) { mlsys::wait_block("thread_block::sync", file, line); }
  void barrier_arrive_and_wait(MLSYS_AT) const { sync(file, line); }
  static unsigned thread_rank() { return mlsys_rank(); }
  static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned num_threads() { return size(); }
  static dim3 group_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  static dim3 thread_index() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
  static dim3 group_dim() { return blockDim; }
  static dim3 dim_threads() { return blockDim; }
};
inline thread_block this_thread_block() { return {}; }

// The grid's numbers; its barrier would need all blocks at once, and a processor runs them one after the other.
struct grid_group {
  static unsigned long long num_blocks() { return (unsigned long long)gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long block_rank() {
    return blockIdx.x + (unsigned long long)gridDim.x * (blockIdx.y + (unsigned long long)gridDim.y * blockIdx.z);
  }
  static unsigned long long size() { return num_blocks() * thread_block::size(); }
  static unsigned long long num_threads() { return size(); }
  static unsigned long long thread_rank() { return block_rank() * thread_block::size() + mlsys_rank(); }
  static dim3 group_dim() { return gridDim; }
  static dim3 dim_blocks() { return gridDim; }
  static dim3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  static bool is_valid() { return false; }
  template <bool Never = false>
  void sync() const {
    static_assert(Never, "grid.sync() does not run on a processor: end the kernel there, and launch a second one");
  }
};
inline grid_group this_grid() { return {}; }
template <bool Never = false>
inline grid_group this_multi_grid() {
  static_assert(Never, "groups of several GPUs do not run on a processor");
  return {};
}
template <bool Never = false>
inline thread_block this_cluster() {
  static_assert(Never, "clusters of blocks do not run on a processor");
  return {};
}

// Lanes of one warp, numbered in their order.
class mlsys_lanes {
 public:
  explicit mlsys_lanes(unsigned mask) : mask_(mask) {}
  void sync(MLSYS_AT) const { mlsys::wait_warp(mask_, "group sync", file, line); }
  unsigned size() const { return (unsigned)__builtin_popcount(mask_); }
  unsigned num_threads() const { return size(); }
  unsigned thread_rank() const { return (unsigned)__builtin_popcount(mask_ & ((1u << mlsys::lane()) - 1)); }
  template <class T>
  T shfl(T v, unsigned from, MLSYS_AT) const {
    return get(v, from, "group shfl", file, line);
  }
  template <class T>
  T shfl_up(T v, unsigned by, MLSYS_AT) const {
    unsigned me = thread_rank();
    return get(v, me >= by ? me - by : me, "group shfl_up", file, line);
  }
  template <class T>
  T shfl_down(T v, unsigned by, MLSYS_AT) const {
    unsigned me = thread_rank();
    return get(v, me + by < size() ? me + by : me, "group shfl_down", file, line);
  }
  int any(int p, MLSYS_AT) const { return mlsys::ballot(mask_, p != 0, "group any", file, line) != 0; }
  int all(int p, MLSYS_AT) const { return mlsys::ballot(mask_, p == 0, "group all", file, line) == 0; }
  unsigned ballot(int p, MLSYS_AT) const { return packed(mlsys::ballot(mask_, p != 0, "group ballot", file, line)); }
  template <class T>
  unsigned match_any(T v, MLSYS_AT) const {
    return packed(__match_any_sync(mask_, v, file, line));
  }
  template <class T, class Op>
  T mlsys_reduce(T v, Op op, const char *file, int line) const {
    return mlsys::reduce_lanes(mask_, v, op, "reduce", file, line);
  }
  template <class T, class Op>
  T mlsys_scan(T v, Op op, bool inclusive, const char *file, int line) const {
    unsigned mask = mask_, before = mask & ((1u << mlsys::lane()) - 1);
    return mlsys::collective(
        mask, v,
        [=](auto shown) {
          T r{};
          bool first = true;
          for (unsigned left = before; left; left &= left - 1, first = false)
            r = first ? shown(__builtin_ctz(left)) : op(r, shown(__builtin_ctz(left)));
          return !inclusive ? r : first ? v : op(r, v);
        },
        "scan", file, line);
  }

 protected:
  template <class T>
  T get(T v, unsigned rank, const char *what, const char *file, int line) const {
    return mlsys::shuffle(mask_, v, nth(rank % size()), what, file, line);
  }
  int nth(unsigned rank) const {
    unsigned left = mask_;
    while (rank--) left &= left - 1;
    return __builtin_ctz(left);
  }
  // Bits of lanes as bits of ranks.
  unsigned packed(unsigned lanes) const {
    unsigned r = 0, rank = 0;
    for (unsigned left = mask_; left; left &= left - 1, rank++)
      if (lanes & left & -left) r |= 1u << rank;
    return r;
  }
  unsigned mask_;
};

class coalesced_group : public mlsys_lanes {
 public:
  using mlsys_lanes::mlsys_lanes;
};
inline coalesced_group coalesced_threads(MLSYS_AT) { return coalesced_group(mlsys::coalesced_lanes(file, line)); }

template <unsigned Size, class Parent = void>
class thread_block_tile : public mlsys_lanes {
 public:
  static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads here");
  thread_block_tile() : mlsys_lanes((Size == 32 ? ~0u : (1u << Size % 32) - 1) << mlsys_rank() % 32 / Size * Size) {}
  static constexpr unsigned size() { return Size; }
  static constexpr unsigned num_threads() { return Size; }
  static unsigned thread_rank() { return mlsys_rank() % Size; }
  static unsigned meta_group_size() { return (thread_block::size() + Size - 1) / Size; }
  static unsigned meta_group_rank() { return mlsys_rank() / Size; }
  template <class T>
  T shfl_xor(T v, unsigned by, MLSYS_AT) const {
    return get(v, thread_rank() ^ by, "group shfl_xor", file, line);
  }
};
template <unsigned Size>
inline thread_block_tile<Size> tiled_partition(const thread_block &) {
  return {};
}
template <unsigned Size, unsigned Of, class P>
inline thread_block_tile<Size> tiled_partition(const thread_block_tile<Of, P> &) {
  static_assert(Size <= Of, "a part is not larger than the whole");
  return {};
}

template <class Group>
inline void sync(const Group &g, MLSYS_AT) {
  g.sync(file, line);
}

#define MLSYS_OPERATION(NAME, EXPR)                             \
  template <class T>                                            \
  struct NAME {                                                 \
    T operator()(const T &a, const T &b) const { return EXPR; } \
  };
MLSYS_OPERATION(plus, (T)(a + b))
MLSYS_OPERATION(less, b < a ? b : a) MLSYS_OPERATION(greater, a < b ? b : a) MLSYS_OPERATION(bit_and, (T)(a & b))
    MLSYS_OPERATION(bit_or, (T)(a | b)) MLSYS_OPERATION(bit_xor, (T)(a ^ b))
#undef MLSYS_OPERATION

        template <class Group, class T, class Op>
        inline T reduce(const Group &g, T v, Op op, MLSYS_AT) {
  return g.mlsys_reduce(v, op, file, line);
}
template <class Group, class T, class Op>
inline T inclusive_scan(const Group &g, T v, Op op, MLSYS_AT) {
  return g.mlsys_scan(v, op, true, file, line);
}
template <class Group, class T, class Op>
inline T exclusive_scan(const Group &g, T v, Op op, MLSYS_AT) {
  return g.mlsys_scan(v, op, false, file, line);
}
template <class Group, class T>
inline T inclusive_scan(const Group &g, T v, MLSYS_AT) {
  return g.mlsys_scan(v, plus<T>(), true, file, line);
}
template <class Group, class T>
inline T exclusive_scan(const Group &g, T v, MLSYS_AT) {
  return g.mlsys_scan(v, plus<T>(), false, file, line);
}

}  // namespace cooperative_groups
