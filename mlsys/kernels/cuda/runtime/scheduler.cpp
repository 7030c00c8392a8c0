// Runs the threads of a block on one core.
//
// Each CUDA thread is a fiber. It runs until it has to wait, then hands over to the next one of its warp that can go
// on: six registers and a jump. The last to arrive at a meeting releases the others and walks on. A thread that has
// never waited leaves its stack to the next one, without any switch.
#include "scheduler.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

// void mlsys_switch(void **save, void *load): keep this fiber's registers on its stack, take up another's.
// Not `ret`: the processor predicts returns from calls, and knows nothing of fibers.
extern "C" void mlsys_switch(void **save, void *load);
extern "C" void mlsys_resume();
#if defined(__x86_64__)
asm(R"(
.text
.hidden mlsys_switch
.hidden mlsys_resume
.globl mlsys_switch
.globl mlsys_resume
mlsys_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
mlsys_resume:
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmp *%rcx
)");
constexpr int saved_words = 6;
#elif defined(__aarch64__)
#ifdef __ARM_FEATURE_BTI_DEFAULT  // then a jump may go to marked places only
#define MLSYS_BACK "ret"
#else
#define MLSYS_BACK "br x30"
#endif
asm(R"(
.text
.hidden mlsys_switch
.hidden mlsys_resume
.globl mlsys_switch
.globl mlsys_resume
mlsys_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
mlsys_resume:
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  )" MLSYS_BACK);
#else
#error "mlsys runs CUDA kernels on x86-64 and aarch64 processors"
#endif

