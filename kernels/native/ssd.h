// What the forward and the backward of the scan with one decay per head share (zoo_kernels.ops.ssd.core):
//
//   h_t = exp(a_t) h_{t-1} + w_t v_t k_t^T,   y_t = h_t q_t + D v_t
//
// in chunks of kRows steps. With M[t][s] = exp(a_{s+1} + .. + a_t) and S the state before the chunk,
//
//   y_t = exp(a_1 + .. + a_t) S q_t + sum over s <= t of M[t][s] (q_t . k_s) w_s v_s + D v_t
//
// so that nearly all work is in products of small matrices. M is built row by row as a product of the decays themselves: one
// exponential for each step and head, no differences of running sums, nothing that could overflow. A reset starts a new
// segment; segments do not meet in any product, so that NaN in one does not reach the next.
#pragma once

#include "gemm.h"

namespace ZK_NAMESPACE {

constexpr int64_t kRows = 64;

struct Rows {  // (batch, length, heads or groups, width), the last axis contiguous; or (batch, length, heads)
  const void *p;
  int64_t dtype, b, l, h;
  const char *row(int64_t ib, int64_t il, int64_t ih) const { return at(p, ib * b + il * l + ih * h, dtype); }
};

// How many steps sequence b walks.
ZK_INLINE int64_t walked(const int64_t *order, int64_t order_b, int64_t steps, int64_t b) {
  int64_t n = steps;
  while (order && n > 0 && order[b * order_b + n - 1] < 0) --n;
  return n;
}

struct SsdArgs {
  int64_t batch, length, steps, heads, groups, headdim, states, strict, threads, dual;  // dual: double precision
  Rows v, k, q;
  Rows decay, weight;    // of the working type; p null where absent
  const void *D;         // (heads, headdim) of the working type, or null
  const int64_t *order;  // rows in visiting order, or null; -1 from some step on: the walk ends there
  int64_t order_b;
  const uint8_t *resets;  // (batch, length) or null
  const void *init;       // (batch, heads, headdim, states) of the working type, or null

  int64_t count(int64_t b) const { return walked(order, order_b, steps, b); }
};

struct Segment { int64_t first, end; bool from_state, to_end; };

// The rows that a chunk visits, cut at resets.
struct Chunk {
  int64_t n;
  int64_t rows[kRows];
  Segment segments[kRows];
  int64_t segment_count;

  void set(const SsdArgs &a, int64_t b, int64_t start, int64_t count) {
    n = min_of(kRows, count - start);
    segment_count = 0;
    bool carries = true;
    int64_t first = 0;
    for (int64_t t = 0; t < n; ++t) {
      rows[t] = a.order ? a.order[b * a.order_b + start + t] : start + t;
      if (a.resets && a.resets[b * a.length + rows[t]]) {
        if (t) segments[segment_count++] = {first, t, carries, false};
        first = t;
        carries = false;
      }
    }
    segments[segment_count++] = {first, n, carries, true};
  }
};

template <class V> struct Ssd {
  using T = typename V::T;
  static constexpr int64_t W = V::W;
  static int64_t padded(int64_t n) { return ceil_div(n, W) * W; }

  // Rows of x in the working type, padded with zeros.
  static void gather(T *out, int64_t ld, const Rows &x, const Chunk &c, int64_t b, int64_t h, int64_t width) {
    for (int64_t t = 0; t < c.n; ++t) {
      const char *row = x.row(b, c.rows[t], h);
      for (int64_t j = 0; j < ld; j += W) {
        int lanes = int(width - j < W ? (width > j ? width - j : 0) : W);
        (lanes ? load_as<V>(at(static_cast<const void *>(row), j, x.dtype), x.dtype, lanes) : zero<V>()).store(out + t * ld + j);
      }
    }
  }
  // One number for each step: decays as factors exp(a_t); `fallback` where the argument is absent.
  static void gather_scalars(T *out, const Rows &x, const Chunk &c, int64_t b, int64_t h, T fallback, bool exponential) {
    for (int64_t t = 0; t < c.n; ++t) out[t] = x.p ? *reinterpret_cast<const T *>(x.row(b, c.rows[t], h)) : fallback;
    if (!exponential || !x.p) return;
    for (int64_t t = 0; t < c.n; t += W) {
      int n = int(min_of(W, c.n - t));
      exp_of(V::load_n(out + t, n)).store_n(out + t, n);
    }
  }
  // carry[t]: decay from the chunk's start to t; end[t]: decay from t to the chunk's end. Zero across resets.
  static void carries(const Chunk &c, const T *factor, T *carry, T *end) {
    const Segment &first = c.segments[0], &last = c.segments[c.segment_count - 1];
    for (int64_t t = 0; t < c.n; ++t) carry[t] = end[t] = T(0);
    T product = T(1);
    if (first.from_state) for (int64_t t = 0; t < first.end; ++t) carry[t] = product *= factor[t];
    product = T(1);
    for (int64_t t = c.n - 1; t >= last.first; --t) { end[t] = product; product *= factor[t]; }
  }
  // How the heads of a group are shared out: `blocks` items for each (batch, group).
  struct Blocks {
    int64_t repeat, size, per_group;
    Blocks(const SsdArgs &a, int64_t size) : repeat(a.heads / a.groups), size(size), per_group(ceil_div(repeat, size)) {}
    int64_t total(const SsdArgs &a) const { return a.batch * a.groups * per_group; }
  };
  struct Item {
    int64_t b, g, block, first, end;
    Item(const SsdArgs &a, const Blocks &blocks, int64_t i) {
      block = i % blocks.per_group;
      g = i / blocks.per_group % a.groups;
      b = i / (blocks.per_group * a.groups);
      first = g * blocks.repeat + block * blocks.size;
      end = min_of(first + blocks.size, (g + 1) * blocks.repeat);
    }
  };
  // G[t][s] = q_t . k_s for s <= t (whole vectors of s), inside each segment.
  static void scores(const Chunk &c, int64_t states, const T *q, int64_t ldq, const T *kT, int64_t ldk, T *G) {
    for (int64_t i = 0; i < c.segment_count; ++i) {
      int64_t first = c.segments[i].first / W * W;
      for (int64_t t = c.segments[i].first; t < c.segments[i].end; t += kTileRows) {
        int64_t m = min_of(kTileRows, c.segments[i].end - t);
        Left<T> A{q + t * ldq, ldq, 1};
        strip<V>(m, ceil_div(t + m - first, W), states, A, kT + first, ldk, G + t * kRows + first, kRows, T(0), nullptr);
      }
    }
  }
};

} // namespace ZK_NAMESPACE
