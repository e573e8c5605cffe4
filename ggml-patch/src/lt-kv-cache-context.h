#pragma once

#include "lt-kv-cache.h"

#include <functional>
#include <memory>
#include <vector>

// the parts of an lt_kv_cache while a batch is processed, in the shape of llama_kv_cache_iswa_context
class lt_kv_cache_context : public llama_memory_context_i {
public:
    // used for errors
    lt_kv_cache_context(llama_memory_status status);

    // used to create a full-cache context
    lt_kv_cache_context(lt_kv_cache * kv);

    // used to create an update context
    lt_kv_cache_context(
            lt_kv_cache * kv,
            llama_context * lctx,
            bool optimize);

    // used to create a batch processing context from a batch
    lt_kv_cache_context(
            lt_kv_cache * kv,
            lt_batch batch,
            lt_ubatches ubatches);

    virtual ~lt_kv_cache_context();

    //
    // llama_memory_context_i
    //

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override;
    const llama_ubatch & get_ubatch() const override;

    //
    // lt_kv_cache_context specific API
    //

    const lt_kv_cache & get_cache() const;

    const llama_kv_cache_context * get_full() const;

    // what the streaming layers of the current ubatch use: the streaming part or the prompt part
    const llama_kv_cache_context * get_streaming() const;

    // null if no layer has a window of its own
    const llama_kv_cache_context * get_swa() const;

    bool is_in_prompt_part() const;

    // a prompt that is read layer by layer

    const lt_layers * get_layers() const; // null: the batch is not one

    // the index of the current ubatch's first token in the batch
    int64_t get_i_token() const;

    // the tokens of sequence 0 up to the end of the current ubatch
    uint64_t get_n_past() const;

    void note_cuts(const llm_graph_params & params) const;

    // call f(il, t) for the keys and the values of each layer
    void for_each_kv(const std::function<void(int32_t, const ggml_tensor *)> & f) const;

private:
    // the parts while one ubatch is processed
    // note: a context goes through its ubatches once, and here each of them comes several times
    struct ubatch_parts {
        llama_ubatch silent; // without outputs

        int64_t i_token;

        std::unique_ptr<llama_kv_cache_context> full;
        std::unique_ptr<llama_kv_cache_context> prompt; // null if no layer streams yet
    };

    void init_layers();

    void add_swa(llama_memory_context_ptr ctx);

    bool is_in_prompt_part(size_t i) const;

    void report_progress();

    lt_kv_cache * kv = nullptr;

    // the full part that this was made for
    const llama_kv_cache * kv_full = nullptr;

    bool is_update = false;

    // the index of the next ubatch to process
    size_t i_next = 0;

    lt_batch batch;

    lt_ubatches ubatches;

    llama_memory_context_ptr ctx_full;
    llama_memory_context_ptr ctx_streaming;
    llama_memory_context_ptr ctx_prompt; // can be null
    llama_memory_context_ptr ctx_swa;    // can be null

    const lt_layers * layers = nullptr; // null, or no longer, if the batch is not read layer by layer

    std::vector<ubatch_parts> parts; // [ubatches.all.size()] if the batch is a prompt that is read layer by layer

    std::vector<int8_t> no_outputs; // [n_ubatch]

    // the caller wants no more of the batch
    bool is_stopped = false;

    llama_memory_status status;
};
