// Counts what Nsight Compute counts: the 32-byte sectors of each warp's accesses to tensors, and the passes that
// accesses to shared memory take over its 32 banks; for each place in the source.
//
// Lanes run one after the other here. The k-th time that a lane comes to a place belongs with the k-th time of the
// others: that is one request, as if they ran in step. Lanes of a warp run between two meetings without another warp's
// coming in, so what is open is closed when the warp has run as far as it can.
#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>

#include "checker.h"

namespace mlsys {

struct Request {
  unsigned lanes = 0;
  char *address[32];
};  // a bit for each lane that takes part
constexpr unsigned most_rounds = 1 << 18;  // of a loop without a meeting

struct Counted {
  const void *pc = nullptr;
  bool shared = false;
  int kind = 0;
  unsigned bytes = 0;
  long requests = 0, lanes = 0, transactions = 0, ideal = 0;  // sectors or passes, and the fewest that would do
  unsigned times[32] = {};                                    // of each lane, since the warp began to run
  std::vector<Request> open;
  long uncounted = 0;  // accesses beyond so many rounds: taken for like the others
};

// Which sectors of a tensor were read and written at all: what a cache of any size would still have to move.
struct Touched {
  char *lo;
  size_t bytes;
  uint32_t index;
  std::vector<bool> read, written;
};

struct Profiler {
  std::unordered_map<uint64_t, Counted> places;  // one instruction may read tensors and write shared memory
  std::vector<Counted *> used;
  std::vector<Touched> tensors;
  // How often each basic block of the kernel ran; which arithmetic it holds, Python reads from its instructions.
  std::unordered_map<const void *, long> blocks;
  struct {
    const void *pc;
    long *count;
  } recent[256] = {};
  long matrix_flops = 0;  // of tensor-core instructions
};
static thread_local std::unique_ptr<Profiler> owned;  // a pointer: room for thread_local variables is scarce

void profile_launch() {
  owned.reset();
  self->profiler = nullptr;
  if (self->launch->mode != 2) return;
  owned = std::make_unique<Profiler>();
  self->profiler = owned.get();
  for (uint64_t i = 0; i < self->launch->n_regions; i++) {
    const Region &r = self->launch->regions[i];
    size_t sectors = r.bytes / 32 + 2;
    owned->tensors.push_back({r.lo, r.bytes, r.index, std::vector<bool>(sectors), std::vector<bool>(sectors)});
  }
}

void check_flops(long n) {
  if (self->profiler) self->profiler->matrix_flops += n;
}

extern "C" MLSYS_API void __sanitizer_cov_trace_pc() {
  const void *pc = __builtin_return_address(0);
  if (!self || !self->in_kernel || !self->profiler) return;
  Profiler &f = *self->profiler;
  auto &slot = f.recent[(uintptr_t)pc >> 2 & 255];
  if (slot.pc != pc) slot.pc = pc, slot.count = &f.blocks[pc];  // an element of the map stays where it is
  ++*slot.count;
}

static Counted &counted(Profiler &f, unsigned bytes, int kind, const void *pc, bool shared) {
  Counted &c = f.places[(uint64_t)(uintptr_t)pc << 3 | (uint64_t)kind << 1 | shared];
  c.pc = pc;
  c.shared = shared;
  c.kind = kind;
  c.bytes = bytes;
  return c;
}

static void touched(Profiler &f, char *p, size_t bytes, int kind) {
  for (Touched &t : f.tensors)
    if (p >= t.lo && p < t.lo + t.bytes) {
      size_t first = (uintptr_t)p / 32 - (uintptr_t)t.lo / 32,
             last = (uintptr_t)(p + bytes - 1) / 32 - (uintptr_t)t.lo / 32;
      for (size_t sector = first; sector <= last; sector++) {
        if (kind != WRITE) t.read[sector] = true;
        if (kind != READ) t.written[sector] = true;
      }
      break;
    }
}

void profile_access(char *p, unsigned bytes, int kind, const void *pc, bool shared) {
  Profiler &f = *self->profiler;
  Counted &c = counted(f, bytes, kind, pc, shared);
  if (c.open.empty()) f.used.push_back(&c);
  if (!shared) touched(f, p, bytes, kind);
  int lane = self->current & 31;
  unsigned k = c.times[lane]++;
  if (k >= most_rounds) {
    c.uncounted++;
    return;
  }
  if (c.open.size() <= k) c.open.resize(k + 1);
  c.open[k].lanes |= 1u << lane;
  c.open[k].address[lane] = p;
}

void check_bulk(const void *p, size_t bytes, int kind, const void *pc) {
  Profiler &f = *self->profiler;
  const Module &m = self->module;
  bool shared = (char *)p >= m.shared_lo && (char *)p < m.shared_hi;
  Counted &c = counted(f, 16, kind, pc, shared);
  c.requests++;
  c.lanes += (long)bytes / 16;
  if (!shared) touched(f, (char *)p, bytes, kind);
  long moved = shared ? ((long)bytes + 127) / 128 : (long)(((uintptr_t)p + bytes - 1) / 32 - (uintptr_t)p / 32 + 1);
  c.transactions += moved;
  c.ideal += shared ? moved : ((long)bytes + 31) / 32;
}

static void count_tensor(Counted &c, const Request &r) {
  uintptr_t sectors[64], addresses[32];
  int n = 0, lanes = 0;
  for (unsigned left = r.lanes; left; left &= left - 1) {
    uintptr_t at = (uintptr_t)r.address[__builtin_ctz(left)];
    addresses[lanes++] = at;
    sectors[n++] = at / 32;
    if ((at + c.bytes - 1) / 32 != at / 32) sectors[n++] = (at + c.bytes - 1) / 32;
  }
  std::sort(sectors, sectors + n);
  std::sort(addresses, addresses + lanes);
  long distinct = std::unique(addresses, addresses + lanes) - addresses;
  c.transactions += std::unique(sectors, sectors + n) - sectors;
  c.ideal += (distinct * c.bytes + 31) / 32;
}

// Lanes that want different words of one bank wait for each other; those that want the same word do not. Accesses of 8
// and 16 bytes are served half and quarter warps at a time.
static void count_shared(Counted &c, const Request &r) {
  int group = c.bytes <= 4 ? 32 : c.bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += group) {
    uintptr_t words[128];
    int n = 0, per_bank[32] = {}, worst = 1;
    for (int lane = first; lane < first + group; lane++)
      for (unsigned b = 0; (r.lanes >> lane & 1) && b < c.bytes; b += 4)
        words[n++] = ((uintptr_t)r.address[lane] + b) / 4;
    if (!n) continue;
    std::sort(words, words + n);
    n = (int)(std::unique(words, words + n) - words);
    for (int i = 0; i < n; i++) worst = std::max(worst, ++per_bank[words[i] % 32]);
    c.transactions += worst;
    c.ideal++;
  }
}

