// Calls every entry point of the native library over small odd shapes, without Python or torch, so that AddressSanitizer,
// ThreadSanitizer, valgrind and an emulated processor get through in a minute or two (.ci/sanitize).
//
//   native_driver LIBRARY [openmp] [quick] [INSTRUCTION SET ...]
//
// With `openmp`, GCC's OpenMP runtime is loaded first and work runs on its threads, as it does beside torch; without it on
// the library's own pool.
//
// Every tensor is an allocation of its own of exactly its size. What an instruction set computes is compared with what the
// first one (the baseline) computed; exits with 1 where they differ, or where an entry point is missing or fails.

#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

enum { F32 = 0, F64 = 1, BF16 = 2, F16 = 3, I8 = 4 };
constexpr int64_t kThreads = 3;

void *library;
std::string isa;
bool quick;
int failures;
std::map<std::string, std::vector<double>> baseline;

uint32_t seed;
double uniform() {  // -1 .. 1, the same for every instruction set
  seed = seed * 1664525u + 1013904223u;
  return double(seed >> 8) / double(1 << 23) - 1;
}
int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : dtype == F64 ? 8 : dtype == I8 ? 1 : 2; }
void put(char *p, int64_t dtype, double x) {
  if (dtype == F64) { memcpy(p, &x, 8); return; }
  float f = float(x);
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (dtype == F32) memcpy(p, &f, 4);
  else if (dtype == I8) *p = char(int(x * 100));
  else {  // halves: bfloat16 is the upper half; float16 of a number in 2^-14 .. 1
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == F16) half = fabs(x) < 1e-4 ? 0 : uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000u) >> 13);
    memcpy(p, &half, 2);
  }
}
double get(const char *p, int64_t dtype) {
  if (dtype == F64) { double x; memcpy(&x, p, 8); return x; }
  if (dtype == F32) { float x; memcpy(&x, p, 4); return x; }
  return 0;  // halves are not compared: a rounding may go either way
}

// The tensors and numbers of one call.
struct Call {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<std::pair<char *, std::pair<int64_t, int64_t>>> outputs;  // pointer, (count, dtype)
  std::vector<int64_t> numbers;

  char *make(int64_t bytes) {
    memory.emplace_back(new char[size_t(bytes ? bytes : 1)]);
    return memory.back().get();
  }
  int64_t in(int64_t count, int64_t dtype, double scale = 1, double shift = 0) {
    char *p = make(count * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) put(p + i * size_of(dtype), dtype, uniform() * scale + shift);
    return int64_t(p);
  }
  int64_t out(int64_t count, int64_t dtype) {  // zeros: some rows may not be visited
    char *p = make(count * size_of(dtype));
    memset(p, 0, size_t(count * size_of(dtype)));
    outputs.push_back({p, {count, dtype}});
    return int64_t(p);
  }
  int64_t in_place(int64_t count, int64_t dtype) {
    int64_t p = in(count, dtype, 0.5);
    outputs.push_back({reinterpret_cast<char *>(p), {count, dtype}});
    return p;
  }
  int64_t integers(const std::vector<int64_t> &values) {
    char *p = make(int64_t(values.size()) * 8);
    memcpy(p, values.data(), values.size() * 8);
    return int64_t(p);
  }
  int64_t flags(int64_t count, int64_t every) {
    char *p = make(count);
    for (int64_t i = 0; i < count; ++i) p[i] = char(i % every == every - 1);
    return int64_t(p);
  }
  Call &operator()(std::initializer_list<int64_t> more) {
    numbers.insert(numbers.end(), more);
    return *this;
  }

