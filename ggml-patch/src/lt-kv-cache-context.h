#pragma once

#include "lt-kv-cache.h"

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

    bool is_in_prompt_part() const;

private:
    lt_kv_cache * kv = nullptr;

    bool is_update = false;

    // the index of the next ubatch to process
    size_t i_next = 0;

    lt_batch batch;

    lt_ubatches ubatches;

    llama_memory_context_ptr ctx_full;
    llama_memory_context_ptr ctx_streaming;
    llama_memory_context_ptr ctx_prompt; // can be null

    llama_memory_status status;
};
