#include "lt.h"

#include "lt-graph.h"
#include "lt-kv-cache.h"
#include "lt-kv-ops.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

static int32_t lt_copy(const std::string & s, char * buf, size_t buf_size) {
    return snprintf(buf, buf_size, "%s", s.c_str());
}

static const llama_memory_i * lt_get_memory(const llama_context * ctx) {
    return ctx->get_memory();
}

static const lt_kv_cache * lt_get_cache(const llama_context * ctx) {
    return dynamic_cast<const lt_kv_cache *>(lt_get_memory(ctx));
}

// nullptr if the part isn't a plain KV cache
static const llama_kv_cache * lt_get_part(const llama_context * ctx, lt_kv_part part) {
    if (const auto * kv = lt_get_cache(ctx)) {
        switch (part) {
            case LT_KV_PROMPT:    return kv->get_prompt();
            case LT_KV_STREAMING: return kv->get_streaming();
            case LT_KV_SWA:       return kv->get_swa();
            default:              return kv->get_full();
        }
    }

    return part != LT_KV_FULL ? nullptr : dynamic_cast<const llama_kv_cache *>(lt_get_memory(ctx));
}

static bool lt_has_seq(const llama_kv_cache & kv, llama_seq_id seq_id) {
    const llama_seq_id n_seq_ids = kv.get_n_stream() == 1 ? LLAMA_MAX_SEQ : kv.get_n_stream();

    return seq_id >= 0 && seq_id < n_seq_ids;
}

int32_t lt_model_spec(const llama_model * model, char * buf, size_t buf_size) {
    return lt_copy(model->lt.get().str(), buf, buf_size);
}

bool lt_model_set_spec(llama_model * model, const char * spec, char * err, size_t err_size) {
    try {
        model->lt.set(spec, *model);
    } catch (const std::exception & e) {
        if (err && err_size > 0) {
            lt_copy(e.what(), err, err_size);
        }
        return false;
    }

    return true;
}

int32_t lt_model_may_stream(const llama_model * model, bool * layers, int32_t n) {
    const auto may = lt_model_specs::may_stream(*model);

    std::copy_n(may.begin(), std::min<size_t>(may.size(), std::max(n, 0)), layers);

    return may.size();
}

int32_t lt_context_spec(const llama_context * ctx, char * buf, size_t buf_size) {
    lt_spec spec;

    if (const auto * kv = lt_get_cache(ctx)) {
        spec = kv->get_spec();
    } else if (const auto * kv_full = lt_get_part(ctx, LT_KV_FULL)) {
        spec.kept = lt_kv_ops::kept(*kv_full);
    }

    return lt_copy(spec.str(), buf, buf_size);
}

bool lt_context_hide(llama_context * ctx, const char * text, char * err, size_t err_size) {
    try {
        auto * kv = dynamic_cast<lt_kv_cache *>(ctx->get_memory());
        if (!kv || !kv->get_spec().hides) {
            throw std::invalid_argument(format("this context can't hide, it must be made with a spec as %s=none", LT_KEY_HIDE));
        }

        const auto & model = ctx->get_model();

        const lt_spec spec = lt_spec::parse(text, lt_model_specs::may_stream(model), &kv->get_spec());
        if (!spec.hides) {
            lt_bad_value(LT_KEY_HIDE, format("\"%s\"", text), format("a spec of the form %s=1,3,5-9", LT_KEY_HIDE));
        }

        if (spec.kept.layers != kv->get_spec().kept.layers) {
            throw std::invalid_argument(format("%s: must be given where the context is made", LT_KEY_CACHE_KEEP));
        }

        model.lt.check(spec, model);

        // the last batch may still be computing
        ctx->synchronize();

        kv->hide(spec);
    } catch (const std::exception & e) {
        if (err && err_size > 0) {
            lt_copy(e.what(), err, err_size);
        }
        return false;
    }

    return true;
}

