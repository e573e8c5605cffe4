// saved states, see lt-kv-cache.h

#include "lt-kv-cache.h"

#include "lt-kv-ops.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

// first word of a saved state
static const uint32_t LT_STATE_MAGIC = 0x324b544c; // "LTK2"

// a state is: magic, spec, layers if they were chosen for the prompt, full part, number of cells and content of the streaming part,
//   content of the SWA part if there is one, for each sequence the list of its prompts, number of cells of the prompt part and, if there
//   are any, its content. a partial state has no full part

// no text in a state is longer: that of a spec names each of at most LLAMA_MAX_LAYERS layers
static const uint32_t LT_TEXT_MAX = 4096;

// note: not by llama_io_read_i::read_string(), for which a damaged length is an allocation
static std::string lt_read_text(llama_io_read_i & io) {
    uint32_t n;
    io.read(&n, sizeof(n));
    if (n == 0 || n > LT_TEXT_MAX) {
        throw std::runtime_error("the beginning of the state is damaged");
    }

    std::string res(n, '\0');
    io.read(&res[0], n);

    return res;
}

std::string lt_kv_cache::state_spec() const {
    lt_spec res = spec;
    if (res.is_auto() || res.hides) {
        res.layers.assign(res.layers.size(), false);
    }

    // where nothing is quantized, it changes nothing
    if (!ggml_is_quantized(type_k) && !ggml_is_quantized(type_v) && !ggml_is_quantized(type_k_streaming)) {
        res.kept = {};
    }

    return res.str();
}

// the layers that were chosen, '0' or '1' for each, or "-"
static std::string lt_layers_text(const lt_spec & spec) {
    if (!spec.is_auto()) {
        return "-";
    }

    std::string res;
    for (size_t il = 0; il < spec.layers.size(); ++il) {
        res += spec.layers[il] ? '1' : '0';
    }

    return res;
}

bool lt_kv_cache::can_checkpoint(llama_seq_id seq_id) const {
    // note: a message that has just begun is little more than what it follows
    return !all_kept && !is_ahead(seq_id) && n_saved(seq_id) <= mask.n_sink + mask.n_window + LT_N_SPARE;
}

uint32_t lt_kv_cache::n_saved(llama_seq_id seq_id) const {
    uint32_t res = 0;

    if (seq_id >= 0) {
        const auto & cells = kv_streaming->get_cells(seq_id);

        for (const auto & [_, i] : cells.seq_pos_get(seq_id)) {
            res += !mask.is_spare(cells, i, seq_id);
        }

        return res;
    }

    for (uint32_t strm = 0; strm < kv_streaming->get_n_stream(); ++strm) {
        const auto & cells = lt_kv_ops::cells(*kv_streaming, strm);

        uint32_t n = 0;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            n += !cells.is_empty(i) && !mask.is_spare(cells, i, -1);
        }

        res = std::max(res, n);
    }

    return res;
}

void lt_kv_cache::take_layers(const std::string & text) {
    if (text.size() != spec.layers.size() || text.find_first_not_of("01") != std::string::npos) {
        throw std::runtime_error("the list of layers in the state is damaged");
    }

    std::vector<bool> layers;
    for (const char c : text) {
        layers.push_back(c == '1');
    }

    set_layers(layers, text.find('1') == std::string::npos);
}

void lt_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    // the cells already have the new positions, so the keys must be turned to them first
    update();

    io.write(&LT_STATE_MAGIC, sizeof(LT_STATE_MAGIC));
    io.write_string(state_spec());
    io.write_string(lt_layers_text(spec));

    if (spec.is_auto()) {
        const uint32_t n = lazy_ratios.size();

        io.write(&n, sizeof(n));
        if (n > 0) {
            io.write(lazy_ratios.data(), n*sizeof(float));
        }
    }

    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        kv_full->state_write(io, seq_id, flags);
    }

    const uint32_t n_streaming = n_saved(seq_id);

    io.write(&n_streaming, sizeof(n_streaming));

    kv_streaming->state_write(io, seq_id, flags);

    if (kv_swa) {
        kv_swa->state_write(io, seq_id, flags);
    }

    // note: sequences can share cells
    uint32_t n_cells = seq_id < 0 && kv_prompt ? kv_prompt->get_cells(0).get_used() : 0;

    for (llama_seq_id s = seq_id < 0 ? 0 : seq_id; s < (seq_id < 0 ? n_seq_ids() : seq_id + 1); ++s) {
        prompts[s].write(io);

        // note: if the prompt is still to come, the streaming part has all of it
        if (seq_id >= 0 && is_ahead(s)) {
            n_cells += kv_prompt->get_cells(s).seq_pos_get(s).size();
        }
    }

    io.write(&n_cells, sizeof(n_cells));

    if (n_cells > 0) {
        kv_prompt->state_write(io, seq_id, flags);
    }
}

