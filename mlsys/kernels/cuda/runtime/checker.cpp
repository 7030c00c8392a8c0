// Finds what compute-sanitizer finds, on a processor: races, accesses out of bounds, reads of what nobody wrote.
//
// Kernels compiled with -fsanitize=thread call __tsan_readN or __tsan_writeN before each access to memory. The
// functions here are ours. For each few bytes that threads share they keep who last wrote them, who read them, and
// when; two accesses of which one writes race unless something orders them.
//
// Time. `epoch` counts the block's barriers, over all blocks of a worker: what has a smaller epoch, in the same block,
// is ordered before. Within an epoch each warp has a clock that ticks at its meetings. `last_full` is the last meeting
// of all its lanes; meetings of some are kept in a matrix of who knows whom until when. Barriers of some warps only
// (named barriers, mbarriers) are rare: each thread then gets a row of what it knows of all others.
//
// Between blocks nothing is ordered, but for what a fence, an atomic operation, and an atomic operation of another
// block that comes later on the same word, order. Workers do not see each other: their notes are compared at the end.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "checker.h"

namespace mlsys {

using Stamp = uint64_t;  // epoch 22 bits, clock 18, thread 10, site 14; 0 is nobody
constexpr int site_bits = 14, thread_bits = 10, clock_bits = 18;
constexpr uint64_t last_clock = (1ull << clock_bits) - 1, last_epoch = (1ull << 22) - 1;
static inline Stamp stamp(uint64_t epoch, uint64_t clock, unsigned thread, unsigned site) {
  return epoch << (site_bits + thread_bits + clock_bits) | clock << (site_bits + thread_bits) |
         (uint64_t)thread << site_bits | site;
}
static inline uint64_t epoch_of(Stamp s) { return s >> (site_bits + thread_bits + clock_bits); }
static inline uint64_t clock_of(Stamp s) { return s >> (site_bits + thread_bits) & last_clock; }
static inline int thread_of(Stamp s) { return (int)(s >> site_bits & (max_threads - 1)); }
static inline int site_of(Stamp s) { return (int)(s & ((1 << site_bits) - 1)); }

// What is known of `unit` bytes. Two readers: a writer is one of them at most.
struct Cell {
  Stamp write, atomic, read1, read2;
};
constexpr size_t chunk = 1024;  // cells; those never touched are skipped when notes are compared

static Cell *new_cells(size_t n) {  // pages that nobody touches take no memory
  void *p = mmap(nullptr, n * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (Cell *)p;
}

struct Memory {
  char *lo = nullptr;
  size_t bytes = 0, count = 0;
  unsigned shift = 2;  // a cell is 1 << shift bytes
  int index = -1;      // which argument; −1: shared memory
  Cell *cells = nullptr;
  std::vector<uint8_t> touched;

  Memory() = default;
  Memory(char *lo, size_t bytes, unsigned unit, int index)
      : lo(lo),
        bytes(bytes),
        shift(unit >= 4   ? 2
              : unit >= 2 ? 1
                          : 0),
        index(index) {
    make();
  }
  Memory(Memory &&o) noexcept
      : lo(o.lo),
        bytes(o.bytes),
        count(o.count),
        shift(o.shift),
        index(o.index),
        cells(o.cells),
        touched(std::move(o.touched)) {
    o.cells = nullptr;
  }
  ~Memory() { drop(); }
  void make() {
    count = (bytes >> shift) + 1;
    cells = new_cells(count);
    touched.assign(count / chunk + 1, 0);
  }
  void drop() {
    if (cells) munmap(cells, count * sizeof(Cell));
    cells = nullptr;
  }
  // A smaller access than any so far: from now on smaller cells, each with what was known of the larger one.
  void refine(unsigned to) {
    Cell *old = cells;
    size_t n = count;
    unsigned by = shift - to;
    shift = to;
    make();
    for (size_t i = 0; i < n; i++)
      if (old[i].write | old[i].atomic | old[i].read1)
        for (size_t k = i << by; k < (i + 1) << by && k < count; k++) cells[k] = old[i], touched[k / chunk] = 1;
    munmap(old, n * sizeof(Cell));
  }
};

constexpr int device_index = 1000;  // in place of an argument's: `__device__` variables

struct Site {
  const char *pc;
  int kind;
};
struct Known {
  uint64_t epoch = 0;
  std::vector<uint32_t> until;
};  // of each thread of the block
struct Released {
  uint64_t epoch = 0;
  std::set<int> threads;
};  // of a block: before this epoch, or in it by these
using Order = std::map<int64_t, Released>;

struct Checker {
  Memory shared;
  std::vector<uint8_t> valid;    // bytes of shared memory that belong to a variable
  std::vector<uint8_t> pending;  // bytes of shared memory that an asynchronous copy will still write
  int pending_bytes = 0;
  std::vector<Memory> tensors;
  size_t last = 0;  // the tensor that was hit last
  std::vector<Site> sites{{nullptr, 0}};
  std::unordered_map<const void *, int> site_numbers[3];
  struct {
    const void *pc;
    int site;
  } recent[3][1024] = {};
  uint64_t epoch = 0, first_epoch = 0;               // now, and when this block began
  std::vector<std::pair<uint64_t, int64_t>> blocks;  // since which epoch which block
  int64_t block = 0;
  // of each warp
  uint64_t clock[32], last_full[32], known_epoch[32];
  uint32_t known[32][32][32];  // lane l knows lane m until …
  std::vector<Known> rows;     // what a thread knows beyond its warp
  bool beyond = false;
  std::unordered_map<const void *, Known> objects;  // mbarriers
  // between blocks
  std::unordered_map<const void *, Order> words;  // what is released through a word
  Order acquired;
  std::vector<Known> fenced;  // what each thread knew when it last passed a fence
  std::set<std::tuple<std::string, int, int>> told;
  bool barrier_told = false, return_told = false;
};

// With the OS thread that it belongs to; a worker holds the pointer, which is quicker to come by.
static thread_local std::unique_ptr<Checker> owned;
static inline const char *relative(const void *pc) { return (const char *)((const char *)pc - self->module.text_lo); }

static int site(Checker &c, const void *pc, int kind) {
  auto &slot = c.recent[kind][(uintptr_t)pc >> 1 & 1023];
  if (slot.pc == pc) return slot.site;
  auto [at, fresh] = c.site_numbers[kind].try_emplace(pc, (int)c.sites.size());
  if (fresh) {
    if (c.sites.size() >= (1 << site_bits))
      at->second = 0;
    else
      c.sites.push_back({relative(pc), kind});
  }
  slot = {pc, at->second};
  return at->second;
}

// --- what orders -----------------------------------------------------------------------------------------------------

// Until when thread t knows thread u, in this epoch.
static uint64_t known_until(Checker &c, int t, int u) {
  uint64_t until = 0;
  if (t >> 5 == u >> 5) {
    until = c.last_full[t >> 5];
    if (c.known_epoch[t >> 5] == c.epoch) until = std::max<uint64_t>(until, c.known[t >> 5][t & 31][u & 31]);
  }
  if (c.beyond && c.rows[t].epoch == c.epoch) until = std::max<uint64_t>(until, c.rows[t].until[u]);
  return until;
}

static int64_t block_of(Checker &c, uint64_t epoch) {
  auto at = std::upper_bound(c.blocks.begin(), c.blocks.end(), std::make_pair(epoch, INT64_MAX));
  return at == c.blocks.begin() ? -1 : (at - 1)->second;
}

static bool released_to_us(Checker &c, Stamp o) {
  if (c.acquired.empty()) return false;
  auto at = c.acquired.find(block_of(c, epoch_of(o)));
  if (at == c.acquired.end()) return false;
  return epoch_of(o) < at->second.epoch || (epoch_of(o) == at->second.epoch && at->second.threads.count(thread_of(o)));
}

// Whether the access `o` is ordered before what thread t does now.
static inline bool ordered(Checker &c, Stamp o, int t, bool shared) {
  uint64_t e = epoch_of(o);
  if (e != c.epoch) return shared || e >= c.first_epoch || released_to_us(c, o);
  int u = thread_of(o);
  return u == t || clock_of(o) <= known_until(c, t, u);
}

static void tick(Checker &c, int warp) {
  if (c.clock[warp] < last_clock) c.clock[warp]++;
}

static Known &row(Checker &c, int t) {
  c.beyond = true;
  Known &k = c.rows[t];
  if (k.epoch != c.epoch) {
    k.epoch = c.epoch;
    k.until.assign(self->threads, 0);
  }
  return k;
}

// All that thread t knows, itself included.
static void tell(Checker &c, int t, std::vector<uint32_t> &until) {
  if (c.beyond && c.rows[t].epoch == c.epoch)
    for (int u = 0; u < self->threads; u++) until[u] = std::max(until[u], c.rows[t].until[u]);
  for (int u = t & ~31; u < std::min((t & ~31) + 32, self->threads); u++)
    until[u] = std::max<uint32_t>(until[u], (uint32_t)known_until(c, t, u));
  until[t] = (uint32_t)c.clock[t >> 5];
}

static void begin_epoch(Checker &c) {
  c.epoch++;
  for (int i = 0; i < 32; i++) c.clock[i] = 1, c.last_full[i] = 0;
}

void check_warp(int warp, unsigned lanes) {
  Checker &c = *self->checker;
  if (lanes == self->alive[warp]) {
    c.last_full[warp] = c.clock[warp];
  } else {
    auto &known = c.known[warp];
    if (c.known_epoch[warp] != c.epoch) {
      memset(known, 0, sizeof known);
      c.known_epoch[warp] = c.epoch;
    }
    uint32_t joint[32] = {};
    for (unsigned left = lanes; left; left &= left - 1) {
      int l = __builtin_ctz(left);
      for (int m = 0; m < 32; m++) joint[m] = std::max(joint[m], known[l][m]);
      joint[l] = (uint32_t)c.clock[warp];
    }
    for (unsigned left = lanes; left; left &= left - 1) memcpy(known[__builtin_ctz(left)], joint, sizeof joint);
  }
  if (c.beyond) {
    std::vector<uint32_t> joint(self->threads, 0);
    bool any = false;
    for (unsigned left = lanes; left; left &= left - 1) {
      Known &k = c.rows[warp * 32 + __builtin_ctz(left)];
      if (k.epoch != c.epoch) continue;
      any = true;
      for (int u = 0; u < self->threads; u++) joint[u] = std::max(joint[u], k.until[u]);
    }
    if (any)
      for (unsigned left = lanes; left; left &= left - 1) row(c, warp * 32 + __builtin_ctz(left)).until = joint;
  }
  tick(c, warp);
}

void check_some_barrier(const std::vector<int> &threads) {
  Checker &c = *self->checker;
  std::vector<uint32_t> joint(self->threads, 0);
  for (int t : threads) tell(c, t, joint);
  for (int t : threads) row(c, t).until = joint;
  std::set<int> warps;
  for (int t : threads) warps.insert(t >> 5);
  for (int w : warps) tick(c, w);
}

void check_release(const void *object) {
  Checker &c = *self->checker;
  Known &k = c.objects[object];
  if (k.epoch != c.epoch) {
    k.epoch = c.epoch;
    k.until.assign(self->threads, 0);
  }
  tell(c, self->current, k.until);
  tick(c, self->current >> 5);
}

void check_acquire(const void *object) {
  Checker &c = *self->checker;
  auto at = c.objects.find(object);
  if (at == c.objects.end() || at->second.epoch != c.epoch) return;
  Known &mine = row(c, self->current);
  for (int u = 0; u < self->threads; u++) mine.until[u] = std::max(mine.until[u], at->second.until[u]);
}

void check_block_barrier() {
  Checker &c = *self->checker;
  Worker *w = self;
  const Thread *first = nullptr;
  int returned = -1;
  for (int i = 0; i < w->threads; i++) {
    const Thread &t = w->t[i];
    if (t.state == State::done) {
      returned = i;
      continue;
    }
    if (!first) {
      first = &t;
      continue;
    }
    if ((t.place.line != first->place.line || t.what != first->what) && !c.barrier_told) {
      c.barrier_told = true;
      report("divergent-barrier", nullptr, t.place,
             std::string(t.what) + "\t" + std::to_string(i) + "\t" + first->what + "\t" + first->place.file + "\t" +
                 std::to_string(first->place.line) + "\t" + std::to_string(first - w->t));
    }
  }
  if (returned >= 0 && first && !c.return_told) {
    c.return_told = true;
    report("barrier-after-return", nullptr, first->place,
           std::string(first->what) + "\t" + std::to_string(w->threads - w->living) + "\t" + std::to_string(returned));
  }
  begin_epoch(c);
}

void check_fence() {
  Checker &c = *self->checker;
  Known &f = c.fenced[self->current];
  f.epoch = c.epoch;
  f.until.assign(self->threads, 0);
  tell(c, self->current, f.until);
  tick(c, self->current >> 5);
}

// A fence, then an atomic operation: what this thread knew at the fence is released through the word, and whoever comes
// to the word later acquires it. Of other blocks, all is taken for released that came before the fence's epoch; and it is
// acquired for the whole block, where a barrier usually follows.
static void through_word(Checker &c, const void *p) {
  Worker *w = self;
  auto at = c.words.find(p);
  if (at != c.words.end())
    for (auto &[block, r] : at->second) {
      if (block == c.block) continue;
      Released &mine = c.acquired[block];
      if (r.epoch > mine.epoch)
        mine = r;
      else if (r.epoch == mine.epoch)
        mine.threads.insert(r.threads.begin(), r.threads.end());
    }
  check_acquire(p);
  const Known &f = c.fenced[w->current];
  if (!f.epoch) return;
  Order &order = c.words[p];
  Released &r = order[c.block];
  if (r.epoch != f.epoch) {
    r.epoch = f.epoch;
    r.threads.clear();
  }
  for (int u = 0; u < w->threads; u++)
    if (f.until[u]) r.threads.insert(u);
  for (auto &[block, from] : c.acquired) {
    Released &theirs = order[block];
    if (from.epoch > theirs.epoch) theirs = from;
  }
  if (f.epoch != c.epoch) return;  // in this block a barrier has ordered it since
  Known &k = c.objects[p];
  if (k.epoch != c.epoch) {
    k.epoch = c.epoch;
    k.until.assign(w->threads, 0);
  }
  for (int u = 0; u < w->threads; u++) k.until[u] = std::max(k.until[u], f.until[u]);
}

// --- findings --------------------------------------------------------------------------------------------------------

static bool once(Checker &c, const char *kind, int a, int b) { return c.told.emplace(kind, a, b).second; }

__attribute__((noinline, cold)) static void race(Checker &c, const Memory &m, char *p, unsigned bytes, int me, int kind,
                                                 Stamp other) {
  int theirs = site_of(other);
  if (!once(c, "race", me, theirs)) return;
  int64_t block = block_of(c, epoch_of(other));
  char s[256];
  snprintf(s, sizeof s, "%d\t%d\t%ld\t%u\t%p\t%d\t%d\t%ld\t%d", m.index, kind, (long)(p - m.lo), bytes,
           (const void *)c.sites[theirs].pc, c.sites[theirs].kind, thread_of(other), (long)block, block == c.block);
  report("race", c.sites[me].pc, {}, s);
}

__attribute__((noinline, cold)) static void out_of_bounds(Checker &c, char *p, unsigned bytes, int kind,
                                                          const void *pc) {
  const Memory *nearest = nullptr;
  long least = 0;
  for (const Memory &m : c.tensors) {
    long distance = p < m.lo ? m.lo - p : p + bytes - (m.lo + m.bytes);
    if (!nearest || distance < least) nearest = &m, least = distance;
  }
  char s[256];
  snprintf(s, sizeof s, "%d\t%u\t%d\t%ld\t%ld", kind, bytes, nearest ? nearest->index : -2,
           nearest ? (long)(p - nearest->lo) : 0L, nearest ? (long)nearest->bytes : 0L);
  report("out-of-bounds", relative(pc), {}, s);
  abandon();
}

__attribute__((noinline, cold)) static void out_of_shared(Worker *w, size_t offset, unsigned bytes, int kind,
                                                          const void *pc) {
  char s[128];
  snprintf(s, sizeof s, "%d\t%u\t%ld\t%ld\t%lu", kind, bytes, (long)offset,
           (long)(w->module.dynamic - w->module.shared_lo), (unsigned long)w->launch->shared);
  report("out-of-shared", relative(pc), {}, s);
  abandon();
}

__attribute__((noinline, cold)) static void uninitialised(Checker &c, int me, long offset, unsigned bytes, int kind,
                                                          const void *pc) {
  if (!once(c, "uninitialised", me, 0)) return;
  char s[64];
  snprintf(s, sizeof s, "%ld\t%u\t%d", offset, bytes, kind);
  report("uninitialised", relative(pc), {}, s);
}

__attribute__((noinline, cold)) static void misaligned(Checker &c, const Memory &m, char *p, unsigned bytes, int kind,
                                                       const void *pc) {
  (void)c;
  char s[128];
  snprintf(s, sizeof s, "%d\t%d\t%u\t%ld\t%lu", m.index, kind, bytes, (long)(p - m.lo),
           (unsigned long)((uintptr_t)p % bytes));
  report("misaligned", relative(pc), {}, s);
  abandon();
}

// --- accesses --------------------------------------------------------------------------------------------------------

static inline __attribute__((always_inline)) void note(Checker &c, Memory &m, Cell &cell, char *p, unsigned bytes,
                                                       int kind, int me, int t, bool shared) {
  Stamp now = stamp(c.epoch, c.clock[t >> 5], (unsigned)t, (unsigned)me);
  if (cell.write && !ordered(c, cell.write, t, shared)) race(c, m, p, bytes, me, kind, cell.write);
  if (kind == ATOMIC) {
    if (cell.read1 && !ordered(c, cell.read1, t, shared)) race(c, m, p, bytes, me, kind, cell.read1);
    if (cell.read2 && !ordered(c, cell.read2, t, shared)) race(c, m, p, bytes, me, kind, cell.read2);
    cell.atomic = now;
    return;
  }
  if (cell.atomic && !ordered(c, cell.atomic, t, shared)) race(c, m, p, bytes, me, kind, cell.atomic);
  if (kind == WRITE) {
    if (cell.read1 && !ordered(c, cell.read1, t, shared)) race(c, m, p, bytes, me, kind, cell.read1);
    if (cell.read2 && !ordered(c, cell.read2, t, shared)) race(c, m, p, bytes, me, kind, cell.read2);
    cell.write = now;
    if (shared) cell.read1 = cell.read2 = 0;
    return;
  }
  uint64_t base = shared ? c.epoch : c.first_epoch;  // readers from before: ordered, or of other blocks
  if (!cell.read1 || thread_of(cell.read1) == t || epoch_of(cell.read1) < base) {
    if (!shared && cell.read1 && epoch_of(cell.read1) < base) cell.read2 = cell.read1;  // one of another block is kept
    cell.read1 = now;
    return;
  }
  bool other_block = !shared && cell.read2 && epoch_of(cell.read2) < base;
  if (other_block) return;
  int w1 = thread_of(cell.read1) >> 5, w2 = thread_of(cell.read2) >> 5;
  if (!cell.read2 || thread_of(cell.read2) == t || epoch_of(cell.read2) < base || w2 == t >> 5 || w1 == w2)
    cell.read2 = now;
  else if (w1 == t >> 5)
    cell.read1 = now;
}

static inline __attribute__((always_inline)) void in_memory(Checker &c, Memory &m, char *p, unsigned bytes, int kind,
                                                            const void *pc, bool shared) {
  if (bytes < 1u << m.shift || ((uintptr_t)p & ((1u << m.shift) - 1)))
    m.refine(bytes >= 2 && !((uintptr_t)p & 1) ? 1 : 0);
  int me = site(c, pc, kind), t = self->current;
  size_t first = (size_t)(p - m.lo) >> m.shift, last = (size_t)(p + bytes - 1 - m.lo) >> m.shift;
  m.touched[first / chunk] = 1;
  for (size_t i = first; i <= last; i++) {
    Cell &cell = m.cells[i];
    if (shared && kind != WRITE && epoch_of(cell.write) < c.first_epoch && epoch_of(cell.atomic) < c.first_epoch)
      uninitialised(c, me, p - m.lo, bytes, kind, pc);
    note(c, m, cell, p, bytes, kind, me, t, shared);
  }
}

__attribute__((noinline, cold)) static void time_is_up(const void *pc) {
  report("endless", relative(pc), {}, "");
  abandon();
}

static inline __attribute__((always_inline)) void touch(char *p, unsigned bytes, int kind, const void *pc) {
  Worker *w = self;
  if (!w || !w->in_kernel) return;  // host code
  if (__builtin_expect(*w->launch->stop, 0)) time_is_up(pc);
  Checker &c = *self->checker;
  size_t offset = (size_t)(p - w->module.shared_lo), shared = (size_t)(w->module.shared_hi - w->module.shared_lo);
  if (offset < shared) {
    if (!c.valid[offset] || !c.valid[offset + bytes - 1]) out_of_shared(w, offset, bytes, kind, pc);
    if (bytes & (bytes - 1) ? false : ((uintptr_t)p & (bytes - 1)) != 0) misaligned(c, c.shared, p, bytes, kind, pc);
    if (w->launch->mode == 2) {
      profile_access(p, bytes, kind, pc, true);
      return;
    }
    if (kind == ATOMIC) through_word(c, p);
    if (c.pending_bytes && kind == READ)
      for (unsigned i = 0; i < bytes; i++)
        if (c.pending[offset + i] && once(c, "not-waited-for", site(c, pc, kind), 0)) {
          char s[64];
          snprintf(s, sizeof s, "%ld\t%u", (long)offset, bytes);
          report("not-waited-for", relative(pc), {}, s);
        }
    in_memory(c, c.shared, p, bytes, kind, pc, true);
    return;
  }
  Memory *m = nullptr;
  if (!c.tensors.empty()) {
    m = &c.tensors[c.last];
    if (p < m->lo || p >= m->lo + m->bytes) {
      m = nullptr;
      for (size_t i = 0; i < c.tensors.size(); i++)
        if (p >= c.tensors[i].lo && p < c.tensors[i].lo + c.tensors[i].bytes) m = &c.tensors[c.last = i];
    }
  }
  if (!m) {
    if (p >= w->stacks && p < w->stacks + stack_stride * max_threads) return;  // a local variable
    if (p >= (char *)w && p < (char *)(w + 1)) return;                         // the machine
    if (p >= w->module.text_lo && p < w->module.shared_lo) return;             // constants, threadIdx
    if (p >= (char *)w->launch->args && p < (char *)w->launch->args + 8 * 128) return;
    out_of_bounds(c, p, bytes, kind, pc);
  }
  if (p + bytes > m->lo + m->bytes) out_of_bounds(c, p, bytes, kind, pc);
  if (bytes & (bytes - 1) ? false : ((uintptr_t)p & (bytes - 1)) != 0) misaligned(c, *m, p, bytes, kind, pc);
  if (w->launch->mode == 2) {
    profile_access(p, bytes, kind, pc, false);
    return;
  }
  if (kind == ATOMIC) through_word(c, p);
  in_memory(c, *m, p, bytes, kind, pc, false);
}

MLSYS_API void vector_access(const void *to, const void *from, unsigned bytes, const void *pc) {
  for (; bytes > 16; bytes -= 16, from = (const char *)from + 16, to = (const char *)to + 16) {
    touch((char *)from, 16, READ, pc);
    touch((char *)to, 16, WRITE, pc);
  }
  touch((char *)from, bytes, READ, pc);
  touch((char *)to, bytes, WRITE, pc);
}

void check_access(const void *p, unsigned bytes, int kind, const void *pc) { touch((char *)p, bytes, kind, pc); }

void check_pending(const void *p, unsigned bytes, bool pending) {
  Checker &c = *self->checker;
  size_t offset = (size_t)((const char *)p - self->module.shared_lo);
  if (offset + bytes > c.pending.size()) return;
  for (unsigned i = 0; i < bytes; i++) {
    c.pending_bytes += (int)pending - (int)(c.pending[offset + i] != 0);
    c.pending[offset + i] = pending;
  }
}

// --- a launch --------------------------------------------------------------------------------------------------------

void check_launch() {
  Worker *w = self;
  if (!owned) owned = std::make_unique<Checker>();
  w->checker = owned.get();
  Checker &c = *w->checker;
  size_t shared = (size_t)(w->module.shared_hi - w->module.shared_lo);
  if (c.shared.lo != w->module.shared_lo || c.shared.bytes != shared || c.epoch > last_epoch / 2) {
    c.shared.~Memory();
    new (&c.shared) Memory(w->module.shared_lo, shared, 4, -1);
    c.pending.assign(shared, 0);
    c.epoch = 0;
  }
  // Static variables, and as much of the dynamic room as was asked for. A few bytes more: the last access may straddle.
  c.valid.assign(shared + 16, w->launch->n_symbols == 0);
  for (uint64_t i = 0; i < w->launch->n_symbols; i++)
    memset(&c.valid[w->launch->symbols[2 * i]], 1, w->launch->symbols[2 * i + 1]);
  size_t dynamic = (size_t)(w->module.dynamic - w->module.shared_lo);
  memset(&c.valid[dynamic], 0, 228 * 1024);
  memset(&c.valid[dynamic], 1, w->launch->shared);
  std::fill(c.pending.begin(), c.pending.end(), 0);
  c.pending_bytes = 0;
  c.tensors.clear();
  c.last = 0;
  for (uint64_t i = 0; i < w->launch->n_regions; i++) {
    const Region &r = w->launch->regions[i];
    c.tensors.emplace_back(r.lo, r.bytes, r.unit, (int)r.index);
  }
  if (w->module.device_lo)
    c.tensors.emplace_back(w->module.device_lo, (size_t)(w->module.device_hi - w->module.device_lo), 4u, device_index);
  c.sites.assign(1, {nullptr, 0});
  for (auto &s : c.site_numbers) s.clear();
  memset(c.recent, 0, sizeof c.recent);
  c.blocks.clear();
  c.words.clear();
  c.told.clear();
  c.barrier_told = c.return_told = false;
  c.rows.assign(w->threads, {});
  profile_launch();
}

void check_block() {
  Worker *w = self;
  Checker &c = *self->checker;
  begin_epoch(c);
  c.first_epoch = c.epoch;
  const unsigned *g = w->launch->grid, *b = w->module.block_index;
  c.block = b[0] + (int64_t)g[0] * (b[1] + (int64_t)g[1] * b[2]);
  c.blocks.emplace_back(c.epoch, c.block);
  c.acquired.clear();
  c.objects.clear();
  c.beyond = false;
  for (Known &k : c.rows) k.epoch = 0;
  memset(c.known_epoch, 0, sizeof c.known_epoch);
  c.fenced.assign(w->threads, {});
  if (c.pending_bytes) std::fill(c.pending.begin(), c.pending.end(), 0), c.pending_bytes = 0;
}

void check_block_end() {}
void check_slice_end(int warp) {
  if (self->launch->mode == 2) profile_slice_end(warp);
}

// What one worker saw of the tensors, for the others.
struct Notes {
  std::vector<Memory> tensors;
  std::vector<Site> sites;
  std::vector<std::pair<uint64_t, int64_t>> blocks;
};

static int64_t block_in(const Notes &n, Stamp s) {
  auto at = std::upper_bound(n.blocks.begin(), n.blocks.end(), std::make_pair(epoch_of(s), INT64_MAX));
  return at == n.blocks.begin() ? -1 : (at - 1)->second;
}

static void compare(Checker &c, const Notes &a, const Notes &b) {
  std::set<std::pair<int, int>> told;
  auto clash = [&](const Memory &m, size_t i, Stamp x, Stamp y) {
    if (!x || !y || !told.emplace(site_of(x), site_of(y)).second) return;
    const Site &mine = a.sites[site_of(x)], &theirs = b.sites[site_of(y)];
    if (!c.told.emplace("race between", (int)(uintptr_t)mine.pc, (int)(uintptr_t)theirs.pc).second) return;
    char s[256];
    snprintf(s, sizeof s, "%d\t%d\t%ld\t%u\t%p\t%d\t%d\t%ld\t0\t%d\t%ld", m.index, mine.kind, (long)(i << m.shift),
             1u << m.shift, (const void *)theirs.pc, theirs.kind, thread_of(y), (long)block_in(b, y), thread_of(x),
             (long)block_in(a, x));
    report("race", mine.pc, {}, s);
  };
  for (size_t k = 0; k < a.tensors.size(); k++) {
    const Memory &x = a.tensors[k], &y = b.tensors[k];
    unsigned fine = std::min(x.shift, y.shift);
    size_t cells = x.bytes >> fine;
    for (size_t i = 0; i < cells; i++) {
      size_t xi = i >> (x.shift - fine), yi = i >> (y.shift - fine);
      if (!x.touched[xi / chunk] || !y.touched[yi / chunk]) {
        i |= (chunk << (std::min(x.shift, y.shift) - fine)) - 1;
        continue;
      }
      const Cell &p = x.cells[xi], &q = y.cells[yi];
      clash(x, xi, p.write, q.write ? q.write : q.atomic);
      clash(x, xi, p.write, q.read1);
      clash(x, xi, p.atomic, q.write ? q.write : q.read1);
      clash(x, xi, p.read1, q.write ? q.write : q.atomic);
    }
  }
}

void check_finish() {
  Worker *w = self;
  Checker &c = *self->checker;
  profile_finish();
  if (w->launch->workers > 1) {
    w->launch->notes[__atomic_fetch_add(w->launch->arrived, 1, __ATOMIC_ACQ_REL)] =
        new Notes{std::move(c.tensors), c.sites, c.blocks};
    if (__atomic_add_fetch(w->launch->finished, 1, __ATOMIC_ACQ_REL) == w->launch->workers) {
      Notes **notes = (Notes **)w->launch->notes;
      for (uint32_t i = 0; i < w->launch->workers; i++)
        for (uint32_t k = 0; k < i; k++) compare(c, *notes[i], *notes[k]);
      for (uint32_t i = 0; i < w->launch->workers; i++) delete notes[i];
    }
  }
  c.tensors.clear();
}

}  // namespace mlsys

// --- what the compiler calls -----------------------------------------------------------------------------------------

using namespace mlsys;
#define PC __builtin_return_address(0)
extern "C" {
MLSYS_API void __tsan_init() {}
MLSYS_API void __tsan_func_entry(void *) {}
MLSYS_API void __tsan_func_exit() {}
// Volatile: on tensors, taken for an atomic access, as flags between blocks are. Within a block it orders nothing: lanes
// do not run in step since Volta.
static inline void volatile_access(char *p, unsigned bytes, int kind, const void *pc) {
  Worker *w = self;
  touch(p, bytes, w && p >= w->module.shared_lo && p < w->module.shared_hi ? kind : ATOMIC, pc);
}
// In pieces that are aligned: what need not lie at a multiple of its size, such as a structure of two floats.
static void range(char *p, size_t n, int kind, const void *pc) {
  for (size_t step; n; p += step, n -= step) {
    step = 16;
    while (step > n || (uintptr_t)p % step) step /= 2;
    touch(p, (unsigned)step, kind, pc);
  }
}
#define ACCESS(N)                                                                              \
  MLSYS_API void __tsan_read##N(void *p) { touch((char *)p, N, READ, PC); }                    \
  MLSYS_API void __tsan_write##N(void *p) { touch((char *)p, N, WRITE, PC); }                  \
  MLSYS_API void __tsan_unaligned_read##N(void *p) { range((char *)p, N, READ, PC); }          \
  MLSYS_API void __tsan_unaligned_write##N(void *p) { range((char *)p, N, WRITE, PC); }        \
  MLSYS_API void __tsan_volatile_read##N(void *p) { volatile_access((char *)p, N, READ, PC); } \
  MLSYS_API void __tsan_volatile_write##N(void *p) { volatile_access((char *)p, N, WRITE, PC); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
MLSYS_API void __tsan_read_range(void *p, unsigned long n) { range((char *)p, n, READ, PC); }
MLSYS_API void __tsan_write_range(void *p, unsigned long n) { range((char *)p, n, WRITE, PC); }
// A kernel's own calls (mlsys_cuda.h), and those that clang makes of its copies: before clang 16 by their ordinary names.
#define WHOLE(PREFIX)                                                          \
  MLSYS_API void *PREFIX##memcpy(void *to, const void *from, size_t n) {       \
    range((char *)from, n, READ, PC);                                          \
    range((char *)to, n, WRITE, PC);                                           \
    return memcpy(to, from, n);                                                \
  }                                                                            \
  MLSYS_API void *PREFIX##memmove(void *to, const void *from, size_t n) {      \
    range((char *)from, n, READ, PC);                                          \
    range((char *)to, n, WRITE, PC);                                           \
    return memmove(to, from, n);                                               \
  }                                                                            \
  MLSYS_API void *PREFIX##memset(void *to, int v, size_t n) {                  \
    range((char *)to, n, WRITE, PC);                                           \
    return memset(to, v, n);                                                   \
  }
