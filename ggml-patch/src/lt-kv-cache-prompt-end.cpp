// the end of a prompt that was read with full attention: streaming layers keep sinks and window, in the cells that decoding reads

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"

#include "llama-impl.h"

#include <algorithm>
#include <iterator>

// note: a position can be there more than once, for the tokens of an image
static size_t lt_count(const lt_kv_cache::pos_set & held, llama_pos p) {
    return std::distance(held.lower_bound({ p, 0 }), held.lower_bound({ p + 1, 0 }));
}

// n free cells, those below n_near first. fewer if there are not so many
static std::vector<uint32_t> lt_find_near_cells(const llama_kv_cache & kv, uint32_t strm, uint32_t n_near, size_t n) {
    auto res = lt_kv_ops::find_cells(kv, strm, 0, n_near, n);

    if (res.size() < n) {
        const auto far = lt_kv_ops::find_cells(kv, strm, n_near, UINT32_MAX, n - res.size());
        res.insert(res.end(), far.begin(), far.end());
    }

    return res;
}

void lt_kv_cache::finish(const std::vector<llama_seq_id> & seq_ids) {
    cell_map copied;

    for (const llama_seq_id s : seq_ids) {
        if (!in_prompt_part[s]) {
            compact(kv_streaming->get_stream(s));
        } else if (copy_back(s, copied)) {
            leave_prompt_part(s);
        } else {
            // it works from where it is
            LLAMA_LOG_WARN("%s: sequence %d: the memory for its prompt is kept\n", __func__, s);
            kv_streaming->seq_rm(s, -1, -1);
        }
    }
}

bool lt_kv_cache::copy_back(llama_seq_id seq_id, cell_map & copied) {
    const uint32_t strm = kv_streaming->get_stream(seq_id);

    make_room(seq_id, mask.n_sink + mask.n_window);

    const auto & src = lt_kv_ops::cells(*kv_prompt, 0);

    const pos_set & pos_src = src.seq_pos_get(seq_id);

    const auto is_kept = [&](llama_pos p) {
        return p < (llama_pos) mask.n_sink || p >= src.seq_pos_max(seq_id) + 1 - (llama_pos) mask.n_back;
    };

    // what the streaming part has of the time before the prompt stays where it is, as far as it is kept
    const pos_set held = kv_streaming->get_cells(seq_id).seq_pos_get(seq_id);
    for (const auto & [p, i] : held) {
        if (!is_kept(p) || lt_count(held, p) != lt_count(pos_src, p)) {
            lt_kv_ops::cells(*kv_streaming, strm).seq_rm(i, seq_id);
        }
    }

    std::vector<uint32_t> missing;
    std::vector<uint32_t> shared; // with a sequence that has been copied back
    for (const auto & [p, i] : pos_src) {
        if (is_kept(p) && lt_count(kv_streaming->get_cells(seq_id).seq_pos_get(seq_id), p) == 0) {
            (copied.count({ strm, i }) ? shared : missing).push_back(i);
        }
    }

    const auto find_free = [&] {
        return lt_find_near_cells(*kv_streaming, strm, std::min(mask.n_cells_decode, kv_streaming->get_size()), missing.size());
    };

    auto free = find_free();
    if (free.size() < missing.size()) {
        try {
            grow_streaming_part(kv_streaming->get_size() + missing.size() - free.size());
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
            return false;
        }

        free = find_free();
    }

    auto & dst = lt_kv_ops::cells(*kv_streaming, strm);

    for (const uint32_t i : shared) {
        dst.seq_add(copied[{ strm, i }], seq_id);
    }

    lt_kv_ops::cell_pairs pairs;
    for (const uint32_t i : missing) {
        const uint32_t i_dst = free[pairs.size()];

        lt_kv_ops::copy_cell(src, i, dst, i_dst);
        dst.seq_add(i_dst, seq_id);

        copied[{ strm, i }] = i_dst;
        pairs.push_back({ i, i_dst });
    }

    if (!pairs.empty()) {
        lt_kv_ops::set_head(*kv_streaming, strm, pairs.back().second + 1);
    }

    lt_kv_ops::copy_data(*kv_prompt, 0, *kv_streaming, strm, pairs);

    return true;
}

void lt_kv_cache::compact(uint32_t strm) {
    auto & cells = lt_kv_ops::cells(*kv_streaming, strm);

    const uint32_t n_near = std::min(mask.n_cells_decode, cells.size());

    std::vector<uint32_t> far;
    for (uint32_t i = n_near; i < cells.size(); ++i) {
        if (cells.is_empty(i)) {
            continue;
        }

        if (mask.is_dead(cells, i)) {
            cells.rm(i);
        } else {
            far.push_back(i);
        }
    }

    const auto near = lt_kv_ops::find_cells(*kv_streaming, strm, 0, n_near, far.size());

    lt_kv_ops::cell_pairs pairs;

    for (size_t j = 0; j < near.size(); ++j) {
        lt_kv_ops::copy_cell(cells, far[j], cells, near[j]);
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (cells.seq_has(far[j], s)) {
                cells.seq_add(near[j], s);
            }
        }
        cells.rm(far[j]);

        pairs.push_back({ far[j], near[j] });
    }

    if (!near.empty()) {
        lt_kv_ops::set_head(*kv_streaming, strm, near.back() + 1);
    }

    lt_kv_ops::copy_data(*kv_streaming, strm, *kv_streaming, strm, pairs);
}
