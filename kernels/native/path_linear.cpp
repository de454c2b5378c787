// Many rows times a matrix, one for each path. The rows of several paths lie side by side (a convolution writes them so),
// and a library's product would want them copied apart; nor are its few columns what libraries do well.

#include "gemm.h"

namespace ZK_NAMESPACE {

struct PathLinearArgs {
  int64_t batch, length, paths, features, out, threads, dual;
  const void *x;  // (batch, length, paths, features) of the working type, strides below, last axis contiguous
  int64_t x_b, x_l, x_k;
  const void *weight;  // (paths, out, features), contiguous
  void *y;             // (batch, length, paths, out), contiguous
};

template <class V> struct PathLinear {
  using T = typename V::T;
  static constexpr int W = V::W;
  static constexpr int64_t kPanel = kTileVectors * W, kRows = 96;
  // Panels of a work item: at a kilobyte a feature they stay in the second level of cache, while the rows go by.
  static constexpr int64_t kPanels = 4;

  PathLinearArgs a;
  int64_t panels, panel_size;
  T *weights = nullptr;  // of each path and panel: [features][kPanel], zeros beyond the last output

  explicit PathLinear(const PathLinearArgs &args) : a(args), panels(ceil_div(args.out, kPanel)), panel_size(args.features * kPanel) {
    if (a.x_b == a.length * a.x_l) {  // one long list of rows
      a.length *= a.batch;
      a.batch = 1;
    }
  }
  void pack(int64_t i) const {
    int64_t k = i / panels, first = i % panels * kPanel, count = min_of(kPanel, a.out - first);
    T *to = weights + i * panel_size;
    if (count < kPanel)
      for (int64_t n = 0; n < panel_size; ++n) to[n] = T(0);
    transpose<V>(count, a.features, static_cast<const T *>(a.weight) + (k * a.out + first) * a.features, a.features, to, kPanel);
  }
  void item(int64_t i, T *spare) const {
    int64_t blocks = ceil_div(a.length, kRows), groups = ceil_div(panels, kPanels);
    int64_t first = i % blocks * kRows, rows = min_of(kRows, a.length - first);
    i /= blocks;
    int64_t b = i % a.batch, group = i / a.batch % groups, k = i / a.batch / groups;
    Left<T> x{static_cast<const T *>(a.x) + b * a.x_b + first * a.x_l + k * a.x_k, a.x_l, 1};
    int64_t stride = a.paths * a.out;
    T *y = static_cast<T *>(a.y) + ((b * a.length + first) * a.paths + k) * a.out;
    for (int64_t p = group * kPanels; p < min_of(panels, (group + 1) * kPanels); ++p) {
      const T *panel = weights + (k * panels + p) * panel_size;
      int64_t count = min_of(kPanel, a.out - p * kPanel);
      if (count % W == 0) {
        product<V>(rows, count / W, a.features, x, panel, kPanel, y + p * kPanel, stride, T(0));
        continue;
      }
      product<V>(rows, ceil_div(count, W), a.features, x, panel, kPanel, spare, kPanel, T(0));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < count; c += W) V::load(spare + r * kPanel + c).store_n(y + p * kPanel + r * stride + c, int(min_of(W, count - c)));
    }
  }
  int64_t run() {
    int64_t threads = a.threads < 1 ? 1 : a.threads, spare = kRows * kPanel;
    Scratch<T> memory(a.paths * panels * panel_size + threads * spare);
    if (!memory.data) return ZK_NO_MEMORY;
    weights = memory.data;
    T *spares = weights + a.paths * panels * panel_size;
    int64_t counts[] = {a.paths * panels, a.paths * ceil_div(panels, kPanels) * a.batch * ceil_div(a.length, kRows)};
    return in_stages(threads, 2, counts, [&](int64_t stage, int64_t i, int64_t member) {
      if (stage) item(i, spares + member * spare);
      else pack(i);
    });
  }
};

} // namespace ZK_NAMESPACE

ZK_EXPORT(path_linear)(const int64_t *p) {
  using namespace ZK_NAMESPACE;
  const PathLinearArgs &a = *reinterpret_cast<const PathLinearArgs *>(p);
  return a.dual ? PathLinear<VD>(a).run() : PathLinear<VF>(a).run();
}
