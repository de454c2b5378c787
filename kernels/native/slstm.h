// What the forward and the backward walk of the sLSTM share. One work item is a head and up to kBlock sequences of the batch, so
// that the recurrent weights are read once a step for all of them; gates of one sequence lie as [4][padded headdim].
#pragma once

#include "gemm.h"

namespace ZK_NAMESPACE {

constexpr int64_t kBlock = 6;  // sequences in an item; gradients of the weights are summed in this order

struct LstmArgs {
  int64_t batch, length, steps, heads, headdim, threads, dual;  // dual: double precision
  const void *gates;     // (batch, length, 4, heads, headdim), contiguous
  int64_t gates_dtype;
  const void *recurrent;  // (heads, headdim, 4, headdim) of the working type
  const void *bias;       // (heads, 4, headdim) of the working type, or null
  const void *init;       // (4, batch, heads, headdim) of the working type, or null
  const int64_t *order;   // rows in visiting order, or null; -1 from some step on: the walk ends there
  int64_t order_b;
  const uint8_t *resets;  // (batch, length) or null

  int64_t count(int64_t b) const {
    if (!order) return steps;
    int64_t n = steps;
    while (n > 0 && order[b * order_b + n - 1] < 0) --n;
    return n;
  }
  int64_t row(int64_t b, int64_t t) const { return order ? order[b * order_b + t] : t; }
  bool drop(int64_t b, int64_t t) const { return resets && resets[b * length + row(b, t)]; }
};

template <class V> struct Lstm {
  using T = typename V::T;
  static constexpr int64_t W = V::W;
  static int64_t padded(int64_t n) { return ceil_div(n, W) * W; }

  struct Gates { V i, f, z, o; };
  // i and f from the gates before activation and the stabilisers around the step.
  static ZK_INLINE V log_sigmoid(V x) { return zero<V>() - softplus(zero<V>() - x); }
  static ZK_INLINE V tanh_of(V x) {
    V one = V::set1(1), e = exp_of(vabs(x) * V::set1(-2)), t = (one - e) / (one + e);
    return where_gt(zero<V>(), x, zero<V>() - t, t);
  }
  static ZK_INLINE V is_zero(V n, V yes, V no) { return where_gt(vabs(n), zero<V>(), no, yes); }

  // W[i][4][padded]: rows of one head's recurrent weights, padded with zeros.
  static void pack(const LstmArgs &a, int64_t h, T *to) {
    int64_t D = a.headdim, P = padded(D);
    const T *from = static_cast<const T *>(a.recurrent) + h * D * 4 * D;
    for (int64_t i = 0; i < D; ++i)
      for (int64_t g = 0; g < 4; ++g)
        for (int64_t j = 0; j < P; ++j) to[(i * 4 + g) * P + j] = j < D ? from[(i * 4 + g) * D + j] : T(0);
  }
};

} // namespace ZK_NAMESPACE
