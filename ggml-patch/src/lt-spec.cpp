#include "lt-spec.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "gguf.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <stdexcept>

//
// names
//

static const char * const LT_KEY_LAYERS  = "layers";
static const char * const LT_KEY_SINK    = "sink";
static const char * const LT_KEY_WINDOW  = "window";
static const char * const LT_KEY_PREFILL = "prefill";

static const char * const LT_ENV = "LT_STREAMING";

static std::string lt_gguf_key(const llama_model & model, const char * key) {
    return model.arch_name() + ".attention.streaming." + key;
}

static const char * lt_prefill_name(lt_prefill prefill) {
    return prefill == LT_PREFILL_FULL ? "full" : "stream";
}

//
// checks shared by the text and the metadata
// what: the key as the user knows it
//

[[noreturn]] static void lt_bad_value(const std::string & what, const std::string & value, const std::string & allowed) {
    throw std::invalid_argument(format("%s = %s: must be %s", what.c_str(), value.c_str(), allowed.c_str()));
}

static uint32_t lt_check_u32(const std::string & what, int64_t value, int64_t min) {
    // note: positions are int32_t
    if (value < min || value > INT32_MAX) {
        lt_bad_value(what, std::to_string(value), format("an integer from %lld to %d", (long long) min, INT32_MAX));
    }

    return (uint32_t) value;
}

static lt_prefill lt_check_prefill(const std::string & what, const std::string & value) {
    for (const auto prefill : { LT_PREFILL_STREAM, LT_PREFILL_FULL }) {
        if (value == lt_prefill_name(prefill)) {
            return prefill;
        }
    }

    lt_bad_value(what, "\"" + value + "\"", "\"full\" or \"stream\"");
}

//
// lt_spec
//

bool lt_spec::any() const {
    return std::find(layers.begin(), layers.end(), true) != layers.end();
}

bool lt_spec::is_streaming(int32_t il) const {
    return il >= 0 && (size_t) il < layers.size() && layers[il];
}

std::string lt_spec::str() const {
    if (!any()) {
        return "off";
    }

    std::string list;

    for (size_t i0 = 0; i0 < layers.size(); ++i0) {
        if (!layers[i0]) {
            continue;
        }

        size_t i1 = i0;
        while (i1 + 1 < layers.size() && layers[i1 + 1]) {
            ++i1;
        }

        list += (list.empty() ? "" : ",") + std::to_string(i0);
        if (i1 > i0) {
            list += "-" + std::to_string(i1);
        }

        i0 = i1;
    }

    return format("%s=%s;%s=%u;%s=%u;%s=%s",
            LT_KEY_LAYERS, list.c_str(), LT_KEY_SINK, n_sink, LT_KEY_WINDOW, n_window, LT_KEY_PREFILL, lt_prefill_name(prefill));
}

static std::string lt_strip(const std::string & s) {
    const char * ws = " \t\r\n";

    const size_t i0 = s.find_first_not_of(ws);
    if (i0 == std::string::npos) {
        return "";
    }

    return s.substr(i0, s.find_last_not_of(ws) - i0 + 1);
}

// note: unlike string_split(), "a;" is "a" and "" - the caller decides what an empty item means
static std::vector<std::string> lt_split(const std::string & s, char sep) {
    std::vector<std::string> res;

    size_t i0 = 0;
    while (true) {
        const size_t i1 = s.find(sep, i0);
        res.push_back(lt_strip(s.substr(i0, i1 == std::string::npos ? i1 : i1 - i0)));
        if (i1 == std::string::npos) {
            break;
        }
        i0 = i1 + 1;
    }

    return res;
}

static int64_t lt_parse_int(const std::string & what, const std::string & s) {
    const size_t n_sign = !s.empty() && s[0] == '-' ? 1 : 0;

    const bool is_int = s.size() > n_sign && s.size() <= n_sign + 18 &&
        std::all_of(s.begin() + n_sign, s.end(), [](char c) { return c >= '0' && c <= '9'; });

    if (!is_int) {
        lt_bad_value(what, "\"" + s + "\"", "an integer");
    }

    return std::stoll(s);
}

