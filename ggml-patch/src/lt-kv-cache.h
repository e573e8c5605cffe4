#pragma once

#include "lt-batch.h"
#include "lt-lazy-ratio.h"
#include "lt-mask.h"
#include "lt-prompts.h"
#include "lt-spec.h"

#include "llama-hparams.h"
#include "llama-kv-cache.h"

#include <array>
#include <bitset>
#include <functional>
#include <map>
#include <memory>
#include <vector>

struct llama_cparams;
struct llm_graph_params;
struct lt_layers;
struct lt_run;

class lt_kv_cache_context;

// the prompt part, and a streaming part that has grown, have a multiple of so many cells
static constexpr uint32_t LT_PART_PAD = 256;

//
// lt_kv_cache
//

// utilizes instances of llama_kv_cache, in the shape of llama_kv_cache_iswa
//   the full part holds all positions, for the layers with full attention
//   the streaming part holds the first n_sink and the last n_window positions, for the streaming layers
//   the prompt part exists while a long prompt is read with full attention (prefill = full). it holds what the tokens of such
//     prompts see in the streaming layers, for all sequences together. what the streaming part needs of it is copied at the end
//   the SWA part exists where the model has layers with a sliding window of their own, for these. none of them streams
//
// notation: of a sequence, F are the positions in the full part and S those held for its streaming layers (a subset of F)
//   the positions F \ S have been dropped. no token to come may see a dropped position: operations that would break
//   this are refused. seq_rm() then returns false, the others leave the sequence unusable until it is removed. the same holds for
//   what the SWA part has dropped

class lt_kv_cache : public llama_memory_i {
public:
    // filter: the layers that have a KV cache in this context, can be null
    lt_kv_cache(
            const llama_model         & model,
            const lt_spec             & spec,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
            const layer_filter_cb     & filter);

    ~lt_kv_cache();

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // the smallest position p such that the sequence can be rolled back to p + llama_model_n_swa() and to all that follows
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // the prompt part alone. where it is asked what would be needed (no_alloc, --fit), what the longest prompt would take
    std::map<ggml_backend_buffer_type_t, size_t> prompt_breakdown() const;

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // lt_kv_cache specific API
    //

    void lt_set_context(llama_context * lctx) override;

    const lt_spec & get_spec() const;
    const lt_mask & get_mask() const;

    // of a cache whose layers only hide: what they hide from now on
    void hide(const lt_spec & spec);

    llama_kv_cache * get_full()      const;
    llama_kv_cache * get_streaming() const;
    llama_kv_cache * get_prompt()    const; // null if no long prompt is being read
    llama_kv_cache * get_swa()       const; // null if no layer has a window of its own

    // changes when a graph that was built for this cache can't be used any more
    uint64_t get_generation() const;

    // the positions that are held for the streaming layers of a sequence
    using pos_set = std::set<std::pair<llama_pos, uint32_t>>;

    const pos_set & pos_streaming(llama_seq_id seq_id) const;

    // the same, and what the streaming part still has of the time before a prompt in the prompt part. ascending
    std::vector<llama_pos> get_held(llama_seq_id seq_id) const;

