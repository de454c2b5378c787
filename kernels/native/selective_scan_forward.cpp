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
  for (int n = 0; n < NB; ++n) h[n] = V::load(state + n * W);
  for (int64_t t = 0; t < steps; ++t, B += states, C += states) {
    if (drop && drop[t]) for (int n = 0; n < NB; ++n) h[n] = zero<V>();
    V dv = V::load(d + t * W), xv = V::load(dx + t * W);
    V sum = V::load(y + t * W), other = zero<V>();
    for (int n = 0; n < NB; ++n) {
      h[n] = fma(exp2_of(dv * V::load(A + n * W)), h[n], xv * V::set1(B[n]));
      if (n % 2) other = fma(h[n], V::set1(C[n]), other);
      else sum = fma(h[n], V::set1(C[n]), sum);
    }
    (sum + other).store(y + t * W);
  }
  for (int n = 0; n < NB; ++n) h[n].store(state + n * W);
}

template <class V> struct Forward {
  using T = typename V::T;
  static constexpr int W = V::W;
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
    Scratch<T> memory(vectors * N * W * 2 + 2 * kChunk * N + 3 * kChunk * W);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *h = memory.data, *A = h + vectors * N * W, *d = A + vectors * N * W, *dx = d + kChunk * W, *y = dx + kChunk * W;
    T *B = y + kChunk * W, *C = B + kChunk * N;
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
        gather_states(B, a.B, chunk.rows, chunk.steps, b, k, group, N);
        gather_states(C, a.C, chunk.rows, chunk.steps, b, k, group, N);
        for (int64_t v = 0; v < vectors; ++v) {
          int64_t c = first + v * W;
          int lanes = int(min_of(W, end - c));
          T *hv = h + v * N * W, *Av = A + v * N * W;
          if (f.borders) {
            T *out = static_cast<T *>(f.borders) + (((b * a.paths + k) * a.chunks() + j) * N) * a.channels + c;
            for (int64_t n = 0; n < N; ++n) V::load(hv + n * W).store_n(out + n * a.channels, lanes);
          }
          prologue(a, chunk, b, k, c, lanes, d, dx, y);
          each_block<kMost>(N, [&](auto block, int64_t n) {
            walk<V, decltype(block)::value>(d, dx, y, Av + n * W, B + n, C + n, N, chunk.drop, chunk.steps, hv + n * W);
          });
          epilogue(f, chunk, b, k, c, lanes, y);
        }
      }
      if (f.final_state)
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t n = 0; n < N; ++n)
            V::load(h + (v * N + n) * W).store_n(static_cast<T *>(f.final_state) + ((b * a.paths + k) * N + n) * a.channels + first + v * W, int(min_of(W, end - first - v * W)));
    }
  }

  static ZK_INLINE void prologue(const ScanArgs &a, const Chunk<T> &chunk, int64_t b, int64_t k, int64_t c, int lanes, T *d, T *dx, T *y) {
    V bias = a.bias ? V::load_n(static_cast<const T *>(a.bias) + k * a.channels + c, lanes) : zero<V>();
    V D = a.D ? V::load_n(static_cast<const T *>(a.D) + k * a.channels + c, lanes) : zero<V>();
    for (int64_t t = 0; t < chunk.steps; ++t) {
      V x = load_as<V>(a.u.row(b, chunk.rows[t], k, 0, c), a.u.dtype, lanes);
      V s = load_as<V>(a.dt.row(b, chunk.rows[t], k, 0, c), a.dt.dtype, lanes) + bias;
      if (a.softplus) s = softplus(s);
      s.store(d + t * W);
      (s * x).store(dx + t * W);
      (a.D ? D * x : zero<V>()).store(y + t * W);
    }
  }

  static ZK_INLINE void epilogue(const ForwardArgs &f, const Chunk<T> &chunk, int64_t b, int64_t k, int64_t c, int lanes, const T *y) {
    const ScanArgs &a = f.scan;
    for (int64_t t = 0; t < chunk.steps; ++t) {
      V out = V::load(y + t * W);
      if (a.z.p) out = out * silu(load_as<V>(a.z.row(b, chunk.rows[t], 0, 0, c), a.z.dtype, lanes));
      char *to = at(f.y, (b * a.length + chunk.rows[t]) * a.channels + c, f.y_dtype);
      if (k) out = out + load_as<V>(to, f.y_dtype, lanes);
      store_as(out, to, f.y_dtype, lanes);
    }
  }

  static int64_t run(const ForwardArgs &f) {
    const ScanArgs &a = f.scan;
    int64_t size = 64;  // channels in a block; the results do not depend on it
    while (size > 16 && a.batch * ChannelBlocks(a, size).total(a) < 4 * a.threads) size /= 2;
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
