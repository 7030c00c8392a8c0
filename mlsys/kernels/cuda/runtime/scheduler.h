// What the parts of the runtime know of each other: the threads of a block, and what is told of them to the checker.
//
// A worker is an OS thread that runs blocks, one after the other, each to its end. It has a copy of the kernel's
// library of its own, so that a `__shared__` variable, a static one there, is one per worker, as it is one per block.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define MLSYS_API __attribute__((visibility("default")))

namespace mlsys {

enum class State : uint8_t { fresh, ready, at_block, at_warp, at_mbarrier, done };

// Below a stack lies a page that may not be touched.
#if defined(__aarch64__)
constexpr size_t page = 64 << 10;  // the largest that Linux has there; smaller ones do as well
#else
constexpr size_t page = 4 << 10;
#endif
constexpr size_t stack_size = 64 << 10, stack_stride = stack_size + page;
constexpr int max_threads = 1024, warp_size = 32, max_barriers = 16;

struct Place {
  const char *file;
  int line;
};

struct Thread {
  void *sp = nullptr;  // where it goes on
  int stack = -1;      // which stack it lies on
  State state = State::fresh;
  uint8_t half = 0;       // which half of the exchange buffer it uses next
  uint8_t barrier = 0;    // at_block: which of the block's barriers
  uint8_t parity = 0;     // at_mbarrier: the phase whose end it waits for
  unsigned mask = 0;      // at_warp: with whom
  unsigned met = 0;       // whom it met there the last time
  const char *what = "";  // what it waits at
  Place place{};
  void *mbarrier = nullptr;
  unsigned index[3];
};

struct Barrier {
  int arrived = 0, expected = 0;
};

// Written by Python (launch.py has the same layout).
struct Region {
  char *lo;
  uint64_t bytes;
  uint32_t unit, index;
};
struct Launch {
  unsigned grid[3], block[3];
  uint64_t shared;          // bytes of dynamic shared memory
  void **args;              // one pointer an argument, as cuLaunchKernel takes them
  int64_t *next;            // the next block to run, shared by all workers
  uint32_t order, mode;     // of the threads; 0 run, 1 check, 2 profile
  const Region *regions;    // the tensors
  const uint64_t *symbols;  // shared variables: offset, bytes, …
  uint64_t n_regions, n_symbols;
  char *out;  // what is found, one line each
  uint64_t out_size;
  volatile int32_t *stop;  // set when time is up
  uint32_t workers;        // what each saw of the tensors is compared by the last to finish
  uint32_t *arrived, *finished;
  void **notes;
};

// What a kernel's library says of itself.
struct Module {
  unsigned *thread_index, *block_index, *block_dim, *grid_dim;
  char *shared_lo, *shared_hi, *dynamic;  // static shared variables and the room for dynamic ones, which is among them
  char *text_lo, *text_hi;
  char *device_lo, *device_hi;  // `__device__` variables
};

struct Checker;
struct Profiler;

struct Worker {
  Thread t[max_threads];
  unsigned waiting[max_threads / warp_size], alive[max_threads / warp_size];  // lanes at a warp's meeting; not returned
  alignas(64) char exchange[max_threads / warp_size][2][warp_size][64];
  Barrier barriers[max_barriers];
  char *stacks = nullptr;
  std::vector<int> free_stacks;
  std::vector<int> warps;  // in which order
  void *home = nullptr;    // the scheduler's stack pointer
  void (*body)(void *) = nullptr;
  void *arg = nullptr;
  Launch *launch = nullptr;
  Checker *checker = nullptr;
  Profiler *profiler = nullptr;
  Module module{};
  int current = 0, threads = 0, living = 0, votes = 0, count = 0;
  bool descending = false, in_kernel = false, ended = false;
  std::string out;  // findings
  int findings = 0;
};

// constinit: no code of the compiler asks at each use whether it has been made.
extern constinit thread_local Worker *self __attribute__((tls_model("initial-exec"), visibility("hidden")));

[[noreturn]] void abandon();  // leave this block, and run no other
void report(const char *kind, const void *pc, Place place,
            const std::string &fields);  // a finding of the current thread
std::string place_fields(int thread);

// Asynchronous copies and matrix products (async.cpp): they happen as late as the program allows.
void async_begin();
bool async_progress();  // when no thread can go on: land a copy, wake who waits
void async_end();

// The checker (checker.cpp), or nothing.
#ifdef MLSYS_CHECK
void check_launch();
void check_block();
void check_block_end();
void check_finish();
void check_block_barrier();
void check_some_barrier(const std::vector<int> &threads);  // a barrier of some warps only
void check_warp(int warp, unsigned lanes);
void check_access(const void *p, unsigned bytes, int kind, const void *pc);
void check_slice_end(int warp);  // its lanes have run as far as they can
void check_fence();
void check_bulk(const void *p, size_t bytes, int kind, const void *pc);  // counted, not checked: a copy of whole rows
void check_flops(long n);                                                // done by a tensor-core instruction
void check_release(const void *object);                                  // the current thread arrives at an mbarrier
void check_acquire(const void *object);                                  // and has waited for one
void check_pending(const void *p, unsigned bytes, bool pending);         // an asynchronous copy will still write there
#else
inline void check_launch() {}
inline void check_block() {}
inline void check_block_end() {}
inline void check_finish() {}
inline void check_block_barrier() {}
inline void check_some_barrier(const std::vector<int> &) {}
inline void check_warp(int, unsigned) {}
inline void check_access(const void *, unsigned, int, const void *) {}
inline void check_slice_end(int) {}
inline void check_fence() {}
inline void check_bulk(const void *, size_t, int, const void *) {}
inline void check_flops(long) {}
inline void check_release(const void *) {}
inline void check_acquire(const void *) {}
inline void check_pending(const void *, unsigned, bool) {}
#endif
enum { READ = 0, WRITE = 1, ATOMIC = 2 };

}  // namespace mlsys
