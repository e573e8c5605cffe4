// the part of the cache that exists while long prompts are read with full attention, see lt-kv-cache.h. how it ends: lt-kv-cache-prompt-end.cpp
//
// policy: a prompt is read in the spare cells of the streaming part as long as they suffice, about n_ubatch tokens, so that chatting
//   allocates nothing. else it moves to the prompt part, which grows by half at least, or at once to what begin_prompt() announced.
//   the prompt part is given back when the last prompt in it ends

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

size_t lt_kv_cache::prompt_bytes(uint32_t il, uint32_t n_cells) const {
    if (!has_cache[il] || !spec.is_streaming(il) || !model.hparams.has_kv(il)) {
        return 0;
    }

    const uint32_t n_embd_v = v_trans ? model.hparams.n_embd_v_gqa_max() : model.hparams.n_embd_v_gqa(il);

    return n_cells*(ggml_row_size(spec.kept.type(il, type_k_streaming), model.hparams.n_embd_k_gqa(il)) + ggml_row_size(spec.kept.type(il, type_v_streaming), n_embd_v));
}

size_t lt_kv_cache::prompt_bytes(uint32_t n_cells) const {
    size_t res = 0;
    for (uint32_t il = 0; il < has_cache.size(); ++il) {
        res += prompt_bytes(il, n_cells);
    }
    return res;
}

size_t lt_kv_cache::layer_bytes(uint32_t n_cells) const {
    size_t res = 0;
    for (uint32_t il = 0; il < has_cache.size(); ++il) {
        res = std::max(res, prompt_bytes(il, n_cells));
    }
    return res;
}

void lt_kv_cache::check_limit(uint32_t n_cells, uint32_t n_tokens, uint32_t n_spare) const {
    const auto bytes_of = [&](uint32_t n) { return prompt_bytes(GGML_PAD(n_cells - n_tokens + n, LT_PART_PAD)); };

    check_limit(bytes_of(n_tokens), n_tokens, bytes_of, n_spare);
}

void lt_kv_cache::check_limit(size_t n_bytes, uint32_t n_tokens, const std::function<size_t(uint32_t)> & bytes_of, uint32_t n_spare) const {
    if (prompt_limit == 0 || n_bytes <= prompt_limit) {
        return;
    }

    // the longest prompt that would fit
    uint32_t n_fit = 0;
    for (uint32_t n_max = n_tokens; n_fit + 1 < n_max; ) {
        const uint32_t n = n_fit + (n_max - n_fit)/2;

        (bytes_of(n) <= prompt_limit ? n_fit : n_max) = n;
    }

    throw std::runtime_error(format("a prompt of %u tokens needs %.1f MiB while its streaming layers read it with full attention, the limit is %.1f MiB: "
                "at most %u tokens would fit, or use a larger limit (%s), a KV cache of a smaller type, or prefill=stream",
                n_tokens, n_bytes/1024.0/1024.0, prompt_limit/1024.0/1024.0, std::max(n_fit, n_spare), "LT_PROMPT_LIMIT"));
}

uint32_t lt_kv_cache::n_spare_cells(llama_seq_id seq_id, uint32_t n_max) const {
    // note: where all layers are still full, it is the full part that has no room
    if (all_kept) {
        return std::min(n_max, kv_full->get_size() - kv_full->get_cells(seq_id).get_used());
    }

    return lt_kv_ops::find_cells(*kv_streaming, kv_streaming->get_stream(seq_id), 0, UINT32_MAX, n_max).size();
}

