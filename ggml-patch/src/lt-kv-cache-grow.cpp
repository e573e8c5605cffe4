// parts that grow: what they hold is copied to the same cells of larger ones, see lt-kv-cache.h
//
// note: the full part is as large as the context, but where the layers are still to be chosen

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

void lt_kv_cache::request_streaming(const lt_batch & batch) {
    std::vector<uint32_t> n_cells(kv_streaming->get_n_stream(), 0);

    for (uint32_t strm = 0; strm < n_cells.size(); ++strm) {
        const auto & cells = lt_kv_ops::cells(*kv_streaming, strm);

        for (uint32_t i = 0; i < cells.size(); ++i) {
            n_cells[strm] += !cells.is_empty(i) && !mask.is_dead(cells, i);
        }
    }

    for (const auto & cur : batch) {
        n_cells[kv_streaming->get_stream(cur.id)] += cur.n_tokens;
    }

    const uint32_t n_needed = *std::max_element(n_cells.begin(), n_cells.end());

    if (n_needed > kv_streaming->get_size()) {
        pending.n_streaming = n_needed;
    }
}

std::unique_ptr<llama_kv_cache> lt_kv_cache::grown(const llama_kv_cache * kv, uint32_t n_cells, bool unified) const {
    std::unique_ptr<llama_kv_cache> res;

    try {
        res = create(model.hparams, n_cells, true, unified);
    } catch (const std::exception & err) {
        throw std::runtime_error(format("no memory for %u cells of the streaming layers, %.1f MiB (%s). A KV cache of a smaller type or prefill=stream needs less",
                    n_cells, prompt_bytes(n_cells)/1024.0/1024.0, err.what()));
    }

    if (kv) {
        lt_kv_ops::use_rotation_of(*kv, *res);
        lt_kv_ops::copy_all       (*kv, *res);
    }

    return res;
}

void lt_kv_cache::grow_prompt_part(uint32_t n_cells, uint32_t n_needed) {
    n_cells  = GGML_PAD(n_cells,  LT_PART_PAD);
    n_needed = GGML_PAD(n_needed, LT_PART_PAD);

    if (kv_prompt && kv_prompt->get_size() >= n_needed) {
        return;
    }

    std::unique_ptr<llama_kv_cache> kv_new;

    try {
        kv_new = grown(kv_prompt.get(), n_cells, true);
    } catch (const std::exception &) {
        if (n_cells == n_needed) {
            throw;
        }

        kv_new = grown(kv_prompt.get(), n_needed, true);
    }

    kv_prompt = std::move(kv_new);
    generation++;
}

void lt_kv_cache::grow_streaming_part(uint32_t n_cells) {
    // besides what is held there are always cells for an ubatch
    n_cells = GGML_PAD(n_cells + n_ubatch, LT_PART_PAD);

    LLAMA_LOG_WARN("%s: from %u to %u cells, because so many tokens have to be held at once\n", __func__, kv_streaming->get_size(), n_cells);

    kv_streaming = grown(kv_streaming.get(), n_cells, unified);
    generation++;

    if (lctx) {
        lctx->lt_set_need_reserve();
    }
}

void lt_kv_cache::request_full(const lt_batch & batch) {
    if (kv_full->get_size() >= size_full) {
        return;
    }

    const uint32_t n_used = kv_full->get_cells(0).get_used();

    uint32_t n_tokens = 0;
    uint32_t n_prompt = 0;
    for (const auto & cur : batch) {
        n_tokens += std::max(cur.n_tokens, n_declared[cur.id]);
        n_prompt += cur.is_prompt ? cur.n_tokens : 0;
    }

    try {
        if (n_prompt > 0) {
            check_limit(choice_bytes(n_used + n_tokens), n_tokens, [&](uint32_t n) { return choice_bytes(n_used + n); });
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return;
    }

    pending.n_full = n_used + n_tokens;
}

void lt_kv_cache::grow_full_part(uint32_t n_cells) {
    const uint32_t n_cur = kv_full->get_size();

    if (n_cells <= n_cur || n_cur == size_full) {
        return;
    }

    // note: by half, so that an answer whose length is not known is not copied over and over
    n_cells = std::min(size_full, GGML_PAD(std::max(n_cells, n_cur + n_cur/2), LT_PART_PAD));

    std::unique_ptr<llama_kv_cache> kv_new;

    try {
        kv_new = create(model.hparams, n_cells, false, unified);
    } catch (const std::exception & err) {
        throw std::runtime_error(format("no memory for %u tokens in all layers (%s). A KV cache of a smaller type needs less", n_cells, err.what()));
    }

    lt_kv_ops::copy_all(*kv_full, *kv_new);

    kv_full = std::move(kv_new);
    generation++;
}
