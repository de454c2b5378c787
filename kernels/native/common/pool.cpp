// A persistent pool of threads without OpenMP: two OpenMP runtimes in one process (torch brings its own) do not mix.
//
// Workers spin briefly for the next job and then park. The number of threads comes with each call. A job that finds the
// pool in use (another thread of the program, or a nested call) runs on the calling thread alone. Results never depend on
// which thread ran which index. A forked child starts with a new pool. The pool is never destroyed: at exit its parked
// threads end with the process.

#include "../zk.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
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
  // Generation in the upper bits and the number of workers that take part in the lower 16, read together.
  std::atomic<uint64_t> ticket{0};
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};
  void (*work)(void *, int64_t) = nullptr;
  void *context = nullptr;
  int64_t count = 0;

  void drain() {
    for (;;) {
      int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      work(context, i);
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
    if (index >= int(now & 0xffff)) continue;
    pool->drain();
    if (pool->running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard<std::mutex> lock(pool->sleep);
      pool->finished.notify_one();
    }
  }
}

#if !defined(_WIN32)
void forget() { current.store(nullptr); inside = false; }  // in a forked child: the threads of the pool did not come along
#endif

Pool *get() {
  Pool *pool = current.load(std::memory_order_acquire);
  if (pool) return pool;
#if !defined(_WIN32)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget); });
#endif
  Pool *fresh = new Pool;
  if (current.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

} // namespace

ZK_PUBLIC void zk_parallel(int64_t threads, int64_t count, void (*work)(void *, int64_t), void *context) {
  if (threads > count) threads = count;
  if (threads > kMaxWorkers) threads = kMaxWorkers;
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
  pool->work = work;
  pool->context = context;
  pool->count = count;
  pool->next.store(0, std::memory_order_relaxed);
  pool->running.store(helpers, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(pool->sleep);
    pool->ticket.store(((ticket >> 16) + 1) << 16 | uint64_t(helpers), std::memory_order_release);
  }
  pool->wake.notify_all();
  inside = true;
  pool->drain();
  inside = false;
  for (int i = 0; i < kSpins && pool->running.load(std::memory_order_acquire); ++i) ZK_PAUSE();
  if (pool->running.load(std::memory_order_acquire)) {
    std::unique_lock<std::mutex> lock(pool->sleep);
    pool->finished.wait(lock, [&] { return pool->running.load(std::memory_order_acquire) == 0; });
  }
  pool->user.unlock();
}
