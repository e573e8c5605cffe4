#include "lt-cpu-attention.h"

#include "lt-cpu-tiles.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

// The cells that a query sees are counted off into chunks, which are the units of work, with all heads; the partial results of
// the chunks (maximum, sum, weighted values) are merged at the end. Only what a query sees counts: neither the cells that are
// hidden from it, nor other queries, nor the number of threads change a bit of its result.

static constexpr int64_t N_SEGMENT   = 1024; // cells of which one thread finds those that are seen
static constexpr int64_t N_AHEAD     = 16;   // cells after which a key that is asked for has come
static constexpr int64_t N_CHUNK_MIN = 256;  // cells of a chunk: less isn't worth a merge
static constexpr int64_t N_CHUNKS    = 64;   // most of a query: bounds the work buffer
static constexpr int64_t N_QUERIES   = 16;   // most queries; for more, ggml's tiles do as well

//
// the operation
//

struct lt_attention {
    const ggml_tensor * q, * k, * v, * mask, * sinks;

    int64_t n_dim_k, n_dim_v; // of a head
    int64_t n_q;              // queries
    int64_t n_head, n_head_kv, n_group;
    int64_t n_cells;
    int64_t n_segments;
    int64_t n_streams;

    float scale, softcap, max_bias;

    explicit lt_attention(const ggml_tensor * dst)
        : q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4])
        , n_dim_k(k->ne[0]), n_dim_v(v->ne[0]), n_q(q->ne[1])
        , n_head(q->ne[2]), n_head_kv(k->ne[2]), n_group(n_head/n_head_kv)
        , n_cells(k->ne[1]), n_segments((n_cells + N_SEGMENT - 1)/N_SEGMENT), n_streams(q->ne[3])
        , scale(ggml_get_op_params_f32(dst, 0)), softcap(ggml_get_op_params_f32(dst, 2)), max_bias(ggml_get_op_params_f32(dst, 1)) {
        if (softcap != 0.0f) {
            scale /= softcap;
        }
    }

    bool is_for_us() const {
        const auto is_known = [](const ggml_tensor * t) {
            return t->ne[0] % 16 == 0 && t->nb[0] == ggml_type_size(t->type) &&
                (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float);
        };
        return n_q <= N_QUERIES && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && is_known(k) && is_known(v) &&
            k->ne[2] == v->ne[2] && k->ne[3] == n_streams && v->ne[3] == n_streams && n_head % n_head_kv == 0 &&
            (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->nb[0] == sizeof(ggml_fp16_t)));
    }

    // cells of a chunk, of n that a query sees
    static int64_t chunk_size(int64_t n) { return std::max<int64_t>(N_CHUNK_MIN, GGML_PAD((n + N_CHUNKS - 1)/N_CHUNKS, N_BLOCK)); }

    static int64_t n_chunks(int64_t n) { return (n + chunk_size(n) - 1)/chunk_size(n); }

    int64_t n_rows() const { return n_q*n_head; }

    // floats of a row of partial results: maximum, sum, weighted values
    int64_t partial() const { return 2 + n_dim_v; }

    // floats of a thread, see lt_scratch
    int64_t scratch() const {
        return GGML_PAD(n_rows()*n_dim_k + n_head*N_BLOCK + 3*N_BLOCK + N_KEYS*n_dim_k + N_BLOCK*n_dim_v, 16);
    }

    // see lt_seen
    int64_t seen() const { return GGML_PAD(n_streams*n_q*(n_segments + n_cells), 16); }

    size_t work_size(int n_threads) const {
        return sizeof(float)*(seen() + n_streams*std::min(n_chunks(n_cells), N_CHUNKS)*n_rows()*partial() + n_threads*scratch());
    }

    float slope(int64_t head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int64_t n_log2 = (int64_t) 1 << (int64_t) floor(log2(n_head));
        return head < n_log2 ? powf(2.0f, -max_bias*(head + 1)/n_log2) : powf(2.0f, -max_bias/2.0f*(2*(head - n_log2) + 1)/n_log2);
    }
};

// the cells that the queries see, found by all threads together
struct lt_seen {
    const lt_attention & a;

    int32_t * counts; // [n_streams][n_q][n_segments]
    int32_t * cells;  // [n_streams][n_q][n_cells], those of a segment at its beginning

