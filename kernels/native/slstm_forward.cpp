// The sLSTM on a CPU, forward: the whole walk over time in one call. See slstm.h.

#include "slstm.h"

namespace ZK_NAMESPACE {

struct LstmForwardArgs {
  LstmArgs walk;
  void *y;  // (batch, length, heads, headdim) of the gates' type
  void *final_state;  // (4, batch, heads, headdim) of the working type
  void *raw;    // (batch, steps, 4, heads, headdim) of the working type: gates before activation; or null
  void *trace;  // (batch, steps, 3, heads, headdim): c, n, m after each step; or null
};

template <class V> struct LstmForward : Lstm<V> {
  using Base = Lstm<V>;
  using T = typename V::T;
  using Base::W;

  static void item(const LstmForwardArgs &f, int64_t h, int64_t first, int64_t *failed) {
    const LstmArgs &a = f.walk;
    int64_t D = a.headdim, P = Base::padded(D), n = min_of(kBlock, a.batch - first), most = 0, counts[kBlock];
    Scratch<T> memory(D * 4 * P + 8 * kBlock * P);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *R = memory.data, *raw = R + D * 4 * P, *state = raw + kBlock * 4 * P;  // state: [4][kBlock][P]: y, c, n, m
    FlushSubnormals flush;
    Base::pack(a, h, R);
    for (int64_t s = 0; s < 4; ++s)
      for (int64_t b = 0; b < n; ++b)
        for (int64_t j = 0; j < P; ++j)
          state[(s * kBlock + b) * P + j] = a.init && j < D ? static_cast<const T *>(a.init)[((s * a.batch + first + b) * a.heads + h) * D + j] : T(0);
    for (int64_t b = 0; b < n; ++b) {
      counts[b] = a.count(first + b);
      if (counts[b] > most) most = counts[b];
    }
    for (int64_t t = 0; t < most; ++t) {
      for (int64_t b = 0; b < n; ++b) {
        if (t >= counts[b]) continue;  // its share of the product is computed and not used
        if (a.drop(first + b, t)) for (int64_t s = 0; s < 4; ++s) memset(state + (s * kBlock + b) * P, 0, size_t(P) * sizeof(T));
        for (int64_t g = 0; g < 4; ++g) {
          const void *from = at(a.gates, (((first + b) * a.length + a.row(first + b, t)) * 4 + g) * a.heads * D + h * D, a.gates_dtype);
          for (int64_t j = 0; j < P; j += W) {
            int lanes = int(min_of(W, D - j));
            V x = load_as<V>(at(from, j, a.gates_dtype), a.gates_dtype, lanes);
            if (a.bias) x = x + V::load_n(static_cast<const T *>(a.bias) + (h * 4 + g) * D + j, lanes);
            x.store(raw + (b * 4 + g) * P + j);
          }
        }
      }
      product<V>(n, 4 * P / W, D, {state, P, 1}, R, 4 * P, raw, 4 * P, T(1));
      for (int64_t b = 0; b < n; ++b)
        if (t < counts[b]) update(f, h, first + b, t, raw + b * 4 * P, state + b * P);
    }
    for (int64_t s = 0; s < 4; ++s)
      for (int64_t b = 0; b < n; ++b)
        memcpy(static_cast<T *>(f.final_state) + ((s * a.batch + first + b) * a.heads + h) * D, state + (s * kBlock + b) * P, size_t(D) * sizeof(T));
  }

  static ZK_INLINE void update(const LstmForwardArgs &f, int64_t h, int64_t b, int64_t t, const T *raw, T *state) {
    const LstmArgs &a = f.walk;
    int64_t D = a.headdim, P = Base::padded(D);
    constexpr int64_t B = kBlock;
    V one = V::set1(1);
    char *y = at(f.y, ((b * a.length + a.row(b, t)) * a.heads + h) * D, a.gates_dtype);
    for (int64_t j = 0; j < P; j += W) {
      int lanes = int(min_of(W, D - j));
      V gi = V::load(raw + j), gf = V::load(raw + P + j), gz = V::load(raw + 2 * P + j), go = V::load(raw + 3 * P + j);
      V c = V::load(state + B * P + j), n = V::load(state + 2 * B * P + j), m = V::load(state + 3 * B * P + j);
      V logf = m + Base::log_sigmoid(gf), next = Base::is_zero(n, gi, where_gt(gi, logf, gi, logf));
      V i = vmin(one, exp_of(gi - next)), keep = vmin(one, exp_of(logf - next));
      c = fma(keep, c, i * Base::tanh_of(gz));
      n = fma(keep, n, i);
      V out = sigmoid(go) * c / n;
      out.store_n(state + j, lanes);  // the padding stays zero: it enters the next product
      c.store(state + B * P + j);
      n.store(state + 2 * B * P + j);
      next.store(state + 3 * B * P + j);
      store_as(out, at(y, j, a.gates_dtype), a.gates_dtype, lanes);
      if (f.raw) {
        T *to = static_cast<T *>(f.raw) + (b * a.steps + t) * 4 * a.heads * D + h * D + j;
        gi.store_n(to, lanes);
        gf.store_n(to + a.heads * D, lanes);
        gz.store_n(to + 2 * a.heads * D, lanes);
        go.store_n(to + 3 * a.heads * D, lanes);
        to = static_cast<T *>(f.trace) + (b * a.steps + t) * 3 * a.heads * D + h * D + j;
        c.store_n(to, lanes);
        n.store_n(to + a.heads * D, lanes);
        next.store_n(to + 2 * a.heads * D, lanes);
      }
    }
  }

  static int64_t run(const LstmForwardArgs &f) {
    const LstmArgs &a = f.walk;
    int64_t failed = ZK_OK, blocks = ceil_div(a.batch, kBlock);
    parallel(a.threads, a.heads * blocks, [&](int64_t i) { item(f, i / blocks, i % blocks * kBlock, &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(slstm_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LstmForwardArgs &f = *reinterpret_cast<const LstmForwardArgs *>(a);
  return f.walk.dual ? LstmForward<VD>::run(f) : LstmForward<VF>::run(f);
}
