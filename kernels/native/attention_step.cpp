// A decoding step of linear attention: the state (batch, heads, headdim, states) is read and written once, where it lies.
// All tensors are contiguous and of the working type, but for the decay, which says its strides.

#include "vec.h"

namespace ZK_NAMESPACE {

struct AttentionStepArgs {
  int64_t batch, heads, groups, headdim, states, strict, threads, dual;
  double scale, eps;
  const void *v, *k, *q;  // (batch, heads, headdim), (batch, groups, states) twice
  const void *decay;      // logarithms, or null; per key channel where decay_n is 1, else one for each head
  int64_t decay_b, decay_h, decay_n;
  void *state, *normalizer, *y;  // normalizer (batch, heads, states): the sum of keys, or null
};

template <class V> struct AttentionStep {
  using T = typename V::T;
  static constexpr int64_t W = V::W;
  static ZK_INLINE V load(const T *p, int n) { return n == W ? V::load(p) : V::load_n(p, n); }

  // h = factor h + add k; returns what q reads of it, or (strict) of factor h
  template <bool STRICT> static ZK_INLINE T row(T *h, const T *factor, T add, const T *k, const T *q, int64_t states) {
    V a = V::set1(add), sum = zero<V>();
    for (int64_t j = 0; j < states; j += W) {
      int n = int(min_of(W, states - j));
      V before = load(h + j, n) * load(factor + j, n), after = fma(a, load(k + j, n), before);
      if (n == W) after.store(h + j);
      else after.store_n(h + j, n);
      sum = fma(STRICT ? before : after, load(q + j, n), sum);
    }
    return sum.sum();
  }

  template <bool STRICT> static void head(const AttentionStepArgs &a, int64_t i, int64_t *failed) {
    int64_t b = i / a.heads, h = i % a.heads, N = a.states, keys = (b * a.groups + h / (a.heads / a.groups)) * N;
    Scratch<T> factor(N);
    if (!factor.data) { *failed = ZK_NO_MEMORY; return; }
    const T *k = static_cast<const T *>(a.k) + keys, *q = static_cast<const T *>(a.q) + keys;
    const T *decay = a.decay ? static_cast<const T *>(a.decay) + b * a.decay_b + h * a.decay_h : nullptr;
    FlushSubnormals flush;
    for (int64_t j = 0; j < N; j += W) {
      int n = int(min_of(W, N - j));
      exp_of(!decay ? zero<V>() : a.decay_n ? load(decay + j, n) : V::set1(*decay)).store_n(factor.data + j, n);
    }
    T scale = T(a.scale), total = T(1);
    if (a.normalizer) total = scale * row<STRICT>(static_cast<T *>(a.normalizer) + i * N, factor.data, T(1), k, q, N) + T(a.eps);
    const T *v = static_cast<const T *>(a.v) + i * a.headdim;
    T *state = static_cast<T *>(a.state) + i * a.headdim * N, *y = static_cast<T *>(a.y) + i * a.headdim;
    for (int64_t p = 0; p < a.headdim; ++p) {
      T read = scale * row<STRICT>(state + p * N, factor.data, v[p], k, q, N);
      y[p] = a.normalizer ? read / total : read;
    }
  }

  static int64_t run(const AttentionStepArgs &a) {
    int64_t count = a.batch * a.heads, failed = ZK_OK;
    // Few small states are not worth waking threads for.
    int64_t threads = count * a.headdim * a.states * int64_t(sizeof(T)) < 1 << 19 ? 1 : a.threads;
    parallel(threads, count, [&](int64_t i) { a.strict ? head<true>(a, i, &failed) : head<false>(a, i, &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(linear_attention_step)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const AttentionStepArgs &a = *reinterpret_cast<const AttentionStepArgs *>(p);
  return a.dual ? AttentionStep<VD>::run(a) : AttentionStep<VF>::run(a);
}
