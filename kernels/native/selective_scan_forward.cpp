// The selective scan on a CPU, forward. See selective_scan.h.
// dt may come as a product of low rank, (batch, length, paths, rank) times (paths, channels, rank): as every published
// block computes it. Then no tensor of all steps and channels is ever written: a stretch of it lies in the first level of
// cache, at the rate of the multiply-add units.

#include "selective_scan.h"

namespace ZK_NAMESPACE {

struct ForwardArgs {
  ScanArgs scan;
  void *y;  // (batch, length, channels); of the working type where there are several paths, which add to it in turn
  int64_t y_dtype;
  void *final_state;  // (batch, paths, states, channels) of the working type, or null
  void *borders;      // (batch, paths, chunks, states, channels): the state before each chunk; or null
  int64_t rank;         // above 0: dt has so many columns, and the steps are their product with dt_proj
  const void *dt_proj;  // (paths, channels, rank) of the working type, with strides
  int64_t proj_k, proj_c, proj_r;
};

// The rows that the next stretch of steps will read and write, of one vector of channels. The walk asks for one step's
// worth of them at each of its own steps: between, there is arithmetic enough to hide memory and the walks of page tables.
struct Ahead {
  static constexpr int kTensors = 4;  // u, dt, z, y
  const char *p[kTensors];
  int64_t stride[kTensors];  // bytes
  const int64_t *rows;
  ZK_INLINE Ahead(const Strided *const (&tensors)[kTensors], int64_t b, int64_t k, int64_t c, const int64_t *next) : rows(next) {
    for (int i = 0; i < kTensors; ++i) {
      p[i] = tensors[i]->row(b, 0, k, 0, c);
      stride[i] = tensors[i]->l * size_of(tensors[i]->dtype);
    }
  }
  ZK_INLINE void fetch(int64_t t) const {
    ZK_UNROLL
    for (int i = 0; i < kTensors; ++i) ZK_PREFETCH_L2(p[i] + rows[t] * stride[i]);
  }
};

// One chunk of one vector of channels and NB states. A: [NB][W]; B, C: [steps][states]; y is added to.
template <class V, int NB>
ZK_INLINE void walk(const typename V::T *ZK_RESTRICT d, const typename V::T *ZK_RESTRICT dx, typename V::T *ZK_RESTRICT y,
                    const typename V::T *ZK_RESTRICT A, const typename V::T *ZK_RESTRICT B, const typename V::T *ZK_RESTRICT C,
                    int64_t states, const uint8_t *drop, int64_t steps, typename V::T *ZK_RESTRICT state, const Ahead *ahead) {
  constexpr int W = V::W;
  V h[NB];
  ZK_UNROLL
  for (int n = 0; n < NB; ++n) h[n] = V::load(state + n * W);
  for (int64_t t = 0; t < steps; ++t, B += states, C += states) {
    if (drop && drop[t]) {
      ZK_UNROLL
      for (int n = 0; n < NB; ++n) h[n] = zero<V>();
    }
    if (ahead) ahead->fetch(t);
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
  // A chunk is worked off in stretches of kSteps steps over all channels of the block, so that the block can be wide and
  // each page of memory is visited few times. A stretch's rows are on their way to the second level of cache while the one
  // before it is worked on; the first level would not do, for the same columns of neighbouring rows share few sets of it.
  static constexpr int64_t kSteps = 8, kTile = kSteps * W;
  static_assert(kSteps <= kAhead, "the next stretch must be known");
  static constexpr int kMost = sizeof(T) == 4 ? 8 : 4;  // states at a time: as many as the registers hold beside an exponential

  static void item(const ForwardArgs &f, const ChannelBlocks &blocks, int64_t b, int64_t i, int64_t *failed) {
    const ScanArgs &a = f.scan;
    int64_t N = a.states, first = blocks.first(i), end = blocks.end(i), group = blocks.group(i);
    int64_t vectors = ceil_div(end - first, W), count = a.count(b);
    int64_t R = f.rank;
    Scratch<T> memory(vectors * (2 * N + R) * W + kChunk * (2 * N + R) + 3 * kTile);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *h = memory.data, *A = h + vectors * N * W, *d = A + vectors * N * W, *dx = d + kTile, *y = dx + kTile;
    T *proj = y + kTile, *B = proj + vectors * R * W, *C = B + kChunk * N, *low = C + kChunk * N;
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    bool plain = (end - first) % W == 0 && a.u.dtype == own && (R || a.dt.dtype == own) && (!a.z.p || a.z.dtype == own) && f.y_dtype == own;
    FlushSubnormals flush;
    Chunk<T> chunk;
    for (int64_t k = 0; k < a.paths; ++k) {
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t c = first + v * W;
        int lanes = int(min_of(W, end - c));
        load_A<V>(a, k, c, lanes, A + v * N * W);
        load_proj(f, k, c, lanes, proj + v * R * W);
        for (int64_t n = 0; n < N; ++n) {
          V start = zero<V>();
          if (a.init) start = V::load_n(static_cast<const T *>(a.init) + ((b * a.paths + k) * N + n) * a.channels + c, lanes);
          start.store(h + (v * N + n) * W);
        }
      }
      const Strided out = {f.y, f.y_dtype, a.length * a.channels, a.channels, 0, 0};
      for (int64_t j = 0; j * kChunk < count; ++j) {
        chunk.set(a, b, k, j, count);
        gather_states<V>(B, a.B, chunk.rows, chunk.steps, b, k, group, N);
        gather_states<V>(C, a.C, chunk.rows, chunk.steps, b, k, group, N);
        if (R) gather_states<V>(low, a.dt, chunk.rows, chunk.steps, b, k, 0, R);
        if (f.borders)
          for (int64_t v = 0; v < vectors; ++v)
            for (int64_t n = 0; n < N; ++n)
              V::load(h + (v * N + n) * W).store_n(static_cast<T *>(f.borders) + (((b * a.paths + k) * a.chunks() + j) * N + n) * a.channels + first + v * W, int(min_of(W, end - first - v * W)));
        for (int64_t t = 0; t < chunk.steps; t += kSteps) {
          const int64_t *rows = chunk.rows + t, steps = min_of(kSteps, chunk.steps - t);
          for (int64_t v = 0; v < vectors; ++v) {
            int64_t c = first + v * W;
            if (R) product(low + t * R, proj + v * R * W, R, steps, d);
            plain ? prologue<true>(f, rows, steps, b, k, c, end, d, dx, y) : prologue<false>(f, rows, steps, b, k, c, end, d, dx, y);
            Ahead ahead({&a.u, R ? &a.u : &a.dt, a.z.p ? &a.z : &out, &out}, b, k, c, rows + steps);
            each_block<kMost>(N, [&](auto block, int64_t n) {
              int64_t states = (v * N + n) * W;
              walk<V, decltype(block)::value>(d, dx, y, A + states, B + t * N + n, C + t * N + n, N,
                                              chunk.drop ? chunk.drop + t : nullptr, steps, h + states, n ? nullptr : &ahead);
            });
            plain ? epilogue<true>(f, rows, steps, b, k, c, end, y) : epilogue<false>(f, rows, steps, b, k, c, end, y);
          }
        }
      }
      if (f.final_state)
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t n = 0; n < N; ++n)
            V::load(h + (v * N + n) * W).store_n(static_cast<T *>(f.final_state) + ((b * a.paths + k) * N + n) * a.channels + first + v * W, int(min_of(W, end - first - v * W)));
    }
  }