    lt_seen(const lt_attention & a, float * data) : a(a), counts((int32_t *) data), cells(counts + a.n_streams*a.n_q*a.n_segments) {}

    const ggml_fp16_t * mask(int64_t stream, int64_t iq) const {
        return (const ggml_fp16_t *) ((const char *) a.mask->data + iq*a.mask->nb[1] + (stream % a.mask->ne[3])*a.mask->nb[3]);
    }

    // i: of all segments of all queries
    void find(int64_t i) const {
        const int64_t i_query = i/a.n_segments;
        const int64_t first   = i % a.n_segments*N_SEGMENT;
        const int64_t end     = std::min(first + N_SEGMENT, a.n_cells);

        int32_t * to = cells + i_query*a.n_cells + first;
        int32_t   n  = 0;
        const auto take = [&](int64_t cell, int64_t n_cells) {
            for (int64_t c = 0; c < n_cells; ++c) {
                to[n++] = cell + c;
            }
        };
        if (!a.mask) {
            take(first, end - first);
        } else {
            const ggml_fp16_t * bits = mask(i_query/a.n_q, i_query % a.n_q);
            for (int64_t cell = first; cell < end;) {
                // most often cells that follow each other are all seen, or none
                uint16_t any_bits = 0, n_hidden = 0;
                const int64_t n_cells = std::min<int64_t>(16, end - cell);
                for (int64_t c = 0; c < n_cells; ++c) {
                    any_bits |= bits[cell + c];
                    n_hidden += bits[cell + c] == 0xfc00; // -INFINITY
                }
                if (any_bits == 0 || n_hidden == 0) {
                    take(cell, n_cells);
                } else if (n_hidden < n_cells) {
                    for (int64_t c = 0; c < n_cells; ++c) {
                        if (bits[cell + c] != 0xfc00) {
                            take(cell + c, 1);
                        }
                    }
                }
                cell += n_cells;
            }
        }
        counts[i] = n;
    }

    int64_t count(int64_t stream, int64_t iq) const {
        int64_t n = 0;
        for (int64_t i = 0; i < a.n_segments; ++i) {
            n += counts[(stream*a.n_q + iq)*a.n_segments + i];
        }
        return n;
    }

    // copies up to n cells behind the first ones, and what the mask adds to their scores. has_bias: that isn't nothing
    int copy(int64_t stream, int64_t iq, int64_t first, int n, int32_t * to, float * bias, bool & has_bias) const {
        const int64_t i_query = stream*a.n_q + iq;
        int n_copied = 0;
        for (int64_t i = 0; i < a.n_segments && n_copied < n; ++i) {
            const int64_t n_here = counts[i_query*a.n_segments + i];
            if (first < n_here) {
                const int32_t * from = cells + i_query*a.n_cells + i*N_SEGMENT;
                for (; first < n_here && n_copied < n; ++first) {
                    to[n_copied++] = from[first];
                }
            }
            first -= n_here;
        }
        has_bias = false;
        if (a.mask) {
            const ggml_fp16_t * bits = mask(stream, iq);
            for (int j = 0; j < n_copied; ++j) {
                bias[j] = GGML_CPU_FP16_TO_FP32(bits[to[j]]);
                has_bias |= bits[to[j]] != 0;
            }
        }
        return n_copied;
    }
};

// what a thread needs beside its results
struct lt_scratch {
    float   * q;      // [n_head_kv][n_q][n_group][n_dim_k], scaled: those that share a head's keys follow each other
    float   * scores; // [n_head][N_BLOCK]
    float   * bias;   // [N_BLOCK], of the cells below
    int32_t * cells;  // [N_BLOCK], those of the block
    int32_t * order;  // [N_BLOCK], 0, 1, 2, ...
    float   * k, * v; // [N_KEYS][n_dim_k], [N_BLOCK][n_dim_v]: of a head, where the cache isn't made of floats

    lt_scratch(const lt_attention & a, float * data) {
        q      = data;
        scores = q      + a.n_rows()*a.n_dim_k;
        bias   = scores + a.n_head*N_BLOCK;
        cells  = (int32_t *) (bias + N_BLOCK);
        order  = cells  + N_BLOCK;
        k      = bias   + 3*N_BLOCK;
        v      = k      + N_KEYS*a.n_dim_k;
        std::iota(order, order + N_BLOCK, 0);
    }
};

