// What the forward and the backward walk of the selective scan share. One work item is a sequence and a block of
// neighbouring channels within one group; it walks every path in turn, in chunks of kChunk steps. Within a chunk one
// vector of channels goes at a time: a prologue gathers its rows and computes dt, then blocks of states run over the
// chunk with the states in registers.
#pragma once

#include "vec.h"

namespace ZK_NAMESPACE {

constexpr int kChunk = 64;  // zoo_kernels.ops.selective_scan.CHUNK: steps between stored states

struct Strided {  // (batch, length, paths, ...), last axis contiguous
  const void *p;
  int64_t dtype, b, l, k, g;
  const char *row(int64_t ib, int64_t il, int64_t ik, int64_t ig, int64_t i) const {
    return at(p, ib * b + il * l + ik * k + ig * g + i, dtype);
  }
};

struct ScanArgs {
  int64_t batch, length, steps, paths, channels, groups, states, softplus, threads, dual;  // dual: double precision
  Strided u, dt, B, C, z;
  const void *A;     // (paths, states, channels), times log2 e
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
  int64_t rows[kChunk];
  uint8_t drop_flags[kChunk];
  const uint8_t *drop;

  void set(const ScanArgs &a, int64_t b, int64_t k, int64_t chunk, int64_t count) {
    int64_t first = chunk * kChunk;
    steps = min_of(kChunk, count - first);
    const int64_t *path = a.path ? a.path + b * a.path_b + k * a.path_k : nullptr;
    for (int64_t t = 0; t < steps; ++t) {
      int64_t position = a.reverse[k] ? count - 1 - first - t : first + t;
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

template <class T> inline void gather_states(T *out, const Strided &x, const int64_t *rows, int64_t steps, int64_t b, int64_t k, int64_t g, int64_t states) {
  constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
  for (int64_t t = 0; t < steps; ++t) {
    const char *row = x.row(b, rows[t], k, g, 0);
    if (x.dtype == own) memcpy(out + t * states, row, size_t(states) * sizeof(T));
    else for (int64_t n = 0; n < states; ++n) out[t * states + n] = read_as<T>(row, n, x.dtype);
  }
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
