#include "lt-kv-cache.h"

#include "lt-kv-cache-context.h"
#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

static const char * const LT_ENV_PROMPT_LIMIT = "LT_PROMPT_LIMIT"; // [MiB]

static lt_mask lt_make_mask(const lt_spec & spec, const llama_hparams & hparams, uint64_t n_seq, const lt_phases * phases) {
    const bool full    = spec.prefill == LT_PREFILL_FULL;
    const bool repeats = hparams.n_pos_per_embd() > 1;

    const uint64_t n_near = ((uint64_t) spec.n_sink + spec.n_window + LT_N_SPARE)*n_seq;

    lt_mask res;

    res.n_sink   = spec.n_sink;
    res.n_window = spec.n_window;
    res.n_back   = std::min<uint32_t>(spec.n_window - !full + repeats, INT32_MAX);
    res.phases   = phases;

    res.n_cells_decode = GGML_PAD((uint32_t) std::min<uint64_t>(n_near, INT32_MAX), 256);

    return res;
}

static uint32_t lt_size_streaming(const lt_spec & spec, const llama_cparams & cparams) {
    // note: swa_full does not apply here - it is on by default and would undo all savings
    const uint64_t n_seq = cparams.kv_unified ? cparams.n_seq_max : 1;
    const uint64_t n_max = ((uint64_t) spec.n_sink + spec.n_window)*n_seq + cparams.n_ubatch;

    // note: padded for performance, as the SWA cache is
    //       https://github.com/ggml-org/llama.cpp/issues/17037
    return GGML_PAD((uint32_t) std::min<uint64_t>(cparams.n_ctx_seq, n_max), 256);
}

// where the layers are chosen for the prompt, shorter ones than it takes for that, and their answers, are not to take a cache of the
// context's size in all layers
static uint32_t lt_size_kept(const lt_spec & spec, const llama_model & model, const llama_cparams & cparams) {
    const bool is_small = spec.is_auto() && !model.hparams.no_alloc;

    return is_small ? std::min(cparams.n_ctx_seq, lt_size_streaming(spec, cparams)) : cparams.n_ctx_seq;
}

// of K or of V in the streaming layers, where the other layers have the given type
static ggml_type lt_type_streaming(const lt_spec & spec, ggml_type type_full) {
    // note: what these contexts keep of a layer is, or was, in the full part
    if (spec.is_auto() || spec.hides) {
        return type_full;
    }

    if (spec.type != GGML_TYPE_COUNT) {
        return spec.type;
    }

    return ggml_is_quantized(type_full) ? GGML_TYPE_F16 : type_full;
}

static size_t lt_env_prompt_limit() {
    const char * env = getenv(LT_ENV_PROMPT_LIMIT);
    if (!env || !*env) {
        return 0;
    }

    char * end = nullptr;
    const long long n = strtoll(env, &end, 10);
    if (end == env || *end || n < 0 || n > INT32_MAX) {
        lt_bad_value(LT_ENV_PROMPT_LIMIT, format("\"%s\"", env), "a number of MiB, 0: no limit");
    }

    return (size_t) n << 20;
}

//
// lt_kv_cache
//

lt_kv_cache::lt_kv_cache(
        const llama_model         & model,
        const lt_spec             & spec,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const layer_filter_cb     & filter) :
    model(model),
    spec(spec),
    type_k(params.type_k),
    type_v(params.type_v),
    type_k_streaming(lt_type_streaming(spec, params.type_k)),
    type_v_streaming(lt_type_streaming(spec, params.type_v)),
    v_trans(!cparams.flash_attn),
    offload(cparams.offload_kqv),
    unified(cparams.kv_unified),
    n_seq_max(cparams.n_seq_max),
    n_ubatch(cparams.n_ubatch),
    size_full(cparams.n_ctx_seq),
    size_streaming(lt_size_streaming(spec, cparams)),
    size_kept(lt_size_kept(spec, model, cparams)),
    hparams_no_alloc(model.hparams),
    mask(lt_make_mask(spec, model.hparams, cparams.kv_unified ? cparams.n_seq_max : 1, &phases)),
    prompt_limit(lt_env_prompt_limit()),
    prompts(LLAMA_MAX_SEQ),
    n_declared(LLAMA_MAX_SEQ, 0) {
    hparams_no_alloc.no_alloc = true;

    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        has_cache.push_back((!filter || filter(il)) && !model.hparams.is_swa(il));
    }

    if (spec.is_auto() && n_seq_max > 1) {
        throw std::runtime_error(format("%s=%g: layers can be chosen for the prompt of one sequence only, this context has %u (llama-server: --parallel 1)",
                    LT_KEY_AUTO, spec.auto_fraction, n_seq_max));
    }

    LLAMA_LOG_INFO("%s: creating full KV cache, size = %u cells, and streaming KV cache, size = %u cells (%s)\n", __func__,
            size_full, size_streaming, spec.str().c_str());

    make_swa_part(cparams, filter);

    set_layers(spec.layers, spec.is_auto() || spec.hides);
}

