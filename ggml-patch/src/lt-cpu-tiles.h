#pragma once

// Small products of queries, keys, weights and values, for lt-cpu-attention.cpp: as much at a time as registers hold. Keys and values are
// converted in registers, from the types that are common in caches.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>

static constexpr int64_t N_BLOCK = 64; // cells whose scores are held at a time: a row of scores, or of weights

//
// vectors of floats, as wide as registers are
//

#if defined(__AVX512F__)
static constexpr int N_ROWS = 4, N_KEYS = 4, N_COLS = 4; // of a tile, in registers: rows × keys, rows × vectors of columns
typedef float vec_t __attribute__((vector_size(64), aligned(4), may_alias));
#elif defined(__AVX__)
static constexpr int N_ROWS = 4, N_KEYS = 2, N_COLS = 2;
typedef float vec_t __attribute__((vector_size(32), aligned(4), may_alias));
#elif defined(__aarch64__)
static constexpr int N_ROWS = 4, N_KEYS = 4, N_COLS = 4;
typedef float vec_t __attribute__((vector_size(16), aligned(4), may_alias));
#else
static constexpr int N_ROWS = 4, N_KEYS = 2, N_COLS = 2;
typedef float vec_t __attribute__((vector_size(16), aligned(4), may_alias));
#endif

static constexpr int N_LANES = sizeof(vec_t)/sizeof(float);

// N_LANES values of a row of the cache from the d-th on

static inline vec_t vec_load(const float * x, int64_t d = 0) {
    return *(const vec_t *) (x + d);
}

static inline vec_t vec_load(const ggml_fp16_t * x, int64_t d) {
#if defined(__AVX512F__)
    return (vec_t) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x + d)));
#elif defined(__AVX__) && defined(__F16C__)
    return (vec_t) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + d)));
#elif defined(__aarch64__)
    return (vec_t) vcvt_f32_f16(vld1_f16((const __fp16 *) (x + d)));
#else
    vec_t y;
    for (int i = 0; i < N_LANES; ++i) {
        y[i] = GGML_CPU_FP16_TO_FP32(x[d + i]);
    }
    return y;
#endif
}

static inline float to_float(ggml_half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x); // note: GGML_CPU_FP16_TO_FP32() looks it up in a table that is larger than the first cache
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

static inline vec_t vec_load(const block_q8_0 * x, int64_t d) {
    const block_q8_0 & b  = x[d/QK8_0];
    const int8_t *     qs = b.qs + d % QK8_0;
    vec_t y;
#if defined(__AVX512F__)
    y = (vec_t) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) qs)));
#elif defined(__AVX2__)
    y = (vec_t) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) qs)));
#else
    for (int i = 0; i < N_LANES; ++i) {
        y[i] = qs[i];
    }
#endif
    return to_float(b.d)*y;
}

static inline vec_t vec_load(const block_q4_0 * x, int64_t d) {
    const block_q4_0 & b  = x[d/QK4_0];
    const uint8_t *    qs = b.qs + d % (QK4_0/2);
    const int shift = d % QK4_0 < QK4_0/2 ? 0 : 4; // the first half of a block is in the lower bits
    vec_t y;
#if defined(__AVX512F__)
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) qs));
    y = (vec_t) _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, shift), _mm512_set1_epi32(15)));
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) qs));
    y = (vec_t) _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, shift), _mm256_set1_epi32(15)));
#else
    for (int i = 0; i < N_LANES; ++i) {
        y[i] = (qs[i] >> shift) & 15;
    }
#endif
    return to_float(b.d)*(y - 8.0f);
}

static inline void vec_store(float * x, vec_t y) {
    *(vec_t *) x = y;
}

// to[j] = sum of the lanes of x[j]
template <int J>
static inline void vec_sums(float * to, const vec_t (&x)[J]) {
#if defined(__AVX__)
    __m256 y[J];
    for (int j = 0; j < J; ++j) {
#if defined(__AVX512F__)
        y[j] = _mm256_add_ps(_mm512_castps512_ps256((__m512) x[j]),
            _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512) x[j]), 1)));
