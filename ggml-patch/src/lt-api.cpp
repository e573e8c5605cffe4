#include "lt.h"

#include "lt-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

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
        return part == LT_KV_STREAMING ? kv->get_streaming() : kv->get_full();
    }

    return part == LT_KV_STREAMING ? nullptr : dynamic_cast<const llama_kv_cache *>(lt_get_memory(ctx));
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

int32_t lt_context_spec(const llama_context * ctx, char * buf, size_t buf_size) {
    const auto * kv = lt_get_cache(ctx);

    return lt_copy(kv ? kv->get_spec().str() : lt_spec().str(), buf, buf_size);
}

size_t lt_kv_bytes(const llama_context * ctx, lt_kv_part part) {
    const llama_memory_i * mem = lt_get_part(ctx, part);
    if (!mem && part == LT_KV_FULL) {
        mem = lt_get_memory(ctx);
    }

    size_t res = 0;
    if (mem) {
        for (const auto & buft_size : mem->memory_breakdown()) {
            res += buft_size.second;
        }
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
    const auto * kv = lt_get_part(ctx, part);
    if (!kv) {
        return -1;
    }

    const llama_seq_id n_seq_ids = kv->get_n_stream() == 1 ? LLAMA_MAX_SEQ : kv->get_n_stream();
    if (seq_id < 0 || seq_id >= n_seq_ids) {
        return -1;
    }

    int32_t n = 0;
    for (const auto & pos_cell : kv->get_cells(seq_id).seq_pos_get(seq_id)) {
        if (n < n_max) {
            pos[n] = pos_cell.first;
        }
        n++;
    }

    return n;
}