static void load_queries(const lt_attention & a, int64_t stream, float * to) {
    for (int64_t head_kv = 0; head_kv < a.n_head_kv; ++head_kv) {
        for (int64_t iq = 0; iq < a.n_q; ++iq) {
            for (int64_t g = 0; g < a.n_group; ++g, to += a.n_dim_k) {
                const float * q = (const float *)
                    ((const char *) a.q->data + iq*a.q->nb[1] + (head_kv*a.n_group + g)*a.q->nb[2] + stream*a.q->nb[3]);
                for (int64_t d = 0; d < a.n_dim_k; ++d) {
                    to[d] = q[d]*a.scale;
                }
            }
        }
    }
}

// a row of a cache of another type as floats
static void to_floats(ggml_type type, const void * x, float * y, int64_t n) {
    switch (type) {
        case GGML_TYPE_BF16: {
            for (int64_t i = 0; i < n; ++i) {
                y[i] = GGML_BF16_TO_FP32(((const ggml_bf16_t *) x)[i]);
            }
        } break;
        default:
            ggml_get_type_traits(type)->to_float(x, y, n);
    }
}

// calls f<R>(g) for tiles of the rows of a group
template <typename F>
static inline void for_tiles(int64_t n_group, F && f) {
    int64_t g = 0;
    for (; g + N_ROWS <= n_group; g += N_ROWS) {
        f(std::integral_constant<int, N_ROWS>(), g);
    }
    static_assert(N_ROWS == 4, "the cases here");
    switch (n_group - g) {
        case 1: f(std::integral_constant<int, 1>(), g); break;
        case 2: f(std::integral_constant<int, 2>(), g); break;
        case 3: f(std::integral_constant<int, 3>(), g); break;
    }
}

// into the second cache: a block is larger than the first one, where it would also push out what is computed with
static inline void prefetch(const char * data, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch(data + i, 0, 2);
    }
}

// a query and some of the cells that it sees
struct lt_block {
    int64_t stream, iq;

    const int32_t * cells;
    int             n_cells;
    const float   * bias; // nullptr: none
};

static const char * row_of(const ggml_tensor * t, const lt_block & b, int64_t cell, int64_t head) {
    return (const char *) t->data + cell*t->nb[1] + head*t->nb[2] + b.stream*t->nb[3];
}

// the scores of all heads. Keys are read row by row, all heads of a cell after each other, as they lie in memory, and the values
// that will be needed next are asked for meanwhile
template <typename T>
static void compute_scores(const lt_attention & a, const lt_block & b, const lt_scratch & scratch) {
    constexpr bool is_converted = std::is_same_v<T, void>;

    using elem_t = std::conditional_t<is_converted, float, T>;

    const size_t n_bytes_v = ggml_row_size(a.v->type, a.n_dim_v);
    const size_t n_bytes_k = ggml_row_size(a.k->type, a.n_dim_k);
    for (int j = 0; j < b.n_cells; j += N_KEYS) {
        const int n = std::min(N_KEYS, b.n_cells - j);
        for (int64_t head_kv = 0; head_kv < a.n_head_kv; ++head_kv) {
            const elem_t * keys[N_KEYS];
            for (int i = 0; i < N_KEYS; ++i) {
                const int32_t cell = b.cells[j + std::min(i, n - 1)]; // scores behind the last one are never read
                const char *  row  = row_of(a.k, b, cell, head_kv);
                if constexpr (is_converted) {
                    float * converted = scratch.k + i*a.n_dim_k;
                    to_floats(a.k->type, row, converted, a.n_dim_k);
                    keys[i] = converted;
                } else {
                    keys[i] = (const elem_t *) row;
                }
                prefetch(row_of(a.k, b, cell + N_AHEAD, head_kv), n_bytes_k); // cells most often follow each other
                prefetch(row_of(a.v, b, cell,           head_kv), n_bytes_v);
            }
            const int64_t row = (head_kv*a.n_q + b.iq)*a.n_group;
            for_tiles(a.n_group, [&](auto n_rows, int64_t g) {
                scores_of_tile<decltype(n_rows)::value, N_KEYS>(
                    scratch.scores + (head_kv*a.n_group + g)*N_BLOCK + j, scratch.q + (row + g)*a.n_dim_k, keys, a.n_dim_k);
            });
        }
    }
}

