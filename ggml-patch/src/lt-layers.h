#pragma once

#include "lt-kv-ops.h"

#include "ggml-cpp.h"

#include <map>
#include <memory>
#include <vector>

// layers [il_begin, il_end) that are computed for all of a prompt before the next ones, one of them streaming at most, or one that
// may come to stream
struct lt_run {
    int32_t il_begin;
    int32_t il_end;
    int32_t il_streaming; // -1: none
};

// the layers of a prompt that chooses them, see lt-kv-cache-queue.cpp
struct lt_queue {
    size_t n_full; // so many stay full in the end

    std::vector<float>   ratios; // [n_layer_all], NaN if not known yet
    std::vector<int32_t> full;   // those that have read the prompt and are not cut

    // the full part as it is to be: without memory for the layers that are still to come, or that have been cut. while the prompt is
    // read, the cache has it, and the one from before is here
    std::unique_ptr<llama_kv_cache> kv_full;

    // the streaming part: what the layers keep that have been cut. null before there is one
    std::unique_ptr<llama_kv_cache> kv_streaming;

    // what it has is memory of the full part from before, in which there was nothing
    bool is_lent = false;

    // memory of layers that have been cut, for those that are still to come
    std::vector<ggml_backend_buffer_ptr> spare;
};

// a prompt that is read layer by layer: all its ubatches pass a run of layers before the next run
//
// so the memory for what its tokens see in a streaming layer serves for all of them. between two runs the hidden states of all
// tokens are kept
struct lt_layers {
    llama_seq_id seq_id;
    uint32_t     n_tokens;

    std::vector<lt_run> runs;

    // the prompt part, whose layers have their keys and values in the same memory. while the prompt is read, the cache has it
    std::unique_ptr<llama_kv_cache>      kv;
    std::vector<ggml_backend_buffer_ptr> bufs;

    // null if the layers are fixed
    std::unique_ptr<lt_queue> queue;

    // what the streaming layers keep of the prompt, where the streaming part has no room for it besides what it holds. else null
    std::unique_ptr<llama_kv_cache> kv_kept;

    // the hidden states, F32 [n_embd, n_tokens]
    ggml_context_ptr        ctx_act;
    ggml_backend_buffer_ptr buf_act;
    ggml_tensor           * act = nullptr;

    // it is being read
    bool is_running = false;

    // its first position, and the tokens before it
    llama_pos begin  = 0;
    uint64_t  n_past = 0;

    size_t i_run = 0;

    // (cell of the streaming part, cell of the prompt part): what is held from before the prompt. with a queue, of the full parts
    lt_kv_ops::cell_pairs pairs_in;

    // (cell of the prompt part, or of the full part, cell of the streaming part or of kv_kept): what is kept at its end
    lt_kv_ops::cell_pairs pairs_out;

    const lt_run & run() const { return runs[i_run]; }

    bool is_last_run() const { return i_run + 1 == runs.size(); }

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;
};
