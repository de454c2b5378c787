// Small matrix products on blocks that stay in the caches: C = beta C + scale A B.
//
// B and C are row-major with rows padded to whole vectors; A has any strides (its elements are broadcast), so a transposed A
// costs nothing. Tiles of C stay in registers over the whole inner dimension.
#pragma once

#include "vec.h"

namespace ZK_NAMESPACE {

#if defined(ZK_AVX512) || defined(ZK_NEON)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(ZK_AVX2)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 2, kTileVectors = 2;
#endif

template <class T> struct Left {  // the matrix A: element (m, k) at p[m * row + k * column]
  const T *p;
  int64_t row, column;
};

// One tile. scale: null, or one factor for each row of the product (not of C).
template <class V, int M, int NV>
ZK_INLINE void tile(int64_t K, Left<typename V::T> A, const typename V::T *ZK_RESTRICT B, int64_t ldb, typename V::T *ZK_RESTRICT C,
                    int64_t ldc, typename V::T beta, const typename V::T *scale) {
  using T = typename V::T;
  constexpr int W = V::W;
  V acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j] = zero<V>();
  const T *a = A.p;
  for (int64_t k = 0; k < K; ++k, a += A.column, B += ldb) {
    V b[NV];
    for (int j = 0; j < NV; ++j) b[j] = V::load(B + j * W);
    for (int m = 0; m < M; ++m) {
      V x = V::set1(a[m * A.row]);
      for (int j = 0; j < NV; ++j) acc[m][j] = fma(x, b[j], acc[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) {
      T *c = C + m * ldc + j * W;
      V r = acc[m][j];
      if (scale) r = r * V::set1(scale[m]);
      if (beta != T(0)) r = beta == T(1) ? r + V::load(c) : fma(V::set1(beta), V::load(c), r);  // beta 0 does not read C
      r.store(c);
    }
}

template <class V, int NV>
inline void tile_rows(int64_t m, int64_t K, Left<typename V::T> A, const typename V::T *B, int64_t ldb, typename V::T *C, int64_t ldc,
                      typename V::T beta, const typename V::T *scale) {
  switch (m) {
  case 1: return tile<V, 1, NV>(K, A, B, ldb, C, ldc, beta, scale);
  case 2: return tile<V, 2, NV>(K, A, B, ldb, C, ldc, beta, scale);
#if defined(ZK_AVX512) || defined(ZK_NEON) || defined(ZK_AVX2)
  case 3: return tile<V, 3, NV>(K, A, B, ldb, C, ldc, beta, scale);
  case 4: return tile<V, 4, NV>(K, A, B, ldb, C, ldc, beta, scale);
  case 5: return tile<V, 5, NV>(K, A, B, ldb, C, ldc, beta, scale);
  case 6: return tile<V, 6, NV>(K, A, B, ldb, C, ldc, beta, scale);
#endif
  }
}

// M rows (at most kTileRows) by `vectors` vectors of C.
template <class V>
inline void strip(int64_t m, int64_t vectors, int64_t K, Left<typename V::T> A, const typename V::T *B, int64_t ldb, typename V::T *C,
                  int64_t ldc, typename V::T beta, const typename V::T *scale) {
  constexpr int W = V::W;
  int64_t j = 0;
  for (; j + kTileVectors <= vectors; j += kTileVectors) tile_rows<V, kTileVectors>(m, K, A, B + j * W, ldb, C + j * W, ldc, beta, scale);
  if constexpr (kTileVectors > 3) if (vectors - j == 3) return tile_rows<V, 3>(m, K, A, B + j * W, ldb, C + j * W, ldc, beta, scale);
  if constexpr (kTileVectors > 2) if (vectors - j == 2) return tile_rows<V, 2>(m, K, A, B + j * W, ldb, C + j * W, ldc, beta, scale);
  if (vectors - j == 1) tile_rows<V, 1>(m, K, A, B + j * W, ldb, C + j * W, ldc, beta, scale);
}

// C[M][vectors * W] = beta C + diag(scale) A[M][K] B[K][vectors * W]
template <class V>
inline void product(int64_t M, int64_t vectors, int64_t K, Left<typename V::T> A, const typename V::T *B, int64_t ldb, typename V::T *C,
                    int64_t ldc, typename V::T beta, const typename V::T *scale = nullptr) {
  // Columns outermost: the panel of B that the tiles share stays in the first cache.
  constexpr int W = V::W;
  for (int64_t j = 0; j < vectors; j += kTileVectors) {
    int64_t n = min_of(kTileVectors, vectors - j);
    for (int64_t m = 0; m < M; m += kTileRows) {
      Left<typename V::T> a{A.p + m * A.row, A.row, A.column};
      strip<V>(min_of(kTileRows, M - m), n, K, a, B + j * W, ldb, C + m * ldc + j * W, ldc, beta, scale ? scale + m : nullptr);
    }
  }
}

// out[c][r] = in[r][c]: rows by columns, scalar loads along the short way; both in the first cache.
template <class V> inline void transpose(int64_t rows, int64_t columns, const typename V::T *ZK_RESTRICT in, int64_t ldi, typename V::T *ZK_RESTRICT out, int64_t ldo) {
  int64_t r = 0;
#if defined(ZK_AVX512)
  if constexpr (sizeof(typename V::T) == 4) {
    for (; r + 16 <= rows; r += 16) {
      int64_t c = 0;
      for (; c + 16 <= columns; c += 16) {
        __m512 x[16], y[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(in + (r + i) * ldi + c);
        for (int i = 0; i < 16; i += 2) {
          y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
          y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
          x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
          x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
          x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
          x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {  // x[4 g + i]: 128-bit lane l holds rows 4 g .. 4 g + 3 of column 4 l + i
          __m512 a = _mm512_shuffle_f32x4(x[i], x[4 + i], 0x88), b = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0x88);
          __m512 e = _mm512_shuffle_f32x4(x[i], x[4 + i], 0xdd), f = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0xdd);
          y[i] = _mm512_shuffle_f32x4(a, b, 0x88);
          y[4 + i] = _mm512_shuffle_f32x4(e, f, 0x88);
          y[8 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
          y[12 + i] = _mm512_shuffle_f32x4(e, f, 0xdd);
        }
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + (c + i) * ldo + r, y[i]);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < 16; ++i) out[c * ldo + r + i] = in[(r + i) * ldi + c];
    }
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * ldo + r] = in[r * ldi + c];
}

template <class V> ZK_INLINE typename V::T dot(int64_t vectors, const typename V::T *a, const typename V::T *b) {
  V s = zero<V>();
  for (int64_t j = 0; j < vectors; ++j) s = fma(V::load(a + j * V::W), V::load(b + j * V::W), s);
  return s.sum();
}

} // namespace ZK_NAMESPACE
