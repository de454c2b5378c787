// A decoding step of Mamba-3 (zoo_kernels.ops.mamba3_scan): angles, rotation, state, gate and the sum over ranks at once.
//
//   theta += pi tanh(angles) dt,   K^r, Q^r = rotate(B^r + bias, theta), rotate(C^r + bias, theta)
//   h = alpha h + sum over r of (1 - lam) dt alpha v_last^r K_last^r + lam dt v^r K^r,   y^r = h Q^r + D v^r
//
// with alpha = exp(A dt), lam = sigmoid(trap), v^r = x mimo_x^r. The state h (batch, heads, headdim, states) is read and
// written once, where it lies; so are theta, and K and x of the last step. All tensors are contiguous and of the working type.

#include "vec.h"

namespace ZK_NAMESPACE {

struct Mamba3StepArgs {
  int64_t batch, heads, groups, headdim, states, ranks, angles, halves, contract, threads, dual;
  const void *x, *dt, *A, *B, *C, *trap, *turn;     // turn: (batch, angles)
  const void *D, *z, *B_bias, *C_bias;              // (heads), (batch, heads, headdim), (heads, ranks, states); may be null
  const void *mimo_x, *mimo_z, *mimo_o;             // (heads, ranks, headdim); may be null
  void *theta, *state, *last_K, *last_x;            // (batch, heads, angles), .., (batch, ranks, heads, states), like x
  void *y;  // (batch, heads, headdim), gated and summed over ranks, with `contract`; else (batch, ranks, heads, headdim)
};

// The C names: an overload of the C++ library would be an inline function of this instruction set (see zk.h).
ZK_INLINE float tanh_of(float x) { return tanhf(x); }
ZK_INLINE double tanh_of(double x) { return tanh(x); }
ZK_INLINE float cos_of(float x) { return cosf(x); }
ZK_INLINE double cos_of(double x) { return cos(x); }
ZK_INLINE float sin_of(float x) { return sinf(x); }
ZK_INLINE double sin_of(double x) { return sin(x); }

template <class V> struct Mamba3Step {
  using T = typename V::T;
  static constexpr int64_t W = V::W;
  static ZK_INLINE V load(const T *p, int n) { return n == W ? V::load(p) : V::load_n(p, n); }
  static ZK_INLINE T exp1(T x) { T t[W]; exp_of(V::set1(x)).store(t); return t[0]; }
  static ZK_INLINE T sigmoid1(T x) { T t[W]; sigmoid(V::set1(x)).store(t); return t[0]; }
  static ZK_INLINE T silu1(T x) { return x * sigmoid1(x); }

  // out = rotate(in + bias): pairs (i, i + states / 2) where `halves`, else neighbours; the other channels pass.
  static void rotate(const Mamba3StepArgs &a, const T *in, const T *bias, const T *cosine, const T *sine, T *out) {
    for (int64_t n = 0; n < a.states; ++n) out[n] = in[n] + (bias ? bias[n] : T(0));
    for (int64_t i = 0; i < a.angles; ++i) {
      T *first = out + (a.halves ? i : 2 * i), *second = a.halves ? first + a.states / 2 : first + 1;
      T u = *first, w = *second;
      *first = u * cosine[i] - w * sine[i];
      *second = u * sine[i] + w * cosine[i];
    }
  }

  // One row of the state for any number of ranks; read[r] = its product with Q^r. old, add: what scales K_last^r and K^r.
  static ZK_INLINE void row(T *h, T alpha, int64_t ranks, const T *old, const T *add, const T *last_K, int64_t last_r, const T *K, const T *Q,
                            int64_t states, T *read) {
    V keep = V::set1(alpha);
    if (ranks == 1) {
      V o = V::set1(old[0]), n = V::set1(add[0]), sum = zero<V>();
      for (int64_t j = 0; j < states; j += W) {
        int lanes = int(min_of(W, states - j));
        V x = fma(n, load(K + j, lanes), fma(o, load(last_K + j, lanes), keep * load(h + j, lanes)));
        if (lanes == W) x.store(h + j);
        else x.store_n(h + j, lanes);
        sum = fma(x, load(Q + j, lanes), sum);
      }
      read[0] = sum.sum();
      return;
    }
    for (int64_t j = 0; j < states; j += W) {
      int lanes = int(min_of(W, states - j));
      V x = keep * load(h + j, lanes);
      for (int64_t r = 0; r < ranks; ++r)
        x = fma(V::set1(add[r]), load(K + r * states + j, lanes), fma(V::set1(old[r]), load(last_K + r * last_r + j, lanes), x));
      x.store_n(h + j, lanes);
    }
    for (int64_t r = 0; r < ranks; ++r) {
      V sum = zero<V>();
      for (int64_t j = 0; j < states; j += W) {
        int lanes = int(min_of(W, states - j));
        sum = fma(load(h + j, lanes), load(Q + r * states + j, lanes), sum);
      }
      read[r] = sum.sum();
    }
  }

  static void head(const Mamba3StepArgs &a, int64_t i, int64_t *failed) {
    int64_t b = i / a.heads, h = i % a.heads, g = h / (a.heads / a.groups), N = a.states, P = a.headdim, R = a.ranks;
    Scratch<T> memory(2 * a.angles + 2 * R * N + 3 * R);
    if (!memory.data) { *failed = ZK_NO_MEMORY; return; }
    T *cosine = memory.data, *sine = cosine + a.angles, *K = sine + a.angles, *Q = K + R * N, *old = Q + R * N, *add = old + R, *read = add + R;
    T d = static_cast<const T *>(a.dt)[i], lam = sigmoid1(static_cast<const T *>(a.trap)[i]), alpha = exp1(d * static_cast<const T *>(a.A)[i]);
    T *theta = static_cast<T *>(a.theta) + i * a.angles;
    const T *turn = static_cast<const T *>(a.turn) + b * a.angles;
    for (int64_t s = 0; s < a.angles; ++s) {
      theta[s] += T(3.141592653589793) * tanh_of(turn[s]) * d;
      cosine[s] = cos_of(theta[s]);
      sine[s] = sin_of(theta[s]);
    }
    auto of_rank = [&](const void *p, int64_t r, int64_t width) { return p ? static_cast<const T *>(p) + (h * R + r) * width : nullptr; };
    for (int64_t r = 0; r < R; ++r) {
      int64_t in = ((b * R + r) * a.groups + g) * N;
      rotate(a, static_cast<const T *>(a.B) + in, of_rank(a.B_bias, r, N), cosine, sine, K + r * N);
      rotate(a, static_cast<const T *>(a.C) + in, of_rank(a.C_bias, r, N), cosine, sine, Q + r * N);
    }
    T before = (1 - lam) * d * alpha, now = lam * d, D = a.D ? static_cast<const T *>(a.D)[h] : T(0);
    const T *x = static_cast<const T *>(a.x) + i * P, *z = a.z ? static_cast<const T *>(a.z) + i * P : nullptr;
    T *last_x = static_cast<T *>(a.last_x) + i * P, *last_K = static_cast<T *>(a.last_K) + (b * R * a.heads + h) * N;
    T *state = static_cast<T *>(a.state) + i * P * N, *y = static_cast<T *>(a.y);
    FlushSubnormals flush;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t r = 0; r < R; ++r) {
        T gain = a.mimo_x ? of_rank(a.mimo_x, r, P)[p] : T(1);
        old[r] = before * last_x[p] * gain;
        add[r] = now * x[p] * gain;
      }
      row(state + p * N, alpha, R, old, add, last_K, a.heads * N, K, Q, N, read);
      T sum = T(0);
      for (int64_t r = 0; r < R; ++r) {
        T out = a.D ? read[r] + D * (a.mimo_x ? of_rank(a.mimo_x, r, P)[p] : T(1)) * x[p] : read[r];
        if (!a.contract) { y[((b * R + r) * a.heads + h) * P + p] = out; continue; }
        if (z) out *= silu1(a.mimo_z ? z[p] * of_rank(a.mimo_z, r, P)[p] : z[p]);
        sum += a.mimo_o ? out * of_rank(a.mimo_o, r, P)[p] : out;
      }
      if (a.contract) y[i * P + p] = sum;
      last_x[p] = x[p];
    }
    for (int64_t r = 0; r < R; ++r) memcpy(last_K + r * a.heads * N, K + r * N, size_t(N) * sizeof(T));
  }

  static int64_t run(const Mamba3StepArgs &a) {
    int64_t count = a.batch * a.heads, failed = ZK_OK;
    // Few small states are not worth waking threads for.
    int64_t threads = count * a.headdim * a.states * int64_t(sizeof(T)) < 1 << 18 ? 1 : a.threads;
    parallel(threads, count, [&](int64_t i) { head(a, i, &failed); });
    return failed;
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(mamba3_step)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const Mamba3StepArgs &a = *reinterpret_cast<const Mamba3StepArgs *>(p);
  return a.dual ? Mamba3Step<VD>::run(a) : Mamba3Step<VF>::run(a);
}
