// Linear attention with one decay per key channel on a CPU, forward. See gated.h.
//
// A work item is a block of values of one head, its state as [keys][values]: values along the lanes, so that a step's
// output is a sum over registers. A few keys at a time walk a chunk of steps.

#include "gated.h"

namespace ZK_NAMESPACE {

#if defined(ZK_AVX512) || defined(ZK_NEON)
constexpr int kKeys = 4, kValues = 4;  // a tile in registers: keys, vectors of values
#elif defined(ZK_AVX2)
constexpr int kKeys = 4, kValues = 2;
#else
constexpr int kKeys = 2, kValues = 2;
#endif

struct GatedForwardArgs {
  GatedArgs scan;
  void *y;  // (batch, length, heads, headdim), contiguous
  int64_t y_dtype;
  void *final_state;  // (batch, heads, headdim, states) of the working type
};

template <class V> struct GatedForward {
  using T = typename V::T;
  static constexpr int64_t W = V::W, kSteps = 32;
  using Chunk = GatedChunk<kSteps>;

  // M keys by NV vectors of values over one chunk; factor, k, q with `ld` numbers a step, v, y and S with NV vectors.
  template <int M, int NV, bool STRICT>
  static void walk(const Chunk &c, const T *ZK_RESTRICT factor, const T *ZK_RESTRICT k, const T *ZK_RESTRICT q, int64_t ld,
                   const T *ZK_RESTRICT v, T *ZK_RESTRICT y, T *ZK_RESTRICT S) {
    V s[M][NV];
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) s[m][j] = V::load(S + (m * NV + j) * W);
    for (int64_t t = 0; t < c.n; ++t, factor += ld, k += ld, q += ld, v += NV * W, y += NV * W) {
      if (c.drop[t])
        for (int m = 0; m < M; ++m)
          for (int j = 0; j < NV; ++j) s[m][j] = zero<V>();
      V in[NV], out[NV];
      for (int j = 0; j < NV; ++j) {
        in[j] = V::load(v + j * W);
        out[j] = V::load(y + j * W);
      }
      for (int m = 0; m < M; ++m) {
        V f = V::set1(factor[m]), add = V::set1(k[m]), read = V::set1(q[m]);
        for (int j = 0; j < NV; ++j) {
          V before = s[m][j] * f;
          s[m][j] = fma(add, in[j], before);
          out[j] = fma(read, STRICT ? before : s[m][j], out[j]);
        }
      }
      for (int j = 0; j < NV; ++j) out[j].store(y + j * W);
    }
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < NV; ++j) s[m][j].store(S + (m * NV + j) * W);
  }

  template <int NV, bool STRICT> static void item(const GatedForwardArgs &f, int64_t b, int64_t h, int64_t first, int64_t *failed) {
    const GatedArgs &a = f.scan;
    constexpr int64_t P = NV * W;
    int64_t N = a.states, ld = ceil_div(N, W) * W, width = min_of(P, a.headdim - first), count = a.count(b);
    Scratch<T> memory(N * P + 3 * kSteps * ld + 2 * kSteps * P);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *S = memory.data, *factor = S + N * P, *k = factor + kSteps * ld, *q = k + kSteps * ld, *v = q + kSteps * ld, *y = v + kSteps * P;
    FlushSubnormals flush;
    for (int64_t i = 0; i < N * P; ++i) S[i] = T(0);
    int64_t state = ((b * a.heads + h) * a.headdim + first) * N;
    if (a.init) transpose<V>(width, N, static_cast<const T *>(a.init) + state, N, S, P);
    for (int64_t start = 0; start < count; start += kSteps) {
      Chunk c(a, b, start, count);
      c.template gather<V>(factor, ld, a.decay, b, h, 0, N);
      c.template exponentials<V>(factor, ld);
      c.template gather<V>(k, ld, a.k, b, h, 0, N);
      c.template gather<V>(q, ld, a.q, b, h, 0, N);
      c.template gather<V>(v, P, a.v, b, h, first, width);
      for (int64_t i = 0; i < c.n * P; ++i) y[i] = T(0);
      int64_t n = 0;
      for (; n + kKeys <= N; n += kKeys) walk<kKeys, NV, STRICT>(c, factor + n, k + n, q + n, ld, v, y, S + n * P);
      for (; n < N; ++n) walk<1, NV, STRICT>(c, factor + n, k + n, q + n, ld, v, y, S + n * P);
      for (int64_t t = 0; t < c.n; ++t) {
        char *to = at(f.y, ((b * a.length + c.rows[t]) * a.heads + h) * a.headdim + first, f.y_dtype);
        for (int64_t j = 0; j < width; j += W) store_as(V::load(y + t * P + j), at(to, j, f.y_dtype), f.y_dtype, int(min_of(W, width - j)));
      }
    }
    transpose<V>(N, width, S, P, static_cast<T *>(f.final_state) + state, N);
  }

  template <int NV, bool STRICT> static int64_t blocks(const GatedForwardArgs &f) {
    const GatedArgs &a = f.scan;
    int64_t parts = ceil_div(a.headdim, NV * W), failed = ZK_OK;
    parallel(a.threads, a.batch * a.heads * parts, [&](int64_t i) {
      item<NV, STRICT>(f, i / (a.heads * parts), i / parts % a.heads, i % parts * NV * W, &failed);
    });
    return failed;
  }
  template <int NV> static int64_t with(const GatedForwardArgs &f) { return f.scan.strict ? blocks<NV, true>(f) : blocks<NV, false>(f); }

  // As wide a block as the values fill, and narrower ones where threads would be left without; results do not depend on it.
  static int64_t run(const GatedForwardArgs &f) {
    const GatedArgs &a = f.scan;
    int64_t vectors = min_of(kValues, ceil_div(a.headdim, W));
    while (vectors > 1 && a.batch * a.heads * ceil_div(a.headdim, vectors * W) < a.threads) vectors = (vectors + 1) / 2;
    if constexpr (kValues > 2) if (vectors > 2) return with<kValues>(f);
    return vectors > 1 ? with<2>(f) : with<1>(f);
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(gated_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const GatedForwardArgs &f = *reinterpret_cast<const GatedForwardArgs *>(a);
  return f.scan.dual ? GatedForward<VD>::run(f) : GatedForward<VF>::run(f);
}
