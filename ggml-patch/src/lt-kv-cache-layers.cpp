// prompts that are read layer by layer, see lt-layers.h
//
// policy: a prompt that comes as one batch, and for which the streaming part has no room, is read so if the model's graph can be
//   cut between its streaming layers. what the streaming part holds is not touched before the whole prompt has been read: a failure
//   or an abort leaves the sequence as it was before the prompt
//
// the batch: lt_kv_cache_context goes through all ubatches once for each run of layers. only in the last run they have outputs

#include "lt-kv-cache.h"

#include "lt-graph-cut.h"
#include "lt-kv-cache-context.h"
#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

std::map<ggml_backend_buffer_type_t, size_t> lt_layers::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & buf : bufs) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }

    if (buf_act) {
        res[ggml_backend_buffer_get_type(buf_act.get())] += ggml_backend_buffer_get_size(buf_act.get());
    }

    std::vector<const llama_kv_cache *> parts = { kv_kept.get() };

    if (queue) {
        parts.insert(parts.end(), { queue->kv_full.get(), queue->kv_streaming.get() });

        for (const auto & buf : queue->spare) {
            res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
        }
    }

    for (const auto * kv : parts) {
        if (kv) {
            for (const auto & [buft, size] : lt_kv_ops::breakdown(*kv)) {
                res[buft] += size;
            }
        }
    }

    return res;
}

//
// where the layers are cut
//

// a run for each streaming layer, and where the graph can be cut there, one for the full layers between two of them: a graph that
// has layers of both kinds has a mask for each. none if the graph can't be cut between two streaming layers
static std::vector<lt_run> lt_make_runs(const std::vector<bool> & can_cut, const std::vector<bool> & is_streaming) {
    const int32_t n_layer = can_cut.size();

    std::vector<lt_run> res = { { 0, n_layer, -1 } };

    const auto cut = [&](int32_t il) {
        res.back().il_end = il;
        res.push_back({ il, n_layer, -1 });
    };

    int32_t il_cut = -1; // the last cut behind the streaming layer of the run

    for (int32_t il = 0; il < n_layer; ++il) {
        il_cut = can_cut[il] ? il : il_cut;

        if (can_cut[il] && is_streaming[il] != is_streaming[il - 1]) {
            cut(il);
        } else if (is_streaming[il] && res.back().il_streaming >= 0) {
            if (il_cut < 0) {
                return {};
            }

            cut(il_cut);
        }

        if (is_streaming[il]) {
            res.back().il_streaming = il;
            il_cut = -1;
        }
    }

    return res;
}

void lt_kv_cache::note_cuts(const llm_graph_params & params, const lt_kv_cache_context & mctx) {
    // note: with a single token, what has a row for each token looks like what has one for all
    //       layers with a window of their own would need the cells that they had at each ubatch once for every run
    if (kv_swa || !can_cut.empty() || spec.prefill != LT_PREFILL_FULL || spec.hides || params.ubatch.n_tokens < 2) {
        return;
    }

    for (const auto & cut : lt_find_cuts(params, mctx)) {
        can_cut.push_back(cut.t);
    }

    make_runs();
}

void lt_kv_cache::make_runs() {
    runs.clear();

    if (can_cut.empty() || is_hollow) {
        return;
    }

    // or may come to be
    const auto & kv = all_kept ? *kv_full : *kv_streaming;

    std::vector<bool> is_streaming(has_cache.size(), false);
    lt_kv_ops::for_each_layer(kv, [&](int32_t il, const ggml_tensor *, const ggml_tensor *) {
        is_streaming[il] = !all_kept || (lazy_ratio && lazy_ratio->is_measured(il));
    });

    has_equal_layers = lt_kv_ops::has_equal_layers(kv);

    runs = lt_make_runs(can_cut, is_streaming);

    const bool is_one = std::count(is_streaming.begin(), is_streaming.end(), true) < 2;

    if (is_one) {
        runs.clear(); // it would be held at once anyway
    } else if (runs.empty()) {
        LLAMA_LOG_INFO("%s: the layers of this model pass on more than the hidden states: all streaming layers hold a prompt at once while it is read\n", __func__);
    } else {
        LLAMA_LOG_INFO("%s: a prompt that comes in one batch is read in %zu runs of layers, of which one at a time holds it in a streaming layer\n", __func__, runs.size());
    }
}

