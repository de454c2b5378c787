// Decoding steps of ssd and the mLSTM: the state (batch, heads, headdim, states) is read and written once, where it lies.
// All tensors are contiguous and of the working type.

#include "vec.h"

namespace ZK_NAMESPACE {

struct SsdStepArgs {
  int64_t batch, heads, headdim, groups, states, threads, dual, softplus;
  double low, high;
  const void *x, *dt, *A, *B, *C, *D, *z, *bias, *scale;  // D: (heads, headdim); D, z, bias, scale may be null
  void *state, *y;
};
struct MlstmStepArgs {
  int64_t batch, heads, headdim, states, threads, dual;
  double scale, eps;
  const void *q, *k, *v, *i, *f;
  void *C, *n, *m, *y;
};

template <class V> struct StateStep {
  using T = typename V::T;
  static constexpr int64_t W = V::W;
  static ZK_INLINE V load(const T *p, int n) { return n == W ? V::load(p) : V::load_n(p, n); }
  static ZK_INLINE T exp1(T x) { T t[W]; exp_of(V::set1(x)).store(t); return t[0]; }
  static ZK_INLINE T softplus1(T x) { T t[W]; softplus(V::set1(x)).store(t); return t[0]; }

  // h = keep h + add k; returns h . q
  static ZK_INLINE T row(T *h, T keep, T add, const T *k, const T *q, int64_t states) {
    V a = V::set1(keep), b = V::set1(add), sum = zero<V>(), other = zero<V>();
    int64_t j = 0;
    for (; j + 2 * W <= states; j += 2 * W) {
      V x = fma(a, V::load(h + j), b * V::load(k + j)), y = fma(a, V::load(h + j + W), b * V::load(k + j + W));
      x.store(h + j);
      y.store(h + j + W);
      sum = fma(x, V::load(q + j), sum);
      other = fma(y, V::load(q + j + W), other);
    }
    for (; j < states; j += W) {
      int n = int(min_of(W, states - j));
      V x = fma(a, load(h + j, n), b * load(k + j, n));
      if (n == W) x.store(h + j);
      else x.store_n(h + j, n);
      sum = fma(x, load(q + j, n), sum);
    }
    return (sum + other).sum();
  }

  static void ssd(const SsdStepArgs &a, int64_t i) {
    int64_t b = i / a.heads, h = i % a.heads, g = h / (a.heads / a.groups);
    const T *x = static_cast<const T *>(a.x) + i * a.headdim, *D = a.D ? static_cast<const T *>(a.D) + h * a.headdim : nullptr;
    const T *k = static_cast<const T *>(a.B) + (b * a.groups + g) * a.states, *q = static_cast<const T *>(a.C) + (b * a.groups + g) * a.states;
    const T *z = a.z ? static_cast<const T *>(a.z) + i * a.headdim : nullptr;
    T d = static_cast<const T *>(a.dt)[i];
    if (a.scale) d *= static_cast<const T *>(a.scale)[i];
    if (a.bias) d += static_cast<const T *>(a.bias)[h];
    if (a.softplus) d = softplus1(d);
    d = d < T(a.low) ? T(a.low) : d > T(a.high) ? T(a.high) : d;
    T keep = exp1(d * static_cast<const T *>(a.A)[h]);
    T *state = static_cast<T *>(a.state) + i * a.headdim * a.states, *y = static_cast<T *>(a.y) + i * a.headdim;
    FlushSubnormals flush;
    for (int64_t p = 0; p < a.headdim; ++p) {
      y[p] = row(state + p * a.states, keep, d * x[p], k, q, a.states);
      if (D) y[p] += D[p] * x[p];
    }
    if (z)
      for (int64_t p = 0; p < a.headdim; p += W) {
        int n = int(min_of(W, a.headdim - p));
        (load(y + p, n) * silu(load(z + p, n))).store_n(y + p, n);
      }
  }

  static void mlstm(const MlstmStepArgs &a, int64_t i) {
    const T *q = static_cast<const T *>(a.q) + i * a.states, *k = static_cast<const T *>(a.k) + i * a.states, *v = static_cast<const T *>(a.v) + i * a.headdim;
    T &m = static_cast<T *>(a.m)[i];
    T in = static_cast<const T *>(a.i)[i], logf = m - softplus1(-static_cast<const T *>(a.f)[i]);
    T now = logf > in ? logf : in, keep = exp1(logf - now), add = exp1(in - now);
    m = now;
    FlushSubnormals flush;
    T total = row(static_cast<T *>(a.n) + i * a.states, keep, add, k, q, a.states) * T(a.scale);
    T least = exp1(-now);
    total = total < 0 ? -total : total;
    T factor = T(a.scale) / ((total > least ? total : least) + T(a.eps));
    T *C = static_cast<T *>(a.C) + i * a.headdim * a.states, *y = static_cast<T *>(a.y) + i * a.headdim;
    for (int64_t p = 0; p < a.headdim; ++p) y[p] = factor * row(C + p * a.states, keep, add * v[p], k, q, a.states);
  }
};

// Few small states are not worth waking threads for.
ZK_INLINE int64_t useful(int64_t threads, int64_t bytes) { return bytes < 1 << 19 ? 1 : threads; }

} // namespace ZK_NAMESPACE

ZK_EXPORT(ssd_step)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const SsdStepArgs &a = *reinterpret_cast<const SsdStepArgs *>(p);
  int64_t count = a.batch * a.heads, threads = useful(a.threads, count * a.headdim * a.states * 4);
  if (a.dual) parallel(threads, count, [&](int64_t i) { StateStep<VD>::ssd(a, i); });
  else parallel(threads, count, [&](int64_t i) { StateStep<VF>::ssd(a, i); });
  return ZK_OK;
}

ZK_EXPORT(mlstm_step)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const MlstmStepArgs &a = *reinterpret_cast<const MlstmStepArgs *>(p);
  int64_t count = a.batch * a.heads, threads = useful(a.threads, count * a.headdim * a.states * 4);
  if (a.dual) parallel(threads, count, [&](int64_t i) { StateStep<VD>::mlstm(a, i); });
  else parallel(threads, count, [&](int64_t i) { StateStep<VF>::mlstm(a, i); });
  return ZK_OK;
}
