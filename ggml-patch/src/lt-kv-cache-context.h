#pragma once

#include "lt-spec.h"

#include "llama-kv-cache.h"

#include <vector>

class lt_kv_cache;

// the two parts of an lt_kv_cache while a batch is processed, in the shape of llama_kv_cache_iswa_context
class lt_kv_cache_context : public llama_memory_context_i {
public:
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

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
            slot_info_vec_t sinfos_full,
            slot_info_vec_t sinfos_streaming,
            std::vector<llama_ubatch> ubatches);

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

    const lt_spec & get_spec() const;

    const llama_kv_cache_context * get_full()   const;
    const llama_kv_cache_context * get_streaming() const;

private:
    const lt_kv_cache * kv = nullptr;

    // the index of the next ubatch to process
    size_t i_next = 0;

    std::vector<llama_ubatch> ubatches;

    const llama_memory_context_ptr ctx_full;
    const llama_memory_context_ptr ctx_streaming;

    const llama_memory_status status;
};