    // whether seq_rm() would succeed
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // make a context shift one that seq_rm() and seq_add() do
    void clamp_shift(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const;

    // whether a partial state of the sequence is small, and can be restored later
    bool can_checkpoint(llama_seq_id seq_id) const;

    // prompts

    bool is_in_prompt     (llama_seq_id seq_id) const; // one is being read
    bool is_in_prompt_part(llama_seq_id seq_id) const; // and it has left the streaming part

    // the next n_tokens tokens of the sequence are a prompt. throws std::runtime_error if they don't fit
    void begin_prompt(llama_seq_id seq_id, uint32_t n_tokens);

    // most bytes of the prompt part, 0: no limit
    void set_prompt_limit(size_t n_bytes);

    // layers that are chosen for the prompt

    // all layers keep all positions
    bool keeps_all() const;

    lt_lazy_ratio * get_lazy_ratio() const;

    // [n_layer_all], empty if nothing has been measured
    const std::vector<float> & get_lazy_ratios() const;

    uint64_t n_tokens(llama_seq_id seq_id) const;

    // what the graphs are reserved for, without memory: a prompt part as large as can be, null if there is never one, and the full part
    llama_kv_cache * get_reserve();
    llama_kv_cache * get_reserve_full();

    // the bytes that a part has, or would have where it is asked what would be needed (no_alloc, --fit)
    std::map<ggml_backend_buffer_type_t, size_t> breakdown(const llama_kv_cache & kv) const;

    // the announced prompt of the sequence is to be read layer by layer
    bool is_by_layer(llama_seq_id seq_id) const;

    // one of so many tokens would be, and it fits the limit, if it came in one batch and nothing else were being read
    bool fits_by_layer(llama_seq_id seq_id, uint32_t n_tokens) const;

    // used by lt_kv_cache_context: an ubatch is applied, and the last one of a batch has been computed
    void begin_ubatch(const lt_batch & batch, const llama_ubatch & ubatch);
    void end_batch   (const lt_batch & batch);

    // the prompt that is being read layer by layer, null if there is none
    const lt_layers * get_layers() const;

    // a graph has been built: find out where it can be cut between layers
    void note_cuts(const llm_graph_params & params, const lt_kv_cache_context & mctx);

    // all ubatches have passed the current run of layers. false: it was the last one. throws std::runtime_error if there is no memory
    bool next_run();

    // the prompt has come to a halt: as if it had not begun
    void stop_layers();

    // called while a batch is computed, with the share of it that has been. false: it is to end
    std::function<bool(float)> on_progress;

private:
    const llama_model & model;

    lt_spec spec;

    // what the parts are made with
    const ggml_type type_k;
    const ggml_type type_v;
    const ggml_type type_k_streaming;
    const ggml_type type_v_streaming;
    const bool      v_trans;
    const bool      offload;
    const bool      unified;
    const uint32_t  n_seq_max;
    const uint32_t  n_ubatch;

    const uint32_t size_full;      // [cells]
    const uint32_t size_streaming; // [cells]
    const uint32_t size_kept;      // [cells] the full part has so many at first, where the layers are chosen for the prompt

    // those of the model, for a cache that is given no memory
    llama_hparams hparams_no_alloc;

    std::vector<bool> has_cache; // [n_layer_all], false: the layer has no KV cache in this context, or one with a window of its own

    lt_phases phases;

    lt_mask mask;
    lt_mask mask_swa;

    // null while this is constructed
    llama_context * lctx = nullptr;

    std::unique_ptr<llama_kv_cache> kv_full;
    std::unique_ptr<llama_kv_cache> kv_streaming;
    std::unique_ptr<llama_kv_cache> kv_prompt;
    std::unique_ptr<llama_kv_cache> kv_reserve;
    std::unique_ptr<llama_kv_cache> kv_swa;

    // of a prompt that is, or is about to be, read layer by layer. else null
    std::unique_ptr<lt_layers> layered;

    std::vector<bool>   can_cut; // [n_layer_all] the graph can be cut before the layer. empty: not known yet
    std::vector<lt_run> runs;    // how such a prompt is read, empty: there is none

    bool has_equal_layers = true; // all streaming layers have keys and values of the same size and type

    uint64_t generation = 0;

    // the layers are still to be chosen, or only hide. then the streaming part has none and is not used, and S = F
    bool all_kept = false;

    // the parts have no memory, because there was none when the layers changed
    bool is_hollow = false;

    std::unique_ptr<lt_lazy_ratio> lazy_ratio; // null if no layers are to be chosen

    std::vector<float> lazy_ratios; // [n_layer_all], as measured last

    // the end of the prompt that chose. what is rolled back behind it is another conversation, which is to choose for itself
    llama_pos chosen_end = 0;

    size_t prompt_limit = 0; // [bytes]

    // sequences whose tokens go to the prompt part
    std::bitset<LLAMA_MAX_SEQ> in_prompt_part;

    std::vector<lt_prompts> prompts;    // [LLAMA_MAX_SEQ]
    std::vector<uint32_t>   n_declared; // [LLAMA_MAX_SEQ] the tokens that are still to come of a prompt that was announced

    // sequences that a refused operation has left unusable
    std::bitset<LLAMA_MAX_SEQ> refused;

    // sequences whose streaming part was restored from a state and not decoded since
    // note: a partial state restores the streaming part alone, and the caller then removes the rest of the full part.
    //       until that is done, the streaming part lacks positions without anything being wrong
    std::bitset<LLAMA_MAX_SEQ> restored;

    // what apply_pending() does
    struct {
        uint32_t n_cells     = 0;         // the prompt part is to have so many cells
        uint32_t n_needed    = 0;         // or at least so many
        uint32_t n_streaming = 0;         // and the streaming part so many
        uint32_t n_full      = 0;         // and the full part so many
        std::vector<llama_seq_id> move;   // into the prompt part
        std::vector<llama_seq_id> finish; // their prompts have been read
        bool choose = false;              // choose the layers
    } pending;

    // cells of two parts
    using cell_pairs = std::vector<std::pair<uint32_t, uint32_t>>;

    // (stream, cell of the part that is copied from) -> cell of the part that it was copied to
    using cell_map = std::map<std::pair<uint32_t, uint32_t>, uint32_t>;

    std::unique_ptr<llama_kv_cache> create(const llama_hparams & hparams, uint32_t size, bool streaming, bool unified) const;

    // of the layers that pass the filter. layer_buffers: each has one of its own
    std::unique_ptr<llama_kv_cache> create(const llama_hparams & hparams, uint32_t size, bool streaming, bool unified, const layer_filter_cb & filter, bool layer_buffers) const;

    // no prompt of the sequence is announced any more
    void undeclare(llama_seq_id seq_id);

    // the sequence is empty
    void forget(llama_seq_id seq_id);

    // the same for those that an operation has left empty
    void forget_empty();

    llama_seq_id n_seq_ids() const;

    const pos_set & pos_full(llama_seq_id seq_id) const;

    // S as it would be if the sequence ended at position p_last: when the end of the prompt part goes, the streaming part may
    // still have what was there before, see is_ahead()
    const pos_set & pos_streaming_until(llama_seq_id seq_id, llama_pos p_last) const;

    // apply pending shifts and copies
    void update() const;

    // what decoding reads lies in more cells than it could
    bool is_far(llama_seq_id seq_id) const;

    bool has_pending() const;

    // false, with a line in the log, if there is no memory for it
    bool apply_pending();

    //
    // rules, see lt-kv-cache-rules.cpp
    //

    // the sequence has more in the prompt part than in the streaming part
    bool is_ahead(llama_seq_id seq_id) const;

    // S holds nothing that the full part doesn't
    bool is_subset(llama_seq_id seq_id, const pos_set & s) const;

    // S holds the same positions within [p0, p1) as the full part
    bool holds(llama_seq_id seq_id, const pos_set & s, llama_pos p0, llama_pos p1) const;

    // S holds all positions below n_sink and within [first, q), where [p0, p1) doesn't count
    bool holds_all(llama_seq_id seq_id, const pos_set & s, llama_pos n_sink, llama_pos first, llama_pos q, llama_pos p0, llama_pos p1) const;

    // S holds all that a token at position q sees, where [p0, p1) doesn't count
    bool holds_visible(llama_seq_id seq_id, const pos_set & s, llama_pos q, llama_pos p0, llama_pos p1) const;

    // behind the sinks, the first position that a token at position q sees
    llama_pos first_visible(const lt_prompts & prompts, llama_pos q) const;

    // call visit(p, i) for each position that S lacks and its cell in the full part, ascending
    void for_each_dropped(llama_seq_id seq_id, const pos_set & s, const std::function<void(llama_pos, uint32_t)> & visit) const;

    // the sequences that share cell i of the full part, at position p, also share one cell of the other parts, or have none
    // note: a partial state that is restored into a copied sequence gives it streaming cells of its own
    bool is_shared_alike(llama_seq_id seq_id, llama_pos p, uint32_t i) const;

    // the prompts of a sequence when the position of its cells of the full part changes from p to map_cell(p, i)
    using pos_map_cell = std::function<llama_pos(llama_pos, uint32_t)>;

    lt_prompts mapped_prompts(llama_seq_id s, const pos_map_cell & map_cell) const;

    // change the prompts of all sequences that share cells with this one
    void map_prompts(llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map);

    // true if dropped positions stay hidden when the position of each cell of the sequence changes from p to map(p)
    // negative: removed. note that other sequences can share these cells
    bool can_map(llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map) const;

    void clamp_shift_streaming(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const;

    bool can_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) const;

    void refuse(const char * func, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // false, with a line in the log, if the sequence is not fit to be decoded
    bool can_decode(llama_seq_id seq_id);

    //
    // layers with a sliding window of their own, see lt-kv-cache-swa.cpp
    //

    void make_swa_part(const llama_cparams & cparams, const layer_filter_cb & filter);

    // seq_pos_min(), if no other part had dropped anything
    llama_pos seq_pos_min_streaming(llama_seq_id seq_id) const;
    llama_pos seq_pos_min_swa      (llama_seq_id seq_id) const;

    // none without such layers
    const pos_set & pos_swa(llama_seq_id seq_id) const;

    // they have all that a token at position q sees in them, where [p0, p1) doesn't count
    bool holds_swa(llama_seq_id seq_id, llama_pos q, llama_pos p0, llama_pos p1) const;

    // they lack nothing of [p0, p1) that a token at position q would see in them, were each p at map(p, its cell in the full part)
    bool hides_dropped_swa(llama_seq_id seq_id, llama_pos q, llama_pos p0, llama_pos p1, const pos_map_cell & map) const;

    // as clamp_shift() does for the streaming layers
    void clamp_shift_swa(int32_t n_past, int32_t & n_keep, int32_t & n_discard) const;

    //
    // batches, see lt-kv-cache-batch.cpp
    //

    // which sequences the batch has, and which of them read a prompt
    lt_batch inspect(const llama_batch & batch, bool embd_all) const;

    // batch: the one that is about to be processed, if any
    void set_phases(const lt_batch & batch);

    // split the batch and find its cells
    // returns null if there is no room
    llama_memory_context_ptr try_split(llama_batch_allocr & balloc, const lt_batch & batch, uint32_t n_ubatch);

    // a sequence that decodes may be rolled back to before its last batch until its next batch: speculative decoding
    // n_max: the cells that can be kept for this, in each stream
    // returns how many are kept
    uint32_t set_rollback(const lt_batch & batch, uint32_t n_max);

    //
    // the prompt part, see lt-kv-cache-prompt.cpp
    //

    // the sequences whose prompts could make room in the streaming part for this batch
    std::vector<llama_seq_id> seqs_to_move(const lt_batch & batch) const;

    // ask for room in the prompt part for the prompts of the batch
    void request_room(const lt_batch & batch, const std::vector<llama_seq_id> & move);

    // the tokens of a prompt that can be read without one, at most n_max
    uint32_t n_spare_cells(llama_seq_id seq_id, uint32_t n_max) const;

    // the bytes of one streaming layer, of all of them, or the most that one of them takes
    size_t prompt_bytes(uint32_t il, uint32_t n_cells) const;
    size_t prompt_bytes(uint32_t n_cells) const;
    size_t layer_bytes (uint32_t n_cells) const;

    // throws std::runtime_error if the prompt part may not have so many cells, or bytes, of which n_tokens are for a new prompt
    // n_spare: tokens of it that need no prompt part
    // bytes_of: the bytes for a prompt of n tokens
    void check_limit(uint32_t n_cells, uint32_t n_tokens, uint32_t n_spare = 0) const;
    void check_limit(size_t   n_bytes, uint32_t n_tokens, const std::function<size_t(uint32_t)> & bytes_of, uint32_t n_spare = 0) const;

    // the cells of the streaming part in the state of a sequence; -1: most of those that one stream has in the state of all
    uint32_t n_saved(llama_seq_id seq_id) const;

    void read_prompt_part(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);

    void free_prompt_part();

    // have n cells free in the streaming part for a sequence: the prompts of others that are read in it have to go
    // note: may put another object in the place of the prompt part
    bool make_room(llama_seq_id seq_id, uint32_t n);

    // have n more cells free in the prompt part, for what a state holds. throws std::runtime_error
    void reserve_prompt_part(uint32_t n_cells);

    void move_to_prompt_part(const std::vector<llama_seq_id> & seq_ids);

    // cells of its own for a copy of a sequence. throws std::runtime_error if there is no room
    void copy_in_prompt_part(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    // the prompt part is not needed for a sequence any more
    void leave_prompt_part(llama_seq_id seq_id);

    //
    // prompts that are read layer by layer, see lt-kv-cache-layers.cpp
    //

    // whether a prompt of so many tokens is worth being read so, and whether it can be now, if it comes as one batch
    bool is_for_layers    (llama_seq_id seq_id, uint32_t n_tokens) const;
    bool can_read_by_layer(llama_seq_id seq_id, uint32_t n_tokens) const;

    // the cells of its prompt part, and what it takes besides the streaming part
    uint32_t n_kept_cells() const;
    uint32_t n_layer_cells(llama_seq_id seq_id, uint32_t n_tokens) const;
    size_t   layers_bytes (llama_seq_id seq_id, uint32_t n_tokens) const;

    // the layers have changed, or it is known now where the graph can be cut
    void make_runs();

    // take the memory for it. throws std::runtime_error
    void make_layers(llama_seq_id seq_id, uint32_t n_tokens);
    void make_hidden(lt_layers & layers) const;

    // the streaming part has room for what is kept of a prompt besides all that it holds
    bool has_room_for_kept(llama_seq_id seq_id) const;

    // false if the batch is not such a prompt, or if there is no memory for it
    bool start_layers(const lt_batch & batch, uint32_t n_outputs);

    void begin_run();

    // which cells are kept, and where
    void plan_kept();

    void finish_layers();

    //
    // the same for a prompt that chooses the layers, see lt-kv-cache-queue.cpp
    //

    bool is_for_queue(llama_seq_id seq_id, uint32_t n_tokens) const;

    // the bytes of each layer that is measured, descending
    std::vector<size_t> full_bytes(uint32_t n_cells) const;

    // what a prompt takes besides the layers that stay full: read layer by layer, the hidden states included, and in batches
    size_t queue_bytes (uint32_t n_tokens) const;
    size_t choice_bytes(uint32_t n_cells)  const;

    void make_queue(lt_layers & layers) const;

    void start_queue();
    void begin_queue_run();
    void end_queue_run();

    // have nothing but sinks and window of a layer
    void cut_queue(int32_t il);

    void finish_queue();
    void stop_queue();

    //
    // parts that grow, see lt-kv-cache-grow.cpp
    //

    // ask for more cells in the streaming part: the tokens of an image can all have the same position, and with a unified
    // cache there can be more sequences than the context was made for
    void request_streaming(const lt_batch & batch);

    // ask for more cells in the full part, where the layers are still to be chosen
    void request_full(const lt_batch & batch);

    // a copy with more cells. throws std::runtime_error if there is no memory for it
    std::unique_ptr<llama_kv_cache> grown(const llama_kv_cache * kv, uint32_t n_cells, bool unified) const;

    // n_cells, or n_needed if there is no memory for so many. these throw std::runtime_error if there is no memory at all
    void grow_prompt_part   (uint32_t n_cells, uint32_t n_needed);
    void grow_streaming_part(uint32_t n_cells);
    void grow_full_part     (uint32_t n_cells);

    //
    // the end of prompts, see lt-kv-cache-prompt-end.cpp
    //

    // keep what is to be kept of the sequences that have read their prompts
    void finish(const std::vector<llama_seq_id> & seq_ids);

    // copy it from the prompt part to the streaming part, which grows if it has to. cells that sequences share stay shared
    // returns false, with a line in the log, if there is no memory for it
    bool copy_back(llama_seq_id seq_id, cell_map & copied);

    // move what decoding reads to the cells that it keeps to
    void compact(uint32_t strm);

    //
    // layers that are chosen for the prompt, see lt-kv-cache-auto.cpp
    //

    // make all parts anew, empty. if this throws, the parts are as they were, but empty, too; or hollow if there is no memory even for that
    void set_layers(const std::vector<bool> & layers, bool all_kept);

    void make_parts(const llama_hparams & hparams, const std::vector<bool> & layers, bool all_kept);

    // false, with a line in the log, if the parts are hollow and there is still no memory for them
    bool has_memory();

    // of the layers that are measured, so many come to stream
    size_t n_laziest() const;

    // (cell of the full part, cell of a new streaming part): what a streaming layer keeps
    cell_pairs pairs_kept() const;

    // a streaming part for them
    std::unique_ptr<llama_kv_cache> create_kept(const llama_hparams & hparams, const cell_pairs & pairs, const layer_filter_cb & filter) const;

    void choose_layers();

    // the layers have been chosen, and the full part has them no more
    void take_choice(std::unique_ptr<llama_kv_cache> kv_new);

    // if everything has been removed: all layers are full again, and the next prompt chooses
    void choose_anew();

    //
    // states, see lt-kv-cache-state.cpp
    //

    // the spec that both contexts must have. layers that were chosen for a prompt are not part of it
    std::string state_spec() const;

    // have the layers of a state
    void take_layers(const std::string & text);
};
