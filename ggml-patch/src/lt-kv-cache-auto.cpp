// layers that are chosen for the first prompt of a conversation, see lt-kv-cache.h
//
// until then the full part has all layers, and few cells, more when there are more tokens. at the end of the first prompt that is longer than
// what a streaming layer holds, the laziest layers move to the streaming part, one after the other; while it is read, if it is read
// layer by layer, see lt-kv-cache-queue.cpp. when all tokens are removed, everything begins anew

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

// the n laziest layers, those with the highest ratio. of two with the same, the one with the lower number stays full
static std::vector<bool> lt_laziest(const std::vector<float> & ratios, size_t n) {
    std::vector<int32_t> order;
    for (size_t il = 0; il < ratios.size(); ++il) {
        if (!std::isnan(ratios[il])) {
            order.push_back(il);
        }
    }

    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return lt_is_lazier(ratios, a, b); });

    std::vector<bool> res(ratios.size(), false);
    for (size_t i = 0; i < std::min(n, order.size()); ++i) {
        res[order[i]] = true;
    }

    return res;
}

size_t lt_kv_cache::n_laziest() const {
    size_t n = 0;
    for (size_t il = 0; il < has_cache.size(); ++il) {
        n += lazy_ratio && lazy_ratio->is_measured(il);
    }

    // note: 0.7f*10 must be 7
    return std::min<size_t>(spec.auto_fraction*n + 1e-4, n);
}

bool lt_kv_cache::keeps_all() const {
    return all_kept;
}

lt_lazy_ratio * lt_kv_cache::get_lazy_ratio() const {
    return lazy_ratio.get();
}

const std::vector<float> & lt_kv_cache::get_lazy_ratios() const {
    return lazy_ratios;
}

uint64_t lt_kv_cache::n_tokens(llama_seq_id seq_id) const {
    return pos_full(seq_id).size();
}

void lt_kv_cache::make_parts(const llama_hparams & hparams, const std::vector<bool> & layers, bool all_kept) {
    spec.layers    = layers;
    this->all_kept = all_kept;

    kv_full      = create(hparams, all_kept ? size_kept : size_full, false, unified);
    kv_streaming = create(hparams, size_streaming, true,  unified);

    is_hollow = &hparams == &hparams_no_alloc;

    lazy_ratio.reset();

    if (is_hollow) {
        make_runs();
        return; // nothing will be computed
    }

    if (lctx) {
        lctx->lt_set_need_reserve();
    }

    if (spec.is_auto() && all_kept) {
        std::vector<bool> measured(layers.size());
        for (size_t il = 0; il < layers.size(); ++il) {
            measured[il] = has_cache[il] && il < model.hparams.n_layer() && model.hparams.has_kv(il);
        }

        lazy_ratio = std::make_unique<lt_lazy_ratio>(model, measured, spec.n_last, offload);
    }

    make_runs();
}

void lt_kv_cache::set_layers(const std::vector<bool> & layers, bool all_kept) {
    const auto layers_old   = spec.layers;
    const bool all_kept_old = this->all_kept;

    // the last batch may still be computing
    if (lctx) {
        lctx->synchronize();
    }

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        forget(s);
    }

    in_prompt_part.reset();

    chosen_end = 0;
    pending    = {};
    generation++;

    if (kv_swa) {
        kv_swa->clear(false);
    }

    // what was there goes first, both at once may be too much
    kv_full.reset();
    kv_streaming.reset();
    kv_prompt.reset();
    kv_reserve.reset();
    layered.reset();

    try {
        make_parts(model.hparams, layers, all_kept);
    } catch (...) {
        kv_full.reset();

        // what was there before has just been given back
        try {
            make_parts(model.hparams, layers_old, all_kept_old);
        } catch (...) {
            make_parts(hparams_no_alloc, layers_old, all_kept_old);
        }

        throw;
    }
}

bool lt_kv_cache::has_memory() {
    if (is_hollow) {
        try {
            set_layers(spec.layers, all_kept);
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: no memory for the KV cache, it was given back when the layers changed: %s\n", __func__, err.what());
        }
    }

    return !is_hollow;
}

lt_kv_ops::cell_pairs lt_kv_cache::pairs_kept() const {
    const auto & cells = kv_full->get_cells(0);

    lt_kv_ops::cell_pairs res;
    for (const auto & [p, i] : cells.seq_pos_get(0)) {
        if (p < (llama_pos) mask.n_sink || p >= cells.seq_pos_max(0) + 1 - (llama_pos) mask.n_back) {
            res.push_back({ i, (uint32_t) res.size() });
        }
    }

    return res;
}

std::unique_ptr<llama_kv_cache> lt_kv_cache::create_kept(const llama_hparams & hparams, const lt_kv_ops::cell_pairs & pairs, const layer_filter_cb & filter) const {
    // note: the tokens of an image can all have the same position
    const uint32_t n_cells = std::max<uint32_t>(size_streaming, GGML_PAD(pairs.size() + n_ubatch, LT_PART_PAD));

    auto res = create(hparams, n_cells, true, unified, filter, true);

    lt_kv_ops::use_rotation_of(*kv_full, *res);

    auto & dst = lt_kv_ops::cells(*res, 0);

    for (const auto & [i, i_dst] : pairs) {
        lt_kv_ops::copy_cell(kv_full->get_cells(0), i, dst, i_dst);
        dst.seq_add(i_dst, 0);
    }

    lt_kv_ops::set_head(*res, 0, pairs.size());

    return res;
}

void lt_kv_cache::choose_layers() {
    lazy_ratios = lazy_ratio->compute(lctx, *kv_full, n_tokens(0), spec);

    const auto layers = lt_laziest(lazy_ratios, n_laziest());
    if (std::find(layers.begin(), layers.end(), true) == layers.end()) {
        return;
    }

    const auto pairs = pairs_kept();

    auto kv_new = create_kept(model.hparams, pairs, [&](int32_t il) { return layers[il]; });

    lt_kv_ops::copy_data(*kv_full, 0, *kv_new, 0, pairs);

    if (kv_full->get_size() < size_full) {
        auto kv_rest = create(model.hparams, size_full, false, unified, [&](int32_t il) { return has_cache[il] && !layers[il]; }, true);

        lt_kv_ops::use_rotation_of(*kv_full, *kv_rest);
        lt_kv_ops::copy_all       (*kv_full, *kv_rest);

        kv_full = std::move(kv_rest);
    } else {
        for (size_t il = 0; il < layers.size(); ++il) {
            if (layers[il]) {
                lt_kv_ops::drop_layer(*kv_full, il);
            }
        }
    }

    spec.layers = layers;

    take_choice(std::move(kv_new));
}

void lt_kv_cache::take_choice(std::unique_ptr<llama_kv_cache> kv_new) {
    kv_streaming = std::move(kv_new);

    lazy_ratio.reset();
    kv_reserve.reset();

    all_kept   = false;
    chosen_end = seq_pos_max(0) + 1;
    generation++;

    make_runs();

    lctx->lt_set_need_reserve();

    LLAMA_LOG_INFO("%s: streaming layers for this prompt: %s\n", __func__, spec.str().c_str());
}

void lt_kv_cache::choose_anew() {
    // note: before they are chosen, what a long conversation took
    const bool is_new = all_kept && kv_full->get_size() == size_kept;

    if (!spec.is_auto() || is_new || get_layers() || !pos_full(0).empty()) {
        return;
    }

    try {
        set_layers(std::vector<bool>(spec.layers.size(), false), true);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: no memory for all layers with full attention, these go on streaming: %s (%s)\n", __func__, spec.str().c_str(), err.what());
    }
}