// note: not where lt_layers is incomplete
lt_kv_cache::~lt_kv_cache() = default;

std::unique_ptr<llama_kv_cache> lt_kv_cache::create(const llama_hparams & hparams, uint32_t size, bool streaming, bool unified) const {
    const layer_filter_cb filter = [&](int32_t il) {
        return has_cache[il] && (!spec.hides && spec.is_streaming(il)) == streaming;
    };

    return create(hparams, size, streaming, unified, filter, !streaming && all_kept && spec.is_auto());
}

std::unique_ptr<llama_kv_cache> lt_kv_cache::create(
          const llama_hparams & hparams,
                     uint32_t   size,
                         bool   streaming,
                         bool   unified,
        const layer_filter_cb & filter,
                         bool   layer_buffers) const {
    lt_kv_params params;
    params.mask          = streaming ? mask : lt_mask();
    params.kept          = spec.kept;
    params.layer_buffers = layer_buffers;

    // note: llama_kv_cache adds positions to it
    const uint32_t n_swa = streaming ? std::min<uint32_t>(spec.n_window, INT32_MAX/2) : 0;

    return std::make_unique<llama_kv_cache>(
            model, hparams, streaming ? type_k_streaming : type_k, streaming ? type_v_streaming : type_v, v_trans, offload, unified, size, n_seq_max, 1,
            n_swa, streaming ? LLAMA_SWA_TYPE_STANDARD : LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr, "",
            params);
}

static llama_pos lt_pos(llama_pos p)                                   { return p; }
static llama_pos lt_pos(const std::pair<llama_pos, uint32_t> & pos_cell) { return pos_cell.first; }

// the first position of F from which on S has all of it. it_s: what S holds, from the back, because the sinks are there although
// what follows them may have been dropped
template <typename It>
static llama_pos lt_first_complete(const lt_kv_cache::pos_set & f, It it_s, It end_s) {
    for (auto it_f = f.rbegin(); it_f != f.rend(); ++it_f, ++it_s) {
        if (it_s == end_s || lt_pos(*it_s) != it_f->first) {
            return it_f->first + 1;
        }
    }

    return f.begin()->first;
}

llama_pos lt_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    const auto & f = pos_full(seq_id);

    if (f.empty()) {
        return -1;
    }

    // note: both are what a rollback by the larger window needs
    const llama_pos n_longer = std::max(0, (llama_pos) mask_swa.n_window - (llama_pos) mask.n_window);
    const llama_pos n_wider  = std::max(0, (llama_pos) mask.n_window - (llama_pos) mask_swa.n_window);

    const llama_pos min_streaming = seq_pos_min_streaming(seq_id);
    const llama_pos min_swa       = seq_pos_min_swa(seq_id);

    return std::max({
        f.begin()->first,
        min_streaming > f.begin()->first ? min_streaming - n_longer : 0,
        min_swa       > f.begin()->first ? min_swa       - n_wider  : 0,
    });
}

llama_pos lt_kv_cache::seq_pos_min_swa(llama_seq_id seq_id) const {
    const auto & s = pos_swa(seq_id);

    return kv_swa ? lt_first_complete(pos_full(seq_id), s.rbegin(), s.rend()) : 0;
}

llama_pos lt_kv_cache::seq_pos_min_streaming(llama_seq_id seq_id) const {
    const auto & f = pos_full(seq_id);

    llama_pos res;

    if (is_ahead(seq_id)) {
        const auto s = get_held(seq_id);

        res = lt_first_complete(f, s.rbegin(), s.rend());
    } else {
        const auto & s = pos_streaming(seq_id);

        res = lt_first_complete(f, s.rbegin(), s.rend());
    }

    if (res == f.begin()->first) {
        return res;
    }

    // a prompt that has lost some of what its tokens saw can't be gone on with, only what follows it
    for (const auto & cur : prompts[seq_id].all()) {
        if (cur.end != LT_POS_END && res > cur.first) {
            const llama_pos min = cur.end - (llama_pos) mask.n_window;

            res = std::max(res, min);
        }
    }

    return res;
}