void lt_kv_cache::begin_prompt(llama_seq_id seq_id, uint32_t n_tokens) {
    if (spec.prefill != LT_PREFILL_FULL) {
        return;
    }

    const uint32_t n_held = pos_streaming(seq_id).size();
    const uint32_t n_past = pos_full(seq_id).size();

    if (n_tokens > size_full || n_past > size_full - n_tokens) {
        throw std::runtime_error(format("a prompt of %u tokens after %u others does not fit the context of %u tokens", n_tokens, n_past, size_full));
    }

    const uint32_t n_spare = n_spare_cells(seq_id, n_tokens);

    // what other prompts have and are going to have in the prompt part, and those that may yet have to go there
    uint32_t n_used  = kv_prompt ? kv_prompt->get_cells(0).get_used() : 0;
    uint32_t n_other = 0;

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (s == seq_id || (n_declared[s] == 0 && !is_in_prompt(s))) {
            continue;
        }

        n_used += n_declared[s];

        if (!in_prompt_part[s]) {
            n_used  += pos_streaming(s).size();
            n_other += kv_streaming->get_stream(s) == kv_streaming->get_stream(seq_id) ? n_declared[s] : 0;
        }
    }

    // note: where sequences share the spare cells, those for an ubatch are sure to stay. within a limit a prompt must not count on more
    const bool is_sure  = prompt_limit == 0 || !unified || n_seq_max == 1 || n_tokens + n_other <= n_ubatch;
    const bool is_spare = n_tokens <= n_spare && is_sure;

    if (layered && layered->seq_id == seq_id) {
        layered.reset();
    }

    if (!is_spare && n_used == 0 && can_read_by_layer(seq_id, n_tokens)) {
        make_layers(seq_id, n_tokens);
    } else if (!is_spare && all_kept) {
        check_limit(choice_bytes(n_past + n_tokens), n_tokens, [&](uint32_t n) { return choice_bytes(n_past + n); }, n_spare);

        if (lctx) {
            lctx->synchronize();
        }

        grow_full_part(n_past + n_tokens);
    } else if (!is_spare) {
        const uint32_t n_cells = n_used + (in_prompt_part[seq_id] ? 0 : n_held) + n_tokens;

        check_limit(n_cells, n_tokens, in_prompt_part[seq_id] ? 0 : n_spare);

        // its keys must be turned to their positions first
        update();

        if (lctx) {
            lctx->synchronize();
        }

        // now, because a batch that finds no memory looks as if the context were full

        grow_prompt_part(n_cells, n_cells);

        if (!in_prompt_part[seq_id]) {
            move_to_prompt_part({ seq_id });
        }
    }

    n_declared[seq_id] = n_tokens;
}

bool lt_kv_cache::is_in_prompt(llama_seq_id seq_id) const {
    return prompts[seq_id].current() != nullptr;
}

bool lt_kv_cache::is_in_prompt_part(llama_seq_id seq_id) const {
    return in_prompt_part[seq_id];
}

void lt_kv_cache::set_prompt_limit(size_t n_bytes) {
    prompt_limit = n_bytes;
}

void lt_kv_cache::request_room(const lt_batch & batch, const std::vector<llama_seq_id> & move) {
    uint32_t n_cells  = kv_prompt ? kv_prompt->get_cells(0).get_used() : 0;
    uint32_t n_tokens = 0;

    pending = {};

    for (const llama_seq_id s : move) {
        if (!in_prompt_part[s]) {
            pending.move.push_back(s);

            n_cells += pos_streaming(s).size();
        }
    }

    for (const auto & cur : batch) {
        if (in_prompt_part[cur.id] || std::find(move.begin(), move.end(), cur.id) != move.end()) {
            n_tokens += std::max(cur.n_tokens, n_declared[cur.id]);
        }
    }

    n_cells += n_tokens;

    try {
        check_limit(n_cells, n_tokens);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());

        pending = {};
        return;
    }

    // note: by half, so that a prompt whose length is not known is not copied over and over
    const uint32_t n_grown = kv_prompt ? kv_prompt->get_size() + kv_prompt->get_size()/2 : 0;

    const bool may_grow = prompt_limit == 0 || prompt_bytes(GGML_PAD(n_grown, LT_PART_PAD)) <= prompt_limit;

    pending.n_needed = n_cells;
    pending.n_cells  = may_grow ? std::max(n_cells, n_grown) : n_cells;
}

llama_kv_cache * lt_kv_cache::get_reserve() {
    if (spec.prefill != LT_PREFILL_FULL || all_kept) {
        return nullptr;
    }

    if (!kv_reserve) {
        LLAMA_LOG_INFO("%s: the compute buffers are made for a prompt of %u cells, for which no memory is taken now:\n", __func__, size_full);

        kv_reserve = create(hparams_no_alloc, GGML_PAD(size_full, LT_PART_PAD), true, true);
    }

    return kv_reserve.get();
}

llama_kv_cache * lt_kv_cache::get_reserve_full() {
    if (kv_full->get_size() >= size_full) {
        return kv_full.get();
    }

    if (!kv_reserve) {
        LLAMA_LOG_INFO("%s: the compute buffers are made for %u cells in all layers, for which no memory is taken now:\n", __func__, size_full);

        kv_reserve = create(hparams_no_alloc, size_full, false, unified);
    }

    return kv_reserve.get();
}

void lt_kv_cache::free_prompt_part() {
    in_prompt_part.reset();

    if (!kv_prompt) {
        return;
    }

    // the last batch may still be computing
    if (lctx) {
        lctx->synchronize();
    }

    kv_prompt.reset();
    layered.reset();
    generation++;
}

