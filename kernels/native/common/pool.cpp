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
#include <thread>

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

struct Shared {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*work)(void *, int64_t);
  void *context;
};

void take(void *p) {
  Shared &job = *static_cast<Shared *>(p);
  inside = true;
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.work(job.context, i);
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

} // namespace

ZK_PUBLIC void zk_parallel(int64_t threads, int64_t count, void (*work)(void *, int64_t), void *context) {
  if (threads > count) threads = count;
  if (threads > kMaxWorkers) threads = kMaxWorkers;
  if (count >= int64_t(0xffffffff)) threads = 1;
  if (threads > 1 && !inside && openmp() && !forked.load(std::memory_order_relaxed)) {
    Shared job;
    job.count = count;
    job.work = work;
    job.context = context;
    openmp()(take, &job, unsigned(threads), 0);
    return;
  }
  Pool *pool = threads > 1 && !inside ? get() : nullptr;
  if (!pool || !pool->user.try_lock()) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  int helpers = int(threads) - 1;
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
  pool->count.store(count, std::memory_order_relaxed);
  pool->work.store(work, std::memory_order_relaxed);
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
  for (int i = 0; i < kSpins && pool->done.load(std::memory_order_acquire) != count; ++i) ZK_PAUSE();
  if (pool->done.load(std::memory_order_acquire) != count) {
    std::unique_lock<std::mutex> lock(pool->sleep);
    pool->finished.wait(lock, [&] { return pool->done.load(std::memory_order_acquire) == count; });
  }
  pool->user.unlock();
}
