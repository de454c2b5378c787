// Decoding steps of ssd and the mLSTM: the state (batch, heads, headdim, states) is read and written once, where it lies.
// All tensors are contiguous and of the working type.

#include "vec.h"

namespace ZK_NAMESPACE {

struct SsdStepArgs {
  int64_t batch, heads, headdim, groups, states, threads, dual, softplus;
  double low, high;
  const void *x, *dt, *A, *B, *C, *D, *z, *bias, *scale;  // D, z, bias, scale may be null
  void *state, *y;
  int64_t wide_D;  // D is (heads, headdim) rather than (heads)
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

  static constexpr int kRows = 4;  // rows of a state at a time: they share the loads of k and q

  // h = keep h + v k, y = h . q for every row h of a state and its number v.
  static void rows(T *h, T keep, const T *v, T factor, const T *k, const T *q, int64_t count, int64_t states, T *y) {
    int64_t p = 0, whole = states / W * W;
    V a = V::set1(keep);
    for (; p + kRows <= count; p += kRows) {
      T *line[kRows];
      V b[kRows], sum[kRows];
      ZK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        line[r] = h + (p + r) * states;
        b[r] = V::set1(factor * v[p + r]);
        sum[r] = zero<V>();
      }
      for (int64_t j = 0; j < whole; j += W) {
        V kj = V::load(k + j), qj = V::load(q + j);
        ZK_UNROLL
        for (int r = 0; r < kRows; ++r) {
          V x = fma(a, V::load(line[r] + j), b[r] * kj);
          x.store(line[r] + j);
          sum[r] = fma(x, qj, sum[r]);
        }
      }
      if (whole < states) {
        int n = int(states - whole);
        V kj = V::load_n(k + whole, n), qj = V::load_n(q + whole, n);
        ZK_UNROLL
        for (int r = 0; r < kRows; ++r) {
          V x = fma(a, V::load_n(line[r] + whole, n), b[r] * kj);
          x.store_n(line[r] + whole, n);
          sum[r] = fma(x, qj, sum[r]);
        }
      }
      ZK_UNROLL
      for (int r = 0; r < kRows; ++r) y[p + r] = sum[r].sum();
    }
    for (; p < count; ++p) y[p] = row(h + p * states, keep, factor * v[p], k, q, states);
  }

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
    const T *x = static_cast<const T *>(a.x) + i * a.headdim, *D = a.D ? static_cast<const T *>(a.D) + (a.wide_D ? h * a.headdim : h) : nullptr;
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
    rows(state, keep, x, d, k, q, a.headdim, a.states, y);
    if (D)
      for (int64_t p = 0; p < a.headdim; ++p) y[p] += D[a.wide_D ? p : 0] * x[p];
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
    rows(C, keep, v, add, k, q, a.headdim, a.states, y);
    for (int64_t p = 0; p < a.headdim; ++p) y[p] *= factor;
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