WHOLE(__tsan_) WHOLE(__wrap_)
// C++'s own atomic operations, where a kernel uses them.
MLSYS_API void __tsan_atomic_thread_fence(int) { check_fence(); }
MLSYS_API void __tsan_atomic_signal_fence(int) {}
#define FETCH(N, T, NAME)                                                \
  MLSYS_API T __tsan_atomic##N##_fetch_##NAME(volatile T *p, T v, int) { \
    touch((char *)p, N / 8, ATOMIC, PC);                                 \
    return __atomic_fetch_##NAME(p, v, __ATOMIC_SEQ_CST);                \
  }
#define ATOMICS(N, T)                                                                            \
  MLSYS_API T __tsan_atomic##N##_load(const volatile T *p, int) {                                \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                              \
  MLSYS_API void __tsan_atomic##N##_store(volatile T *p, T v, int) {                             \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                              \
  MLSYS_API T __tsan_atomic##N##_exchange(volatile T *p, T v, int) {                             \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                          \
  }                                                                                              \
  MLSYS_API int __tsan_atomic##N##_compare_exchange_strong(volatile T *p, T *e, T v, int, int) { \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);      \
  }                                                                                              \
  MLSYS_API int __tsan_atomic##N##_compare_exchange_weak(volatile T *p, T *e, T v, int, int) {   \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);      \
  }                                                                                              \
  MLSYS_API T __tsan_atomic##N##_compare_exchange_val(volatile T *p, T e, T v, int, int) {       \
    touch((char *)p, N / 8, ATOMIC, PC);                                                         \
    __atomic_compare_exchange_n(p, &e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
    return e;                                                                                    \
  }                                                                                              \
  FETCH(N, T, add) FETCH(N, T, sub) FETCH(N, T, and) FETCH(N, T, or) FETCH(N, T, xor) FETCH(N, T, nand)
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t) struct OutOfBounds {
  const char *file;
  unsigned line, column;
  const unsigned short *array, *index;
};
MLSYS_API void __ubsan_handle_out_of_bounds_abort(OutOfBounds *d, unsigned long i) {
  report("index", nullptr, {d->file, (int)d->line},
         std::string((const char *)(d->array + 2)) + "\t" + std::to_string((long)i));
  abandon();
}
MLSYS_API void __ubsan_handle_out_of_bounds(OutOfBounds *d, unsigned long i) {
  __ubsan_handle_out_of_bounds_abort(d, i);
}
}
