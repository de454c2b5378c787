// Linear attention with one decay per key channel on a CPU, backward. See gated.h.
//
// Nothing was kept by the forward. States are replayed: a first walk keeps one state every kSpan steps, a second, span by
// span from the end, one every kSteps, and a third the states of one such chunk for the tile that then walks it backwards.
// With B_t = S_{t-1} diag(exp(a_t)) and G_t the gradient of S_t,
//
//   G_t = dy_t q_t^T + G_{t+1} diag(exp(a_{t+1})),   dv_t = G_t k_t,   dk_t = G_t^T v_t,
//   dq_t = S_t^T dy_t = B_t^T dy_t + (dy_t . v_t) k_t,   da_t = column sums of G_t * B_t,
//
// and where a step reads the decayed state only (strict), dv and dk see G_t without dy_t q_t^T, and dq_t is B_t^T dy_t.
// The gradient of a decay is taken from the states themselves: the sums of q dq - k dk that others derive it from cancel.
//
// A work item is a block of values of one head, its state as [values][keys]: keys along the lanes, so that dk, dq and da
// are sums over registers. Each block has dk, dq and da of its own; how many there are follows from the shapes alone.

#include "gated.h"

namespace ZK_NAMESPACE {

#if defined(ZK_AVX512) || defined(ZK_NEON)
constexpr int kValueRows = 4, kKeyVectors = 2;  // a tile in registers
#else
constexpr int kValueRows = 2, kKeyVectors = 2;
#endif

struct GatedBackwardArgs {
  GatedArgs scan;
  Rows dy;
  const void *dfinal;  // (batch, heads, headdim, states) of the working type
  int64_t block;       // values of a work item
  void *dv;            // (batch, length, heads, headdim), contiguous, of v's type
  void *da, *dk, *dq;  // (blocks, batch, length, heads, states), contiguous, of the working type
  void *dinit;         // (batch, heads, headdim, states) of the working type
};

template <class V> struct GatedBackward {
  using T = typename V::T;
  static constexpr int64_t W = V::W, kSteps = 16, kSpan = 16 * kSteps;
  using Chunk = GatedChunk<kSteps>;

  // What one chunk needs, in scratch memory: `ld` numbers a step for keys, `width` for values.
  struct Buffers {
    int64_t ld, width;
    T *factor, *k, *q, *da, *dk, *dq;  // [kSteps][ld]
    T *v, *dy, *dv;                    // [kSteps][width]
    static int64_t size(int64_t ld, int64_t width) { return kSteps * (6 * ld + 3 * (width + 16)); }
    Buffers(T *p, int64_t ld, int64_t width) : ld(ld), width((width + 15) / 16 * 16) {
      T **keys[] = {&factor, &k, &q, &da, &dk, &dq}, **values[] = {&v, &dy, &dv};
      for (T **x : keys) { *x = p; p += kSteps * ld; }
      for (T **x : values) { *x = p; p += kSteps * this->width; }
    }
  };

  // M values by NV vectors of keys over one chunk: S advances; `kept`, if given, gets what each step reads, decayed.
  template <int M, int NV, bool KEEP>
  static void advance(const Chunk &c, const Buffers &x, int64_t n, int64_t p, T *ZK_RESTRICT S, T *ZK_RESTRICT kept) {
    V s[M][NV];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) s[m][j] = V::load(S + m * x.ld + j * W);
    for (int64_t t = 0; t < c.n; ++t) {
      if (c.drop[t])
        for (int m = 0; m < M; ++m)
          for (int j = 0; j < NV; ++j) s[m][j] = zero<V>();
      V in[M];
      for (int m = 0; m < M; ++m) in[m] = V::set1(x.v[t * x.width + p + m]);
      for (int j = 0; j < NV; ++j) {
        V f = V::load(x.factor + t * x.ld + n + j * W), k = V::load(x.k + t * x.ld + n + j * W);
        for (int m = 0; m < M; ++m) {
          V before = s[m][j] * f;
          if (KEEP) before.store(kept + ((t * M + m) * NV + j) * W);
          s[m][j] = fma(in[m], k, before);
        }
      }
    }
    if (KEEP) return;
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) s[m][j].store(S + m * x.ld + j * W);
  }

  // The same tile walked backwards, G being the gradient of the state.
  template <int M, int NV, bool STRICT>
  static void retreat(const Chunk &c, const Buffers &x, int64_t n, int64_t p, const T *ZK_RESTRICT kept, T *ZK_RESTRICT G) {
    V g[M][NV];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) g[m][j] = V::load(G + m * x.ld + j * W);
    for (int64_t t = c.n - 1; t >= 0; --t) {
      V in[M], out[M], dv[M];
      for (int m = 0; m < M; ++m) {
        in[m] = V::set1(x.v[t * x.width + p + m]);
        out[m] = V::set1(x.dy[t * x.width + p + m]);
        dv[m] = zero<V>();
      }
      for (int j = 0; j < NV; ++j) {
        int64_t i = t * x.ld + n + j * W;
        V f = V::load(x.factor + i), k = V::load(x.k + i), q = V::load(x.q + i);
        V da = V::load(x.da + i), dk = V::load(x.dk + i), dq = V::load(x.dq + i);
        for (int m = 0; m < M; ++m) {
          V before = V::load(kept + ((t * M + m) * NV + j) * W), whole = fma(out[m], q, g[m][j]);
          V of_input = STRICT ? g[m][j] : whole;
          dk = fma(of_input, in[m], dk);
          dv[m] = fma(of_input, k, dv[m]);
          dq = fma(before, out[m], dq);
          da = fma(whole, before, da);
          g[m][j] = c.drop[t] ? zero<V>() : whole * f;
        }
        da.store(x.da + i);
        dk.store(x.dk + i);
        dq.store(x.dq + i);
      }
      for (int m = 0; m < M; ++m) x.dv[t * x.width + p + m] += dv[m].sum();
    }
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) g[m][j].store(G + m * x.ld + j * W);
  }

  template <int M, int NV> static void advance_tile(const Chunk &c, const Buffers &x, int64_t n, int64_t p, T *S) {
    advance<M, NV, false>(c, x, n, p, S, nullptr);
  }
  template <int M, int NV, bool STRICT> static void retreat_tile(const Chunk &c, const Buffers &x, int64_t n, int64_t p, const T *S, T *G) {
    alignas(64) T kept[kSteps * M * NV * W];
    advance<M, NV, true>(c, x, n, p, const_cast<T *>(S), kept);
    retreat<M, NV, STRICT>(c, x, n, p, kept, G);
  }

  static void advance_all(const Chunk &c, const Buffers &x, int64_t width, T *S) {
    for (int64_t n = 0; n < x.ld; n += kKeyVectors * W) {
      bool wide = n + kKeyVectors * W <= x.ld;
      int64_t p = 0;
      for (; p + kValueRows <= width; p += kValueRows)
        wide ? advance_tile<kValueRows, kKeyVectors>(c, x, n, p, S + p * x.ld + n) : advance_tile<kValueRows, 1>(c, x, n, p, S + p * x.ld + n);
      for (; p < width; ++p)
        wide ? advance_tile<1, kKeyVectors>(c, x, n, p, S + p * x.ld + n) : advance_tile<1, 1>(c, x, n, p, S + p * x.ld + n);
    }
  }
  template <bool STRICT> static void retreat_all(const Chunk &c, const Buffers &x, int64_t width, const T *S, T *G) {
    for (int64_t n = 0; n < x.ld; n += kKeyVectors * W) {
      bool wide = n + kKeyVectors * W <= x.ld;
      int64_t p = 0;
      for (; p + kValueRows <= width; p += kValueRows) {
        const T *s = S + p * x.ld + n;
        T *g = G + p * x.ld + n;
        wide ? retreat_tile<kValueRows, kKeyVectors, STRICT>(c, x, n, p, s, g) : retreat_tile<kValueRows, 1, STRICT>(c, x, n, p, s, g);
      }
      for (; p < width; ++p) {
        const T *s = S + p * x.ld + n;
        T *g = G + p * x.ld + n;
        wide ? retreat_tile<1, kKeyVectors, STRICT>(c, x, n, p, s, g) : retreat_tile<1, 1, STRICT>(c, x, n, p, s, g);
      }
    }
  }

  template <bool STRICT> static void item(const GatedBackwardArgs &f, int64_t part, int64_t b, int64_t h, int64_t *failed) {
    const GatedArgs &a = f.scan;
    int64_t N = a.states, ld = ceil_div(N, W) * W, first = part * f.block, width = min_of(f.block, a.headdim - first);
    int64_t size = width * ld, count = a.count(b), spans = ceil_div(count, kSpan);
    Scratch<T> memory(Buffers::size(ld, width) + size * (2 + spans + kSpan / kSteps));
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    Buffers x(memory.data, ld, width);
    T *S = memory.data + Buffers::size(ld, width), *G = S + size, *span_states = G + size, *states = span_states + spans * size;
    FlushSubnormals flush;
    int64_t state = ((b * a.heads + h) * a.headdim + first) * N;
    load(S, a.init ? static_cast<const T *>(a.init) + state : nullptr, width, N, ld);
    load(G, static_cast<const T *>(f.dfinal) + state, width, N, ld);
    for (int64_t span = 0; span < spans; ++span) {  // the state before each span
      memcpy(span_states + span * size, S, size_t(size) * sizeof(T));
      if (span + 1 < spans)
        for (int64_t start = span * kSpan; start < (span + 1) * kSpan; start += kSteps) forwards(a, x, b, h, first, width, start, count, S);
    }
    for (int64_t span = spans - 1; span >= 0; --span) {
      int64_t begin = span * kSpan, end = min_of(begin + kSpan, count);
      memcpy(S, span_states + span * size, size_t(size) * sizeof(T));
      for (int64_t start = begin; start < end; start += kSteps) {  // the state before each chunk of it
        memcpy(states + (start - begin) / kSteps * size, S, size_t(size) * sizeof(T));
        if (start + kSteps < end) forwards(a, x, b, h, first, width, start, count, S);
      }
      for (int64_t start = begin + (end - begin - 1) / kSteps * kSteps; start >= begin; start -= kSteps)
        backwards<STRICT>(f, x, part, b, h, first, width, start, count, states + (start - begin) / kSteps * size, G);
    }
    T *to = static_cast<T *>(f.dinit) + state;
    for (int64_t p = 0; p < width; ++p) memcpy(to + p * N, G + p * ld, size_t(N) * sizeof(T));
  }

  static void load(T *out, const T *in, int64_t width, int64_t N, int64_t ld) {
    for (int64_t i = 0; i < width * ld; ++i) out[i] = T(0);
    for (int64_t p = 0; in && p < width; ++p) memcpy(out + p * ld, in + p * N, size_t(N) * sizeof(T));
  }

  static void forwards(const GatedArgs &a, const Buffers &x, int64_t b, int64_t h, int64_t first, int64_t width, int64_t start, int64_t count, T *S) {
    Chunk c(a, b, start, count);
    gather(c, a, x, b, h, first, width);
    advance_all(c, x, width, S);
  }
  static void gather(const Chunk &c, const GatedArgs &a, const Buffers &x, int64_t b, int64_t h, int64_t first, int64_t width) {
    c.template gather<V>(x.factor, x.ld, a.decay, b, h, 0, a.states);
    c.template exponentials<V>(x.factor, x.ld);
    c.template gather<V>(x.k, x.ld, a.k, b, h, 0, a.states);
    c.template gather<V>(x.v, x.width, a.v, b, h, first, width);
  }
  template <bool STRICT>
  static void backwards(const GatedBackwardArgs &f, const Buffers &x, int64_t part, int64_t b, int64_t h, int64_t first, int64_t width, int64_t start,
                        int64_t count, const T *S, T *G) {
    const GatedArgs &a = f.scan;
    Chunk c(a, b, start, count);
    gather(c, a, x, b, h, first, width);
    c.template gather<V>(x.q, x.ld, a.q, b, h, 0, a.states);
    c.template gather<V>(x.dy, x.width, f.dy, b, h, first, width);
    for (int64_t i = 0; i < c.n * x.ld; ++i) x.da[i] = x.dk[i] = x.dq[i] = T(0);
    for (int64_t i = 0; i < c.n * x.width; ++i) x.dv[i] = T(0);
    retreat_all<STRICT>(c, x, width, S, G);
    for (int64_t t = 0; t < c.n; ++t) {
      if (!STRICT) {  // what a step reads of its own input
        V own = V::set1(dot<V>(x.width / W, x.dy + t * x.width, x.v + t * x.width));
        for (int64_t i = t * x.ld; i < (t + 1) * x.ld; i += W) fma(own, V::load(x.k + i), V::load(x.dq + i)).store(x.dq + i);
      }
      int64_t row = (b * a.length + c.rows[t]) * a.heads + h, at_keys = (part * a.batch * a.length * a.heads + row) * a.states;
      memcpy(static_cast<T *>(f.da) + at_keys, x.da + t * x.ld, size_t(a.states) * sizeof(T));
      memcpy(static_cast<T *>(f.dk) + at_keys, x.dk + t * x.ld, size_t(a.states) * sizeof(T));
      memcpy(static_cast<T *>(f.dq) + at_keys, x.dq + t * x.ld, size_t(a.states) * sizeof(T));
      char *to = at(f.dv, row * a.headdim + first, a.v.dtype);
      for (int64_t j = 0; j < width; j += W)
        store_as(V::load(x.dv + t * x.width + j), at(to, j, a.v.dtype), a.v.dtype, int(min_of(W, width - j)));
    }
  }

  static int64_t run(const GatedBackwardArgs &f) {
    const GatedArgs &a = f.scan;
    int64_t parts = ceil_div(a.headdim, f.block), failed = ZK_OK;
    parallel(a.threads, a.batch * a.heads * parts, [&](int64_t i) {
      int64_t b = i / (a.heads * parts), h = i / parts % a.heads, part = i % parts;
      a.strict ? item<true>(f, part, b, h, &failed) : item<false>(f, part, b, h, &failed);
    });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(gated_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const GatedBackwardArgs &f = *reinterpret_cast<const GatedBackwardArgs *>(a);
  return f.scan.dual ? GatedBackward<VD>::run(f) : GatedBackward<VF>::run(f);
}
