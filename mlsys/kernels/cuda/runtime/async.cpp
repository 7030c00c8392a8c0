// Tensor cores, and what goes on beside the threads: asynchronous copies, mbarriers, tensor copies, wgmma.
//
// A GPU may do a copy at any time between its issue and the wait for it. Here it is done at the latest time that is
// allowed: when its thread waits for it, or, if threads wait for its mbarrier, when no thread can go on otherwise. So a
// kernel that forgets a wait, or frees a buffer too early, is wrong at every run. The checker hears of the issue, of
// the bytes that are still to be written, and of the completion.
#pragma GCC optimize("O3")  // the loops of the products are to be vectorised, and the conversions in them

#include "mlsys_numbers.h"
#include "scheduler.h"

#include <algorithm>
#include <deque>
#include <memory>

extern "C" void mlsys_switch(void **save, void *load);

namespace mlsys {

// scheduler.cpp
void wait_block(const char *what, const char *file, int line, int id, int expected);
void wait_warp(unsigned mask, const char *what, const char *file, int line);
int flip();

struct TensorMap {  // CUtensorMap of mlsys_ptx.h
  uint64_t magic, base, size[3], stride[2];
  uint32_t box[3], dimensions, element, swizzle;
  uint64_t unused[6];
};
constexpr uint64_t tensor_map_magic = 0x70616d2073796c6d;  // "mlys map"

struct MatrixAt {
  const void *start;
  int leading, stride;
};

struct Copy {
  char *to;
  const char *from;
  int bytes, from_bytes, group;
  const void *pc;
};

struct Mbarrier {
  void *at;
  unsigned expected, pending;  // arrivals of a phase, and those still missing
  int64_t bytes;               // announced, and not yet landed
  unsigned parity;             // of the current phase
};

struct Transfer {  // of the tensor memory accelerator; dimensions 0: plain bytes
  TensorMap map;
  char *shared;
  const char *global;
  unsigned bytes;
  void *barrier;
  int at[3], group, thread;
  const void *pc;
  Place place;
};

struct Product {  // a wgmma of four warps
  int n;
  Format factors;
  bool a_by_columns, b_by_rows, add;
  MatrixAt a, b;
  int group;
  const void *pc;
  Place place;
  float *d[128];
};
struct Warpgroup {
  std::deque<Product> products;
  size_t landed = 0;
  int waiting = 0;
};

struct Lone {  // what a thread has under way
  std::vector<Copy> copies;
  int copy_group = 0, bulk_group = 0, product_group = 0;
  size_t products = 0;
  bool may_fail = false;       // it tries an mbarrier
  uint64_t failed_at = ~0ull;  // the last time in vain
};

struct Async {
  int used = 0;  // by a block of so many threads
  Lone lone[max_threads];
  std::vector<Mbarrier> mbarriers;
  std::deque<Transfer> loads;
  std::vector<Transfer> stores;
  Warpgroup warpgroups[max_threads / 128];
  uint64_t events = 0;  // arrivals and landings so far
  std::deque<std::string> texts;
  alignas(64) float a[64 * 16], b[16 * 256], c[64 * 256];
};
static thread_local std::unique_ptr<Async> async;
static int coalesced_tag;

static Async &used() {
  async->used = self->threads;
  return *async;
}

[[noreturn]] static void misuse(Place place, const std::string &text) {
  report("misuse", nullptr, place, text);
  abandon();
}

static bool in_shared(const void *p, size_t bytes) {
  const Module &m = self->module;
  return (char *)p >= m.shared_lo && (char *)p + bytes <= m.shared_hi;
}

static void need_shared(const void *p, size_t bytes, const char *what, Place place) {
  if (!in_shared(p, bytes)) misuse(place, std::string(what) + " is not in shared memory");
}

static void aligned(const void *p, unsigned alignment, const char *what, Place place) {
  unsigned over = (uintptr_t)p % alignment;
  if (over)
    misuse(place, std::string(what) + " has to lie at a multiple of " + std::to_string(alignment) +
                      " bytes, and lies " + std::to_string(over) + " bytes after one");
}

MLSYS_API void need_aligned(const void *p, unsigned alignment, const char *what, const char *file, int line) {
  aligned(p, alignment, (std::string(what) + ": the matrix").c_str(), {file, line});
}

// --- what the checker hears ------------------------------------------------------------------------------------------

static void tell(const void *p, size_t bytes, int kind, const void *pc) {
#ifdef MLSYS_CHECK
  if (self->launch->mode == 2 && bytes > 16) return check_bulk(p, bytes, kind, pc);  // no lanes: whole rows
  const char *at = (const char *)p;
  for (size_t step; bytes; at += step, bytes -= step) {
    step = 16;
    while (step > bytes || (uintptr_t)at % step) step /= 2;
    check_access(at, (unsigned)step, kind, pc);
  }
#else
  (void)p, (void)bytes, (void)kind, (void)pc;
#endif
}
// When it lands: not counted a second time by the profiler.
static void tell_landed(const void *p, size_t bytes, int kind, const void *pc) {
  if (self->launch->mode == 1) tell(p, bytes, kind, pc);
}
MLSYS_API void kernel_access(const void *p, unsigned bytes, int kind, const void *pc) {
  check_access(p, bytes, kind, pc);
}

// --- waiting ---------------------------------------------------------------------------------------------------------

// The current thread goes on when someone makes it ready.
static void park(void *at, const char *what, Place place) {
  Worker *w = self;
  Thread &t = w->t[w->current];
  t.state = State::at_mbarrier;
  t.mbarrier = at;
  t.what = what;
  t.place = place;
  mlsys_switch(&t.sp, w->home);
}

// A barrier of some warps; who only arrives does not wait. A thread that waits is ordered after those that arrived.
static void check_count(int id, int expected, Place place) {
  const Barrier &b = self->barriers[id];
  if (id < 0 || id >= max_barriers) misuse(place, "a block has the barriers 0 to 15, not " + std::to_string(id));
  if (expected <= 0 || expected % 32 || expected > max_threads)
    misuse(place, "barrier " + std::to_string(id) + ": the count of threads has to be a multiple of 32, not " +
                      std::to_string(expected));
  if (b.arrived && b.expected != expected)
    misuse(place, "barrier " + std::to_string(id) + " is for " + std::to_string(expected) + " threads here, and for " +
                      std::to_string(b.expected) + " where others have arrived");
}

MLSYS_API void sync_block(int id, int expected, const char *file, int line) {
  check_count(id, expected, {file, line});
  if (id == 0) misuse({file, line}, "barrier 0 is that of __syncthreads(): take one of 1 to 15");
  Barrier *b = &self->barriers[id];
  wait_block("bar.sync", file, line, id, expected);
  check_acquire(b);
}

MLSYS_API void arrive_block(int id, int expected, const char *file, int line) {
  check_count(id, expected, {file, line});
  if (id == 0) misuse({file, line}, "barrier 0 is that of __syncthreads(): take one of 1 to 15");
  Worker *w = self;
  Barrier &b = w->barriers[id];
  check_release(&b);
  b.expected = expected;
  if (++b.arrived < expected) return;
  std::vector<int> who;
  for (int i = 0; i < w->threads; i++)
    if (w->t[i].state == State::at_block && w->t[i].barrier == id) who.push_back(i);
  if (!who.empty()) check_some_barrier(who);
  for (int i : who) w->t[i].state = State::ready;
  b.arrived = 0;
}

// The lanes that come here together: those that come before all others of the block are held up.
MLSYS_API unsigned coalesced_lanes(const char *file, int line) {
  used();
  Thread &t = self->t[self->current];
  park(&coalesced_tag, "coalesced_threads", {file, line});
  return t.mask;
}

static bool gather_coalesced(Worker *w) {
  bool moved = false;
  for (int i = 0; i < w->threads; i++) {
    Thread &t = w->t[i];
    if (t.state != State::at_mbarrier || t.mbarrier != &coalesced_tag) continue;
    unsigned mask = 0;
    int first = i & ~31, last = std::min(first + 32, w->threads);
    for (int k = first; k < last; k++) {
      const Thread &o = w->t[k];
      if (o.state == State::at_mbarrier && o.mbarrier == &coalesced_tag && o.place.line == t.place.line)
        mask |= 1u << (k & 31);
    }
    for (unsigned left = mask; left; left &= left - 1) {
      Thread &o = w->t[first + __builtin_ctz(left)];
      o.mask = mask;
      o.state = State::ready;
    }
    moved = true;
  }
  return moved;
}

MLSYS_API bool elect(const char *file, int line) {
  int first = __builtin_ctz(self->alive[self->current >> 5]);  // now: later some may have returned
  wait_warp(~0u, "elect_one", file, line);
  return (self->current & 31) == first;
}

// --- cp.async --------------------------------------------------------------------------------------------------------

MLSYS_API void copy_async(void *to, const void *from, int bytes, int from_bytes, const char *file, int line) {
  const void *pc = __builtin_return_address(0);
  if (bytes != 4 && bytes != 8 && bytes != 16)
    misuse({file, line}, "cp.async copies 4, 8 or 16 bytes, not " + std::to_string(bytes));
  if (from_bytes < 0 || from_bytes > bytes)
    misuse({file, line}, "cp.async of " + std::to_string(bytes) + " bytes can not take " + std::to_string(from_bytes) +
                             " from its source");
  need_shared(to, (size_t)bytes, "cp.async: the destination", {file, line});
  aligned(to, (unsigned)bytes, "cp.async: the destination", {file, line});
  if (from_bytes) aligned(from, (unsigned)bytes, "cp.async: the source", {file, line});
  Lone &mine = used().lone[self->current];
  mine.copies.push_back({(char *)to, (const char *)from, bytes, from_bytes, mine.copy_group, pc});
  tell(from, (size_t)from_bytes, READ, pc);
  tell(to, (size_t)bytes, WRITE, pc);
  check_pending(to, (unsigned)bytes, true);
}

static void land_copies(Lone &mine, int before) {
  size_t done = 0;
  for (; done < mine.copies.size() && mine.copies[done].group < before; done++) {
    const Copy &c = mine.copies[done];
    tell_landed(c.from, (size_t)c.from_bytes, READ, c.pc);
    check_pending(c.to, (unsigned)c.bytes, false);
    tell_landed(c.to, (size_t)c.bytes, WRITE, c.pc);
    memcpy(c.to, c.from, (size_t)c.from_bytes);
    memset(c.to + c.from_bytes, 0, (size_t)(c.bytes - c.from_bytes));
  }
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + (ptrdiff_t)done);
}