namespace mlsys {

constinit thread_local Worker *self = nullptr;

// --- fibers ----------------------------------------------------------------------------------------------------------

static inline void enter(Worker *w, int t) {
  w->current = t;
  memcpy(w->module.thread_index, w->t[t].index, sizeof w->t[t].index);
}

// The next lane of this thread's warp that can go on, or −1.
static inline int next_in_warp(Worker *w, int after) {
  int first = after & ~31, last = std::min(first + 32, w->threads);
  if (w->descending) {
    for (int i = after - 1; i >= first; i--)
      if (w->t[i].state <= State::ready) return i;
    for (int i = last - 1; i > after; i--)
      if (w->t[i].state <= State::ready) return i;
  } else {
    for (int i = after + 1; i < last; i++)
      if (w->t[i].state <= State::ready) return i;
    for (int i = first; i < after; i++)
      if (w->t[i].state <= State::ready) return i;
  }
  return -1;
}

static void released(Worker *w);

static void fiber() {
  Worker *w = self;
  for (;;) {
    w->body(w->arg);
    int me = w->current;
    Thread &t = w->t[me];
    t.state = State::done;
    w->living--;
    w->alive[me >> 5] &= ~(1u << (me & 31));
    released(w);
    int next = next_in_warp(w, me);
    if (next >= 0 && w->t[next].state == State::fresh) {  // it takes over this stack
      w->t[next].stack = t.stack;
      t.stack = -1;
      w->t[next].state = State::ready;
      enter(w, next);
      continue;
    }
    w->free_stacks.push_back(t.stack);
    t.stack = -1;
    void *nowhere;
    if (next < 0) mlsys_switch(&nowhere, w->home);
    enter(w, next);
    mlsys_switch(&nowhere, w->t[next].sp);
  }
}

static void *first_frame(Worker *w, int t) {
  int stack = w->free_stacks.back();
  w->free_stacks.pop_back();
  w->t[t].stack = stack;
  // The tops of the stacks lie at different places of their pages: else all would fall into the same cache sets.
  char *top = w->stacks + stack_stride * (stack + 1) - 64 - (stack % 32) * 64;
#if defined(__x86_64__)
  void **sp = (void **)top;
  *--sp = nullptr;  // as if called: the stack is 16-byte aligned after a return address is pushed
  *--sp = (void *)fiber;
  for (int i = 0; i < saved_words; i++) *--sp = nullptr;
#else
  void **sp = (void **)(top - 160);
  memset(sp, 0, 160);
  sp[1] = (void *)fiber;
#endif
  return sp;
}

// The current thread has to wait: hand over.
static inline void wait_here(Worker *w) {
  int me = w->current, next = next_in_warp(w, me);
  void *to = w->home;
  if (next >= 0) {
    Thread &n = w->t[next];
    if (n.state == State::fresh) {
      n.sp = first_frame(w, next);
      n.state = State::ready;
    }
    to = n.sp;
    enter(w, next);
  }
  mlsys_switch(&w->t[me].sp, to);
}

void abandon() {
  self->ended = true;
  void *nowhere;
  mlsys_switch(&nowhere, self->home);
  __builtin_unreachable();
}

// --- meetings --------------------------------------------------------------------------------------------------------

static void open(Worker *w, int id) {
  if (id == 0) {
    check_block_barrier();
    w->count = w->votes;
    w->votes = 0;
  } else {
    std::vector<int> who;
    for (int i = 0; i < w->threads; i++)
      if (w->t[i].state == State::at_block && w->t[i].barrier == id) who.push_back(i);
    check_some_barrier(who);
  }
  for (int i = 0; i < w->threads; i++)
    if (w->t[i].state == State::at_block && w->t[i].barrier == id) w->t[i].state = State::ready;
  w->barriers[id].arrived = 0;
}

// A thread has returned: those who waited for it alone go on, as on sm_70 and later.
static void released(Worker *w) {
  Barrier &b = w->barriers[0];
  if (b.arrived && b.arrived == w->living) open(w, 0);
}

MLSYS_API void wait_block(const char *what, const char *file, int line, int id, int expected) {
  Worker *w = self;
  Thread &t = w->t[w->current];
  t.state = State::at_block;
  t.what = what;
  t.place = {file, line};
  t.barrier = (uint8_t)id;
  Barrier &b = w->barriers[id];
  b.expected = expected;
  b.arrived++;
  if (b.arrived == (id ? expected : w->living)) {
    open(w, id);  // the last to arrive; it goes on at once
    return;
  }
  wait_here(w);
}

// How many of the threads said yes.
MLSYS_API int vote_block(int p, const char *what, const char *file, int line) {
  Worker *w = self;
  w->votes += p;
  wait_block(what, file, line, 0, 0);
  return w->count;  // stays until the next barrier, which waits for this thread
}

// All lanes of the mask that have not returned are here, at the same operation.
static bool complete(Worker *w, int warp, unsigned mask, const Thread &of) {
  unsigned need = mask & w->alive[warp];
  if ((w->waiting[warp] & need) != need) return false;
  for (unsigned left = need; left; left &= left - 1) {
    const Thread &o = w->t[warp * 32 + __builtin_ctz(left)];
    if (o.mask != mask || o.place.line != of.place.line || o.what != of.what) return false;
  }
  return true;
}

static void release_warp(Worker *w, int warp, unsigned mask) {
  unsigned lanes = mask & w->alive[warp];
  check_warp(warp, lanes);
  w->waiting[warp] &= ~lanes;
  for (unsigned left = lanes; left; left &= left - 1) {
    Thread &t = w->t[warp * 32 + __builtin_ctz(left)];
    t.state = State::ready;
    t.met = lanes;  // kept: who walks on first may have returned when the others look
  }
}

MLSYS_API void wait_warp(unsigned mask, const char *what, const char *file, int line) {
  Worker *w = self;
  int me = w->current, warp = me >> 5;
  Thread &t = w->t[me];
  t.mask = mask;
  t.what = what;
  t.place = {file, line};
  if (!(mask >> (me & 31) & 1)) {
    report("mask-without-caller", nullptr, t.place, std::string(what) + "\t" + std::to_string(mask));
    abandon();
  }
  t.state = State::at_warp;
  w->waiting[warp] |= 1u << (me & 31);
  if (complete(w, warp, mask, t)) {
    release_warp(w, warp, mask);
    return;
  }
  wait_here(w);
}

MLSYS_API int lane() { return self->current & 31; }
MLSYS_API int flip() { return self->t[self->current].half ^= 1; }
MLSYS_API void *slot(int lane, int half) { return self->exchange[self->current >> 5][half][lane]; }
MLSYS_API unsigned met() { return self->t[self->current].met; }
MLSYS_API unsigned living(unsigned mask) { return self->alive[self->current >> 5] & mask; }

MLSYS_API void undefined_lane(int source, unsigned mask, const char *what, const char *file, int line) {
  report("undefined-lane", nullptr, {file, line},
         std::string(what) + "\t" + std::to_string(source) + "\t" + std::to_string(mask));
}

MLSYS_API void fail(const char *what, const char *file, int line) {
  report("assertion", nullptr, {file, line}, what);
  abandon();
}

MLSYS_API void matrix_flops(long n) { check_flops(n); }
MLSYS_API void fence() { check_fence(); }
MLSYS_API void atomic_access(void *p, unsigned bytes, const void *pc) { check_access(p, bytes, ATOMIC, pc); }

// One atomic operation in so many lets others run: who spins for a lock would otherwise wait for ever.
MLSYS_API void spin() {
  Worker *w = self;
  int me = w->current;
  w->t[me].state = State::ready;
  if (next_in_warp(w, me) >= 0) {
    wait_here(w);
    return;
  }
  mlsys_switch(&w->t[me].sp, w->home);
}

// --- findings --------------------------------------------------------------------------------------------------------

std::string place_fields(int thread) {
  char s[96];
  const unsigned *i = self->t[thread].index, *b = self->module.block_index;
  snprintf(s, sizeof s, "%u,%u,%u\t%u,%u,%u", i[0], i[1], i[2], b[0], b[1], b[2]);
  return s;
}

// kind, program counter, file, line, thread, block, and what the kind has more of; a line each
void report(const char *kind, const void *pc, Place place, const std::string &fields) {
  Worker *w = self;
  if (w->findings++ >= 200) return;
  char s[64];
  snprintf(s, sizeof s, "%s\t%p\t", kind, pc);
  w->out += s;
  w->out += place.file ? place.file : "";
  w->out += "\t" + std::to_string(place.line) + "\t" + place_fields(w->current) + "\t" + fields + "\n";
}

// No thread can go on. Who waits where?
static void stuck(Worker *w) {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < w->threads; i++) {
    Thread &t = w->t[i];
    std::string key = t.state == State::done
                          ? "returned\t\t0"
                          : std::string(t.what) + "\t" + t.place.file + "\t" + std::to_string(t.place.line);
    groups[key].push_back(i);
  }
  std::string fields;
  for (auto &[key, who] : groups)
    fields += (fields.empty() ? "" : "\t") + key + "\t" + std::to_string(who.size()) + "\t" +
              std::to_string(who.front()) + "\t" + std::to_string(who.back());
  for (int i = 0; i < w->threads; i++)
    if (w->t[i].state != State::done) {
      w->current = i;
      break;
    }
  report("stuck", nullptr, w->t[w->current].place, fields);
}

