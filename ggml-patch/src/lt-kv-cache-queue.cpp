// layers that are chosen while the prompt that chooses them is read layer by layer (LightTransfer, arXiv 2410.13846, algorithm 1)
//
// policy: as soon as the prompt has passed a layer its lazy ratio is known. of the layers that it has passed no more stay full than are
//   to be in the end: of one more, the laziest is cut, and its memory is that of the next layer. what is chosen is what choose_layers()
//   would choose at the prompt's end. the full part of before is not touched until then: a failure or an abort leaves the sequence as it was

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

// of the n largest ones
static size_t lt_sum(const std::vector<size_t> & bytes, size_t n = SIZE_MAX) {
    return std::accumulate(bytes.begin(), bytes.begin() + std::min(n, bytes.size()), (size_t) 0);
}

bool lt_kv_cache::is_for_queue(llama_seq_id seq_id, uint32_t n_tokens) const {
    const uint64_t n_all = pos_full(seq_id).size() + (uint64_t) n_tokens;

    const bool has_no_room = n_all > kv_full->get_size() && n_all <= size_full;

    if (seq_id != 0 || !lazy_ratio || n_laziest() < 2 || !has_no_room) {
        return false;
    }

    // note: what is there before stays until the end
    return queue_bytes(n_tokens) + lt_sum(full_bytes(kv_full->get_size())) < choice_bytes(n_all);
}

std::vector<size_t> lt_kv_cache::full_bytes(uint32_t n_cells) const {
    std::vector<size_t> res;

    for (uint32_t il = 0; il < has_cache.size(); ++il) {
        if (lazy_ratio && lazy_ratio->is_measured(il)) {
            const uint32_t n_embd_v = v_trans ? model.hparams.n_embd_v_gqa_max() : model.hparams.n_embd_v_gqa(il);

            res.push_back(n_cells*(ggml_row_size(spec.kept.type(il, type_k), model.hparams.n_embd_k_gqa(il)) + ggml_row_size(spec.kept.type(il, type_v), n_embd_v)));
        }
    }

    std::sort(res.rbegin(), res.rend());

    return res;
}

size_t lt_kv_cache::queue_bytes(uint32_t n_tokens) const {
    return full_bytes(size_full).front() + (size_t) n_tokens*model.hparams.n_embd*sizeof(float);
}

size_t lt_kv_cache::choice_bytes(uint32_t n_cells) const {
    n_cells = GGML_PAD(n_cells, LT_PART_PAD);

    // note: a smaller full part is there beside the one that follows it, see choose_layers()
    return n_cells < size_full ? lt_sum(full_bytes(n_cells)) : lt_sum(full_bytes(size_full), n_laziest());
}

void lt_kv_cache::make_queue(lt_layers & layers) const {
    auto queue = std::make_unique<lt_queue>();

    queue->ratios.resize(has_cache.size(), std::numeric_limits<float>::quiet_NaN());
    queue->kv_full = create(hparams_no_alloc, size_full, false, unified);

    size_t n_measured = 0;
    lt_kv_ops::for_each_layer(*queue->kv_full, [&](int32_t il, const ggml_tensor *, const ggml_tensor *) { n_measured += lazy_ratio->is_measured(il); });

    queue->n_full = n_measured - n_laziest();

    // what is surely needed is taken now, because a batch that finds no memory looks as if the context were full
    size_t n_taken = 0;
    lt_kv_ops::for_each_layer(*queue->kv_full, [&](int32_t il, const ggml_tensor *, const ggml_tensor *) {
        if (!lazy_ratio->is_measured(il) || n_taken++ <= queue->n_full) {
            lt_kv_ops::take_memory(*queue->kv_full, il, queue->spare);
        }
    });

    layers.queue = std::move(queue);
}

