#include "lt-lazy-ratio.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>

// most bytes of the scores that are there at once
static const int64_t LT_SCORES_MAX = 32*1024*1024;

// most parts in a graph
static const size_t LT_CHUNKS_MAX = 16;

lt_lazy_ratio::lt_lazy_ratio(const llama_model & model, const std::vector<bool> & layers, uint32_t n_last, bool offload) :
    model(model), n_last(n_last), layers(layers.size()), rows(n_last) {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctxs;

    for (size_t il = 0; il < layers.size(); ++il) {
        if (!layers[il]) {
            continue;
        }

        auto * buft = offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        auto & ctx = ctxs[buft];
        if (!ctx) {
            ggml_init_params params = {
                /*.mem_size   =*/ layers.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            };

            ctx = ggml_init(params);
            ctxs_bufs.emplace_back(ctx, nullptr);
        }

        this->layers[il].q = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) model.hparams.n_embd_head_k(il)*model.hparams.n_head(il), n_last);
        ggml_format_name(this->layers[il].q, "lt_q_last_l%zu", il);
    }

    for (auto & [ctx, buf] : ctxs_bufs) {
        for (const auto & [buft, ctx_buft] : ctxs) {
            if (ctx_buft == ctx.get()) {
                buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
            }
        }
        if (!buf) {
            throw std::runtime_error("failed to allocate the queries of the lazy ratio");
        }

        ggml_backend_buffer_clear(buf.get(), 0);
    }
}

uint32_t lt_lazy_ratio::get_n_last() const {
    return n_last;
}

int64_t lt_lazy_ratio::set_row(uint64_t i, llama_pos pos) {
    const int64_t res = i % n_last;

    rows[res] = { i, pos };

    return res;
}

void lt_lazy_ratio::build_keep(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * idxs, float kq_scale, int il) {
    auto & cur = layers.at(il);
    if (!cur.q) {
        return;
    }

    const int64_t n_embd = q->ne[0]*q->ne[1];
    const int64_t n_keep = idxs->ne[0];

    GGML_ASSERT(n_embd == cur.q->ne[0] && q->ne[3] == 1);

    ggml_tensor * rows = ggml_view_3d(ctx, q, q->ne[0], q->ne[1], n_keep, q->nb[1], q->nb[2], (q->ne[2] - n_keep)*q->nb[2]);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, cur.q, ggml_cont_2d(ctx, rows, n_embd, n_keep), idxs));

    cur.kq_scale = kq_scale;
}

std::vector<lt_lazy_ratio::chunk> lt_lazy_ratio::split(int il, int64_t n_kv) const {
    const int64_t n_head_kv = model.hparams.n_head_kv(il);
    const int64_t n_gqa     = model.hparams.n_head(il)/n_head_kv;

    const int64_t n_max = LT_SCORES_MAX/(n_kv*(int64_t) sizeof(float)); // rows of scores

    const int64_t n_row_cur     = std::clamp<int64_t>(n_max/n_gqa, 1, n_last);
    const int64_t n_head_kv_cur = std::clamp<int64_t>(n_max/(n_gqa*n_row_cur), 1, n_head_kv);

    std::vector<chunk> res;

    for (int64_t h = 0; h < n_head_kv; h += n_head_kv_cur) {
        for (int64_t r = 0; r < n_last; r += n_row_cur) {
            res.push_back({ h, std::min(n_head_kv_cur, n_head_kv - h), r, std::min<int64_t>(n_row_cur, n_last - r) });
        }
    }

    return res;
}

ggml_tensor * lt_lazy_ratio::build_mass(ggml_context * ctx, ggml_tensor * k, ggml_tensor * mask, ggml_tensor * ind, const chunk & part, int il) const {
    const auto & hparams = model.hparams;

    const int64_t n_embd_head = k->ne[0];
    const int64_t n_gqa       = hparams.n_head(il)/hparams.n_head_kv(il);

    ggml_tensor * q = layers[il].q;

    // [n_embd_head, n_row, n_head] and [n_embd_head, n_kv, n_head_kv] of this part
    q = ggml_view_3d(ctx, q, n_embd_head, n_gqa*part.n_head_kv, part.n_row,
            n_embd_head*ggml_element_size(q), q->nb[1], n_gqa*part.head_kv*n_embd_head*ggml_element_size(q) + part.row*q->nb[1]);
    q = ggml_permute(ctx, q, 0, 2, 1, 3);

    k = ggml_view_3d(ctx, k, n_embd_head, part.n_head_kv, k->ne[2], k->nb[1], k->nb[2], part.head_kv*k->nb[1]);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    // as in llm_graph_context::build_attn_mha()
    if (model.arch == LLM_ARCH_GROK) {
        kq = ggml_tanh (ctx, ggml_scale(ctx, kq, hparams.f_attn_out_scale / hparams.f_attn_logit_softcapping));
        kq = ggml_scale(ctx, kq, hparams.f_attn_logit_softcapping);
    }

    if (hparams.attn_soft_cap) {
        kq = ggml_tanh (ctx, ggml_scale(ctx, kq, 1.0f / hparams.f_attn_logit_softcapping));
        kq = ggml_scale(ctx, kq, hparams.f_attn_logit_softcapping);
    }

    ggml_tensor * mask_part = ggml_view_2d(ctx, mask, mask->ne[0], part.n_row, mask->nb[1], part.row*mask->nb[1]);

    // note: the slope of ALiBi depends on the head's number, so there a part has all heads of the layer, see compute()
    kq = ggml_soft_max_ext(ctx, kq, mask_part, layers[il].kq_scale, hparams.f_max_alibi_bias);

    // note: what a learned sink gets is no mass on a key, as in lt_gguf/hf/lazy_ratio.py
    if (ggml_tensor * sinks = model.layers[il].attn_sinks) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, n_gqa*part.n_head_kv, n_gqa*part.head_kv*ggml_element_size(sinks)));
    }

    return ggml_mul_mat(ctx, ind, kq);
}