MLSYS_API void copy_commit() { used().lone[self->current].copy_group++; }
MLSYS_API void copy_wait(int left) {
  Lone &mine = used().lone[self->current];
  land_copies(mine, mine.copy_group - left);
}
MLSYS_API void copy_wait_all() {
  Lone &mine = used().lone[self->current];
  land_copies(mine, ++mine.copy_group);
}

// --- mbarriers -------------------------------------------------------------------------------------------------------

static Mbarrier *find(void *b) {
  for (Mbarrier &m : async->mbarriers)
    if (m.at == b) return &m;
  return nullptr;
}

static Mbarrier &known(void *b, Place place) {
  Mbarrier *m = find(b);
  if (!m) misuse(place, "the mbarrier was not initialised: one thread calls mbarrier_init, then all __syncthreads()");
  return *m;
}

static void tell_use(void *b, int kind, const void *pc) {
  if (self->launch->mode == 1) check_access(b, 8, kind, pc);
}

// A phase ends when all have arrived and all announced bytes have landed.
static bool settle(Mbarrier &m) {
  async->events++;
  if (m.pending || m.bytes) return false;
  m.parity ^= 1;
  m.pending = m.expected;
  Worker *w = self;
  bool woken = false;
  for (int i = 0; i < w->threads; i++) {
    Thread &t = w->t[i];
    if (t.state == State::at_mbarrier && t.mbarrier == m.at && t.parity != m.parity)
      t.state = State::ready, woken = true;
  }
  return woken;
}