//
// memory
//

bool lt_kv_cache::is_for_layers(llama_seq_id seq_id, uint32_t n_tokens) const {
    if (runs.empty() || !lctx) {
        return false;
    }

    const auto & cparams = lctx->get_cparams();

    if (n_tokens <= n_ubatch) {
        return false;
    }

    const bool keeps_hidden = cparams.embeddings || cparams.embeddings_nextn ||
        std::find(cparams.embeddings_layer_inp.begin(), cparams.embeddings_layer_inp.end(), true) != cparams.embeddings_layer_inp.end();

    if (keeps_hidden) {
        return false;
    }

    if (all_kept) {
        return is_for_queue(seq_id, n_tokens);
    }

    // note: the hidden states of a token can take more than what a few layers hold of it
    const bool is_less = layers_bytes(seq_id, n_tokens) < prompt_bytes(n_layer_cells(seq_id, n_tokens));

    return is_less && (uint64_t) n_tokens > (uint64_t) mask.n_sink + mask.n_back;
}

bool lt_kv_cache::can_read_by_layer(llama_seq_id seq_id, uint32_t n_tokens) const {
    return is_for_layers(seq_id, n_tokens) && n_tokens <= lctx->n_batch() && !prompts[seq_id].current() && !in_prompt_part.any();
}

bool lt_kv_cache::fits_by_layer(llama_seq_id seq_id, uint32_t n_tokens) const {
    return is_for_layers(seq_id, n_tokens) && (prompt_limit == 0 || layers_bytes(seq_id, n_tokens) <= prompt_limit);
}

bool lt_kv_cache::is_by_layer(llama_seq_id seq_id) const {
    return layered && layered->seq_id == seq_id;
}

uint32_t lt_kv_cache::n_kept_cells() const {
    return GGML_PAD(mask.n_sink + mask.n_back, LT_PART_PAD);
}

uint32_t lt_kv_cache::n_layer_cells(llama_seq_id seq_id, uint32_t n_tokens) const {
    const auto & held = pos_streaming(seq_id);

    // note: what has been read of a prompt that goes on is among its tokens
    const lt_prompt * prompt = prompts[seq_id].current();

    const uint32_t n_held = prompt ? std::distance(held.begin(), held.lower_bound({ prompt->begin, 0 })) : held.size();

    return GGML_PAD(n_held + n_tokens, LT_PART_PAD);
}

size_t lt_kv_cache::layers_bytes(llama_seq_id seq_id, uint32_t n_tokens) const {
    if (all_kept) {
        return queue_bytes(n_tokens);
    }

    const size_t n_kept = has_room_for_kept(seq_id) ? 0 : prompt_bytes(n_kept_cells());

    return layer_bytes(n_layer_cells(seq_id, n_tokens)) + (size_t) n_tokens*model.hparams.n_embd*sizeof(float) + n_kept;
}

void lt_kv_cache::make_layers(llama_seq_id seq_id, uint32_t n_tokens) {
    layered.reset();

    const size_t n_bytes = layers_bytes(seq_id, n_tokens);

    check_limit(n_bytes, n_tokens, [&](uint32_t n) { return layers_bytes(seq_id, n); }, n_spare_cells(seq_id, n_tokens));

    auto res = std::make_unique<lt_layers>();

    res->seq_id   = seq_id;
    res->n_tokens = n_tokens;
    res->runs     = runs;

    try {
        if (all_kept) {
            make_queue(*res);
        } else {
            res->kv   = create(hparams_no_alloc, n_layer_cells(seq_id, n_tokens), true, true);
            res->bufs = lt_kv_ops::share_memory(*res->kv);

            if (!has_room_for_kept(seq_id)) {
                res->kv_kept = create(model.hparams, n_kept_cells(), true, true);
            }
        }

        make_hidden(*res);
    } catch (const std::exception & err) {
        throw std::runtime_error(format("no memory to read a prompt of %u tokens, %.1f MiB (%s). A KV cache of a smaller type or prefill=stream needs less",
                    n_tokens, n_bytes/1024.0/1024.0, err.what()));
    }

    layered = std::move(res);
}

