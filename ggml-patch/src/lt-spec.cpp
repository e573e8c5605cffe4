#include "lt-spec.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

static const uint32_t LT_N_LAST_MAX = 1024;

static const char * const LT_OFF = "off";

const char * lt_prefill_name(lt_prefill prefill) {
    return prefill == LT_PREFILL_FULL ? "full" : "stream";
}

const char * lt_lazy_name(lt_lazy lazy) {
    return lazy == LT_LAZY_MIN ? "min" : "mean";
}

void lt_bad_value(const std::string & what, const std::string & value, const std::string & allowed) {
    throw std::invalid_argument(format("%s = %s: must be %s", what.c_str(), value.c_str(), allowed.c_str()));
}

uint32_t lt_check_u32(const std::string & what, int64_t value, int64_t min) {
    // note: positions are int32_t
    if (value < min || value > INT32_MAX) {
        lt_bad_value(what, std::to_string(value), format("an integer from %lld to %d", (long long) min, INT32_MAX));
    }

    return (uint32_t) value;
}

lt_prefill lt_check_prefill(const std::string & what, const std::string & value) {
    for (const auto prefill : { LT_PREFILL_STREAM, LT_PREFILL_FULL }) {
        if (value == lt_prefill_name(prefill)) {
            return prefill;
        }
    }

    lt_bad_value(what, "\"" + value + "\"", "\"full\" or \"stream\"");
}

lt_lazy lt_check_lazy(const std::string & what, const std::string & value) {
    for (const auto lazy : { LT_LAZY_MEAN, LT_LAZY_MIN }) {
        if (value == lt_lazy_name(lazy)) {
            return lazy;
        }
    }

    lt_bad_value(what, "\"" + value + "\"", "\"mean\" or \"min\"");
}

ggml_type lt_check_type(const std::string & what, const std::string & value) {
    // those that llama.cpp's tools take
    static const ggml_type types[] = {
        GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,   GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
        GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
    };

    std::string allowed;

    for (const auto type : types) {
        if (value == ggml_type_name(type)) {
            return type;
        }

        allowed += (allowed.empty() ? "" : ", ") + std::string(ggml_type_name(type));
    }

    lt_bad_value(what, "\"" + value + "\"", "one of " + allowed);
}

std::string lt_layers_text(const std::vector<bool> & layers) {
    std::string res;

    for (size_t i0 = 0; i0 < layers.size(); ++i0) {
        if (!layers[i0]) {
            continue;
        }

        size_t i1 = i0;
        while (i1 + 1 < layers.size() && layers[i1 + 1]) {
            ++i1;
        }

        res += (res.empty() ? "" : ",") + std::to_string(i0);
        if (i1 > i0) {
            res += "-" + std::to_string(i1);
        }

        i0 = i1;
    }

    return res.empty() ? "none" : res;
}

//
// lt_spec
//

bool lt_kept::any() const {
    return std::find(layers.begin(), layers.end(), true) != layers.end();
}

bool lt_spec::is_auto() const {
    return auto_fraction >= 0.0f;
}

bool lt_spec::enabled() const {
    return is_auto() || hides || any();
}

uint32_t lt_spec::n_swa(uint32_t n_swa) const {
    return enabled() ? std::max(n_window, n_swa) : n_swa;
}

bool lt_spec::any() const {
    return std::find(layers.begin(), layers.end(), true) != layers.end();
}

bool lt_spec::is_streaming(int32_t il) const {
    return il >= 0 && (size_t) il < layers.size() && layers[il];
}