void lt_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    uint32_t magic;
    io.read(&magic, sizeof(magic));
    if (magic != LT_STATE_MAGIC) {
        throw std::runtime_error(format("the state is of a context without streaming layers, this one has %s", spec.str().c_str()));
    }

    std::string spec_state   = lt_read_text(io);
    std::string layers_state = lt_read_text(io);
    if (spec_state != state_spec()) {
        std::replace_if(spec_state.begin(), spec_state.end(), [](unsigned char c) { return c < 32 || c > 126; }, '?'); // damaged

        throw std::runtime_error(format("the state is of a context with %s, this one has %s", spec_state.c_str(), state_spec().c_str()));
    }

    std::vector<float> ratios_state;
    if (spec.is_auto()) {
        uint32_t n;
        io.read(&n, sizeof(n));
        if (n > spec.layers.size()) {
            throw std::runtime_error("the lazy ratios in the state are damaged");
        }

        ratios_state.resize(n);
        if (n > 0) {
            io.read(ratios_state.data(), n*sizeof(float));
        }
    }

    const bool partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;

    if (layers_state != lt_layers_text(spec)) {
        if (partial) {
            throw std::runtime_error("the state is of streaming layers that were chosen for another prompt");
        }
        take_layers(layers_state);
    }

    lazy_ratios = std::move(ratios_state);

    // a copy that is made later would overwrite what is read now
    update();

    // note: how many cells the state has nobody knows before it is read
    if (!partial && all_kept) {
        grow_full_part(size_full);
    }

    const llama_seq_id s0 = seq_id < 0 ? 0           : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_ids() : seq_id + 1;

    for (llama_seq_id s = s0; s < s1; ++s) {
        leave_prompt_part(s);
        undeclare(s);

        phases.rollback[s] = LT_POS_END;
    }

    set_phases({});

    try {
        // note: a part of which the state has no cells is not touched by llama_kv_cache::state_read()
        for (llama_seq_id s = s0; s < s1; ++s) {
            lt_kv_ops::purge(*kv_streaming, s);
            if (kv_swa) {
                lt_kv_ops::purge(*kv_swa, s);
            }
            if (!partial) {
                lt_kv_ops::purge(*kv_full, s);
            }
        }

        if (!partial) {
            kv_full->state_read(io, seq_id, flags);

            for (llama_seq_id s = s0; s < s1; ++s) {
                refused.reset(s);
            }
        }

        uint32_t n_streaming;
        io.read(&n_streaming, sizeof(n_streaming));

        // note: there are as many tokens in the full part of the state. a damaged number must not become an allocation
        if (n_streaming > size_full) {
            throw std::runtime_error(format("the state holds %u tokens, more than the context of %u tokens", n_streaming, size_full));
        }

        // the tokens of an image, for example
        if (n_streaming > kv_streaming->get_size() && (seq_id < 0 || !unified)) {
            grow_streaming_part(n_streaming);
        }

        const bool fits = seq_id < 0 || make_room(seq_id, n_streaming);

        if (!fits && unified) {
            // the beginning of a prompt, which then goes on in the prompt part
            reserve_prompt_part(n_streaming);

            kv_prompt->state_read(io, seq_id, flags);
            in_prompt_part.set(seq_id);
        } else {
            kv_streaming->state_read(io, seq_id, flags);
        }

        if (kv_swa) {
            kv_swa->state_read(io, seq_id, flags);
        }

        for (llama_seq_id s = s0; s < s1; ++s) {
            prompts[s].read(io);
        }

        read_prompt_part(io, seq_id, flags);

        for (llama_seq_id s = s0; s < s1; ++s) {
            for (const auto * kv : { kv_full.get(), kv_streaming.get(), kv_prompt.get(), kv_swa.get() }) {
                if (kv && !lt_kv_ops::is_sane(*kv, s)) {
                    throw std::runtime_error("the positions in the state are damaged");
                }
            }
        }
    } catch (...) {
        // don't leave a sequence of which one part is there and the other isn't
        for (llama_seq_id s = s0; s < s1; ++s) {
            for (auto * kv : { kv_full.get(), kv_streaming.get(), kv_prompt.get(), kv_swa.get() }) {
                if (kv) {
                    lt_kv_ops::purge(*kv, s);
                }
            }
            leave_prompt_part(s);
            forget(s);
        }

        if (spec.is_auto() && pos_full(0).empty()) {
            lazy_ratios.clear();
        }

        choose_anew();

        set_phases({});

        throw;
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        restored[s] = !pos_full(s).empty() || !pos_streaming(s).empty() || !pos_swa(s).empty();
    }

    set_phases({});
}

void lt_kv_cache::reserve_prompt_part(uint32_t n_cells) {
    const uint64_t n_all = (uint64_t) n_cells + (kv_prompt ? kv_prompt->get_cells(0).get_used() : 0);
    if (n_all > (uint64_t) size_full*kv_full->get_n_stream()) {
        throw std::runtime_error(format("the state holds %u tokens of a prompt, more than the context of %u tokens", n_cells, size_full));
    }

    check_limit(n_all, n_cells);

    grow_prompt_part(n_all, n_all);
}

void lt_kv_cache::read_prompt_part(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    uint32_t n_cells;
    io.read(&n_cells, sizeof(n_cells));

    if (n_cells == 0) {
        return;
    }

    reserve_prompt_part(n_cells);

    kv_prompt->state_read(io, seq_id, flags);

    for (llama_seq_id s = 0; s < n_seq_ids(); ++s) {
        in_prompt_part[s] = !kv_prompt->get_cells(s).seq_pos_get(s).empty();
    }
}
