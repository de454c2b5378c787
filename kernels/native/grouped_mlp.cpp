// Groups of points through a residual network and the maximum over each group, forward. A few groups at a time go through
// all of it, so that their rows, by far the largest tensor of such a network, never leave the second level of cache.

#include "gemm.h"

namespace ZK_NAMESPACE {

struct GroupedArgs {
  int64_t batch, points, centres, neighbours, channels, inner, blocks, threads, dual;
  // All of the working type and contiguous.
  const void *table;                // (batch, points, channels)
  const void *base;                 // (batch, centres, channels)
  const int64_t *index;             // (batch, centres, neighbours)
  const int64_t *anchor;            // (batch, centres): the point whose row a group's are relative to; or null
  const void *scale;                // (batch): of these; or null
  const void *first, *first_bias;   // (blocks, inner, channels), (blocks, inner)
  const void *second, *second_bias; // (blocks, channels, inner), (blocks, channels)
  void *y;                          // (batch, centres, channels)
};

template <class V> struct Grouped {
  using T = typename V::T;
  static constexpr int W = V::W;
  static constexpr int64_t kNumbers = 32768;  // of a work item's rows, before and inside a block: an eighth of a megabyte

  const GroupedArgs &a;
  const int64_t C, I, wide_C, wide_I;  // widths, and these in whole vectors
  const int64_t groups;                // of a work item
  T *weights = nullptr;                // of each block: first as [C][wide_I], its bias, second as [I][wide_C], its bias

  static int64_t whole(int64_t n) { return ceil_div(n, W) * W; }
  explicit Grouped(const GroupedArgs &args)
      : a(args), C(args.channels), I(args.inner), wide_C(whole(C)), wide_I(whole(I)), groups(groups_of(args, wide_C + wide_I)) {}
  static int64_t groups_of(const GroupedArgs &a, int64_t width) {
    int64_t most = kNumbers / (width * a.neighbours);
    return most < 1 ? 1 : min_of(most, a.centres);
  }
  int64_t weight_size() const { return (C + 1) * wide_I + (I + 1) * wide_C; }
  int64_t rows_size() const { return groups * a.neighbours * (wide_C + wide_I); }

  static V part(const T *p, int64_t n) { return n >= W ? V::load(p) : V::load_n(p, int(n)); }

  // One layer of `out` by `in` as [in][wide], and its bias; lanes beyond the last output are 0.
  static T *packed(const void *weight, const void *bias, int64_t block, int64_t out, int64_t in, int64_t wide, T *to) {
    if (wide != out)
      for (int64_t i = 0; i < in * wide; ++i) to[i] = T(0);
    transpose<V>(out, in, static_cast<const T *>(weight) + block * out * in, in, to, wide);
    to += in * wide;
    for (int64_t o = 0; o < wide; ++o) to[o] = o < out ? static_cast<const T *>(bias)[block * out + o] : T(0);
    return to + wide;
  }
  void pack(int64_t block) const {
    T *to = packed(a.first, a.first_bias, block, I, C, wide_I, weights + block * weight_size());
    packed(a.second, a.second_bias, block, C, I, wide_C, to);
  }

  // relu(scale (table[index] - table[anchor]) + base) of the item's groups. (relu as vmax(0, x): NaN is handed on.)
  void gather(int64_t b, int64_t first, int64_t count, T *ZK_RESTRICT x) const {
    const T *table = static_cast<const T *>(a.table) + b * a.points * C;
    V scale = V::set1(a.scale ? static_cast<const T *>(a.scale)[b] : T(1));
    for (int64_t s = first; s < first + count; ++s, x += a.neighbours * wide_C) {
      const T *base = static_cast<const T *>(a.base) + (b * a.centres + s) * C;
      const T *anchor = a.anchor ? table + a.anchor[b * a.centres + s] * C : nullptr;
      const int64_t *index = a.index + (b * a.centres + s) * a.neighbours;
      for (int64_t c = 0; c < C; c += W) {
        V own = part(base + c, C - c), middle = anchor ? part(anchor + c, C - c) : zero<V>();
        for (int64_t j = 0; j < a.neighbours; ++j)
          vmax(zero<V>(), fma(scale, part(table + index[j] * C + c, C - c) - middle, own)).store(x + j * wide_C + c);
      }
    }
  }
  static void bias_relu(int64_t rows, int64_t wide, const T *ZK_RESTRICT bias, T *ZK_RESTRICT x) {
    for (int64_t r = 0; r < rows; ++r, x += wide)
      for (int64_t c = 0; c < wide; c += W) vmax(zero<V>(), V::load(x + c) + V::load(bias + c)).store(x + c);
  }

  // The largest of n vectors. Each is NaN where one of them is: a sum shows whether there is one, which vmax may lose.
  V largest(const T *x, int64_t n) const {
    V most = V::load(x), sum = most;
    for (int64_t j = 1; j < n; ++j) {
      V next = V::load(x + j * wide_C);
      most = vmax(most, next);
      sum = sum + next;
    }
    T total = sum.sum();
    if (total == total) return most;
    T lanes[W];
    most.store(lanes);
    for (int64_t j = 0; j < n; ++j)
      for (int i = 0; i < W; ++i)
        if (const T v = x[j * wide_C + i]; v != v) lanes[i] = v;
    return V::load(lanes);
  }
  // The maxima of the groups' rows, and what comes after: what is monotone and the same for a group is done once.
  void pool(int64_t b, int64_t first, int64_t count, const T *x, const T *bias) const {
    for (int64_t s = first; s < first + count; ++s, x += a.neighbours * wide_C) {
      T *y = static_cast<T *>(a.y) + (b * a.centres + s) * C;
      for (int64_t c = 0; c < C; c += W) {
        V most = largest(x + c, a.neighbours);
        if (bias) most = vmax(zero<V>(), most + V::load(bias + c));
        if (C - c >= W) most.store(y + c);
        else most.store_n(y + c, int(C - c));
      }
    }
  }

  void item(int64_t i, T *x) const {
    int64_t items = ceil_div(a.centres, groups), b = i / items, first = i % items * groups;
    int64_t count = min_of(groups, a.centres - first), rows = count * a.neighbours;
    T *inside = x + groups * a.neighbours * wide_C;
    gather(b, first, count, x);
    const T *last = nullptr;
    for (int64_t k = 0; k < a.blocks; ++k) {
      const T *one = weights + k * weight_size(), *one_bias = one + C * wide_I, *two = one_bias + wide_I;
      if (last) bias_relu(rows, wide_C, last, x);
      product<V>(rows, wide_I / W, C, {x, wide_C, 1}, one, wide_I, inside, wide_I, T(0));
      bias_relu(rows, wide_I, one_bias, inside);
      product<V>(rows, wide_C / W, I, {inside, wide_I, 1}, two, wide_C, x, wide_C, T(1));
      last = two + I * wide_C;
    }
    pool(b, first, count, x, last);
  }

  int64_t run() {
    int64_t threads = a.threads < 1 ? 1 : a.threads;
    Scratch<T> memory(a.blocks * weight_size() + threads * rows_size() + W);
    if (!memory.data) return ZK_NO_MEMORY;
    weights = memory.data;
    T *rows = weights + a.blocks * weight_size();
    int64_t counts[] = {a.blocks, a.batch * ceil_div(a.centres, groups)};
    return in_stages(threads, 2, counts, [&](int64_t stage, int64_t i, int64_t member) {
      if (stage) item(i, rows + member * rows_size());
      else pack(i);
    });
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(grouped_mlp)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const GroupedArgs &a = *reinterpret_cast<const GroupedArgs *>(p);
  return a.dual ? Grouped<VD>(a).run() : Grouped<VF>(a).run();
}
