#include "lt-kv-cache-context.h"

#include "lt-kv-cache.h"

#include <cassert>

lt_kv_cache_context::lt_kv_cache_context(llama_memory_status status) : status(status) {}

lt_kv_cache_context::lt_kv_cache_context(lt_kv_cache * kv) :
    kv(kv),
    ctx_full  (kv->get_full  ()->init_full()),
    ctx_streaming(kv->get_streaming()->init_full()),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        llama_context * lctx,
        bool optimize) :
    kv(kv),
    ctx_full  (kv->get_full  ()->init_update(lctx, optimize)),
    ctx_streaming(kv->get_streaming()->init_update(lctx, optimize)),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        slot_info_vec_t sinfos_full,
        slot_info_vec_t sinfos_streaming,
        std::vector<llama_ubatch> ubatches) :
    kv(kv),
    ubatches(std::move(ubatches)),
    ctx_full  (new llama_kv_cache_context(kv->get_full  (), std::move(sinfos_full),   this->ubatches)),
    ctx_streaming(new llama_kv_cache_context(kv->get_streaming(), std::move(sinfos_streaming), this->ubatches)),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
}

lt_kv_cache_context::~lt_kv_cache_context() = default;

bool lt_kv_cache_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    ctx_full  ->next();
    ctx_streaming->next();

    return ++i_next < ubatches.size();
}

bool lt_kv_cache_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    bool res = true;

    res = res & ctx_full  ->apply();
    res = res & ctx_streaming->apply();

    return res;
}

llama_memory_status lt_kv_cache_context::get_status() const {
    return status;
}

const llama_ubatch & lt_kv_cache_context::get_ubatch() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return ubatches[i_next];
}

const lt_spec & lt_kv_cache_context::get_spec() const {
    return kv->get_spec();
}

const llama_kv_cache_context * lt_kv_cache_context::get_full() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return static_cast<const llama_kv_cache_context *>(ctx_full.get());
}

const llama_kv_cache_context * lt_kv_cache_context::get_streaming() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return static_cast<const llama_kv_cache_context *>(ctx_streaming.get());
}
