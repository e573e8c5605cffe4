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
//   off;cache_keep=0
//   layers=1,3,5-9;sink=4;window=1020;prefill=stream;type=f16
//   auto=0.5;sink=4;window=1020;w_last=16;lazy=min
//   hide=1,3,5-9;sink=4;window=1020;prefill=full
// "auto" lets each conversation choose its layers: the first prompt that is longer than sink + window is read with full attention
// in all layers, and that share of them whose lazy ratio is the highest streams from its end on, until all tokens are removed.
// "lazy" says what that ratio is, see lt_lazy_ratios(). "hide" is for measuring: see lt_context_hide(). "layers" and "hide" take
// numbers, ranges, "all" (that may stream) or "none". "type" is that of the streaming layers' KV cache; left out, it is the type of the other layers'
// where that isn't quantized, else f16. "cache_keep" names layers whose KV cache is f16 where it would be quantized, whether they
// stream or not; it goes with every form, and alone it leaves to the file what streams. Other keys that are left out are taken from
// the file, else they are sink=4, window=1020, prefill=full, w_last=16 and lazy=min.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

    enum lt_kv_part {
        LT_KV_FULL      = 0, // the layers with full attention
        LT_KV_STREAMING = 1, // the streaming layers
        LT_KV_PROMPT    = 2, // the streaming layers, as long as a long prompt is read with full attention
        LT_KV_SWA       = 3, // the layers with a sliding window of their own, in a context with streaming layers
    };

    //
    // spec
    //

    // The spec of contexts that this thread makes from this model from now on, as text in its canonical form ("off" if no layer
    // streams). Writes at most buf_size bytes with the terminating zero; returns the length without it, as snprintf does.
    LLAMA_API int32_t lt_model_spec(const struct llama_model * model, char * buf, size_t buf_size);

    // Override that spec. NULL goes back to what the file and LT_STREAMING say. Contexts that exist are not touched, and what other
    // threads make of this model isn't either.
    // Returns false, changes nothing and writes one line to err (may be NULL) if the spec is malformed or this model
    // can't stream.
    LLAMA_API bool lt_model_set_spec(struct llama_model * model, const char * spec, char * err, size_t err_size);

    // Which layers of the model may stream: those with full attention. Writes at most n, returns the number of layers.
    LLAMA_API int32_t lt_model_may_stream(const struct llama_model * model, bool * layers, int32_t n);

    // Whether the models that this thread loads from now on are drafts of others. No layer of them streams, whatever their files and
    // LT_STREAMING say: a draft is rolled back further than a streaming layer can be.
    LLAMA_API void lt_load_drafts(bool is_draft);

    // Whether contexts that are made from now on compute attention with few queries on the CPU faster than llama.cpp does, whatever
    // their model: with other roundings. Else those do whose layers stream. The variable LT_ATTENTION (on, off) decides before this.
    LLAMA_API void lt_set_attention(bool for_all);

    // The spec that this context runs with.
    LLAMA_API int32_t lt_context_spec(const struct llama_context * ctx, char * buf, size_t buf_size);

    // For measuring: of a context that was made with a spec of the form "hide=...", what these layers hide from now on, given as such a
    // spec. Its KV cache keeps everything in all layers, and tokens are computed as if these layers streamed: they don't see what would
    // have been dropped. So a prompt that is read once serves for every choice of layers, sinks and window: of each, a few tokens are
    // decoded and then removed again. What was computed before stays as it was computed.
    // Returns false, changes nothing and writes one line to err (may be NULL) if the spec is malformed or the context is another one.
    LLAMA_API bool lt_context_hide(struct llama_context * ctx, const char * spec, char * err, size_t err_size);

    // Make a context shift one that is possible: of n_past tokens the first n_keep stay, and the n_discard ones that follow are
    // removed. Without streaming layers it changes nothing.
    LLAMA_API void lt_clamp_shift(const struct llama_context * ctx, int32_t n_past, int32_t * n_keep, int32_t * n_discard);

    // For measuring speed at a depth: append n_tokens tokens to the sequence as if they had been computed. Their cells are taken, streaming
    // layers drop what they would drop, but keys and values are whatever the cells held (zeros, in a new context). Nothing that is
    // computed afterwards means anything; how long it takes does.
    // Returns false and writes one line to err (may be NULL) if they don't fit, or if the context chooses its layers by a prompt: there is
    // none then. The sequence may have grown.
    LLAMA_API bool lt_fill(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens, char * err, size_t err_size);

    //
    // what the KV cache holds
    //

    // Bytes allocated for K and V. Of a model that was loaded with no_alloc: what would be allocated, for LT_KV_PROMPT by the longest
    // prompt.
    LLAMA_API size_t lt_kv_bytes(const struct llama_context * ctx, enum lt_kv_part part);

    // Cells allocated for each KV stream (a unified cache has one stream, otherwise each sequence has its own).
    // 0 if the memory of this context is not a plain KV cache.
    LLAMA_API uint32_t lt_kv_cells(const struct llama_context * ctx, enum lt_kv_part part);

    // Positions of a sequence that a part holds, ascending; for LT_KV_STREAMING what the streaming layers of the sequence hold,
    // in whichever part. Writes at most n_max, returns how many there are; -1 if the sequence doesn't exist or the memory
    // of this context is not a plain KV cache.
    LLAMA_API int32_t lt_seq_positions(
            const struct llama_context * ctx,
                       enum lt_kv_part   part,
                          llama_seq_id   seq_id,
                             llama_pos * pos,
                               int32_t   n_max);

    // Whether llama_memory_seq_rm(mem, seq_id, p0, -1) would succeed. false for contexts without streaming layers.
    LLAMA_API bool lt_seq_can_rm(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0);

    // Whether a partial state of the sequence (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) is small and can be restored later: false in the
    // middle of a long prompt that is read with full attention, and before the layers have been chosen for the prompt.
    LLAMA_API bool lt_seq_can_checkpoint(const struct llama_context * ctx, llama_seq_id seq_id);

    //
    // prompts, where prefill = full
    //
    // A batch belongs to a prompt of a sequence if the sequence's previous batch ended without asking for logits, or if some of
    // its own tokens of that sequence don't ask for them. The prompt ends with a batch whose last token asks for logits.
    // Its tokens see, in streaming layers, the sinks, the last window positions before the prompt and all of the prompt.
    //

    // Announce that the next n_tokens tokens of the sequence are a prompt, whatever logits they ask for, so that room is made for
    // all of it at once. Optional. Removing tokens of the sequence or restoring a state takes it back.
    // Returns false, changes nothing and writes one line to err (may be NULL) if the prompt doesn't fit the context or
    // the limit. Without streaming layers or with prefill = stream it does nothing and returns true.
    LLAMA_API bool lt_prompt_begin(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens, char * err, size_t err_size);

    // A prompt that is longer than sinks and window, and that begins and ends in one batch of one sequence, is read layer by layer: all
    // of it passes some layers, of which one streams, before the next ones. So LT_KV_PROMPT is what one streaming layer needs, and
    // the hidden states of all tokens. If reading it fails or is aborted, nothing of the prompt stays. Layers whose graph can't be cut
    // between them, and prompts that ask for the logits of all tokens, are read as if they came in several batches.

    // Whether a prompt of so many tokens would be read so and fits the limit, if it came in one batch and nothing else were being read.
    // Of a prompt that is being read: if it were read again from its beginning.
    LLAMA_API bool lt_fits_by_layer(const struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens);

    // Whether the prompt that was announced last is of this sequence and will be read so, if it comes in one batch.
    LLAMA_API bool lt_seq_by_layer(const struct llama_context * ctx, llama_seq_id seq_id);

    // Most tokens of a batch of this context from now on: a longer prompt is not read so. It takes no memory.
    LLAMA_API void lt_set_n_batch(struct llama_context * ctx, uint32_t n_batch);

    // Called while a batch is computed, each time some of its tokens have passed some layers, with the share of its work that is done.
    // Returning false before all of it is done ends the batch: llama_decode() returns -3, and what an abort leaves is there.
    typedef bool (*lt_progress_callback)(float progress, void * user_data);

    // From now on; NULL: no more. Without streaming layers it is not called.
    LLAMA_API void lt_set_progress(struct llama_context * ctx, lt_progress_callback callback, void * user_data);

    // Most bytes of LT_KV_PROMPT, 0: no limit. At first what the environment variable LT_PROMPT_LIMIT says, in MiB.
    LLAMA_API void lt_set_prompt_limit(struct llama_context * ctx, size_t n_bytes);

    // Whether a prompt of the sequence is being read.
    LLAMA_API bool lt_seq_in_prompt(const struct llama_context * ctx, llama_seq_id seq_id);

    //
    // lazy layers, where they are chosen for the prompt ("auto=0.5")
    //

    // The lazy ratio of each layer, measured at the end of the last prompt that layers were chosen for: of the attention mass that a
    // head's query has on the first sink and the last window positions, the mean over the last w_last queries and all heads
    // ("lazy=mean", as in the paper) or the smallest ("lazy=min").
    // Writes at most n, returns the number of layers; 0 if nothing has been measured.
    LLAMA_API int32_t lt_lazy_ratios(const struct llama_context * ctx, float * ratios, int32_t n);

    //
    // crashes
    //

    // From now on a crash of this process (SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT) writes to a file descriptor what was being
    // done, the text "about", and which functions of which library it happened in. Then the handler that was there before gets the
    // signal, or the process ends by it. Called again it only replaces descriptor and text. Without a call no handler is installed.
    LLAMA_API void lt_crash_report(int fd, const char * about);

    // What is being done from now on, by whichever thread, as in "reading a prompt". Texts are copied, and cut at 4,095 bytes.
    LLAMA_API void lt_crash_step(const char * step);

#ifdef __cplusplus
}

struct lt_drafts_scope {
    lt_drafts_scope() { lt_load_drafts(true);  }
   ~lt_drafts_scope() { lt_load_drafts(false); }
};
#endif
