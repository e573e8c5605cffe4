#pragma once

#include "lt-kv-cache-context.h"

#include "llama-graph.h"

#include <atomic>
#include <functional>

// the attention input of a graph with streaming layers
// as an llm_graph_input_attn_kv it is the input of the layers with full attention, and it owns that of the others
class lt_graph_input_attn_kv : public llm_graph_input_attn_kv {
public:
    lt_graph_input_attn_kv(
            std::unique_ptr<llm_graph_input_attn_kv> inp_full,
            std::unique_ptr<llm_graph_input_attn_kv> inp_streaming,
            const lt_kv_cache_context * mctx);

    ~lt_graph_input_attn_kv() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    llm_graph_input_attn_kv * lt_for_layer(int il) override;

    void lt_keep_q(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int il) override;

    // those that are set only where they have memory
    void for_each_tensor(const std::function<void(const ggml_tensor *)> & visit) const;

    void build_keep_idxs(ggml_context * ctx, const llama_ubatch & ubatch);

private:
    const std::unique_ptr<llm_graph_input_attn_kv> inp_streaming; // null if no layer streams yet. of layers that only hide: the full part behind another mask

    const lt_kv_cache * kv;

    const lt_kv_cache_context * mctx_lt;

    ggml_tensor * keep_idxs = nullptr; // I64 [n_keep], the rows of the queries that the lazy ratio is measured with, can be null

    // note: a copy, because the graph can outlive the memory context that it was built with
    const lt_spec spec;

    const uint64_t generation;
    const bool     in_prompt_part;
};

// the same in a model with layers that have a sliding window of their own
class lt_graph_input_attn_kv_iswa : public llm_graph_input_attn_kv_iswa {
public:
    lt_graph_input_attn_kv_iswa(
            const llama_hparams & hparams,
            const llama_cparams & cparams,
            std::unique_ptr<llm_graph_input_attn_kv> inp_global,
            std::unique_ptr<llm_graph_input_attn_kv> inp_swa);

    ~lt_graph_input_attn_kv_iswa() = default;

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    llm_graph_input_attn_kv * lt_for_layer(int il) override;

private:
    const std::unique_ptr<llm_graph_input_attn_kv> inp_global;
    const std::unique_ptr<llm_graph_input_attn_kv> inp_swa;
};

// see lt_set_attention()
extern std::atomic<bool> lt_attention_for_all;

// whether contexts of the model compute attention with few queries by lt-cpu-attention.cpp: where LT_ATTENTION or
// lt_set_attention() says so, else where layers stream
// throws std::invalid_argument if LT_ATTENTION is neither on nor off
bool lt_wants_attention(const llama_model & model);

// asks for that kernel, where the context has it
void lt_mark_attention(ggml_tensor * attention, const llama_cparams & cparams);

// nullptr if the memory has no streaming layers
std::unique_ptr<llm_graph_input_attn_kv> lt_build_attn_inp_kv(
                 ggml_context * ctx0,
           const llama_ubatch & ubatch,
          const llama_hparams & hparams,
          const llama_cparams & cparams,
 const llama_memory_context_i * mctx);

std::unique_ptr<llm_graph_input_attn_kv_iswa> lt_build_attn_inp_kv_iswa(
                 ggml_context * ctx0,
           const llama_ubatch & ubatch,
          const llama_hparams & hparams,
          const llama_cparams & cparams,
 const llama_memory_context_i * mctx);
