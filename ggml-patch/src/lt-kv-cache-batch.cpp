// how a batch is split, which part of the cache each ubatch uses, and where prompts begin and end, see lt-kv-cache.h

#include "lt-kv-cache.h"

#include "lt-batch-ops.h"
#include "lt-kv-cache-context.h"
#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cassert>

lt_batch lt_kv_cache::inspect(const llama_batch & batch, bool embd_all) const {
    lt_batch res;

    std::array<int32_t, LLAMA_MAX_SEQ> index;
    index.fill(-1);

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            const llama_seq_id s = batch.seq_id[i][j];

            if (index[s] < 0) {
                index[s] = res.size();
                res.push_back({ s, batch.pos[i], batch.pos[i], 0, false, is_in_prompt(s) || n_declared[s] > 0, false });
            }

            auto & cur = res[index[s]];

            cur.begin = std::min(cur.begin, batch.pos[i]);
            cur.end   = std::max(cur.end,   batch.pos[i] + 1);
            cur.n_tokens++;
            cur.is_prompt = cur.is_prompt || !batch.logits[i] || (embd_all && cur.n_tokens > 1); // embeddings are asked for of all tokens

            cur.has_logits = batch.logits[i];
        }
    }

    // sequences that share tokens read the same prompt
    for (bool changed = true; changed; ) {
        changed = false;

        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            bool any = false;
            for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
                any = any || res[index[batch.seq_id[i][j]]].is_prompt;
            }
            for (int32_t j = 0; any && j < batch.n_seq_id[i]; ++j) {
                auto & cur = res[index[batch.seq_id[i][j]]];
                changed = changed || !cur.is_prompt;
                cur.is_prompt = true;
            }
        }
    }

    for (auto & cur : res) {
        cur.is_prompt = cur.is_prompt && spec.prefill == LT_PREFILL_FULL;
        cur.is_last   = cur.is_prompt && (n_declared[cur.id] > 0 ? n_declared[cur.id] <= cur.n_tokens : cur.has_logits);
    }

    return res;
}

void lt_kv_cache::set_phases(const lt_batch & batch) {
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        const lt_prompt * prompt = prompts[s].current();

        phases.first[s] = prompt ? prompt->first : -1;
    }

    for (const auto & cur : batch) {
        if (cur.is_prompt && phases.first[cur.id] < 0) {
            phases.first[cur.id] = std::max(0, cur.begin - (llama_pos) mask.n_window);
        }
    }
}

llama_memory_context_ptr lt_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    if (!has_memory()) {
        return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }

    stop_layers();

    const lt_batch batch = inspect(balloc.get_batch(), embd_all);

    for (const auto & cur : batch) {
        if (spec.is_auto() && cur.id != 0) {
            LLAMA_LOG_ERROR("%s: sequence %d: where the layers are chosen for the prompt, there is one sequence, 0\n", __func__, cur.id);
            return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }

        if (!can_decode(cur.id)) {
            return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
        }

        // room was made for a prompt that then was not read
        if (in_prompt_part[cur.id] && !cur.is_prompt && !is_ahead(cur.id)) {
            leave_prompt_part(cur.id);
        }
    }

    set_phases(batch);

    if (start_layers(batch, balloc.get_n_outputs())) {
        phases.rollback[batch.front().id] = LT_POS_END;

        if (auto res = try_split(balloc, batch, n_ubatch)) {
            return res;
        }

        pending = {};
        stop_layers();
        set_phases(batch);
    }

    const auto rollback = phases.rollback;

    const uint32_t n_reserved = set_rollback(batch, n_ubatch);

    // note: first the prompts make room in the streaming part, then it grows
    for (int i = 0; i < 3; ++i) {
        if (auto res = try_split(balloc, batch, n_ubatch)) {
            return res;
        }

        // there is room for so many, as the cells for rollbacks come out of those that are there for one ubatch
        if (n_reserved > 0) {
            if (auto res = try_split(balloc, batch, n_ubatch - n_reserved)) {
                return res;
            }
        }

        if (!has_pending() || !apply_pending()) {
            break;
        }

        set_phases(batch);
    }

    pending         = {};
    phases.rollback = rollback;

    set_phases({});

    return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr lt_kv_cache::try_split(llama_batch_allocr & balloc, const lt_batch & batch, uint32_t n_ubatch) {
    // an ubatch uses one part of the cache
    // note: with a stream for each sequence, ubatches have as many tokens of each
    auto ubatches = lt_batch_ops::split(balloc, in_prompt_part, n_ubatch, unified);

    if (ubatches.empty()) {
        // sequences that share tokens, of which one has gone ahead
        const auto move = seqs_to_move(batch);

        if (!move.empty()) {
            request_room(batch, move);
        }

        return nullptr;
    }

    lt_ubatches res;

    std::vector<llama_ubatch> streaming;
    std::vector<llama_ubatch> prompt;

    for (const auto & ubatch : ubatches) {
        const bool away = in_prompt_part[ubatch.seq_id_unq[0]];

        if (!all_kept) {
            (away ? prompt : streaming).push_back(ubatch);
        }
        res.in_prompt_part.push_back(away);
    }

    const auto prepare = [](llama_kv_cache & kv, const std::vector<llama_ubatch> & ubatches, llama_kv_cache::slot_info_vec_t & sinfos) {
        if (!ubatches.empty()) {
            sinfos = kv.prepare(ubatches);
        }
        return sinfos.size() == ubatches.size();
    };

    if (!prepare(*kv_full, ubatches, res.sinfos_full)) {
        request_full(batch);
        return nullptr;
    }

    if (!prompt.empty() && !prepare(*kv_prompt, prompt, res.sinfos_prompt)) {
        request_room(batch, seqs_to_move(batch));
        return nullptr;
    }

    if (!prepare(*kv_streaming, streaming, res.sinfos_streaming)) {
        const auto move = seqs_to_move(batch);

        if (move.empty()) {
            request_streaming(batch);
        } else {
            request_room(batch, move);
        }

        return nullptr;
    }

    // note: it has room for any ubatch
    if (kv_swa && !prepare(*kv_swa, ubatches, res.sinfos_swa)) {
        return nullptr;
    }

    pending = {}; // what a larger ubatch would have needed

    res.all       = std::move(ubatches);
    res.streaming = std::move(streaming);
    res.prompt    = std::move(prompt);

    return std::make_unique<lt_kv_cache_context>(this, batch, std::move(res));
}

