#pragma once

#include "lt.h"

#include <algorithm>
#include <string>

// what llama-server asks the contexts of a slot: that of the model, and that of its draft, of which either can have streaming layers
struct lt_contexts {
    llama_context * tgt;
    llama_context * dft; // can be null

    static bool is_streaming(const llama_context * ctx) {
        return ctx && lt_kv_cells(ctx, LT_KV_STREAMING) > 0;
    }

    bool is_streaming() const {
        return is_streaming(tgt) || is_streaming(dft);
    }

    // whether all from position p0 on can be removed
    bool can_rm(llama_seq_id seq_id, llama_pos p0) const {
        return
            (!is_streaming(tgt) || lt_seq_can_rm(tgt, seq_id, p0)) &&
            (!is_streaming(dft) || lt_seq_can_rm(dft, seq_id, p0));
    }

    bool can_checkpoint(llama_seq_id seq_id) const {
        return lt_seq_can_checkpoint(tgt, seq_id) && (!dft || lt_seq_can_checkpoint(dft, seq_id));
    }

    // announce a prompt. one token is not worth it
    // returns why it can't be read, empty if it can
    std::string begin_prompt(llama_seq_id seq_id, int32_t n_tokens) const {
        char err[512];

        for (llama_context * ctx : { tgt, dft }) {
            if (ctx && n_tokens > 1 && !lt_prompt_begin(ctx, seq_id, n_tokens, err, sizeof(err))) {
                return err;
            }
        }

        return {};
    }

    // what a context shift may keep and discard of n_past tokens
    void clamp_shift(int32_t n_past, int & n_keep, int & n_discard) const {
        for (const llama_context * ctx : { tgt, dft }) {
            if (ctx) {
                lt_clamp_shift(ctx, n_past, &n_keep, &n_discard);
            }
        }
    }
};
