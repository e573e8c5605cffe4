// how a batch is split, which part of the cache each ubatch uses, and where prompts begin and end, see lt-kv-cache.h

#include "lt-kv-cache.h"

#include "lt-kv-cache-context.h"
#include "lt-kv-ops.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cassert>

// a sequence with at most so many tokens in a batch may be rolled back to the first of them: speculative decoding
static const uint32_t LT_N_DRAFT_MAX = 64;

lt_batch lt_kv_cache::inspect(const llama_batch & batch, bool embd_all) const {
    lt_batch res;

    std::array<int32_t, LLAMA_MAX_SEQ> index;
    index.fill(-1);

    // the last token of a sequence asks for logits
    std::bitset<LLAMA_MAX_SEQ> has_logits;

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            const llama_seq_id s = batch.seq_id[i][j];

            if (index[s] < 0) {
                index[s] = res.size();
                res.push_back({ s, batch.pos[i], batch.pos[i], 0, is_in_prompt(s) || n_declared[s] > 0, false });
            }

            auto & cur = res[index[s]];

            cur.begin = std::min(cur.begin, batch.pos[i]);
            cur.end   = std::max(cur.end,   batch.pos[i] + 1);
            cur.n_tokens++;
            cur.is_prompt = cur.is_prompt || !batch.logits[i] || (embd_all && cur.n_tokens > 1); // embeddings are asked for of all tokens

            has_logits[s] = batch.logits[i];
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
        cur.is_last   = cur.is_prompt && (n_declared[cur.id] > 0 ? n_declared[cur.id] <= cur.n_tokens : has_logits[cur.id]);
    }

    return res;
}

void lt_kv_cache::set_phases(const lt_batch & batch) {
    phases.rollback.fill(LT_POS_END);

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

    pending = {};

    set_phases(batch);

    // first try simple split, then equal split
    for (const bool simple : { true, false }) {
        if (simple && !unified) {
            // requires equal splits, so we skip the simple split
            continue;
        }

        if (auto res = try_split(balloc, batch, n_ubatch, simple)) {
            return res;
        }
    }

    // note: if room was asked for, llama_decode() makes it by an update and tries again
    set_phases({});

    return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

static std::vector<llama_ubatch> lt_split(llama_batch_allocr & balloc, const std::function<llama_ubatch()> & next) {
    balloc.split_reset();

    std::vector<llama_ubatch> res;
    while (true) {
        auto ubatch = next();

        if (ubatch.n_tokens == 0) {
            break;
        }

        res.push_back(std::move(ubatch)); // NOLINT
    }

    return res;
}

llama_memory_context_ptr lt_kv_cache::try_split(llama_batch_allocr & balloc, const lt_batch & batch, uint32_t n_ubatch, bool simple) {
    const auto is_away = [&](const lt_batch_seq & cur) { return in_prompt_part[cur.id]; };

    const bool any_away =  std::any_of(batch.begin(), batch.end(), is_away);
    const bool all_away =  std::all_of(batch.begin(), batch.end(), is_away);

    const auto split = [&](uint32_t n) {
        return lt_split(balloc, [&] {
            if (any_away && !all_away) {
                // an ubatch uses one part of the cache
                return balloc.split_seq(n);
            }
            return simple ? balloc.split_simple(n) : balloc.split_equal(n, !unified, 0);
        });
    };

    auto ubatches = split(n_ubatch);

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        // failed to find a suitable split
        return nullptr;
    }

    // the cells for rollbacks come out of those that are there for one ubatch
    const uint32_t n_rollback = set_rollback(ubatches);
    if (n_rollback > 0) {
        if (n_rollback < n_ubatch) {
            ubatches = split(n_ubatch - n_rollback);
        } else {
            phases.rollback.fill(LT_POS_END);
        }
    }

    lt_ubatches res;

    std::vector<llama_ubatch> streaming;
    std::vector<llama_ubatch> prompt;

    for (const auto & ubatch : ubatches) {
        const bool away = in_prompt_part[ubatch.seq_id_unq[0]];

        for (uint32_t s = 1; s < ubatch.n_seqs_unq; ++s) {
            if (in_prompt_part[ubatch.seq_id_unq[s]] != away) {
                // sequences that share tokens, of which one has gone ahead
                request_room(batch, { ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq });
                return nullptr;
            }
        }

        if (!choosing) {
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
        return nullptr;
    }

    const bool fits =
        prepare(*kv_streaming, streaming, res.sinfos_streaming) &&
        (prompt.empty() || prepare(*kv_prompt, prompt, res.sinfos_prompt));

    phases.rollback.fill(LT_POS_END);

    if (!fits) {
        const auto move = seqs_to_move(batch);

        if (any_away || !move.empty()) {
            request_room(batch, move);
        }

        return nullptr;
    }

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

uint32_t lt_kv_cache::set_rollback(const std::vector<llama_ubatch> & ubatches) {
    if (ubatches.size() < 2) {
        // the cells of an ubatch are chosen before any of its tokens moves a window
        return 0;
    }

    std::array<uint32_t,  LLAMA_MAX_SEQ> n_tokens;
    std::array<llama_pos, LLAMA_MAX_SEQ> pos_min;

    n_tokens.fill(0);
    pos_min .fill(LT_POS_END);

    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                const llama_seq_id s = ubatch.seq_id[i][j];

                n_tokens[s]++;
                pos_min [s] = std::min(pos_min[s], ubatch.pos[i]);
            }
        }
    }

    uint32_t res = 0;

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        // note: the first token of a draft's check is not part of the draft
        if (n_tokens[s] > 1 && n_tokens[s] <= LT_N_DRAFT_MAX && phases.first[s] < 0) {
            phases.rollback[s] = pos_min[s] + 1;
            res += n_tokens[s] - 1;
        }
    }

    return res;
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

        if (choosing) {
            // note: as long as a streaming layer would hold everything, there is nothing to choose by
            pending.choose = n_tokens(cur.id) > (uint64_t) mask.n_sink + mask.n_window;
            continue;
        }

        const auto & cells = kv_streaming->get_cells(cur.id);

        if (in_prompt_part[cur.id] || cells.used_max_p1() > mask.n_cells_decode) {
            pending.finish.push_back(cur.id);
        }
    }

    set_phases({});

    // give the memory back now and not with the next batch
    if (has_pending()) {
        update();
    }
}

bool lt_kv_cache::has_pending() const {
    return pending.n_cells > 0 || !pending.finish.empty() || pending.choose;
}

void lt_kv_cache::apply_pending() {
    const auto todo = std::move(pending);
    pending = {};

    if (lctx) {
        lctx->synchronize();
    }

    if (todo.n_cells > 0) {
        grow_prompt_part(todo.n_cells);

        if (kv_prompt && kv_prompt->get_size() < todo.n_cells) {
            grow_prompt_part(todo.n_needed);
        }

        if (kv_prompt && kv_prompt->get_size() >= todo.n_needed) {
            move_to_prompt_part(todo.move);
        }
    }

    finish(todo.finish);

    if (todo.choose) {
        try {
            choose_layers();
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: all layers stay full: %s\n", __func__, err.what());
        }
    }
}
