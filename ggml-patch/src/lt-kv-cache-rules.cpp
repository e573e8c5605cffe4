// what may be done to a sequence without a dropped position becoming visible again, see lt-kv-cache.h

#include "lt-kv-cache.h"

#include "llama-impl.h"

#include <algorithm>

bool lt_kv_cache::is_subset(llama_seq_id seq_id, const pos_set & s) const {
    const auto & f = pos_full(seq_id);

    auto it_f = f.begin();
    for (const auto & [p, _] : s) {
        while (it_f != f.end() && it_f->first < p) {
            ++it_f;
        }
        if (it_f == f.end() || it_f->first != p) {
            return false;
        }
        ++it_f;
    }

    return true;
}

bool lt_kv_cache::is_ahead(llama_seq_id seq_id) const {
    if (!in_prompt_part[seq_id] || !kv_prompt) {
        return false;
    }

    // note: where both end at the same position, the streaming part holds no less
    return kv_prompt->seq_pos_max(seq_id) > kv_streaming->seq_pos_max(seq_id);
}

bool lt_kv_cache::holds(llama_seq_id seq_id, const pos_set & s, llama_pos p0, llama_pos p1) const {
    if (p0 >= p1) {
        return true;
    }

    const auto & f = pos_full(seq_id);

    auto it_f = f.lower_bound({ p0, 0 });
    auto it_s = s.lower_bound({ p0, 0 });

    for (; it_f != f.end() && it_f->first < p1; ++it_f, ++it_s) {
        if (it_s == s.end() || it_s->first != it_f->first) {
            return false;
        }
    }

    return it_s == s.end() || it_s->first >= p1;
}

llama_pos lt_kv_cache::first_visible(const lt_prompts & prompts, llama_pos q) const {
    const lt_prompt * prompt = prompts.find(q);

    return prompt ? prompt->first : mask.first_visible(q);
}

bool lt_kv_cache::holds_all(llama_seq_id seq_id, const pos_set & s, llama_pos n_sink, llama_pos first, llama_pos q, llama_pos p0, llama_pos p1) const {
    return
        holds(seq_id, s, 0,                   std::min(n_sink, p0)) &&
        holds(seq_id, s, std::min(p1, n_sink), n_sink) &&
        holds(seq_id, s, first,               std::min(q, p0)) &&
        holds(seq_id, s, std::max(first, p1), q);
}

bool lt_kv_cache::holds_visible(llama_seq_id seq_id, const pos_set & s, llama_pos q, llama_pos p0, llama_pos p1) const {
    const llama_pos sink  = std::min((llama_pos) mask.n_sink, q);
    const llama_pos first = std::max(sink, first_visible(prompts[seq_id], q));

    return holds_all(seq_id, s, sink, first, q, p0, p1);
}

void lt_kv_cache::for_each_dropped(llama_seq_id seq_id, const pos_set & s, const std::function<void(llama_pos, uint32_t)> & visit) const {
    auto it_s = s.begin();
    for (const auto & [p, i] : pos_full(seq_id)) {
        if (it_s != s.end() && it_s->first == p) {
            ++it_s;
        } else {
            visit(p, i);
        }
    }
}

bool lt_kv_cache::is_shared_alike(llama_seq_id seq_id, llama_pos p, uint32_t i) const {
    const auto cell = [&](const pos_set & pos) {
        const auto it = pos.lower_bound({ p, 0 });

        return it != pos.end() && it->first == p ? (int64_t) it->second : -1;
    };

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (!kv_full->get_cells(seq_id).seq_has(i, s)) {
            continue;
        }

        if (is_ahead(s) != is_ahead(seq_id) || cell(pos_streaming(s)) != cell(pos_streaming(seq_id)) || cell(pos_swa(s)) != cell(pos_swa(seq_id))) {
            return false;
        }
    }

    return true;
}

lt_prompts lt_kv_cache::mapped_prompts(llama_seq_id s, const pos_map_cell & map_cell) const {
    const auto & f = pos_full(s);

    const auto map_first = [&](llama_pos p) -> llama_pos {
        const auto it = f.lower_bound({ p, 0 });

        return it == f.end() ? -1 : std::max(0, map_cell(it->first, it->second));
    };

    const auto map_last = [&](llama_pos p) -> llama_pos {
        const auto it = f.lower_bound({ p, 0 });

        return it == f.begin() ? -1 : map_cell(std::prev(it)->first, std::prev(it)->second) + 1;
    };

    lt_prompts res = prompts[s];
    res.map(map_first, map_last);

    return res;
}

void lt_kv_cache::map_prompts(llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map) {
    const auto & cells = kv_full->get_cells(seq_id);

    const auto map_cell = [&](llama_pos p, uint32_t i) {
        return cells.seq_has(i, seq_id) ? map(p) : p;
    };

    chosen_end = 0; // it has moved, too

    phases.rollback[seq_id] = LT_POS_END;

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (kv_full->get_stream(s) == kv_full->get_stream(seq_id)) {
            prompts[s] = mapped_prompts(s, map_cell);
        }
    }
}

bool lt_kv_cache::can_map(llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map) const {
    if (refused[seq_id]) {
        return false;
    }

    const auto & cells = kv_full->get_cells(seq_id);

    const auto map_cell = [&](llama_pos p, uint32_t i) {
        return cells.seq_has(i, seq_id) ? map(p) : p;
    };

    // the cells of a part move for all sequences that share them, so both parts must be shared by the same ones
    for (const auto & [p, i] : pos_full(seq_id)) {
        if (cells.seq_count(i) > 1 && map(p) != p && !is_shared_alike(seq_id, p, i)) {
            return false;
        }
    }

    bool res = true;

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (kv_full->get_stream(s) != kv_full->get_stream(seq_id)) {
            continue;
        }

        llama_pos q = 0;
        for (const auto & [p, i] : pos_full(s)) {
            q = std::max(q, map_cell(p, i) + 1);
        }

        const llama_pos first = first_visible(mapped_prompts(s, map_cell), q);

        for_each_dropped(s, pos_streaming(s), [&](llama_pos p, uint32_t i) {
            const llama_pos p_new = map_cell(p, i);

            res = res && (p_new < 0 || (p_new >= (llama_pos) mask.n_sink && p_new < first));
        });

        res = res && hides_dropped_swa(s, q, 0, LT_POS_END, map_cell);
    }

    return res;
}

