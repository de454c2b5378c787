// The causal depthwise convolution on a CPU: forward, backward, and one decoding step.

#include "vec.h"

namespace ZK_NAMESPACE {

struct ConvArgs {
  int64_t batch, length, steps, channels, width, silu, threads, dual;
  const void *x;  // (batch, length, channels), strides below, last axis contiguous
  int64_t x_dtype, x_b, x_l;
  const void *weight;  // (width, channels) of the working type, as are bias, init and final
  const void *bias;    // (channels) or null
  const int64_t *path;
  int64_t path_b, reverse;
  const uint8_t *resets;   // (batch, length) or null
  const int64_t *lengths;  // (batch) or null
  const void *init;        // (batch, width, channels) or null

  int64_t count(int64_t b) const { return lengths ? lengths[b] : steps; }
};
struct ConvForward {
  ConvArgs conv;
  void *y;  // (batch, length, channels), contiguous
  int64_t y_dtype;
  void *final_state;  // (batch, width, channels) or null
};
struct ConvBackward {
  ConvArgs conv;
  const void *dy;
  int64_t dy_dtype, dy_b, dy_l;
  const void *dfinal;  // (batch, width, channels) or null
  void *dx;            // (batch, length, channels), set to 0 by the caller; all of the working type
  void *dweight;       // (batch, width, channels), set to 0: one part for each sequence
  void *dbias;         // (batch, channels), set to 0, or null
  void *dinit;         // (batch, width, channels), set to 0, or null
};

// The order of one sequence. Step t < 0 is a row of the initial state.
struct Walk {
  const ConvArgs &a;
  const int64_t *path;
  const uint8_t *flags;
  int64_t b, count;
  Walk(const ConvArgs &args, int64_t batch) : a(args), path(args.path ? args.path + batch * args.path_b : nullptr),
      flags(args.resets ? args.resets + batch * args.length : nullptr), b(batch), count(args.count(batch)) {}
  int64_t row(int64_t t) const {
    int64_t position = a.reverse ? count - 1 - t : t;
    return path ? path[position] : position;
  }
  // The first step that step t may look at: width - 1 back, but not past a reset.
  int64_t reach(int64_t t) const {
    int64_t lowest = t - a.width + 1;
    if (flags)
      for (int64_t s = t; s > lowest && s >= 0; --s)
        if (flags[row(s)]) return s;
    return lowest;
  }
  // The first step that the final state (the last `width` rows) may show.
  int64_t kept() const {
    int64_t lowest = count - a.width;
    if (flags)
      for (int64_t s = count - 1; s > lowest && s >= 0; --s)
        if (flags[row(s)]) return s;
    return lowest;
  }
};

template <class V> struct Conv {
  using T = typename V::T;
  static constexpr int W = V::W;

  static ZK_INLINE V tap(const Walk &w, int64_t t, int64_t c, int n) {
    const ConvArgs &a = w.a;
    if (t >= 0) return load_as<V>(at(a.x, w.b * a.x_b + w.row(t) * a.x_l + c, a.x_dtype), a.x_dtype, n);
    if (!a.init) return zero<V>();
    const T *p = static_cast<const T *>(a.init) + (w.b * a.width + a.width + t) * a.channels + c;
    return n == W ? V::load(p) : V::load_n(p, n);
  }
  static ZK_INLINE V part(const void *p, int64_t i, int n) {
    const T *q = static_cast<const T *>(p) + i;
    return n == W ? V::load(q) : V::load_n(q, n);
  }
  static ZK_INLINE void add(void *p, int64_t i, V x, int n) {
    T *q = static_cast<T *>(p) + i;
    (V::load_n(q, n) + x).store_n(q, n);
  }

  static int64_t forward(const ConvForward &f) {
    const ConvArgs &a = f.conv;
    constexpr int64_t kSpan = 128;  // steps of a work item
    int64_t spans = ceil_div(a.steps, kSpan) + (a.steps == 0);
    parallel(a.threads, a.batch * spans, [&](int64_t item) {
      FlushSubnormals flush;
      Walk w(a, item / spans);
      int64_t first = item % spans * kSpan, last = min_of(first + kSpan, w.count);
      // A stretch of channels at a time, so that its last rows are still in the nearest cache for the next step.
      for (int64_t c0 = 0; c0 < a.channels; c0 += 512)
        for (int64_t t = first; t < last; ++t) {
          int64_t from = w.reach(t);
          char *out = at(f.y, (w.b * a.length + w.row(t)) * a.channels, f.y_dtype);
          const void *rows[8];  // null where the tap is an absent initial state or cut off by a reset
          int64_t kinds[8];
          int taps = int(a.width);
          for (int j = 0; j < taps; ++j) {
            int64_t s = t - taps + 1 + j;
            rows[j] = nullptr;
            kinds[j] = a.x_dtype;
            if (s < from) continue;
            if (s >= 0) rows[j] = at(a.x, w.b * a.x_b + w.row(s) * a.x_l, a.x_dtype);
            else if (a.init) {
              rows[j] = static_cast<const T *>(a.init) + (w.b * a.width + a.width + s) * a.channels;
              kinds[j] = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
            }
          }
          for (int64_t c = c0; c < min_of(c0 + 512, a.channels); c += W) {
            int n = int(min_of(W, a.channels - c));
            V sum = a.bias ? part(a.bias, c, n) : zero<V>();
            for (int j = 0; j < taps; ++j)
              if (rows[j]) sum = fma(part(a.weight, j * a.channels + c, n), load_as<V>(at(rows[j], c, kinds[j]), kinds[j], n), sum);
            store_as(a.silu ? silu(sum) : sum, at(out, c, f.y_dtype), f.y_dtype, n);
          }
        }
      if (f.final_state && item % spans == 0) {
        int64_t from = w.kept();
        for (int64_t j = 0; j < a.width; ++j) {
          int64_t s = w.count - a.width + j;
          for (int64_t c = 0; c < a.channels; c += W) {
            int n = int(min_of(W, a.channels - c));
            V x = s < from ? zero<V>() : tap(w, s, c, n);
            x.store_n(static_cast<T *>(f.final_state) + (w.b * a.width + j) * a.channels + c, n);
          }
        }
      }
    });
    return ZK_OK;
  }

  static int64_t backward(const ConvBackward &f) {
    const ConvArgs &a = f.conv;
    constexpr int64_t kBlock = 64;  // channels of a work item
    int64_t blocks = ceil_div(a.channels, kBlock);
    parallel(a.threads, a.batch * blocks, [&](int64_t item) {
      FlushSubnormals flush;
      Walk w(a, item / blocks);
      int64_t first = item % blocks * kBlock, end = min_of(first + kBlock, a.channels);
      for (int64_t t = 0; t < w.count; ++t) {
        int64_t from = w.reach(t), row = w.row(t);
        for (int64_t c = first; c < end; c += W) {
          int n = int(min_of(W, end - c));
          V g = load_as<V>(at(f.dy, w.b * f.dy_b + row * f.dy_l + c, f.dy_dtype), f.dy_dtype, n);
          V x[8];
          for (int64_t s = from; s <= t; ++s) x[s - t + a.width - 1] = tap(w, s, c, n);
          if (a.silu) {
            V sum = a.bias ? part(a.bias, c, n) : zero<V>();
            for (int64_t s = from; s <= t; ++s) sum = fma(part(a.weight, (s - t + a.width - 1) * a.channels + c, n), x[s - t + a.width - 1], sum);
            V sg = sigmoid(sum), one = V::set1(1);
            g = g * sg * fma(sum, one - sg, one);
          }
          if (f.dbias) add(f.dbias, w.b * a.channels + c, g, n);
          for (int64_t s = from; s <= t; ++s) {
            int64_t j = s - t + a.width - 1;
            add(f.dweight, (w.b * a.width + j) * a.channels + c, g * x[j], n);
            give(f, w, s, c, g * part(a.weight, j * a.channels + c, n), n);
          }
        }
      }
      if (f.dfinal) {
        int64_t from = w.kept();
        for (int64_t j = 0; j < a.width; ++j) {
          int64_t s = w.count - a.width + j;
          if (s < from) continue;
          for (int64_t c = first; c < end; c += W) {
            int n = int(min_of(W, end - c));
            give(f, w, s, c, part(f.dfinal, (w.b * a.width + j) * a.channels + c, n), n);
          }
        }
      }
    });
    return ZK_OK;
  }
  // Add to the gradient of what step s read.
  static ZK_INLINE void give(const ConvBackward &f, const Walk &w, int64_t s, int64_t c, V g, int n) {
    const ConvArgs &a = f.conv;
    if (s >= 0) add(f.dx, (w.b * a.length + w.row(s)) * a.channels + c, g, n);
    else if (f.dinit) add(f.dinit, (w.b * a.width + a.width + s) * a.channels + c, g, n);
  }
};

struct ConvStep {
  int64_t batch, channels, width, silu, threads, dual;
  const void *x;  // (batch, channels)
  int64_t x_dtype, x_b;
  const void *weight;  // (channels, width)
  int64_t w_dtype, w_c, w_w;
  const void *bias;
  int64_t bias_dtype;
  void *state;  // (batch, width, channels) of the working type, contiguous
  void *y;      // (batch, channels)
  int64_t y_dtype;
};

template <class V> int64_t conv_step(const ConvStep &f) {
  using T = typename V::T;
  constexpr int W = V::W;
  int64_t blocks = ceil_div(f.channels, 1024);
  parallel(f.threads, f.batch * blocks, [&](int64_t item) {
    int64_t b = item / blocks, first = item % blocks * 1024, end = min_of(first + 1024, f.channels);
    T *state = static_cast<T *>(f.state) + b * f.width * f.channels;
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      V sum = f.bias ? load_as<V>(at(f.bias, c, f.bias_dtype), f.bias_dtype, n) : zero<V>();
      for (int64_t j = 0; j < f.width; ++j) {
        V row = j + 1 < f.width ? V::load_n(state + (j + 1) * f.channels + c, n) : load_as<V>(at(f.x, b * f.x_b + c, f.x_dtype), f.x_dtype, n);
        row.store_n(state + j * f.channels + c, n);
        T w[W];
        for (int i = 0; i < W; ++i) w[i] = i < n ? read_as<T>(f.weight, (c + i) * f.w_c + j * f.w_w, f.w_dtype) : T(0);
        sum = fma(V::load(w), row, sum);
      }
      store_as(f.silu ? silu(sum) : sum, at(f.y, b * f.channels + c, f.y_dtype), f.y_dtype, n);
    }
  });
  return ZK_OK;
}

} // namespace ZK_NAMESPACE

ZK_EXPORT(causal_conv1d_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const ConvForward &f = *reinterpret_cast<const ConvForward *>(a);
  return f.conv.dual ? Conv<VD>::forward(f) : Conv<VF>::forward(f);
}
ZK_EXPORT(causal_conv1d_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const ConvBackward &f = *reinterpret_cast<const ConvBackward *>(a);
  return f.conv.dual ? Conv<VD>::backward(f) : Conv<VF>::backward(f);
}
ZK_EXPORT(causal_conv1d_step)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const ConvStep &f = *reinterpret_cast<const ConvStep *>(a);
  return f.dual ? conv_step<VD>(f) : conv_step<VF>(f);
}