  void run(const std::string &name, const std::string &what) {
    auto entry = reinterpret_cast<int64_t (*)(const int64_t *)>(dlsym(library, ("zk_" + name + "__" + isa).c_str()));
    std::string label = name + " " + what;
    if (!entry) {
      fprintf(stderr, "%s: no entry point for %s\n", name.c_str(), isa.c_str());
      ++failures;
      return;
    }
    std::unique_ptr<int64_t[]> exact(new int64_t[numbers.size()]);  // an entry point that reads beyond its struct is caught
    memcpy(exact.get(), numbers.data(), numbers.size() * 8);
    if (entry(exact.get())) { fprintf(stderr, "%s: failed\n", label.c_str()); ++failures; }
    std::vector<double> found;
    bool dual = true;
    for (auto &o : outputs) {
      for (int64_t i = 0; i < o.second.first; ++i) found.push_back(get(o.first + i * size_of(o.second.second), o.second.second));
      dual = dual && o.second.second == F64;
    }
    auto first = baseline.find(label);
    if (first == baseline.end()) { baseline[label] = found; return; }
    double worst = 0, scale = 1e-3;
    for (size_t i = 0; i < found.size(); ++i) {
      double difference = fabs(found[i] - first->second[i]);
      if (!(difference <= worst)) worst = difference;
      scale = fmax(scale, fabs(first->second[i]));
    }
    if (!(worst <= scale * (dual ? 1e-10 : 1e-4))) {
      fprintf(stderr, "%s: %s differs from the baseline by %g of %g\n", label.c_str(), isa.c_str(), worst, scale);
      ++failures;
    }
  }
};

std::vector<int64_t> shuffled(int64_t length, int64_t steps) {
  std::vector<int64_t> order;
  int64_t stride = length % 7 ? 7 : length % 5 ? 5 : 11;  // coprime to the length: no row twice
  for (int64_t t = 0; t < steps; ++t) order.push_back((3 + t * stride) % length);
  return order;
}
std::string label(std::initializer_list<int64_t> values) {
  std::string s;
  for (int64_t v : values) s += std::to_string(v) + " ";
  return s;
}

// What a walk may have besides its tensors: path, reversal, resets, lengths.
struct Extras { bool path, reverse, resets, lengths; };
const Extras kExtras[] = {{false, false, false, false}, {true, true, true, true}};

void selective_scan(int64_t length, int64_t channels, int64_t states, int64_t groups, int64_t paths, int64_t dtype, const Extras &e) {
  int64_t batch = 2, work = dtype == F64 ? F64 : F32, steps = e.path ? (length + 1) / 2 : length, chunks = (steps + 63) / 64;
  for (int form = 0; form < 3; ++form) {
    bool backward = form == 1;
    int64_t rank = form == 2 ? length % 4 + 1 : 0;  // dt as a product of low rank
    std::string what = label({length, channels, states, groups, paths, dtype, e.path, rank});
    Call c;
    std::vector<int64_t> order;
    for (int64_t k = 0; e.path && k < paths; ++k) for (int64_t row : shuffled(length, steps)) order.push_back(row);
    char *reverse = c.make(paths);
    for (int64_t k = 0; k < paths; ++k) reverse[k] = char(e.reverse && k % 2 == 0);
    int64_t wide = paths * channels, bc = paths * groups * states;
    c({batch, length, steps, paths, channels, groups, states, 1, kThreads, work == F64});
    c({c.in(batch * length * channels, dtype), dtype, length * channels, channels, 0, 0});
    int64_t columns = rank ? rank : channels;
    c({c.in(batch * length * paths * columns, dtype), dtype, length * paths * columns, paths * columns, columns, 0});
    for (int i = 0; i < 2; ++i) c({c.in(batch * length * bc, dtype), dtype, length * bc, bc, groups * states, states});
    bool gate = paths == 1;
    if (gate) c({c.in(batch * length * channels, dtype), dtype, length * channels, channels, 0, 0});
    else c({0, 0, 0, 0, 0, 0});
    c({c.in(wide * states, work, 1, -1.1), channels * states, states, 1, c.in(wide, work), c.in(wide, work)});
    c({e.path ? c.integers(order) : 0, 0, steps, int64_t(reverse), e.resets ? c.flags(batch * length, 5) : 0});
    c({e.lengths ? c.integers({steps / 2, steps}) : 0, c.in(batch * wide * states, work)});
    if (!backward) {
      int64_t y = paths > 1 ? work : dtype;
      c({c.out(batch * length * channels, y), y, c.out(batch * wide * states, work), c.out(batch * wide * chunks * states, work)});
      c({rank, rank ? c.in(wide * rank, work) : 0, channels * rank, rank, 1});
      c.run("selective_scan_forward", what);
    } else {
      c({c.in(batch * wide * chunks * states, work), c.in(batch * length * channels, dtype), dtype, length * channels, channels, 0, 0});
      c({c.in(batch * wide * states, work), c.out(batch * length * channels, work), 1, c.out(batch * length * wide, work)});
      c({c.out(batch * length * bc, work), c.out(batch * length * bc, work), c.out(wide * states, work), c.out(wide, work), c.out(wide, work)});
      c({gate ? c.out(batch * length * channels, work) : 0, c.out(batch * wide * states, work)});
      c.run("selective_scan_backward", what);
    }
  }
}

