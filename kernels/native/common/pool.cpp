// Sharing work between threads: torch's own OpenMP threads where they can be had, else a pool of ours.
//
// torch's threads spin for a while after each of its operators. A pool beside them would fight them for the processors,
// and a second OpenMP runtime does not mix with the first, so the one that the process has is borrowed: its entry point
// GOMP_parallel (libgomp's; Intel's and LLVM's runtimes have it too) is looked up by name. Elsewhere (macOS, Windows,
// builds of torch without OpenMP), and in a forked child, where libgomp's threads are gone, the pool serves.
//
// The pool: a persistent one without OpenMP.
// Workers spin briefly for the next job and then park. The number of threads comes with each call. A job that finds the
// pool in use (another thread of the program, or a nested call) runs on the calling thread alone. Results never depend on
// which thread ran which index. The caller waits for indices that were claimed, not for workers: one that the system
// wakes too late finds nothing left and holds nobody up. A forked child starts with a new pool. The pool is never
// destroyed: at exit its parked threads end with the process.

#include "../zk.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define ZK_PAUSE() _mm_pause()
#elif defined(__aarch64__) && !defined(_MSC_VER)
#define ZK_PAUSE() asm volatile("yield")
#else
#define ZK_PAUSE() std::this_thread::yield()
#endif

namespace {

constexpr int kSpins = 2000;   // about 20 to 60 microseconds
constexpr int kMaxWorkers = 1023;

struct Pool {
  std::mutex user;  // held by the thread whose job runs
  std::mutex sleep;
  std::condition_variable wake, finished;
  int workers = 0;
  // The number of the job in the upper bits and the number of workers that may take part in the lower 16, read together.
  std::atomic<uint64_t> ticket{0};
  // The number of the job in the upper half and the next index in the lower. A worker that is late compares the number
  // before it claims an index, so that it cannot touch a job that it has not read.
  std::atomic<uint64_t> next{0};
  std::atomic<int64_t> count{0}, done{0};
  std::atomic<void (*)(void *, int64_t)> work{nullptr};
  std::atomic<void *> context{nullptr};

  void drain(uint32_t job) {
    uint64_t claim = next.load(std::memory_order_acquire);
    for (;;) {
      int64_t total = count.load(std::memory_order_relaxed), i = int64_t(claim & 0xffffffffu);
      auto function = work.load(std::memory_order_relaxed);
      void *argument = context.load(std::memory_order_relaxed);
      // Pairs with the fence in zk_parallel: who has read a value of the next job finds `next` changed.
      std::atomic_thread_fence(std::memory_order_acquire);
      if (uint32_t(claim >> 32) != job || i >= total) return;
      if (!next.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      function(argument, i);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
        std::lock_guard<std::mutex> lock(sleep);
        finished.notify_one();
      }
      claim = next.load(std::memory_order_acquire);
    }
  }
};

thread_local bool inside = false;
std::atomic<Pool *> current{nullptr};

void worker(Pool *pool, int index, uint64_t seen) {
  inside = true;
  for (;;) {
    uint64_t now = seen;
    for (int i = 0; i < kSpins && now == seen; ++i) {
      ZK_PAUSE();
      now = pool->ticket.load(std::memory_order_acquire);
    }
    if (now == seen) {
      std::unique_lock<std::mutex> lock(pool->sleep);
      pool->wake.wait(lock, [&] { return (now = pool->ticket.load(std::memory_order_acquire)) != seen; });
    }
    seen = now;
    if (index < int(now & 0xffff)) pool->drain(uint32_t(now >> 16));
  }
}

std::atomic<bool> forked{false};

#if !defined(_WIN32)
// In a forked child: the threads of the parent did not come along.
void forget() {
  current.store(nullptr);
  inside = false;
  forked.store(true);
}
// Known from the start: torch may have used its threads before the first call here.
const int watching = pthread_atfork(nullptr, nullptr, forget);
#endif

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

Parallel openmp() {
#if defined(__linux__)
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// One index counter of its own, alone on its cache line.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// The indices 0 .. count - 1 in as many consecutive ranges as there are threads. A thread works through one of them, so
// that what it reads from memory is one long stream (two threads that take turns at pieces of 64 KB read at two thirds
// of the rate), and then helps with those that are left. Nobody waits for a thread that never came.
struct Ranges {
  Range *range;
  int parts;
  void set(Range *memory, int number, int64_t count) {
    range = memory;
    parts = number;
    for (int p = 0; p < parts; ++p) {
      range[p].next.store(count / parts * p + count % parts * p / parts, std::memory_order_relaxed);
      range[p].end = count / parts * (p + 1) + count % parts * (p + 1) / parts;
    }
  }
  template <class F> int64_t drain(int first, const F &work) {
    int64_t done = 0;
    for (int k = 0; k < parts; ++k) {
      Range &r = range[(first + k) % parts];
      if (r.next.load(std::memory_order_relaxed) >= r.end) continue;
      for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end; ++done) work(i);
    }
    return done;
  }
};

// Work for a team of threads: run(context, member) once for each member, on different threads if they come, on one after
// another if not.
void team(int members, void (*run)(void *, int), void *context);

struct Loop {
  Ranges ranges;
  void (*work)(void *, int64_t);
  void *context;
};

struct Program {
  int64_t stages;
  Ranges *ranges;             // of each stage
  const int64_t *counts;
  std::atomic<int64_t> *done; // indices of each stage
  void (*work)(void *, int64_t, int64_t, int64_t);
  void *context;
};

void loop(void *p, int member) {
  Loop &job = *static_cast<Loop *>(p);
  job.ranges.drain(member, [&](int64_t i) { job.work(job.context, i); });
}

void program(void *p, int member) {
  Program &job = *static_cast<Program *>(p);
  for (int64_t s = 0; s < job.stages; ++s) {
    int64_t mine = job.ranges[s].drain(member, [&](int64_t i) { job.work(job.context, s, i, member); });
    if (mine) job.done[s].fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; job.done[s].load(std::memory_order_acquire) != job.counts[s]; ++spins) {
      if (spins < kSpins) ZK_PAUSE();
      else std::this_thread::yield();
    }
  }
}