static std::vector<bool> lt_parse_layers(const std::string & s, uint32_t n_layer) {
    std::vector<bool> res(n_layer, s == "all");

    if (s == "all" || s == "none") {
        return res;
    }

    for (const auto & item : lt_split(s, ',')) {
        const auto range = lt_split(item, '-');

        const int64_t i0 = range.size() > 2 ? -1 : lt_parse_int(LT_KEY_LAYERS, range.front());
        const int64_t i1 = range.size() > 2 ? -1 : lt_parse_int(LT_KEY_LAYERS, range.back());

        if (i0 < 0 || i1 < i0 || i1 >= (int64_t) n_layer) {
            lt_bad_value(LT_KEY_LAYERS, "\"" + item + "\"",
                    format("\"all\", \"none\", or layers and ranges of layers from 0 to %u, as in 1,3,5-9", n_layer - 1));
        }

        std::fill(res.begin() + i0, res.begin() + i1 + 1, true);
    }

    return res;
}

lt_spec lt_spec::parse(const std::string & text, uint32_t n_layer, const lt_spec * base) {
    lt_spec res;

    if (lt_strip(text) == "off") {
        res.layers.assign(n_layer, false);
        return res;
    }

    if (base) {
        res = *base;
    }

    std::vector<std::string> seen;

    for (const auto & item : lt_split(text, ';')) {
        const size_t ieq = item.find('=');

        const std::string key   = lt_strip(item.substr(0, ieq));
        const std::string value = ieq == std::string::npos ? "" : lt_strip(item.substr(ieq + 1));

        if (ieq == std::string::npos) {
            throw std::invalid_argument(format("\"%s\": must be \"off\" or key=value pairs with ; between them, as in layers=1,3,5-9;sink=4;window=1020;prefill=stream", item.c_str()));
        }

        if (std::find(seen.begin(), seen.end(), key) != seen.end()) {
            throw std::invalid_argument(format("%s: is given twice", key.c_str()));
        }
        seen.push_back(key);

        if (key == LT_KEY_LAYERS) {
            res.layers = lt_parse_layers(value, n_layer);
        } else if (key == LT_KEY_SINK) {
            res.n_sink = lt_check_u32(key, lt_parse_int(key, value), 0);
        } else if (key == LT_KEY_WINDOW) {
            res.n_window = lt_check_u32(key, lt_parse_int(key, value), 1);
        } else if (key == LT_KEY_PREFILL) {
            res.prefill = lt_check_prefill(key, value);
        } else {
            throw std::invalid_argument(format("%s: unknown key, must be one of %s, %s, %s, %s",
                        key.c_str(), LT_KEY_LAYERS, LT_KEY_SINK, LT_KEY_WINDOW, LT_KEY_PREFILL));
        }
    }

    if (res.layers.empty()) {
        throw std::invalid_argument(format("\"%s\": says no layers and the file names none, add for example layers=1,3,5-9", text.c_str()));
    }

    return res;
}

//
// the model
//

// why this model can't have streaming layers, nullptr if it can
// the rule: the graph takes its K and V from the ordinary KV attention input, see llm_graph_context::build_attn_inp_kv()
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
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "it has a sliding window of its own";
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
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
            return "it has a sparse attention of its own";
        default:
            return nullptr;
    }
}

static void lt_check_model(const lt_spec & spec, const llama_model & model) {
    if (!spec.any()) {
        return;
    }

    if (const char * reason = lt_why_not(model)) {
        throw std::invalid_argument(format("%s: models of the architecture \"%s\" can't have streaming layers: %s (LT_STREAMING=off loads it with full attention)",
                    lt_gguf_key(model, LT_KEY_LAYERS).c_str(), model.arch_name().c_str(), reason));
    }

    for (uint32_t il = model.hparams.n_layer(); il < spec.layers.size(); ++il) {
        if (spec.layers[il]) {
            lt_bad_value(lt_gguf_key(model, LT_KEY_LAYERS), format("{%u: true}", il),
                    format("false from layer %u on, which the main graph doesn't run", model.hparams.n_layer()));
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

    const char * env = getenv(LT_ENV);
    if (env && *env) {
        try {
            init = lt_spec::parse(env, n_layer, file ? &*file : nullptr);
        } catch (const std::invalid_argument & err) {
            throw std::invalid_argument(format("%s: %s", LT_ENV, err.what()));
        }
    }

    lt_check_model(init, model);

    cur = init;

    if (cur.any()) {
        LLAMA_LOG_INFO("%s: streaming layers: %s (%s)\n", __func__, cur.str().c_str(), env && *env ? LT_ENV : "from the file");
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

void lt_model_specs::set(const char * text, const llama_model & model) {
    lt_spec spec = text ? lt_spec::parse(text, model.hparams.n_layer_all, file ? &*file : nullptr) : init;

    lt_check_model(spec, model);

    cur = std::move(spec);
}
