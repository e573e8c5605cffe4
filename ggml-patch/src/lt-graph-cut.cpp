#include "lt-graph-cut.h"

#include "lt-graph.h"
#include "lt-kv-cache-context.h"
#include "lt-kv-ops.h"
#include "lt-layers.h"

#include "llama-impl.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

// a part of a graph is another one for each run of layers
// note: upstream asks all inputs whether a graph can be used again, and by default the answer is no
class lt_graph_input_layers : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch *) override {}
};

// what the nodes of a graph have to do with each other and with the cache
struct lt_graph_use {
    std::vector<bool> is_dependent; // [n_nodes] on the tokens or on the cache, and not only on positions, masks and weights
    std::vector<int>  last_use;     // [n_nodes] the last dependent node that uses it, -1: none

    // the first and the last node that has to do with the keys and values of a layer, [n_layer_all]
    // note: a layer reads what it has written without a node that says so
    std::vector<int> first;
    std::vector<int> last;

    lt_graph_use(const llm_graph_params & params, const lt_kv_cache_context & mctx) {
        const auto & res = *params.res;

        auto * gf = res.get_gf();

        const int n       = ggml_graph_n_nodes(gf);
        const int n_layer = params.hparams.n_layer_all;

        is_dependent.assign(n, false);
        last_use    .assign(n, -1);
        first       .assign(n_layer, n);
        last        .assign(n_layer, -1);

        std::unordered_map<const ggml_tensor *, int> layer_of;
        mctx.for_each_kv([&](int32_t il, const ggml_tensor * kv) { layer_of[kv] = il; });

        std::unordered_map<const ggml_tensor *, int> index;
        std::unordered_set<const ggml_tensor *> dependent = { res.t_inp_tokens, res.t_inp_embd };

        for (int i = 0; i < n; ++i) {
            const ggml_tensor * node = ggml_graph_node(gf, i);

            // note: of two ways to the embeddings, the one that is not taken stays in the graph
            if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
                continue;
            }

            const auto touch = [&](const ggml_tensor * t) {
                const auto it = layer_of.find(t);
                if (it != layer_of.end()) {
                    first[it->second] = std::min(first[it->second], i);
                    last [it->second] = i;

                    is_dependent[i] = true;
                }
            };

            is_dependent[i] = dependent.count(node) > 0;

            touch(node->view_src);
            for (int j = 0; j < GGML_MAX_SRC && node->src[j]; ++j) {
                touch(node->src[j]);
                touch(node->src[j]->view_src);

                is_dependent[i] = is_dependent[i] || dependent.count(node->src[j]) > 0;
            }

            if (!is_dependent[i]) {
                continue;
            }

            dependent.insert(node);
            index[node] = i;

            for (int j = 0; j < GGML_MAX_SRC && node->src[j]; ++j) {
                const auto it = index.find(node->src[j]);
                if (it != index.end()) {
                    last_use[it->second] = i;
                }
            }
        }
    }
};

static std::vector<lt_cut> lt_find_cuts(const llm_graph_params & params, const lt_graph_use & use) {
    const int n       = use.last_use.size();
    const int n_layer = use.first.size();

    std::vector<lt_cut> res(n_layer);

    std::vector<int> n_ended(n, 0);
    std::vector<int64_t> sum_ended(n, 0);

    for (int i = 0; i < n; ++i) {
        if (use.last_use[i] >= 0) {
            n_ended  [use.last_use[i]]++;
            sum_ended[use.last_use[i]] += i;
        }
    }

    // the nodes up to i that are used behind it: how many, and the sum of their indices, which is the index of a single one
    int64_t n_live = 0;
    int64_t sum    = 0;

    // the first node that has to do with a layer or with one that follows it
    std::vector<int> begin = use.first;
    for (int il = n_layer - 2; il >= 0; --il) {
        begin[il] = std::min(begin[il], begin[il + 1]);
    }

    int last_before = -1; // the last node that has to do with the layers before

    for (int i = 0, il = 0; i < n; ++i) {
        n_live -= n_ended  [i];
        sum    -= sum_ended[i];

        if (use.last_use[i] >= 0) {
            n_live++;
            sum += i;
        }

        // the next layer that is still to come
        while (il < n_layer && (begin[il] <= i || use.last[il] < 0)) {
            last_before = std::max(last_before, use.last[il]);
            ++il;
        }

        // note: of the places between two layers the last one is taken
        if (il >= n_layer || last_before < 0 || last_before >= i || n_live != 1) {
            continue;
        }

        ggml_tensor * t = ggml_graph_node(params.res->get_gf(), sum);

        const bool is_rows = t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_is_matrix(t) &&
            t->ne[0] == (int64_t) params.hparams.n_embd && t->ne[1] == (int64_t) params.ubatch.n_tokens;

        if (is_rows) {
            res[il] = { i, t };
        }
    }

    return res;
}