// --- blocks ----------------------------------------------------------------------------------------------------------

static void run_warp(Worker *w, int warp) {
  int first = warp * 32;
  for (;;) {
    int t = next_in_warp(w, w->descending ? first : std::min(first + 31, w->threads - 1));
    int edge = w->descending ? first : std::min(first + 31, w->threads - 1);
    if (t < 0 && w->t[edge].state <= State::ready) t = edge;  // next_in_warp leaves out the one it is asked for
    if (t < 0) break;
    if (w->t[t].state == State::fresh) {
      w->t[t].sp = first_frame(w, t);
      w->t[t].state = State::ready;
    }
    enter(w, t);
    w->in_kernel = true;
    mlsys_switch(&w->home, w->t[t].sp);
    w->in_kernel = false;
    if (w->ended || *w->launch->stop) return;
    if (w->t[t].state != State::ready && w->t[t].state != State::fresh) continue;
    if (next_in_warp(w, t) < 0) break;  // it spins, alone in its warp: let other warps run
  }
  check_slice_end(warp);
}

// Lanes that wait for some that have returned meanwhile.
static bool release_warps(Worker *w) {
  bool moved = false;
  for (int warp = 0; warp * 32 < w->threads; warp++)
    for (unsigned left = w->waiting[warp]; left; left &= left - 1) {
      Thread &t = w->t[warp * 32 + __builtin_ctz(left)];
      if (t.state == State::at_warp && complete(w, warp, t.mask, t)) {
        release_warp(w, warp, t.mask);
        moved = true;
      }
    }
  return moved;
}

static bool any_ready(Worker *w) {
  for (int i = 0; i < w->threads; i++)
    if (w->t[i].state <= State::ready) return true;
  return false;
}

