#include "lt-model-specs.h"

#include "lt-mask.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <stdexcept>

static const char * const LT_ENV = "LT_STREAMING";

// what a thread has asked for, by model
static thread_local std::map<uint64_t, lt_spec> lt_thread_specs;

static thread_local bool lt_is_draft = false;

static std::string lt_gguf_key(const llama_model & model, const char * key) {
    return model.arch_name() + ".attention.streaming." + key;
}

// why this model can't have streaming layers, nullptr if it can
// the rule: the graph takes its K and V from the ordinary KV attention input, see llm_graph_context::build_attn_inp_kv(), or from the one
// for layers with and without a sliding window, see build_attn_inp_kv_iswa()
static const char * lt_why_not(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (llm_arch_is_recurrent(model.arch) || llm_arch_is_hybrid(model.arch)) {
        return "it has recurrent layers";
    }
    if (llama_model_has_encoder(&model)) {
        return "it has an encoder";
    }
    if (llm_arch_is_diffusion(model.arch) || !hparams.causal_attn) {
        return "its attention is not causal";
    }
    if (hparams.is_mla()) {
        return "it uses multi-head latent attention (MLA)";
    }

    switch (model.arch) {
        case LLM_ARCH_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_LLAMA_EMBED:
        case LLM_ARCH_WAVTOKENIZER_DEC:
            return "it has no KV cache";
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "it drafts for another model, whose layers it reads";
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
            return "it has a sparse attention of its own";
        default:
            break;
    }

    if (hparams.n_layer_kv_from_start >= 0 && !hparams.has_kv(hparams.n_layer() - 1)) {
        return "layers of it use the keys and values of others";
    }

    bool has_full = false;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        has_full = has_full || !hparams.is_swa(il);
    }

    return has_full ? nullptr : "all its layers have a sliding window of their own";
}

std::vector<bool> lt_model_specs::may_stream(const llama_model & model) {
    const auto & hparams = model.hparams;

    std::vector<bool> res(hparams.n_layer_all, false);

    for (uint32_t il = 0; il < hparams.n_layer() && !lt_why_not(model); ++il) {
        res[il] = !hparams.is_swa(il);
    }

    return res;
}

void lt_model_specs::check(const lt_spec & spec, const llama_model & model) {
    if (!spec.enabled() && !spec.kept.any()) {
        return;
    }

    const char * reason = lt_why_not(model);

    if (!reason && !spec.enabled() && model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        reason = "it has a sliding window of its own, and no layer streams";
    }

    if (reason && !spec.enabled()) {
        throw std::invalid_argument(format("%s: models of the architecture \"%s\" can't keep layers of their cache in 16 bits: %s",
                    LT_KEY_CACHE_KEEP, model.arch_name().c_str(), reason));
    }

    if (reason) {
        throw std::invalid_argument(format("%s: models of the architecture \"%s\" can't have streaming layers: %s (LT_STREAMING=off loads it with full attention)",
                    lt_gguf_key(model, LT_KEY_LAYERS).c_str(), model.arch_name().c_str(), reason));
    }

    const auto may = may_stream(model);

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        if (spec.is_streaming(il) && !may[il]) {
            lt_bad_value(lt_gguf_key(model, LT_KEY_LAYERS), format("{%u: true}", il),
                    format("true for layers with full attention only, which are %s: the others have a sliding window of their own, of %u tokens",
                        lt_layers_text(may).c_str(), model.hparams.n_swa));
        }
    }

    for (uint32_t il = model.hparams.n_layer(); il < model.hparams.n_layer_all; ++il) {
        if (spec.is_streaming(il)) {
            lt_bad_value(lt_gguf_key(model, LT_KEY_LAYERS), format("{%u: true}", il),
                    format("false from layer %u on, which the main graph doesn't run", model.hparams.n_layer()));
        }
        if (spec.kept.has(il)) {
            lt_bad_value(LT_KEY_CACHE_KEEP, lt_layers_text(spec.kept.layers),
                    format("layers from 0 to %u, the others are not run by the main graph", model.hparams.n_layer() - 1));
        }
    }

    if (spec.type == GGML_TYPE_COUNT) {
        return;
    }

    const uint32_t n_block = ggml_blck_size(spec.type);

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        const uint32_t n_k = model.hparams.n_embd_head_k(il);
        const uint32_t n_v = model.hparams.n_embd_head_v(il);

        if (spec.is_streaming(il) && !spec.kept.has(il) && (n_k % n_block != 0 || n_v % n_block != 0)) {
            lt_bad_value(LT_KEY_TYPE, ggml_type_name(spec.type),
                    format("one whose blocks, here of %u values, divide the heads of layer %u, of %u (K) and %u (V)", n_block, il, n_k, n_v));
        }
    }
}

