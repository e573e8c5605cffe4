#pragma once

#include "lt-spec.h"

#include <cstdint>
#include <optional>
#include <vector>

struct gguf_context;
struct lt_kv_params;

struct llama_model;
struct llama_model_loader;

// the specs of a model
class lt_model_specs {
public:
    // read the metadata and LT_STREAMING
    // throws std::runtime_error if either is malformed, or if the model can't stream and would have to
    void load(llama_model_loader & ml, const llama_model & model);

    // write the metadata of the file's spec, if it has one
    void save(gguf_context * gguf, const llama_model & model) const;

    // replace the spec of contexts that this thread is going to make, null: back to what load() found
    // throws std::invalid_argument
    void set(const char * text, const llama_model & model) const;

    // the layers that may stream, [n_layer_all]: those of the main graph with full attention. none if the model can't stream
    static std::vector<bool> may_stream(const llama_model & model);

    // throws std::invalid_argument if the model can't have this spec
    static void check(const lt_spec & spec, const llama_model & model);

    // the spec of contexts that this thread makes now
    const lt_spec & get() const;

    // what the cache of a context is made with in which no layer streams
    lt_kv_params kv_params() const;

    // no layer of the models that this thread loads from now on streams
    static void load_drafts(bool is_draft);

private:
    // note: not the address, at which there can be another model later
    const uint64_t id = next_id();

    std::optional<lt_spec> file; // the file's metadata

    lt_spec init; // the file's metadata with LT_STREAMING applied

    static uint64_t next_id();
};