void lt_kv_cache::make_hidden(lt_layers & layers) const {
    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    layers.ctx_act.reset(ggml_init(params));
    layers.act = ggml_new_tensor_2d(layers.ctx_act.get(), GGML_TYPE_F32, model.hparams.n_embd, layers.n_tokens);
    ggml_set_name(layers.act, "lt_hidden");

    // on the device, if one has all layers
    auto * dev = model.dev_layer(0);
    for (uint32_t il = 1; il < model.hparams.n_layer(); ++il) {
        dev = model.dev_layer(il) == dev ? dev : nullptr;
    }

    auto * buft = dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type();

    layers.buf_act.reset(ggml_backend_alloc_ctx_tensors_from_buft(layers.ctx_act.get(), buft));
    if (!layers.buf_act) {
        throw std::runtime_error(format("%.1f MiB for the hidden states could not be allocated", ggml_nbytes(layers.act)/1024.0/1024.0));
    }
}

static std::vector<uint32_t> lt_find_empty(const llama_kv_cells & cells, size_t n) {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < cells.size() && res.size() < n; ++i) {
        if (cells.is_empty(i)) {
            res.push_back(i);
        }
    }
    return res;
}

bool lt_kv_cache::has_room_for_kept(llama_seq_id seq_id) const {
    const size_t n = (size_t) mask.n_sink + mask.n_back;

    return lt_find_empty(kv_streaming->get_cells(seq_id), n).size() == n;
}

//
// reading
//

bool lt_kv_cache::start_layers(const lt_batch & batch, uint32_t n_outputs) {
    const auto & cur = batch.front();

    const bool is_whole = batch.size() == 1 && cur.is_prompt && cur.is_last && (uint32_t) (cur.end - cur.begin) == cur.n_tokens;

    const auto has_spare = [&] {
        return n_spare_cells(cur.id, cur.n_tokens) >= cur.n_tokens;
    };

    // note: where all tokens have outputs, upstream doesn't ask which ones have
    if (!is_whole || n_outputs == cur.n_tokens || !can_read_by_layer(cur.id, cur.n_tokens) || has_spare()) {
        layered.reset();
        return false;
    }

    try {
        const bool is_made = layered && layered->seq_id == cur.id && layered->n_tokens == cur.n_tokens &&
            (layered->queue || (layered->kv->get_size() >= n_layer_cells(cur.id, cur.n_tokens) && (layered->kv_kept || has_room_for_kept(cur.id))));

        if (!is_made) {
            make_layers(cur.id, cur.n_tokens);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, err.what());
        return false;
    }

    layered->is_running = true;
    layered->begin      = cur.begin;
    layered->n_past     = pos_full(cur.id).size();

    lctx->synchronize();

    generation++;

    if (layered->queue) {
        start_queue();
        begin_run();

        return true;
    }

    kv_prompt = std::move(layered->kv);

    const auto & src = kv_streaming->get_cells(cur.id);
          auto & dst = lt_kv_ops::cells(*kv_prompt, 0);

    for (const auto & [p, i] : src.seq_pos_get(cur.id)) {
        if (!mask.is_dead(src, i, cur.id)) {
            const uint32_t i_dst = layered->pairs_in.size();

            lt_kv_ops::copy_cell(src, i, dst, i_dst);
            dst.seq_add(i_dst, cur.id);

            layered->pairs_in.push_back({ i, i_dst });
        }
    }

    in_prompt_part.set(cur.id);

    begin_run();

    return true;
}

void lt_kv_cache::begin_run() {
    const auto & run = layered->run();

    if (layered->queue) {
        begin_queue_run();
    } else if (run.il_streaming >= 0) {
        // note: layers can have keys and values of other sizes, and what is in no cell must still be numbers
        for (const auto & buf : layered->bufs) {
            if (!has_equal_layers) {
                ggml_backend_buffer_clear(buf.get(), 0);
            }
        }

        lt_kv_ops::copy_data(*kv_streaming, kv_streaming->get_stream(layered->seq_id), *kv_prompt, 0, layered->pairs_in, run.il_streaming);
    }

    // ggml-alloc tells graphs apart by their sizes alone, and takes one run of layers for another: after this graph, it can't
    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead() + ggml_graph_overhead_custom(1, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(params) };

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 1, false);

    ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1);
    ggml_set_input(t);

    ggml_build_forward_expand(gf, t);

    ggml_backend_sched_reset  (lctx->get_sched());
    ggml_backend_sched_reserve(lctx->get_sched(), gf);
}

