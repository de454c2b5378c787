// Thin vectors: a few operations on W numbers, so that one kernel source serves every instruction set.
//
//   VF  float  vector: AVX-512 (16), AVX2 (8), NEON (4), or an array of 8 that the compiler vectorises as it can (baseline)
//   VD  double vector: an array, vectorised by the compiler
//
// Never compile with -ffast-math: exp2 rounds by adding and subtracting a constant, and NaN and infinity must survive.
#pragma once

#include "zk.h"

#include <math.h>
#include <string.h>

#if defined(ZK_AVX512) || defined(ZK_AVX2) || defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(ZK_NEON)
#include <arm_neon.h>
#endif

namespace ZK_NAMESPACE {

// -- elements -----------------------------------------------------------------------------------------------------------

ZK_INLINE float from_bits(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
ZK_INLINE uint32_t to_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
ZK_INLINE float bf16_to_float(uint16_t b) { return from_bits(uint32_t(b) << 16); }
ZK_INLINE uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t b = to_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t(b >> 16 | 0x40);
  return uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
ZK_INLINE float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  float f = from_bits(rest << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent; subnormals come right too
  return from_bits(to_bits(f) | sign);
}
ZK_INLINE uint16_t float_to_f16(float value) {
  uint32_t b = to_bits(value), sign = b >> 16 & 0x8000, rest = b & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (rest >= 0x47800000u) return uint16_t(sign | 0x7c00);              // 65536 and more
  if (rest < 0x38800000u) return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));  // subnormal result
  rest += 0xfff + (rest >> 13 & 1);
  return uint16_t(sign | ((rest - 0x38000000u) >> 13));
}

template <class T> ZK_INLINE T read_as(const void *p, int64_t i, int64_t dtype) {
  switch (dtype) {
  case ZK_F32: return T(static_cast<const float *>(p)[i]);
  case ZK_F64: return T(static_cast<const double *>(p)[i]);
  case ZK_BF16: return T(bf16_to_float(static_cast<const uint16_t *>(p)[i]));
  case ZK_F16: return T(f16_to_float(static_cast<const uint16_t *>(p)[i]));
  default: return T(static_cast<const int8_t *>(p)[i]);
  }
}
ZK_INLINE int64_t size_of(int64_t dtype) { return dtype == ZK_F32 ? 4 : dtype == ZK_F64 ? 8 : dtype == ZK_I8 ? 1 : 2; }
ZK_INLINE const char *at(const void *p, int64_t i, int64_t dtype) { return static_cast<const char *>(p) + i * size_of(dtype); }
ZK_INLINE char *at(void *p, int64_t i, int64_t dtype) { return static_cast<char *>(p) + i * size_of(dtype); }

// -- an array as a vector -------------------------------------------------------------------------------------------------

