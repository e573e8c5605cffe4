// layers with a sliding window of their own, beside layers with full attention that may stream, see lt-kv-cache.h
//
// policy: they see what upstream lets them see, and their part has the size that upstream gives it. but its cells are found as those of the
//   streaming part are: what is hidden from all tokens to come is used again, whichever sequences share it, and nothing else is removed,
//   so that a rejected draft can be taken back. what it has dropped counts for a rollback as what the streaming part has

#include "lt-kv-cache.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// size: the cells of the part, size_full: those of the context
static lt_mask lt_make_mask_swa(const llama_hparams & hparams, uint32_t n_seq, uint32_t size, uint32_t size_full, const lt_phases * phases) {
    lt_mask res;

    // note: where there is room for all tokens, all are kept
    res.n_window   = hparams.n_swa;
    res.n_back     = size < size_full ? hparams.n_swa - 1 + (hparams.n_pos_per_embd() > 1) : size_full;
    res.is_own     = true;
    res.is_chunked = hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED;
    res.phases     = phases;

    res.n_cells_decode = GGML_PAD((hparams.n_swa + LT_N_SPARE)*n_seq, 256);

    return res;
}

void lt_kv_cache::make_swa_part(const llama_cparams & cparams, const layer_filter_cb & filter) {
    const auto & hparams = model.hparams;

    if (hparams.swa_type == LLAMA_SWA_TYPE_NONE) {
        return;
    }

    GGML_ASSERT(hparams.swa_type == LLAMA_SWA_TYPE_STANDARD || hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED);

    const uint32_t n_seq = unified ? n_seq_max : 1;

    // note: swa_full does not apply here either. it would keep for a rollback what the streaming layers drop anyway. where nothing is
    //       dropped, because it is only measured, this part keeps everything, too
    const uint32_t size = GGML_PAD(spec.hides ? size_full : std::min(size_full, hparams.n_swa*n_seq + cparams.n_ubatch), 256);

    mask_swa = lt_make_mask_swa(hparams, n_seq, size, size_full, &phases);

    LLAMA_LOG_INFO("%s: creating SWA KV cache, size = %u cells\n", __func__, size);

    const layer_filter_cb filter_swa = [&](int32_t il) {
        return (!filter || filter(il)) && hparams.is_swa(il);
    };

    lt_kv_params params;
    params.mask = mask_swa;
    params.kept = spec.kept;

    kv_swa = std::make_unique<llama_kv_cache>(
            model, hparams, type_k, type_v, v_trans, offload, unified, size, n_seq_max, 1,
            hparams.n_swa, hparams.swa_type, nullptr, filter_swa, nullptr, nullptr, "",
            params);
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_swa(llama_seq_id seq_id) const {
    static const pos_set none;

    return kv_swa ? kv_swa->get_cells(seq_id).seq_pos_get(seq_id) : none;
}

bool lt_kv_cache::holds_swa(llama_seq_id seq_id, llama_pos q, llama_pos p0, llama_pos p1) const {
    return !kv_swa || holds_all(seq_id, pos_swa(seq_id), 0, std::max(0, mask_swa.first_visible(q)), q, p0, p1);
}

bool lt_kv_cache::hides_dropped_swa(llama_seq_id seq_id, llama_pos q, llama_pos p0, llama_pos p1, const pos_map_cell & map) const {
    if (!kv_swa) {
        return true;
    }

    bool res = true;
    for_each_dropped(seq_id, pos_swa(seq_id), [&](llama_pos p, uint32_t i) {
        const llama_pos p_new = map(p, i);

        res = res && (p < p0 || p >= p1 || p_new < 0 || p_new < mask_swa.first_visible(q));
    });

    return res;
}

void lt_kv_cache::clamp_shift_swa(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const {
    const int32_t n_sink = mask.n_sink;
    const int32_t n_back = mask_swa.n_back;

    if (!kv_swa || n_keep == 0 || n_past <= n_back) {
        return; // nothing has been dropped, or nothing stays of it
    }

    // the last one that is kept at the beginning must not come so near to the end that it would be visible again
    int32_t n_max = n_past - n_keep - n_back;

    // note: where next to nothing could be discarded, the context would shift again at once
    if (n_max < n_discard/4 && n_keep > n_sink) {
        n_keep = n_sink;
        n_max  = n_past - n_keep - (n_keep > 0 ? n_back : 1);
    }

    n_discard = std::max(0, std::min(n_discard, n_max));
}
