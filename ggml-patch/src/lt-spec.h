#pragma once

#include "lt-mask.h"

#include <optional>
#include <string>
#include <vector>

struct gguf_context;

struct llama_model;
struct llama_model_loader;

enum lt_prefill {
    LT_PREFILL_STREAM, // streaming layers stream while the prompt is read, too
    LT_PREFILL_FULL,   // the prompt is read with full attention in all layers
};

// which layers stream and what they see
struct lt_spec {
    std::vector<bool> layers; // [n_layer_all], true: this layer streams

    uint32_t n_sink   = 4;    // first positions that stay visible
    uint32_t n_window = 1020; // last positions that stay visible, including the query's own

    lt_prefill prefill = LT_PREFILL_STREAM;

    bool any() const;
    bool is_streaming(int32_t il) const;

    // canonical text, "off" if no layer streams
    std::string str() const;

    // see lt.h for the grammar
    // base: gives the values of the keys that the text leaves out, can be null
    // throws std::invalid_argument
    static lt_spec parse(const std::string & text, uint32_t n_layer, const lt_spec * base);
};

// the specs of a model
class lt_model_specs {
public:
    // read the metadata and LT_STREAMING
    // throws std::runtime_error if either is malformed, or if the model can't stream and would have to
    void load(llama_model_loader & ml, const llama_model & model);

    // write the metadata of the file's spec, if it has one
    void save(gguf_context * gguf, const llama_model & model) const;

    // replace the spec of contexts to come, null: back to what load() found
    // throws std::invalid_argument
    void set(const char * text, const llama_model & model);

    const lt_spec & get() const { return cur; }

private:
    std::optional<lt_spec> file; // the file's metadata

    lt_spec init; // the file's metadata with LT_STREAMING applied
    lt_spec cur;
};
