#include "lt-kv-cache.h"

#include "lt-kv-cache-context.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <stdexcept>

// a sequence with at most so many tokens in a batch may be rolled back to the first of them: speculative decoding
static const uint32_t LT_N_DRAFT_MAX = 64;

// first word of a saved state
static const uint32_t LT_STATE_MAGIC = 0x4c544b56; // "LTKV"

//
// lt_kv_cache
//

lt_kv_cache::lt_kv_cache(
        const llama_model         & model,
        const lt_spec             & spec,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const layer_filter_cb     & filter) : spec(spec), mask({ spec.n_sink, spec.n_window, &pos_rollback }), unified(cparams.kv_unified) {
    pos_rollback.fill(LT_POS_END);

    if (spec.prefill != LT_PREFILL_STREAM) {
        throw std::runtime_error(format("%s.attention.streaming.prefill = \"full\": this build reads prompts with streaming attention only, set it to \"stream\" (LT_STREAMING=prefill=stream) or use full attention in all layers (LT_STREAMING=off)",
                    model.arch_name().c_str()));
    }

    // chain filters
    const layer_filter_cb filter_full = [&](int32_t il) {
        return (!filter || filter(il)) && !spec.is_streaming(il);
    };

    const layer_filter_cb filter_streaming = [&](int32_t il) {
        return (!filter || filter(il)) &&  spec.is_streaming(il);
    };

    const uint32_t size_full = cparams.n_ctx_seq;

    // note: swa_full does not apply here - it is on by default and would undo all savings
    const uint64_t n_seq = unified ? cparams.n_seq_max : 1;
    const uint64_t n_max = ((uint64_t) spec.n_sink + spec.n_window)*n_seq + cparams.n_ubatch;

    // note: padded for performance, as the SWA cache is
    //       https://github.com/ggml-org/llama.cpp/issues/17037
    const uint32_t size_streaming = GGML_PAD((uint32_t) std::min<uint64_t>(size_full, n_max), 256);

    const auto create = [&](uint32_t size, uint32_t n_swa_part, llama_swa_type swa_type, const layer_filter_cb & filter_part, const lt_mask & mask_part) {
        return std::make_unique<llama_kv_cache>(
                model, model.hparams, params.type_k, params.type_v,
                !cparams.flash_attn, cparams.offload_kqv, cparams.kv_unified, size, cparams.n_seq_max, 1,
                n_swa_part, swa_type, nullptr, filter_part, nullptr, nullptr, "", mask_part);
    };

    LLAMA_LOG_INFO("%s: creating full      KV cache, size = %u cells\n", __func__, size_full);

    kv_full = create(size_full, 0, LLAMA_SWA_TYPE_NONE, filter_full, {});

    LLAMA_LOG_INFO("%s: creating streaming KV cache, size = %u cells (%s)\n", __func__, size_streaming, spec.str().c_str());

    // note: llama_kv_cache adds positions to it
    const uint32_t n_swa = std::min<uint32_t>(spec.n_window, INT32_MAX/2);

    kv_streaming = create(size_streaming, n_swa, LLAMA_SWA_TYPE_STANDARD, filter_streaming, mask);
}

void lt_kv_cache::clear(bool data) {
    kv_full  ->clear(data);
    kv_streaming->clear(data);

    refused .reset();
    restored.reset();
}

bool lt_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    const llama_seq_id s0 = seq_id < 0 ? 0           : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        if (!can_rm(s, p0, p1)) {
            LLAMA_LOG_DEBUG("%s: sequence %d: can't remove [%d, %d), the streaming layers are complete from position %d on\n",
                    __func__, s, p0, p1, seq_pos_min(s));
            return false;
        }
    }

    bool res = true;

    res = res & kv_full  ->seq_rm(seq_id, p0, p1);
    res = res & kv_streaming->seq_rm(seq_id, p0, p1);

    for (llama_seq_id s = s0; s < s1; ++s) {
        if (pos_full(s).empty() && pos_streaming(s).empty()) {
            refused .reset(s);
            restored.reset(s);
        }
    }

    return res;
}