void lt_kv_cache::move_to_prompt_part(const std::vector<llama_seq_id> & seq_ids) {
    // note: for what a new prompt sees, its beginning must be known. it follows what is there
    for (const llama_seq_id s : seq_ids) {
        if (!prompts[s].current()) {
            phases.first[s] = std::max(0, kv_streaming->seq_pos_max(s) + 1 - (llama_pos) mask.n_back);
        }
    }

    auto & dst = lt_kv_ops::cells(*kv_prompt, 0);

    // cells that are shared stay shared
    cell_map copied;

    for (const llama_seq_id s : seq_ids) {
        const uint32_t strm = kv_streaming->get_stream(s);

        const auto & src = lt_kv_ops::cells(*kv_streaming, strm);

        lt_kv_ops::cell_pairs pairs;

        uint32_t i_free = 0;
        for (const auto & [p, i] : src.seq_pos_get(s)) {
            if (mask.is_dead(src, i, s)) {
                continue;
            }

            const auto it = copied.find({ strm, i });
            if (it != copied.end()) {
                dst.seq_add(it->second, s);
                continue;
            }

            while (i_free < dst.size() && !dst.is_empty(i_free)) {
                ++i_free;
            }
            GGML_ASSERT(i_free < dst.size());

            lt_kv_ops::copy_cell(src, i, dst, i_free);
            dst.seq_add(i_free, s);

            copied[{ strm, i }] = i_free;
            pairs.push_back({ i, i_free });
        }

        lt_kv_ops::copy_data(*kv_streaming, strm, *kv_prompt, 0, pairs);

        in_prompt_part.set(s);
    }

    // the streaming part keeps what was there before the prompt, for a rollback to its begin
    for (const llama_seq_id s : seq_ids) {
        if (const lt_prompt * prompt = prompts[s].current()) {
            kv_streaming->seq_rm(s, prompt->begin, -1);
        }
    }

    set_phases({});
}

bool lt_kv_cache::make_room(llama_seq_id seq_id, uint32_t n) {
    const auto has_room = [&] {
        return lt_kv_ops::find_cells(*kv_streaming, kv_streaming->get_stream(seq_id), 0, UINT32_MAX, n).size() >= n;
    };

    if (!unified || has_room()) {
        return has_room();
    }

    std::vector<llama_seq_id> move;

    uint32_t n_cells = kv_prompt ? kv_prompt->get_cells(0).get_used() : 0;

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (s != seq_id && is_in_prompt(s) && !in_prompt_part[s]) {
            move.push_back(s);
            n_cells += pos_streaming(s).size();
        }
    }

    if (move.empty()) {
        return false;
    }

    if (lctx) {
        lctx->synchronize();
    }

    try {
        grow_prompt_part(n_cells, n_cells);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    move_to_prompt_part(move);

    return has_room();
}

void lt_kv_cache::copy_in_prompt_part(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    // its keys must be turned to their positions first
    update();

    if (lctx) {
        lctx->synchronize();
    }

    std::vector<uint32_t> held;
    for (const auto & [_, i] : kv_prompt->get_cells(0).seq_pos_get(seq_id_src)) {
        if (!mask.is_dead(kv_prompt->get_cells(0), i, seq_id_src)) {
            held.push_back(i);
        }
    }

    const uint32_t n_cells = kv_prompt->get_cells(0).get_used() + held.size();

    check_limit(n_cells, held.size());

    grow_prompt_part(n_cells, n_cells);

    auto & cells = lt_kv_ops::cells(*kv_prompt, 0);

    lt_kv_ops::cell_pairs pairs;
    for (uint32_t i = 0; i < cells.size() && pairs.size() < held.size(); ++i) {
        if (cells.is_empty(i)) {
            pairs.push_back({ held[pairs.size()], i });
        }
    }

    for (const auto & [i, i_dst] : pairs) {
        lt_kv_ops::copy_cell(cells, i, cells, i_dst);
        cells.seq_add(i_dst, seq_id_dst);
    }

    lt_kv_ops::copy_data(*kv_prompt, 0, *kv_prompt, 0, pairs);

    in_prompt_part.set(seq_id_dst);
}

void lt_kv_cache::leave_prompt_part(llama_seq_id seq_id) {
    if (!in_prompt_part[seq_id]) {
        return;
    }

    kv_prompt->seq_rm(seq_id, -1, -1);
    in_prompt_part.reset(seq_id);

    if (in_prompt_part.none()) {
        free_prompt_part();
    }
}