  // dt_proj of one vector of channels: [rank][W].
  static void load_proj(const ForwardArgs &f, int64_t k, int64_t c, int lanes, T *ZK_RESTRICT out) {
    const T *from = static_cast<const T *>(f.dt_proj) + k * f.proj_k + c * f.proj_c;
    for (int i = 0; i < W; ++i)
      for (int64_t r = 0; r < f.rank; ++r) out[r * W + i] = i < lanes ? from[i * f.proj_c + r * f.proj_r] : T(0);
  }

  // A stretch of dt from its columns, low: [steps][rank]. Each row of proj is read once for all steps, and as many sums
  // run side by side as hide the latency of a multiply-add.
  static ZK_INLINE void product(const T *ZK_RESTRICT low, const T *ZK_RESTRICT proj, int64_t rank, int64_t steps, T *ZK_RESTRICT d) {
    if (steps == kSteps) return columns<kSteps>(low, proj, rank, d);
    for (int64_t t = 0; t < steps; ++t) columns<1>(low + t * rank, proj, rank, d + t * W);
  }
  template <int S> static ZK_INLINE void columns(const T *ZK_RESTRICT low, const T *ZK_RESTRICT proj, int64_t rank, T *ZK_RESTRICT d) {
    V sum[S];
    ZK_UNROLL
    for (int t = 0; t < S; ++t) sum[t] = zero<V>();
    for (int64_t r = 0; r < rank; ++r) {
      V p = V::load(proj + r * W);
      ZK_UNROLL
      for (int t = 0; t < S; ++t) sum[t] = fma(p, V::set1(low[t * rank + r]), sum[t]);
    }
    ZK_UNROLL
    for (int t = 0; t < S; ++t) sum[t].store(d + t * W);
  }