void lt_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool is_same_stream = kv_full->get_stream(seq_id_src) == kv_full->get_stream(seq_id_dst);

    // note: between streams, only whole sequences can be copied
    if (is_same_stream && !can_cp(seq_id_src, seq_id_dst, std::max(p0, 0), p1 < 0 ? LT_POS_END : p1)) {
        refuse(__func__, seq_id_dst, p0, p1);
        return;
    }

    kv_full  ->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    kv_streaming->seq_cp(seq_id_src, seq_id_dst, p0, p1);

    if (is_same_stream) {
        refused [seq_id_dst] = refused [seq_id_dst] | refused [seq_id_src];
        restored[seq_id_dst] = restored[seq_id_dst] | restored[seq_id_src];
    } else {
        refused [seq_id_dst] = refused [seq_id_src];
        restored[seq_id_dst] = restored[seq_id_src];
    }
}

void lt_kv_cache::seq_keep(llama_seq_id seq_id) {
    kv_full  ->seq_keep(seq_id);
    kv_streaming->seq_keep(seq_id);

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        if (s != seq_id && pos_full(s).empty() && pos_streaming(s).empty()) {
            refused .reset(s);
            restored.reset(s);
        }
    }
}

void lt_kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    const auto map = [=](llama_pos p) { return p >= p0 && p < p1 ? p + shift : p; };

    if (shift != 0 && !can_map(seq_id, map)) {
        refuse(__func__, seq_id, p0, p1);
        return;
    }

    kv_full  ->seq_add(seq_id, p0, p1, shift);
    kv_streaming->seq_add(seq_id, p0, p1, shift);
}

void lt_kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? LT_POS_END : p1;

    const auto map = [=](llama_pos p) { return p >= p0 && p < p1 ? p / d : p; };

    if (d != 1 && !can_map(seq_id, map)) {
        refuse(__func__, seq_id, p0, p1);
        return;
    }

    // note: one by one, because llama_kv_cells::pos_div() turns the keys the wrong way
    std::vector<llama_pos> pos;
    for (const auto & [p, _] : pos_full(seq_id)) {
        if (p >= p0 && p < p1) {
            pos.push_back(p);
        }
    }

    for (const llama_pos p : pos) {
        kv_full     ->seq_add(seq_id, p, p + 1, p / d - p);
        kv_streaming->seq_add(seq_id, p, p + 1, p / d - p);
    }
}

llama_pos lt_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    const auto & f = pos_full  (seq_id);
    const auto & s = pos_streaming(seq_id);

    // note: from the back, because the sinks are there although what follows them may have been dropped
    auto it_s = s.rbegin();
    for (auto it_f = f.rbegin(); it_f != f.rend(); ++it_f, ++it_s) {
        if (it_s == s.rend() || it_s->first != it_f->first) {
            return it_f->first + 1;
        }
    }

    return f.empty() ? -1 : f.begin()->first;
}

llama_pos lt_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    return kv_full->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_cache::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> mb = kv_full->memory_breakdown();
    for (const auto & buft_size : kv_streaming->memory_breakdown()) {
        mb[buft_size.first] += buft_size.second;
    }
    return mb;
}

llama_memory_context_ptr lt_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    // first try simple split, then equal split
    for (const bool simple : { true, false }) {
        if (simple && !unified) {
            // requires equal splits, so we skip the simple split
            continue;
        }

        if (auto res = try_split(balloc, n_ubatch, simple)) {
            return res;
        }
    }

    return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr lt_kv_cache::try_split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool simple) {
    const auto split = [&](uint32_t n) {
        balloc.split_reset();

        std::vector<llama_ubatch> res;
        while (true) {
            auto ubatch = simple ? balloc.split_simple(n) : balloc.split_equal(n, !unified, 0);

            if (ubatch.n_tokens == 0) {
                break;
            }

            res.push_back(std::move(ubatch)); // NOLINT
        }

        return res;
    };

    auto ubatches = split(n_ubatch);

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        // failed to find a suitable split
        return nullptr;
    }

    for (const auto & ubatch : ubatches) {
        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            if (!can_decode(ubatch.seq_id_unq[s])) {
                return std::make_unique<lt_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
            }
        }
    }

    // the cells for rollbacks come out of those that are there for one ubatch
    const uint32_t n_rollback = set_rollback(ubatches);
    if (n_rollback > 0) {
        if (n_rollback < n_ubatch) {
            ubatches = split(n_ubatch - n_rollback);
        } else {
            pos_rollback.fill(LT_POS_END);
        }
    }

    auto sinfos_full      = kv_full->prepare(ubatches);
    auto sinfos_streaming = sinfos_full.empty() ? llama_kv_cache::slot_info_vec_t() : kv_streaming->prepare(ubatches);

    pos_rollback.fill(LT_POS_END);

    if (sinfos_streaming.empty()) {
        return nullptr;
    }

    assert(sinfos_full.size() == sinfos_streaming.size());

    return std::make_unique<lt_kv_cache_context>(
            this, std::move(sinfos_full), std::move(sinfos_streaming), std::move(ubatches));
}

