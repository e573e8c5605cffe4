#include "lt-graph.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

lt_graph_input_attn_kv::lt_graph_input_attn_kv(
        std::unique_ptr<llm_graph_input_attn_kv> inp_full,
        std::unique_ptr<llm_graph_input_attn_kv> inp_streaming,
        const lt_kv_cache_context * mctx) :
    llm_graph_input_attn_kv(*inp_full),
    inp_streaming(std::move(inp_streaming)),
    spec(mctx->get_spec()) {
}

void lt_graph_input_attn_kv::set_input(const llama_ubatch * ubatch) {
    // note: if all layers stream, the tensors of the full part are in no graph and have no buffer. set_input() skips those
    llm_graph_input_attn_kv::set_input(ubatch);

    inp_streaming->set_input(ubatch);
}

bool lt_graph_input_attn_kv::can_reuse(const llm_graph_params & params) {
    const auto * mctx_lt = static_cast<const lt_kv_cache_context *>(params.mctx);

    this         ->mctx = mctx_lt->get_full();
    inp_streaming->mctx = mctx_lt->get_streaming();

    bool res = true;

    for (const auto * inp : { static_cast<llm_graph_input_attn_kv *>(this), inp_streaming.get() }) {
        res &= inp->self_k_idxs->ne[0] == params.ubatch.n_tokens;

        res &= can_reuse_kq_mask(inp->self_kq_mask, inp->mctx, params.ubatch, params.cparams);
    }

    return res;
}

llm_graph_input_attn_kv * lt_graph_input_attn_kv::lt_for_layer(int il) {
    return spec.is_streaming(il) ? inp_streaming.get() : this;
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

    auto inp_full      = build_attn_inp_kv_impl(ctx0, ubatch, hparams, cparams, mctx_lt->get_full());
    auto inp_streaming = build_attn_inp_kv_impl(ctx0, ubatch, hparams, cparams, mctx_lt->get_streaming());

    return std::make_unique<lt_graph_input_attn_kv>(std::move(inp_full), std::move(inp_streaming), mctx_lt);
}
