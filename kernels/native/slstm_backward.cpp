// The sLSTM on a CPU, backward: one walk from the end over the gates and states that the forward kept. See slstm.h.

#include "slstm.h"

namespace ZK_NAMESPACE {

struct LstmBackwardArgs {
  LstmArgs walk;
  const void *raw, *trace;  // as the forward left them
  const void *dy;           // (batch, length, heads, headdim) of the working type
  const void *dfinal;       // (4, batch, heads, headdim) of the working type
  void *dgates;             // (batch, length, 4, heads, headdim) of the working type
  void *dR;                 // (blocks, heads, headdim, 4, headdim) of the working type
  void *dinit;              // (4, batch, heads, headdim) of the working type
};

template <class V> struct LstmBackward : Lstm<V> {
  using Base = Lstm<V>;
  using T = typename V::T;
  using Base::W;
  static constexpr int64_t kKept = 64;  // rows of y and of gate gradients that wait for the product that gives dR

  static void item(const LstmBackwardArgs &f, int64_t h, int64_t block, int64_t *failed) {
    const LstmArgs &a = f.walk;
    int64_t first = block * kBlock, D = a.headdim, P = Base::padded(D), n = min_of(kBlock, a.batch - first), most = 0, counts[kBlock];
    Scratch<T> memory(D * 4 * P * 3 + kKept * 5 * P + kBlock * 8 * P);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    // RT: [4][padded][headdim], the weights for the way back; draw: [kBlock][4 P]; ds: [4][kBlock][P], gradients of y, c, n, m
    T *R = memory.data, *RT = R + D * 4 * P, *dR = RT + D * 4 * P, *ys = dR + D * 4 * P, *xs = ys + kKept * P;
    T *draw = xs + kKept * 4 * P, *ds = draw + kBlock * 4 * P;
    FlushSubnormals flush;
    Base::pack(a, h, R);
    for (int64_t i = 0; i < D; ++i)
      for (int64_t k = 0; k < 4 * D; ++k) RT[k * P + i] = R[i * 4 * P + k / D * P + k % D];
    for (int64_t k = 0; k < 4 * D; ++k)
      for (int64_t i = D; i < P; ++i) RT[k * P + i] = T(0);
    memset(dR, 0, size_t(D * 4 * P) * sizeof(T));
    memset(draw, 0, size_t(kBlock * 4 * P) * sizeof(T));
    for (int64_t s = 0; s < 4; ++s)
      for (int64_t b = 0; b < n; ++b)
        for (int64_t j = 0; j < P; ++j)
          ds[(s * kBlock + b) * P + j] = j < D ? static_cast<const T *>(f.dfinal)[((s * a.batch + first + b) * a.heads + h) * D + j] : T(0);
    for (int64_t b = 0; b < n; ++b) {
      counts[b] = a.count(first + b);
      if (counts[b] > most) most = counts[b];
    }
    int64_t kept = 0;
    for (int64_t t = most - 1; t >= 0; --t) {
      for (int64_t b = 0; b < n; ++b) {
        if (t >= counts[b]) continue;
        if (kept == kKept) flush_weights(D, P, &kept, ys, xs, dR);
        step(f, h, first + b, t, draw + b * 4 * P, ds + b * P, ys + kept * P);
        memcpy(xs + kept * 4 * P, draw + b * 4 * P, size_t(4 * P) * sizeof(T));
        ++kept;
      }
      // The way back through the recurrent weights, for all sequences together: the gates of one that is yet to start are 0.
      for (int64_t b = 0; b < n; ++b) if (t < counts[b]) memset(ds + b * P, 0, size_t(P) * sizeof(T));
      for (int64_t g = 0; g < 4; ++g) product<V>(n, P / W, D, {draw + g * P, 4 * P, 1}, RT + g * D * P, P, ds, P, T(1));
      for (int64_t b = 0; b < n; ++b)
        if (t < counts[b] && a.drop(first + b, t)) for (int64_t s = 0; s < 4; ++s) memset(ds + (s * kBlock + b) * P, 0, size_t(P) * sizeof(T));
    }
    flush_weights(D, P, &kept, ys, xs, dR);
    for (int64_t s = 0; s < 4; ++s)
      for (int64_t b = 0; b < n; ++b)
        memcpy(static_cast<T *>(f.dinit) + ((s * a.batch + first + b) * a.heads + h) * D, ds + (s * kBlock + b) * P, size_t(D) * sizeof(T));
    for (int64_t i = 0; i < D; ++i)
      for (int64_t g = 0; g < 4; ++g)
        memcpy(static_cast<T *>(f.dR) + (((block * a.heads + h) * D + i) * 4 + g) * D, dR + (i * 4 + g) * P, size_t(D) * sizeof(T));
  }

  static void flush_weights(int64_t D, int64_t P, int64_t *kept, const T *ys, const T *xs, T *dR) {
    product<V>(D, 4 * P / W, *kept, {ys, 1, P}, xs, 4 * P, dR, 4 * P, T(1));
    *kept = 0;
  }

  // One step of one sequence: gradients of its gates into draw and dgates, of the state before it into ds (y's share but not
  // what comes through the recurrent weights); the y before it into `before`.
  static ZK_INLINE void step(const LstmBackwardArgs &f, int64_t h, int64_t b, int64_t t, T *draw, T *ds, T *before) {
    const LstmArgs &a = f.walk;
    int64_t D = a.headdim, P = Base::padded(D), H = a.heads * D;
    constexpr int64_t B = kBlock;
    bool fresh = a.drop(b, t);
    V one = V::set1(1);
    const T *raw = static_cast<const T *>(f.raw) + (b * a.steps + t) * 4 * H + h * D, *now = static_cast<const T *>(f.trace) + (b * a.steps + t) * 3 * H + h * D;
    const T *earlier = t ? now - 3 * H : nullptr, *earlier_o = t ? raw - H : nullptr;  // o of the step before: its last gate
    const T *init = a.init ? static_cast<const T *>(a.init) + (b * a.heads + h) * D : nullptr;
    int64_t state = a.batch * H;
    int64_t row = b * a.length + a.row(b, t);
    const T *dy = static_cast<const T *>(f.dy) + row * H + h * D;
    T *out = static_cast<T *>(f.dgates) + row * 4 * H + h * D;
    for (int64_t j = 0; j < P; j += W) {
      int lanes = int(min_of(W, D - j));
      V gi = V::load_n(raw + j, lanes), gf = V::load_n(raw + H + j, lanes), gz = V::load_n(raw + 2 * H + j, lanes), go = V::load_n(raw + 3 * H + j, lanes);
      V c = V::load_n(now + j, lanes), n = V::load_n(now + H + j, lanes), m = V::load_n(now + 2 * H + j, lanes);
      V y0 = zero<V>(), c0 = zero<V>(), n0 = zero<V>(), m0 = zero<V>();
      if (!fresh && t) {
        c0 = V::load_n(earlier + j, lanes);
        n0 = V::load_n(earlier + H + j, lanes);
        m0 = V::load_n(earlier + 2 * H + j, lanes);
        y0 = sigmoid(V::load_n(earlier_o + j, lanes)) * c0 / n0;
      } else if (!fresh && init) {
        y0 = V::load_n(init + j, lanes);
        c0 = V::load_n(init + state + j, lanes);
        n0 = V::load_n(init + 2 * state + j, lanes);
        m0 = V::load_n(init + 3 * state + j, lanes);
      }
      y0.store(before + j);
      if (lanes < W) for (int64_t k = lanes; k < W; ++k) before[j + k] = T(0);
      V logf = m0 + Base::log_sigmoid(gf), free_i = exp_of(gi - m), free_f = exp_of(logf - m);
      V i = vmin(one, free_i), keep = vmin(one, free_f), z = Base::tanh_of(gz), o = sigmoid(go), ratio = c / n;
      V g = V::load_n(dy + j, lanes) + V::load(ds + j);
      V dc = fma(g, o / n, V::load(ds + B * P + j)), dn = V::load(ds + 2 * B * P + j) - g * o * ratio / n;
      V ei = (dc * z + dn) * i, ef = (dc * c0 + dn * n0) * keep;
      ef = where_gt(free_f, one, zero<V>(), ef);  // clamped
      V dm = V::load(ds + 3 * B * P + j) - ei - ef;
      V to_i = Base::is_zero(n0, one, where_gt(gi, logf, one, zero<V>()));  // which side of the maximum m is
      ei = fma(dm, to_i, ei);
      ef = fma(dm, one - to_i, ef);
      V di = ei, df = ef * sigmoid(zero<V>() - gf), dz = dc * i * (one - z * z), dgo = g * ratio * o * (one - o);
      (dc * keep).store_n(ds + B * P + j, lanes);
      (dn * keep).store_n(ds + 2 * B * P + j, lanes);
      ef.store_n(ds + 3 * B * P + j, lanes);
      di.store_n(draw + j, lanes);
      df.store_n(draw + P + j, lanes);
      dz.store_n(draw + 2 * P + j, lanes);
      dgo.store_n(draw + 3 * P + j, lanes);
      di.store_n(out + j, lanes);
      df.store_n(out + H + j, lanes);
      dz.store_n(out + 2 * H + j, lanes);
      dgo.store_n(out + 3 * H + j, lanes);
    }
  }

  static int64_t run(const LstmBackwardArgs &f) {
    const LstmArgs &a = f.walk;
    int64_t failed = ZK_OK, blocks = ceil_div(a.batch, kBlock);
    parallel(a.threads, a.heads * blocks, [&](int64_t i) { item(f, i / blocks, i % blocks, &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(slstm_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LstmBackwardArgs &f = *reinterpret_cast<const LstmBackwardArgs *>(a);
  return f.walk.dual ? LstmBackward<VD>::run(f) : LstmBackward<VF>::run(f);
}