#else
        y[j] = (__m256) x[j];
#endif
    }
    const __m256 a = _mm256_hadd_ps(y[0], y[1]);
    if constexpr (J == 4) {
        const __m256 b = _mm256_hadd_ps(a, _mm256_hadd_ps(y[2], y[3]));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
    } else {
        static_assert(J == 2, "the cases here");
        const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        _mm_storel_pi((__m64 *) to, _mm_hadd_ps(b, b));
    }
#elif defined(__aarch64__)
    static_assert(J == 4, "the case here");
    vst1q_f32(to, vpaddq_f32(vpaddq_f32((float32x4_t) x[0], (float32x4_t) x[1]), vpaddq_f32((float32x4_t) x[2], (float32x4_t) x[3])));
#else
    for (int j = 0; j < J; ++j) {
        to[j] = (x[j][0] + x[j][2]) + (x[j][1] + x[j][3]);
    }
#endif
}

static inline float max_of(const float * x, int n) {
    float max = -INFINITY;
    int i = 0;
    if (n >= N_LANES) {
        vec_t y = vec_load(x);
        for (i = N_LANES; i + N_LANES <= n; i += N_LANES) {
            const vec_t z = vec_load(x, i);
            y = z > y ? z : y;
        }
        for (int j = 0; j < N_LANES; ++j) {
            max = std::max(max, y[j]);
        }
    }
    for (; i < n; ++i) {
        max = std::max(max, x[i]);
    }
    return max;
}

//
// tiles
//

// rows of keys or values of one head: that of cell i is at data + i*stride
template <typename T> struct lt_rows {
    const char * data;
    size_t       stride;

    const T * operator[](int64_t i) const { return (const T *) (data + i*stride); }
};

// scores[r*N_BLOCK + j] of R queries, whose rows follow each other, with J keys
template <int R, int J, typename T>
static inline void scores_of_tile(float * scores, const float * q, const T * const * k, int64_t n) {
    vec_t sum[R][J] = {};
    for (int64_t d = 0; d < n; d += N_LANES) {
        vec_t key[J];
        for (int j = 0; j < J; ++j) {
            key[j] = vec_load(k[j], d);
        }
        for (int r = 0; r < R; ++r) {
            const vec_t query = vec_load(q + r*n + d);
            for (int j = 0; j < J; ++j) {
                sum[r][j] += query*key[j];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        vec_sums(scores + r*N_BLOCK, sum[r]);
    }
}

// out[r*stride + d] += sum of weights[r*N_BLOCK + j]*v[j][d], for C vectors of columns from d
template <int R, int C, typename T>
static inline void values_of_tile(
        float * out, int64_t stride, const float * weights, const lt_rows<T> & v, const int32_t * cells, int n_cells, int64_t d) {
    vec_t sum[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            sum[r][c] = vec_load(out + r*stride + d + c*N_LANES);
        }
    }
    for (int j = 0; j < n_cells; ++j) {
        const T * row = v[cells[j]];
        vec_t value[C];
        for (int c = 0; c < C; ++c) {
            value[c] = vec_load(row, d + c*N_LANES);
        }
        for (int r = 0; r < R; ++r) {
            const float weight = weights[r*N_BLOCK + j];
            for (int c = 0; c < C; ++c) {
                sum[r][c] += weight*value[c];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            vec_store(out + r*stride + d + c*N_LANES, sum[r][c]);
        }
    }
}

template <int R, typename T>
static void values_of_rows(
        float * out, int64_t stride, const float * weights, const lt_rows<T> & v, const int32_t * cells, int n_cells, int64_t n) {
    int64_t d = 0;
    for (; d + N_COLS*N_LANES <= n; d += N_COLS*N_LANES) {
        values_of_tile<R, N_COLS>(out, stride, weights, v, cells, n_cells, d);
    }
    for (; d < n; d += N_LANES) {
        values_of_tile<R, 1>(out, stride, weights, v, cells, n_cells, d);
    }
}