std::string lt_spec::str() const {
    const std::string keep = kept.any() ? format(";%s=%s", LT_KEY_CACHE_KEEP, lt_layers_text(kept.layers).c_str()) : "";

    if (!enabled()) {
        return LT_OFF + keep;
    }

    std::string text = format("%s=%s;%s=%u;%s=%u;%s=%s",
            hides ? LT_KEY_HIDE : LT_KEY_LAYERS, lt_layers_text(layers).c_str(), LT_KEY_SINK, n_sink, LT_KEY_WINDOW, n_window, LT_KEY_PREFILL, lt_prefill_name(prefill));

    if (type != GGML_TYPE_COUNT) {
        text += format(";%s=%s", LT_KEY_TYPE, ggml_type_name(type));
    }

    if (is_auto()) {
        text = format("%s=%g;%s;%s=%u;%s=%s", LT_KEY_AUTO, auto_fraction, text.c_str(), LT_KEY_W_LAST, n_last, LT_KEY_LAZY, lt_lazy_name(lazy));
    }

    return text + keep;
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

static float lt_parse_fraction(const std::string & what, const std::string & s) {
    const bool is_number = !s.empty() && s.find_first_not_of("0123456789.") == std::string::npos && std::count(s.begin(), s.end(), '.') <= 1 && s != ".";

    const float res = is_number ? strtof(s.c_str(), nullptr) : -1.0f;
    if (!(res >= 0.0f && res <= 1.0f)) {
        lt_bad_value(what, "\"" + s + "\"", "a number from 0 to 1, the share of the layers that is to stream");
    }

    return res;
}

static std::vector<bool> lt_parse_layers(const std::string & key, const std::string & s, const std::vector<bool> & all) {
    const uint32_t n_layer = all.size();

    std::vector<bool> res(n_layer, false);

    if (s == "all" || s == "none") {
        return s == "all" ? all : res;
    }

    for (const auto & item : lt_split(s, ',')) {
        const auto range = lt_split(item, '-');

        const int64_t i0 = range.size() > 2 ? -1 : lt_parse_int(key, range.front());
        const int64_t i1 = range.size() > 2 ? -1 : lt_parse_int(key, range.back());

        if (i0 < 0 || i1 < i0 || i1 >= (int64_t) n_layer) {
            lt_bad_value(key, "\"" + item + "\"",
                    format("\"all\", \"none\", or layers and ranges of layers from 0 to %u, as in 1,3,5-9", n_layer - 1));
        }

        std::fill(res.begin() + i0, res.begin() + i1 + 1, true);
    }

    return res;
}

// the rest of a spec whose layers are chosen for the prompt
static void lt_check_auto(lt_spec & spec, bool has_layers, bool has_prefill, uint32_t n_layer) {
    if (has_layers) {
        throw std::invalid_argument(format("%s: can't be given with %s, which chooses them", LT_KEY_LAYERS, LT_KEY_AUTO));
    }
    if (has_prefill && spec.prefill != LT_PREFILL_FULL) {
        lt_bad_value(LT_KEY_PREFILL, "\"stream\"", "\"full\" with auto: the layers are chosen after the prompt has been read");
    }

    // note: a query is kept for each
    if (spec.n_last > LT_N_LAST_MAX) {
        lt_bad_value(LT_KEY_W_LAST, std::to_string(spec.n_last), format("an integer from 1 to %u", LT_N_LAST_MAX));
    }

    spec.layers.assign(n_layer, false);
    spec.prefill = LT_PREFILL_FULL;
}

lt_spec lt_spec::parse(const std::string & text, const std::vector<bool> & may_stream, const lt_spec * base) {
    const uint32_t n_layer = may_stream.size();

    const std::vector<bool> every(n_layer, true);

    const bool may_any = std::find(may_stream.begin(), may_stream.end(), true) != may_stream.end();

    lt_spec res;

    auto items = lt_split(text, ';');

    const bool is_off = items.front() == LT_OFF;

    if (is_off) {
        res.layers.assign(n_layer, false);
        items.erase(items.begin());
    } else if (base) {
        res = *base;
    }

    std::vector<std::string> seen;

    for (const auto & item : items) {
        size_t ieq = item.find('=');
        if (ieq == std::string::npos && lt_strip(item.substr(0, item.find(':'))) == LT_KEY_AUTO) {
            ieq = item.find(':'); // auto:0.5, as people write it
        }

        const std::string key   = lt_strip(item.substr(0, ieq));
        const std::string value = ieq == std::string::npos ? "" : lt_strip(item.substr(ieq + 1));

        if (ieq == std::string::npos) {
            throw std::invalid_argument(format("\"%s\": must be \"off\" or key=value pairs with ; between them, as in layers=1,3,5-9;sink=4;window=1020;prefill=stream", item.c_str()));
        }

        if (std::find(seen.begin(), seen.end(), key) != seen.end()) {
            throw std::invalid_argument(format("%s: is given twice", key.c_str()));
        }
        seen.push_back(key);

        if (is_off && key != LT_KEY_CACHE_KEEP) {
            throw std::invalid_argument(format("%s: can't be given with %s, where no layer streams", key.c_str(), LT_OFF));
        }

        if (key == LT_KEY_LAYERS || key == LT_KEY_HIDE) {
            res.layers = lt_parse_layers(key, value, may_any ? may_stream : every);
            res.hides  = key == LT_KEY_HIDE;
        } else if (key == LT_KEY_SINK) {
            res.n_sink = lt_check_u32(key, lt_parse_int(key, value), 0);
        } else if (key == LT_KEY_WINDOW) {
            res.n_window = lt_check_u32(key, lt_parse_int(key, value), 1);
        } else if (key == LT_KEY_PREFILL) {
            res.prefill = lt_check_prefill(key, value);
        } else if (key == LT_KEY_TYPE) {
            res.type = lt_check_type(key, value);
        } else if (key == LT_KEY_CACHE_KEEP) {
            res.kept.layers = lt_parse_layers(key, value, every);
        } else if (key == LT_KEY_AUTO) {
            res.auto_fraction = lt_parse_fraction(key, value);
        } else if (key == LT_KEY_W_LAST) {
            res.n_last = lt_check_u32(key, lt_parse_int(key, value), 1);
        } else if (key == LT_KEY_LAZY) {
            res.lazy = lt_check_lazy(key, value);
        } else {
            throw std::invalid_argument(format("%s: unknown key, must be one of %s, %s, %s, %s, %s, %s, %s, %s, %s, %s", key.c_str(),
                        LT_KEY_LAYERS, LT_KEY_SINK, LT_KEY_WINDOW, LT_KEY_PREFILL, LT_KEY_TYPE, LT_KEY_CACHE_KEEP, LT_KEY_AUTO, LT_KEY_W_LAST, LT_KEY_LAZY, LT_KEY_HIDE));
        }
    }

    const auto is_seen = [&](const char * key) {
        return std::find(seen.begin(), seen.end(), key) != seen.end();
    };

    if (is_seen(LT_KEY_HIDE) && (is_seen(LT_KEY_LAYERS) || is_seen(LT_KEY_AUTO))) {
        throw std::invalid_argument(format("%s: can't be given with %s", LT_KEY_HIDE, is_seen(LT_KEY_AUTO) ? LT_KEY_AUTO : LT_KEY_LAYERS));
    }

    // what these contexts keep of a layer is, or was, in the full part
    if (is_seen(LT_KEY_TYPE) && (res.is_auto() || res.hides)) {
        throw std::invalid_argument(format("%s: can't be given with %s, where all layers have the same type", LT_KEY_TYPE, res.hides ? LT_KEY_HIDE : LT_KEY_AUTO));
    }

    if (res.is_auto()) {
        lt_check_auto(res, is_seen(LT_KEY_LAYERS), is_seen(LT_KEY_PREFILL), n_layer);
        return res;
    }

    for (const char * key : { LT_KEY_W_LAST, LT_KEY_LAZY }) {
        if (is_seen(key)) {
            throw std::invalid_argument(format("%s: has a meaning with %s only, as in auto=0.5;w_last=16;lazy=min", key, LT_KEY_AUTO));
        }
    }

    // what is kept in 16 bits says nothing of what streams
    if (res.layers.empty() && seen.size() == 1 && is_seen(LT_KEY_CACHE_KEEP)) {
        res.layers.assign(n_layer, false);
    }

    if (res.layers.empty()) {
        throw std::invalid_argument(format("\"%s\": says no layers and the file names none, add for example layers=1,3,5-9", text.c_str()));
    }

    return res;
}