// online softmax: scores become weights, what was summed before shrinks where there is a new maximum
static void compute_weights(const lt_attention & a, const lt_block & b, int64_t head, float * scores, float * result) {
    if (a.softcap != 0.0f) {
        for (int j = 0; j < b.n_cells; ++j) {
            scores[j] = a.softcap*tanhf(scores[j]);
        }
    }
    if (b.bias) {
        ggml_vec_mad_f32(b.n_cells, scores, b.bias, a.slope(head));
    }
    const float max = max_of(scores, b.n_cells);
    if (max > result[0]) {
        const float shrink = expf(result[0] - max);
        result[0] = max;
        result[1] *= shrink;
        ggml_vec_scale_f32(a.n_dim_v, result + 2, shrink);
    }
    result[1] += (float) ggml_vec_soft_max_f32(b.n_cells, scores, scores, result[0]);
}

template <typename T>
static void add_values(
        const lt_attention & a, const lt_rows<T> & v, const int32_t * cells, int n_cells, const float * weights, float * results) {
    for_tiles(a.n_group, [&](auto n_rows, int64_t g) {
        values_of_rows<decltype(n_rows)::value>(
            results + g*a.partial() + 2, a.partial(), weights + g*N_BLOCK, v, cells, n_cells, a.n_dim_v);
    });
}

// results: [n_rows()][partial()]
static void compute_block(const lt_attention & a, const lt_block & b, const lt_scratch & scratch, float * results) {
    switch (a.k->type) {
        case GGML_TYPE_F16:  compute_scores<ggml_fp16_t>(a, b, scratch); break;
        case GGML_TYPE_F32:  compute_scores<float>      (a, b, scratch); break;
        case GGML_TYPE_Q8_0: compute_scores<block_q8_0> (a, b, scratch); break;
        case GGML_TYPE_Q4_0: compute_scores<block_q4_0> (a, b, scratch); break;
        default:             compute_scores<void>       (a, b, scratch); break;
    }
    for (int64_t head_kv = 0; head_kv < a.n_head_kv; ++head_kv) {
        float * weights = scratch.scores + head_kv*a.n_group*N_BLOCK;
        float * result  = results + (head_kv*a.n_q + b.iq)*a.n_group*a.partial();
        for (int64_t g = 0; g < a.n_group; ++g) {
            compute_weights(a, b, head_kv*a.n_group + g, weights + g*N_BLOCK, result + g*a.partial());
        }
        const char * data = row_of(a.v, b, 0, head_kv);
        switch (a.v->type) {
            case GGML_TYPE_F16:  add_values(a, lt_rows<ggml_fp16_t>{ data, a.v->nb[1] }, b.cells, b.n_cells, weights, result); break;
            case GGML_TYPE_F32:  add_values(a, lt_rows<float>      { data, a.v->nb[1] }, b.cells, b.n_cells, weights, result); break;
            case GGML_TYPE_Q8_0: add_values(a, lt_rows<block_q8_0> { data, a.v->nb[1] }, b.cells, b.n_cells, weights, result); break;
            case GGML_TYPE_Q4_0: add_values(a, lt_rows<block_q4_0> { data, a.v->nb[1] }, b.cells, b.n_cells, weights, result); break;
            default: {
                for (int j = 0; j < b.n_cells; ++j) {
                    to_floats(a.v->type, row_of(a.v, b, b.cells[j], head_kv), scratch.v + j*a.n_dim_v, a.n_dim_v);
                }
                add_values(a, lt_rows<float>{ (const char *) scratch.v, a.n_dim_v*sizeof(float) },
                    scratch.order, b.n_cells, weights, result);
            }
        }
    }
}

