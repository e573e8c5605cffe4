#pragma once

#include "lt-spec.h"

#include "llama-kv-cells.h"

#include <algorithm>
#include <array>
#include <limits>

// the end of a range of positions that has none
static constexpr llama_pos LT_POS_END = std::numeric_limits<llama_pos>::max();

// decoding keeps room for a draft of so many tokens besides what it sees
static constexpr uint32_t LT_N_SPARE = 64;

// what the sequences of a cache are doing, as far as the mask depends on it
struct lt_phases {
    // the first position behind the sinks that the tokens of the prompt in progress see. -1: the sequence decodes
    std::array<llama_pos, LLAMA_MAX_SEQ> first;

    // the position that the sequence may yet be rolled back to, until its next batch. LT_POS_END: it will not be
    std::array<llama_pos, LLAMA_MAX_SEQ> rollback;

    lt_phases() {
        first   .fill(-1);
        rollback.fill(LT_POS_END);
    }
};

// which cells of a streaming layer a query sees
// note: n_sink counts positions - the learned per-head attention sinks of some models (gpt-oss) are something else
struct lt_mask {
    uint32_t n_sink   = 0;
    uint32_t n_window = 0; // 0: not the cache of streaming layers

    // how far back a token at the next position sees, whatever it is: a decoded one n_window - 1 positions, the first of a prompt
    // that is read with full attention n_window. one more where it can have the last position once more, as in an image (M-RoPE)
    uint32_t n_back = 0;

    // decoding takes cells below this one while there are any
    uint32_t n_cells_decode = 0;

    // of layers with a sliding window of their own: it is there while a prompt is read, too
    bool is_own = false;

    // and of some (Llama 4) it is not the last n_window positions, but those from the last multiple of n_window on
    bool is_chunked = false;

    const lt_phases * phases = nullptr;

    bool enabled() const {
        return n_window > 0;
    }

    // the key at position p0 is hidden from the query at position p1
    bool is_masked(llama_seq_id s, llama_pos p0, llama_pos p1) const {
        if (p0 < (llama_pos) n_sink) {
            return false;
        }

        if (is_chunked) {
            return p0 < chunk_begin(p1);
        }

        return in_prompt(s) ? p0 < phases->first[s] : p1 - p0 >= (llama_pos) n_window;
    }

    // behind the sinks, the first position that a decoded token at position q sees, or the first one of a prompt
    llama_pos first_visible(llama_pos q) const {
        return is_chunked ? chunk_begin(q) : q - (llama_pos) n_back;
    }

    // the cell is hidden from all tokens of sequence s to come
    // note: a hidden key stays hidden from all later queries, this is what makes its cell reusable
    bool is_dead(const llama_kv_cells & cells, uint32_t i, llama_seq_id s) const {
        const llama_pos p0 = cells.pos_get(i);

        return p0 >= (llama_pos) n_sink && p0 < first_visible(cells, s);
    }

    // the cell is dead for every sequence that it belongs to
    // note: with a unified cache, a cell can belong to several sequences (see seq_cp()), each at a different position
    bool is_dead(const llama_kv_cells & cells, uint32_t i) const {
        if (cells.seq_count(i) == 1) {
            return is_dead(cells, i, cells.seq_get(i));
        }

        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (cells.seq_has(i, s) && !is_dead(cells, i, s)) {
                return false;
            }
        }

        return true;
    }

    // a saved state does not need the cell. s = -1: that of all sequences
    // note: it keeps one position more than the next token sees, because llama-server goes back by one after it restores a state
    bool is_spare(const llama_kv_cells & cells, uint32_t i, llama_seq_id s) const {
        const llama_pos p0 = cells.pos_get(i);

        if (p0 < (llama_pos) n_sink) {
            return false;
        }

        for (llama_seq_id cur = std::max(s, 0); cur < (s < 0 ? LLAMA_MAX_SEQ : s + 1); ++cur) {
            if (cells.seq_has(i, cur) && p0 + 1 >= first_visible(cells, cur)) {
                return false;
            }
        }

        return true;
    }

private:
    bool in_prompt(llama_seq_id s) const {
        return !is_own && phases->first[s] >= 0;
    }

    llama_pos chunk_begin(llama_pos q) const {
        return q - q % (llama_pos) n_window;
    }

    // behind the sinks, the first position that the next token of the sequence sees
    llama_pos first_visible(const llama_kv_cells & cells, llama_seq_id s) const {
        if (in_prompt(s)) {
            return phases->first[s];
        }

        return first_visible(std::min(cells.seq_pos_max(s) + 1, phases->rollback[s]));
    }
};

// what a KV cache is made with here, beside upstream's parameters
struct lt_kv_params {
    lt_mask mask;
    lt_kept kept;

    // each layer has a buffer of its own, so that layers can be given back one by one
    bool layer_buffers = false;
};
