#pragma once

#include "llama-kv-cells.h"

#include <algorithm>
#include <array>

// which cells of a streaming layer a query sees
// note: n_sink counts positions - the learned per-head attention sinks of some models (gpt-oss) are something else
struct lt_mask {
    uint32_t n_sink   = 0;
    uint32_t n_window = 0; // 0: not the cache of streaming layers

    // for each sequence the position that it may yet be rolled back to, can be null
    const std::array<llama_pos, LLAMA_MAX_SEQ> * pos_rollback = nullptr;

    bool enabled() const {
        return n_window > 0;
    }

    // the key at position p0 is hidden from the query at position p1
    // note: a hidden key stays hidden from all later queries, this is what makes its cell reusable
    bool is_masked(llama_pos p0, llama_pos p1) const {
        return p0 >= (llama_pos) n_sink && p1 - p0 >= (llama_pos) n_window;
    }

    // the cell is hidden from the next token of every sequence that it belongs to
    // note: with a unified cache, a cell can belong to several sequences (see seq_cp()), each at a different position
    bool is_masked_for_all(const llama_kv_cells & cells, uint32_t i) const {
        const llama_pos p0 = cells.pos_get(i);

        if (cells.seq_count(i) == 1) {
            return is_masked(p0, pos_next(cells, cells.seq_get(i)));
        }

        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (cells.seq_has(i, s) && !is_masked(p0, pos_next(cells, s))) {
                return false;
            }
        }

        return true;
    }

private:
    llama_pos pos_next(const llama_kv_cells & cells, llama_seq_id s) const {
        const llama_pos p = cells.seq_pos_max(s) + 1;

        return pos_rollback ? std::min(p, (*pos_rollback)[s]) : p;
    }
};