static void lt_fill_batch(llama_context & ctx, llama_seq_id seq_id, llama_pos begin, uint32_t n_tokens) {
    llama_batch_ext batch(&ctx);
    for (llama_pos pos = begin; pos < begin + (llama_pos) n_tokens; ++pos) {
        const int32_t i = batch.add_token(seq_id);

        batch.set_token_id (i, 0);
        batch.set_token_pos(i, &pos);
        batch.set_output   (i, true); // no prompt: a streaming layer drops what is behind it at once
    }

    const auto & model = ctx.get_model();

    llama_batch_allocr balloc(model.hparams.n_pos_per_embd());
    if (!balloc.init(batch, model.vocab, false)) {
        throw std::runtime_error(format("sequence %d can't be filled", seq_id));
    }

    auto mctx = ctx.get_memory()->init_batch(balloc, ctx.get_cparams().n_ubatch, false);
    if (!mctx || mctx->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        throw std::runtime_error(format("%u more tokens don't fit the KV cache after %d of sequence %d", n_tokens, begin, seq_id));
    }

    do {
        if (!mctx->apply()) {
            throw std::runtime_error(format("sequence %d can't be filled", seq_id));
        }
    } while (mctx->next());
}

bool lt_fill(llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens, char * err, size_t err_size) {
    try {
        auto * mem = ctx->get_memory();
        if (!mem) {
            throw std::runtime_error("this context has no KV cache");
        }

        if (seq_id < 0 || (uint32_t) seq_id >= ctx->get_cparams().n_seq_max) {
            throw std::runtime_error(format("there is no sequence %d in this context", seq_id));
        }

        const auto * kv = lt_get_cache(ctx);
        if (kv && kv->get_spec().is_auto()) {
            throw std::runtime_error("the layers of this context are chosen for a prompt, so there must be one: name layers that stream");
        }

        // the last batch may still be computing
        ctx->synchronize();
        ctx->memory_update(false);

        // note: after full batches come single tokens, as when decoding
        const uint32_t n_full = std::min(ctx->get_cparams().n_ubatch, ctx->get_cparams().n_batch);

        for (uint32_t i = 0; i < n_tokens; ) {
            const uint32_t n = n_tokens - i > n_full ? n_full : 1;

            lt_fill_batch(*ctx, seq_id, mem->seq_pos_max(seq_id) + 1, n);
            i += n;
        }
    } catch (const std::exception & e) {
        if (err && err_size > 0) {
            lt_copy(e.what(), err, err_size);
        }
        return false;
    }

    return true;
}

size_t lt_kv_bytes(const llama_context * ctx, lt_kv_part part) {
    const auto * kv = lt_get_cache(ctx);

    std::map<ggml_backend_buffer_type_t, size_t> mb;
    if (kv) {
        const auto * kv_part = lt_get_part(ctx, part);

        mb = part == LT_KV_PROMPT ? kv->prompt_breakdown() : kv_part ? kv->breakdown(*kv_part) : mb;
    } else if (const auto * mem = lt_get_memory(ctx); mem && part == LT_KV_FULL) {
        mb = mem->memory_breakdown();
    }

    size_t res = 0;
    for (const auto & buft_size : mb) {
        res += buft_size.second;
    }

    return res;
}

uint32_t lt_kv_cells(const llama_context * ctx, lt_kv_part part) {
    const auto * kv = lt_get_part(ctx, part);

    return kv ? kv->get_size() : 0;
}