bool lt_lazy_ratio::is_measured(int il) const {
    return layers[il].q;
}

lt_lazy_ratio::view lt_lazy_ratio::make_view(const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec) const {
    const auto & cells = kv.get_cells(0);

    const bool alibi = model.hparams.f_max_alibi_bias > 0.0f;

    const llama_pos n = cells.seq_pos_max(0) + 1;

    view res;

    res.n_kv = std::min(cells.size(), GGML_PAD(std::max(cells.used_max_p1(), 1u), 256));

    res.valid.resize(n_last);
    for (uint32_t r = 0; r < n_last; ++r) {
        res.valid[r] = rows[r].pos >= 0 && rows[r].i < n_past && rows[r].i + n_last >= n_past;
    }

    res.mask.resize(res.n_kv*n_last, -INFINITY);
    res.ind .resize(res.n_kv, 0.0f);

    for (int64_t j = 0; j < res.n_kv; ++j) {
        if (cells.is_empty(j)) {
            continue;
        }

        const llama_pos p = cells.pos_get(j);

        res.ind[j] = p < (llama_pos) spec.n_sink || (int64_t) p >= (int64_t) n - spec.n_window ? 1.0f : 0.0f;

        for (uint32_t r = 0; r < n_last; ++r) {
            if (!res.valid[r] || p <= rows[r].pos) {
                res.mask[r*res.n_kv + j] = alibi ? -std::abs((float) (p - rows[r].pos)) : 0.0f;
            }
        }
    }

    return res;
}

std::vector<float> lt_lazy_ratio::compute(llama_context * lctx, const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec) const {
    const view seen = make_view(kv, n_past, spec);

    std::vector<float> res(layers.size(), std::numeric_limits<float>::quiet_NaN());

    for (size_t il = 0; il < layers.size(); ++il) {
        if (is_measured(il)) {
            res[il] = compute(lctx, kv, seen, spec.lazy, il);
        }
    }

    return res;
}

float lt_lazy_ratio::compute(llama_context * lctx, const llama_kv_cache & kv, uint64_t n_past, const lt_spec & spec, int il) const {
    return compute(lctx, kv, make_view(kv, n_past, spec), spec.lazy, il);
}

float lt_lazy_ratio::compute(llama_context * lctx, const llama_kv_cache & kv, const view & seen, lt_lazy lazy, int il) const {
    const auto & hparams = model.hparams;

    const int64_t n_kv = seen.n_kv;

    llama_kv_cache::slot_info sinfo = {
        /*.s0   =*/ 0,
        /*.s1   =*/ 0,
        /*.strm =*/ { 0 },
        /*.idxs =*/ { { 0 } },
    };

    auto * sched = lctx->get_sched();

    auto chunks = split(il, n_kv);
    if (hparams.f_max_alibi_bias > 0.0f) {
        chunks = { { 0, hparams.n_head_kv(il), 0, n_last } };
    }

    double sum = 0.0;
    float  min = 1.0f;

    for (size_t i0 = 0; i0 < chunks.size(); i0 += LT_CHUNKS_MAX) {
        const size_t n_nodes = 32*LT_CHUNKS_MAX;

        ggml_init_params params = {
            /*.mem_size   =*/ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };

        ggml_context_ptr ctx { ggml_init(params) };
        ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), n_nodes, false);

        ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_kv, n_last);
        ggml_tensor * ind  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_kv, 1);
        ggml_set_input(mask);
        ggml_set_input(ind);

        ggml_tensor * k = kv.get_k(ctx.get(), il, n_kv, sinfo);

        std::vector<ggml_tensor *> mass;
        for (size_t i = i0; i < std::min(i0 + LT_CHUNKS_MAX, chunks.size()); ++i) {
            mass.push_back(build_mass(ctx.get(), k, mask, ind, chunks[i], il));
            ggml_set_output(mass.back());
            ggml_build_forward_expand(gf, mass.back());
        }

        ggml_backend_sched_reset(sched);
        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            throw std::runtime_error("failed to allocate the graph of the lazy ratio");
        }

        ggml_backend_tensor_set(mask, seen.mask.data(), 0, ggml_nbytes(mask));
        ggml_backend_tensor_set(ind,  seen.ind .data(), 0, ggml_nbytes(ind));

        if (lctx->graph_compute(gf, true) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("failed to compute the lazy ratio");
        }

        ggml_backend_sched_synchronize(sched);

        for (size_t i = 0; i < mass.size(); ++i) {
            const chunk & part = chunks[i0 + i];

            std::vector<float> data(ggml_nelements(mass[i]));
            ggml_backend_tensor_get(mass[i], data.data(), 0, ggml_nbytes(mass[i]));

            for (size_t j = 0; j < data.size(); ++j) {
                if (seen.valid[part.row + j % part.n_row]) {
                    sum += data[j];
                    min  = std::min(min, data[j]);
                }
            }
        }
    }

    return lazy == LT_LAZY_MIN ? min : sum/(std::count(seen.valid.begin(), seen.valid.end(), true)*(double) hparams.n_head(il));
}