llama_pos lt_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    return kv_full->seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_cache::memory_breakdown() const {
    auto mb = prompt_breakdown();
    for (const auto * kv : { kv_full.get(), kv_streaming.get(), kv_swa.get() }) {
        if (!kv) {
            continue;
        }
        for (const auto & buft_size : breakdown(*kv)) {
            mb[buft_size.first] += buft_size.second;
        }
    }
    return mb;
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_cache::prompt_breakdown() const {
    if (layered) {
        return layered->memory_breakdown();
    }

    if (kv_prompt) {
        return kv_prompt->memory_breakdown();
    }

    if (!model.hparams.no_alloc || !kv_reserve) {
        return {};
    }

    const double share = prompt_limit == 0 ? 1.0 : std::min(1.0, (double) prompt_limit/prompt_bytes(kv_reserve->get_size()));

    auto mb = kv_reserve->memory_breakdown();
    for (auto & buft_size : mb) {
        buft_size.second *= share;
    }
    return mb;
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_cache::breakdown(const llama_kv_cache & kv) const {
    return model.hparams.no_alloc ? kv.memory_breakdown() : lt_kv_ops::breakdown(kv);
}

llama_memory_context_ptr lt_kv_cache::init_full() {
    if (!has_memory()) {
        return nullptr;
    }

    return std::make_unique<lt_kv_cache_context>(this);
}

llama_memory_context_ptr lt_kv_cache::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<lt_kv_cache_context>(this, lctx, optimize);
}

void lt_kv_cache::lt_set_context(llama_context * lctx) {
    this->lctx = lctx;
}

bool lt_kv_cache::get_can_shift() const {
    // note: unlike with SWA, the parts need not have the same size: seq_add() refuses what would not be exact
    // what begins with a chunk would be seen in another one
    return kv_full->get_can_shift() && kv_streaming->get_can_shift() && !mask_swa.is_chunked;
}

const lt_spec & lt_kv_cache::get_spec() const {
    return spec;
}

const lt_mask & lt_kv_cache::get_mask() const {
    return mask;
}

void lt_kv_cache::hide(const lt_spec & spec) {
    GGML_ASSERT(this->spec.hides && spec.hides);

    GGML_ASSERT(this->spec.kept.layers == spec.kept.layers);

    this->spec = spec;

    mask = lt_make_mask(spec, model.hparams, unified ? n_seq_max : 1, &phases);
    generation++;

    // note: ggml-alloc tells graphs apart by their sizes alone, and would keep what layers read no longer than other layers did
    if (lctx) {
        lctx->lt_set_need_reserve();
    }
}

llama_kv_cache * lt_kv_cache::get_full() const {
    return kv_full.get();
}

llama_kv_cache * lt_kv_cache::get_streaming() const {
    return kv_streaming.get();
}

llama_kv_cache * lt_kv_cache::get_prompt() const {
    return kv_prompt.get();
}

llama_kv_cache * lt_kv_cache::get_swa() const {
    return kv_swa.get();
}

uint64_t lt_kv_cache::get_generation() const {
    return generation;
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_full(llama_seq_id seq_id) const {
    return kv_full->get_cells(seq_id).seq_pos_get(seq_id);
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_streaming(llama_seq_id seq_id) const {
    if (all_kept) {
        return pos_full(seq_id);
    }

    return (is_ahead(seq_id) ? kv_prompt : kv_streaming)->get_cells(seq_id).seq_pos_get(seq_id);
}

const lt_kv_cache::pos_set & lt_kv_cache::pos_streaming_until(llama_seq_id seq_id, llama_pos p_last) const {
    if (!all_kept && p_last <= kv_streaming->seq_pos_max(seq_id)) {
        return kv_streaming->get_cells(seq_id).seq_pos_get(seq_id);
    }

    return pos_streaming(seq_id);
}

std::vector<llama_pos> lt_kv_cache::get_held(llama_seq_id seq_id) const {
    std::vector<llama_pos> res;

    if (is_ahead(seq_id)) {
        for (const auto & [p, _] : kv_streaming->get_cells(seq_id).seq_pos_get(seq_id)) {
            res.push_back(p);
        }
    }

    const llama_pos p_last = res.empty() ? -1 : res.back();

    for (const auto & [p, _] : pos_streaming(seq_id)) {
        if (p > p_last) {
            res.push_back(p);
        }
    }

    return res;
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
