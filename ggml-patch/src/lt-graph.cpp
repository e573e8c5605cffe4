#include "lt-graph.h"

#include "lt-kv-ops.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "lt.h"

#include "../ggml/src/ggml-cpu/lt-cpu-attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

static const char * const LT_ENV_ATTENTION = "LT_ATTENTION"; // on, off

std::atomic<bool> lt_attention_for_all = false;

bool lt_wants_attention(const llama_model & model) {
    const char * env = getenv(LT_ENV_ATTENTION);
    if (!env || !*env) {
        return lt_attention_for_all || model.lt.get().enabled();
    }

    if (strcmp(env, "on") != 0 && strcmp(env, "off") != 0) {
        throw std::invalid_argument(format("%s = %s: must be on or off", LT_ENV_ATTENTION, env));
    }

    return strcmp(env, "on") == 0;
}

void lt_mark_attention(ggml_tensor * attention, const llama_cparams & cparams) {
    if (cparams.lt_attention) {
        attention->op_params[LT_CPU_ATTENTION_PARAM] = LT_CPU_ATTENTION_ON;
    }
}

// the prompt part is one for all sequences
static llama_cparams lt_cparams(const llama_cparams & cparams, const lt_kv_cache_context * mctx) {
    llama_cparams res = cparams;
    res.kv_unified = cparams.kv_unified || mctx->is_in_prompt_part();

    return res;
}

lt_graph_input_attn_kv::lt_graph_input_attn_kv(
        std::unique_ptr<llm_graph_input_attn_kv> inp_full,
        std::unique_ptr<llm_graph_input_attn_kv> inp_streaming,
        const lt_kv_cache_context * mctx) :
    llm_graph_input_attn_kv(*inp_full),
    inp_streaming(std::move(inp_streaming)),
    kv(&mctx->get_cache()),
    mctx_lt(mctx),
    spec(mctx->get_cache().get_spec()),
    generation(mctx->get_cache().get_generation()),
    in_prompt_part(mctx->is_in_prompt_part()) {
}

void lt_graph_input_attn_kv::build_keep_idxs(ggml_context * ctx, const llama_ubatch & ubatch) {
    keep_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, std::min(ubatch.n_tokens, kv->get_lazy_ratio()->get_n_last()));
    ggml_set_input(keep_idxs);
    ggml_set_name(keep_idxs, "lt_inp_keep_idxs");
}

void lt_graph_input_attn_kv::for_each_tensor(const std::function<void(const ggml_tensor *)> & visit) const {
    for (const llm_graph_input_attn_kv * inp : { (const llm_graph_input_attn_kv *) this, (const llm_graph_input_attn_kv *) inp_streaming.get() }) {
        if (inp) {
            for (const auto * t : { inp->self_k_idxs, inp->self_v_idxs, inp->self_kq_mask, inp->self_k_rot, inp->self_v_rot }) {
                visit(t);
            }
        }
    }
}

void lt_graph_input_attn_kv::set_input(const llama_ubatch * ubatch) {
    // note: if all layers stream, the tensors of the full part are in no graph and have no buffer. set_input() skips those
    llm_graph_input_attn_kv::set_input(ubatch);

    if (inp_streaming) {
        inp_streaming->set_input(ubatch);

        if (spec.hides && inp_streaming->self_kq_mask->buffer) {
            lt_kv_ops::hide(*kv->get_full(), kv->get_mask(), *ubatch, inp_streaming->self_kq_mask);
        }
    }

    if (keep_idxs && keep_idxs->buffer) {
        std::vector<int64_t> data(keep_idxs->ne[0]);

        // note: the tokens of this ubatch are the last ones of the sequence
        const uint64_t n_past = mctx_lt->get_n_past();

        for (size_t j = 0; j < data.size(); ++j) {
            const size_t i_last = data.size() - 1 - j;

            data[j] = kv->get_lazy_ratio()->set_row(n_past - 1 - i_last, ubatch->pos[ubatch->n_tokens - 1 - i_last]);
        }

        ggml_backend_tensor_set(keep_idxs, data.data(), 0, ggml_nbytes(keep_idxs));
    }
}

void lt_graph_input_attn_kv::lt_keep_q(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int il) {
    if (keep_idxs) {
        kv->get_lazy_ratio()->build_keep(ctx, gf, q, keep_idxs, kq_scale, il);
    }
}

static bool lt_can_reuse_part(const llm_graph_input_attn_kv & inp, const llm_graph_params & params, const llama_cparams & cparams) {
    return inp.self_k_idxs->ne[0] == params.ubatch.n_tokens && can_reuse_kq_mask(inp.self_kq_mask, inp.mctx, params.ubatch, cparams);
}

