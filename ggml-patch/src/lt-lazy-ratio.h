#pragma once

#include "lt-spec.h"

#include "llama.h"

#include "ggml-cpp.h"

#include <utility>
#include <vector>

struct llama_model;
class  llama_kv_cache;

// whether layer a is the one of the two to stream: its ratio is higher or, where they have the same, its number
inline bool lt_is_lazier(const std::vector<float> & ratios, int32_t a, int32_t b) {
    return ratios[a] != ratios[b] ? ratios[a] > ratios[b] : a > b;
}

// lazy ratio of each layer over the last queries of a prompt (LightTransfer, arXiv 2410.13846, section 3): of the attention mass that
// a head's query has on the first n_sink and the last n_recent positions of the prompt, the mean over these queries and all heads, or
// the smallest. learned sinks (gpt-oss) take part in the softmax
//
// the queries are kept while the prompt is read, a few rows of each layer, and meet the cached keys once, at its end. so it does not
// matter how the prompt is split, nor what computes its attention
class lt_lazy_ratio {
public:
    // layers: those that are measured
    lt_lazy_ratio(const llama_model & model, const std::vector<bool> & layers, uint32_t n_last, bool offload);

    uint32_t get_n_last() const;

    // where the query of the i-th token of the sequence, at position pos, is kept
    int64_t set_row(uint64_t i, llama_pos pos);

    // keep the last rows of q in the rows idxs
    // q: [n_embd_head, n_head, n_tokens], idxs: I64 [n_keep]
    void build_keep(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * idxs, float kq_scale, int il);

    bool is_measured(int il) const;

    // n_past: the tokens of the prompt, all of which kv holds for sequence 0
    // returns [n_layer], NaN where a layer isn't measured
    // throws std::runtime_error if there is no memory
    std::vector<float> compute(llama_context * lctx, const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec) const;

    // that of one layer, which is measured
    float compute(llama_context * lctx, const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec, int il) const;

private:
    const llama_model & model;

    const uint32_t n_last;

    struct layer {
        ggml_tensor * q = nullptr; // [n_embd_head*n_head, n_last]

        float kq_scale = 1.0f;
    };

    std::vector<layer> layers;

    struct row {
        uint64_t  i = UINT64_MAX;
        llama_pos pos = -1;
    };

    std::vector<row> rows; // [n_last]

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // a part of the heads and queries of a layer: the scores of all at once could take more memory than the prompt's attention did
    struct chunk {
        int64_t head_kv, n_head_kv;
        int64_t row,     n_row;
    };

    std::vector<chunk> split(int il, int64_t n_kv) const;

    // what the kept queries see
    struct view {
        int64_t n_kv;

        std::vector<bool>  valid; // [n_last] they are still those of this prompt: it may have been rolled back while it was read
        std::vector<float> mask;  // [n_kv, n_last]
        std::vector<float> ind;   // [n_kv] 1 for sinks and recent positions
    };

    view make_view(const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec) const;

    float compute(llama_context * lctx, const llama_kv_cache & kv, const view & seen, lt_lazy lazy, int il) const;

    // the scores of a chunk after softmax, and of them the mass on ind. [1, n_row, n_head]
    ggml_tensor * build_mass(ggml_context * ctx, ggml_tensor * k, ggml_tensor * mask, ggml_tensor * ind, const chunk & part, int il) const;
};