MLSYS_API void mbarrier_init(void *b, unsigned count, const char *file, int line) {
  Place place{file, line};
  need_shared(b, 8, "an mbarrier", place);
  aligned(b, 8, "an mbarrier", place);
  if (count == 0 || count >= 1u << 20)
    misuse(place, "mbarrier_init: the count has to be 1 to 2^20 - 1, not " + std::to_string(count));
  tell_use(b, WRITE, __builtin_return_address(0));
  Mbarrier fresh{b, count, count, 0, 0};
  if (Mbarrier *m = find(b))
    *m = fresh;
  else
    used().mbarriers.push_back(fresh);
}

MLSYS_API void mbarrier_invalidate(void *b, const char *file, int line) {
  Mbarrier &m = known(b, {file, line});
  tell_use(b, WRITE, __builtin_return_address(0));
  m = async->mbarriers.back();
  async->mbarriers.pop_back();
}

MLSYS_API void mbarrier_expect(void *b, unsigned bytes, const char *file, int line) {
  tell_use(b, ATOMIC, __builtin_return_address(0));
  known(b, {file, line}).bytes += bytes;
}

MLSYS_API void mbarrier_arrive(void *b, unsigned bytes, const char *file, int line) {
  tell_use(b, ATOMIC, __builtin_return_address(0));
  Mbarrier &m = known(b, {file, line});
  if (m.pending == 0)
    misuse({file, line}, "more arrivals at the mbarrier than the " + std::to_string(m.expected) +
                             " it was initialised for: its phase waits for " + std::to_string(m.bytes) + " bytes only");
  check_release(b);
  m.bytes += bytes;
  m.pending--;
  settle(m);
}