  template <bool Plain>
  static ZK_INLINE void prologue(const ForwardArgs &f, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t c, int64_t end, T *ZK_RESTRICT d, T *ZK_RESTRICT dx, T *ZK_RESTRICT y) {
    const ScanArgs &a = f.scan;
    int lanes = Plain ? W : int(min_of(W, end - c));
    V bias = a.bias ? part<Plain>(static_cast<const T *>(a.bias) + k * a.channels + c, lanes) : zero<V>();
    V D = a.D ? part<Plain>(static_cast<const T *>(a.D) + k * a.channels + c, lanes) : zero<V>();
    Column<V, Plain> u(a.u, b, k, c), dt(a.dt, b, k, f.rank ? 0 : c);
    for (int64_t t = 0; t < steps; ++t) {
      V x = u.get(rows[t], 0, lanes), s = (f.rank ? V::load(d + t * W) : dt.get(rows[t], 0, lanes)) + bias;
      if (a.softplus) s = softplus(s);
      s.store(d + t * W);
      (s * x).store(dx + t * W);
      (a.D ? D * x : D).store(y + t * W);
    }
  }
  template <bool Plain> static ZK_INLINE V part(const T *p, int lanes) { return Plain ? V::load(p) : V::load_n(p, lanes); }

  template <bool Plain>
  static ZK_INLINE void epilogue(const ForwardArgs &f, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t c, int64_t end, const T *ZK_RESTRICT y) {
    const ScanArgs &a = f.scan;
    int lanes = Plain ? W : int(min_of(W, end - c));
    Column<V, Plain> z(a.z, b, 0, c), out(at(f.y, b * a.length * a.channels + c, f.y_dtype), a.channels, f.y_dtype);
    for (int64_t t = 0; t < steps; ++t) {
      V sum = V::load(y + t * W);
      if (z.p) sum = sum * silu(z.get(rows[t], 0, lanes));
      if (k) sum = sum + out.get(rows[t], 0, lanes);
      out.put(sum, rows[t], 0, lanes);
    }
  }

  static int64_t run(const ForwardArgs &f) {
    const ScanArgs &a = f.scan;
    // Channels in a block: as many as leave work for all threads, for a row's part should be long (with 768 channels the scan
    // took 1.28 ms where 384 took 1.50), but no more than have their states in the second level of cache. The results do not
    // depend on it.
    int64_t size = 768;
    while (size > 16 && a.batch * ChannelBlocks(a, size).total(a) < a.threads) size -= size > 128 ? 64 : 16;
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
