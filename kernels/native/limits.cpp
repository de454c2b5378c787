// Bare loops that benchmarks/kernels.py compares with: what this processor could do at most.

#include "vec.h"

namespace ZK_NAMESPACE {

struct LimitArgs {
  int64_t updates, threads;
  float *sink;  // (threads * 64) numbers
};

// The arithmetic of one state update (a product, an exponential, a product, two multiply-adds) on registers alone.
inline int64_t scan_limit(const LimitArgs &a) {
  constexpr int64_t kItems = 64, kStates = 16;
  int64_t steps = ceil_div(a.updates, kItems * kStates * VF::W);
  parallel(a.threads, kItems, [&](int64_t item) {
    FlushSubnormals flush;
    VF h[kStates], sum = zero<VF>(), d = VF::set1(0.1f + 0.001f * float(item)), step = VF::set1(1e-6f);
    for (int n = 0; n < kStates; ++n) h[n] = VF::set1(float(n));
    float A[kStates], B[kStates], C[kStates];
    for (int n = 0; n < kStates; ++n) { A[n] = -float(n + 1); B[n] = 0.5f - 0.1f * float(n); C[n] = 0.3f * float(n); }
    for (int64_t t = 0; t < steps; ++t) {
      d = d + step;
      VF other = zero<VF>();
      for (int n = 0; n < kStates; ++n) {
        h[n] = fma(exp2_of(d * VF::set1(A[n])), h[n], d * VF::set1(B[n]));
        if (n % 2) other = fma(h[n], VF::set1(C[n]), other);
        else sum = fma(h[n], VF::set1(C[n]), sum);
      }
      sum = sum + other;
    }
    a.sink[item] = sum.sum();
  });
  return ZK_OK;
}

} // namespace ZK_NAMESPACE

ZK_EXPORT(scan_limit)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  return scan_limit(*reinterpret_cast<const LimitArgs *>(a));
}
