// RMS (or, centred, layer) normalisation over groups of channels, with a SiLU gate before or after it.

#include "vec.h"

namespace ZK_NAMESPACE {

struct NormArgs {
  int64_t rows, dim, groups, before_gate, centred, threads, dual;
  const void *x;  // (rows, dim), row stride below, last axis contiguous
  int64_t x_dtype, x_r;
  const void *z;  // likewise, or null
  int64_t z_dtype, z_r;
  const void *weight;  // (dim) or null, of the working type
  const void *bias;    // (dim) or null, of the working type
  const double *eps;
};
struct NormForward {
  NormArgs norm;
  void *y;  // (rows, dim), contiguous
  int64_t y_dtype;
};
struct NormBackward {
  NormArgs norm;
  const void *dy;
  int64_t dy_dtype, dy_r;
  void *dx;  // (rows, dim), contiguous, of x's type
  void *dz;  // (rows, dim), contiguous, of z's type, or null
  void *dweight;  // (parts, dim) of the working type, or null: one part for each work item
  void *dbias;    // likewise
  int64_t parts;
};

template <class V> struct Norm {
  using T = typename V::T;
  static constexpr int W = V::W;

  static ZK_INLINE V part(const void *p, int64_t i, int n) {
    const T *q = static_cast<const T *>(p) + i;
    return n == W ? V::load(q) : V::load_n(q, n);
  }
  static ZK_INLINE void put(T *q, V v, int n) {
    if (n == W) v.store(q);
    else v.store_n(q, n);
  }

  // u (dim): what is normalised, x or x silu(z); mean and 1 / deviation of group g.
  static ZK_INLINE void statistics(const NormArgs &a, T *u, int64_t g, T &mean, T &scale) {
    int64_t size = a.dim / a.groups;
    const T *p = u + g * size;
    mean = T(0);
    if (a.centred) {
      V sum = zero<V>();
      for (int64_t c = 0; c < size; c += W) sum = sum + part(p, c, int(min_of(W, size - c)));
      mean = sum.sum() / T(size);
    }
    V squares = zero<V>(), m = V::set1(mean);
    for (int64_t c = 0; c < size; c += W) {
      int n = int(min_of(W, size - c));
      V d = part(p, c, n) - m;
      if (n < W) {  // the lanes beyond the end hold -mean
        T t[W];
        d.store(t);
        for (int i = n; i < W; ++i) t[i] = T(0);
        d = V::load(t);
      }
      squares = fma(d, d, squares);
    }
    scale = T(1) / T(sqrt(double(squares.sum()) / double(size) + *a.eps));
  }
  static ZK_INLINE void input(const NormArgs &a, int64_t r, T *u) {
    for (int64_t c = 0; c < a.dim; c += W) {
      int n = int(min_of(W, a.dim - c));
      V x = load_as<V>(at(a.x, r * a.x_r + c, a.x_dtype), a.x_dtype, n);
      if (a.z && !a.before_gate) x = x * silu(load_as<V>(at(a.z, r * a.z_r + c, a.z_dtype), a.z_dtype, n));
      put(u + c, x, n);
    }
  }

  static int64_t forward(const NormForward &f) {
    const NormArgs &a = f.norm;
    int64_t span = a.dim > 0 ? 1 + 16384 / a.dim : 1, items = ceil_div(a.rows, span);
    int64_t size = a.dim / a.groups, failed = 0;
    parallel(a.threads, items, [&](int64_t item) {
      Scratch<T> u(a.dim + W);
      if (!u.data) {
        failed = 1;
        return;
      }
      for (int64_t r = item * span; r < min_of((item + 1) * span, a.rows); ++r) {
        input(a, r, u.data);
        for (int64_t g = 0; g < a.groups; ++g) {
          T mean, scale;
          statistics(a, u.data, g, mean, scale);
          V m = V::set1(mean), s = V::set1(scale);
          for (int64_t c = g * size; c < (g + 1) * size; c += W) {
            int n = int(min_of(W, (g + 1) * size - c));
            V v = (part(u.data, c, n) - m) * s;
            if (a.weight) v = v * part(a.weight, c, n);
            if (a.bias) v = v + part(a.bias, c, n);
            if (a.z && a.before_gate) v = v * silu(load_as<V>(at(a.z, r * a.z_r + c, a.z_dtype), a.z_dtype, n));
            store_as(v, at(f.y, r * a.dim + c, f.y_dtype), f.y_dtype, n);
          }
        }
      }
    });
    return failed ? ZK_NO_MEMORY : ZK_OK;
  }

  // With v = (u - mean) scale, w = v weight + bias: dv = dw weight, du = scale (dv - mean(dv) [centred] - v mean(dv v)).
  static int64_t backward(const NormBackward &f) {
    const NormArgs &a = f.norm;
    int64_t size = a.dim / a.groups, failed = 0;
    parallel(a.threads, f.parts, [&](int64_t item) {
      Scratch<T> memory(2 * (a.dim + W));
      if (!memory.data) {
        failed = 1;
        return;
      }
      T *u = memory.data, *dv = memory.data + (a.dim + W + 15) / 16 * 16;
      T *dweight = f.dweight ? static_cast<T *>(f.dweight) + item * a.dim : nullptr;
      T *dbias = f.dbias ? static_cast<T *>(f.dbias) + item * a.dim : nullptr;
      for (int64_t c = 0; c < a.dim; ++c) {
        if (dweight) dweight[c] = T(0);
        if (dbias) dbias[c] = T(0);
      }
      int64_t last = (item + 1) * a.rows / f.parts;
      for (int64_t r = item * a.rows / f.parts; r < last; ++r) {
        input(a, r, u);
        for (int64_t g = 0; g < a.groups; ++g) {
          T mean, scale;
          statistics(a, u, g, mean, scale);
          V m = V::set1(mean), s = V::set1(scale), along = zero<V>(), level = zero<V>();
          for (int64_t c = g * size; c < (g + 1) * size; c += W) {
            int n = int(min_of(W, (g + 1) * size - c));
            V v = (part(u, c, n) - m) * s, d = load_as<V>(at(f.dy, r * f.dy_r + c, f.dy_dtype), f.dy_dtype, n);
            if (a.z && a.before_gate) {
              V z = load_as<V>(at(a.z, r * a.z_r + c, a.z_dtype), a.z_dtype, n), sg = sigmoid(z);
              if (f.dz) {
                V w = a.weight ? v * part(a.weight, c, n) : v;
                if (a.bias) w = w + part(a.bias, c, n);
                V slope = sg * fma(z, V::set1(1) - sg, V::set1(1));
                store_as(d * w * slope, at(f.dz, r * a.dim + c, a.z_dtype), a.z_dtype, n);
              }
              d = d * z * sg;
            }
            if (dbias) put(dbias + c, part(dbias, c, n) + d, n);
            if (dweight) put(dweight + c, fma(d, v, part(dweight, c, n)), n);
            if (a.weight) d = d * part(a.weight, c, n);
            put(dv + c, d, n);
            V t = d * v;  // lanes beyond the end are 0 in d
            along = along + t;
            level = level + d;
          }
          V p = V::set1(along.sum() / T(size)), q = V::set1(a.centred ? level.sum() / T(size) : T(0));
          for (int64_t c = g * size; c < (g + 1) * size; c += W) {
            int n = int(min_of(W, (g + 1) * size - c));
            V v = (part(u, c, n) - m) * s;
            V d = s * (part(dv, c, n) - q - v * p);
            if (a.z && !a.before_gate) {
              V z = load_as<V>(at(a.z, r * a.z_r + c, a.z_dtype), a.z_dtype, n), sg = sigmoid(z);
              if (f.dz) {
                V x = load_as<V>(at(a.x, r * a.x_r + c, a.x_dtype), a.x_dtype, n);
                V slope = sg * fma(z, V::set1(1) - sg, V::set1(1));
                store_as(d * x * slope, at(f.dz, r * a.dim + c, a.z_dtype), a.z_dtype, n);
              }
              d = d * z * sg;
            }
            store_as(d, at(f.dx, r * a.dim + c, a.x_dtype), a.x_dtype, n);
          }
        }
      }
    });
    return failed ? ZK_NO_MEMORY : ZK_OK;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(rms_norm_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const NormForward &f = *reinterpret_cast<const NormForward *>(a);
  return f.norm.dual ? Norm<VD>::forward(f) : Norm<VF>::forward(f);
}
ZK_EXPORT(rms_norm_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const NormBackward &f = *reinterpret_cast<const NormBackward *>(a);
  return f.norm.dual ? Norm<VD>::backward(f) : Norm<VF>::backward(f);
}