void selective_scan_step(int64_t channels, int64_t states, int64_t dtype) {
  int64_t batch = 3, work = dtype == F64 ? F64 : F32;
  Call c;
  c({batch, channels, 1, states, 1, kThreads, work == F64});
  for (int i = 0; i < 3; ++i) c({c.in(batch * channels, dtype), dtype, channels});
  for (int i = 0; i < 2; ++i) c({c.in(channels, work), work, 0});
  c({c.in(channels * states, work, 1, -1.1), work, states});
  for (int i = 0; i < 2; ++i) c({c.in(batch * states, dtype), dtype, states, states});
  c({c.in_place(batch * channels * states, work), c.out(batch * channels, dtype), dtype});
  c.run("selective_scan_step", label({channels, states, dtype}));
}

void causal_conv1d(int64_t length, int64_t channels, int64_t width, int64_t paths, int64_t dtype, const Extras &e) {
  int64_t batch = 2, work = dtype == F64 ? F64 : F32, steps = e.path ? (length + 1) / 2 : length, wide = paths * channels;
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    std::vector<int64_t> order;
    for (int64_t k = 0; e.path && k < paths; ++k) for (int64_t row : shuffled(length, steps)) order.push_back(row);
    c({batch, length, steps, channels, width, paths, 1, kThreads, work == F64});
    c({c.in(batch * length * channels, dtype), dtype, length * channels, channels});
    c({c.in(wide * width, dtype), dtype, channels * width, width, 1, c.in(wide, work)});
    c({e.path ? c.integers(order) : 0, 0, e.reverse ? 1 : 0, e.resets ? c.flags(batch * length, 5) : 0});
    c({e.lengths ? c.integers({steps / 2, steps}) : 0, c.in(batch * paths * width * channels, work)});
    if (!backward) {
      c({c.out(batch * length * wide, dtype), dtype, c.out(batch * width * wide, work)});
    } else {
      c({c.in(batch * length * wide, dtype), dtype, length * wide, wide, channels, c.in(batch * width * wide, work)});
      c({c.out(batch * length * channels, work), c.out(batch * width * wide, work), c.out(batch * wide, work), c.out(batch * width * wide, work)});
    }
    c.run(backward ? "causal_conv1d_backward" : "causal_conv1d_forward", label({length, channels, width, paths, dtype, e.path}));
  }
  Call c;
  c({batch, channels, width, 1, kThreads, work == F64, c.in(batch * channels, dtype), dtype, channels});
  c({c.in(channels * width, dtype), dtype, width, 1, c.in(channels, work), work});
  c({c.in_place(batch * width * channels, work), c.out(batch * channels, dtype), dtype});
  c.run("causal_conv1d_step", label({length, channels, width, paths, dtype, e.path}));
}

