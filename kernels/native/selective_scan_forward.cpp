// The selective scan on a CPU, forward. See selective_scan.h.

#include "selective_scan.h"

namespace ZK_NAMESPACE {

struct ForwardArgs {
  ScanArgs scan;
  void *y;  // (batch, length, channels); of the working type where there are several paths, which add to it in turn
  int64_t y_dtype;
  void *final_state;  // (batch, paths, states, channels) of the working type, or null
  void *borders;      // (batch, paths, chunks, states, channels): the state before each chunk; or null
};

// One chunk of one vector of channels and NB states. A: [NB][W]; B, C: [steps][states]; y is added to.
template <class V, int NB>
ZK_INLINE void walk(const typename V::T *ZK_RESTRICT d, const typename V::T *ZK_RESTRICT dx, typename V::T *ZK_RESTRICT y,
                    const typename V::T *ZK_RESTRICT A, const typename V::T *ZK_RESTRICT B, const typename V::T *ZK_RESTRICT C,
                    int64_t states, const uint8_t *drop, int64_t steps, typename V::T *ZK_RESTRICT state) {
  constexpr int W = V::W;
  V h[NB];
  ZK_UNROLL
  for (int n = 0; n < NB; ++n) h[n] = V::load(state + n * W);
  for (int64_t t = 0; t < steps; ++t, B += states, C += states) {
    if (drop && drop[t]) {
      ZK_UNROLL
      for (int n = 0; n < NB; ++n) h[n] = zero<V>();
    }
    V dv = V::load(d + t * W), xv = V::load(dx + t * W);
    V sum = V::load(y + t * W), other = zero<V>();
    ZK_UNROLL
    for (int n = 0; n < NB; ++n) {
      h[n] = fma(exp2_of(dv * V::load(A + n * W)), h[n], xv * V::set1(B[n]));
      if (n % 2) other = fma(h[n], V::set1(C[n]), other);
      else sum = fma(h[n], V::set1(C[n]), sum);
    }
    (sum + other).store(y + t * W);
  }
  ZK_UNROLL
  for (int n = 0; n < NB; ++n) h[n].store(state + n * W);
}

template <class V> struct Forward {
  using T = typename V::T;
  static constexpr int W = V::W;
  // A chunk is worked off in stretches of kSteps steps over all channels of the block, so that the block can be wide:
  // each page of memory is then visited few times. A tile is one vector of channels of a stretch, and a line more, for at
  // multiples of 4096 bytes tiles would share cache sets.
  static constexpr int64_t kSteps = 16, kTile = (kSteps + 1) * W;
  // As many states at a time as the registers hold.
#if defined(ZK_AVX512) || defined(ZK_NEON)
  static constexpr int kMost = sizeof(T) == 4 ? 16 : 4;
#else
  static constexpr int kMost = sizeof(T) == 4 ? 8 : 4;
#endif

  static void item(const ForwardArgs &f, const ChannelBlocks &blocks, int64_t b, int64_t i, int64_t *failed) {
    const ScanArgs &a = f.scan;
    int64_t N = a.states, first = blocks.first(i), end = blocks.end(i), group = blocks.group(i);
    int64_t vectors = ceil_div(end - first, W), count = a.count(b);
    Scratch<T> memory(vectors * N * W * 2 + 2 * kChunk * N + 3 * kTile * vectors);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *h = memory.data, *A = h + vectors * N * W, *d = A + vectors * N * W, *dx = d + kTile * vectors, *y = dx + kTile * vectors;
    T *B = y + kTile * vectors, *C = B + kChunk * N;
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    bool plain = (end - first) % W == 0 && a.u.dtype == own && a.dt.dtype == own && (!a.z.p || a.z.dtype == own) && f.y_dtype == own;
    FlushSubnormals flush;
    Chunk<T> chunk;
    for (int64_t k = 0; k < a.paths; ++k) {
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t c = first + v * W;
        int lanes = int(min_of(W, end - c));
        for (int64_t n = 0; n < N; ++n) {
          V::load_n(static_cast<const T *>(a.A) + (k * N + n) * a.channels + c, lanes).store(A + (v * N + n) * W);
          V start = zero<V>();
          if (a.init) start = V::load_n(static_cast<const T *>(a.init) + ((b * a.paths + k) * N + n) * a.channels + c, lanes);
          start.store(h + (v * N + n) * W);
        }
      }
      for (int64_t j = 0; j * kChunk < count; ++j) {
        chunk.set(a, b, k, j, count);
        gather_states<V>(B, a.B, chunk.rows, chunk.steps, b, k, group, N);
        gather_states<V>(C, a.C, chunk.rows, chunk.steps, b, k, group, N);
        if (f.borders)
          for (int64_t v = 0; v < vectors; ++v)
            for (int64_t n = 0; n < N; ++n)
              V::load(h + (v * N + n) * W).store_n(static_cast<T *>(f.borders) + (((b * a.paths + k) * a.chunks() + j) * N + n) * a.channels + first + v * W, int(min_of(W, end - first - v * W)));
        for (int64_t t = 0; t < chunk.steps; t += kSteps) {
          const int64_t *rows = chunk.rows + t, steps = min_of(kSteps, chunk.steps - t);
          plain ? prologue<true>(a, rows, steps, b, k, first, end, d, dx, y) : prologue<false>(a, rows, steps, b, k, first, end, d, dx, y);
          for (int64_t v = 0; v < vectors; ++v)
            each_block<kMost>(N, [&](auto block, int64_t n) {
              int64_t tile = v * kTile, states = (v * N + n) * W;
              walk<V, decltype(block)::value>(d + tile, dx + tile, y + tile, A + states, B + t * N + n, C + t * N + n, N,
                                              chunk.drop ? chunk.drop + t : nullptr, steps, h + states);
            });
          plain ? epilogue<true>(f, rows, steps, b, k, first, end, y) : epilogue<false>(f, rows, steps, b, k, first, end, y);
        }
      }
      if (f.final_state)
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t n = 0; n < N; ++n)
            V::load(h + (v * N + n) * W).store_n(static_cast<T *>(f.final_state) + ((b * a.paths + k) * N + n) * a.channels + first + v * W, int(min_of(W, end - first - v * W)));
    }
  }

  // Rows are read, and below written, over the whole block of channels at once: neighbouring cache lines.
  template <bool Plain>
  static void prologue(const ScanArgs &a, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t first, int64_t end, T *ZK_RESTRICT d, T *ZK_RESTRICT dx, T *ZK_RESTRICT y) {
    const T *bias = a.bias ? static_cast<const T *>(a.bias) + k * a.channels : nullptr;
    const T *D = a.D ? static_cast<const T *>(a.D) + k * a.channels : nullptr;
    Column<V, Plain> u(a.u, b, k, first), dt(a.dt, b, k, first);
    for (int64_t t = 0; t < steps; ++t) {
      int64_t to = t * W;
      for (int64_t c = first; c < end; c += W, to += kTile) {
        int lanes = Plain ? W : int(min_of(W, end - c));
        V x = u.get(rows[t], c - first, lanes), s = dt.get(rows[t], c - first, lanes);
        if (bias) s = s + part<Plain>(bias + c, lanes);
        if (a.softplus) s = softplus(s);
        s.store(d + to);
        (s * x).store(dx + to);
        (D ? part<Plain>(D + c, lanes) * x : zero<V>()).store(y + to);
      }
    }
  }
  template <bool Plain> static ZK_INLINE V part(const T *p, int lanes) { return Plain ? V::load(p) : V::load_n(p, lanes); }

  template <bool Plain>
  static void epilogue(const ForwardArgs &f, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t first, int64_t end, const T *ZK_RESTRICT y) {
    const ScanArgs &a = f.scan;
    Column<V, Plain> z(a.z, b, 0, first), out(at(f.y, b * a.length * a.channels + first, f.y_dtype), a.channels, f.y_dtype);
    for (int64_t t = 0; t < steps; ++t) {
      const T *from = y + t * W;
      for (int64_t c = first; c < end; c += W, from += kTile) {
        int lanes = Plain ? W : int(min_of(W, end - c));
        V sum = V::load(from);
        if (z.p) sum = sum * silu(z.get(rows[t], c - first, lanes));
        if (k) sum = sum + out.get(rows[t], c - first, lanes);
        out.put(sum, rows[t], c - first, lanes);
      }
    }
  }

  static int64_t run(const ForwardArgs &f) {
    const ScanArgs &a = f.scan;
    // Channels in a block: as many as leave work for all threads. The results do not depend on it.
    int64_t size = 512;
    while (size > 16 && a.batch * ChannelBlocks(a, size).total(a) < 4 * a.threads) size -= size > 128 ? 64 : 16;
    ChannelBlocks blocks(a, size);
    int64_t failed = ZK_OK, total = blocks.total(a);
    parallel(a.threads, a.batch * total, [&](int64_t i) { item(f, blocks, i / total, i % total, &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(selective_scan_forward)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const ForwardArgs &f = *reinterpret_cast<const ForwardArgs *>(a);
  return f.scan.dual ? Forward<VD>::run(f) : Forward<VF>::run(f);
}