template <class E, int N> struct Array {
  using T = E;
  static constexpr int W = N;
  E v[N];
  static ZK_INLINE Array set1(E x) { Array r; for (int i = 0; i < N; ++i) r.v[i] = x; return r; }
  static ZK_INLINE Array load(const E *p) { Array r; memcpy(r.v, p, sizeof r.v); return r; }
  ZK_INLINE void store(E *p) const { memcpy(p, v, sizeof v); }
  static ZK_INLINE Array load_n(const E *p, int n) {
    Array r;
    for (int i = 0; i < N; ++i) r.v[i] = i < n ? p[i] : E(0);
    return r;
  }
  ZK_INLINE void store_n(E *p, int n) const { for (int i = 0; i < N; ++i) if (i < n) p[i] = v[i]; }
  static ZK_INLINE Array load_bf16(const uint16_t *p) { Array r; for (int i = 0; i < N; ++i) r.v[i] = bf16_to_float(p[i]); return r; }
  static ZK_INLINE Array load_f16(const uint16_t *p) { Array r; for (int i = 0; i < N; ++i) r.v[i] = f16_to_float(p[i]); return r; }
  static ZK_INLINE Array load_i8(const int8_t *p) { Array r; for (int i = 0; i < N; ++i) r.v[i] = E(p[i]); return r; }
  ZK_INLINE void store_bf16(uint16_t *p) const { for (int i = 0; i < N; ++i) p[i] = float_to_bf16(float(v[i])); }
  ZK_INLINE void store_f16(uint16_t *p) const { for (int i = 0; i < N; ++i) p[i] = float_to_f16(float(v[i])); }
  ZK_INLINE E sum() const {
    E t[N];
    for (int i = 0; i < N; ++i) t[i] = v[i];
    for (int step = N / 2; step; step /= 2) for (int i = 0; i < step; ++i) t[i] += t[i + step];
    return t[0];
  }
};
#define ZK_EACH(expr) Array<E, N> r; for (int i = 0; i < N; ++i) r.v[i] = (expr); return r
template <class E, int N> ZK_INLINE Array<E, N> operator+(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] + b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> operator-(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] - b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> operator*(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] * b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> operator/(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] / b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> fma(Array<E, N> a, Array<E, N> b, Array<E, N> c) { ZK_EACH(a.v[i] * b.v[i] + c.v[i]); }
// vmax(low, x): x where x is NaN. vmin(high, x) likewise.
template <class E, int N> ZK_INLINE Array<E, N> vmax(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> vmin(Array<E, N> a, Array<E, N> b) { ZK_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
template <class E, int N> ZK_INLINE Array<E, N> vabs(Array<E, N> a) { ZK_EACH(a.v[i] < 0 ? -a.v[i] : a.v[i]); }
// x > y ? a : b, lane by lane (false for NaN).
template <class E, int N> ZK_INLINE Array<E, N> where_gt(Array<E, N> x, Array<E, N> y, Array<E, N> a, Array<E, N> b) { ZK_EACH(x.v[i] > y.v[i] ? a.v[i] : b.v[i]); }

ZK_INLINE float power_of_two(float n) { return from_bits(uint32_t(int32_t(n) + 127) << 23); }  // n in -126 .. 127
ZK_INLINE double power_of_two(double n) {
  uint64_t b = uint64_t(int64_t(n) + 1023) << 52;
  double r;
  memcpy(&r, &b, 8);
  return r;
}
template <int N> ZK_INLINE Array<float, N> scale_by_power(Array<float, N> p, Array<float, N> n) {
  using V = Array<float, N>;
  V half;  // two factors: subnormal results and 2^128 come right, and n may be -253 .. 254
  for (int i = 0; i < N; ++i) half.v[i] = float(int32_t(n.v[i] == n.v[i] ? n.v[i] : 0.0f) / 2);
  V r;
  for (int i = 0; i < N; ++i) {
    float whole = n.v[i] == n.v[i] ? n.v[i] : 0.0f;
    r.v[i] = p.v[i] * power_of_two(half.v[i]) * power_of_two(whole - half.v[i]);
  }
  return r;
}
template <int N> ZK_INLINE Array<double, N> scale_by_power(Array<double, N> p, Array<double, N> n) {
  Array<double, N> r;
  for (int i = 0; i < N; ++i) {
    double whole = n.v[i] == n.v[i] ? n.v[i] : 0.0, half = double(int64_t(whole) / 2);
    r.v[i] = p.v[i] * power_of_two(half) * power_of_two(whole - half);
  }
  return r;
}

// -- float vectors --------------------------------------------------------------------------------------------------------

#if defined(ZK_AVX512)
struct VF {
  using T = float;
  static constexpr int W = 16;
  __m512 v;
  static ZK_INLINE VF set1(float x) { return {_mm512_set1_ps(x)}; }
  static ZK_INLINE VF load(const float *p) { return {_mm512_loadu_ps(p)}; }
  ZK_INLINE void store(float *p) const { _mm512_storeu_ps(p, v); }
  static ZK_INLINE VF load_n(const float *p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
  ZK_INLINE void store_n(float *p, int n) const { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
  static ZK_INLINE VF load_bf16(const uint16_t *p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16))};
  }
  static ZK_INLINE VF load_f16(const uint16_t *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))}; }
  static ZK_INLINE VF load_i8(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
  }
  ZK_INLINE void store_bf16(uint16_t *p) const {
    __m512i b = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(0x40)));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(r));
  }
  ZK_INLINE void store_f16(uint16_t *p) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
  ZK_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
};
ZK_INLINE VF operator+(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
ZK_INLINE VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
ZK_INLINE VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZK_INLINE VF operator/(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
ZK_INLINE VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ZK_INLINE VF vmax(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
ZK_INLINE VF vmin(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
ZK_INLINE VF vabs(VF a) { return {_mm512_abs_ps(a.v)}; }
ZK_INLINE VF where_gt(VF x, VF y, VF a, VF b) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GT_OQ), b.v, a.v)}; }
ZK_INLINE VF scale_by_power(VF p, VF n) { return {_mm512_scalef_ps(p.v, n.v)}; }
#elif defined(ZK_AVX2)
ZK_INLINE __m256i first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
struct VF {
  using T = float;
  static constexpr int W = 8;
  __m256 v;
  static ZK_INLINE VF set1(float x) { return {_mm256_set1_ps(x)}; }
  static ZK_INLINE VF load(const float *p) { return {_mm256_loadu_ps(p)}; }
  ZK_INLINE void store(float *p) const { _mm256_storeu_ps(p, v); }
  static ZK_INLINE VF load_n(const float *p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
  ZK_INLINE void store_n(float *p, int n) const { _mm256_maskstore_ps(p, first_lanes(n), v); }
  static ZK_INLINE VF load_bf16(const uint16_t *p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16))};
  }
  static ZK_INLINE VF load_f16(const uint16_t *p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))}; }
  static ZK_INLINE VF load_i8(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
  }
  ZK_INLINE void store_bf16(uint16_t *p) const {
    __m256i b = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40)), nan);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
  }
  ZK_INLINE void store_f16(uint16_t *p) const { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
  ZK_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};