void ssd(int64_t length, int64_t heads, int64_t headdim, int64_t states, int64_t groups, int64_t dtype, const Extras &e) {
  int64_t batch = 2, work = dtype == F64 ? F64 : F32, steps = e.path ? (length + 1) / 2 : length;
  int64_t wide = heads * headdim, bc = groups * states, all = batch * heads * headdim * states;
  std::string what = label({length, heads, headdim, states, groups, dtype, e.path});
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    std::vector<int64_t> order = shuffled(length, e.path ? steps : 0);
    if (e.path && steps > 3) order[size_t(steps - 1)] = -1;  // the walk ends before
    c({batch, length, steps, heads, groups, headdim, states, 0, kThreads, work == F64});
    c({c.in(batch * length * wide, dtype), dtype, length * wide, wide, headdim});
    for (int i = 0; i < 2; ++i) c({c.in(batch * length * bc, dtype), dtype, length * bc, bc, states});
    c({c.in(batch * length * heads, work, 0.5, -0.6), work, length * heads, heads, 1});
    c({c.in(batch * length * heads, work, 0.5, 0.6), work, length * heads, heads, 1});
    c({c.in(wide, work), e.path ? c.integers(order) : 0, 0, e.resets ? c.flags(batch * length, 5) : 0, c.in(all, work)});
    if (!backward) {
      c({c.out(batch * length * wide, dtype), dtype, c.out(all, work)});
    } else {
      int64_t size = (heads / groups + 1) / 2, parts = (heads / groups + size - 1) / size;
      c({c.in(batch * length * wide, dtype), dtype, length * wide, wide, headdim, c.in(all, work), size});
      c({c.out(batch * length * wide, dtype), c.out(batch * length * heads, work), c.out(batch * length * heads, work)});
      c({c.out(parts * batch * length * bc, work), c.out(parts * batch * length * bc, work), c.out(batch * wide, work), c.out(all, work)});
    }
    c.run(backward ? "ssd_backward" : "ssd_forward", what);
  }
  double low = 0, high = 10;
  int64_t low_bits, high_bits, bits[2];
  memcpy(&low_bits, &low, 8);
  memcpy(&high_bits, &high, 8);
  for (int wide_D = 0; wide_D < 2; ++wide_D) {
    Call c;
    c({batch, heads, headdim, groups, states, kThreads, work == F64, 1, low_bits, high_bits});
    c({c.in(batch * wide, work), c.in(batch * heads, work), c.in(heads, work, 0.5, -0.6), c.in(batch * bc, work), c.in(batch * bc, work)});
    c({c.in(wide_D ? wide : heads, work), c.in(batch * wide, work), c.in(heads, work), c.in(batch * heads, work)});
    c({c.in_place(all, work), c.out(batch * wide, work), wide_D});
    c.run("ssd_step", what + label({wide_D}));
  }
  double scale = 0.3, eps = 1e-6;
  memcpy(&bits[0], &scale, 8);
  memcpy(&bits[1], &eps, 8);
  Call m;
  m({batch, heads, headdim, states, kThreads, work == F64, bits[0], bits[1]});
  m({m.in(batch * heads * states, work), m.in(batch * heads * states, work), m.in(batch * wide, work), m.in(batch * heads, work), m.in(batch * heads, work)});
  m({m.in_place(all, work), m.in_place(batch * heads * states, work), m.in_place(batch * heads, work), m.out(batch * wide, work)});
  m.run("mlstm_step", what);
}

void gated(int64_t length, int64_t heads, int64_t headdim, int64_t states, int64_t strict, int64_t dtype, const Extras &e) {
  int64_t batch = 2, work = dtype == F64 ? F64 : F32, steps = e.path ? (length + 1) / 2 : length, block = headdim > 4 ? (headdim + 1) / 2 : headdim;
  int64_t values = heads * headdim, keys = heads * states, all = batch * values * states, parts = (headdim + block - 1) / block;
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    std::vector<int64_t> order = shuffled(length, e.path ? steps : 0);
    if (e.path && steps > 3) order[size_t(steps - 1)] = -1;  // the walk ends before
    c({batch, length, steps, heads, headdim, states, strict, kThreads, work == F64});
    c({c.in(batch * length * values, dtype), dtype, length * values, values, headdim});
    c({c.in(batch * length * keys, dtype, 0.5, -0.6), dtype, length * keys, keys, states});
    for (int i = 0; i < 2; ++i) c({c.in(batch * length * keys, dtype), dtype, length * keys, keys, states});
    c({e.path ? c.integers(order) : 0, 0, e.resets ? c.flags(batch * length, 5) : 0, c.in(all, work)});
    if (!backward) {
      c({c.out(batch * length * values, dtype), dtype, c.out(all, work)});
    } else {
      c({c.in(batch * length * values, dtype), dtype, length * values, values, headdim, c.in(all, work), block, c.out(batch * length * values, dtype)});
      for (int i = 0; i < 3; ++i) c({c.out(parts * batch * length * keys, work)});
      c({c.out(all, work)});
    }
    c.run(backward ? "gated_backward" : "gated_forward", label({length, heads, headdim, states, strict, dtype, e.path}));
  }
}

