// A few rows times a matrix, for decoding: reading the weights is what takes the time, so they are read once, as they are
// stored, by as many threads as there are.

#include "vec.h"

namespace ZK_NAMESPACE {

struct LinearArgs {
  int64_t rows, features, out, threads, dual;
  const void *x;  // (rows, features) of the working type, contiguous
  const void *weight;
  int64_t w_dtype, w_o;
  const void *bias, *scale;  // (out) of the working type, or null
  void *y;                   // (rows, out), contiguous
  int64_t y_dtype;
};

template <class V, int64_t kType> struct Linear {
  using T = typename V::T;
  static constexpr int W = V::W;

  // R rows of x with one row of the weights, Q vectors of it at a time, each with a sum of its own. Rows follow each other
  // in memory, so one stream runs through the weights; it is fetched ahead by hand, for prefetchers stop at every page.
  template <int R> static ZK_INLINE void dot(const LinearArgs &a, int64_t r, int64_t o) {
    constexpr int Q = R == 1 ? 8 : R == 2 ? 4 : 2;
    constexpr int64_t kAhead = 4096;  // bytes
    const T *x = static_cast<const T *>(a.x) + r * a.features;
    const char *w = at(a.weight, o * a.w_o, kType);
    V sum[R][Q];
    ZK_UNROLL
    for (int i = 0; i < R; ++i) {
      ZK_UNROLL
      for (int q = 0; q < Q; ++q) sum[i][q] = zero<V>();
    }
    int64_t k = 0;
    for (; k + Q * W <= a.features; k += Q * W) {
      const char *next = at(w, k, kType) + kAhead;
      for (int64_t line = 0; line < Q * W * size_of(kType); line += 64) ZK_PREFETCH(next + line);
      ZK_UNROLL
      for (int q = 0; q < Q; ++q) {
        V wide = load_as<V>(at(w, k + q * W, kType), kType, W);
        ZK_UNROLL
        for (int i = 0; i < R; ++i) sum[i][q] = fma(wide, V::load(x + i * a.features + k + q * W), sum[i][q]);
      }
    }
    for (; k < a.features; k += W) {
      int n = int(min_of(W, a.features - k));
      V wide = load_as<V>(at(w, k, kType), kType, n);
      ZK_UNROLL
      for (int i = 0; i < R; ++i) sum[i][0] = fma(wide, V::load_n(x + i * a.features + k, n), sum[i][0]);
    }
    ZK_UNROLL
    for (int i = 0; i < R; ++i) {
      ZK_UNROLL
      for (int q = 1; q < Q; ++q) sum[i][0] = sum[i][0] + sum[i][q];
      T y = sum[i][0].sum();
      if (a.scale) y *= static_cast<const T *>(a.scale)[o];
      if (a.bias) y += static_cast<const T *>(a.bias)[o];
      store_as<V>(V::set1(y), at(a.y, (r + i) * a.out + o, a.y_dtype), a.y_dtype, 1);
    }
  }
  template <int R> static void span(const LinearArgs &a, int64_t r, int64_t first, int64_t end) {
    for (int64_t o = first; o < end; ++o) dot<R>(a, r, o);
  }
  static int64_t run(const LinearArgs &a) {
    int64_t bytes = a.features * size_of(kType);
    int64_t each = 262144 / (bytes > 0 ? bytes : 1) + 1;  // about 256 KB of weights in a work item
    int64_t threads = a.out * bytes < 65536 ? 1 : a.threads;
    parallel(threads, ceil_div(a.out, each), [&](int64_t i) {
      int64_t first = i * each, end = min_of(first + each, a.out), r = 0;
      for (; r + 4 <= a.rows; r += 4) span<4>(a, r, first, end);
      if (r + 2 <= a.rows) { span<2>(a, r, first, end); r += 2; }
      if (r < a.rows) span<1>(a, r, first, end);
    });
    return ZK_OK;
  }
};

template <class V> int64_t linear(const LinearArgs &a) {
  switch (a.w_dtype) {
  case ZK_F32: return Linear<V, ZK_F32>::run(a);
  case ZK_F64: return Linear<V, ZK_F64>::run(a);
  case ZK_BF16: return Linear<V, ZK_BF16>::run(a);
  case ZK_F16: return Linear<V, ZK_F16>::run(a);
  default: return Linear<V, ZK_I8>::run(a);
  }
}

} // namespace ZK_NAMESPACE

ZK_EXPORT(linear)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LinearArgs &f = *reinterpret_cast<const LinearArgs *>(a);
  return f.dual ? linear<VD>(f) : linear<VF>(f);
}
