#pragma once

#include "lt-mask.h"
#include "lt-spec.h"

#include "llama-kv-cache.h"

#include <array>
#include <bitset>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

struct llama_cparams;

// the end of a range of positions that has none
static constexpr llama_pos LT_POS_END = std::numeric_limits<llama_pos>::max();

//
// lt_kv_cache
//

// utilizes two instances of llama_kv_cache, in the shape of llama_kv_cache_iswa
//   the first instance holds all positions, for the layers with full attention
//   the second instance holds the first n_sink and the last n_window positions, for the streaming layers
//
// notation: of a sequence, F are the positions in the full part and S those in the streaming part (a subset of F)
//   the positions F \ S have been dropped. no token to come may see a dropped position: operations that would break
//   this are refused. seq_rm() then returns false, the others leave the sequence unusable until it is removed

class lt_kv_cache : public llama_memory_i {
public:
    // filter: the layers that have a KV cache in this context, can be null
    lt_kv_cache(
            const llama_model         & model,
            const lt_spec             & spec,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
            const layer_filter_cb     & filter);

    ~lt_kv_cache() = default;

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

    // the smallest position from which on nothing has been dropped
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // lt_kv_cache specific API
    //

    const lt_spec & get_spec() const;

    llama_kv_cache * get_full()   const;
    llama_kv_cache * get_streaming() const;

private:
    const lt_spec spec;

    // see init_batch(). LT_POS_END: the sequence will not be rolled back
    std::array<llama_pos, LLAMA_MAX_SEQ> pos_rollback;

    const lt_mask mask;

    const bool unified;

    // known from the first update on, before which there is nothing to update
    llama_context * lctx = nullptr;

    std::unique_ptr<llama_kv_cache> kv_full;
    std::unique_ptr<llama_kv_cache> kv_streaming;

    // sequences that a refused operation has left unusable
    std::bitset<LLAMA_MAX_SEQ> refused;

    // sequences whose streaming part was restored from a state and not decoded since
    // note: a partial state restores the streaming part alone, and the caller then removes the rest of the full part.
    //       until that is done, the streaming part lacks positions without anything being wrong
    std::bitset<LLAMA_MAX_SEQ> restored;

    using pos_set = std::set<std::pair<llama_pos, uint32_t>>;

    const pos_set & pos_full  (llama_seq_id seq_id) const;
    const pos_set & pos_streaming(llama_seq_id seq_id) const;

    llama_seq_id n_seq_ids() const;

    // the streaming part holds nothing that the full part doesn't
    bool is_subset(llama_seq_id seq_id) const;

    // the streaming part holds the same positions within [p0, p1) as the full part
    bool holds(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the streaming part holds all that a query at position q sees, where [p0, p1) doesn't count
    bool holds_visible(llama_seq_id seq_id, llama_pos q, llama_pos p0, llama_pos p1) const;

    // call visit(p, i) for each dropped position and its cell in the full part, ascending
    void for_each_dropped(llama_seq_id seq_id, const std::function<void(llama_pos, uint32_t)> & visit) const;

    // the sequences that share cell i of the full part, at position p, also share one cell of the streaming part, or have none
    // note: a partial state that is restored into a copied sequence gives it streaming cells of its own
    bool is_shared_alike(llama_seq_id seq_id, llama_pos p, uint32_t i) const;

    // true if dropped positions stay hidden when the position of each cell of the sequence changes from p to map(p)
    // negative: removed. note that other sequences can share these cells
    bool can_map(llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map) const;

    bool can_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) const;

    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // apply pending shifts and copies
    void update() const;

    void refuse(const char * func, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // false, with a line in the log, if the sequence is not fit to be decoded
    bool can_decode(llama_seq_id seq_id);

    // split the batch and find its cells
    // returns null if there is no room
    llama_memory_context_ptr try_split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool simple);

    // set pos_rollback for the sequences that have a short run of tokens in a batch of several ubatches
    // returns the number of cells that this takes from the spare ones
    uint32_t set_rollback(const std::vector<llama_ubatch> & ubatches);
};
