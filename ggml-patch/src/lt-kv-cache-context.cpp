#include "lt-kv-cache-context.h"

#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-impl.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

lt_kv_cache_context::lt_kv_cache_context(llama_memory_status status) : status(status) {}

lt_kv_cache_context::lt_kv_cache_context(lt_kv_cache * kv) :
    kv(kv),
    kv_full(kv->get_reserve_full()),
    ctx_full     (kv->get_reserve_full()->init_full()),
    ctx_streaming(kv->get_streaming()->init_full()),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
    if (auto * kv_reserve = kv->get_reserve()) {
        ctx_prompt = kv_reserve->init_full();
        ubatches.in_prompt_part.push_back(true);
    }

    if (kv->get_swa()) {
        add_swa(kv->get_swa()->init_full());
    }
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        llama_context * lctx,
        bool optimize) :
    kv(kv),
    kv_full(kv->get_full()),
    is_update(true),
    ctx_full     (kv->get_full     ()->init_update(lctx, optimize)),
    ctx_streaming(kv->get_streaming()->init_update(lctx, optimize)),
    status(llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status())) {
    if (kv->get_prompt()) {
        ctx_prompt = kv->get_prompt()->init_update(lctx, optimize);
        status     = llama_memory_status_combine(status, ctx_prompt->get_status());
    }

    if (kv->get_swa()) {
        add_swa(kv->get_swa()->init_update(lctx, optimize));
    }
}

lt_kv_cache_context::lt_kv_cache_context(
        lt_kv_cache * kv,
        lt_batch batch,
        lt_ubatches ubatches_in) :
    kv(kv),
    kv_full(kv->get_full()),
    batch(std::move(batch)),
    ubatches(std::move(ubatches_in)),
    layers(kv->get_layers()),
    status(LLAMA_MEMORY_STATUS_SUCCESS) {
    if (layers) {
        init_layers();
        return;
    }

    ctx_full     .reset(new llama_kv_cache_context(kv->get_full     (), std::move(ubatches.sinfos_full),      ubatches.all));
    ctx_streaming.reset(new llama_kv_cache_context(kv->get_streaming(), std::move(ubatches.sinfos_streaming), ubatches.streaming));

    status = llama_memory_status_combine(ctx_full->get_status(), ctx_streaming->get_status());

    if (!ubatches.prompt.empty()) {
        ctx_prompt.reset(new llama_kv_cache_context(kv->get_prompt(), std::move(ubatches.sinfos_prompt), ubatches.prompt));
        status = llama_memory_status_combine(status, ctx_prompt->get_status());
    }

    if (kv->get_swa()) {
        add_swa(std::make_unique<llama_kv_cache_context>(kv->get_swa(), std::move(ubatches.sinfos_swa), ubatches.all));
    }
}

void lt_kv_cache_context::add_swa(llama_memory_context_ptr ctx) {
    ctx_swa = std::move(ctx);
    status  = llama_memory_status_combine(status, ctx_swa->get_status());
}

void lt_kv_cache_context::init_layers() {
    int64_t i_token = 0;

    for (size_t i = 0; i < ubatches.all.size(); ++i) {
        const auto & ubatch = ubatches.all[i];

        no_outputs.resize(std::max<size_t>(no_outputs.size(), ubatch.n_tokens), 0);

        ubatch_parts cur;
        cur.silent  = ubatch;
        cur.i_token = i_token;

        cur.full  .reset(new llama_kv_cache_context(kv->get_full  (), { ubatches.sinfos_full  [i] }, { ubatch }));
        if (!kv->keeps_all()) {
            cur.prompt.reset(new llama_kv_cache_context(kv->get_prompt(), { ubatches.sinfos_prompt[i] }, { ubatch }));
        }

        i_token += ubatch.n_tokens;

        parts.push_back(std::move(cur));
    }

    for (auto & cur : parts) {
        cur.silent.output = no_outputs.data();
    }
}

lt_kv_cache_context::~lt_kv_cache_context() {
    if (layers) {
        kv->stop_layers();
    }
}