int64_t bits(double x) {
  int64_t b;
  memcpy(&b, &x, 8);
  return b;
}
void linear_attention_step(int64_t heads, int64_t headdim, int64_t states, int64_t strict, int64_t dtype) {
  int64_t batch = 2, groups = heads % 2 ? 1 : 2;
  for (int per_channel = 0; per_channel < 2; ++per_channel) {
    Call c;
    c({batch, heads, groups, headdim, states, strict, kThreads, dtype == F64, bits(0.5), bits(0.1)});
    c({c.in(batch * heads * headdim, dtype), c.in(batch * groups * states, dtype, 0.5, 1), c.in(batch * groups * states, dtype, 0.5, 1)});
    if (per_channel) c({c.in(batch * heads * states, dtype, 0.5, -0.6), heads * states, states, 1});
    else c({c.in(heads, dtype, 0.5, -0.6), 0, 1, 0});
    c({c.in_place(batch * heads * headdim * states, dtype), per_channel ? 0 : c.in(batch * heads * states, dtype, 0.5, 1), c.out(batch * heads * headdim, dtype)});
    c.run("linear_attention_step", label({heads, headdim, states, strict, dtype, per_channel}));
  }
}
void mamba3_step(int64_t heads, int64_t headdim, int64_t states, int64_t ranks, int64_t halves, int64_t dtype) {
  int64_t batch = 2, groups = heads % 2 ? 1 : 2, angles = states / 2, wide = batch * heads * headdim, keys = batch * ranks * groups * states;
  int64_t rank = heads * ranks * headdim, bias = heads * ranks * states;
  for (int contract = 0; contract < 2; ++contract) {
    Call c;
    c({batch, heads, groups, headdim, states, ranks, angles, halves, contract, kThreads, dtype == F64});
    c({c.in(wide, dtype), c.in(batch * heads, dtype, 0.5, 0.6), c.in(batch * heads, dtype, 0.5, -0.6), c.in(keys, dtype), c.in(keys, dtype)});
    c({c.in(batch * heads, dtype), c.in(batch * angles, dtype), c.in(heads, dtype), contract ? c.in(wide, dtype) : 0, c.in(bias, dtype), 0});
    for (int i = 0; i < 3; ++i) c({ranks > 1 && (i == 0 || contract) ? c.in(rank, dtype) : 0});
    c({c.in_place(batch * heads * angles, dtype), c.in_place(wide * states, dtype), c.in_place(batch * ranks * heads * states, dtype), c.in_place(wide, dtype)});
    c({c.out(contract ? wide : wide * ranks, dtype)});
    c.run("mamba3_step", label({heads, headdim, states, ranks, halves, dtype, contract}));
  }
}

void linear_scan(int64_t length, int64_t channels, int64_t dtype, bool complex, const Extras &e) {
  int64_t batch = 2, work = dtype == F64 ? F64 : F32, steps = e.path ? (length + 1) / 2 : length, chunks = (steps + 63) / 64;
  int64_t pair = complex ? 2 : 1, all = batch * length * channels * pair, ends = batch * channels * pair;
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    c({batch, length, steps, channels, kThreads, work == F64, complex});
    c({c.in(all, dtype), dtype, length * channels, channels, c.in(all, dtype, 0.6), dtype, length * channels, channels});
    c({e.path ? c.integers(shuffled(length, steps)) : 0, 0, e.reverse, e.resets ? c.flags(batch * length, 5) : 0});
    c({e.lengths ? c.integers({steps / 2, steps}) : 0, c.in(ends, work)});
    if (!backward) {
      c({c.out(all, dtype), dtype, c.out(ends, work), c.out(chunks * ends, work)});
    } else {
      c({c.in(chunks * ends, work), c.in(all, dtype), dtype, length * channels, channels, c.in(ends, work)});
      c({c.out(all, dtype), dtype, c.out(all, dtype), dtype, 1, c.out(ends, work)});
    }
    c.run(backward ? "linear_scan_backward" : "linear_scan_forward", label({length, channels, dtype, complex, e.path}));
  }
}

void rms_norm(int64_t rows, int64_t dim, int64_t groups, int64_t dtype, bool before_gate, bool centred) {
  int64_t work = dtype == F64 ? F64 : F32, parts = rows < 16 ? rows : 16;
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    c({rows, dim, groups, before_gate, centred, kThreads, work == F64, c.in(rows * dim, dtype), dtype, dim});
    c({c.in(rows * dim, dtype), dtype, dim, c.in(dim, work), c.in(dim, work), c.in(1, F64, 1e-6, 1e-5)});
    if (!backward) c({c.out(rows * dim, dtype), dtype});
    else c({c.in(rows * dim, dtype), dtype, dim, c.out(rows * dim, dtype), c.out(rows * dim, dtype), c.out(parts * dim, work), c.out(parts * dim, work), parts});
    c.run(backward ? "rms_norm_backward" : "rms_norm_forward", label({rows, dim, groups, dtype, before_gate, centred}));
  }
}