int32_t lt_seq_positions(
        const llama_context * ctx,
                 lt_kv_part   part,
               llama_seq_id   seq_id,
                  llama_pos * pos,
                    int32_t   n_max) {
    const auto * kv = lt_get_part(ctx, LT_KV_FULL);
    if (!kv || !lt_has_seq(*kv, seq_id)) {
        return -1;
    }

    const auto * kv_lt = lt_get_cache(ctx);
    const auto * kv_part = lt_get_part(ctx, part);

    if (!kv_part) {
        return part == LT_KV_PROMPT || part == LT_KV_SWA ? 0 : -1;
    }

    std::vector<llama_pos> held;
    if (kv_lt && part == LT_KV_STREAMING) {
        held = kv_lt->get_held(seq_id);
    } else {
        for (const auto & pos_cell : kv_part->get_cells(seq_id).seq_pos_get(seq_id)) {
            held.push_back(pos_cell.first);
        }
    }

    std::copy_n(held.begin(), std::min<size_t>(held.size(), std::max(n_max, 0)), pos);

    return held.size();
}

bool lt_seq_can_rm(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * kv = lt_get_cache(ctx);

    return kv && lt_has_seq(*kv->get_full(), seq_id) && kv->can_rm(seq_id, std::max(p0, 0), LT_POS_END);
}

bool lt_seq_can_checkpoint(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * kv = lt_get_cache(ctx);

    return !kv || (lt_has_seq(*kv->get_full(), seq_id) && kv->can_checkpoint(seq_id));
}

bool lt_seq_in_prompt(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * kv = lt_get_cache(ctx);

    return kv && lt_has_seq(*kv->get_full(), seq_id) && kv->is_in_prompt(seq_id);
}

bool lt_fits_by_layer(const llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens) {
    const auto * kv = lt_get_cache(ctx);

    return kv && lt_has_seq(*kv->get_full(), seq_id) && kv->fits_by_layer(seq_id, n_tokens);
}

bool lt_seq_by_layer(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * kv = lt_get_cache(ctx);

    return kv && lt_has_seq(*kv->get_full(), seq_id) && kv->is_by_layer(seq_id);
}

bool lt_prompt_begin(llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens, char * err, size_t err_size) {
    auto * kv = dynamic_cast<lt_kv_cache *>(ctx->get_memory());
    if (!kv) {
        return true;
    }

    try {
        if (!lt_has_seq(*kv->get_full(), seq_id)) {
            throw std::runtime_error(format("there is no sequence %d in this context", seq_id));
        }

        kv->begin_prompt(seq_id, n_tokens);
    } catch (const std::exception & e) {
        if (err && err_size > 0) {
            lt_copy(e.what(), err, err_size);
        }
        return false;
    }

    return true;
}

void lt_set_prompt_limit(llama_context * ctx, size_t n_bytes) {
    if (auto * kv = dynamic_cast<lt_kv_cache *>(ctx->get_memory())) {
        kv->set_prompt_limit(n_bytes);
    }
}

void lt_set_n_batch(llama_context * ctx, uint32_t n_batch) {
    ctx->lt_set_n_batch(n_batch);
}

void lt_set_progress(llama_context * ctx, lt_progress_callback callback, void * user_data) {
    if (auto * kv = dynamic_cast<lt_kv_cache *>(ctx->get_memory())) {
        kv->on_progress = nullptr;
        if (callback) {
            kv->on_progress = [=](float progress) { return callback(progress, user_data); };
        }
    }
}

int32_t lt_lazy_ratios(const llama_context * ctx, float * ratios, int32_t n) {
    const auto * kv = lt_get_cache(ctx);
    if (!kv || kv->get_lazy_ratios().empty()) {
        return 0;
    }

    const int32_t n_layer = ctx->get_model().hparams.n_layer();

    std::copy_n(kv->get_lazy_ratios().begin(), std::min(std::max(n, 0), n_layer), ratios);

    return n_layer;
}

void lt_load_drafts(bool is_draft) {
    lt_model_specs::load_drafts(is_draft);
}

void lt_set_attention(bool for_all) {
    lt_attention_for_all = for_all;
}

void lt_clamp_shift(const llama_context * ctx, int32_t n_past, int32_t * n_keep, int32_t * n_discard) {
    if (const auto * kv = lt_get_cache(ctx)) {
        kv->clamp_shift(n_past, *n_keep, *n_discard);
    }
}