// Waits until the phase of this parity is over. A try comes back in vain when nothing else in the block can go on.
MLSYS_API bool mbarrier_wait(void *b, unsigned parity, bool may_fail, const char *file, int line) {
  const void *pc = __builtin_return_address(0);
  tell_use(b, ATOMIC, pc);
  if (parity > 1) misuse({file, line}, "the parity of an mbarrier's phase is 0 or 1, not " + std::to_string(parity));
  if (known(b, {file, line}).parity == parity) {
    self->t[self->current].parity = (uint8_t)parity;
    async->lone[self->current].may_fail = may_fail;
    park(b, may_fail ? "mbarrier_try_wait" : "mbarrier_wait", {file, line});
    if (known(b, {file, line}).parity == parity && may_fail) return false;
  }
  check_acquire(b);
  return true;
}

// Tries that came to nothing come back, once in each state of things: a loop round one is then as stuck as a wait.
static bool fail_tries(Worker *w) {
  bool moved = false;
  for (int i = 0; i < w->threads; i++) {
    Lone &l = async->lone[i];
    const Thread &t = w->t[i];
    bool waits = t.state == State::at_mbarrier && find(t.mbarrier);
    if (!waits || !l.may_fail || l.failed_at == async->events) continue;
    l.failed_at = async->events;
    w->t[i].state = State::ready;
    moved = true;
  }
  return moved;
}

// What those who wait for ever wait for.
static void name_waits(Worker *w) {
  for (Mbarrier &m : async->mbarriers) {
    std::string missing =
        m.pending ? std::to_string(m.pending) + " of " + std::to_string(m.expected) + " arrivals" : "";
    if (m.bytes > 0) missing += (missing.empty() ? "" : " and ") + std::to_string(m.bytes) + " bytes";
    if (m.bytes < 0)
      missing += (missing.empty() ? "" : " and ") + std::to_string(-m.bytes) + " bytes landed that nobody announced";
    async->texts.push_back("mbarrier_wait (parity " + std::to_string(m.parity) + ": " + missing +
                           (m.bytes < 0 ? "" : " missing") + ")");
    const char *what = async->texts.back().c_str();
    for (int i = 0; i < w->threads; i++)
      if (w->t[i].state == State::at_mbarrier && w->t[i].mbarrier == m.at) w->t[i].what = what;
  }
}

// --- the tensor memory accelerator -----------------------------------------------------------------------------------

// 128-byte swizzle, of the address itself: bits 4 to 6 are turned by bits 7 to 9.
static inline char *swizzled(const char *p) {
  uintptr_t a = (uintptr_t)p;
  return (char *)(a ^ (a >> 7 & 7) << 4);
}

static size_t box_bytes(const TensorMap &m) {
  size_t n = m.element;
  for (unsigned i = 0; i < m.dimensions; i++) n *= m.box[i];
  return n;
}

// The rows of a box: in the tensor from column `first` to before `last` (none if empty), and in shared memory.
template <class Row>
static void each_row(const Transfer &t, Row row) {
  const TensorMap &m = t.map;
  int64_t width = m.box[0], depth = m.dimensions == 3 ? m.box[2] : 1;
  char *shared = t.shared;
  for (int64_t z = 0; z < depth; z++)
    for (int64_t y = 0; y < m.box[1]; y++, shared += width * m.element) {
      int64_t Y = t.at[1] + y, Z = t.at[2] + z;
      int64_t first = std::clamp<int64_t>(-(int64_t)t.at[0], 0, width);
      int64_t last = std::clamp<int64_t>((int64_t)m.size[0] - t.at[0], first, width);
      if (Y < 0 || Y >= (int64_t)m.size[1] || (m.dimensions == 3 && (Z < 0 || Z >= (int64_t)m.size[2])))
        first = last = 0;
      char *global = (char *)m.base + Y * (int64_t)m.stride[0] + (m.dimensions == 3 ? Z * (int64_t)m.stride[1] : 0);
      row(shared, global + (t.at[0] + first) * (int64_t)m.element, (size_t)first * m.element,
          (size_t)(last - first) * m.element);
    }
}

// 16 bytes a step, each at its swizzled place.
template <class Step>
static void each_chunk(const TensorMap &m, char *row, Step step) {
  for (size_t i = 0, n = (size_t)m.box[0] * m.element; i < n; i += 16) step(m.swizzle ? swizzled(row + i) : row + i, i);
}