void slstm(int64_t length, int64_t heads, int64_t headdim, int64_t dtype) {
  int64_t batch = 3, work = dtype == F64 ? F64 : F32, wide = heads * headdim;
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    c({batch, length, length, heads, headdim, kThreads, work == F64, c.in(batch * length * 4 * wide, dtype), dtype});
    c({c.in(wide * 4 * headdim, work, 0.2), c.in(4 * wide, work), c.in(4 * batch * wide, work, 0.5, 1), 0, 0, c.flags(batch * length, 5)});
    if (!backward) {
      c({c.out(batch * length * wide, dtype), c.out(4 * batch * wide, work), c.out(batch * length * 4 * wide, work), c.out(batch * length * 3 * wide, work)});
    } else {
      c({c.in(batch * length * 4 * wide, work), c.in(batch * length * 3 * wide, work, 0.5, 1), c.in(batch * length * wide, work), c.in(4 * batch * wide, work)});
      c({c.out(batch * length * 4 * wide, work), c.out((batch + 3) / 4 * wide * 4 * headdim, work), c.out(4 * batch * wide, work)});
    }
    c.run(backward ? "slstm_backward" : "slstm_forward", label({length, heads, headdim, dtype}));
  }
}

void cauchy(int64_t heads, int64_t channels, int64_t modes, int64_t nodes, int64_t dtype) {
  for (int backward = 0; backward < 2; ++backward) {
    Call c;
    c({heads, channels, modes, nodes, kThreads, dtype == F64});
    for (int64_t count : {heads * channels * modes, heads * channels * modes}) c({c.in(count, dtype)});
    c({c.in(channels * modes, dtype, 0.5, -2), c.in(channels * modes, dtype), c.in(nodes, dtype), c.in(nodes, dtype), c.in(nodes, dtype), c.in(nodes, dtype)});
    int64_t sums = heads * channels * nodes;
    if (!backward) c({c.out(sums, dtype), c.out(sums, dtype)});
    else c({c.in(sums, dtype), c.in(sums, dtype), c.out(heads * channels * modes, dtype), c.out(heads * channels * modes, dtype), c.out(channels * modes, dtype), c.out(channels * modes, dtype)});
    c.run(backward ? "cauchy_backward" : "cauchy_forward", label({heads, channels, modes, nodes, dtype}));
  }
}

void grouped_mlp(int64_t neighbours, int64_t channels, int64_t inner, int64_t blocks, int64_t dtype) {
  int64_t batch = 2, points = 9, centres = 40;
  for (int anchored = 0; anchored < 2; ++anchored) {
    Call c;
    std::vector<int64_t> index, anchor;
    for (int64_t i = 0; i < batch * centres * neighbours; ++i) index.push_back(i * 5 % points);
    for (int64_t i = 0; i < batch * centres; ++i) anchor.push_back(i * 2 % points);
    c({batch, points, centres, neighbours, channels, inner, blocks, kThreads, dtype == F64, c.in(batch * points * channels, dtype)});
    c({c.in(batch * centres * channels, dtype), c.integers(index), anchored ? c.integers(anchor) : 0, anchored ? c.in(batch, dtype) : 0});
    c({c.in(blocks * inner * channels, dtype, 0.2), c.in(blocks * inner, dtype), c.in(blocks * channels * inner, dtype, 0.2)});
    c({c.in(blocks * channels, dtype), c.out(batch * centres * channels, dtype)});
    c.run("grouped_mlp", label({neighbours, channels, inner, blocks, dtype, anchored}));
  }
}

void path_linear(int64_t length, int64_t paths, int64_t features, int64_t outputs, int64_t dtype) {
  for (int apart = 0; apart < 2; ++apart) {  // whether sequences are one list of rows
    Call c;
    int64_t batch = 2, row = paths * features, rows = length + apart;
    c({batch, length, paths, features, outputs, kThreads, dtype == F64, c.in(batch * rows * row, dtype), rows * row, row, features});
    c({c.in(paths * outputs * features, dtype, 0.2), c.out(batch * length * paths * outputs, dtype)});
    c.run("path_linear", label({length, paths, features, outputs, dtype, apart}));
  }
}

