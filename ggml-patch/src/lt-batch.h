#pragma once

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <vector>

// the tokens of one sequence in a batch
struct lt_batch_seq {
    llama_seq_id id;

    llama_pos begin;
    llama_pos end;

    uint32_t n_tokens;

    bool has_logits; // the last token asks for them

    bool is_prompt; // the sequence reads a prompt
    bool is_last;   // and this batch ends it
};

using lt_batch = std::vector<lt_batch_seq>;

// how a batch is processed: its ubatches, of which some use the streaming part and the others the prompt part
struct lt_ubatches {
    std::vector<llama_ubatch> all;
    std::vector<llama_ubatch> streaming; // none if no layer streams yet
    std::vector<llama_ubatch> prompt;

    std::vector<bool> in_prompt_part; // [all.size()]

    llama_kv_cache::slot_info_vec_t sinfos_full;
    llama_kv_cache::slot_info_vec_t sinfos_streaming;
    llama_kv_cache::slot_info_vec_t sinfos_prompt;
    llama_kv_cache::slot_info_vec_t sinfos_swa;
};