static void run_block(Worker *w) {
  const unsigned *dim = w->launch->block;
  int n = w->threads;
  w->living = n;
  for (int i = 0; i < n; i++) {
    Thread &t = w->t[i];
    t.state = State::fresh;
    t.half = 0;
    t.stack = -1;
    t.place = {};
    t.index[0] = i % dim[0];
    t.index[1] = i / dim[0] % dim[1];
    t.index[2] = i / (dim[0] * dim[1]);
  }
  int warps = (n + 31) / 32;
  for (int i = 0; i < warps; i++) {
    w->waiting[i] = 0;
    w->alive[i] = i * 32 + 32 <= n ? ~0u : (1u << (n - i * 32)) - 1;
  }
  for (Barrier &b : w->barriers) b = {};
  w->votes = 0;
  async_begin();
  check_block();
  for (;;) {
    for (int warp : w->warps) {
      run_warp(w, warp);
      if (w->ended || *w->launch->stop) return;
    }
    if (any_ready(w) || release_warps(w)) continue;
    if (w->living == 0) break;
    if (async_progress()) continue;
    stuck(w);
    w->ended = true;
    return;
  }
  async_end();
  check_block_end();
}

static void prepare(Worker *w, Launch *launch) {
  w->launch = launch;
  w->threads = (int)(launch->block[0] * launch->block[1] * launch->block[2]);
  w->out.clear();
  w->findings = 0;
  w->ended = false;
  w->descending = launch->order & 1;
  w->warps.resize((w->threads + 31) / 32);
  for (size_t i = 0; i < w->warps.size(); i++) w->warps[i] = (int)i;
  if (launch->order == 1) std::reverse(w->warps.begin(), w->warps.end());
  unsigned random = launch->order;
  for (size_t i = w->warps.size(); launch->order > 1 && i > 1; i--) {
    random = random * 1664525u + 1013904223u;
    std::swap(w->warps[i - 1], w->warps[(random >> 8) % i]);
  }
  if (!w->stacks) {
    size_t bytes = stack_stride * max_threads;
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    w->stacks = (char *)p;
    for (int i = 0; i < max_threads; i++) mprotect(w->stacks + stack_stride * i, page, PROT_NONE);
  }
  w->free_stacks.clear();
  for (int i = max_threads - 1; i >= 0; i--) w->free_stacks.push_back(i);
}

// --- what goes wrong in the kernel's own code ------------------------------------------------------------------------

// The handler does not return into the kernel: it lets the scheduler go on, in place of the thread.
static void on_signal(int signal, siginfo_t *info, void *context);
static const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction before[64];
static int users = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#ifdef MLSYS_CHECK
static int stop_signal() { return SIGRTMIN + 6; }  // one for each runtime: its handler stays
#else
static int stop_signal() { return SIGRTMIN + 5; }
#endif

static struct sigaction handler() {
  struct sigaction act = {};
  act.sa_sigaction = on_signal;
  act.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return act;
}

// This one is there as long as the library: a stop may come before a worker has begun, or after it has ended, and would
// kill the process.
__attribute__((constructor)) static void hear_stops() {
  struct sigaction act = handler();
  sigaction(stop_signal(), &act, nullptr);
}

static void install() {
  pthread_mutex_lock(&lock);
  struct sigaction act = handler();
  if (users++ == 0)
    for (int s : caught) sigaction(s, &act, &before[s]);
  pthread_mutex_unlock(&lock);
}

static void uninstall() {
  pthread_mutex_lock(&lock);
  if (--users == 0) {
    for (int s : caught) sigaction(s, &before[s], nullptr);
  }
  pthread_mutex_unlock(&lock);
}

static thread_local const char *signal_kind = nullptr;
static thread_local const void *signal_pc = nullptr, *signal_address = nullptr;

static void on_signal(int signal, siginfo_t *info, void *context) {
  Worker *w = self;
  ucontext_t *c = (ucontext_t *)context;
#if defined(__x86_64__)
  auto &pc = c->uc_mcontext.gregs[REG_RIP], &sp = c->uc_mcontext.gregs[REG_RSP];
#else
  auto &pc = c->uc_mcontext.pc, &sp = c->uc_mcontext.sp;
#endif
  char *address = (char *)info->si_addr;
  bool stopped = signal == stop_signal();
  if (w && w->in_kernel) {
    // An endless loop is stopped in the kernel's own code only: elsewhere a lock may be held. Who sent it tries again.
    if (stopped && !*w->launch->stop) return;  // it was for a launch that has ended
    if (stopped && ((char *)pc < w->module.text_lo || (char *)pc >= w->module.text_hi)) return;
    bool overflow = !stopped && address >= w->stacks && address < w->stacks + stack_stride * max_threads;
    signal_kind = stopped ? "endless" : overflow ? "stack-overflow" : signal == SIGFPE ? "division" : "invalid-address";
    signal_pc = (const void *)(uintptr_t)pc;
    signal_address = address;
    w->ended = true;
    pc = (decltype(+pc))(uintptr_t)mlsys_resume;
    sp = (decltype(+sp))(uintptr_t)w->home;
    return;
  }
  if (stopped) return;
  sigaction(signal, &before[signal], nullptr);  // not ours: as if we were not here
}