void lt_kv_cache::start_queue() {
    auto & queue = *layered->queue;

    std::swap(kv_full, queue.kv_full);

    const auto & src = queue.kv_full->get_cells(0);
          auto & dst = lt_kv_ops::cells(*kv_full, 0);

    for (const auto & [_, i] : src.seq_pos_get(0)) {
        const uint32_t i_dst = layered->pairs_in.size();

        lt_kv_ops::copy_cell(src, i, dst, i_dst);
        dst.seq_add(i_dst, 0);

        layered->pairs_in.push_back({ i, i_dst });
    }

    lt_kv_ops::set_head(*kv_full, 0, layered->pairs_in.size());

    // the others are copied when it is their turn
    lt_kv_ops::for_each_layer(*kv_full, [&](int32_t il, const ggml_tensor *, const ggml_tensor *) {
        if (!lazy_ratio->is_measured(il)) {
            lt_kv_ops::copy_data(*queue.kv_full, 0, *kv_full, 0, layered->pairs_in, il);
        }
    });
}

void lt_kv_cache::begin_queue_run() {
    const int32_t il = layered->run().il_streaming;
    if (il < 0) {
        return;
    }

    auto & queue = *layered->queue;

    if (!lt_kv_ops::has_memory(*kv_full, il)) {
        // note: layers can have keys and values of other sizes, and what is in no cell must still be numbers
        for (const auto & buf : queue.spare) {
            if (!has_equal_layers) {
                ggml_backend_buffer_clear(buf.get(), 0);
            }
        }

        lt_kv_ops::take_memory(*kv_full, il, queue.spare);
    }

    lt_kv_ops::copy_data(*queue.kv_full, 0, *kv_full, 0, layered->pairs_in, il);
}

void lt_kv_cache::end_queue_run() {
    const int32_t il = layered->run().il_streaming;
    if (il < 0) {
        return;
    }

    auto & queue = *layered->queue;

    queue.ratios[il] = lazy_ratio->compute(lctx, *kv_full, n_tokens(0), spec, il);

    if (!std::isnan(queue.ratios[il])) {
        queue.full.push_back(il);
    }

    if (queue.full.size() > queue.n_full) {
        const auto it = std::min_element(queue.full.begin(), queue.full.end(), [&](int32_t a, int32_t b) { return lt_is_lazier(queue.ratios, a, b); });

        cut_queue(*it);
        queue.full.erase(it);
    }
}

void lt_kv_cache::cut_queue(int32_t il) {
    auto & queue = *layered->queue;

    if (!queue.kv_streaming) {
        queue.kv_streaming = create_kept(hparams_no_alloc, layered->pairs_out, [&](int32_t il) { return has_cache[il] && lazy_ratio->is_measured(il); });

        queue.is_lent = layered->pairs_in.empty() && queue.kv_streaming->get_size() == queue.kv_full->get_size();
    }

    std::vector<ggml_backend_buffer_ptr> spare;
    if (queue.is_lent) {
        spare.push_back(lt_kv_ops::give_memory(*queue.kv_full, il));
    }

    lt_kv_ops::take_memory(*queue.kv_streaming, il, spare);
    lt_kv_ops::copy_data  (*kv_full, 0, *queue.kv_streaming, 0, layered->pairs_out, il);

    queue.spare.push_back(lt_kv_ops::give_memory(*kv_full, il));
}

void lt_kv_cache::stop_queue() {
    auto & queue = *layered->queue;

    for (uint32_t il = 0; il < has_cache.size() && queue.is_lent; ++il) {
        if (has_cache[il] && lazy_ratio->is_measured(il) && !lt_kv_ops::has_memory(*queue.kv_full, il)) {
            std::vector<ggml_backend_buffer_ptr> spare;
            spare.push_back(lt_kv_ops::give_memory(*queue.kv_streaming, il));

            lt_kv_ops::take_memory(*queue.kv_full, il, spare);
        }
    }

    kv_full = std::move(queue.kv_full);
    generation++;
}

void lt_kv_cache::finish_queue() {
    auto queue = std::move(layered->queue);

    layered.reset();

    for (size_t il = 0; il < has_cache.size(); ++il) {
        if (!has_cache[il] || !lazy_ratio->is_measured(il)) {
            continue;
        }

        spec.layers[il] = lt_kv_ops::has_memory(*queue->kv_streaming, il);

        lt_kv_ops::drop_layer(spec.layers[il] ? *kv_full : *queue->kv_streaming, il);
    }

    lazy_ratios = std::move(queue->ratios);

    take_choice(std::move(queue->kv_streaming));
}