bool lt_kv_cache_context::next() {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    ++i_next;
    report_progress();

    if (layers) {
        if (i_next < ubatches.all.size()) {
            return true;
        }

        try {
            if (kv->next_run()) {
                i_next = 0;
                return true;
            }
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());

            // the batch ends with the next ubatch, and none of it stays
            i_next     = 0;
            is_stopped = true;
            return true;
        }

        layers = nullptr;
        kv->end_batch(batch);

        return false;
    }

    ctx_full->next();
    if (!kv->keeps_all()) {
        (is_in_prompt_part(i_next - 1) ? ctx_prompt : ctx_streaming)->next();
    }
    if (ctx_swa) {
        ctx_swa->next();
    }

    if (i_next < ubatches.all.size()) {
        return true;
    }

    kv->end_batch(batch);

    return false;
}

bool lt_kv_cache_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    if (is_update) {
        bool res = ctx_full->apply();

        res = res & ctx_streaming->apply();
        if (ctx_prompt) {
            res = res & ctx_prompt->apply();
        }
        if (ctx_swa) {
            res = res & ctx_swa->apply();
        }

        return res;
    }

    if (is_stopped) {
        return false;
    }

    if (layers && layers->i_run > 0) {
        return true;
    }

    kv->begin_ubatch(batch, ubatches.all[i_next]);

    if (layers) {
        const auto & cur = parts[i_next];

        return cur.full->apply() & (!cur.prompt || cur.prompt->apply());
    }

    bool res = ctx_full->apply();

    if (!kv->keeps_all()) {
        res = res & (is_in_prompt_part() ? ctx_prompt : ctx_streaming)->apply();
    }

    if (ctx_swa) {
        res = res & ctx_swa->apply();
    }

    return res;
}

void lt_kv_cache_context::report_progress() {
    if (!kv->on_progress) {
        return;
    }

    const size_t n     = ubatches.all.size();
    const size_t i_run = layers ? layers->i_run       : 0;
    const size_t n_run = layers ? layers->runs.size() : 1;

    is_stopped = !kv->on_progress((float) (i_run*n + i_next)/(n_run*n));
}

llama_memory_status lt_kv_cache_context::get_status() const {
    return status;
}

const llama_ubatch & lt_kv_cache_context::get_ubatch() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return layers && !layers->is_last_run() ? parts[i_next].silent : ubatches.all[i_next];
}

const lt_kv_cache & lt_kv_cache_context::get_cache() const {
    return *kv;
}

const llama_kv_cache_context * lt_kv_cache_context::get_full() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return layers ? parts[i_next].full.get() : static_cast<const llama_kv_cache_context *>(ctx_full.get());
}

const llama_kv_cache_context * lt_kv_cache_context::get_streaming() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    if (layers) {
        return parts[i_next].prompt.get();
    }

    return static_cast<const llama_kv_cache_context *>((is_in_prompt_part() ? ctx_prompt : ctx_streaming).get());
}

const llama_kv_cache_context * lt_kv_cache_context::get_swa() const {
    assert(status == LLAMA_MEMORY_STATUS_SUCCESS);

    return static_cast<const llama_kv_cache_context *>(ctx_swa.get());
}

bool lt_kv_cache_context::is_in_prompt_part() const {
    return is_in_prompt_part(i_next);
}

bool lt_kv_cache_context::is_in_prompt_part(size_t i) const {
    return i < ubatches.in_prompt_part.size() && ubatches.in_prompt_part[i];
}

const lt_layers * lt_kv_cache_context::get_layers() const {
    return layers;
}

int64_t lt_kv_cache_context::get_i_token() const {
    return parts[i_next].i_token;
}

uint64_t lt_kv_cache_context::get_n_past() const {
    return layers ? layers->n_past + parts[i_next].i_token + ubatches.all[i_next].n_tokens : kv->n_tokens(0);
}

void lt_kv_cache_context::note_cuts(const llm_graph_params & params) const {
    kv->note_cuts(params, *this);
}

void lt_kv_cache_context::for_each_kv(const std::function<void(int32_t, const ggml_tensor *)> & f) const {
    // note: what a graph is reserved for has a prompt part of its own
    const auto * kv_streaming = !is_in_prompt_part() ? kv->get_streaming() : kv->get_prompt() ? kv->get_prompt() : kv->get_reserve();

    for (const auto * part : { kv_full, (const llama_kv_cache *) kv_streaming }) {
        lt_kv_ops::for_each_layer(*part, [&](int32_t il, const ggml_tensor * k, const ggml_tensor * v) {
            f(il, k);
            f(il, v);
        });
    }
}
