// The causal depthwise convolution on a CPU: forward, backward, and one decoding step.

#include "vec.h"

namespace ZK_NAMESPACE {

struct ConvArgs {
  int64_t batch, length, steps, channels, width, paths, silu, threads, dual;
  const void *x;  // (batch, length, channels), strides below, last axis contiguous; shared by the paths
  int64_t x_dtype, x_b, x_l;
  const void *weight;  // (paths, channels, width) of any type, strides below
  int64_t w_dtype, w_p, w_c, w_w;
  const void *bias;  // (paths, channels) or null, of the working type, as are init and final
  const int64_t *path;  // (1 or batch, paths, steps) or null
  int64_t path_b, reverse;  // bit k: path k is walked from its end
  const uint8_t *resets;    // (batch, length) or null
  const int64_t *lengths;   // (batch) or null
  const void *init;         // (batch, paths, width, channels) or null

  int64_t count(int64_t b) const { return lengths ? lengths[b] : steps; }
  // Below some ten thousand numbers a second thread costs more than it brings.
  int64_t useful_threads() const { return batch * paths * steps * channels < 49152 ? 1 : threads; }
};
struct ConvForward {
  ConvArgs conv;
  void *y;  // (batch, length, paths, channels), contiguous
  int64_t y_dtype;
  void *final_state;  // (batch, paths, width, channels) or null
};
struct ConvBackward {
  ConvArgs conv;
  const void *dy;  // (batch, length, paths, channels), strides below
  int64_t dy_dtype, dy_b, dy_l, dy_p;
  const void *dfinal;  // (batch, paths, width, channels) or null
  void *dx;            // (batch, length, channels), all of the working type; rows that no step visits stay as they are
  void *dweight;       // (batch, paths, width, channels): one part for each sequence
  void *dbias;         // (batch, paths, channels) or null
  void *dinit;         // (batch, paths, width, channels), set to 0, or null
};

// The order of one sequence along one path. Step t < 0 is a row of the initial state.
struct Walk {
  const ConvArgs &a;
  const int64_t *path;
  const uint8_t *flags;
  int64_t b, k, count;
  bool reverse;
  Walk(const ConvArgs &args, int64_t batch, int64_t k_) : a(args),
      path(args.path ? args.path + batch * args.path_b + k_ * args.steps : nullptr),
      flags(args.resets ? args.resets + batch * args.length : nullptr), b(batch), k(k_), count(args.count(batch)),
      reverse(args.reverse >> k_ & 1) {}
  int64_t row(int64_t t) const {
    int64_t position = reverse ? count - 1 - t : t;
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
  // Whether each of the steps t .. t + n - 1 sees `width` rows of x: no initial state, no reset between them.
  bool plain(int64_t t, int64_t n) const {
    if (t < a.width - 1) return false;
    if (flags)
      for (int64_t s = t - a.width + 2; s < t + n; ++s)
        if (flags[row(s)]) return false;
    return true;
  }
};

template <class V> struct Conv {
  using T = typename V::T;
  static constexpr int W = V::W;
  static constexpr int64_t kOwn = sizeof(T) == 4 ? ZK_F32 : ZK_F64;

  static ZK_INLINE V part(const void *p, int64_t i, int n) {
    const T *q = static_cast<const T *>(p) + i;
    return n == W ? V::load(q) : V::load_n(q, n);
  }
  static ZK_INLINE void put(void *p, int64_t i, V x, int n) {
    T *q = static_cast<T *>(p) + i;
    if (n == W) x.store(q);
    else x.store_n(q, n);
  }
  static ZK_INLINE void add(void *p, int64_t i, V x, int n) { put(p, i, part(p, i, n) + x, n); }

  // The weights as (paths, width, channels) of the working type, so that a vector of channels is one load.
  static void taps(const ConvArgs &a, T *out) {
    for (int64_t k = 0; k < a.paths; ++k)
      for (int64_t j = 0; j < a.width; ++j) {
        T *row = out + (k * a.width + j) * a.channels;
        int64_t from = k * a.w_p + j * a.w_w;
        if (a.w_dtype == kOwn)
          for (int64_t c = 0; c < a.channels; ++c) row[c] = static_cast<const T *>(a.weight)[from + c * a.w_c];
        else
          for (int64_t c = 0; c < a.channels; ++c) row[c] = read_as<T>(a.weight, from + c * a.w_c, a.w_dtype);
      }
  }
  static ZK_INLINE const char *x_row(const Walk &w, int64_t t) { return at(w.a.x, w.b * w.a.x_b + w.row(t) * w.a.x_l, w.a.x_dtype); }
  static ZK_INLINE const T *init_row(const Walk &w, int64_t t) {
    return static_cast<const T *>(w.a.init) + ((w.b * w.a.paths + w.k) * w.a.width + w.a.width + t) * w.a.channels;
  }
  // What step t reads, t < 0 included.
  static ZK_INLINE V tap(const Walk &w, int64_t t, int64_t c, int n) {
    if (t >= 0) return load_as<V>(at(x_row(w, t), c, w.a.x_dtype), w.a.x_dtype, n);
    return w.a.init ? part(init_row(w, t), c, n) : zero<V>();
  }

  // -- forward

  static constexpr int kTile = 4;  // steps at a time: they share the rows they look at, and their sigmoids overlap

  // kTile plain steps for n channels from c on. rows: the kWidth - 1 + kTile rows that they see, oldest first.
  template <int64_t kType, int kWidth>
  static ZK_INLINE void tile(const ConvArgs &a, const char *const *rows, char *const *outs, const T *weight, const T *bias, int64_t c, int n) {
    V w[kWidth], x[kWidth - 1 + kTile], start = bias ? part(bias, c, n) : zero<V>();
    ZK_UNROLL
    for (int j = 0; j < kWidth; ++j) w[j] = part(weight, j * a.channels + c, n);
    ZK_UNROLL
    for (int i = 0; i < kWidth - 1 + kTile; ++i) x[i] = load_as<V>(at(rows[i], c, kType), kType, n);
    ZK_UNROLL
    for (int i = 0; i < kTile; ++i) {
      V sum = start;
      ZK_UNROLL
      for (int j = 0; j < kWidth; ++j) sum = fma(w[j], x[i + j], sum);
      store_as(a.silu ? silu(sum) : sum, at(outs[i], c, kType), kType, n);
    }
  }

  // Any one step: taps may be rows of the initial state, or missing (null).
  static void one(const ConvForward &f, const Walk &w, int64_t t, const T *weight, const T *bias, int64_t c0, int64_t c1) {
    const ConvArgs &a = f.conv;
    int64_t from = w.reach(t);
    char *out = at(f.y, ((w.b * a.length + w.row(t)) * a.paths + w.k) * a.channels, f.y_dtype);
    const void *rows[8];
    int64_t kinds[8];
    int width = int(a.width);
    for (int j = 0; j < width; ++j) {
      int64_t s = t - width + 1 + j;
      rows[j] = nullptr;
      kinds[j] = s >= 0 ? a.x_dtype : kOwn;
      if (s < from) continue;
      if (s >= 0) rows[j] = x_row(w, s);
      else if (a.init) rows[j] = init_row(w, s);
    }
    for (int64_t c = c0; c < c1; c += W) {
      int n = int(min_of(W, c1 - c));
      V sum = bias ? part(bias, c, n) : zero<V>();
      for (int j = 0; j < width; ++j)
        if (rows[j]) sum = fma(part(weight, j * a.channels + c, n), load_as<V>(at(rows[j], c, kinds[j]), kinds[j], n), sum);
      store_as(a.silu ? silu(sum) : sum, at(out, c, f.y_dtype), f.y_dtype, n);
    }
  }

  // Steps first .. last - 1. kWidth 0: any width, step by step.
  template <int64_t kType, int kWidth> static void steps(const ConvForward &f, const Walk &w, int64_t first, int64_t last, const T *weight, const T *bias) {
    const ConvArgs &a = f.conv;
    // A stretch of channels at a time, so that its last rows are still in the nearest cache for the next steps.
    for (int64_t c0 = 0; c0 < a.channels; c0 += 768) {
      int64_t c1 = min_of(c0 + 768, a.channels), t = first;
      while (t < last) {
        if constexpr (kWidth > 0) {
          if (t + kTile <= last && w.plain(t, kTile)) {
            const char *rows[kWidth - 1 + kTile];
            char *outs[kTile];
            for (int i = 0; i < kWidth - 1 + kTile; ++i) rows[i] = x_row(w, t - kWidth + 1 + i);
            for (int i = 0; i < kTile; ++i) outs[i] = at(f.y, ((w.b * a.length + w.row(t + i)) * a.paths + w.k) * a.channels, kType);
            int64_t c = c0;
            for (; c + W <= c1; c += W) tile<kType, kWidth>(a, rows, outs, weight, bias, c, W);
            if (c < c1) tile<kType, kWidth>(a, rows, outs, weight, bias, c, int(c1 - c));
            t += kTile;
            continue;
          }
        }
        one(f, w, t, weight, bias, c0, c1);
        ++t;
      }
    }
  }
  using Steps = void (*)(const ConvForward &, const Walk &, int64_t, int64_t, const T *, const T *);
  template <int64_t kType> static Steps steps_for(int64_t width) {
    return width == 4 ? steps<kType, 4> : width == 3 ? steps<kType, 3> : width == 2 ? steps<kType, 2> : steps<kType, 0>;
  }

  static int64_t forward(const ConvForward &f) {
    const ConvArgs &a = f.conv;
    Scratch<T> weight(a.paths * a.width * a.channels);
    if (!weight.data) return ZK_NO_MEMORY;
    taps(a, weight.data);
    Steps run = a.x_dtype != f.y_dtype ? steps<kOwn, 0> : a.x_dtype == kOwn ? steps_for<kOwn>(a.width) : steps<kOwn, 0>;
    if constexpr (sizeof(T) == 4) {
      if (a.x_dtype == f.y_dtype && a.x_dtype == ZK_BF16) run = steps_for<ZK_BF16>(a.width);
      if (a.x_dtype == f.y_dtype && a.x_dtype == ZK_F16) run = steps_for<ZK_F16>(a.width);
    }
    int64_t threads = a.useful_threads(), walks = a.batch * a.paths;
    int64_t spans = threads == 1 || walks == 0 ? 1 : min_of(ceil_div(4 * threads, walks), ceil_div(a.steps, 16));
    if (spans < 1) spans = 1;
    int64_t span = ceil_div(a.steps, spans);
    parallel(threads, walks * spans, [&](int64_t item) {
      FlushSubnormals flush;
      int64_t b = item / spans / a.paths, k = item / spans % a.paths;
      Walk w(a, b, k);
      const T *bias = a.bias ? static_cast<const T *>(a.bias) + k * a.channels : nullptr;
      int64_t first = item % spans * span, last = min_of(first + span, w.count);
      run(f, w, first, last, weight.data + k * a.width * a.channels, bias);
      if (f.final_state && item % spans == 0) {
        int64_t from = w.kept();
        for (int64_t j = 0; j < a.width; ++j) {
          int64_t s = w.count - a.width + j;
          for (int64_t c = 0; c < a.channels; c += W) {
            int n = int(min_of(W, a.channels - c));
            put(f.final_state, ((b * a.paths + k) * a.width + j) * a.channels + c, s < from ? zero<V>() : tap(w, s, c, n), n);
          }
        }
      }
    });
    return ZK_OK;
  }

  // -- backward

  static constexpr int64_t kBlock = 64, kStretch = 32;  // channels of a work item; steps between two visits of a vector

  // What one vector of channels carries from step to step. A window of kW steps, the newest last, slides along the walk.
  template <int kW> struct Carry {
    T seen[kW][kBlock];     // the rows that it shows
    T pending[kW][kBlock];  // the gradients of these rows, complete when they leave it
    T dweight[kW][kBlock];
    T dbias[kBlock];
  };

  // `first`: the oldest place of the window that this step looks at (0: all; larger after a reset or at the start).
  template <int kW> static ZK_INLINE void advance(const ConvArgs &a, const V (&w)[kW], V bias, V (&x)[kW], V (&p)[kW], V (&dw)[kW], V &db, V g, int first) {
    if (a.silu) {
      V sum = bias;
      ZK_UNROLL
      for (int j = 0; j < kW; ++j)
        if (j >= first) sum = fma(w[j], x[j], sum);
      V sg = sigmoid(sum), one = V::set1(1);
      g = g * sg * fma(sum, one - sg, one);
    }
    db = db + g;
    ZK_UNROLL
    for (int j = 0; j < kW; ++j)
      if (j >= first) {
        dw[j] = fma(g, x[j], dw[j]);
        p[j] = fma(g, w[j], p[j]);
      }
  }

  template <int kW> static void backward_block(const ConvBackward &f, const Walk &w, const T *weight, int64_t first, int64_t end) {
    const ConvArgs &a = f.conv;
    const int outside = kW - int(a.width);  // places of the window that are never looked at
    Carry<kW> carry{};
    for (int j = outside + 1; j < kW && a.init; ++j)
      for (int64_t c = first; c < end; ++c) carry.seen[j][c - first] = init_row(w, j - kW)[c];
    // Shifted by one: seen[j] is what place j - 1 will show at the next step.
    int valid = a.init ? int(a.width) - 1 : 0;
    const void *bias = a.bias ? static_cast<const T *>(a.bias) + w.k * a.channels : nullptr;
    for (int64_t t0 = 0; t0 < w.count + kW - 1; t0 += kStretch) {
      int64_t t1 = min_of(t0 + kStretch, w.count + kW - 1);  // the last kW - 1 only let the window run out
      const char *rows[kStretch], *grads[kStretch];
      T *outs[kStretch];
      int firsts[kStretch];
      for (int64_t t = t0; t < t1; ++t) {
        int i = int(t - t0);
        int64_t s = t - kW + 1;  // leaves the window
        outs[i] = nullptr;
        if (s >= 0) outs[i] = static_cast<T *>(f.dx) + (w.b * a.length + w.row(s)) * a.channels;
        else if (f.dinit && s >= -a.width) outs[i] = static_cast<T *>(f.dinit) + ((w.b * a.paths + w.k) * a.width + a.width + s) * a.channels;
        if (t >= w.count) continue;
        int64_t row = w.row(t);
        rows[i] = x_row(w, t);
        grads[i] = at(f.dy, w.b * f.dy_b + row * f.dy_l + w.k * f.dy_p, f.dy_dtype);
        valid = w.flags && w.flags[row] ? 1 : int(min_of(valid + 1, a.width));
        firsts[i] = kW - valid;
      }
      for (int64_t c = first; c < end; c += W) {
        int n = int(min_of(W, end - c));
        int64_t o = c - first;
        V wt[kW], x[kW], p[kW], dw[kW], db = V::load(carry.dbias + o), start = bias ? part(bias, c, n) : zero<V>();
        ZK_UNROLL
        for (int j = 0; j < kW; ++j) {
          wt[j] = j < outside ? zero<V>() : part(weight, (j - outside) * a.channels + c, n);
          x[j] = V::load(carry.seen[j] + o);
          p[j] = V::load(carry.pending[j] + o);
          dw[j] = V::load(carry.dweight[j] + o);
        }
        for (int64_t t = t0; t < t1; ++t) {
          int i = int(t - t0);
          ZK_UNROLL
          for (int j = 0; j + 1 < kW; ++j) x[j] = x[j + 1];
          if (t < w.count) {
            x[kW - 1] = load_as<V>(at(rows[i], c, a.x_dtype), a.x_dtype, n);
            V g = load_as<V>(at(grads[i], c, f.dy_dtype), f.dy_dtype, n);
            if (firsts[i] == 0) advance<kW>(a, wt, start, x, p, dw, db, g, 0);
            else advance<kW>(a, wt, start, x, p, dw, db, g, firsts[i]);
          }
          if (outs[i]) {
            if (w.k && t - kW + 1 >= 0) add(outs[i], c, p[0], n);
            else put(outs[i], c, p[0], n);
          }
          ZK_UNROLL
          for (int j = 0; j + 1 < kW; ++j) p[j] = p[j + 1];
          p[kW - 1] = zero<V>();
        }
        db.store(carry.dbias + o);
        ZK_UNROLL
        for (int j = 0; j < kW; ++j) {
          x[j].store(carry.seen[j] + o);
          p[j].store(carry.pending[j] + o);
          dw[j].store(carry.dweight[j] + o);
        }
      }
    }
    int64_t sequence = w.b * a.paths + w.k;
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      if (f.dbias) put(f.dbias, sequence * a.channels + c, V::load(carry.dbias + c - first), n);
      for (int64_t j = 0; j < a.width; ++j) put(f.dweight, (sequence * a.width + j) * a.channels + c, V::load(carry.dweight[j + outside] + c - first), n);
    }
    if (!f.dfinal) return;
    int64_t from = w.kept();
    for (int64_t j = 0; j < a.width; ++j) {
      int64_t s = w.count - a.width + j;
      if (s < from) continue;
      for (int64_t c = first; c < end; c += W) {
        int n = int(min_of(W, end - c));
        V g = part(f.dfinal, (sequence * a.width + j) * a.channels + c, n);
        if (s >= 0) add(f.dx, (w.b * a.length + w.row(s)) * a.channels + c, g, n);
        else if (f.dinit) add(f.dinit, (sequence * a.width + a.width + s) * a.channels + c, g, n);
      }
    }
  }

  static int64_t backward(const ConvBackward &f) {
    const ConvArgs &a = f.conv;
    Scratch<T> weight(a.paths * a.width * a.channels);
    if (!weight.data) return ZK_NO_MEMORY;
    taps(a, weight.data);
    int64_t blocks = ceil_div(a.channels, kBlock);
    parallel(a.useful_threads(), a.batch * blocks, [&](int64_t item) {
      FlushSubnormals flush;
      int64_t first = item % blocks * kBlock, end = min_of(first + kBlock, a.channels);
      for (int64_t k = 0; k < a.paths; ++k) {  // in turn, for they add to one dx
        Walk w(a, item / blocks, k);
        const T *own = weight.data + k * a.width * a.channels;
        if (a.width == 4) backward_block<4>(f, w, own, first, end);
        else if (a.width < 4) backward_block<3>(f, w, own, first, end);
        else backward_block<8>(f, w, own, first, end);
      }
    });
    return ZK_OK;
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