ZK_INLINE VF operator+(VF a, VF b) { return {_mm256_add_ps(a.v, b.v)}; }
ZK_INLINE VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.v, b.v)}; }
ZK_INLINE VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.v, b.v)}; }
ZK_INLINE VF operator/(VF a, VF b) { return {_mm256_div_ps(a.v, b.v)}; }
ZK_INLINE VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ZK_INLINE VF vmax(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
ZK_INLINE VF vmin(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
ZK_INLINE VF vabs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
ZK_INLINE VF where_gt(VF x, VF y, VF a, VF b) { return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_GT_OQ))}; }
ZK_INLINE VF scale_by_power(VF p, VF n) {  // as two factors, so that subnormal results and 2^128 come right
  __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, first), second)};
}
#elif defined(ZK_NEON)
struct VF {
  using T = float;
  static constexpr int W = 4;
  float32x4_t v;
  static ZK_INLINE VF set1(float x) { return {vdupq_n_f32(x)}; }
  static ZK_INLINE VF load(const float *p) { return {vld1q_f32(p)}; }
  ZK_INLINE void store(float *p) const { vst1q_f32(p, v); }
  static ZK_INLINE VF load_n(const float *p, int n) {
    float t[4] = {0, 0, 0, 0};
    for (int i = 0; i < n && i < 4; ++i) t[i] = p[i];
    return load(t);
  }
  ZK_INLINE void store_n(float *p, int n) const {
    float t[4];
    store(t);
    for (int i = 0; i < n && i < 4; ++i) p[i] = t[i];
  }
  static ZK_INLINE VF load_bf16(const uint16_t *p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
  static ZK_INLINE VF load_f16(const uint16_t *p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
  static ZK_INLINE VF load_i8(const int8_t *p) {
    float t[4] = {float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    return load(t);
  }
  ZK_INLINE void store_bf16(uint16_t *p) const {
    uint32x4_t b = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
    uint32x4_t r = vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    r = vbslq_u32(vceqq_f32(v, v), r, vorrq_u32(b, vdupq_n_u32(0x400000)));
    vst1_u16(p, vshrn_n_u32(r, 16));
  }
  ZK_INLINE void store_f16(uint16_t *p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  ZK_INLINE float sum() const { return vaddvq_f32(v); }
};
ZK_INLINE VF operator+(VF a, VF b) { return {vaddq_f32(a.v, b.v)}; }
ZK_INLINE VF operator-(VF a, VF b) { return {vsubq_f32(a.v, b.v)}; }
ZK_INLINE VF operator*(VF a, VF b) { return {vmulq_f32(a.v, b.v)}; }
ZK_INLINE VF operator/(VF a, VF b) { return {vdivq_f32(a.v, b.v)}; }
ZK_INLINE VF fma(VF a, VF b, VF c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
ZK_INLINE VF vmax(VF a, VF b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
ZK_INLINE VF vmin(VF a, VF b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
ZK_INLINE VF vabs(VF a) { return {vabsq_f32(a.v)}; }
ZK_INLINE VF where_gt(VF x, VF y, VF a, VF b) { return {vbslq_f32(vcgtq_f32(x.v, y.v), a.v, b.v)}; }
ZK_INLINE VF scale_by_power(VF p, VF n) {
  int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  float32x4_t first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  float32x4_t second = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23));
  return {vmulq_f32(vmulq_f32(p.v, first), second)};
}
#else
using VF = Array<float, 8>;
#endif
using VD = Array<double, 8>;

// -- loads and stores of any element type -----------------------------------------------------------------------------------

template <class V> ZK_INLINE V zero() { return V::set1(typename V::T(0)); }

// n numbers (n <= W) of a tensor of this dtype; lanes from n on are 0.
template <class V> ZK_INLINE V load_as(const void *p, int64_t dtype, int n) {
  using T = typename V::T;
  constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
  if (dtype == own) return n == V::W ? V::load(static_cast<const T *>(p)) : V::load_n(static_cast<const T *>(p), n);
  if (n == V::W) {
    if (dtype == ZK_BF16) return V::load_bf16(static_cast<const uint16_t *>(p));
    if (dtype == ZK_F16) return V::load_f16(static_cast<const uint16_t *>(p));
    if (dtype == ZK_I8) return V::load_i8(static_cast<const int8_t *>(p));
  }
  T t[V::W];
  for (int i = 0; i < V::W; ++i) t[i] = i < n ? read_as<T>(p, i, dtype) : T(0);
  return V::load(t);
}
template <class V> ZK_INLINE void store_as(V x, void *p, int64_t dtype, int n) {
  using T = typename V::T;
  constexpr int64_t own = sizeof(T) == 4 ? ZK_F32 : ZK_F64;
  if (dtype == own) {
    if (n == V::W) x.store(static_cast<T *>(p));
    else x.store_n(static_cast<T *>(p), n);
    return;
  }
  if (n == V::W && dtype == ZK_BF16) return x.store_bf16(static_cast<uint16_t *>(p));
  if (n == V::W && dtype == ZK_F16) return x.store_f16(static_cast<uint16_t *>(p));
  T t[V::W];
  x.store(t);
  for (int i = 0; i < n; ++i) {
    if (dtype == ZK_F32) static_cast<float *>(p)[i] = float(t[i]);
    else if (dtype == ZK_F64) static_cast<double *>(p)[i] = double(t[i]);
    else static_cast<uint16_t *>(p)[i] = dtype == ZK_BF16 ? float_to_bf16(float(t[i])) : float_to_f16(float(t[i]));
  }
}

// -- functions --------------------------------------------------------------------------------------------------------------

// 2^f on -1/2 .. 1/2 as 1 + f q(f): exact at 0, so that decays near 1 do not drift. Degree 5 (float): 9e-8 relative;
// degree 11 (double): 6e-16. Coefficients: minimax in the relative error with the constant held at 1.
ZK_INLINE float exp2_coefficient(float, int i) {
  constexpr float c[] = {0.693147f, 0.240222424f, 0.0555073359f, 0.00967151299f, 0.00132647273f};
  return c[i];
}
ZK_INLINE double exp2_coefficient(double, int i) {
  constexpr double c[] = {0.6931471805599416,    0.2402265069590993,    0.05550410866505889,   0.009618129107474921,
                          0.001333355810284008,  0.0001540353070292634, 1.5252768482867073e-05, 1.32152948088219e-06,
                          1.0165523065832315e-07, 7.0987499210025534e-09, 6.14416107835164e-10};
  return c[i];
}

// x as n + f with n an integer and f in -1/2 .. 1/2; far out of range x is clamped, for 2^x is 0 or infinity there.
template <class V> ZK_INLINE void split(V x, V &n, V &f) {
  using T = typename V::T;
  constexpr bool single = sizeof(T) == 4;
  x = vmin(V::set1(single ? T(130) : T(1030)), vmax(V::set1(single ? T(-152) : T(-1080)), x));  // NaN passes through
  V magic = V::set1(single ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^23, 1.5 * 2^52: rounds to an integer
  n = (x + magic) - magic;
  f = x - n;
}

template <class V> ZK_INLINE V exp2_of(V x) {
  using T = typename V::T;
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  V n, f;
  split(x, n, f);
  V q = V::set1(exp2_coefficient(T(0), terms - 1));
  ZK_UNROLL
  for (int i = terms - 2; i >= 0; --i) q = fma(q, f, V::set1(exp2_coefficient(T(0), i)));
  return scale_by_power(fma(q, f, V::set1(T(1))), n);
}

#if defined(ZK_AVX512)
// x = k/32 + f with |f| <= 1/64, so that 2^x = 2^(k/32) (1 + f q(f)) with a q of degree 1: 1.6e-7 relative with rounding.
// 2^(j/32), j the lowest five bits of k, lies in two registers, and scalef applies the rest. Beside the degree 5 above
// this takes three multiplications less, and they are what limits a scan. Any x is allowed: where f is far out, scalef
// gives 0 or infinity whatever it scales.
alignas(64) static const float exp2_table[32] = {
    1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f,
};
ZK_INLINE VF exp2_of(VF x) {
  __m512 magic = _mm512_set1_ps(393216.0f);  // 1.5 * 2^18: rounds to a multiple of 1/32 and leaves k in the lowest bits
  __m512 t = _mm512_add_ps(x.v, magic), n = _mm512_sub_ps(t, magic), f = _mm512_sub_ps(x.v, n);
  __m512 s = _mm512_permutex2var_ps(_mm512_load_ps(exp2_table), _mm512_castps_si512(t), _mm512_load_ps(exp2_table + 16));
  __m512 q = _mm512_fmadd_ps(f, _mm512_set1_ps(0.24022651f), _mm512_set1_ps(0.693157327f));
  return {_mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(q, f), s, s), n)};
}
#endif

template <class V> ZK_INLINE V log2_e() { return V::set1(typename V::T(1.4426950408889634)); }
template <class V> ZK_INLINE V exp_of(V x) { return exp2_of(x * log2_e<V>()); }
template <class V> ZK_INLINE V sigmoid(V x) { V one = V::set1(1); return one / (one + exp_of(zero<V>() - x)); }
template <class V> ZK_INLINE V silu(V x) { return x * sigmoid(x); }

// log(1 + y) for 0 <= y <= 1. Float: y q(y), minimax in the relative error with q(0) = 1 (2e-7 with rounding).
// Double: 2 atanh(s), s = y / (2 + y) <= 1/3.
template <class V> ZK_INLINE V log1p_unit(V y) {
  using T = typename V::T;
  if constexpr (sizeof(T) == 4) {
    constexpr float c[] = {1.0f, -0.49999648f, 0.333213226f, -0.248571636f, 0.191536547f, -0.137538017f, 0.0792045265f, -0.0300657859f, 0.00536482252f};
    V q = V::set1(c[8]);
    ZK_UNROLL
    for (int i = 7; i >= 0; --i) q = fma(q, y, V::set1(c[i]));
    return q * y;
  }
  constexpr int terms = 16;
  V s = y / (y + V::set1(2)), w = s * s;
  V q = V::set1(T(1) / T(2 * terms + 1));
  for (int i = terms - 1; i >= 1; --i) q = fma(q, w, V::set1(T(1) / T(2 * i + 1)));
  s = s + s;
  return fma(s * w, q, s);
}
// log(1 + e^x) = max(x, 0) + log1p(e^-|x|). torch returns x itself above 20, which is the same to rounding.
template <class V> ZK_INLINE V softplus(V x) { return vmax(zero<V>(), x) + log1p_unit(exp_of(zero<V>() - vabs(x))); }

// Subnormal numbers cost a hundred cycles each on some processors, and states decay into them. While one of these
// lives, the current thread takes them as 0 (float results below 1e-38).
struct FlushSubnormals {
#if defined(__x86_64__) || defined(_M_X64)
  unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__) && !defined(_MSC_VER)
  uint64_t before;
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    uint64_t now = before | uint64_t(1) << 24;
    asm volatile("msr fpcr, %0" : : "r"(now));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

} // namespace ZK_NAMESPACE