void profile_slice_end(int) {
  Profiler &f = *self->profiler;
  for (Counted *c : f.used) {
    for (const Request &r : c->open) {
      c->requests++;
      c->lanes += __builtin_popcount(r.lanes);
      c->shared ? count_shared(*c, r) : count_tensor(*c, r);
    }
    c->open.clear();
    std::fill(c->times, c->times + 32, 0u);
  }
  f.used.clear();
}

void profile_finish() {
  Worker *w = self;
  if (!w->profiler) return;
  Profiler &f = *w->profiler;
  char s[160];
  auto say = [&](const char *kind, const void *pc) {
    w->findings = 0;  // these are no findings: as many as there are
    report(kind, pc ? (const void *)((const char *)pc - w->module.text_lo) : nullptr, {}, s);
  };
  for (auto &[key, c] : f.places) {
    if (c.uncounted && c.lanes) {
      double more = 1 + (double)c.uncounted / (double)c.lanes;
      for (long *n : {&c.requests, &c.transactions, &c.ideal, &c.lanes}) *n = (long)((double)*n * more);
    }
    snprintf(s, sizeof s, "%d\t%d\t%u\t%ld\t%ld\t%ld\t%ld", c.shared, c.kind, c.bytes, c.requests, c.lanes,
             c.transactions, c.ideal);
    say("access", c.pc);
  }
  for (const Touched &t : f.tensors) {
    snprintf(s, sizeof s, "%u\t%ld\t%ld", t.index, (long)std::count(t.read.begin(), t.read.end(), true),
             (long)std::count(t.written.begin(), t.written.end(), true));
    say("tensor", nullptr);
  }
  for (auto &[pc, n] : f.blocks) {
    snprintf(s, sizeof s, "%ld", n);
    say("ran", pc);
  }
  snprintf(s, sizeof s, "%ld", f.matrix_flops);
  say("matrix", nullptr);
  w->profiler = nullptr;
  owned.reset();
}

}  // namespace mlsys
