// Which instruction sets this processor and operating system offer.

#include "../zk.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
static void cpuid(unsigned leaf, unsigned sub, unsigned *r) { __cpuidex(reinterpret_cast<int *>(r), int(leaf), int(sub)); }
static uint64_t xcr0() { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(unsigned leaf, unsigned sub, unsigned *r) { __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]); }
static uint64_t xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}
#endif
#endif

// A bit for each: 1 baseline, 2 avx2 (with FMA and F16C), 4 avx512 (F, BW, DQ, VL), 8 neon.
ZK_PUBLIC int64_t zk_isas() {
  int64_t found = 1;
#if defined(__x86_64__) || defined(_M_X64)
  unsigned r[4];
  cpuid(0, 0, r);
  if (r[0] < 7) return found;
  cpuid(1, 0, r);
  bool saves = r[2] & (1u << 27), avx = r[2] & (1u << 28), fma = r[2] & (1u << 12), f16c = r[2] & (1u << 29);
  if (!saves || !avx) return found;
  uint64_t state = xcr0();
  cpuid(7, 0, r);
  bool avx2 = r[1] & (1u << 5);
  unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if ((state & 0x6) == 0x6 && avx2 && fma && f16c) found |= 2;
  if ((found & 2) && (state & 0xe6) == 0xe6 && (r[1] & wanted) == wanted) found |= 4;
#elif defined(__aarch64__) || defined(_M_ARM64)
  found |= 8;
#endif
  return found;
}

// A hash of the sources that this library was built from.
#ifndef ZK_SOURCES
#define ZK_SOURCES ""
#endif
ZK_PUBLIC const char *zk_sources() { return ZK_SOURCES; }

// Raised whenever the layout of an argument array changes; zoo_kernels/_native.py expects the same number.
ZK_PUBLIC int64_t zk_abi() { return 2; }