// -1 if the file doesn't have the key
static int64_t lt_find(const llama_model_loader & ml, const std::string & key) {
    return gguf_find_key(ml.metadata, key.c_str());
}

static uint32_t lt_read_u32(const llama_model_loader & ml, const std::string & key, int64_t min) {
    // as for other integers, --override-kv wins
    const auto it = ml.kv_overrides.find(key);
    if (it != ml.kv_overrides.end() && it->second.tag == LLAMA_KV_OVERRIDE_TYPE_INT) {
        return lt_check_u32(key, it->second.val_i64, min);
    }

    const int64_t kid = lt_find(ml, key);
    if (kid < 0) {
        throw std::invalid_argument(format("%s: is missing, must be an uint32 where the file says which layers stream", key.c_str()));
    }

    const auto type = gguf_get_kv_type(ml.metadata, kid);
    if (type != GGUF_TYPE_UINT32) {
        const std::string value = type == GGUF_TYPE_ARRAY ? "[...]" : gguf_kv_to_str(ml.metadata, kid);

        lt_bad_value(key, format("%s (%s)", value.c_str(), gguf_type_name(type)), format("an uint32 of at least %lld", (long long) min));
    }

    return lt_check_u32(key, gguf_get_val_u32(ml.metadata, kid), min);
}

static std::vector<bool> lt_read_layers(const llama_model_loader & ml, const std::string & key, uint32_t n_layer) {
    const int64_t kid = lt_find(ml, key);
    if (kid < 0) {
        throw std::invalid_argument(format("%s: is missing, must be an array of %u bool where the file gives the sink or the window", key.c_str(), n_layer));
    }

    const auto type = gguf_get_kv_type(ml.metadata, kid);

    const bool is_bool = type == GGUF_TYPE_ARRAY && gguf_get_arr_type(ml.metadata, kid) == GGUF_TYPE_BOOL;
    const size_t n_arr = type == GGUF_TYPE_ARRAY ?  gguf_get_arr_n   (ml.metadata, kid) : 0;

    if (!is_bool || n_arr != n_layer) {
        const std::string value = type == GGUF_TYPE_ARRAY ?
            format("[array of %zu %s]", n_arr, gguf_type_name(gguf_get_arr_type(ml.metadata, kid))) :
            format("%s (%s)", gguf_kv_to_str(ml.metadata, kid).c_str(), gguf_type_name(type));

        lt_bad_value(key, value, format("an array of bool, one for each of the %u layers", n_layer));
    }

    const int8_t * data = (const int8_t *) gguf_get_arr_data(ml.metadata, kid);

    std::vector<bool> res(n_layer);
    for (uint32_t il = 0; il < n_layer; ++il) {
        res[il] = data[il] != 0;
    }

    return res;
}

static lt_prefill lt_read_prefill(const llama_model_loader & ml, const std::string & key) {
    const auto it = ml.kv_overrides.find(key);
    if (it != ml.kv_overrides.end() && it->second.tag == LLAMA_KV_OVERRIDE_TYPE_STR) {
        return lt_check_prefill(key, it->second.val_str);
    }

    const int64_t kid = lt_find(ml, key);
    if (kid < 0) {
        throw std::invalid_argument(format("%s: is missing, must be \"full\" or \"stream\" where the file says which layers stream", key.c_str()));
    }

    const auto type = gguf_get_kv_type(ml.metadata, kid);
    if (type != GGUF_TYPE_STRING) {
        lt_bad_value(key, format("(%s)", gguf_type_name(type)), "\"full\" or \"stream\"");
    }

    return lt_check_prefill(key, gguf_get_val_str(ml.metadata, kid));
}

