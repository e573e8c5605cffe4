#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

enum lt_prefill {
    LT_PREFILL_STREAM, // streaming layers stream while the prompt is read, too
    LT_PREFILL_FULL,   // the prompt is read with full attention in all layers
};

// what the lazy ratio of a layer is, of those that its heads have for single queries
enum lt_lazy {
    LT_LAZY_MEAN, // their mean, as in the paper
    LT_LAZY_MIN,  // the smallest: one head that looks far away once keeps its layer
};

// layers whose keys and values are in 16 bits where those of the other layers are quantized: few, which 4 bits would break
struct lt_kept {
    std::vector<bool> layers; // [n_layer_all], empty: none

    bool any() const;
    bool has(uint32_t il) const { return il < layers.size() && layers[il]; }

    // of K or of V in a layer, where the other layers of its part of the cache have the given type
    ggml_type type(uint32_t il, ggml_type other) const { return has(il) && ggml_is_quantized(other) ? GGML_TYPE_F16 : other; }
};

// which layers stream and what they see
struct lt_spec {
    std::vector<bool> layers; // [n_layer_all], true: this layer streams

    uint32_t n_sink   = 4;    // first positions that stay visible
    uint32_t n_window = 1020; // last positions that stay visible, including the query's own

    lt_prefill prefill = LT_PREFILL_FULL;

    // the layers are chosen for the first prompt of a conversation: this share of all, those with the highest lazy ratio
    // negative: they are given
    float    auto_fraction = -1.0f;
    uint32_t n_last        = 16; // the last queries of the prompt that it is measured on
    lt_lazy  lazy          = LT_LAZY_MIN;

    // of the KV cache of the streaming layers. GGML_TYPE_COUNT: that of the other layers where it isn't quantized, else f16. what streams
    // doesn't grow, so there is little to gain by quantizing it
    ggml_type type = GGML_TYPE_COUNT;

    lt_kept kept;

    // a context to measure with: its cache keeps everything, and the layers are only not shown what they would have dropped
    bool hides = false;

    bool is_auto() const;

    // a context with this spec needs a cache for streaming layers
    bool enabled() const;

    // the longest window of a context, where layers have one of n_swa of their own, 0: none
    uint32_t n_swa(uint32_t n_swa) const;

    bool any() const;
    bool is_streaming(int32_t il) const;

    // canonical text, "off" if no layer streams, with what is kept in 16 bits behind it
    std::string str() const;

    // see lt.h for the grammar
    // may_stream: [n_layer_all], those that "all" stands for. where none may, all layers, so that the spec is refused as a whole
    // base: gives the values of the keys that the text leaves out, can be null
    // throws std::invalid_argument
    static lt_spec parse(const std::string & text, const std::vector<bool> & may_stream, const lt_spec * base);
};

//
// the keys of the text form and of the metadata, and checks of their values
// what: the key as the user knows it. these throw std::invalid_argument
//

static const char * const LT_KEY_LAYERS  = "layers";
static const char * const LT_KEY_SINK    = "sink";
static const char * const LT_KEY_WINDOW  = "window";
static const char * const LT_KEY_PREFILL = "prefill";
static const char * const LT_KEY_TYPE    = "type";
static const char * const LT_KEY_AUTO    = "auto";
static const char * const LT_KEY_W_LAST  = "w_last";
static const char * const LT_KEY_LAZY    = "lazy";
static const char * const LT_KEY_HIDE    = "hide";

static const char * const LT_KEY_CACHE_KEEP = "cache_keep";

// as people write it: 1,3,5-9, or "none"
std::string lt_layers_text(const std::vector<bool> & layers);

const char * lt_prefill_name(lt_prefill prefill);
const char * lt_lazy_name   (lt_lazy    lazy);

[[noreturn]] void lt_bad_value(const std::string & what, const std::string & value, const std::string & allowed);

uint32_t   lt_check_u32    (const std::string & what, int64_t value, int64_t min);
lt_prefill lt_check_prefill(const std::string & what, const std::string & value);
lt_lazy    lt_check_lazy   (const std::string & what, const std::string & value);
ggml_type  lt_check_type   (const std::string & what, const std::string & value);