// Lives as long as its OS thread.
struct Owner {
  Worker worker;
  std::vector<char> stack = std::vector<char>(64 << 10);  // for signals: a kernel's own may be what overflowed
  Owner() {
    stack_t s = {};
    s.ss_sp = stack.data();
    s.ss_size = stack.size();
    sigaltstack(&s, nullptr);
    self = &worker;
  }
  ~Owner() {
    stack_t s = {};
    s.ss_flags = SS_DISABLE;
    sigaltstack(&s, nullptr);
    if (worker.stacks) munmap(worker.stacks, stack_stride * max_threads);
    self = nullptr;
  }
};

static Worker *worker() {
  static thread_local std::unique_ptr<Owner> owner;
  if (!owner) owner = std::make_unique<Owner>();
  return self;
}

static int64_t block_count(const Launch *launch) {
  return (int64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
}

// The stop came while the scheduler was at work: its signal has hit no thread.
static void time_was_up(Worker *w, bool in_block) {
  if (in_block) {
    const Thread &last = w->t[w->current];
    report("endless", nullptr, last.state == State::done ? Place{} : last.place, "");
  } else if (__atomic_load_n(w->launch->next, __ATOMIC_RELAXED) < block_count(w->launch)) {
    report("unfinished", nullptr, {}, "");
  }
}

// Runs blocks until there are no more. 0, or 1 if one of them was abandoned; what was found is in launch->out.
extern "C" MLSYS_API int mlsys_run(Launch *launch, const Module *module, void (*body)(void *), void *arg) {
  Worker *w = worker();
  w->module = *module;
  w->body = body;
  w->arg = arg;
  prepare(w, launch);
  memcpy(module->block_dim, launch->block, sizeof launch->block);
  memcpy(module->grid_dim, launch->grid, sizeof launch->grid);
  const unsigned *g = launch->grid;
  int64_t blocks = block_count(launch);
  bool in_block = false;
  signal_kind = nullptr;
  install();
  check_launch();
  for (int64_t i;
       !w->ended && !*launch->stop && (i = __atomic_fetch_add(launch->next, 1, __ATOMIC_RELAXED)) < blocks;) {
    module->block_index[0] = (unsigned)(i % g[0]);
    module->block_index[1] = (unsigned)(i / g[0] % g[1]);
    module->block_index[2] = (unsigned)(i / ((int64_t)g[0] * g[1]));
    run_block(w);
    in_block = w->living > 0;
  }
  if (!w->ended && *launch->stop) time_was_up(w, in_block);
  if (signal_kind) {
    w->in_kernel = false;
    char s[32];
    snprintf(s, sizeof s, "%p", signal_address);
    report(signal_kind, (const void *)((const char *)signal_pc - w->module.text_lo), {}, s);
  }
  if (w->ended) __atomic_store_n(launch->next, blocks, __ATOMIC_RELAXED);
  check_finish();
  uninstall();
  fflush(stdout);
  size_t n = std::min<size_t>(w->out.size(), launch->out_size - 1);
  memcpy(launch->out, w->out.data(), n);
  launch->out[n] = 0;
  return w->ended || *launch->stop;
}

// Lays the pages of a file over a library's `__device__` variables, so that all copies of the library have the same ones.
// The first copy's values go into the file.
extern "C" MLSYS_API int mlsys_share(const Module *m, int fd, int first) {
  size_t bytes = (size_t)(m->device_hi - m->device_lo);
  if (!bytes) return 0;
  if (first && (ftruncate(fd, (off_t)bytes) || pwrite(fd, m->device_lo, bytes, 0) != (ssize_t)bytes)) return 1;
  return mmap(m->device_lo, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED;
}

extern "C" MLSYS_API uint64_t mlsys_thread() { return (uint64_t)pthread_self(); }
extern "C" MLSYS_API void mlsys_stop(uint64_t thread) { pthread_kill((pthread_t)thread, stop_signal()); }

}  // namespace mlsys
