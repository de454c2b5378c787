// The scan with one decay per head on a CPU, forward. See ssd.h.

#include "ssd.h"

namespace ZK_NAMESPACE {

struct SsdForwardArgs {
  SsdArgs scan;
  void *y;  // (batch, length, heads, headdim), contiguous
  int64_t y_dtype;
  void *final_state;  // (batch, heads, headdim, states) of the working type
};

template <class V> struct SsdForward : Ssd<V> {
  using Base = Ssd<V>;
  using T = typename V::T;
  using Base::W;

  static void item(const SsdForwardArgs &f, const typename Base::Item &it, int64_t *failed) {
    const SsdArgs &a = f.scan;
    int64_t N = a.states, P = Base::padded(a.headdim), Np = Base::padded(N), heads = it.end - it.first, count = a.count(it.b);
    Scratch<T> memory(heads * N * P + 2 * kRows * Np + N * kRows + 2 * kRows * kRows + 3 * kRows * P + 4 * kRows);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *S = memory.data, *q = S + heads * N * P, *k = q + kRows * Np, *kT = k + kRows * Np, *G = kT + N * kRows;
    T *M = G + kRows * kRows, *u = M + kRows * kRows, *ue = u + kRows * P, *y = ue + kRows * P;
    T *factor = y + kRows * P, *weight = factor + kRows, *carry = weight + kRows, *end = carry + kRows;
    FlushSubnormals flush;
    for (int64_t h = 0; h < heads; ++h) {  // the state as [states][headdim]: both products that it enters like it so
      T *to = S + h * N * P;
      for (int64_t i = 0; i < N * P; ++i) to[i] = T(0);
      if (a.init) transpose<V>(a.headdim, N, static_cast<const T *>(a.init) + (it.b * a.heads + it.first + h) * a.headdim * N, N, to, P);
    }
    for (int64_t i = 0; i < N * kRows; ++i) kT[i] = T(0);
    Chunk chunk, next;
    next.n = 0;
    if (count) next.set(a, it.b, 0, count);
    for (int64_t start = 0; start < count; start += kRows) {
      chunk = next;
      next.n = 0;
      if (start + kRows < count) next.set(a, it.b, start + kRows, count);
      Base::gather(q, Np, a.q, chunk, it.b, it.g, N);
      Base::gather(k, Np, a.k, chunk, it.b, it.g, N);
      transpose<V>(chunk.n, N, k, Np, kT, kRows);
      Base::scores(chunk, N, q, Np, kT, kRows, G);
      for (int64_t h = 0; h < heads; ++h) {
        Base::gather_scalars(factor, a.decay, chunk, it.b, it.first + h, T(1), true);
        Base::gather_scalars(weight, a.weight, chunk, it.b, it.first + h, T(1), false);
        Base::carries(chunk, factor, carry, end);
        inputs(f, chunk, it.b, it.first + h, P, weight, end, u, ue, y);
        ahead(f, next, it.b, it.first + h);
        step(a, chunk, N, P, Np, q, k, G, M, factor, carry, u, ue, y, S + h * N * P);
        for (int64_t t = 0; t < chunk.n; ++t) {
          char *to = at(f.y, ((it.b * a.length + chunk.rows[t]) * a.heads + it.first + h) * a.headdim, f.y_dtype);
          for (int64_t j = 0; j < a.headdim; j += W) store_as(V::load(y + t * P + j), at(to, j, f.y_dtype), f.y_dtype, int(min_of(W, a.headdim - j)));
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      transpose<V>(N, a.headdim, S + h * N * P, P, static_cast<T *>(f.final_state) + (it.b * a.heads + it.first + h) * a.headdim * N, N);
  }

  // The rows that this head reads and writes in the next chunk are on their way while the products of this one are taken:
  // along a path no processor foresees them.
  static void ahead(const SsdForwardArgs &f, const Chunk &next, int64_t b, int64_t h) {
    const SsdArgs &a = f.scan;
    for (int64_t t = 0; t < next.n; ++t) {
      const char *from = a.v.row(b, next.rows[t], h);
      const char *to = at(static_cast<const void *>(f.y), ((b * a.length + next.rows[t]) * a.heads + h) * a.headdim, f.y_dtype);
      for (int64_t i = 0; i < a.headdim * size_of(a.v.dtype); i += 64) ZK_PREFETCH_L2(from + i);
      for (int64_t i = 0; i < a.headdim * size_of(f.y_dtype); i += 64) ZK_PREFETCH_L2(to + i);
    }
  }

  // u = w v, ue = u decayed to the chunk's end, y = D v.
  static void inputs(const SsdForwardArgs &f, const Chunk &chunk, int64_t b, int64_t h, int64_t P, const T *weight, const T *end, T *u, T *ue, T *y) {
    const SsdArgs &a = f.scan;
    const T *D = a.D ? static_cast<const T *>(a.D) + h * a.headdim : nullptr;
    for (int64_t t = 0; t < chunk.n; ++t) {
      const void *row = a.v.row(b, chunk.rows[t], h);
      V w = V::set1(weight[t]), e = V::set1(end[t]);
      for (int64_t j = 0; j < P; j += W) {
        int lanes = int(min_of(W, a.headdim - j));
        V x = load_as<V>(at(row, j, a.v.dtype), a.v.dtype, lanes), s = x * w;
        s.store(u + t * P + j);
        (s * e).store(ue + t * P + j);
        (D ? x * V::load_n(D + j, lanes) : zero<V>()).store(y + t * P + j);
      }
    }
  }

  // One chunk of one head: adds to y, advances S.
  static void step(const SsdArgs &a, const Chunk &chunk, int64_t N, int64_t P, int64_t Np, const T *q, const T *k, const T *G, T *M,
                   const T *factor, const T *carry, const T *u, const T *ue, T *y, T *S) {
    int64_t vectors = P / W;
    for (int64_t i = 0; i < chunk.segment_count; ++i) {
      const Segment &s = chunk.segments[i];
      if (s.from_state) product<V>(s.end, vectors, N, {q, Np, 1}, S, P, y, P, T(1), carry);
      weights(s, G, M, factor, a.strict);
      for (int64_t t = s.first; t < s.end; t += kTileRows) {  // rows t .. against sources before t, then among themselves
        int64_t m = min_of(kTileRows, s.end - t);
        if (t > s.first) strip<V>(m, vectors, t - s.first, {M + t * kRows + s.first, kRows, 1}, u + s.first * P, P, y + t * P, P, T(1), nullptr);
        for (int64_t r = t; r < t + m; ++r)
          strip<V>(1, vectors, r - t + (a.strict ? 0 : 1), {M + r * kRows + t, kRows, 1}, u + t * P, P, y + r * P, P, T(1), nullptr);
      }
    }
    const Segment &last = chunk.segments[chunk.segment_count - 1];
    // the last factor times carry: the decay over the whole chunk, 0 after a reset (then the old state is not read at all)
    T total = last.from_state ? carry[chunk.n - 1] : T(0);
    product<V>(N, vectors, last.end - last.first, {k + last.first * Np, 1, Np}, ue + last.first * P, P, S, P, total);
  }

  // M[t][s] = G[t][s] times the decay from s to t, for s <= t.
  static void weights(const Segment &s, const T *G, T *M, const T *factor, int64_t strict) {
    T decay[kRows];
    int64_t first = s.first / W * W;
    for (int64_t j = first; j < kRows; ++j) decay[j] = T(0);
    for (int64_t t = s.first; t < s.end; ++t) {
      V x = V::set1(factor[t]);
      for (int64_t j = first; j < t; j += W) (V::load(decay + j) * x).store(decay + j);
      decay[t] = T(1);
      for (int64_t j = first; j <= t; j += W) (V::load(decay + j) * V::load(G + t * kRows + j)).store(M + t * kRows + j);
    }
    (void)strict;  // the diagonal is left out where the products are taken
  }

  static int64_t run(const SsdForwardArgs &f) {
    const SsdArgs &a = f.scan;
    if (!a.batch || !a.heads) return ZK_OK;
    int64_t size = a.heads / a.groups;  // heads of one group share q, k and their scores; results do not depend on it
    while (size > 1 && typename Base::Blocks(a, size).total(a) < a.threads) size = (size + 1) / 2;
    typename Base::Blocks blocks(a, size);
    int64_t failed = ZK_OK;
    parallel(a.threads, blocks.total(a), [&](int64_t i) { item(f, typename Base::Item(a, blocks, i), &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(ssd_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const SsdForwardArgs &f = *reinterpret_cast<const SsdForwardArgs *>(a);
  return f.scan.dual ? SsdForward<VD>::run(f) : SsdForward<VF>::run(f);
}
