#include "lt-spec.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

const char * lt_prefill_name(lt_prefill prefill) {
    return prefill == LT_PREFILL_FULL ? "full" : "stream";
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
