// lt-gguf: streaming layers with a sink-plus-window KV cache (LightTransfer, arXiv 2410.13846)
//
// A streaming layer lets the query at position q see the key at position p of the same sequence iff
//   p <= q && (p < sink || q - p < window)
// Which layers stream, the sink and the window come from the GGUF metadata "{arch}.attention.streaming.*", from the
// environment variable LT_STREAMING, or from lt_model_set_spec(); the later one wins. Without any of them nothing here
// changes what llama.cpp does.
//
// Specs are written as text, here and in LT_STREAMING:
//   off
//   layers=1,3,5-9;sink=4;window=1020;prefill=stream
// "layers" takes numbers, ranges, "all" or "none". Keys that are left out are taken from the file, else they are sink=4,
// window=1020 and prefill=stream.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

    enum lt_kv_part {
        LT_KV_FULL      = 0, // the layers with full attention
        LT_KV_STREAMING = 1, // the streaming layers
    };

    //
    // spec
    //

    // The spec of contexts that are made from this model from now on, as text in its canonical form ("off" if no layer
    // streams). Writes at most buf_size bytes with the terminating zero; returns the length without it, as snprintf does.
    LLAMA_API int32_t lt_model_spec(const struct llama_model * model, char * buf, size_t buf_size);

    // Override that spec. NULL goes back to what the file and LT_STREAMING say. Contexts that exist are not touched.
    // Returns false, changes nothing and writes one line to err (may be NULL) if the spec is malformed or this model
    // can't stream.
    LLAMA_API bool lt_model_set_spec(struct llama_model * model, const char * spec, char * err, size_t err_size);

    // The spec that this context runs with.
    LLAMA_API int32_t lt_context_spec(const struct llama_context * ctx, char * buf, size_t buf_size);

    //
    // what the KV cache holds
    //

    // Bytes allocated for K and V.
    LLAMA_API size_t lt_kv_bytes(const struct llama_context * ctx, enum lt_kv_part part);

    // Cells allocated for each KV stream (a unified cache has one stream, otherwise each sequence has its own).
    // 0 if the memory of this context is not a plain KV cache.
    LLAMA_API uint32_t lt_kv_cells(const struct llama_context * ctx, enum lt_kv_part part);

    // Positions of a sequence that a part holds, ascending. Writes at most n_max, returns how many there are;
    // -1 if the sequence doesn't exist or the memory of this context is not a plain KV cache.
    LLAMA_API int32_t lt_seq_positions(
            const struct llama_context * ctx,
                       enum lt_kv_part   part,
                          llama_seq_id   seq_id,
                             llama_pos * pos,
                               int32_t   n_max);

#ifdef __cplusplus
}
#endif
