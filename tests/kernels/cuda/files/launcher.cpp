// Launches kernels for a test that runs on another processor than they do: what _processor.py does through ctypes, by
// requests that come in at stdin. Answers go out where stdout was; what a kernel prints goes to stderr.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// As scheduler.h has them.
struct Region {
  char *lo;
  uint64_t bytes;
  uint32_t unit, index;
};
struct Launch {
  unsigned grid[3], block[3];
  uint64_t shared;
  void **args;
  int64_t *next;
  uint32_t order, mode;
  const Region *regions;
  const uint64_t *symbols;
  uint64_t n_regions, n_symbols;
  char *out;
  uint64_t out_size;
  volatile int32_t *stop;
  uint32_t workers;
  uint32_t *arrived, *finished;
  void **notes;
};

static FILE *answers;

static void need(bool done, const char *what) {
  if (done) return;
  fprintf(stderr, "launcher: %s: %s\n", what, dlerror());
  exit(2);
}

static uint64_t number() {
  uint64_t n;
  if (fread(&n, sizeof n, 1, stdin) != 1) exit(0);  // nobody asks any more
  return n;
}

static std::string text() {
  std::string s(number(), 0);
  need(s.empty() || fread(&s[0], s.size(), 1, stdin) == 1, "a request ends early");
  return s;
}

static void answer(const void *from, uint64_t bytes) {
  fwrite(&bytes, sizeof bytes, 1, answers);
  fwrite(from, 1, bytes, answers);
}

// Memory with room before and after it, as the tests' own tensors have.
struct Storage {
  static constexpr size_t room = 1 << 16;
  std::string bytes;
  char *at;
  explicit Storage(std::string given) : bytes(std::move(given)) {
    at = (char *)mmap(nullptr, bytes.size() + 2 * room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(at != MAP_FAILED, "no memory for a tensor");
    memcpy(at += room, bytes.data(), bytes.size());
  }
  ~Storage() { munmap(at - room, bytes.size() + 2 * room); }
};

using Call = int (*)(Launch *, void **);

// One copy of a library a worker: the same file would be loaded only once.
static void *copy_of(const std::string &path, size_t number) {
  static std::map<std::string, std::vector<void *>> loaded;
  std::vector<void *> &copies = loaded[path];
  while (copies.size() <= number) {
    std::string copy = path + "." + std::to_string(getpid()) + "." + std::to_string(copies.size());
    std::ofstream(copy, std::ios::binary) << std::ifstream(path, std::ios::binary).rdbuf();
    void *handle = dlopen(copy.c_str(), RTLD_NOW | RTLD_LOCAL);
    unlink(copy.c_str());
    need(handle, path.c_str());
    copies.push_back(handle);
    char **module = ((char **(*)())dlsym(handle, "mlsys_module"))();
    if (module[9] == module[10]) continue;  // no `__device__` variables
    static std::map<std::string, int> files;
    bool first = copies.size() == 1;
    if (first) files[path] = memfd_create("mlsys-device", 0);
    auto share = (int (*)(const void *, int, int))dlsym(handle, "mlsys_share");
    need(!share(module, files[path], first), "__device__ variables could not be shared");
  }
  return copies[number];
}

static void signature() {
  std::string path = text(), name = text();
  char out[4096] = "";
  ((void (*)(char *))dlsym(copy_of(path, 0), name.c_str()))(out);
  answer(out, strlen(out));
}

static void launch() {
  std::string path = text(), name = text();
  Launch all = {};
  for (unsigned &n : all.grid) n = (unsigned)number();
  for (unsigned &n : all.block) n = (unsigned)number();
  all.shared = number();
  all.order = (uint32_t)number();
  all.mode = (uint32_t)number();
  all.workers = (uint32_t)number();
  auto limit = std::chrono::milliseconds(number());

  std::vector<std::unique_ptr<Storage>> storages(number());
  for (auto &s : storages) s = std::make_unique<Storage>(text());
  std::vector<void *> args(number());
  for (void *&arg : args) {
    std::string value = text();
    arg = aligned_alloc(64, (value.size() + 63) / 64 * 64 + 64);  // as a tensor map has to lie
    memcpy(arg, value.data(), value.size());
    for (uint64_t pointers = number(); pointers--;) {
      uint64_t at = number(), storage = number(), offset = number();
      char *to = storages[storage]->at + offset;
      memcpy((char *)arg + at, &to, sizeof to);
    }
  }
  std::vector<Region> regions(number());
  for (Region &r : regions) {
    uint64_t storage = number();
    r.lo = storages[storage]->at + number();
    r.bytes = number();
    r.unit = (uint32_t)number();
    r.index = (uint32_t)number();
  }
  std::vector<uint64_t> symbols(number());
  for (uint64_t &n : symbols) n = number();

  int64_t next = 0;
  volatile int32_t stop = 0;
  uint32_t arrived = 0, finished = 0;
  std::vector<void *> notes(all.workers);
  std::vector<std::string> outs(all.workers, std::string(1 << 18, 0));
  all.args = args.data();
  all.next = &next;
  all.regions = regions.data();
  all.symbols = symbols.data();
  all.n_regions = regions.size();
  all.n_symbols = symbols.size() / 2;
  all.out_size = outs[0].size();
  all.stop = &stop;
  all.arrived = &arrived;
  all.finished = &finished;
  all.notes = notes.data();

  std::mutex lock;
  std::condition_variable done;
  uint32_t running = all.workers;
  std::vector<std::thread> workers;
  for (uint32_t i = 0; i < all.workers; i++) {
    auto call = (Call)dlsym(copy_of(path, i), name.c_str());
    need(call, name.c_str());
    workers.emplace_back([&, i, call] {
      Launch mine = all;
      mine.out = &outs[i][0];
      call(&mine, args.data());
      std::lock_guard<std::mutex> held(lock);
      running--;
      done.notify_all();
    });
  }
  auto halt = (void (*)(uint64_t))dlsym(copy_of(path, 0), "mlsys_stop");
  {
    std::unique_lock<std::mutex> held(lock);
    auto ended = [&] { return running == 0; };
    if (!done.wait_for(held, limit, ended)) {
      stop = 1;
      do {
        for (std::thread &w : workers) halt((uint64_t)w.native_handle());
      } while (!done.wait_for(held, std::chrono::milliseconds(20), ended));
    }
  }
  for (std::thread &w : workers) w.join();

  for (const std::string &out : outs) answer(out.data(), strlen(out.data()));
  for (auto &s : storages) answer(s->at, s->bytes.size());
  for (void *arg : args) free(arg);
}

int main() {
  answers = fdopen(dup(1), "wb");
  dup2(2, 1);
  for (;;) {
    std::string what = text();
    what == "launch" ? launch() : signature();
    fflush(answers);
  }
}
