// What the forward and the backward walk of the selective scan share. One work item is a sequence and a block of
// neighbouring channels within one group; it walks every path in turn, in chunks of kChunk steps. Within a chunk one
// vector of channels goes at a time: a prologue gathers its rows and computes dt, then blocks of states run over the
// chunk with the states in registers.
#pragma once

#include "vec.h"

namespace ZK_NAMESPACE {

constexpr int kChunk = 64;  // zoo_kernels.ops.selective_scan.CHUNK: steps between stored states
constexpr int kAhead = 8;  // rows beyond a chunk that are known, to fetch them ahead of their use

struct Strided {  // (batch, length, paths, ...), last axis contiguous
  const void *p;
  int64_t dtype, b, l, k, g;
  const char *row(int64_t ib, int64_t il, int64_t ik, int64_t ig, int64_t i) const {
    return at(p, ib * b + il * l + ik * k + ig * g + i, dtype);
  }
};

// A stretch of channels of every row of a tensor. Plain: of the working type and in whole vectors, decided outside the loops.
template <class V, bool Plain> struct Column {
  using T = typename V::T;
  char *p;
  int64_t stride, dtype;
  Column(const Strided &x, int64_t b, int64_t k, int64_t c)
      : p(x.p ? const_cast<char *>(x.row(b, 0, k, 0, c)) : nullptr), stride(x.l * size_of(x.dtype)), dtype(x.dtype) {}
  Column(void *start, int64_t row, int64_t kind) : p(static_cast<char *>(start)), stride(row * size_of(kind)), dtype(kind) {}
  ZK_INLINE V get(int64_t row, int64_t c, int lanes) const {
    if (Plain) return V::load(reinterpret_cast<const T *>(p + row * stride) + c);
    return load_as<V>(at(p + row * stride, c, dtype), dtype, lanes);
  }
  ZK_INLINE void put(V x, int64_t row, int64_t c, int lanes) const {
    if (Plain) x.store(reinterpret_cast<T *>(p + row * stride) + c);
    else store_as(x, at(p + row * stride, c, dtype), dtype, lanes);
  }
};

struct ScanArgs {
  int64_t batch, length, steps, paths, channels, groups, states, softplus, threads, dual;  // dual: double precision
  Strided u, dt, B, C, z;
  const void *A;     // (paths, channels, states) of the working type, with strides
  int64_t A_k, A_c, A_n;
  const void *D;     // (paths, channels) or null
  const void *bias;  // (paths, channels) or null
  const int64_t *path;
  int64_t path_b, path_k;
  const uint8_t *reverse;  // one flag per path
  const uint8_t *resets;   // (batch, length) or null
  const int64_t *lengths;  // (batch) or null
  const void *init;        // (batch, paths, states, channels) or null

  int64_t chunks() const { return ceil_div(steps, kChunk); }
  int64_t count(int64_t b) const { return lengths ? lengths[b] : steps; }
};

// The rows that one chunk of one path visits, in the order of the walk, and its rows of B and C in the working type.
template <class T> struct Chunk {
  int64_t steps;
  int64_t rows[kChunk + kAhead];  // beyond the walk's end: its last row
  uint8_t drop_flags[kChunk];
  const uint8_t *drop;

  void set(const ScanArgs &a, int64_t b, int64_t k, int64_t chunk, int64_t count) {
    int64_t first = chunk * kChunk;
    steps = min_of(kChunk, count - first);
    const int64_t *path = a.path ? a.path + b * a.path_b + k * a.path_k : nullptr;
    for (int64_t t = 0; t < steps + kAhead; ++t) {
      int64_t i = min_of(first + t, count - 1), position = a.reverse[k] ? count - 1 - i : i;
      rows[t] = path ? path[position] : position;
    }
    drop = nullptr;
    if (a.resets) {
      const uint8_t *flags = a.resets + b * a.length;
      for (int64_t t = 0; t < steps; ++t) {
        drop_flags[t] = flags[rows[t]];
        if (drop_flags[t]) drop = drop_flags;
      }
    }
  }
};

template <class V> inline void gather_states(typename V::T *out, const Strided &x, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t g, int64_t states) {
  for (int64_t t = 0; t < steps; ++t, out += states) {
    const char *row = x.row(b, rows[t], k, g, 0);
    int64_t n = 0;
    for (; n + V::W <= states; n += V::W) load_as<V>(at(row, n, x.dtype), x.dtype, V::W).store(out + n);
    for (; n < states; ++n) out[n] = read_as<typename V::T>(row, n, x.dtype);
  }
}

// A of one vector of channels, times log2 e: [states][W].
template <class V> inline void load_A(const ScanArgs &a, int64_t k, int64_t c, int lanes, typename V::T *ZK_RESTRICT out) {
  using T = typename V::T;
  const T *from = static_cast<const T *>(a.A) + k * a.A_k + c * a.A_c;
  constexpr T log2_e = T(1.4426950408889634);
  for (int i = 0; i < V::W; ++i)
    for (int64_t n = 0; n < a.states; ++n) out[n * V::W + i] = i < lanes ? from[i * a.A_c + n * a.A_n] * log2_e : T(0);
}

// Calls body(integral constant NB, n) for blocks of states: as many as `Most` at a time, then halves.
template <int NB> struct Block { static constexpr int value = NB; };
template <int Most, class F> ZK_INLINE void each_block(int64_t states, const F &body) {
  int64_t n = 0;
  for (; n + Most <= states; n += Most) body(Block<Most>(), n);
  if constexpr (Most > 8) if (states - n >= 8) { body(Block<8>(), n); n += 8; }
  if constexpr (Most > 4) if (states - n >= 4) { body(Block<4>(), n); n += 4; }
  if constexpr (Most > 2) if (states - n >= 2) { body(Block<2>(), n); n += 2; }
  if constexpr (Most > 1) if (states - n >= 1) { body(Block<1>(), n); n += 1; }
}

// Which channels a work item has. Blocks do not straddle groups.
struct ChannelBlocks {
  int64_t group_size, block, per_group;
  ChannelBlocks(const ScanArgs &a, int64_t size) : group_size(a.channels / a.groups), block(size), per_group(ceil_div(group_size, size)) {}
  int64_t total(const ScanArgs &a) const { return per_group * a.groups; }
  int64_t group(int64_t i) const { return i / per_group; }
  int64_t first(int64_t i) const { return group(i) * group_size + (i % per_group) * block; }
  int64_t end(int64_t i) const { return min_of(first(i) + block, (group(i) + 1) * group_size); }
};

} // namespace ZK_NAMESPACE
