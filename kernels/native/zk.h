// What every native source shares: element types, the calling convention, the thread pool. Plain C ABI.
//
// Each file in this folder is compiled once per instruction set, with ZK_ISA set to its name, and exports its entry
// points through ZK_EXPORT. An entry point takes one array of 64-bit integers: pointers, sizes and strides (in elements),
// in the order of the struct that it reads them as. It returns 0, or a number that the Python side turns into an error.
// These files must not instantiate anything from the C++ standard library: a weak symbol compiled for AVX-512 could be
// the one that the linker keeps for all. Files in common/ are compiled once, for the baseline.
#pragma once

#include <stdint.h>
#include <stdlib.h>

static_assert(sizeof(void *) == 8, "64-bit platforms only");

#define ZK_JOIN2(a, b, c) a##b##c
#define ZK_JOIN(a, b, c) ZK_JOIN2(a, b, c)
#if defined(_WIN32)
#define ZK_PUBLIC extern "C" __declspec(dllexport)
#else
#define ZK_PUBLIC extern "C" __attribute__((visibility("default")))
#endif
// ZK_EXPORT(selective_scan_forward)(const int64_t *a) { ... } defines zk_selective_scan_forward__avx512, for instance.
#define ZK_EXPORT(name) ZK_PUBLIC int64_t ZK_JOIN(zk_, name##__, ZK_ISA)
#define ZK_NAMESPACE ZK_JOIN(zk, _, ZK_ISA)

// Before a loop over the registers of a block: without it they become an array in memory.
#if defined(__clang__)
#define ZK_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define ZK_UNROLL _Pragma("GCC unroll 16")
#else
#define ZK_UNROLL
#endif

// Fetch the cache line at p ahead of its use, into the first or the second level of cache; any address is allowed.
#if defined(_MSC_VER) && !defined(__clang__)
#define ZK_PREFETCH(p) ((void)(p))
#define ZK_PREFETCH_L2(p) ((void)(p))
#else
#define ZK_PREFETCH(p) __builtin_prefetch(p)
#define ZK_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define ZK_INLINE __forceinline
#define ZK_RESTRICT __restrict
#else
#define ZK_INLINE inline __attribute__((always_inline))
#define ZK_RESTRICT __restrict__
#endif

// Element types of tensors, as zoo_kernels/_native.py numbers them.
enum zk_dtype : int64_t { ZK_F32 = 0, ZK_F64 = 1, ZK_BF16 = 2, ZK_F16 = 3, ZK_I8 = 4 };
enum zk_status : int64_t { ZK_OK = 0, ZK_NO_MEMORY = 1 };

extern "C" {
// Calls work(context, i) for every i in 0 .. count - 1, each once, on up to `threads` threads. See common/pool.cpp.
void zk_parallel(int64_t threads, int64_t count, void (*work)(void *, int64_t), void *context);
// Calls work(context, s, i, member) for every stage s and every i in 0 .. counts[s] - 1, a stage after the whole of the one
// before, on one team of threads from the first to the last: much cheaper than zk_parallel for each stage. `member` is a
// number below `threads` that two calls at the same time never share. Returns ZK_OK or ZK_NO_MEMORY.
int64_t zk_stages(int64_t threads, int64_t stages, const int64_t *counts, void (*work)(void *, int64_t, int64_t, int64_t), void *context);
}

namespace ZK_NAMESPACE {

template <class F> inline void parallel(int64_t threads, int64_t count, const F &work) {
  zk_parallel(threads, count, [](void *context, int64_t i) { (*static_cast<const F *>(context))(i); }, const_cast<F *>(&work));
}

template <class F> inline int64_t in_stages(int64_t threads, int64_t stages, const int64_t *counts, const F &work) {
  auto one = [](void *context, int64_t s, int64_t i, int64_t member) { (*static_cast<const F *>(context))(s, i, member); };
  return zk_stages(threads, stages, counts, one, const_cast<F *>(&work));
}

// Scratch memory, aligned to 64 bytes, freed at the end of its block; `data` is null if there was none left.
template <class T> struct Scratch {
  void *raw;
  T *data;
  explicit Scratch(int64_t count) : raw(malloc(size_t(count) * sizeof(T) + 64)), data(nullptr) {
    if (raw) data = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { free(raw); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
};

ZK_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ZK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

} // namespace ZK_NAMESPACE
