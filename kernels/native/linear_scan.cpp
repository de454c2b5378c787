// h_t = a_t h_{t-1} + x_t in every channel by itself, real or complex, along a path; forward and backward.
//
// A work item is a block of channels of one sequence. Rows are read and written once, in order; the block's state stays in
// the nearest cache. Backward replays a chunk from the state that forward kept before it, then walks it backwards.

#include "vec.h"

namespace ZK_NAMESPACE {

constexpr int64_t kChunk = 64;  // CHUNK in ops/linear_scan/__init__.py

struct LinearArgs {
  int64_t batch, length, steps, channels, threads, dual, complex;
  const void *x;  // (batch, length, channels), strides below in elements (of pairs, if complex), last axis contiguous
  int64_t x_dtype, x_b, x_l;
  const void *a;  // likewise; strides are 0 where it is shared
  int64_t a_dtype, a_b, a_l;
  const int64_t *path;
  int64_t path_b, reverse;
  const uint8_t *resets;   // (batch, length) or null
  const int64_t *lengths;  // (batch) or null
  const void *init;        // (batch, channels) of the working type or null

  int64_t count(int64_t b) const { return lengths ? lengths[b] : steps; }
  int64_t chunks() const { return ceil_div(steps, kChunk); }
};
struct LinearForward {
  LinearArgs scan;
  void *h;  // (batch, length, channels), contiguous
  int64_t h_dtype;
  void *final_state;  // (batch, channels) or null, of the working type
  void *borders;      // (batch, chunks, channels) or null, of the working type
};
struct LinearBackward {
  LinearArgs scan;
  const void *borders;
  const void *dh;
  int64_t dh_dtype, dh_b, dh_l;
  const void *dfinal;  // (batch, channels) or null
  void *dx;            // (batch, length, channels), contiguous
  int64_t dx_dtype;
  void *da;  // (batch, length, channels) or, with da_rows 0, (batch, channels); contiguous; or null
  int64_t da_dtype, da_rows;
  void *dinit;  // (batch, channels) of the working type or null
};

struct LinearWalk {
  const int64_t *path;
  const uint8_t *flags;
  int64_t count, reverse;
  LinearWalk(const LinearArgs &a, int64_t b) : path(a.path ? a.path + b * a.path_b : nullptr),
      flags(a.resets ? a.resets + b * a.length : nullptr), count(a.count(b)), reverse(a.reverse) {}
  int64_t row(int64_t t) const {
    int64_t position = reverse ? count - 1 - t : t;
    return path ? path[position] : position;
  }
  bool reset(int64_t row) const { return flags && flags[row]; }
};

// -- one row of a block: n channels ------------------------------------------------------------------------------------

template <class V> struct RealRow {
  using T = typename V::T;
  static constexpr int64_t kWidth = 1;  // numbers of a channel

  // h = a h + x (a null: a reset), stored as a state and as output
  static ZK_INLINE void advance(const T *before, T *h, const void *a, int64_t a_dtype, const void *x, int64_t x_dtype, void *y, int64_t y_dtype, int64_t n) {
    for (int64_t c = 0; c < n; c += V::W) {
      int m = int(min_of(V::W, n - c));
      V v = load_as<V>(at(x, c, x_dtype), x_dtype, m);
      if (a) v = fma(load_as<V>(at(a, c, a_dtype), a_dtype, m), m == V::W ? V::load(before + c) : V::load_n(before + c, m), v);
      if (m == V::W) v.store(h + c);
      else v.store_n(h + c, m);
      if (y) store_as(v, at(y, c, y_dtype), y_dtype, m);
    }
  }
  // g += dy; dx = g; da (or a sum over steps) = g conj(h before); g = conj(a) g
  static ZK_INLINE void retreat(T *g, const T *before, const void *a, int64_t a_dtype, const void *dy, int64_t dy_dtype, void *dx, int64_t dx_dtype,
                                void *da, int64_t da_dtype, T *sum, int64_t n) {
    for (int64_t c = 0; c < n; c += V::W) {
      int m = int(min_of(V::W, n - c));
      V v = (m == V::W ? V::load(g + c) : V::load_n(g + c, m)) + load_as<V>(at(dy, c, dy_dtype), dy_dtype, m);
      store_as(v, at(dx, c, dx_dtype), dx_dtype, m);
      V d = a ? v * (m == V::W ? V::load(before + c) : V::load_n(before + c, m)) : zero<V>();
      if (da) store_as(d, at(da, c, da_dtype), da_dtype, m);
      if (sum) (V::load_n(sum + c, m) + d).store_n(sum + c, m);
      v = a ? v * load_as<V>(at(a, c, a_dtype), a_dtype, m) : zero<V>();
      if (m == V::W) v.store(g + c);
      else v.store_n(g + c, m);
    }
  }
};

// Interleaved pairs, all of the working type; the compiler vectorises these loops.
template <class E> struct ComplexRow {
  using T = E;
  static constexpr int64_t kWidth = 2;

  static inline void advance(const T *before, T *h, const void *av, int64_t, const void *xv, int64_t, void *yv, int64_t, int64_t n) {
    const T *ZK_RESTRICT x = static_cast<const T *>(xv);
    const T *ZK_RESTRICT a = static_cast<const T *>(av);
    T *y = static_cast<T *>(yv);
    if (!a) {
      for (int64_t i = 0; i < 2 * n; ++i) h[i] = x[i];
    } else {
      for (int64_t i = 0; i < 2 * n; i += 2) {
        T re = a[i] * before[i] - a[i + 1] * before[i + 1] + x[i];
        T im = a[i] * before[i + 1] + a[i + 1] * before[i] + x[i + 1];
        h[i] = re;
        h[i + 1] = im;
      }
    }
    if (y) memcpy(y, h, size_t(2 * n) * sizeof(T));
  }
  static inline void retreat(T *ZK_RESTRICT g, const T *ZK_RESTRICT before, const void *av, int64_t, const void *dyv, int64_t, void *dxv, int64_t,
                             void *dav, int64_t, T *sum, int64_t n) {
    const T *ZK_RESTRICT dy = static_cast<const T *>(dyv);
    const T *ZK_RESTRICT a = static_cast<const T *>(av);
    T *ZK_RESTRICT dx = static_cast<T *>(dxv);
    T *ZK_RESTRICT da = static_cast<T *>(dav);
    for (int64_t i = 0; i < 2 * n; ++i) dx[i] = g[i] = g[i] + dy[i];
    if (da)
      for (int64_t i = 0; i < 2 * n; i += 2) {
        da[i] = a ? g[i] * before[i] + g[i + 1] * before[i + 1] : T(0);
        da[i + 1] = a ? g[i + 1] * before[i] - g[i] * before[i + 1] : T(0);
      }
    if (sum && a)
      for (int64_t i = 0; i < 2 * n; i += 2) {
        sum[i] += g[i] * before[i] + g[i + 1] * before[i + 1];
        sum[i + 1] += g[i + 1] * before[i] - g[i] * before[i + 1];
      }
    if (!a) {
      for (int64_t i = 0; i < 2 * n; ++i) g[i] = T(0);
    } else {
      for (int64_t i = 0; i < 2 * n; i += 2) {
        T re = a[i] * g[i] + a[i + 1] * g[i + 1], im = a[i] * g[i + 1] - a[i + 1] * g[i];
        g[i] = re;
        g[i + 1] = im;
      }
    }
  }
};

// Channels of a block: at most `most`, and few enough that every thread has one.
inline int64_t block_of(const LinearArgs &a, int64_t most) {
  int64_t parts = ceil_div(a.channels, most), wanted = ceil_div(a.threads, a.batch > 0 ? a.batch : 1);
  if (parts < wanted) parts = wanted;
  int64_t block = (ceil_div(a.channels, parts) + 15) / 16 * 16;
  return block > 16 ? block : 16;
}

template <class Row> int64_t linear_forward(const LinearForward &f) {
  using T = typename Row::T;
  constexpr int64_t k = Row::kWidth;
  const LinearArgs &a = f.scan;
  int64_t block = block_of(a, 2048 / k), blocks = ceil_div(a.channels, block);
  parallel(a.threads, a.batch * blocks, [&](int64_t item) {
    FlushSubnormals flush;
    alignas(64) T h[2048];
    int64_t b = item / blocks, first = item % blocks * block, n = min_of(block, a.channels - first);
    LinearWalk w(a, b);
    size_t bytes = size_t(n * k) * sizeof(T);
    if (a.init) memcpy(h, static_cast<const T *>(a.init) + (b * a.channels + first) * k, bytes);
    else memset(h, 0, bytes);
    T *kept = f.borders ? static_cast<T *>(f.borders) + (b * a.chunks() * a.channels + first) * k : nullptr;
    for (int64_t t = 0; t < w.count; ++t) {
      if (kept && t % kChunk == 0) memcpy(kept + t / kChunk * a.channels * k, h, bytes);
      int64_t row = w.row(t);
      Row::advance(h, h, w.reset(row) ? nullptr : at(a.a, (b * a.a_b + row * a.a_l + first) * k, a.a_dtype), a.a_dtype,
                   at(a.x, (b * a.x_b + row * a.x_l + first) * k, a.x_dtype), a.x_dtype,
                   at(f.h, ((b * a.length + row) * a.channels + first) * k, f.h_dtype), f.h_dtype, n);
    }
    if (kept)
      for (int64_t chunk = ceil_div(w.count, kChunk); chunk < a.chunks(); ++chunk) memcpy(kept + chunk * a.channels * k, h, bytes);
    if (f.final_state) memcpy(static_cast<T *>(f.final_state) + (b * a.channels + first) * k, h, bytes);
  });
  return ZK_OK;
}

template <class Row> int64_t linear_backward(const LinearBackward &f) {
  using T = typename Row::T;
  constexpr int64_t k = Row::kWidth, kMost = 256 / k;
  const LinearArgs &a = f.scan;
  int64_t block = block_of(a, kMost), blocks = ceil_div(a.channels, block);
  parallel(a.threads, a.batch * blocks, [&](int64_t item) {
    FlushSubnormals flush;
    alignas(64) T states[(kChunk + 1) * 256];  // states[i]: before step i of the chunk
    alignas(64) T g[256];
    alignas(64) T sum[256];
    int64_t b = item / blocks, first = item % blocks * block, n = min_of(block, a.channels - first);
    LinearWalk w(a, b);
    size_t bytes = size_t(n * k) * sizeof(T);
    bool total = f.da && !f.da_rows;
    if (f.dfinal) memcpy(g, static_cast<const T *>(f.dfinal) + (b * a.channels + first) * k, bytes);
    else memset(g, 0, bytes);
    memset(sum, 0, bytes);
    const T *kept = static_cast<const T *>(f.borders) + (b * a.chunks() * a.channels + first) * k;
    for (int64_t chunk = ceil_div(w.count, kChunk) - 1; chunk >= 0; --chunk) {
      int64_t t0 = chunk * kChunk, t1 = min_of(t0 + kChunk, w.count);
      if (f.da) {
        memcpy(states, kept + chunk * a.channels * k, bytes);
        for (int64_t t = t0; t + 1 < t1; ++t) {
          int64_t row = w.row(t);
          T *before = states + (t - t0) * 256;
          Row::advance(before, before + 256, w.reset(row) ? nullptr : at(a.a, (b * a.a_b + row * a.a_l + first) * k, a.a_dtype), a.a_dtype,
                       at(a.x, (b * a.x_b + row * a.x_l + first) * k, a.x_dtype), a.x_dtype, nullptr, 0, n);
        }
      }
      for (int64_t t = t1 - 1; t >= t0; --t) {
        int64_t row = w.row(t), out = ((b * a.length + row) * a.channels + first) * k;
        Row::retreat(g, states + (t - t0) * 256, w.reset(row) ? nullptr : at(a.a, (b * a.a_b + row * a.a_l + first) * k, a.a_dtype), a.a_dtype,
                     at(f.dh, (b * f.dh_b + row * f.dh_l + first) * k, f.dh_dtype), f.dh_dtype, at(f.dx, out, f.dx_dtype), f.dx_dtype,
                     f.da && f.da_rows ? at(f.da, out, f.da_dtype) : nullptr, f.da_dtype, total ? sum : nullptr, n);
      }
    }
    if (total) memcpy(static_cast<T *>(f.da) + (b * a.channels + first) * k, sum, bytes);
    if (f.dinit) memcpy(static_cast<T *>(f.dinit) + (b * a.channels + first) * k, g, bytes);
  });
  return ZK_OK;
}

} // namespace ZK_NAMESPACE

ZK_EXPORT(linear_scan_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LinearForward &f = *reinterpret_cast<const LinearForward *>(a);
  if (f.scan.complex) return f.scan.dual ? linear_forward<ComplexRow<double>>(f) : linear_forward<ComplexRow<float>>(f);
  return f.scan.dual ? linear_forward<RealRow<VD>>(f) : linear_forward<RealRow<VF>>(f);
}
ZK_EXPORT(linear_scan_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LinearBackward &f = *reinterpret_cast<const LinearBackward *>(a);
  if (f.scan.complex) return f.scan.dual ? linear_backward<ComplexRow<double>>(f) : linear_backward<ComplexRow<float>>(f);
  return f.scan.dual ? linear_backward<RealRow<VD>>(f) : linear_backward<RealRow<VF>>(f);
}
