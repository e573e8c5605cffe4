// operations on sequences, forwarded to all parts, see lt-kv-cache.h. what they may do: lt-kv-cache-rules.cpp

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-impl.h"

#include <algorithm>

void lt_kv_cache::clear(bool data) {
    kv_full     ->clear(data);
    kv_streaming->clear(data);

    if (kv_swa) {
        kv_swa->clear(data);
    }

    free_prompt_part();

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        forget(s);
    }

    choose_anew();

    set_phases({});
}

void lt_kv_cache::undeclare(llama_seq_id seq_id) {
    n_declared[seq_id] = 0;

    if (layered && !layered->is_running && layered->seq_id == seq_id) {
        layered.reset();
    }
}

void lt_kv_cache::forget(llama_seq_id seq_id) {
    prompts[seq_id].clear();
    undeclare(seq_id);

    phases.rollback[seq_id] = LT_POS_END;

    refused .reset(seq_id);
    restored.reset(seq_id);
}

void lt_kv_cache::forget_empty() {
    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        // note: what a refused seq_cp() left empty stays refused until it is removed
        if (pos_full(s).empty() && !prompts[s].all().empty()) {
            leave_prompt_part(s);
            forget(s);
        }
    }

    choose_anew();

    set_phases({});
}

static bool lt_holds_any(const llama_kv_cache & kv, llama_seq_id s0, llama_seq_id s1, llama_pos p0, llama_pos p1) {
    for (llama_seq_id s = s0; s < s1; ++s) {
        const auto & pos = kv.get_cells(s).seq_pos_get(s);

        const auto it = pos.lower_bound({ p0, 0 });
        if (it != pos.end() && it->first < p1) {
            return true;
        }
    }

    return false;
}

bool lt_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    // note: if a batch fails, the context removes the tokens of one ubatch
    if (get_layers() && (seq_id < 0 || seq_id == layered->seq_id)) {
        stop_layers();
    }

    const llama_seq_id s0 = seq_id < 0 ? 0           : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        if (!can_rm(s, p0, p1)) {
            LLAMA_LOG_DEBUG("%s: sequence %d: can't remove [%d, %d), the streaming layers are complete from position %d on\n",
                    __func__, s, p0, p1, seq_pos_min(s));
            return false;
        }
    }

    bool res = true;

    for (auto * kv : { kv_full.get(), kv_streaming.get(), kv_prompt.get(), kv_swa.get() }) {
        // note: it would look at all cells
        if (kv && lt_holds_any(*kv, s0, s1, p0, p1)) {
            res = res & kv->seq_rm(seq_id, p0, p1);
        }
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        undeclare(s);

        phases.rollback[s] = LT_POS_END;

        prompts[s].truncate(seq_pos_max(s) + 1);

        if (in_prompt_part[s] && !is_ahead(s)) {
            leave_prompt_part(s);
        }

        if (pos_full(s).empty() && pos_streaming(s).empty()) {
            forget(s);
        }
    }

    choose_anew();

    set_phases({});

    return res;
}

void lt_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool is_same_stream = kv_full->get_stream(seq_id_src) == kv_full->get_stream(seq_id_dst);

    const llama_pos i0 = std::max(p0, 0);
    const llama_pos i1 = p1 < 0 ? LT_POS_END : p1;

    // note: between streams, only whole sequences can be copied
    if (is_same_stream && !can_cp(seq_id_src, seq_id_dst, i0, i1)) {
        refuse(__func__, seq_id_dst, p0, p1);
        return;
    }

    if (!is_same_stream || pos_full(seq_id_dst).empty()) {
        leave_prompt_part(seq_id_dst);
    }

    kv_full     ->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    kv_streaming->seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if (kv_swa) {
        kv_swa->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }

    undeclare(seq_id_dst);

    phases.rollback[seq_id_dst] = LT_POS_END;

    if (!is_same_stream) {
        forget(seq_id_dst); // the copy replaces what was there
    }

    if (in_prompt_part[seq_id_src] && is_same_stream) {
        kv_prompt->seq_cp(seq_id_src, seq_id_dst, p0, p1);
        in_prompt_part.set(seq_id_dst);
    } else if (in_prompt_part[seq_id_src]) {
        try {
            copy_in_prompt_part(seq_id_src, seq_id_dst);
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: sequence %d can't be continued, remove it: %s\n", __func__, seq_id_dst, err.what());
            refused.set(seq_id_dst);
        }
    }

    prompts[seq_id_dst].copy(prompts[seq_id_src], i0, i1);
    prompts[seq_id_dst].truncate(seq_pos_max(seq_id_dst) + 1);

    // what was copied ends before the prompt in the prompt part
    if (!is_ahead(seq_id_dst)) {
        leave_prompt_part(seq_id_dst);
    }

    refused [seq_id_dst] = refused [seq_id_dst] | refused [seq_id_src];
    restored[seq_id_dst] = restored[seq_id_dst] | restored[seq_id_src];

    set_phases({});
}

void lt_kv_cache::seq_keep(llama_seq_id seq_id) {
    kv_full     ->seq_keep(seq_id);
    kv_streaming->seq_keep(seq_id);

    if (kv_swa) {
        kv_swa->seq_keep(seq_id);
    }

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (s != seq_id && pos_full(s).empty()) {
            leave_prompt_part(s);
            forget(s);
        }
    }

    choose_anew();

    set_phases({});
}

void lt_kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    const auto map = [=](llama_pos p) { return p >= p0 && p < p1 ? p + shift : p; };

    if (shift != 0 && !can_map(seq_id, map)) {
        refuse(__func__, seq_id, p0, p1);
        return;
    }

    map_prompts(seq_id, map);

    for (auto * kv : { kv_full.get(), kv_streaming.get(), kv_prompt.get(), kv_swa.get() }) {
        if (kv) {
            kv->seq_add(seq_id, p0, p1, shift);
        }
    }

    forget_empty();
}

void lt_kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    const auto map = [=](llama_pos p) { return p >= p0 && p < p1 ? p / d : p; };

    if (d != 1 && !can_map(seq_id, map)) {
        refuse(__func__, seq_id, p0, p1);
        return;
    }

    map_prompts(seq_id, map);

    // note: not by llama_kv_cache::seq_div(), which turns the keys the wrong way
    for (auto * kv : { kv_full.get(), kv_streaming.get(), kv_prompt.get(), kv_swa.get() }) {
        if (kv) {
            lt_kv_ops::map(*kv, seq_id, map);
        }
    }

    forget_empty();
}
