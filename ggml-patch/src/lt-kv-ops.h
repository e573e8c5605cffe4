#pragma once

#include "llama-kv-cache.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <map>
#include <utility>
#include <vector>

// what llama_kv_cache does not offer, as a friend of it
struct lt_kv_ops {
    // (source, destination)
    using cell_pairs = std::vector<std::pair<uint32_t, uint32_t>>;

    // the cells for the tokens of an ubatch: empty or dead ones, of which those below size_decode first, so that decoding keeps
    // to few cells
    static llama_kv_cache::slot_info find_slot(const llama_kv_cache & kv, const llama_ubatch & ubatch);

    // empty or dead cells within [i0, i1), at most n
    static std::vector<uint32_t> find_cells(const llama_kv_cache & kv, uint32_t strm, uint32_t i0, uint32_t i1, size_t n);

    static llama_kv_cells & cells(llama_kv_cache & kv, uint32_t strm);

    // copy K and V of the layers that the destination has, or of one of them. nothing may be computing on either
    static void copy_data(
            const llama_kv_cache & src, uint32_t strm_src,
                  llama_kv_cache & dst, uint32_t strm_dst,
                const cell_pairs & pairs,
                         int32_t   il = -1);

    // copy position and extension of a cell, not its sequences
    static void copy_cell(const llama_kv_cells & src, uint32_t i_src, llama_kv_cells & dst, uint32_t i_dst);

    // copy all cells and their K and V to the same cells of a cache that is at least as large
    static void copy_all(const llama_kv_cache & src, llama_kv_cache & dst);

    // take from a mask for the tokens of an ubatch what the streaming mask hides
    static void hide(const llama_kv_cache & kv, const lt_mask & mask, const llama_ubatch & ubatch, ggml_tensor * dst);

    // change the positions of a sequence. negative: removed
    static void map(llama_kv_cache & kv, llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map);

    // whether all positions of a sequence could be those of tokens
    static bool is_sane(const llama_kv_cache & kv, llama_seq_id seq_id);

    // remove a sequence whatever its positions are
    static void purge(llama_kv_cache & kv, llama_seq_id seq_id);

    // the cell after which the search for free ones begins
    static void set_head(llama_kv_cache & kv, uint32_t strm, uint32_t i);

    // rotate keys and values as another cache does
    static void use_rotation_of(const llama_kv_cache & src, llama_kv_cache & dst);

    // its layers that are in 16 bits where the others are quantized
    static const lt_kept & kept(const llama_kv_cache & kv);

    // call f(il, k, v) for each layer; v can be null
    static void for_each_layer(const llama_kv_cache & kv, const std::function<void(int32_t, ggml_tensor *, ggml_tensor *)> & f);

    // whether all layers have keys and values of the same size and type
    static bool has_equal_layers(const llama_kv_cache & kv);

    // give the layers of a cache that was made without memory the same memory, as much as the largest one needs: a buffer for each
    // kind. the cells have no values then
    static std::vector<ggml_backend_buffer_ptr> share_memory(llama_kv_cache & kv);

    // what that would take
    static std::map<ggml_backend_buffer_type_t, size_t> shared_breakdown(const llama_kv_cache & kv);

    //
    // caches that have a buffer for each layer
    //

    // give memory to a layer of a cache that was made without: one of the spare buffers if one has its size, whose cells have values,
    // else a new one in place of one of them. throws std::runtime_error if there is none
    static void take_memory(llama_kv_cache & kv, int32_t il, std::vector<ggml_backend_buffer_ptr> & spare);

    // the other way round
    static ggml_backend_buffer_ptr give_memory(llama_kv_cache & kv, int32_t il);

    static bool has_memory(const llama_kv_cache & kv, int32_t il);

    static void drop_layer(llama_kv_cache & kv, int32_t il);

    // what all layers have, whether the cache was made with memory or without
    static std::map<ggml_backend_buffer_type_t, size_t> breakdown(const llama_kv_cache & kv);
};