struct Team {
  std::atomic<int> arrived{0};
  int members;
  void (*run)(void *, int);
  void *context;
};

void join(void *p) {
  Team &job = *static_cast<Team *>(p);
  inside = true;
  for (int m; (m = job.arrived.fetch_add(1, std::memory_order_relaxed)) < job.members;) job.run(job.context, m);
  inside = false;
}

Pool *get() {
  Pool *pool = current.load(std::memory_order_acquire);
  if (pool) return pool;
  Pool *fresh = new Pool;
  if (current.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

// The pool's part of team(): false if it is in use.
bool pooled(int members, void (*run)(void *, int64_t), void *context) {
  Pool *pool = get();
  if (!pool->user.try_lock()) return false;
  int helpers = members - 1;
  uint64_t ticket = pool->ticket.load(std::memory_order_relaxed);
  while (pool->workers < helpers) {
    try {
      std::thread(worker, pool, pool->workers, ticket).detach();
    } catch (...) {  // the system gives no more threads: fewer do the same work
      helpers = pool->workers;
      break;
    }
    ++pool->workers;
  }
  uint32_t job = uint32_t((ticket >> 16) + 1);
  pool->next.store(uint64_t(job) << 32 | 0xffffffffu, std::memory_order_relaxed);  // nothing to claim while this changes
  std::atomic_thread_fence(std::memory_order_release);
  pool->count.store(members, std::memory_order_relaxed);
  pool->work.store(run, std::memory_order_relaxed);
  pool->context.store(context, std::memory_order_relaxed);
  pool->done.store(0, std::memory_order_relaxed);
  pool->next.store(uint64_t(job) << 32, std::memory_order_release);
  {
    std::lock_guard<std::mutex> lock(pool->sleep);
    pool->ticket.store(uint64_t(job) << 16 | uint64_t(helpers), std::memory_order_release);
  }
  pool->wake.notify_all();
  inside = true;
  pool->drain(job);
  inside = false;
  for (int i = 0; i < kSpins && pool->done.load(std::memory_order_acquire) != members; ++i) ZK_PAUSE();
  if (pool->done.load(std::memory_order_acquire) != members) {
    std::unique_lock<std::mutex> lock(pool->sleep);
    pool->finished.wait(lock, [&] { return pool->done.load(std::memory_order_acquire) == members; });
  }
  pool->user.unlock();
  return true;
}

void team(int members, void (*run)(void *, int), void *context) {
  Team job;
  job.members = members;
  job.run = run;
  job.context = context;
  if (members > 1 && !inside) {
    if (openmp() && !forked.load(std::memory_order_relaxed)) return openmp()(join, &job, unsigned(members), 0);
    auto one = [](void *p, int64_t m) { static_cast<Team *>(p)->run(static_cast<Team *>(p)->context, int(m)); };
    if (pooled(members, one, &job)) return;
  }
  for (int m = 0; m < members; ++m) run(context, m);
}

constexpr int kMaxParts = 64;  // ranges; further threads share one

} // namespace

ZK_PUBLIC void zk_parallel(int64_t threads, int64_t count, void (*work)(void *, int64_t), void *context) {
  if (threads > count) threads = count;
  if (threads > kMaxWorkers) threads = kMaxWorkers;
  if (threads <= 1 || inside) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  Range ranges[kMaxParts];
  Loop job;
  job.ranges.set(ranges, int(threads < kMaxParts ? threads : kMaxParts), count);
  job.work = work;
  job.context = context;
  team(int(threads), loop, &job);
}

ZK_PUBLIC int64_t zk_stages(int64_t threads, int64_t stages, const int64_t *counts, void (*work)(void *, int64_t, int64_t, int64_t),
                            void *context) {
  if (threads > kMaxParts) threads = kMaxParts;
  if (threads <= 1 || inside) {
    for (int64_t s = 0; s < stages; ++s)
      for (int64_t i = 0; i < counts[s]; ++i) work(context, s, i, 0);
    return ZK_OK;
  }
  try {
    const size_t number = size_t(stages), parts = size_t(threads);
    std::vector<Range> memory(number * parts);
    std::vector<Ranges> ranges(number);
    std::vector<std::atomic<int64_t>> done(number);
    for (size_t s = 0; s < number; ++s) {
      ranges[s].set(memory.data() + s * parts, int(parts), counts[s]);
      done[s].store(0, std::memory_order_relaxed);
    }
    Program job{stages, ranges.data(), counts, done.data(), work, context};
    team(int(threads), program, &job);
  } catch (const std::bad_alloc &) {
    return ZK_NO_MEMORY;
  }
  return ZK_OK;
}
