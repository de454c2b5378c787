// One decoding step of the selective scan: the state (batch, channels, states) is read and written once, where it lies.

#include "vec.h"

namespace ZK_NAMESPACE {

struct Vector2 {  // (batch, channels), or (channels) with b = 0; last axis contiguous; null where absent
  const void *p;
  int64_t dtype, b;
};
struct StepArgs {
  int64_t batch, channels, groups, states, softplus, threads, dual;
  Vector2 u, dt, z, D, bias;
  const void *A;  // (channels, states)
  int64_t A_dtype, A_c;
  const void *B;  // (batch, groups, states)
  int64_t B_dtype, B_b, B_g;
  const void *C;
  int64_t C_dtype, C_b, C_g;
  void *state;  // of the working type, contiguous
  void *y;      // (batch, channels), contiguous
  int64_t y_dtype;
};

template <class V> struct Step {
  using T = typename V::T;
  static constexpr int W = V::W;
  static constexpr int64_t kBlock = 64, kAhead = 32;  // channels at a time; channels between a state's fetch and its use

  static ZK_INLINE V get(const Vector2 &x, int64_t b, int64_t c, int n) { return load_as<V>(at(x.p, b * x.b + c, x.dtype), x.dtype, n); }

  static void item(const StepArgs &a, int64_t b, int64_t first, int64_t end) {
    T d[kBlock + W], dx[kBlock + W], y[kBlock + W];
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      V x = get(a.u, b, c, n), s = get(a.dt, b, c, n);
      if (a.bias.p) s = s + get(a.bias, 0, c, n);
      if (a.softplus) s = softplus(s);
      s.store(d + (c - first));
      (s * x).store(dx + (c - first));
    }
    int64_t size = a.channels / a.groups;
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    bool plain = a.A_dtype == own && a.B_dtype == own && a.C_dtype == own;
    if (plain && a.states == W) walk<1>(a, b, first, end, size, d, dx, y);
    else if (plain && a.states % W == 0) walk<0>(a, b, first, end, size, d, dx, y);
    else walk<-1>(a, b, first, end, size, d, dx, y);
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      V out = V::load_n(y + (c - first), n);
      if (a.D.p) out = fma(get(a.D, 0, c, n), get(a.u, b, c, n), out);
      if (a.z.p) out = out * silu(get(a.z, b, c, n));
      store_as(out, at(a.y, b * a.channels + c, a.y_dtype), a.y_dtype, n);
    }
  }

  // Kind: 1 one whole vector of states of the working type, 0 several whole vectors, -1 anything.
  template <int Kind>
  static ZK_INLINE void walk(const StepArgs &a, int64_t b, int64_t first, int64_t end, int64_t size, const T *d, const T *dx, T *y) {
    constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
    const int64_t A_dtype = Kind < 0 ? a.A_dtype : own, B_dtype = Kind < 0 ? a.B_dtype : own, C_dtype = Kind < 0 ? a.C_dtype : own;
    const int64_t states = Kind == 1 ? W : a.states;
    for (int64_t c = first; c < end; ++c) {
      T *h = static_cast<T *>(a.state) + (b * a.channels + c) * states;
      const char *A = at(a.A, c * a.A_c, A_dtype), *B = at(a.B, b * a.B_b + c / size * a.B_g, B_dtype), *C = at(a.C, b * a.C_b + c / size * a.C_g, C_dtype);
      // The processor's own prefetching ends at each page, of which a state of 16 fills one every 64 channels.
      if (Kind == 1) ZK_PREFETCH(h + kAhead * states);
      V dv = V::set1(d[c - first] * T(1.4426950408889634)), xv = V::set1(dx[c - first]), sum = zero<V>();
      for (int64_t i = 0; i < states; i += W) {
        int n = Kind < 0 ? int(min_of(W, states - i)) : W;
        V old = n == W ? V::load(h + i) : V::load_n(h + i, n);
        V now = fma(exp2_of(dv * load_as<V>(at(A, i, A_dtype), A_dtype, n)), old, xv * load_as<V>(at(B, i, B_dtype), B_dtype, n));
        if (n == W) now.store(h + i);
        else now.store_n(h + i, n);
        sum = fma(now, load_as<V>(at(C, i, C_dtype), C_dtype, n), sum);
      }
      y[c - first] = sum.sum();
    }
  }

  static int64_t run(const StepArgs &a) {
    int64_t blocks = ceil_div(a.channels, kBlock);
    // Waking threads takes longer than a small step.
    int64_t threads = a.batch * a.channels * a.states < 32768 ? 1 : a.threads;
    // Handing out a block takes about as long as working it off, so several go together.
    if (!a.batch || !blocks) return ZK_OK;
    int64_t total = a.batch * blocks, each = ceil_div(total, 8 * threads);
    parallel(threads, ceil_div(total, each), [&](int64_t span) {
      FlushSubnormals flush;
      for (int64_t i = span * each; i < min_of((span + 1) * each, total); ++i) {
        int64_t first = i % blocks * kBlock;
        item(a, i / blocks, first, min_of(first + kBlock, a.channels));
      }
    });
    return ZK_OK;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(selective_scan_step)(const int64_t *a) {
  using namespace ZK_NAMESPACE;
  const StepArgs &f = *reinterpret_cast<const StepArgs *>(a);
  return f.dual ? Step<VD>::run(f) : Step<VF>::run(f);
}
