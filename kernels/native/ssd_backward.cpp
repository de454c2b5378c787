// The scan with one decay per head on a CPU, backward. See ssd.h.
//
// States are replayed forward and kept at the borders of chunks; then the chunks are walked from the end. With W = M * G (G the
// scores q k^T), dW = dy (w v)^T below the diagonal, S the state before the chunk and dS the gradient of the one after it:
//
//   d(w v) = W^T dy + end * k dS        dq = (dW * M) k + carry * dy S        dk = (dW * M)^T q + end * (w v) dS
//   da_t   = sum over pairs s < t <= t' of dW * W, and the same for what enters from S and leaves to dS
//
// States are [headdim][states] here: all products above like them so. dq and dk are summed over the heads of an item in order, and
// over the items by the caller: the result does not depend on threads.

#include "ssd.h"

namespace ZK_NAMESPACE {

struct SsdBackwardArgs {
  SsdArgs scan;
  Rows dy;
  const void *dfinal;  // (batch, heads, headdim, states) of the working type
  int64_t size;        // heads in an item: parts = ceil(heads per group / size)
  void *dv;            // (batch, length, heads, headdim) of v's type
  void *da, *dw;       // (batch, length, heads) of the working type, or null
  void *dk, *dq;       // (parts, batch, length, groups, states) of the working type
  void *dD;            // (batch, heads, headdim) of the working type, or null
  void *dinit;         // (batch, heads, headdim, states) of the working type
};

template <class V> struct SsdBackward : Ssd<V> {
  using Base = Ssd<V>;
  using T = typename V::T;
  using Base::W;

  struct Memory {  // one item's buffers
    T *borders, *dS, *q, *k, *kT, *kTe, *G, *dG, *dq, *dk, *M, *dM, *v, *u, *g, *gc, *vT, *duT, *rows;
    T *factor, *weight, *carry, *end, *scale, *off, *out;
  };
  static int64_t layout(Memory &m, T *base, int64_t chunks, int64_t heads, int64_t N, int64_t Np, int64_t headdim, int64_t P) {
    T *p = base;
    auto take = [&](T *&to, int64_t n) { to = p; p += ceil_div(n, 16) * 16; };
    take(m.borders, chunks * heads * headdim * Np);
    take(m.dS, heads * headdim * Np);
    take(m.q, kRows * Np); take(m.k, kRows * Np); take(m.dq, kRows * Np); take(m.dk, kRows * Np); take(m.rows, kRows * Np);
    take(m.kT, N * kRows); take(m.kTe, N * kRows);
    take(m.G, kRows * kRows); take(m.dG, kRows * kRows); take(m.M, kRows * kRows); take(m.dM, kRows * kRows);
    take(m.v, kRows * P); take(m.u, kRows * P); take(m.g, kRows * P); take(m.gc, kRows * P);
    take(m.vT, headdim * kRows); take(m.duT, headdim * kRows);
    take(m.factor, kRows); take(m.weight, kRows); take(m.carry, kRows); take(m.end, kRows); take(m.scale, kRows); take(m.off, kRows); take(m.out, kRows);
    return p - base;
  }

  static void item(const SsdBackwardArgs &f, const typename Base::Item &it, int64_t *failed) {
    const SsdArgs &a = f.scan;
    int64_t N = a.states, Np = Base::padded(N), dim = a.headdim, P = Base::padded(dim), heads = it.end - it.first;
    int64_t count = a.count(it.b), chunks = ceil_div(count, kRows);
    Memory m;
    Scratch<T> memory(layout(m, nullptr, chunks, heads, N, Np, dim, P));
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    layout(m, memory.data, chunks, heads, N, Np, dim, P);
    FlushSubnormals flush;
    Chunk chunk;
    clear(m.kT, N * kRows); clear(m.kTe, N * kRows);
    clear(m.vT, dim * kRows); clear(m.duT, dim * kRows);
    replay(a, it, m, chunk, chunks, count);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t p = 0; p < dim; ++p) {
        T *to = m.dS + (h * dim + p) * Np;
        const T *from = static_cast<const T *>(f.dfinal) + ((it.b * a.heads + it.first + h) * dim + p) * N;
        for (int64_t n = 0; n < Np; ++n) to[n] = n < N ? from[n] : T(0);
        if (f.dD) static_cast<T *>(f.dD)[(it.b * a.heads + it.first + h) * dim + p] = T(0);
      }
    for (int64_t c = chunks - 1; c >= 0; --c) {
      chunk.set(a, it.b, c * kRows, count);
      Base::gather(m.q, Np, a.q, chunk, it.b, it.g, N);
      Base::gather(m.k, Np, a.k, chunk, it.b, it.g, N);
      transpose<V>(chunk.n, N, m.k, Np, m.kT, kRows);
      Base::scores(chunk, N, m.q, Np, m.kT, kRows, m.G);
      clear(m.dq, chunk.n * Np); clear(m.dk, chunk.n * Np);
      clear(m.dG, chunk.n * kRows);
      for (int64_t h = 0; h < heads; ++h) head(f, it, m, chunk, it.first + h, m.borders + (c * heads + h) * dim * Np, m.dS + h * dim * Np);
      for (int64_t i = 0; i < chunk.segment_count; ++i) {  // dG meets k and q once for all heads
        const Segment &s = chunk.segments[i];
        for (int64_t t = s.first; t < s.end; t += kTileRows) {
          int64_t r = min_of(kTileRows, s.end - t);
          strip<V>(r, Np / W, t + r - s.first, {m.dG + t * kRows + s.first, kRows, 1}, m.k + s.first * Np, Np, m.dq + t * Np, Np, T(1), nullptr);
          strip<V>(r, Np / W, s.end - t, {m.dG + t * kRows + t, 1, kRows}, m.q + t * Np, Np, m.dk + t * Np, Np, T(1), nullptr);
        }
      }
      for (int64_t t = 0; t < chunk.n; ++t) {
        int64_t to = (((it.block * a.batch + it.b) * a.length + chunk.rows[t]) * a.groups + it.g) * N;
        memcpy(static_cast<T *>(f.dq) + to, m.dq + t * Np, size_t(N) * sizeof(T));
        memcpy(static_cast<T *>(f.dk) + to, m.dk + t * Np, size_t(N) * sizeof(T));
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t p = 0; p < dim; ++p)
        memcpy(static_cast<T *>(f.dinit) + ((it.b * a.heads + it.first + h) * dim + p) * N, m.dS + (h * dim + p) * Np, size_t(N) * sizeof(T));
  }

  static ZK_INLINE void clear(T *x, int64_t n) { memset(x, 0, size_t(n) * sizeof(T)); }

  // The states before every chunk.
  static void replay(const SsdArgs &a, const typename Base::Item &it, Memory &m, Chunk &chunk, int64_t chunks, int64_t count) {
    int64_t N = a.states, Np = Base::padded(N), dim = a.headdim, P = Base::padded(dim), heads = it.end - it.first, one = dim * Np;
    if (!chunks) return;
    clear(m.borders, heads * one);
    if (a.init)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t p = 0; p < dim; ++p)
          memcpy(m.borders + h * one + p * Np, static_cast<const T *>(a.init) + ((it.b * a.heads + it.first + h) * dim + p) * N, size_t(N) * sizeof(T));
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      chunk.set(a, it.b, c * kRows, count);
      Base::gather(m.k, Np, a.k, chunk, it.b, it.g, N);
      const Segment &last = chunk.segments[chunk.segment_count - 1];
      for (int64_t h = 0; h < heads; ++h) {
        Base::gather_scalars(m.factor, a.decay, chunk, it.b, it.first + h, T(1), true);
        Base::gather_scalars(m.weight, a.weight, chunk, it.b, it.first + h, T(1), false);
        Base::carries(chunk, m.factor, m.carry, m.end);
        Base::gather(m.v, P, a.v, chunk, it.b, it.first + h, dim);
        for (int64_t t = 0; t < chunk.n; ++t) scale_row(m.v + t * P, m.weight[t] * m.end[t], m.u + t * P, P);
        const T *S = m.borders + (c * heads + h) * one;
        T *next = m.borders + ((c + 1) * heads + h) * one;
        T total = last.from_state ? m.carry[chunk.n - 1] : T(0);
        if (total != T(0)) memcpy(next, S, size_t(one) * sizeof(T));
        product<V>(dim, Np / W, last.end - last.first, {m.u + last.first * P, 1, P}, m.k + last.first * Np, Np, next, Np, total);
      }
    }
  }

  static ZK_INLINE void scale_row(const T *from, T factor, T *to, int64_t n) {
    V x = V::set1(factor);
    for (int64_t j = 0; j < n; j += W) (V::load(from + j) * x).store(to + j);
  }

  static void head(const SsdBackwardArgs &f, const typename Base::Item &it, Memory &m, const Chunk &chunk, int64_t h, const T *S, T *dS) {
    const SsdArgs &a = f.scan;
    int64_t N = a.states, Np = Base::padded(N), dim = a.headdim, P = Base::padded(dim), n = chunk.n, nv = ceil_div(n, W);
    const Segment &first = chunk.segments[0], &last = chunk.segments[chunk.segment_count - 1];
    Base::gather_scalars(m.factor, a.decay, chunk, it.b, h, T(1), true);
    for (int64_t t = n; t < kRows; ++t) m.weight[t] = m.end[t] = T(0);
    Base::gather_scalars(m.weight, a.weight, chunk, it.b, h, T(1), false);
    Base::carries(chunk, m.factor, m.carry, m.end);
    T total = last.from_state ? m.carry[n - 1] : T(0);
    Base::gather(m.v, P, a.v, chunk, it.b, h, dim);
    Base::gather(m.g, P, f.dy, chunk, it.b, h, dim);
    transpose<V>(n, dim, m.v, P, m.vT, kRows);
    for (int64_t t = 0; t < n; ++t) m.off[t] = m.out[t] = T(0);

    // inside the chunk
    clear(m.M, n * kRows);
    for (int64_t i = 0; i < chunk.segment_count; ++i) {
      const Segment &s = chunk.segments[i];
      int64_t from = s.first / W * W;
      for (int64_t t = s.first; t < s.end; t += kTileRows) {
        int64_t r = min_of(kTileRows, s.end - t);
        strip<V>(r, ceil_div(t + r - from, W), dim, {m.g + t * P, P, 1}, m.vT + from, kRows, m.dM + t * kRows + from, kRows, T(0), nullptr);
      }
      pairs(s, m, a.strict);
    }
    for (int64_t i = 0; i < chunk.segment_count; ++i) {
      const Segment &s = chunk.segments[i];
      int64_t from = chunk.segment_count == 1 ? 0 : s.first / W * W;
      if (i == 0 && chunk.segment_count > 1) clear(m.duT, dim * kRows);
      product<V>(dim, ceil_div(s.end - from, W), s.end - s.first, {m.g + s.first * P, 1, P}, m.M + s.first * kRows + from, kRows, m.duT + from, kRows,
                 chunk.segment_count == 1 ? T(0) : T(1));
    }
    // to the state after the chunk
    for (int64_t x = 0; x < N; ++x)
      for (int64_t j = 0; j < nv * W; j += W) (V::load(m.kT + x * kRows + j) * V::load(m.end + j)).store(m.kTe + x * kRows + j);
    product<V>(dim, nv, N, {dS, Np, 1}, m.kTe, kRows, m.duT, kRows, T(1));
    for (int64_t t = 0; t < n; ++t) m.scale[t] = m.end[t] * m.weight[t];
    product<V>(last.end - last.first, Np / W, dim, {m.v + last.first * P, P, 1}, dS, Np, m.rows + last.first * Np, Np, T(0), m.scale + last.first);
    for (int64_t t = last.first; t < last.end; ++t) m.out[t] = add_and_dot(m.rows + t * Np, m.k + t * Np, m.dk + t * Np, Np);
    // from the state before it
    if (first.from_state) {
      product<V>(first.end, Np / W, dim, {m.g, P, 1}, S, Np, m.rows, Np, T(0), m.carry);
      for (int64_t t = 0; t < first.end; ++t) m.off[t] = add_and_dot(m.rows + t * Np, m.q + t * Np, m.dq + t * Np, Np);
    }
    T whole = total != T(0) ? total * dot<V>(dim * Np / W, S, dS) : T(0);
    if (f.da) decays(f, it, m, chunk, h, whole);
    outputs(f, it, m, chunk, h);
    // the state's own gradient
    for (int64_t t = 0; t < n; ++t) scale_row(m.g + t * P, m.carry[t], m.gc + t * P, P);
    if (first.from_state) product<V>(dim, Np / W, first.end, {m.gc, 1, P}, m.q, Np, dS, Np, total);
    else clear(dS, dim * Np);
  }

  static ZK_INLINE T add_and_dot(const T *x, const T *with, T *to, int64_t n) {
    V s = zero<V>();
    for (int64_t j = 0; j < n; j += W) {
      V v = V::load(x + j);
      (V::load(to + j) + v).store(to + j);
      s = fma(v, V::load(with + j), s);
    }
    return s.sum();
  }

  // dM holds dy v^T: from it dG; then it becomes dW * W for the pairs s < t. M becomes the weights W.
  static void pairs(const Segment &s, Memory &m, int64_t strict) {
    T decay[kRows];
    int64_t from = s.first / W * W;
    for (int64_t j = from; j < kRows; ++j) decay[j] = T(0);
    for (int64_t t = s.first; t < s.end; ++t) {
      V x = V::set1(m.factor[t]);
      const T *G = m.G + t * kRows;
      T *M = m.M + t * kRows, *dG = m.dG + t * kRows, *dM = m.dM + t * kRows;
      T own = dM[t];
      for (int64_t j = from; j < t; j += W) {  // the pairs before t; decay[t] is still 0
        V d = V::load(decay + j) * x;
        d.store(decay + j);
        V weight = d * V::load(G + j), change = d * V::load(dM + j) * V::load(m.weight + j);
        V both = change * V::load(G + j);
        weight.store(M + j);
        (V::load(dG + j) + change).store(dG + j);
        both.store(dM + j);
      }
      decay[t] = T(1);
      if (!strict) {
        M[t] = G[t];
        dG[t] += own * m.weight[t];
      }
    }
  }

  static void decays(const SsdBackwardArgs &f, const typename Base::Item &it, const Memory &m, const Chunk &chunk, int64_t h, T whole) {
    const SsdArgs &a = f.scan;
    T *da = static_cast<T *>(f.da);
    for (int64_t i = 0; i < chunk.segment_count; ++i) {
      const Segment &s = chunk.segments[i];
      T before = T(0), tail = T(0), result[kRows], below[kRows];
      int64_t from = s.first / W * W;
      for (int64_t j = from; j < kRows; ++j) below[j] = T(0);
      for (int64_t t = s.first; t < s.end; ++t) {
        result[t] = (s.to_end ? before : T(0)) + (s.from_state && s.to_end ? whole : T(0));
        before += m.out[t];
      }
      for (int64_t t = s.end - 1; t >= s.first; --t) {
        // All pairs across t, added up as they are: differences of sums would lose what strong decays leave.
        V sum = zero<V>();
        for (int64_t j = from; j < t; j += W) {
          int lanes = int(min_of(W, t - j));
          V v = V::load(below + j) + V::load_n(m.dM + t * kRows + j, lanes);
          v.store(below + j);
          sum = sum + V::load_n(below + j, lanes);
        }
        tail += m.off[t];
        // at a reset the decay multiplies nothing
        da[(it.b * a.length + chunk.rows[t]) * a.heads + h] = t == s.first && !s.from_state ? T(0) : result[t] + tail + sum.sum();
      }
    }
  }

  static void outputs(const SsdBackwardArgs &f, const typename Base::Item &it, Memory &m, const Chunk &chunk, int64_t h) {
    const SsdArgs &a = f.scan;
    int64_t dim = a.headdim, P = Base::padded(dim), n = chunk.n, nv = ceil_div(n, W);
    T *sums = m.scale;
    for (int64_t j = 0; j < nv; ++j) {
      V w = V::load(m.weight + j * W), sum = zero<V>();
      for (int64_t p = 0; p < dim; ++p) {
        V d = V::load(m.duT + p * kRows + j * W);
        sum = fma(d, V::load(m.vT + p * kRows + j * W), sum);
        (d * w).store(m.duT + p * kRows + j * W);
      }
      sum.store(sums + j * W);
    }
    transpose<V>(dim, n, m.duT, kRows, m.u, P);
    const T *D = a.D ? static_cast<const T *>(a.D) + h * dim : nullptr;
    T *dD = f.dD ? static_cast<T *>(f.dD) + (it.b * a.heads + h) * dim : nullptr;
    for (int64_t t = 0; t < n; ++t) {
      if (f.dw) static_cast<T *>(f.dw)[(it.b * a.length + chunk.rows[t]) * a.heads + h] = sums[t];
      char *to = at(f.dv, ((it.b * a.length + chunk.rows[t]) * a.heads + h) * dim, a.v.dtype);
      for (int64_t j = 0; j < dim; j += W) {
        int lanes = int(min_of(W, dim - j));
        V d = V::load(m.u + t * P + j), g = V::load(m.g + t * P + j);
        if (D) d = fma(g, V::load_n(D + j, lanes), d);
        if (dD) fma(g, V::load(m.v + t * P + j), V::load_n(dD + j, lanes)).store_n(dD + j, lanes);
        store_as(d, at(to, j, a.v.dtype), a.v.dtype, lanes);
      }
    }
  }

  static int64_t run(const SsdBackwardArgs &f) {
    const SsdArgs &a = f.scan;
    if (!a.batch || !a.heads) return ZK_OK;
    typename Base::Blocks blocks(a, f.size);
    int64_t failed = ZK_OK;
    parallel(a.threads, blocks.total(a), [&](int64_t i) { item(f, typename Base::Item(a, blocks, i), &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(ssd_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const SsdBackwardArgs &f = *reinterpret_cast<const SsdBackwardArgs *>(a);
  return f.scan.dual ? SsdBackward<VD>::run(f) : SsdBackward<VF>::run(f);
}
