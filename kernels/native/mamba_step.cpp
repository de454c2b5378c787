// One token through a whole stack of Mamba or Mamba-2 blocks, for decoding one text on a CPU.
//
// A step reads every weight once and does little else, so what counts is that nothing comes between two reads: the stack is
// one visit to the threads, three or four stages a block; norms and output gates are computed by every thread for itself,
// the convolution, the recurrence and the gates run where their operands are still in registers or in the first cache, and
// the state is updated where it lies. Weights are float32, bfloat16,
// float16, or int8 with one factor a row; everything else is float32.

#include "vec.h"

namespace ZK_NAMESPACE {

struct Matrix {  // (out, features), contiguous; sizes follow from the block
  const void *w;
  int64_t dtype;
  const float *scale, *bias;  // (out), or null
};

// kind 1: Mamba. in = [x, z]; convolution over x; xproj gives [dt (rank), B, C]; A, D a channel.
// kind 2: Mamba-2. in = [z, x, B, C, dt]; convolution over x, B and C; A a head, D a channel; heads * headdim = inner.
struct Layer {
  int64_t kind, inner, states, width, rank, heads, groups, norm_before_gate;
  double norm_eps, gate_eps, low, high;
  const float *norm;       // (dim)
  Matrix in, xproj, dtproj, out;
  const float *conv, *conv_bias;  // (width, channels), (channels) or null
  const float *A, *D, *dt_bias, *gate_norm;  // A: (inner, states) or (heads); D: (inner); gate_norm: (inner) or null
  void *conv_state;        // (width, channels), the oldest input first
  int64_t conv_dtype;
  float *state;            // (inner, states) or (heads, headdim, states)
};

struct StackArgs {
  int64_t layers, dim, vocabulary, threads, token;
  const Layer *layer;
  const void *embedding;   // (vocabulary, dim)
  int64_t embedding_dtype;
  const float *norm;
  double eps;
  Matrix head;
  float *logits;           // (vocabulary)
  float *work;             // room() floats
};

template <class V> struct Stack {
  static constexpr int64_t W = V::W;
  static ZK_INLINE V load(const float *p, int n) { return n == W ? V::load(p) : V::load_n(p, n); }
  static ZK_INLINE void put(float *p, V v, int n) {
    if (n == W) v.store(p);
    else v.store_n(p, n);
  }

  // -- a matrix times a vector ------------------------------------------------------------------------------------------

  // One row after another, so that the weights come from memory as one stream; several rows at a time were slower.
  template <int64_t kType> static void rows_of(const Matrix &m, int64_t features, const float *x, int64_t first, int64_t end, float *y) {
    constexpr int kSums = 4;
    for (int64_t o = first; o < end; ++o) {
      const char *w = at(m.w, o * features, kType);
      V sum[kSums];
      for (int u = 0; u < kSums; ++u) sum[u] = zero<V>();
      int64_t k = 0;
      for (; k + kSums * W <= features; k += kSums * W)
        for (int u = 0; u < kSums; ++u) sum[u] = fma(load_as<V>(at(w, k + u * W, kType), kType, W), V::load(x + k + u * W), sum[u]);
      for (; k < features; k += W) {
        int n = int(min_of(W, features - k));
        sum[0] = fma(load_as<V>(at(w, k, kType), kType, n), load(x + k, n), sum[0]);
      }
      float s = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
      if (m.scale) s *= m.scale[o];
      if (m.bias) s += m.bias[o];
      y[o] = s;
    }
  }
  // y[first .. end) = rows of m times x
  static void rows(const Matrix &m, int64_t features, const float *x, int64_t first, int64_t end, float *y) {
    switch (m.dtype) {
    case ZK_F32: return rows_of<ZK_F32>(m, features, x, first, end, y);
    case ZK_BF16: return rows_of<ZK_BF16>(m, features, x, first, end, y);
    case ZK_F16: return rows_of<ZK_F16>(m, features, x, first, end, y);
    default: return rows_of<ZK_I8>(m, features, x, first, end, y);
    }
  }
  // Rows in a work item: about 48 KB of weights, a multiple of 16 (a whole vector of every width) where there are many.
  static int64_t span(const Matrix &m, int64_t features, int64_t out) {
    int64_t each = 49152 / (features * size_of(m.dtype) + 1) + 1;
    return out < 512 ? min_of(each, 4) : (each + 15) / 16 * 16;
  }

  // -- norms --------------------------------------------------------------------------------------------------------------

  static void rms(const float *x, const float *weight, double eps, int64_t size, float *y) {
    V sum = zero<V>();
    for (int64_t c = 0; c < size; c += W) {
      V v = load(x + c, int(min_of(W, size - c)));
      sum = fma(v, v, sum);
    }
    V scale = V::set1(float(1 / sqrt(double(sum.sum()) / double(size) + eps)));
    for (int64_t c = 0; c < size; c += W) {
      int n = int(min_of(W, size - c));
      put(y + c, load(x + c, n) * scale * load(weight + c, n), n);
    }
  }
  // Mamba-2's output norm and gate: from y to out.
  static void gate(const Layer &l, const float *y, const float *z, float *out) {
    auto times_gate = [&](const float *from) {
      for (int64_t c = 0; c < l.inner; c += W) {
        int n = int(min_of(W, l.inner - c));
        put(out + c, load(from + c, n) * silu(load(z + c, n)), n);
      }
    };
    bool first = !l.norm_before_gate || !l.gate_norm;
    if (first) times_gate(y);
    if (!l.gate_norm) return;
    int64_t size = l.inner / l.groups;
    for (int64_t g = 0; g < l.groups; ++g)
      rms((first ? out : y) + g * size, l.gate_norm + g * size, l.gate_eps, size, out + g * size);
    if (l.norm_before_gate) times_gate(out);
  }

  // -- the recurrent parts ------------------------------------------------------------------------------------------------

  // Channels first .. end of the convolution: the window moves on by x, which becomes silu(conv(x)).
  static void convolve(const Layer &l, int64_t channels, float *x, int64_t first, int64_t end) {
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      V now = load(x + c, n), sum = l.conv_bias ? load(l.conv_bias + c, n) : zero<V>();
      for (int64_t k = 0; k < l.width; ++k) {
        char *place = at(l.conv_state, k * channels + c, l.conv_dtype);
        V next = k + 1 < l.width ? load_as<V>(at(l.conv_state, (k + 1) * channels + c, l.conv_dtype), l.conv_dtype, n) : now;
        store_as(next, place, l.conv_dtype, n);
        if (k + 1 == l.width) next = load_as<V>(place, l.conv_dtype, n);  // as it was rounded
        sum = fma(next, load(l.conv + k * channels + c, n), sum);
      }
      put(x + c, silu(sum), n);
    }
  }

