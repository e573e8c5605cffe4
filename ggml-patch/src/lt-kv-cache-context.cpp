#include "lt-kv-cache-context.h"

#include <cassert>

lt_kv_cache_context::lt_kv_cache_context(llama_memory_status status) : status(status) {}

lt_kv_cache_context::lt_kv_cache_context(lt_kv_cache * kv) :
    kv(kv),
    ctx_full     (kv->get_full     ()->init_full()),
    ctx_streaming(kv->get_streaming()->init_full()),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
    if (auto * kv_reserve = kv->get_reserve()) {
        ctx_prompt = kv_reserve->init_full();
        ubatches.in_prompt_part.push_back(true);
    }
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        llama_context * lctx,
        bool optimize) :
    kv(kv),
    is_update(true),
    ctx_full     (kv->get_full     ()->init_update(lctx, optimize)),
    ctx_streaming(kv->get_streaming()->init_update(lctx, optimize)),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
    if (kv->get_prompt()) {
        ctx_prompt = kv->get_prompt()->init_update(lctx, optimize);
        status     = llama_memory_status_combine(status, ctx_prompt->get_status());
    }
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        lt_batch batch,
        lt_ubatches ubatches_in) :
    kv(kv),
    batch(std::move(batch)),
    ubatches(std::move(ubatches_in)),
    ctx_full     (new llama_kv_cache_context(kv->get_full     (), std::move(ubatches.sinfos_full),      ubatches.all)),
    ctx_streaming(new llama_kv_cache_context(kv->get_streaming(), std::move(ubatches.sinfos_streaming), ubatches.streaming)),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
    if (!ubatches.prompt.empty()) {
        ctx_prompt.reset(new llama_kv_cache_context(kv->get_prompt(), std::move(ubatches.sinfos_prompt), ubatches.prompt));
        status = llama_memory_status_combine(status, ctx_prompt->get_status());
    }
}

lt_kv_cache_context::~lt_kv_cache_context() = default;

bool lt_kv_cache_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    ctx_full->next();
    if (!kv->keeps_all()) {
        (is_in_prompt_part() ? ctx_prompt : ctx_streaming)->next();
    }

    if (++i_next < ubatches.all.size()) {
        return true;
    }

    kv->end_batch(batch);

    return false;
}

bool lt_kv_cache_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    bool res = ctx_full->apply();

    if (is_update) {
        res = res & ctx_streaming->apply();
        if (ctx_prompt) {
            res = res & ctx_prompt->apply();
        }

        return res;
    }

    kv->begin_ubatch(batch, ubatches.all[i_next]);

    if (!kv->keeps_all()) {
        res = res & (is_in_prompt_part() ? ctx_prompt : ctx_streaming)->apply();
    }

    return res;
}

llama_memory_status lt_kv_cache_context::get_status() const {
    return status;
}

const llama_ubatch & lt_kv_cache_context::get_ubatch() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return ubatches.all[i_next];
}

const lt_kv_cache & lt_kv_cache_context::get_cache() const {
    return *kv;
}

const llama_kv_cache_context * lt_kv_cache_context::get_full() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return static_cast<const llama_kv_cache_context *>(ctx_full.get());
}

const llama_kv_cache_context * lt_kv_cache_context::get_streaming() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return static_cast<const llama_kv_cache_context *>((is_in_prompt_part() ? ctx_prompt : ctx_streaming).get());
}

bool lt_kv_cache_context::is_in_prompt_part() const {
    return i_next < ubatches.in_prompt_part.size() && ubatches.in_prompt_part[i_next];
}
