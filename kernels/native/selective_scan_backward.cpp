// The selective scan on a CPU, backward. See selective_scan.h.
//
// From the last chunk to the first: the states of the chunk are replayed from its stored border, kept with their decays in
// scratch, and walked backwards. Sums over channels (dB, dC) collect in vectors over the whole block of channels, then
// across lanes, then across blocks; sums over the batch (dA, dD, dbias) across sequences: always in the same order, so that
// results do not depend on the threads.

#include "selective_scan.h"

namespace ZK_NAMESPACE {

struct BackwardArgs {
  ScanArgs scan;
  const void *borders;  // (batch, paths, chunks, states, channels)
  Strided dy;
  const void *dfinal;  // (batch, paths, states, channels) or null
  // All of the working type, contiguous.
  void *du;      // (batch, length, paths or 1, channels)
  int64_t du_paths;
  void *ddt;     // (batch, length, paths, channels)
  void *dB, *dC;  // (batch, length, paths, groups, states)
  void *dA;      // (paths, states, channels)
  void *dD, *dbias;  // (paths, channels), or null
  void *dz;      // (batch, length, channels), or null
  void *dinit;   // (batch, paths, states, channels), or null
};

template <class V> struct Backward {
  using T = typename V::T;
  static constexpr int W = V::W;
#if defined(ZK_AVX512) || defined(ZK_NEON)
  static constexpr int kMost = sizeof(T) == 4 ? 8 : 2;
#else
  static constexpr int kMost = sizeof(T) == 4 ? 4 : 2;
#endif
  static constexpr T kLn2 = T(0.6931471805599453);

  struct Tile {  // one chunk of one vector of channels; [kChunk][W] each
    T *d, *x, *dx, *slope, *dy, *y, *ddx, *dd;
    T *before, *decay;  // [kChunk][kMost][W]: the state before each step, and what it decays by
  };

  // Replay NB states over the chunk; y collects the output before the gate where the gate's gradient needs it.
  template <int NB>
  static ZK_INLINE void replay(const Tile &w, const T *ZK_RESTRICT A, const T *ZK_RESTRICT B, const T *ZK_RESTRICT C, int64_t states,
                               const uint8_t *drop, int64_t steps, T *ZK_RESTRICT state, bool output) {
    V h[NB];
    ZK_UNROLL
    for (int n = 0; n < NB; ++n) h[n] = V::load(state + n * W);
    for (int64_t t = 0; t < steps; ++t, B += states, C += states) {
      if (drop && drop[t]) {
        ZK_UNROLL
        for (int n = 0; n < NB; ++n) h[n] = zero<V>();
      }
      V dv = V::load(w.d + t * W), xv = V::load(w.dx + t * W);
      T *ZK_RESTRICT before = w.before + t * NB * W, *ZK_RESTRICT decay = w.decay + t * NB * W;
      ZK_UNROLL
      for (int n = 0; n < NB; ++n) {
        h[n].store(before + n * W);
        V e = exp2_of(dv * V::load(A + n * W));
        e.store(decay + n * W);
        h[n] = fma(e, h[n], xv * V::set1(B[n]));
      }
      if (output) {
        V sum = V::load(w.y + t * W);
        ZK_UNROLL
        for (int n = 0; n < NB; ++n) sum = fma(h[n], V::set1(C[n]), sum);
        sum.store(w.y + t * W);
      }
    }
    ZK_UNROLL
    for (int n = 0; n < NB; ++n) h[n].store(state + n * W);  // the state after the chunk
  }

  // Walk NB states backwards. g: the gradient of the state after the chunk, on return of the one before it.
  template <int NB>
  static ZK_INLINE void back(const Tile &w, const T *ZK_RESTRICT A, const T *ZK_RESTRICT B, const T *ZK_RESTRICT C, int64_t states,
                             const uint8_t *drop, int64_t steps, const T *ZK_RESTRICT after, T *ZK_RESTRICT gradient,
                             T *ZK_RESTRICT dA, T *ZK_RESTRICT sumB, T *ZK_RESTRICT sumC) {
    V g[NB], a[NB], h[NB];
    ZK_UNROLL
    for (int n = 0; n < NB; ++n) {
      g[n] = V::load(gradient + n * W);
      a[n] = zero<V>();
      h[n] = V::load(after + n * W);
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
      V dv = V::load(w.d + t * W), xv = V::load(w.dx + t * W), dy = V::load(w.dy + t * W);
      V ddx = V::load(w.ddx + t * W), dd = V::load(w.dd + t * W);
      const T *ZK_RESTRICT before = w.before + t * NB * W, *ZK_RESTRICT decay = w.decay + t * NB * W;
      T *ZK_RESTRICT toB = sumB + t * states * W, *ZK_RESTRICT toC = sumC + t * states * W;
      bool dropped = drop && drop[t];
      ZK_UNROLL
      for (int n = 0; n < NB; ++n) {
        fma(dy, h[n], V::load(toC + n * W)).store(toC + n * W);
        V gn = fma(dy, V::set1(C[t * states + n]), g[n]);
        fma(gn, xv, V::load(toB + n * W)).store(toB + n * W);
        ddx = fma(gn, V::set1(B[t * states + n]), ddx);
        V carried = gn * V::load(decay + n * W);
        h[n] = V::load(before + n * W);
        V inner = carried * h[n];  // of the exponent
        a[n] = fma(inner, dv, a[n]);
        dd = fma(inner, V::load(A + n * W), dd);
        g[n] = carried;
      }
      if (dropped) {
        ZK_UNROLL
        for (int n = 0; n < NB; ++n) g[n] = zero<V>();
      }
      // The state after the step before a reset is not the (zero) state that the step started from.
      if (dropped && t > 0) restore<NB>(w, t, B, states, h);
      ddx.store(w.ddx + t * W);
      dd.store(w.dd + t * W);
    }
    ZK_UNROLL
    for (int n = 0; n < NB; ++n) {
      g[n].store(gradient + n * W);
      (V::load(dA + n * W) + a[n]).store(dA + n * W);
    }
  }
  template <int NB> static ZK_INLINE void restore(const Tile &w, int64_t t, const T *B, int64_t states, V *h) {
    const T *before = w.before + (t - 1) * NB * W, *decay = w.decay + (t - 1) * NB * W;
    ZK_UNROLL
    for (int n = 0; n < NB; ++n)
      h[n] = fma(V::load(decay + n * W), V::load(before + n * W), V::load(w.dx + (t - 1) * W) * V::set1(B[(t - 1) * states + n]));
  }

  struct Parts {  // partial sums, reduced after the walk
    T *dB, *dC;    // [blocks of a group][batch][length][paths][groups][states]
    T *dA, *dD, *dbias;  // [batch][...]
  };

  static void item(const BackwardArgs &f, const ChannelBlocks &blocks, const Parts &parts, int64_t b, int64_t i, int64_t *failed) {
    const ScanArgs &a = f.scan;
    int64_t N = a.states, first = blocks.first(i), end = blocks.end(i), group = blocks.group(i);
    int64_t vectors = ceil_div(end - first, W), count = a.count(b);
    Scratch<T> memory(vectors * N * W * 3 + N * W + vectors * W * 2 + 2 * kChunk * N + 8 * kChunk * W + 2 * kChunk * kMost * W + 2 * kChunk * N * W);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *next = memory.data;
    auto take = [&](int64_t n) { T *p = next; next += n; return p; };
    T *g = take(vectors * N * W), *A = take(vectors * N * W), *dA = take(vectors * N * W), *h = take(N * W);
    T *dD = take(vectors * W), *dbias = take(vectors * W);
    Tile w;
    w.d = take(kChunk * W), w.x = take(kChunk * W), w.dx = take(kChunk * W), w.slope = take(kChunk * W);
    w.dy = take(kChunk * W), w.y = take(kChunk * W), w.ddx = take(kChunk * W), w.dd = take(kChunk * W);
    w.before = take(kChunk * kMost * W), w.decay = take(kChunk * kMost * W);
    T *sumB = take(kChunk * N * W), *sumC = take(kChunk * N * W), *B = take(kChunk * N), *C = take(kChunk * N);
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    bool plain = a.u.dtype == own && a.dt.dtype == own && f.dy.dtype == own && (!a.z.p || a.z.dtype == own);
    FlushSubnormals flush;
    Chunk<T> chunk;
    for (int64_t k = 0; k < a.paths; ++k) {
      int64_t state0 = (b * a.paths + k) * N * a.channels;
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t c = first + v * W;
        int lanes = int(min_of(W, end - c));
        load_A<V>(a, k, c, lanes, A + v * N * W);
        for (int64_t n = 0; n < N; ++n) {
          V start = f.dfinal ? V::load_n(static_cast<const T *>(f.dfinal) + state0 + n * a.channels + c, lanes) : zero<V>();
          start.store(g + (v * N + n) * W);
          zero<V>().store(dA + (v * N + n) * W);
        }
        zero<V>().store(dD + v * W);
        zero<V>().store(dbias + v * W);
      }
      for (int64_t j = ceil_div(count, kChunk) - 1; j >= 0; --j) {
        chunk.set(a, b, k, j, count);
        gather_states<V>(B, a.B, chunk.rows, chunk.steps, b, k, group, N);
        gather_states<V>(C, a.C, chunk.rows, chunk.steps, b, k, group, N);
        memset(sumB, 0, size_t(kChunk * N * W) * sizeof(T));
        memset(sumC, 0, size_t(kChunk * N * W) * sizeof(T));
        for (int64_t v = 0; v < vectors; ++v) {
          int64_t c = first + v * W;
          int lanes = int(min_of(W, end - c));
          T *Av = A + v * N * W, *gv = g + v * N * W;
          const T *border = static_cast<const T *>(f.borders) + ((b * a.paths + k) * a.chunks() + j) * N * a.channels + c;
          for (int64_t n = 0; n < N; ++n) V::load_n(border + n * a.channels, lanes).store(h + n * W);
          bool full = plain && lanes == W;
          full ? prologue<true>(f, chunk, b, k, c, lanes, w) : prologue<false>(f, chunk, b, k, c, lanes, w);
          each_block<kMost>(N, [&](auto block, int64_t n) {
            constexpr int NB = decltype(block)::value;
            replay<NB>(w, Av + n * W, B + n, C + n, N, chunk.drop, chunk.steps, h + n * W, f.dz != nullptr);
            back<NB>(w, Av + n * W, B + n, C + n, N, chunk.drop, chunk.steps, h + n * W, gv + n * W, dA + (v * N + n) * W, sumB + n * W, sumC + n * W);
          });
          full ? epilogue<true>(f, chunk, b, k, c, lanes, w, dD + v * W, dbias + v * W)
               : epilogue<false>(f, chunk, b, k, c, lanes, w, dD + v * W, dbias + v * W);
        }
        int64_t part = (i % blocks.per_group) * a.batch + b;
        for (int64_t t = 0; t < chunk.steps; ++t) {
          int64_t to = (((part * a.length + chunk.rows[t]) * a.paths + k) * a.groups + group) * N;
          for (int64_t n = 0; n < N; ++n) {
            parts.dB[to + n] = V::load(sumB + (t * N + n) * W).sum();
            parts.dC[to + n] = V::load(sumC + (t * N + n) * W).sum();
          }
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t c = first + v * W, at = (b * a.paths + k) * a.channels + c;
        int lanes = int(min_of(W, end - c));
        for (int64_t n = 0; n < N; ++n) {
          V::load(dA + (v * N + n) * W).store_n(parts.dA + state0 + n * a.channels + c, lanes);
          if (f.dinit) V::load(g + (v * N + n) * W).store_n(static_cast<T *>(f.dinit) + state0 + n * a.channels + c, lanes);
        }
        if (parts.dD) V::load(dD + v * W).store_n(parts.dD + at, lanes);
        if (parts.dbias) V::load(dbias + v * W).store_n(parts.dbias + at, lanes);
      }
    }
  }

  template <bool Plain>
  static void prologue(const BackwardArgs &f, const Chunk<T> &chunk, int64_t b, int64_t k, int64_t c, int lanes, const Tile &w) {
    const ScanArgs &a = f.scan;
    V bias = a.bias ? V::load_n(static_cast<const T *>(a.bias) + k * a.channels + c, lanes) : zero<V>();
    Column<V, Plain> u(a.u, b, k, c), dt(a.dt, b, k, c), up(f.dy, b, 0, c), z(a.z, b, 0, c);
    for (int64_t t = 0; t < chunk.steps; ++t) {
      int64_t row = chunk.rows[t];
      V x = u.get(row, 0, lanes), s = dt.get(row, 0, lanes) + bias, dy = up.get(row, 0, lanes);
      if (a.softplus) {
        sigmoid(s).store(w.slope + t * W);
        s = softplus(s);
      }
      if (z.p) dy = dy * silu(z.get(row, 0, lanes));
      s.store(w.d + t * W);
      x.store(w.x + t * W);
      (s * x).store(w.dx + t * W);
      dy.store(w.dy + t * W);
      zero<V>().store(w.y + t * W);
      zero<V>().store(w.ddx + t * W);
      zero<V>().store(w.dd + t * W);
    }
  }

  template <bool Plain>
  static void epilogue(const BackwardArgs &f, const Chunk<T> &chunk, int64_t b, int64_t k, int64_t c, int lanes, const Tile &w, T *dD, T *dbias) {
    const ScanArgs &a = f.scan;
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    V D = a.D ? V::load_n(static_cast<const T *>(a.D) + k * a.channels + c, lanes) : zero<V>();
    V sumD = zero<V>(), sum_bias = zero<V>();
    bool shared = f.du_paths == 1;
    int64_t rows = b * a.length;
    Column<V, Plain> z(a.z, b, 0, c), up(f.dy, b, 0, c);
    Column<V, Plain> du_to(static_cast<T *>(f.du) + (rows * f.du_paths + (shared ? 0 : k)) * a.channels + c, f.du_paths * a.channels, own);
    Column<V, Plain> ddt_to(static_cast<T *>(f.ddt) + (rows * a.paths + k) * a.channels + c, a.paths * a.channels, own);
    Column<V, Plain> dz_to(f.dz ? static_cast<T *>(f.dz) + rows * a.channels + c : nullptr, a.channels, own);
    for (int64_t t = 0; t < chunk.steps; ++t) {
      int64_t row = chunk.rows[t];
      V x = V::load(w.x + t * W), dy = V::load(w.dy + t * W), ddx = V::load(w.ddx + t * W);
      V du = fma(ddx, V::load(w.d + t * W), dy * D);
      V dd = fma(ddx, x, V::load(w.dd + t * W) * V::set1(kLn2));
      if (a.softplus) dd = dd * V::load(w.slope + t * W);
      sumD = fma(dy, x, sumD);
      sum_bias = sum_bias + dd;
      if (shared && k) du = du + du_to.get(row, 0, lanes);
      du_to.put(du, row, 0, lanes);
      ddt_to.put(dd, row, 0, lanes);
      if (dz_to.p) {
        V gate = z.get(row, 0, lanes), one = V::set1(1), s = sigmoid(gate), y = fma(D, x, V::load(w.y + t * W));
        dz_to.put(up.get(row, 0, lanes) * y * s * fma(gate, one - s, one), row, 0, lanes);
      }
    }
    (V::load(dD) + sumD).store(dD);
    (V::load(dbias) + sum_bias).store(dbias);
  }

  // out[i] = sum over parts of in[part][i], in order.
  static void sum_parts(int64_t threads, const T *in, int64_t parts, int64_t n, void *out) {
    constexpr int64_t kSpan = 4096;
    parallel(threads, ceil_div(n, kSpan), [&](int64_t span) {
      for (int64_t i = span * kSpan; i < min_of(n, (span + 1) * kSpan); i += W) {
        int lanes = int(min_of(W, n - i));
        V sum = V::load_n(in + i, lanes);
        for (int64_t p = 1; p < parts; ++p) sum = sum + V::load_n(in + p * n + i, lanes);
        sum.store_n(static_cast<T *>(out) + i, lanes);
      }
    });
  }

  static int64_t run(const BackwardArgs &f) {
    const ScanArgs &a = f.scan;
    // Blocks decide in which order channels are added up, so they follow from the shape alone: at most 16 a group,
    // which also bounds the partial sums.
    int64_t size = ceil_div(ceil_div(a.channels / a.groups, 16), 16) * 16;
    ChannelBlocks blocks(a, size < 32 ? 32 : size);
    int64_t per_row = a.batch * a.length * a.paths * a.groups * a.states, wide = a.paths * a.channels;
    int64_t parts_b = blocks.per_group * per_row;
    Scratch<T> dB(parts_b), dC(parts_b), dA(a.batch * wide * a.states), dD(f.dD ? a.batch * wide : 0), dbias(f.dbias ? a.batch * wide : 0);
    if (!dB.data || !dC.data || !dA.data || !dD.data || !dbias.data) return ZK_NO_MEMORY;
    if (a.lengths || a.steps < a.length) {  // rows that are not visited
      memset(dB.data, 0, size_t(parts_b) * sizeof(T));
      memset(dC.data, 0, size_t(parts_b) * sizeof(T));
    }
    Parts parts{dB.data, dC.data, dA.data, f.dD ? dD.data : nullptr, f.dbias ? dbias.data : nullptr};
    int64_t failed = ZK_OK, total = blocks.total(a);
    parallel(a.threads, a.batch * total, [&](int64_t i) { item(f, blocks, parts, i / total, i % total, &failed); });
    if (failed) return failed;
    sum_parts(a.threads, dB.data, blocks.per_group, per_row, f.dB);
    sum_parts(a.threads, dC.data, blocks.per_group, per_row, f.dC);
    sum_parts(a.threads, dA.data, a.batch, wide * a.states, f.dA);
    if (f.dD) sum_parts(a.threads, dD.data, a.batch, wide, f.dD);
    if (f.dbias) sum_parts(a.threads, dbias.data, a.batch, wide, f.dbias);
    return ZK_OK;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(selective_scan_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const BackwardArgs &f = *reinterpret_cast<const BackwardArgs *>(a);
  return f.scan.dual ? Backward<VD>::run(f) : Backward<VF>::run(f);
}