  // Mamba: channels first .. end. r = [dt (rank), B, C]; x, z as convolved and projected; y may be x.
  static void scan(const Layer &l, const float *r, float *dt, const float *x, const float *z, float *y, int64_t first, int64_t end) {
    rows(l.dtproj, l.rank, r, first, end, dt);  // with the bias
    const float *B = r + l.rank, *C = B + l.states;
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      put(dt + c, softplus(load(dt + c, n)), n);
    }
    FlushSubnormals flush;
    for (int64_t c = first; c < end; ++c) {
      float *h = l.state + c * l.states;
      const float *A = l.A + c * l.states;  // times log2 e
      V d = V::set1(dt[c]), dx = V::set1(dt[c] * x[c]), sum = zero<V>();
      for (int64_t i = 0; i < l.states; i += W) {
        int n = int(min_of(W, l.states - i));
        V now = fma(exp2_of(d * load(A + i, n)), load(h + i, n), dx * load(B + i, n));
        put(h + i, now, n);
        sum = fma(now, load(C + i, n), sum);
      }
      dt[c] = sum.sum();
    }
    for (int64_t c = first; c < end; c += W) {
      int n = int(min_of(W, end - c));
      put(y + c, fma(load(l.D + c, n), load(x + c, n), load(dt + c, n)) * silu(load(z + c, n)), n);
    }
  }

  // Mamba-2: head h. x, B and C as convolved; dt as projected.
  static void head(const Layer &l, const float *x, const float *B, const float *C, float raw, float *y, int64_t h) {
    int64_t size = l.inner / l.heads, g = h / (l.heads / l.groups);
    float t[W];
    softplus(V::set1(raw + l.dt_bias[h])).store(t);
    float d = t[0] < float(l.low) ? float(l.low) : t[0] > float(l.high) ? float(l.high) : t[0];
    exp_of(V::set1(d * l.A[h])).store(t);
    V keep = V::set1(t[0]);
    B += g * l.states;
    C += g * l.states;
    FlushSubnormals flush;
    for (int64_t p = h * size; p < (h + 1) * size; ++p) {
      float *s = l.state + p * l.states;
      V add = V::set1(d * x[p]), sum = zero<V>(), other = zero<V>();
      int64_t i = 0;
      for (; i + 2 * W <= l.states; i += 2 * W) {
        V a = fma(keep, V::load(s + i), add * V::load(B + i)), b = fma(keep, V::load(s + i + W), add * V::load(B + i + W));
        a.store(s + i);
        b.store(s + i + W);
        sum = fma(a, V::load(C + i), sum);
        other = fma(b, V::load(C + i + W), other);
      }
      for (; i < l.states; i += W) {
        int n = int(min_of(W, l.states - i));
        V a = fma(keep, load(s + i, n), add * load(B + i, n));
        put(s + i, a, n);
        sum = fma(a, load(C + i, n), sum);
      }
      y[p] = (sum + other).sum() + l.D[p] * x[p];
    }
  }

  // -- the stack ----------------------------------------------------------------------------------------------------------

  static constexpr int64_t kStages = 4;     // a block: projections in, Mamba's dt, B and C, the recurrence, the projection out
  static constexpr int64_t kChannels = 64;  // of a work item of Mamba's recurrence

  static int64_t pad(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t projected(const Layer &l) {
    return l.kind == 1 ? 2 * l.inner : 2 * l.inner + 2 * l.groups * l.states + l.heads;
  }

  // What a thread keeps for itself: the normed stream or the gated output that the stage starts from.
  struct Own {
    int64_t stage;
    float *vector;
  };

  // Work item i of a stage of block l, for the rows or channels that it stands for.
  static void item(const StackArgs &a, int64_t stage, int64_t i, float *x, float *rest, Own &own) {
    const Layer &l = a.layer[stage / kStages];
    int64_t E = l.inner, N = l.groups * l.states, channels = E + 2 * N;
    float *y = rest, *r = y + pad(E), *p = r + pad(l.rank + 2 * l.states);
    bool fresh = own.stage != stage;
    own.stage = stage;
    auto range = [&](int64_t each, int64_t out, auto work) { work(i * each, min_of((i + 1) * each, out)); };
    switch (stage % kStages) {
    case 0: {
      if (fresh) rms(x, l.norm, l.norm_eps, a.dim, own.vector);
      int64_t out = projected(l);
      return range(span(l.in, a.dim, out), out, [&](int64_t first, int64_t end) {
        rows(l.in, a.dim, own.vector, first, end, p);
        int64_t skip = l.kind == 1 ? 0 : E, count = l.kind == 1 ? E : channels;  // of the projections, what is convolved
        int64_t c = first < skip ? 0 : first - skip, stop = min_of(end - skip, count);
        if (c < stop) convolve(l, count, p + skip, c, stop);
      });
    }
    case 1: {  // Mamba only
      int64_t out = l.rank + 2 * l.states;
      return range(span(l.xproj, E, out), out, [&](int64_t first, int64_t end) { rows(l.xproj, E, p, first, end, r); });
    }
    case 2:
      if (l.kind == 1) return range(kChannels, E, [&](int64_t first, int64_t end) { scan(l, r, y, p, p + E, y, first, end); });
      return head(l, p + E, p + 2 * E, p + 2 * E + N, p[E + channels + i], y, i);
    default: {
      const float *from = y;
      if (l.kind == 2) {
        if (fresh) gate(l, y, p, own.vector);
        from = own.vector;
      }
      return range(span(l.out, E, a.dim), a.dim, [&](int64_t first, int64_t end) {
        float o[256];
        for (int64_t c = first; c < end; c += 256) {
          int64_t stop = min_of(c + 256, end);
          rows(l.out, E, from, c, stop, o - c);
          for (int64_t k = c; k < stop; ++k) x[k] += o[k - c];
        }
      });
    }
    }
  }

  static int64_t step(const StackArgs &a) {
    float *x = a.work, *rest = x + pad(a.dim);
    int64_t stages = a.layers * kStages + 1, threads = min_of(a.threads > 1 ? a.threads : 1, 64), room = pad(a.dim);
    for (int64_t i = 0; i < a.layers; ++i)
      if (room < pad(a.layer[i].inner)) room = pad(a.layer[i].inner);
    Scratch<int64_t> counts(stages);
    Scratch<Own> own(threads);
    Scratch<float> vectors(threads * room);
    if (!counts.data || !own.data || !vectors.data) return ZK_NO_MEMORY;
    for (int64_t t = 0; t < threads; ++t) own.data[t] = {-1, vectors.data + t * room};
    for (int64_t i = 0; i < a.layers; ++i) {
      const Layer &l = a.layer[i];
      int64_t *count = counts.data + i * kStages, few = l.rank + 2 * l.states;
      count[0] = ceil_div(projected(l), span(l.in, a.dim, projected(l)));
      count[1] = l.kind == 1 ? ceil_div(few, span(l.xproj, l.inner, few)) : 0;
      count[2] = l.kind == 1 ? ceil_div(l.inner, kChannels) : l.heads;
      count[3] = ceil_div(a.dim, span(l.out, l.inner, a.dim));
    }
    int64_t each = span(a.head, a.dim, a.vocabulary);
    counts.data[stages - 1] = ceil_div(a.vocabulary, each);

    const char *token = at(a.embedding, a.token * a.dim, a.embedding_dtype);
    for (int64_t c = 0; c < a.dim; c += W) {
      int n = int(min_of(W, a.dim - c));
      put(x + c, load_as<V>(at(token, c, a.embedding_dtype), a.embedding_dtype, n), n);
    }
    return in_stages(threads, stages, counts.data, [&](int64_t stage, int64_t i, int64_t member) {
      Own &mine = own.data[member];
      if (stage + 1 < stages) return item(a, stage, i, x, rest, mine);
      if (mine.stage != stage) rms(x, a.norm, a.eps, a.dim, mine.vector);
      mine.stage = stage;
      rows(a.head, a.dim, mine.vector, i * each, min_of((i + 1) * each, a.vocabulary), a.logits);
    });
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(mamba_step)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  return Stack<VF>::step(*reinterpret_cast<const StackArgs *>(p));
}
