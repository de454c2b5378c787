// What the forward and the backward of linear attention with one decay per key channel share
// (zoo_kernels.ops.linear_attention):
//
//   S_t = S_{t-1} diag(exp(a_t)) + v_t k_t^T,   y_t = S_t q_t   (strict: y_t reads S_{t-1} diag(exp(a_t)))
//
// with S (headdim, states). A plain recurrence: tiles of the state stay in registers over a chunk of steps, so that each
// number of it costs two multiplications and additions a step (three with what is read) and nothing else. The chunked form in
// matrix products would save a third of them at best and must guard against decays whose quotients overflow; here no
// decay, however strong, is ever divided by.
#pragma once

#include "ssd.h"

namespace ZK_NAMESPACE {

struct GatedArgs {
  int64_t batch, length, steps, heads, headdim, states, strict, threads, dual;  // dual: double precision
  Rows v, decay, k, q;
  const int64_t *order;  // rows in visiting order, or null; -1 from some step on: the walk ends there
  int64_t order_b;
  const uint8_t *resets;  // (batch, length) or null
  const void *init;       // (batch, heads, headdim, states) of the working type, or null

  int64_t count(int64_t b) const { return walked(order, order_b, steps, b); }
};

// The rows that a chunk of at most kMost steps visits, and at which of them the old state is dropped.
template <int64_t kMost> struct GatedChunk {
  int64_t n;
  int64_t rows[kMost];
  uint8_t drop[kMost];

  GatedChunk(const GatedArgs &a, int64_t b, int64_t start, int64_t count) : n(min_of(kMost, count - start)) {
    for (int64_t t = 0; t < n; ++t) {
      rows[t] = a.order ? a.order[b * a.order_b + start + t] : start + t;
      drop[t] = a.resets ? a.resets[b * a.length + rows[t]] : 0;
    }
  }
  // Rows of x from `first` on, `width` of them, in the working type, padded with zeros to `ld` numbers a row.
  template <class V> void gather(typename V::T *out, int64_t ld, const Rows &x, int64_t b, int64_t h, int64_t first, int64_t width) const {
    for (int64_t t = 0; t < n; ++t) {
      const void *row = x.row(b, rows[t], h);
      for (int64_t j = 0; j < ld; j += V::W) {
        int lanes = int(width - j < V::W ? (width > j ? width - j : 0) : V::W);
        (lanes ? load_as<V>(at(row, first + j, x.dtype), x.dtype, lanes) : zero<V>()).store(out + t * ld + j);
      }
    }
  }
  template <class V> void exponentials(typename V::T *x, int64_t ld) const {
    for (int64_t i = 0; i < n * ld; i += V::W) exp_of(V::load(x + i)).store(x + i);
  }
};

} // namespace ZK_NAMESPACE