bool lt_graph_input_attn_kv::can_reuse(const llm_graph_params & params) {
    mctx_lt = static_cast<const lt_kv_cache_context *>(params.mctx);

    // the graph has the tensors of the part that it was built with
    if (mctx_lt->get_cache().get_generation() != generation || mctx_lt->is_in_prompt_part() != in_prompt_part) {
        return false;
    }

    this->mctx = mctx_lt->get_full();
    if (inp_streaming) {
        inp_streaming->mctx = spec.hides ? mctx_lt->get_full() : mctx_lt->get_streaming();
    }

    return lt_can_reuse_part(*this, params, params.cparams) && (!inp_streaming || lt_can_reuse_part(*inp_streaming, params, lt_cparams(params.cparams, mctx_lt)));
}

llm_graph_input_attn_kv * lt_graph_input_attn_kv::lt_for_layer(int il) {
    return spec.is_streaming(il) ? inp_streaming.get() : this;
}

//
// layers with a sliding window of their own
//

lt_graph_input_attn_kv_iswa::lt_graph_input_attn_kv_iswa(
        const llama_hparams & hparams,
        const llama_cparams & cparams,
        std::unique_ptr<llm_graph_input_attn_kv> inp_global,
        std::unique_ptr<llm_graph_input_attn_kv> inp_swa) :
    llm_graph_input_attn_kv_iswa(hparams, cparams, nullptr),
    inp_global(std::move(inp_global)),
    inp_swa   (std::move(inp_swa)) {
}

void lt_graph_input_attn_kv_iswa::set_input(const llama_ubatch * ubatch) {
    inp_global->set_input(ubatch);
    inp_swa   ->set_input(ubatch);
}

bool lt_graph_input_attn_kv_iswa::can_reuse(const llm_graph_params & params) {
    inp_swa->mctx = static_cast<const lt_kv_cache_context *>(params.mctx)->get_swa();

    return inp_global->can_reuse(params) && lt_can_reuse_part(*inp_swa, params, params.cparams);
}

llm_graph_input_attn_kv * lt_graph_input_attn_kv_iswa::lt_for_layer(int il) {
    return (hparams.is_swa(il) ? inp_swa : inp_global).get();
}

std::unique_ptr<llm_graph_input_attn_kv_iswa> lt_build_attn_inp_kv_iswa(
                 ggml_context * ctx0,
           const llama_ubatch & ubatch,
          const llama_hparams & hparams,
          const llama_cparams & cparams,
 const llama_memory_context_i * mctx) {
    const auto * mctx_lt = dynamic_cast<const lt_kv_cache_context *>(mctx);
    if (!mctx_lt) {
        return nullptr;
    }

    // each of these inputs is for layers of one kind
    llama_hparams hparams_one = hparams;
    hparams_one.swa_type = LLAMA_SWA_TYPE_NONE;

    return std::make_unique<lt_graph_input_attn_kv_iswa>(hparams, cparams,
            lt_build_attn_inp_kv  (ctx0, ubatch, hparams_one, cparams, mctx),
            build_attn_inp_kv_impl(ctx0, ubatch, hparams_one, cparams, mctx_lt->get_swa()));
}

std::unique_ptr<llm_graph_input_attn_kv> lt_build_attn_inp_kv(
                 ggml_context * ctx0,
           const llama_ubatch & ubatch,
          const llama_hparams & hparams,
          const llama_cparams & cparams,
 const llama_memory_context_i * mctx) {
    const auto * mctx_lt = dynamic_cast<const lt_kv_cache_context *>(mctx);
    if (!mctx_lt) {
        return nullptr;
    }

    // note: whether there is flash attention is known only now
    const auto & spec = mctx_lt->get_cache().get_spec();
    if (spec.type != GGML_TYPE_COUNT && ggml_is_quantized(spec.type) && !cparams.flash_attn) {
        throw std::runtime_error(format("%s = %s: a quantized V needs flash attention, which is off", LT_KEY_TYPE, ggml_type_name(spec.type)));
    }

    auto inp_full = build_attn_inp_kv_impl(ctx0, ubatch, hparams, cparams, mctx_lt->get_full());

    if (spec.hides) {
        auto inp_hidden = build_attn_inp_kv_impl(ctx0, ubatch, hparams, cparams, mctx_lt->get_full());

        return std::make_unique<lt_graph_input_attn_kv>(std::move(inp_full), std::move(inp_hidden), mctx_lt);
    }

    if (mctx_lt->get_cache().keeps_all()) {
        auto res = std::make_unique<lt_graph_input_attn_kv>(std::move(inp_full), nullptr, mctx_lt);
        res->build_keep_idxs(ctx0, ubatch);
        return res;
    }

    auto inp_streaming = build_attn_inp_kv_impl(ctx0, ubatch, hparams, lt_cparams(cparams, mctx_lt), mctx_lt->get_streaming());

    return std::make_unique<lt_graph_input_attn_kv>(std::move(inp_full), std::move(inp_streaming), mctx_lt);
}