void lt_kv_cache::plan_kept() {
    const llama_seq_id s = layered->seq_id;

    if (layered->queue) {
        layered->pairs_out = pairs_kept();
        return;
    }

    const auto & cells = kv_prompt->get_cells(s);
    const auto & held  = kv_streaming->get_cells(s);

    std::vector<uint32_t> kept;
    for (const auto & [p, i] : cells.seq_pos_get(s)) {
        const bool is_kept = p < (llama_pos) mask.n_sink || p >= cells.seq_pos_max(s) + 1 - (llama_pos) mask.n_back;
        const auto it      = held.seq_pos_get(s).lower_bound({ p, 0 });

        // what the streaming part has already stays where it is
        const bool is_held = !layered->kv_kept && it != held.seq_pos_get(s).end() && it->first == p;

        if (is_kept && !is_held) {
            kept.push_back(i);
        }
    }

    auto & dst = layered->kv_kept ? *layered->kv_kept : *kv_streaming;

    const auto free = lt_find_empty(dst.get_cells(s), kept.size());
    GGML_ASSERT(free.size() == kept.size());

    for (size_t j = 0; j < kept.size(); ++j) {
        layered->pairs_out.push_back({ kept[j], free[j] });
    }
}

bool lt_kv_cache::next_run() {
    lctx->synchronize();

    if (layered->i_run == 0) {
        plan_kept();
    }

    const llama_seq_id s = layered->seq_id;

    if (layered->queue) {
        end_queue_run();
    } else if (const int32_t il = layered->run().il_streaming; il >= 0) {
        auto & dst = layered->kv_kept ? *layered->kv_kept : *kv_streaming;

        lt_kv_ops::copy_data(*kv_prompt, 0, dst, layered->kv_kept ? 0 : kv_streaming->get_stream(s), layered->pairs_out, il);
    }

    if (!layered->is_last_run()) {
        layered->i_run++;
        begin_run();

        return true;
    }

    layered->queue ? finish_queue() : finish_layers();

    return false;
}

void lt_kv_cache::finish_layers() {
    const llama_seq_id s = layered->seq_id;

    const uint32_t strm = layered->kv_kept ? 0 : kv_streaming->get_stream(s);

    auto & dst = lt_kv_ops::cells(layered->kv_kept ? *layered->kv_kept : *kv_streaming, strm);

    if (!layered->kv_kept) {
        const pos_set held = dst.seq_pos_get(s);
        for (const auto & [p, i] : held) {
            if (p >= (llama_pos) mask.n_sink && p < kv_prompt->seq_pos_max(s) + 1 - (llama_pos) mask.n_back) {
                dst.seq_rm(i, s);
            }
        }
    }

    for (const auto & [i, i_dst] : layered->pairs_out) {
        lt_kv_ops::copy_cell(kv_prompt->get_cells(s), i, dst, i_dst);
        dst.seq_add(i_dst, s);
    }

    if (layered->kv_kept) {
        // the end of the prompt copies it to the streaming part, see lt-kv-cache-prompt-end.cpp
        kv_prompt = std::move(layered->kv_kept);
        generation++;
    } else {
        lt_kv_ops::set_head(*kv_streaming, strm, layered->pairs_out.back().second + 1);
        leave_prompt_part(s);
    }

    layered.reset();
}

void lt_kv_cache::stop_layers() {
    if (!layered || !layered->is_running) {
        return;
    }

    const llama_seq_id s     = layered->seq_id;
    const llama_pos    begin = layered->begin;

    if (layered->queue) {
        stop_queue();
    } else {
        kv_full->seq_rm(s, begin, -1);
    }

    leave_prompt_part(s);
    layered.reset();

    prompts[s].truncate(begin);
    n_declared[s] = 0;

    set_phases({});
}

const lt_layers * lt_kv_cache::get_layers() const {
    return layered && layered->is_running ? layered.get() : nullptr;
}