static void check_map(const TensorMap &m, int dimensions, const void *shared, Place place) {
  if (m.magic != tensor_map_magic)
    misuse(place,
           "the tensor map was not made for the processor: pass what mlsys.kernels.cuda.tensor_map(tensor, box) "
           "gives for a tensor there");
  if ((int)m.dimensions != dimensions)
    misuse(place, "the tensor map has " + std::to_string(m.dimensions) + " dimensions, the copy " +
                      std::to_string(dimensions));
  need_shared(shared, box_bytes(m), "the box in shared memory", place);
  aligned(shared, m.swizzle ? 1024 : 128, m.swizzle ? "a box with 128-byte swizzle" : "the box in shared memory",
          place);
}

static void issue_load(Transfer t, size_t bytes) {
  known(t.barrier, t.place);
  tell_use(t.barrier, ATOMIC, t.pc);
  tell(t.shared, bytes, WRITE, t.pc);
  check_pending(t.shared, (unsigned)bytes, true);
  check_release(t.barrier);  // who has waited for the mbarrier is ordered after the copy's writes
  used().loads.push_back(t);
}

MLSYS_API void bulk_load(void *to, const void *from, unsigned bytes, void *barrier, const char *file, int line) {
  Place place{file, line};
  const void *pc = __builtin_return_address(0);
  if (bytes % 16) misuse(place, "a bulk copy takes a multiple of 16 bytes, not " + std::to_string(bytes));
  need_shared(to, bytes, "bulk_load: the destination", place);
  aligned(to, 16, "bulk_load: the destination", place);
  aligned(from, 16, "bulk_load: the source", place);
  tell(from, bytes, READ, pc);
  issue_load({{}, (char *)to, (const char *)from, bytes, barrier, {}, 0, self->current, pc, place}, bytes);
}

MLSYS_API void tensor_load(void *to, const void *map, void *barrier, int x, int y, int z, int dimensions,
                           const char *file, int line) {
  Place place{file, line};
  const void *pc = __builtin_return_address(0);
  const TensorMap &of = *(const TensorMap *)map;
  check_map(of, dimensions, to, place);
  Transfer t{of, (char *)to, nullptr, 0, barrier, {x, y, z}, 0, self->current, pc, place};
  each_row(t, [&](char *, char *global, size_t, size_t bytes) { tell(global, bytes, READ, pc); });
  issue_load(t, box_bytes(t.map));
}

MLSYS_API void tensor_store(const void *map, const void *from, int x, int y, int z, int dimensions, const char *file,
                            int line) {
  Place place{file, line};
  const void *pc = __builtin_return_address(0);
  const TensorMap &of = *(const TensorMap *)map;
  check_map(of, dimensions, from, place);
  tell(from, box_bytes(of), READ, pc);
  int group = used().lone[self->current].bulk_group;
  async->stores.push_back({of, (char *)from, nullptr, 0, nullptr, {x, y, z}, group, self->current, pc, place});
}

// Wakes someone, or not.
static bool land_load() {
  Transfer t = async->loads.front();
  async->loads.pop_front();
  size_t bytes = t.bytes;
  if (t.map.dimensions == 0) {
    memcpy(t.shared, t.global, bytes);
  } else {
    bytes = box_bytes(t.map);
    std::vector<char> row((size_t)t.map.box[0] * t.map.element);
    each_row(t, [&](char *shared, char *global, size_t before, size_t inside) {  // zeros outside the tensor
      memset(row.data(), 0, row.size());
      if (inside) memcpy(row.data() + before, global, inside);
      each_chunk(t.map, shared,
                 [&](char *to, size_t i) { memcpy(to, row.data() + i, std::min<size_t>(16, row.size() - i)); });
    });
  }
  check_pending(t.shared, (unsigned)bytes, false);
  Mbarrier *m = find(t.barrier);
  if (!m) return false;
  m->bytes -= (int64_t)bytes;
  return settle(*m);
}

static void land_store(const Transfer &t) {
  tell_landed(t.shared, box_bytes(t.map), READ, t.pc);
  std::vector<char> row((size_t)t.map.box[0] * t.map.element);
  each_row(t, [&](char *shared, char *global, size_t before, size_t inside) {
    each_chunk(t.map, shared,
               [&](char *from, size_t i) { memcpy(row.data() + i, from, std::min<size_t>(16, row.size() - i)); });
    if (inside) tell(global, inside, WRITE, t.pc);
    if (inside) memcpy(global, row.data() + before, inside);
  });
}

MLSYS_API void bulk_commit() { used().lone[self->current].bulk_group++; }
MLSYS_API void bulk_wait(int left) {
  Async &a = used();
  int me = self->current, before = a.lone[me].bulk_group - left;
  size_t kept = 0;
  for (size_t i = 0; i < a.stores.size(); i++) {
    if (a.stores[i].thread == me && a.stores[i].group < before)
      land_store(a.stores[i]);
    else
      a.stores[kept++] = a.stores[i];
  }
  a.stores.resize(kept);
}

