// h_t = a_t h_{t-1} + x_t in every channel by itself, real or complex, along a path; forward and backward.
//
// A work item is a block of channels of one sequence. Rows are read and written once, in order; the block's state stays in
// registers or the nearest cache. Backward replays a chunk from the state that forward kept before it, then walks it
// backwards.
//
// Where a long walk has too few channels to share out, its length is cut into pieces: a first pass takes the product of a and
// the last state from zero of each, these are chained up, and a second pass walks the pieces from the states that they truly
// begin with. Which walks are cut, and where, follows from the shapes alone: results have the same bits for any number of
// threads.

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
  using Vector = V;
  static constexpr int64_t kWidth = 1;  // numbers of a channel

  static constexpr int64_t kOwn = sizeof(T) == 4 ? ZK_F32 : ZK_F64;

  // h = a h + x (a null: a reset), stored as a state and as output
  static ZK_INLINE void advance(const T *before, T *h, const void *a, int64_t a_dtype, const void *x, int64_t x_dtype, void *y, int64_t y_dtype, int64_t n) {
    int64_t c = 0;
    if (a && y && a_dtype == kOwn && x_dtype == kOwn && y_dtype == kOwn) {  // asking for each vector's type takes longer than this
      const T *factor = static_cast<const T *>(a), *in = static_cast<const T *>(x);
      T *out = static_cast<T *>(y);
      for (; c + V::W <= n; c += V::W) {
        V v = fma(V::load(factor + c), V::load(before + c), V::load(in + c));
        v.store(h + c);
        v.store(out + c);
      }
    }
    for (; c < n; c += V::W) {
      int m = int(min_of(V::W, n - c));
      V v = load_as<V>(at(x, c, x_dtype), x_dtype, m);
      if (a) v = fma(load_as<V>(at(a, c, a_dtype), a_dtype, m), m == V::W ? V::load(before + c) : V::load_n(before + c, m), v);
      if (m == V::W) v.store(h + c);
      else v.store_n(h + c, m);
      if (y) store_as(v, at(y, c, y_dtype), y_dtype, m);
    }
  }
  // LinearScan::walk with the state of at most NV vectors of channels in registers.
  template <int NV, class Block>
  static void narrow(const LinearArgs &a, const LinearWalk &w, const Block &x, int64_t t0, int64_t t1, T *h, const LinearForward *f, T *product) {
    int lanes[NV];
    V s[NV], m[NV];
    for (int j = 0; j < NV; ++j) {
      lanes[j] = int(min_of(V::W, x.n - j * V::W));
      s[j] = V::load_n(h + j * V::W, lanes[j]);
      m[j] = product ? V::load_n(product + j * V::W, lanes[j]) : zero<V>();
    }
    T *kept = f && f->borders ? static_cast<T *>(f->borders) + x.b * a.chunks() * a.channels + x.first : nullptr;
    for (int64_t t = t0; t < t1; ++t) {
      int64_t row = w.row(t);
      if (kept && t % kChunk == 0)
        for (int j = 0; j < NV; ++j) s[j].store_n(kept + t / kChunk * a.channels + j * V::W, lanes[j]);
      const void *in = at(a.x, x.b * a.x_b + row * a.x_l + x.first, a.x_dtype), *factor = at(a.a, x.b * a.a_b + row * a.a_l + x.first, a.a_dtype);
      void *out = f ? at(f->h, (x.b * a.length + row) * a.channels + x.first, f->h_dtype) : nullptr;
      bool drop = w.reset(row);
      for (int j = 0; j < NV; ++j) {
        V v = load_as<V>(at(in, j * V::W, a.x_dtype), a.x_dtype, lanes[j]);
        V by = drop ? zero<V>() : load_as<V>(at(factor, j * V::W, a.a_dtype), a.a_dtype, lanes[j]);
        s[j] = drop ? v : fma(by, s[j], v);
        if (product) m[j] = m[j] * by;
        if (out) store_as(s[j], at(out, j * V::W, f->h_dtype), f->h_dtype, lanes[j]);
      }
    }
    for (int j = 0; j < NV; ++j) {
      s[j].store_n(h + j * V::W, lanes[j]);
      if (product) m[j].store_n(product + j * V::W, lanes[j]);
    }
  }
  static ZK_INLINE void multiply(T *product, const void *a, int64_t a_dtype, int64_t n) {
    for (int64_t c = 0; c < n; c += V::W) {
      int m = int(min_of(V::W, n - c));
      (V::load_n(product + c, m) * load_as<V>(at(a, c, a_dtype), a_dtype, m)).store_n(product + c, m);
    }
  }
  // g += dy; dx = g; da (or a sum over steps) = g conj(h before); g = conj(a) g
  static ZK_INLINE void retreat(T *g, const T *before, const void *a, int64_t a_dtype, const void *dy, int64_t dy_dtype, void *dx, int64_t dx_dtype,
                                void *da, int64_t da_dtype, T *sum, int64_t n) {
    int64_t c = 0;
    if (a && da && !sum && a_dtype == kOwn && dy_dtype == kOwn && dx_dtype == kOwn && da_dtype == kOwn) {
      const T *factor = static_cast<const T *>(a), *in = static_cast<const T *>(dy);
      T *out = static_cast<T *>(dx), *of_a = static_cast<T *>(da);
      for (; c + V::W <= n; c += V::W) {
        V v = V::load(g + c) + V::load(in + c);
        v.store(out + c);
        (v * V::load(before + c)).store(of_a + c);
        (v * V::load(factor + c)).store(g + c);
      }
    }
    for (; c < n; c += V::W) {
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
  static inline void multiply(T *product, const void *av, int64_t, int64_t n) {
    const T *a = static_cast<const T *>(av);
    for (int64_t i = 0; i < 2 * n; i += 2) {
      T re = a[i] * product[i] - a[i + 1] * product[i + 1];
      product[i + 1] = a[i] * product[i + 1] + a[i + 1] * product[i];
      product[i] = re;
    }
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

// How a walk is cut into pieces of whole chunks; one piece unless it is long and there are few channels.
struct Pieces {
  int64_t count, steps;
  explicit Pieces(const LinearArgs &a) : count(1), steps(a.steps) {
    if (a.batch * ceil_div(a.channels, 16) >= 4 || a.steps < 8192) return;
    steps = ceil_div(ceil_div(a.steps, 8), kChunk) * kChunk;
    count = ceil_div(a.steps, steps);
  }
};
// For each sequence and piece: the product of a over it, and the state (or gradient) on its far side, from zero or true.
template <class T> struct Ends {
  Scratch<T> memory;
  int64_t pieces, width;
  Ends(const LinearArgs &a, const Pieces &p, int64_t k) : memory(2 * a.batch * p.count * a.channels * k), pieces(p.count), width(a.channels * k) {}
  T *product(int64_t b, int64_t piece) const { return memory.data + 2 * (b * pieces + piece) * width; }
  T *end(int64_t b, int64_t piece) const { return product(b, piece) + width; }
  bool finite(int64_t b, int64_t piece) const {
    for (int64_t i = 0; i < width; ++i) if (!(end(b, piece)[i] - end(b, piece)[i] == T(0))) return false;
    return true;
  }
};

template <class Row> struct LinearScan {
  using T = typename Row::T;
  static constexpr int64_t k = Row::kWidth;

  struct Block { int64_t b, first, n; };

  static const void *a_row(const LinearArgs &a, const LinearWalk &w, const Block &x, int64_t row) {
    return w.reset(row) ? nullptr : at(a.a, (x.b * a.a_b + row * a.a_l + x.first) * k, a.a_dtype);
  }
  static const void *x_row(const LinearArgs &a, const Block &x, int64_t row) { return at(a.x, (x.b * a.x_b + row * a.x_l + x.first) * k, a.x_dtype); }

  // Steps t0 .. t1 of a block from state h. Writes outputs and borders where f is given, the product of a where that is.
  static void walk(const LinearArgs &a, const LinearWalk &w, const Block &x, int64_t t0, int64_t t1, T *h, const LinearForward *f, T *product) {
    if constexpr (k == 1) {
      constexpr int64_t W = Row::Vector::W;
      if (x.n <= W) return Row::template narrow<1>(a, w, x, t0, t1, h, f, product);
      if (x.n <= 2 * W) return Row::template narrow<2>(a, w, x, t0, t1, h, f, product);
    }
    size_t bytes = size_t(x.n * k) * sizeof(T);
    T *kept = f ? kept_of(*f, x) : nullptr;
    for (int64_t t = t0; t < t1; ++t) {
      if (kept && t % kChunk == 0) memcpy(kept + t / kChunk * a.channels * k, h, bytes);
      int64_t row = w.row(t);
      const void *factor = a_row(a, w, x, row);
      Row::advance(h, h, factor, a.a_dtype, x_row(a, x, row), a.x_dtype, f ? out_row(*f, x, row) : nullptr, f ? f->h_dtype : 0, x.n);
      if (product && factor) Row::multiply(product, factor, a.a_dtype, x.n);
      else if (product) memset(product, 0, bytes);
    }
  }
  static T *kept_of(const LinearForward &f, const Block &x) {
    return f.borders ? static_cast<T *>(f.borders) + (x.b * f.scan.chunks() * f.scan.channels + x.first) * k : nullptr;
  }
  static void *out_row(const LinearForward &f, const Block &x, int64_t row) {
    return at(f.h, ((x.b * f.scan.length + row) * f.scan.channels + x.first) * k, f.h_dtype);
  }

  static void begin(T *to, const void *from, const LinearArgs &a, const Block &x) {
    if (from) memcpy(to, static_cast<const T *>(from) + (x.b * a.channels + x.first) * k, size_t(x.n * k) * sizeof(T));
    else memset(to, 0, size_t(x.n * k) * sizeof(T));
  }
  static void ones(T *product, int64_t n) {
    for (int64_t i = 0; i < n * k; ++i) product[i] = T(i % k == 0);
  }

  // What is left to do where a walk ended at state h.
  static void finish(const LinearForward &f, const LinearWalk &w, const Block &x, const T *h) {
    const LinearArgs &a = f.scan;
    size_t bytes = size_t(x.n * k) * sizeof(T);
    T *kept = kept_of(f, x);
    for (int64_t chunk = ceil_div(w.count, kChunk); kept && chunk < a.chunks(); ++chunk) memcpy(kept + chunk * a.channels * k, h, bytes);
    if (f.final_state) memcpy(static_cast<T *>(f.final_state) + (x.b * a.channels + x.first) * k, h, bytes);
  }

  static int64_t forward(const LinearForward &f) {
    const LinearArgs &a = f.scan;
    Pieces pieces(a);
    if (pieces.count > 1) return forward_in_pieces(f, pieces);
    int64_t block = block_of(a, 2048 / k), blocks = ceil_div(a.channels, block);
    parallel(a.threads, a.batch * blocks, [&](int64_t item) {
      FlushSubnormals flush;
      alignas(64) T h[2048];
      Block x{item / blocks, item % blocks * block, min_of(block, a.channels - item % blocks * block)};
      LinearWalk w(a, x.b);
      begin(h, a.init, a, x);
      walk(a, w, x, 0, w.count, h, &f, nullptr);
      finish(f, w, x, h);
    });
    return ZK_OK;
  }

  static int64_t forward_in_pieces(const LinearForward &f, const Pieces &pieces) {
    const LinearArgs &a = f.scan;
    Ends<T> ends(a, pieces, k);
    if (!ends.memory.data) return ZK_NO_MEMORY;
    auto piece_of = [&](int64_t b, int64_t piece, T *h, const LinearForward *out, T *product) {
      LinearWalk w(a, b);
      walk(a, w, Block{b, 0, a.channels}, min_of(piece * pieces.steps, w.count), min_of((piece + 1) * pieces.steps, w.count), h, out, product);
    };
    parallel(a.threads, a.batch * (pieces.count - 1), [&](int64_t item) {  // nobody waits for the last one
      FlushSubnormals flush;
      int64_t b = item / (pieces.count - 1), piece = item % (pieces.count - 1);
      begin(ends.end(b, piece), piece ? nullptr : a.init, a, Block{b, 0, a.channels});
      ones(ends.product(b, piece), a.channels);
      piece_of(b, piece, ends.end(b, piece), piece ? nullptr : &f, piece ? ends.product(b, piece) : nullptr);
    });
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t piece = 1; piece + 1 < pieces.count; ++piece)
        chain(a, ends, b, piece - 1, piece, [&](T *h) { piece_of(b, piece, h, nullptr, nullptr); });
    parallel(a.threads, a.batch * (pieces.count - 1), [&](int64_t item) {
      FlushSubnormals flush;
      alignas(64) T h[2048];
      int64_t b = item / (pieces.count - 1), piece = item % (pieces.count - 1) + 1;
      memcpy(h, ends.end(b, piece - 1), size_t(a.channels * k) * sizeof(T));
      piece_of(b, piece, h, &f, nullptr);
      if (piece + 1 == pieces.count) finish(f, LinearWalk(a, b), Block{b, 0, a.channels}, h);
    });
    return ZK_OK;
  }

  // The true value on the far side of a piece: end + product * what enters it. An infinite or missing number would not
  // survive a product that has underflowed: then the piece is walked from it.
  template <class Walk> static void chain(const LinearArgs &a, const Ends<T> &ends, int64_t b, int64_t from, int64_t piece, const Walk &walk_from) {
    const T *in = ends.end(b, from);
    T *end = ends.end(b, piece);
    if (ends.finite(b, from)) Row::advance(in, end, ends.product(b, piece), own_dtype(), end, own_dtype(), nullptr, 0, a.channels);
    else {
      memcpy(end, in, size_t(a.channels * k) * sizeof(T));
      walk_from(end);
    }
  }
  static constexpr int64_t own_dtype() { return sizeof(T) == 4 ? ZK_F32 : ZK_F64; }

  static constexpr int64_t kMost = 256 / k;

  // Steps t1 - 1 .. t0 backwards, g being the gradient that reaches the last of them.
  static void unwind(const LinearBackward &f, const LinearWalk &w, const Block &x, int64_t t0, int64_t t1, T *g, T *sum) {
    const LinearArgs &a = f.scan;
    alignas(64) T states[(kChunk + 1) * 256];  // states[i]: before step i of the chunk
    const T *kept = static_cast<const T *>(f.borders) + (x.b * a.chunks() * a.channels + x.first) * k;
    for (int64_t chunk = ceil_div(t1, kChunk) - 1; chunk * kChunk >= t0 && t1 > t0; --chunk) {
      int64_t begin = chunk * kChunk, end = min_of(begin + kChunk, t1);
      if (f.da) {
        memcpy(states, kept + chunk * a.channels * k, size_t(x.n * k) * sizeof(T));
        for (int64_t t = begin; t + 1 < end; ++t) {
          int64_t row = w.row(t);
          T *before = states + (t - begin) * 256;
          Row::advance(before, before + 256, a_row(a, w, x, row), a.a_dtype, x_row(a, x, row), a.x_dtype, nullptr, 0, x.n);
        }
      }
      for (int64_t t = end - 1; t >= begin; --t) {
        int64_t row = w.row(t), out = ((x.b * a.length + row) * a.channels + x.first) * k;
        Row::retreat(g, states + (t - begin) * 256, a_row(a, w, x, row), a.a_dtype, at(f.dh, (x.b * f.dh_b + row * f.dh_l + x.first) * k, f.dh_dtype),
                     f.dh_dtype, at(f.dx, out, f.dx_dtype), f.dx_dtype, f.da && f.da_rows ? at(f.da, out, f.da_dtype) : nullptr, f.da_dtype, sum, x.n);
      }
    }
  }

  static int64_t backward(const LinearBackward &f) {
    const LinearArgs &a = f.scan;
    Pieces pieces(a);
    if (pieces.count > 1) return backward_in_pieces(f, pieces);
    int64_t block = block_of(a, kMost), blocks = ceil_div(a.channels, block);
    parallel(a.threads, a.batch * blocks, [&](int64_t item) {
      FlushSubnormals flush;
      alignas(64) T g[256];
      alignas(64) T sum[256];
      Block x{item / blocks, item % blocks * block, min_of(block, a.channels - item % blocks * block)};
      LinearWalk w(a, x.b);
      bool total = f.da && !f.da_rows;
      size_t bytes = size_t(x.n * k) * sizeof(T);
      begin(g, f.dfinal, a, x);
      memset(sum, 0, bytes);
      unwind(f, w, x, 0, w.count, g, total ? sum : nullptr);
      if (total) memcpy(static_cast<T *>(f.da) + (x.b * a.channels + x.first) * k, sum, bytes);
      if (f.dinit) memcpy(static_cast<T *>(f.dinit) + (x.b * a.channels + x.first) * k, g, bytes);
    });
    return ZK_OK;
  }

  // The gradient that leaves a piece towards its beginning, from g at its end, and the product of conj(a).
  static void trace(const LinearBackward &f, const LinearWalk &w, const Block &x, int64_t t0, int64_t t1, T *g, T *product) {
    const LinearArgs &a = f.scan;
    alignas(64) T unused[256];
    alignas(64) T before[256] = {};  // the states, which only the gradient of a needs
    for (int64_t t = t1 - 1; t >= t0; --t) {
      int64_t row = w.row(t);
      const void *factor = a_row(a, w, x, row);
      Row::retreat(g, before, factor, a.a_dtype, at(f.dh, (x.b * f.dh_b + row * f.dh_l + x.first) * k, f.dh_dtype), f.dh_dtype, unused, own_dtype(),
                   nullptr, 0, nullptr, x.n);
      if (product && factor) Row::multiply(product, factor, a.a_dtype, x.n);
      else if (product) memset(product, 0, size_t(x.n * k) * sizeof(T));
    }
    if (product && k == 2) for (int64_t i = 1; i < 2 * x.n; i += 2) product[i] = -product[i];
  }

  static int64_t backward_in_pieces(const LinearBackward &f, const Pieces &pieces) {
    const LinearArgs &a = f.scan;
    int64_t last = pieces.count - 1, wide = a.channels * k;
    bool total = f.da && !f.da_rows;
    Ends<T> ends(a, pieces, k);
    Scratch<T> sums(a.batch * pieces.count * wide);
    if (!ends.memory.data || !sums.data) return ZK_NO_MEMORY;
    auto from = [&](const LinearWalk &w, int64_t piece) { return min_of(piece * pieces.steps, w.count); };
    parallel(a.threads, a.batch * last, [&](int64_t item) {  // nobody waits for the first one
      FlushSubnormals flush;
      int64_t b = item / last, piece = item % last + 1;
      LinearWalk w(a, b);
      Block x{b, 0, a.channels};
      begin(ends.end(b, piece), piece == last ? f.dfinal : nullptr, a, x);
      ones(ends.product(b, piece), a.channels);
      trace(f, w, x, from(w, piece), from(w, piece + 1), ends.end(b, piece), ends.product(b, piece));
    });
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t piece = last - 1; piece > 0; --piece)
        chain(a, ends, b, piece + 1, piece, [&](T *g) {
          LinearWalk w(a, b);
          trace(f, w, Block{b, 0, a.channels}, from(w, piece), from(w, piece + 1), g, nullptr);
        });
    parallel(a.threads, a.batch * pieces.count, [&](int64_t item) {
      FlushSubnormals flush;
      alignas(64) T g[256];
      int64_t b = item / pieces.count, piece = item % pieces.count;
      LinearWalk w(a, b);
      Block x{b, 0, a.channels};
      if (piece == last) begin(g, f.dfinal, a, x);
      else memcpy(g, ends.end(b, piece + 1), size_t(wide) * sizeof(T));
      T *sum = sums.data + item * wide;
      memset(sum, 0, size_t(wide) * sizeof(T));
      unwind(f, w, x, from(w, piece), from(w, piece + 1), g, total ? sum : nullptr);
      if (!piece && f.dinit) memcpy(static_cast<T *>(f.dinit) + b * wide, g, size_t(wide) * sizeof(T));
    });
    for (int64_t b = 0; total && b < a.batch; ++b) {
      T *to = static_cast<T *>(f.da) + b * wide;
      memset(to, 0, size_t(wide) * sizeof(T));
      for (int64_t piece = last; piece >= 0; --piece)
        for (int64_t i = 0; i < wide; ++i) to[i] += sums.data[(b * pieces.count + piece) * wide + i];
    }
    return ZK_OK;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(linear_scan_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LinearForward &f = *reinterpret_cast<const LinearForward *>(a);
  if (f.scan.complex) return f.scan.dual ? LinearScan<ComplexRow<double>>::forward(f) : LinearScan<ComplexRow<float>>::forward(f);
  return f.scan.dual ? LinearScan<RealRow<VD>>::forward(f) : LinearScan<RealRow<VF>>::forward(f);
}
ZK_EXPORT(linear_scan_backward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const LinearBackward &f = *reinterpret_cast<const LinearBackward *>(a);
  if (f.scan.complex) return f.scan.dual ? LinearScan<ComplexRow<double>>::backward(f) : LinearScan<ComplexRow<float>>::backward(f);
  return f.scan.dual ? LinearScan<RealRow<VD>>::backward(f) : LinearScan<RealRow<VF>>::backward(f);
}