// the chunk of each query that has as many. results: [n_rows()][partial()]
static void compute_chunk(
        const lt_attention & a, const lt_seen & seen, int64_t stream, int64_t i_chunk, const lt_scratch & scratch, float * results) {
    for (int64_t row = 0; row < a.n_rows(); ++row) {
        float * result = results + row*a.partial();
        result[0] = -INFINITY;
        std::fill_n(result + 1, a.partial() - 1, 0.0f);
    }
    // block by block: the queries of a sequence see much the same cells, which are near when the next one needs them
    bool is_at_end = false;
    for (int64_t i_block = 0; !is_at_end; ++i_block) {
        is_at_end = true;
        for (int64_t iq = 0; iq < a.n_q; ++iq) {
            const int64_t size  = a.chunk_size(seen.count(stream, iq));
            const int64_t first = i_block*N_BLOCK;
            if (first >= size) {
                continue;
            }
            bool has_bias;
            const int n = seen.copy(
                stream, iq, i_chunk*size + first, std::min(N_BLOCK, size - first), scratch.cells, scratch.bias, has_bias);
            if (n > 0) {
                compute_block(a, { stream, iq, scratch.cells, n, has_bias ? scratch.bias : nullptr }, scratch, results);
                is_at_end = false;
            }
        }
    }
}

// one row of the result, of the partial results of n chunks, the first of them at partials. sum: n_dim_v floats
static void merge_row(const lt_attention & a, const float * partials, int64_t n, int64_t stride, int64_t head, float * sum) {
    float max   = a.sinks ? ((const float *) a.sinks->data)[head] : -INFINITY;
    float total = a.sinks ? 1.0f : 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        max = std::max(max, partials[i*stride]);
    }
    if (a.sinks) {
        total = expf(((const float *) a.sinks->data)[head] - max);
    }
    std::fill_n(sum, a.n_dim_v, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
        const float * partial = partials + i*stride;
        if (partial[1] != 0.0f) { // NaN isn't
            const float weight = expf(partial[0] - max);
            total += weight*partial[1];
            ggml_vec_mad_f32(a.n_dim_v, sum, partial + 2, weight);
        }
    }
    ggml_vec_scale_f32(a.n_dim_v, sum, total != 0.0f ? 1.0f/total : 0.0f);
}

bool lt_cpu_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || ggml_get_op_params_i32(dst, LT_CPU_ATTENTION_PARAM) != LT_CPU_ATTENTION_ON) {
        return false;
    }
    const lt_attention a(dst);
    if (!a.is_for_us()) {
        return false;
    }
    GGML_ASSERT(params->wsize >= a.work_size(params->nth));

    float * data = (float *) params->wdata;
    const lt_seen seen(a, data);
    float * partials = data + a.seen(); // [n_streams][n_chunks][n_rows()][partial()]
    const int64_t stride = a.n_rows()*a.partial();

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    for (int64_t i = params->ith; i < a.n_streams*a.n_q*a.n_segments; i += params->nth) {
        seen.find(i);
    }
    ggml_barrier(params->threadpool);

    int64_t n_chunks = 0;
    for (int64_t i = 0; i < a.n_streams*a.n_q; ++i) {
        n_chunks = std::max(n_chunks, a.n_chunks(seen.count(i/a.n_q, i % a.n_q)));
    }
    const lt_scratch scratch(a, partials + a.n_streams*std::min(a.n_chunks(a.n_cells), N_CHUNKS)*stride + params->ith*a.scratch());
    int64_t loaded = -1;
    for (int64_t i = params->ith; i < a.n_streams*n_chunks; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t stream = i/n_chunks;
        if (stream != loaded) {
            load_queries(a, stream, scratch.q);
            loaded = stream;
        }
        compute_chunk(a, seen, stream, i % n_chunks, scratch, partials + i*stride);
    }
    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < a.n_streams*a.n_rows(); i += params->nth) {
        const int64_t stream = i/a.n_rows();
        const int64_t row    = i % a.n_rows();
        const int64_t head   = row/(a.n_q*a.n_group)*a.n_group + row % a.n_group;
        const int64_t iq     = row/a.n_group % a.n_q;
        merge_row(a, partials + stream*n_chunks*stride + row*a.partial(), n_chunks, stride, head,
            (float *) ((char *) dst->data + ((stream*a.n_q + iq)*a.n_head + head)*dst->nb[1]));
    }
    return true;
}

size_t lt_cpu_attention_work_size(const ggml_tensor * dst, int n_threads) {
    if (ggml_get_op_params_i32(dst, LT_CPU_ATTENTION_PARAM) != LT_CPU_ATTENTION_ON) {
        return 0;
    }
    const lt_attention a(dst);
    return a.is_for_us() ? a.work_size(n_threads) : 0;
}