// --- products of small matrices --------------------------------------------------------------------------------------

template <int N>
static void multiply_wide(int m, int k, const float *__restrict a, const float *__restrict b, float *__restrict c) {
  for (int i = 0; i < m; i++) {
    float sum[N];
    memcpy(sum, c + i * N, sizeof sum);
    for (int l = 0; l < k; l += 4) {
      const float *x = a + i * k + l, *y = b + l * N;
      for (int j = 0; j < N; j++) sum[j] += x[0] * y[j] + x[1] * y[N + j] + x[2] * y[2 * N + j] + x[3] * y[3 * N + j];
    }
    memcpy(c + i * N, sum, sizeof sum);
  }
}

// c += a · b: m rows, n columns, all row-major and dense; k is a multiple of 4.
static void multiply(int m, int n, int k, const float *a, const float *b, float *c) {
  check_flops(2L * m * n * k);
  switch (n) {
    case 8:
      return multiply_wide<8>(m, k, a, b, c);
    case 16:
      return multiply_wide<16>(m, k, a, b, c);
    case 32:
      return multiply_wide<32>(m, k, a, b, c);
    case 64:
      return multiply_wide<64>(m, k, a, b, c);
    case 128:
      return multiply_wide<128>(m, k, a, b, c);
    default:
      return multiply_wide<256>(m, k, a, b, c);
  }
}

static void widen(Format f, const void *from, float *to, int count) {
  const uint16_t *h = (const uint16_t *)from;
  const float *x = (const float *)from;
  if (f == Format::half)
    for (int i = 0; i < count; i++) to[i] = half_to_float(h[i]);
  if (f == Format::bfloat16)
    for (int i = 0; i < count; i++) to[i] = bfloat16_to_float(h[i]);
  if (f == Format::tf32)
    for (int i = 0; i < count; i++) to[i] = tf32_read(x[i]);
  if (f == Format::float32) memcpy(to, from, (size_t)count * 4);
}

// What a lane brings to an operation of its warp. The first to go on does the work of all.
struct Lane {
  const void *a, *b, *c;
  void *d;
  bool done;
};

template <class Work>
static void together(Lane mine, Work work, const char *what, const char *file, int line) {
  Worker *w = self;
  int warp = w->current >> 5, half = flip();
  auto lane = [&](int l) -> Lane & { return *(Lane *)w->exchange[warp][half][l]; };
  lane(w->current & 31) = mine;
  auto all_there = [&] {
    if (w->alive[warp] != ~0u)
      misuse({file, line}, std::string(what) + " is done by all 32 lanes of a warp, and some are not there");
  };
  all_there();
  wait_warp(~0u, what, file, line);
  if (lane(w->current & 31).done) return;
  all_there();  // lanes that have returned meanwhile are not waited for
  work(lane);
  for (int l = 0; l < 32; l++) lane(l).done = true;
}

MLSYS_API void wmma_product(int m, int n, int k, Format factors, Format sum, const void *a, const void *b,
                            const void *c, void *d, const char *file, int line) {
  auto work = [=](auto lane) {
    Async &s = *async;
    int na = m * k / 32, nb = k * n / 32, nc = m * n / 32;
    for (int l = 0; l < 32; l++) {
      widen(factors, lane(l).a, s.a + l * na, na);
      widen(factors, lane(l).b, s.b + l * nb, nb);
      widen(sum, lane(l).c, s.c + l * nc, nc);
    }
    multiply(m, n, k, s.a, s.b, s.c);
    for (int l = 0; l < 32; l++) {
      uint16_t *h = (uint16_t *)lane(l).d;
      if (sum == Format::half)
        for (int i = 0; i < nc; i++) h[i] = float_to_half(s.c[l * nc + i]);
      else
        memcpy(lane(l).d, s.c + l * nc, (size_t)nc * 4);
    }
  };
  together({a, b, c, d, false}, work, "mma_sync", file, line);
}