uint32_t lt_kv_cache::set_rollback(const std::vector<llama_ubatch> & ubatches) {
    if (ubatches.size() < 2) {
        // the cells of an ubatch are chosen before any of its tokens moves a window
        return 0;
    }

    std::array<uint32_t,  LLAMA_MAX_SEQ> n_tokens;
    std::array<llama_pos, LLAMA_MAX_SEQ> pos_min;

    n_tokens.fill(0);
    pos_min .fill(LT_POS_END);

    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                const llama_seq_id s = ubatch.seq_id[i][j];

                n_tokens[s]++;
                pos_min [s] = std::min(pos_min[s], ubatch.pos[i]);
            }
        }
    }

    uint32_t res = 0;

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        // note: the first token of a draft's check is not part of the draft
        if (n_tokens[s] > 1 && n_tokens[s] <= LT_N_DRAFT_MAX) {
            pos_rollback[s] = pos_min[s] + 1;
            res += n_tokens[s] - 1;
        }
    }

    return res;
}

llama_memory_context_ptr lt_kv_cache::init_full() {
    return std::make_unique<lt_kv_cache_context>(this);
}

llama_memory_context_ptr lt_kv_cache::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;

    return std::make_unique<lt_kv_cache_context>(this, lctx, optimize);
}

bool lt_kv_cache::get_can_shift() const {
    // note: unlike with SWA, the two parts need not have the same size: seq_add() refuses what would not be exact
    return kv_full->get_can_shift() && kv_streaming->get_can_shift();
}

void lt_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    // the cells already have the new positions, so the keys must be turned to them first
    update();

    io.write(&LT_STATE_MAGIC, sizeof(LT_STATE_MAGIC));
    io.write_string(spec.str());

    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        kv_full->state_write(io, seq_id, flags);
    }

    kv_streaming->state_write(io, seq_id, flags);
}

void lt_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    uint32_t magic;
    io.read(&magic, sizeof(magic));
    if (magic != LT_STATE_MAGIC) {
        throw std::runtime_error(format("the state is of a context without streaming layers, this one has %s", spec.str().c_str()));
    }

    std::string spec_state;
    io.read_string(spec_state);
    if (spec_state != spec.str()) {
        throw std::runtime_error(format("the state is of a context with %s, this one has %s", spec_state.c_str(), spec.str().c_str()));
    }

    // a copy that is made later would overwrite what is read now
    update();

    const llama_seq_id s0 = seq_id < 0 ? 0           : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    try {
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            kv_full->state_read(io, seq_id, flags);

            for (llama_seq_id s = s0; s < s1; ++s) {
                refused.reset(s);
            }
        }

        kv_streaming->state_read(io, seq_id, flags);
    } catch (...) {
        // don't leave a sequence of which one part is there and the other isn't
        kv_full  ->seq_rm(seq_id, -1, -1);
        kv_streaming->seq_rm(seq_id, -1, -1);

        throw;
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        restored[s] = !pos_full(s).empty() || !pos_streaming(s).empty();
    }
}

const lt_spec & lt_kv_cache::get_spec() const {
    return spec;
}

llama_kv_cache * lt_kv_cache::get_full() const {
    return kv_full.get();
}

llama_kv_cache * lt_kv_cache::get_streaming() const {
    return kv_streaming.get();
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_full(llama_seq_id seq_id) const {
    return kv_full->get_cells(seq_id).seq_pos_get(seq_id);
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_streaming(llama_seq_id seq_id) const {
    return kv_streaming->get_cells(seq_id).seq_pos_get(seq_id);
}

llama_seq_id lt_kv_cache::n_seq_ids() const {
    const uint32_t n_stream = kv_full->get_n_stream();

    return n_stream == 1 ? LLAMA_MAX_SEQ : (llama_seq_id) n_stream;
}

void lt_kv_cache::update() const {
    if (lctx) {
        lctx->memory_update(false);
    }
}