std::vector<llama_seq_id> lt_kv_cache::seqs_to_move(const lt_batch & batch) const {
    std::vector<llama_seq_id> res;

    for (const auto & cur : batch) {
        if (cur.is_prompt && !in_prompt_part[cur.id]) {
            res.push_back(cur.id);
        }
    }

    // with an unified cache, a prompt that has come to a halt can be what takes the cells
    for (llama_seq_id s = 0; unified && s < LLAMA_MAX_SEQ; ++s) {
        if (is_in_prompt(s) && !in_prompt_part[s] && std::find(res.begin(), res.end(), s) == res.end()) {
            res.push_back(s);
        }
    }

    return res;
}

uint32_t lt_kv_cache::set_rollback(const lt_batch & batch, uint32_t n_max) {
    // the cells that each stream keeps for rollbacks
    std::vector<uint32_t> n_kept(kv_full->get_n_stream(), 0);

    for (const auto & cur : batch) {
        phases.rollback[cur.id] = LT_POS_END;
    }

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        n_kept[kv_full->get_stream(s)] += std::max(0, seq_pos_max(s) + 1 - phases.rollback[s]);
    }

    for (const auto & cur : batch) {
        auto & n = n_kept[kv_full->get_stream(cur.id)];

        // note: with more tokens than that at once nobody speculates
        if (phases.first[cur.id] < 0 && n + cur.n_tokens < n_max) {
            phases.rollback[cur.id] = cur.begin;
            n += cur.n_tokens;
        }
    }

    return *std::max_element(n_kept.begin(), n_kept.end());
}

void lt_kv_cache::begin_ubatch(const lt_batch & batch, const llama_ubatch & ubatch) {
    for (const auto & cur : batch) {
        // note: sequences of later ubatches may never come to it
        if (std::find(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq, cur.id) == ubatch.seq_id_unq + ubatch.n_seqs_unq) {
            continue;
        }

        if (cur.is_prompt && !prompts[cur.id].current()) {
            prompts[cur.id].open(cur.begin, std::max(0, cur.begin - (llama_pos) mask.n_window));
        }
    }
}

void lt_kv_cache::end_batch(const lt_batch & batch) {
    for (const auto & cur : batch) {
        if (!cur.is_prompt) {
            continue;
        }

        n_declared[cur.id] -= std::min(n_declared[cur.id], cur.n_tokens);

        if (!cur.is_last) {
            continue;
        }

        prompts[cur.id].close(cur.end);

        // note: as long as a streaming layer would hold everything, there is nothing to choose by
        if (lazy_ratio) {
            pending.choose = n_tokens(cur.id) > (uint64_t) mask.n_sink + mask.n_window;
        }
    }

    for (const auto & cur : batch) {
        const bool is_end = cur.is_last || (cur.has_logits && !is_in_prompt(cur.id));

        if (is_end && !all_kept && (in_prompt_part[cur.id] || is_far(cur.id))) {
            pending.finish.push_back(cur.id);
        }
    }

    set_phases({});

    // give the memory back now and not with the next batch
    if (has_pending()) {
        apply_pending();
    }
}

bool lt_kv_cache::is_far(llama_seq_id seq_id) const {
    if (kv_streaming->get_cells(seq_id).used_max_p1() <= mask.n_cells_decode) {
        return false;
    }

    // note: as long as a draft may be rolled back, or a prompt is read beside the prompt part, they take the cells that they take
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        const bool is_busy = phases.rollback[s] < seq_pos_max(s) || (is_in_prompt(s) && !in_prompt_part[s]);

        if (is_busy && kv_streaming->get_stream(s) == kv_streaming->get_stream(seq_id)) {
            return false;
        }
    }

    return true;
}

bool lt_kv_cache::has_pending() const {
    return pending.n_cells > 0 || pending.n_streaming > 0 || pending.n_full > 0 || !pending.finish.empty() || pending.choose;
}

bool lt_kv_cache::apply_pending() {
    const auto todo = std::move(pending);
    pending = {};

    if (lctx) {
        lctx->synchronize();
    }

    try {
        if (todo.n_cells > 0) {
            grow_prompt_part(todo.n_cells, todo.n_needed);
            move_to_prompt_part(todo.move);
        }

        if (todo.n_streaming > 0) {
            grow_streaming_part(todo.n_streaming);
        }

        if (todo.n_full > 0) {
            grow_full_part(todo.n_full);
        }

        finish(todo.finish);

        if (todo.choose) {
            choose_layers();
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s%s\n", __func__, todo.choose ? "all layers stay full: " : "", err.what());
        return false;
    }

    return true;
}