// mma.sync.m16n8k16 (16-bit factors) and m16n8k8 (tf32). The PTX manual's fragments, lane = 4 · group + member: a
// register
// of `a` holds row group (+ 8 in the odd ones), one of `b` column group; d has columns 2 · member and the next.
MLSYS_API void warp_mma(int k, Format factors, const void *a, const void *b, float *d, const char *file, int line) {
  auto work = [=](auto lane) {
    Async &s = *async;
    int wide = k / 8;  // elements in a register: 2 of 16 bits, 1 of tf32
    for (int l = 0; l < 32; l++) {
      int group = l / 4, member = l % 4;
      float x[8], y[4];
      widen(factors, lane(l).a, x, 4 * wide);
      widen(factors, lane(l).b, y, 2 * wide);
      for (int r = 0; r < 4; r++)
        for (int e = 0; e < wide; e++)
          s.a[(group + r % 2 * 8) * k + r / 2 * (k / 2) + member * wide + e] = x[r * wide + e];
      for (int r = 0; r < 2; r++)
        for (int e = 0; e < wide; e++) s.b[(r * (k / 2) + member * wide + e) * 8 + group] = y[r * wide + e];
      for (int e = 0; e < 4; e++) s.c[(group + e / 2 * 8) * 8 + 2 * member + e % 2] = ((float *)lane(l).d)[e];
    }
    multiply(16, 8, k, s.a, s.b, s.c);
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++) ((float *)lane(l).d)[e] = s.c[(l / 4 + e / 2 * 8) * 8 + 2 * (l % 4) + e % 2];
  };
  together({a, b, nullptr, d, false}, work, k == 16 ? "mma_m16n8k16" : "mma_m16n8k8_tf32", file, line);
}

MLSYS_API void load_matrices(int count, bool transposed, unsigned *r, const void *row, const char *file, int line) {
  if ((self->current & 31) < 8 * count) {
    need_shared(row, 16, "ldmatrix: a row", {file, line});
    aligned(row, 16, "ldmatrix: a row", {file, line});
  }
  auto work = [=](auto lane) {
    for (int m = 0; m < count; m++)
      for (int l = 0; l < 32; l++) {
        int i = transposed ? l % 4 * 2 : l / 4, j = transposed ? l / 4 : l % 4 * 2;
        const uint16_t *p = (const uint16_t *)lane(m * 8 + i).a,
                       *q = transposed ? (const uint16_t *)lane(m * 8 + i + 1).a : p + 1;
        ((unsigned *)lane(l).d)[m] = p[j] | (unsigned)q[j] << 16;
      }
  };
  if ((self->current & 31) < 8 * count) tell(row, 16, READ, __builtin_return_address(0));
  together({row, nullptr, nullptr, r, false}, work, "ldmatrix", file, line);
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

// Eight neighbours of a factor in shared memory, 128-byte swizzle. `outer` counts rows of a or columns of b.
//   along k:  rows of 128 bytes, eight of them in 1024; from eight to eight `stride` bytes
//   along outer (transposed): 64 elements in 128 bytes, eight k in 1024; from eight k to the next `stride` bytes, from
// 64
//   elements to the next `leading` bytes
static const uint16_t *eight(const MatrixAt &m, bool transposed, int outer, int k) {
  const char *p = (const char *)m.start;
  if (transposed)
    p += outer / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + outer % 64 * 2;
  else
    p += outer / 8 * m.stride + outer % 8 * 128 + k * 2;
  return (const uint16_t *)swizzled(p);
}

template <class Step>
static void each_eight(const MatrixAt &m, bool transposed, int outer, Step step) {
  if (transposed) {
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < outer; i += 8) step(eight(m, true, i, k), i, k);
  } else {
    for (int i = 0; i < outer; i++)
      for (int k = 0; k < 16; k += 8) step(eight(m, false, i, k), i, k);
  }
}

static void tell_factors(const Product &p, bool landed) {
#ifdef MLSYS_CHECK
  if (self->launch->mode == 2) {
    if (!landed)
      check_bulk(p.a.start, 64 * 16 * 2, READ, p.pc), check_bulk(p.b.start, (size_t)p.n * 16 * 2, READ, p.pc);
    return;
  }
  auto read = [&](const uint16_t *at, int, int) {
    landed ? tell_landed(at, 16, READ, p.pc) : tell(at, 16, READ, p.pc);
  };
  each_eight(p.a, p.a_by_columns, 64, read);
  each_eight(p.b, p.b_by_rows, p.n, read);
#else
  (void)p, (void)landed;
#endif
}