void lt_model_specs::load(llama_model_loader & ml, const llama_model & model) {
    const uint32_t n_layer = model.hparams.n_layer_all;

    const std::string key_layers  = lt_gguf_key(model, LT_KEY_LAYERS);
    const std::string key_sink    = lt_gguf_key(model, LT_KEY_SINK);
    const std::string key_window  = lt_gguf_key(model, LT_KEY_WINDOW);
    const std::string key_prefill = lt_gguf_key(model, LT_KEY_PREFILL);

    file.reset();

    if (lt_find(ml, key_layers) >= 0 || lt_find(ml, key_sink) >= 0 || lt_find(ml, key_window) >= 0 || lt_find(ml, key_prefill) >= 0) {
        lt_spec spec;

        spec.layers   = lt_read_layers (ml, key_layers, n_layer);
        spec.n_sink   = lt_read_u32    (ml, key_sink,   0);
        spec.n_window = lt_read_u32    (ml, key_window, 1);
        spec.prefill  = lt_read_prefill(ml, key_prefill);

        file = std::move(spec);
    }

    init = file.value_or(lt_spec());
    init.layers.resize(n_layer, false);

    if (lt_is_draft) {
        if (file && file->any()) {
            LLAMA_LOG_INFO("%s: streaming layers: off (a draft)\n", __func__);
        }

        init = lt_spec();
        init.layers.resize(n_layer, false);
        return;
    }

    const char * env = getenv(LT_ENV);
    if (env && *env) {
        try {
            init = lt_spec::parse(env, may_stream(model), file ? &*file : nullptr);
        } catch (const std::invalid_argument & err) {
            throw std::invalid_argument(format("%s: %s", LT_ENV, err.what()));
        }
    }

    check(init, model);

    if (init.enabled() || init.kept.any()) {
        LLAMA_LOG_INFO("%s: streaming layers: %s (%s)\n", __func__, init.str().c_str(), env && *env ? LT_ENV : "from the file");
    } else if (file && file->any()) {
        LLAMA_LOG_INFO("%s: streaming layers: off (%s)\n", __func__, LT_ENV);
    }
}

void lt_model_specs::save(gguf_context * gguf, const llama_model & model) const {
    if (!file) {
        return;
    }

    const std::vector<int8_t> layers(file->layers.begin(), file->layers.end());

    gguf_set_arr_data(gguf, lt_gguf_key(model, LT_KEY_LAYERS) .c_str(), GGUF_TYPE_BOOL, layers.data(), layers.size());
    gguf_set_val_u32 (gguf, lt_gguf_key(model, LT_KEY_SINK)   .c_str(), file->n_sink);
    gguf_set_val_u32 (gguf, lt_gguf_key(model, LT_KEY_WINDOW) .c_str(), file->n_window);
    gguf_set_val_str (gguf, lt_gguf_key(model, LT_KEY_PREFILL).c_str(), lt_prefill_name(file->prefill));
}

void lt_model_specs::set(const char * text, const llama_model & model) const {
    if (!text) {
        lt_thread_specs.erase(id);
        return;
    }

    lt_spec spec = lt_spec::parse(text, may_stream(model), file ? &*file : nullptr);

    check(spec, model);

    lt_thread_specs[id] = std::move(spec);
}

const lt_spec & lt_model_specs::get() const {
    const auto it = lt_thread_specs.find(id);

    return it != lt_thread_specs.end() ? it->second : init;
}

lt_kv_params lt_model_specs::kv_params() const {
    lt_kv_params res;
    res.kept = get().kept;

    if (res.kept.any()) {
        LLAMA_LOG_INFO("%s: layers whose cache is not quantized: %s\n", __func__, lt_layers_text(res.kept.layers).c_str());
    }

    return res;
}

void lt_model_specs::load_drafts(bool is_draft) {
    lt_is_draft = is_draft;
}

uint64_t lt_model_specs::next_id() {
    static std::atomic<uint64_t> n = 0;

    return n++;
}