bool lt_kv_cache::can_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) const {
    // note: what one of them has in the prompt part would have to be copied for the other
    if (!pos_full(seq_id_dst).empty() && is_ahead(seq_id_src) != is_ahead(seq_id_dst)) {
        return false;
    }

    llama_pos q = kv_full->seq_pos_max(seq_id_dst) + 1;
    for (const auto & [p, _] : pos_full(seq_id_src)) {
        if (p >= p0 && p < p1) {
            q = std::max(q, p + 1);
        }
    }

    const auto & s = pos_full(seq_id_dst).empty() ? pos_streaming_until(seq_id_src, q - 1) : pos_streaming(seq_id_src);

    lt_prompts copied = prompts[seq_id_dst];
    copied.copy(prompts[seq_id_src], p0, p1);
    copied.truncate(q);

    const llama_pos first = first_visible(copied, q);

    bool res = true;
    for_each_dropped(seq_id_src, s, [&](llama_pos p, uint32_t) {
        res = res && (p < p0 || p >= p1 || (p >= (llama_pos) mask.n_sink && p < first));
    });

    return res && hides_dropped_swa(seq_id_src, q, p0, p1, [](llama_pos p, uint32_t) { return p; });
}

bool lt_kv_cache::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & f = pos_full(seq_id);

    if (f.empty()) {
        // note: what a refused seq_cp() left empty stays refused until it is removed as a whole
        return !refused[seq_id] || (p0 == 0 && p1 == LT_POS_END);
    }

    // note: llama-cpp-python removes all that follows before each token, which is nothing as a rule
    const auto it_rm = f.lower_bound({ p0, 0 });
    if ((it_rm == f.end() || it_rm->first >= p1) && !restored[seq_id]) {
        return !refused[seq_id];
    }

    // the last position that remains
    llama_pos p_last = f.rbegin()->first;
    if (p_last >= p0 && p_last < p1) {
        if (it_rm == f.begin()) {
            return true; // nothing remains
        }
        p_last = std::prev(it_rm)->first;
    }

    // the layers were chosen for a prompt that would lose its end
    if (p1 == LT_POS_END && p_last + 1 < chosen_end) {
        return false;
    }

    return !refused[seq_id] && holds_visible(seq_id, pos_streaming_until(seq_id, p_last), p_last + 1, p0, p1) && holds_swa(seq_id, p_last + 1, p0, p1);
}

void lt_kv_cache::clamp_shift(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const {
    clamp_shift_streaming(n_past, n_keep, n_discard);
    clamp_shift_swa      (n_past, n_keep, n_discard);
}

void lt_kv_cache::clamp_shift_streaming(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const {
    const int32_t n_sink = mask.n_sink;
    const int32_t n_back = mask.n_back;

    if (all_kept || n_past <= n_sink + n_back) {
        return; // nothing has been dropped
    }

    n_keep = std::max(n_keep, n_sink);

    // what has been dropped behind the sinks must not come so near to the end that it would be visible again
    const int32_t n_max = n_past - n_keep - n_back;

    if (n_keep == n_sink || n_discard <= n_max) {
        n_discard = std::min(n_discard, n_past - n_keep - 1);
        return;
    }

    // note: where next to nothing could be discarded, the context would shift again at once
    if (n_max >= n_discard/4) {
        n_discard = n_max;
    } else {
        n_keep    = n_sink;
        n_discard = (n_past - n_keep)/2;
    }
}

void lt_kv_cache::refuse(const char * func, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    LLAMA_LOG_ERROR("%s: sequence %d: refused for the positions [%d, %d): tokens that the streaming layers%s have dropped would become visible again (sink = %u, window = %u), or what it shares with another sequence would move in some layers only. "
            "To shift the context, keep at least the first %u tokens (n_keep >= sink). The sequence can't be continued before it is removed and processed again\n",
            func, seq_id, p0, p1, kv_swa ? ", or those with a window of their own," : "", mask.n_sink, mask.n_window, mask.n_sink);

    refused.set(seq_id);
}

bool lt_kv_cache::can_decode(llama_seq_id seq_id) {
    if (refused[seq_id]) {
        LLAMA_LOG_ERROR("%s: sequence %d can't be continued: an operation on it was refused, remove the sequence and process it again\n", __func__, seq_id);
        return false;
    }

    if (restored[seq_id]) {
        const bool is_whole =
            is_subset(seq_id, pos_streaming(seq_id)) && holds_visible(seq_id, pos_streaming(seq_id), seq_pos_max(seq_id) + 1, LT_POS_END, LT_POS_END) &&
            is_subset(seq_id, pos_swa(seq_id))       && holds_swa    (seq_id,                        seq_pos_max(seq_id) + 1, LT_POS_END, LT_POS_END);

        if (!is_whole) {
            LLAMA_LOG_ERROR("%s: sequence %d can't be continued: it ends at position %d and the state that was restored into it at %d, remove what follows that position\n",
                    __func__, seq_id, seq_pos_max(seq_id), kv_streaming->seq_pos_max(seq_id));
            return false;
        }

        restored.reset(seq_id);
    }

    return true;
}