static void compute(const Product &p) {
  Async &s = *async;
  int n = p.n;
  float x[8];
  each_eight(p.a, p.a_by_columns, 64, [&](const uint16_t *at, int i, int k) {
    widen(p.factors, at, x, 8);
    for (int e = 0; e < 8; e++) s.a[p.a_by_columns ? (i + e) * 16 + k : i * 16 + k + e] = x[e];
  });
  each_eight(p.b, p.b_by_rows, n, [&](const uint16_t *at, int i, int k) {
    widen(p.factors, at, x, 8);
    for (int e = 0; e < 8; e++) s.b[p.b_by_rows ? k * n + i + e : (k + e) * n + i] = x[e];
  });
  memset(s.c, 0, (size_t)(64 * n) * 4);
  multiply(64, n, 16, s.a, s.b, s.c);
  for (int t = 0; t < 128; t++)
    for (int row = 0; row < 2; row++) {
      const float *from = s.c + (t / 32 * 16 + t % 32 / 4 + row * 8) * n + t % 4 * 2;
      float *d = p.d[t] + row * 2;
      for (int i = 0; i < n / 8; i++)
        for (int e = 0; e < 2; e++) d[i * 4 + e] = (p.add ? d[i * 4 + e] : 0) + from[i * 8 + e];
    }
}

static bool same(const MatrixAt &x, const MatrixAt &y) {
  return x.start == y.start && x.leading == y.leading && x.stride == y.stride;
}

MLSYS_API void wgmma(int n, Format factors, bool a_by_columns, bool b_by_rows, float *d, MatrixAt a, MatrixAt b,
                     bool add, const char *file, int line) {
  Worker *w = self;
  Async &s = used();
  int me = w->current;
  Place place{file, line};
  Warpgroup &g = s.warpgroups[me >> 7];
  if ((me | 127) >= w->threads)
    misuse(place, "wgmma is done by 128 threads, four warps in a row from a multiple of four");
  size_t number = s.lone[me].products++ - g.landed;
  if (number == g.products.size())
    g.products.push_back({n,
                          factors,
                          a_by_columns,
                          b_by_rows,
                          add,
                          a,
                          b,
                          s.lone[me].product_group,
                          __builtin_return_address(0),
                          place,
                          {}});
  Product &p = g.products[number];
  if (p.n != n || p.place.line != line || p.add != add || !same(p.a, a) || !same(p.b, b))
    misuse(place, "the 128 threads of a wgmma do not agree on it: another of them is at line " +
                      std::to_string(p.place.line) + ", or has other operands");
  p.d[me & 127] = d;
  if ((me & 127) == 0) {
    for (const MatrixAt *m : {&a, &b}) {
      need_shared(m->start, 16, "wgmma: a factor", place);
      aligned(m->start, 16, "wgmma: a factor", place);
    }
    tell_factors(p, false);
  }
}

MLSYS_API void wgmma_commit() { used().lone[self->current].product_group++; }

// All 128 threads meet here, if there is a product to be done; the last one does it.
MLSYS_API void wgmma_wait(int left, const char *file, int line) {
  Worker *w = self;
  Async &s = used();
  int me = w->current, first = me & ~127, before = s.lone[me].product_group - left;
  Warpgroup &g = s.warpgroups[me >> 7];
  if (g.products.empty() || g.products.front().group >= before) return;
  if (++g.waiting < 128) {
    park(&g, "wgmma_wait", {file, line});
  } else {
    g.waiting = 0;
    w->current = first;  // the checker counts the reads as this thread's, and the others as ordered after it
    for (; !g.products.empty() && g.products.front().group < before; g.products.pop_front(), g.landed++) {
      tell_factors(g.products.front(), true);
      compute(g.products.front());
    }
    check_release(&g);
    w->current = me;
    for (int i = first; i < first + 128; i++)
      if (w->t[i].state == State::at_mbarrier && w->t[i].mbarrier == &g) w->t[i].state = State::ready;
  }
  check_acquire(&g);
}

// --- a block ---------------------------------------------------------------------------------------------------------

void async_begin() {
  if (!async) async.reset(new Async);
  if (!async->used) return;
  Async &a = *async;
  for (int i = 0; i < a.used; i++) {
    a.lone[i] = {std::move(a.lone[i].copies)};
    a.lone[i].copies.clear();
  }
  a.used = 0;
  a.mbarriers.clear();
  a.loads.clear();
  a.stores.clear();
  for (Warpgroup &g : a.warpgroups) g = {};
  a.events = 0;
  a.texts.clear();
}

bool async_progress() {
  if (!async->used) return false;
  if (gather_coalesced(self)) return true;
  while (!async->loads.empty())
    if (land_load()) return true;
  if (fail_tries(self)) return true;
  name_waits(self);
  return false;
}

// A copy out of shared memory that nobody has waited for: the block's memory may be gone before it is read.
void async_end() {
  if (!async->used || async->stores.empty()) return;
  const Transfer &t = async->stores.front();
  self->current = t.thread;
  report("misuse", nullptr, t.place,
         "the block ends without a wait for this store: bulk_commit(), then bulk_wait<0>() by the same thread");
}

}  // namespace mlsys