void linear(int64_t rows, int64_t features, int64_t outputs, int64_t weight, int64_t dtype) {
  Call c;
  c({rows, features, outputs, kThreads, dtype == F64, c.in(rows * features, dtype), c.in(outputs * features, weight), weight, features});
  c({c.in(outputs, dtype), c.in(outputs, dtype, 0.01, 0.02), c.out(rows * outputs, dtype), dtype});
  c.run("linear", label({rows, features, outputs, weight, dtype}));
}

// One Mamba block and one Mamba-2 block, then the head.
void mamba_step(int64_t weight) {
  int64_t dim = 19, vocabulary = 37, states = 5, width = 4, rank = 3, inner = 36, heads = 3, groups = 1;
  double eps = 1e-5, low = 0, high = 10;
  int64_t eps_bits, low_bits, high_bits;
  memcpy(&eps_bits, &eps, 8);
  memcpy(&low_bits, &low, 8);
  memcpy(&high_bits, &high, 8);
  Call c;
  auto matrix = [&](std::vector<int64_t> &to, int64_t outputs, int64_t features) {
    double scale = weight == I8 ? 0.001 : 0.1;
    for (int64_t n : {c.in(outputs * features, weight), weight, c.in(outputs, F32, scale, scale), c.in(outputs, F32)}) to.push_back(n);
  };
  std::vector<int64_t> layers;
  int64_t room = 0;
  for (int64_t kind = 1; kind <= 2; ++kind) {
    int64_t wide = kind == 1 ? inner : inner + 2 * groups * states, in = kind == 1 ? 2 * inner : 2 * inner + 2 * groups * states + heads;
    for (int64_t n : {kind, inner, states, width, kind == 1 ? rank : 0, kind == 1 ? 0 : heads, groups, int64_t(0)}) layers.push_back(n);
    for (int64_t n : {eps_bits, eps_bits, low_bits, high_bits, c.in(dim, F32)}) layers.push_back(n);
    matrix(layers, in, dim);
    if (kind == 1) { matrix(layers, rank + 2 * states, inner); matrix(layers, inner, rank); }
    else for (int i = 0; i < 8; ++i) layers.push_back(0);
    matrix(layers, dim, inner);
    for (int64_t n : {c.in(width * wide, F32), c.in(wide, F32), c.in(kind == 1 ? inner * states : heads, F32, 0.5, -0.6), c.in(inner, F32)}) layers.push_back(n);
    for (int64_t n : {c.in(kind == 1 ? inner : heads, F32), kind == 1 ? 0 : c.in(inner, F32), c.in_place(width * wide, F32), int64_t(F32), c.in_place(inner * states, F32)}) layers.push_back(n);
    auto up = [](int64_t n) { return (n + 15) / 16 * 16; };
    int64_t need = up(inner) + up((kind == 1 ? rank : 0) + 2 * states) + up(in);
    room = need > room ? need : room;
    if (kind == 2) room += 3 * up(dim) + 16;
  }
  c({2, dim, vocabulary, kThreads, 7, c.integers(layers), c.in(vocabulary * dim, weight), weight, c.in(dim, F32), eps_bits});
  std::vector<int64_t> head;
  matrix(head, vocabulary, dim);
  c({head[0], head[1], head[2], head[3], c.out(vocabulary, F32), int64_t(c.make(room * 4))});
  c.run("mamba_step", label({weight}));
}

