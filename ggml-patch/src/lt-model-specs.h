#pragma once

#include "lt-spec.h"

#include <optional>

struct gguf_context;

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

    // replace the spec of contexts to come, null: back to what load() found
    // throws std::invalid_argument
    void set(const char * text, const llama_model & model);

    const lt_spec & get() const { return cur; }

private:
    std::optional<lt_spec> file; // the file's metadata

    lt_spec init; // the file's metadata with LT_STREAMING applied
    lt_spec cur;
};