std::vector<lt_cut> lt_find_cuts(const llm_graph_params & params, const lt_kv_cache_context & mctx) {
    return lt_find_cuts(params, lt_graph_use(params, mctx));
}

// the tensor becomes what ggml_view_2d() makes
static void lt_become_view(ggml_tensor * t, const ggml_tensor * view) {
    t->op        = view->op;
    t->view_src  = view->view_src;
    t->view_offs = view->view_offs;
    t->data      = view->data;

    std::copy_n(view->op_params, GGML_MAX_OP_PARAMS/sizeof(view->op_params[0]), t->op_params);
    std::copy_n(view->src,       GGML_MAX_SRC,                                   t->src);
    std::copy_n(view->nb,        GGML_MAX_DIMS,                                  t->nb);
}

// what is set before a graph is computed, whether a node uses it or not
// note: but the inputs of attention, which are set only where they have memory
static std::vector<ggml_tensor *> lt_find_inputs(const llm_graph_result & res) {
    std::unordered_set<const ggml_tensor *> known;
    for (const auto & input : res.inputs) {
        if (const auto * inp = dynamic_cast<const lt_graph_input_attn_kv *>(input.get())) {
            inp->for_each_tensor([&](const ggml_tensor * t) { known.insert(t); });
        }
    }

    std::vector<ggml_tensor *> inputs;

    for (int i = 0; i < ggml_graph_n_nodes(res.gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(res.gf, i);

        for (int j = 0; j < GGML_MAX_SRC && node->src[j]; ++j) {
            if ((node->src[j]->flags & GGML_TENSOR_FLAG_INPUT) && known.insert(node->src[j]).second) {
                inputs.push_back(node->src[j]);
            }
        }
    }

    return inputs;
}

ggml_cgraph * lt_cut_graph(const llm_graph_params & params) {
    auto & res = *params.res;

    const auto * mctx = dynamic_cast<const lt_kv_cache_context *>(params.mctx);
    if (!mctx) {
        return res.gf;
    }

    const lt_layers * layers = mctx->get_layers();
    if (!layers) {
        mctx->note_cuts(params);
        return res.gf;
    }

    const lt_graph_use use(params, *mctx);

    const auto cuts = lt_find_cuts(params, use);

    const auto & run = layers->run();

    const lt_cut cut_begin = run.il_begin > 0      ? cuts[run.il_begin] : lt_cut();
    const lt_cut cut_end   = !layers->is_last_run() ? cuts[run.il_end]   : lt_cut();

    if ((run.il_begin > 0 && !cut_begin.t) || (!layers->is_last_run() && !cut_end.t)) {
        LLAMA_LOG_ERROR("%s: this graph can't be cut at layers %d and %d\n", __func__, run.il_begin, run.il_end);
        return nullptr;
    }

    const auto inputs = lt_find_inputs(res);

    // the nodes that stay, in the order in which they were. what they need besides follows from them
    std::vector<ggml_tensor *> nodes;

    const int i_end = cut_end.t ? cut_end.i_node + 1 : ggml_graph_n_nodes(res.gf);
    for (int i = cut_begin.i_node + 1; i < i_end; ++i) {
        if (use.is_dependent[i]) {
            nodes.push_back(ggml_graph_node(res.gf, i));
        }
    }

    ggml_context * ctx = res.get_ctx();

    const auto view_rows = [&] {
        return ggml_view_2d(ctx, layers->act, layers->act->ne[0], params.ubatch.n_tokens, layers->act->nb[1], mctx->get_i_token()*layers->act->nb[1]);
    };

    if (cut_begin.t) {
        lt_become_view(cut_begin.t, view_rows());
    }

    ggml_graph_clear(res.gf);

    for (ggml_tensor * node : nodes) {
        ggml_build_forward_expand(res.gf, node);
    }

    if (cut_end.t) {
        ggml_build_forward_expand(res.gf, ggml_cpy(ctx, cut_end.t, view_rows()));

        // what the layers that are still to come would give
        res.t_logits = res.t_embd = res.t_embd_pooled = res.t_h_nextn = nullptr;

        for (auto * t : { &res.t_sampled, &res.t_sampled_probs, &res.t_sampled_logits, &res.t_candidates }) {
            t->clear();
        }
    }

    for (ggml_tensor * t : inputs) {
        ggml_build_forward_expand(res.gf, t);
    }

    res.add_input(std::make_unique<lt_graph_input_layers>());

    return res.gf;
}
