// Cauchy sums over conjugate pairs, r = 2 sum_n v / (p - a q) + conj(v) / (p - conj(a) q), and their gradients.
// Vectors hold neighbouring nodes; nodes are padded to a multiple of 16 with p = 1, q = 0 (and a gradient of 0).

#include "vec.h"

namespace ZK_NAMESPACE {

struct CauchyArgs {
  int64_t heads, channels, modes, nodes, threads, dual;  // nodes: padded
  const void *v_re, *v_im;  // (heads, channels, modes), contiguous, all of the working type
  const void *a_re, *a_im;  // (channels, modes)
  const void *p_re, *p_im, *q_re, *q_im;  // (nodes)
};
struct CauchyForward {
  CauchyArgs sum;
  void *r_re, *r_im;  // (heads, channels, nodes)
};
struct CauchyBackward {
  CauchyArgs sum;
  const void *g_re, *g_im;  // (heads, channels, nodes)
  void *dv_re, *dv_im;      // (heads, channels, modes)
  void *da_re, *da_im;      // (channels, modes)
};

template <class V> struct C {  // a vector of complex numbers
  V re, im;
  static ZK_INLINE C load(const void *re, const void *im, int64_t i) {
    using T = typename V::T;
    return {V::load(static_cast<const T *>(re) + i), V::load(static_cast<const T *>(im) + i)};
  }
  static ZK_INLINE C one(const void *re, const void *im, int64_t i) {
    using T = typename V::T;
    return {V::set1(static_cast<const T *>(re)[i]), V::set1(static_cast<const T *>(im)[i])};
  }
};
template <class V> ZK_INLINE C<V> mul(C<V> x, C<V> y) { return {fma(x.re, y.re, zero<V>() - x.im * y.im), fma(x.re, y.im, x.im * y.re)}; }
template <class V> ZK_INLINE C<V> conj(C<V> x) { return {x.re, zero<V>() - x.im}; }
template <class V> ZK_INLINE C<V> reciprocal(C<V> x) {
  V s = V::set1(1) / fma(x.re, x.re, x.im * x.im);
  return {x.re * s, zero<V>() - x.im * s};
}
template <class V> ZK_INLINE void add_product(C<V> &sum, C<V> x, C<V> y) {  // sum += x y
  sum.re = fma(x.re, y.re, fma(zero<V>() - x.im, y.im, sum.re));
  sum.im = fma(x.re, y.im, fma(x.im, y.re, sum.im));
}
template <class V> ZK_INLINE C<V> minus_product(C<V> p, C<V> a, C<V> q) {  // p - a q
  C<V> r = mul(a, q);
  return {p.re - r.re, p.im - r.im};
}

constexpr int kHeads = 4;  // heads that share the reciprocals of a pass

template <class V> int64_t cauchy_forward(const CauchyForward &f) {
  using T = typename V::T;
  const CauchyArgs &s = f.sum;
  constexpr int64_t kSpan = 256;  // nodes of a work item
  int64_t spans = ceil_div(s.nodes, kSpan);
  parallel(s.threads, s.channels * spans, [&](int64_t item) {
    int64_t h = item / spans, first = item % spans * kSpan, last = min_of(first + kSpan, s.nodes);
    for (int64_t m0 = 0; m0 < s.heads; m0 += kHeads) {
      int count = int(min_of(kHeads, s.heads - m0));
      for (int64_t k = first; k < last; k += V::W) {
        C<V> p = C<V>::load(s.p_re, s.p_im, k), q = C<V>::load(s.q_re, s.q_im, k), sum[kHeads];
        for (int m = 0; m < kHeads; ++m) sum[m] = {zero<V>(), zero<V>()};
        for (int64_t n = 0; n < s.modes; ++n) {
          C<V> a = C<V>::one(s.a_re, s.a_im, h * s.modes + n);
          C<V> c = reciprocal(minus_product(p, a, q)), d = reciprocal(minus_product(p, conj(a), q));
          for (int m = 0; m < kHeads; ++m) {
            if (m >= count) break;
            C<V> v = C<V>::one(s.v_re, s.v_im, ((m0 + m) * s.channels + h) * s.modes + n);
            add_product(sum[m], v, c);
            add_product(sum[m], conj(v), d);
          }
        }
        for (int m = 0; m < count; ++m) {
          int64_t out = ((m0 + m) * s.channels + h) * s.nodes + k;
          (sum[m].re + sum[m].re).store(static_cast<T *>(f.r_re) + out);
          (sum[m].im + sum[m].im).store(static_cast<T *>(f.r_im) + out);
        }
      }
    }
  });
  return ZK_OK;
}

// With c, d the two reciprocals: dv = 2 sum_k g conj(c) + conj(g) d; da = 2 sum_m conj(v) sum_k g conj(q c^2) + conj(g) q d^2.
template <class V> int64_t cauchy_backward(const CauchyBackward &f) {
  using T = typename V::T;
  const CauchyArgs &s = f.sum;
  parallel(s.threads, s.channels, [&](int64_t h) {
    for (int64_t n = 0; n < s.modes; ++n) {
      C<V> a = C<V>::one(s.a_re, s.a_im, h * s.modes + n);
      T da_re = T(0), da_im = T(0);
      for (int64_t m0 = 0; m0 < s.heads; m0 += kHeads) {
        int count = int(min_of(kHeads, s.heads - m0));
        C<V> dv[kHeads], ds[kHeads];
        for (int m = 0; m < kHeads; ++m) dv[m] = ds[m] = {zero<V>(), zero<V>()};
        for (int64_t k = 0; k < s.nodes; k += V::W) {
          C<V> p = C<V>::load(s.p_re, s.p_im, k), q = C<V>::load(s.q_re, s.q_im, k);
          C<V> c = reciprocal(minus_product(p, a, q)), d = reciprocal(minus_product(p, conj(a), q));
          C<V> qc = mul(q, mul(c, c)), qd = mul(q, mul(d, d));
          for (int m = 0; m < kHeads; ++m) {
            if (m >= count) break;
            C<V> g = C<V>::load(f.g_re, f.g_im, ((m0 + m) * s.channels + h) * s.nodes + k);
            add_product(dv[m], g, conj(c));
            add_product(dv[m], conj(g), d);
            add_product(ds[m], g, conj(qc));
            add_product(ds[m], conj(g), qd);
          }
        }
        for (int m = 0; m < count; ++m) {
          int64_t i = ((m0 + m) * s.channels + h) * s.modes + n;
          static_cast<T *>(f.dv_re)[i] = 2 * dv[m].re.sum();
          static_cast<T *>(f.dv_im)[i] = 2 * dv[m].im.sum();
          T v_re = static_cast<const T *>(s.v_re)[i], v_im = static_cast<const T *>(s.v_im)[i];
          T s_re = ds[m].re.sum(), s_im = ds[m].im.sum();
          da_re += 2 * (v_re * s_re + v_im * s_im);
          da_im += 2 * (v_re * s_im - v_im * s_re);
        }
      }
      static_cast<T *>(f.da_re)[h * s.modes + n] = da_re;
      static_cast<T *>(f.da_im)[h * s.modes + n] = da_im;
    }
  });
  return ZK_OK;
}

} // namespace ZK_NAMESPACE

ZK_EXPORT(cauchy_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const CauchyForward &f = *reinterpret_cast<const CauchyForward *>(a);
  return f.sum.dual ? cauchy_forward<VD>(f) : cauchy_forward<VF>(f);
}
ZK_EXPORT(cauchy_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const CauchyBackward &f = *reinterpret_cast<const CauchyBackward *>(a);
  return f.sum.dual ? cauchy_backward<VD>(f) : cauchy_backward<VF>(f);
}