void everything() {
  std::vector<int64_t> lengths = quick ? std::vector<int64_t>{1, 66} : std::vector<int64_t>{0, 1, 2, 63, 64, 65, 131};
  std::vector<int64_t> widths = quick ? std::vector<int64_t>{17} : std::vector<int64_t>{1, 7, 16, 33, 50};
  std::vector<int64_t> dtypes = quick ? std::vector<int64_t>{F32, BF16} : std::vector<int64_t>{F32, F64, BF16, F16};
  for (int64_t dtype : dtypes)
    for (int64_t length : lengths)
      for (const Extras &e : kExtras) {
        if (!length && e.path) continue;
        for (int64_t width : widths) {
          selective_scan(length, width, width == 7 ? 16 : width == 33 ? 1 : 5, 1, 1, dtype, e);
          causal_conv1d(length, width, width % 3 + 2, 1, dtype, e);
          linear_scan(length, width, dtype, false, e);
        }
        selective_scan(length, 34, 3, 2, 2, dtype, e);
        causal_conv1d(length, 18, 4, 2, dtype, e);
        if (dtype == F32 || dtype == F64) linear_scan(length, 9, dtype, true, e);
        ssd(length, 4, 5, 3, 2, dtype, e);
        ssd(length, 3, 17, 33, 1, dtype, e);
        if (!quick) ssd(length, 2, 64, 16, 1, dtype, e);
        gated(length, 2, 5, 3, 0, dtype, e);
        gated(length, 1, 70, 35, 1, dtype, e);
        if (!e.path) slstm(length, 2, 5, dtype);
      }
  gated(600, 1, 9, 17, 0, F32, kExtras[0]);  // longer than what one span of its backward replays
  for (const Extras &e : kExtras) {  // long walks of few channels, cut into pieces
    linear_scan(e.path ? 16500 : 8250, 5, F32, false, e);
    linear_scan(e.path ? 16500 : 8250, 3, F32, true, e);
  }
  for (int64_t dtype : dtypes) {
    for (int64_t channels : {1, 17, 40})
      for (int64_t states : {1, 5, 16}) selective_scan_step(channels, states, dtype);
    for (int before = 0; before < 2; ++before)
      for (int centred = 0; centred < 2; ++centred) {
        rms_norm(1, 7, 1, dtype, before, centred);
        rms_norm(21, 66, 2, dtype, before, centred);
      }
    mamba_step(dtype == F64 ? int64_t(I8) : dtype);
  }
  for (int64_t dtype : {F32, F64}) {
    cauchy(2, 3, 5, 16, dtype);
    linear_attention_step(2, 5, 7, 0, dtype);
    linear_attention_step(3, 33, 40, 1, dtype);
    mamba3_step(2, 5, 8, 1, 0, dtype);
    mamba3_step(3, 17, 6, 3, 1, dtype);
    cauchy(1, 2, 17, 48, dtype);
    path_linear(1, 3, 5, 3, dtype);
    path_linear(97, 2, 17, 70, dtype);
    grouped_mlp(1, 5, 3, 1, dtype);
    grouped_mlp(12, 70, 66, 2, dtype);
    for (int64_t weight : {int64_t(dtype), int64_t(BF16), int64_t(F16), int64_t(I8)})
      for (int64_t features : {1, 15, 70}) linear(features % 3 + 1, features, 37, weight, dtype);
  }
  Call c;
  c({100000, kThreads, c.make(64 * 4) ? int64_t(c.memory.back().get()) : 0});
  c.run("scan_limit", "");
}

} // namespace

int main(int count, char **words) {
  if (count < 2) {
    fprintf(stderr, "usage: native_driver LIBRARY [openmp] [quick] [INSTRUCTION SET ...]\n");
    return 2;
  }
  int word = 2;
  if (word < count && !strcmp(words[word], "openmp")) {
    ++word;
    if (!dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL)) { fprintf(stderr, "%s\n", dlerror()); return 2; }
  }
  if (word < count && !strcmp(words[word], "quick")) {
    ++word;
    quick = true;
  }
  library = dlopen(words[1], RTLD_NOW);
  if (!library) { fprintf(stderr, "%s\n", dlerror()); return 2; }
  auto isas = reinterpret_cast<int64_t (*)()>(dlsym(library, "zk_isas"));
  if (!isas) { fprintf(stderr, "%s has no zk_isas\n", words[1]); return 2; }
  const char *names[] = {"baseline", "avx2", "avx512", "neon"};
  for (int i = 0; i < 4; ++i) {
    if (!(isas() >> i & 1)) continue;
    bool wanted = word == count;  // none named: all that this processor has
    for (int other = word; other < count; ++other) wanted = wanted || !strcmp(words[other], names[i]);
    if (!wanted) continue;
    isa = names[i];
    seed = 1;
    everything();
    printf("%s: every entry point ran\n", names[i]);
    fflush(stdout);
  }
  return failures ? 1 : 0;
}
