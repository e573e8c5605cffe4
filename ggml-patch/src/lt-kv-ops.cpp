#include "lt-kv-ops.h"

#include "llama-impl.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <stdexcept>

llama_kv_cells & lt_kv_ops::cells(llama_kv_cache & kv, uint32_t strm) {
    return kv.v_cells[strm];
}

std::vector<uint32_t> lt_kv_ops::find_cells(const llama_kv_cache & kv, uint32_t strm, uint32_t i0, uint32_t i1, size_t n) {
    const auto & cells = kv.v_cells[strm];

    i1 = std::min(i1, cells.size());

    // note: in a ring the dead cells that follow the head are the oldest ones. the younger ones allow for a rollback
    const uint32_t head = std::clamp(kv.v_heads[strm], i0, i1);

    std::vector<uint32_t> res;

    const auto search = [&](uint32_t from, uint32_t to) {
        for (uint32_t i = from; i < to && res.size() < n; ++i) {
            if (cells.is_empty(i) || kv.lt.is_dead(cells, i)) {
                res.push_back(i);
            }
        }
    };

    search(head, i1);
    search(i0, head);

    return res;
}

llama_kv_cache::slot_info lt_kv_ops::find_slot(const llama_kv_cache & kv, const llama_ubatch & ubatch) {
    const uint32_t n_seqs   = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;
    const uint32_t n_tokens = ubatch.n_tokens/n_seqs;

    GGML_ASSERT(ubatch.n_tokens % n_seqs == 0);

    llama_kv_cache::slot_info res = {
        /*.s0   =*/ LLAMA_MAX_SEQ,
        /*.s1   =*/ 0,
        /*.strm =*/ { },
        /*.idxs =*/ { },
    };

    res.resize(n_seqs);

    for (uint32_t s = 0; s < n_seqs; ++s) {
        const uint32_t strm = kv.seq_to_stream[ubatch.seq_id_unq[s]];

        res.s0 = std::min(res.s0, strm);
        res.s1 = std::max(res.s1, strm);

        res.strm[s] = strm;

        const uint32_t size   = kv.v_cells[strm].size();
        const uint32_t n_near = std::min(kv.lt.n_cells_decode, size);

        auto & idxs = res.idxs[s];

        idxs = find_cells(kv, strm, 0, n_near, n_tokens);

        if (idxs.size() < n_tokens) {
            const auto far = find_cells(kv, strm, n_near, size, n_tokens - idxs.size());
            idxs.insert(idxs.end(), far.begin(), far.end());
        }

        if (idxs.size() < n_tokens) {
            return { };
        }
    }

    return res;
}

// call f(i_src, i_dst, n) for each run of consecutive pairs
template <typename F>
static void lt_for_each_run(const lt_kv_ops::cell_pairs & pairs, const F & f) {
    for (size_t i0 = 0; i0 < pairs.size(); ) {
        size_t i1 = i0 + 1;
        while (i1 < pairs.size() && pairs[i1].first == pairs[i1 - 1].first + 1 && pairs[i1].second == pairs[i1 - 1].second + 1) {
            ++i1;
        }

        f(pairs[i0].first, pairs[i0].second, (uint32_t) (i1 - i0));

        i0 = i1;
    }
}

// rows of two tensors of the same type and row size
static void lt_copy_rows(const lt_kv_ops::cell_pairs & pairs, ggml_tensor * src, ggml_tensor * dst) {
    GGML_ASSERT(src->type == dst->type && src->ne[0] == dst->ne[0]);

    lt_for_each_run(pairs, [&](uint32_t i_src, uint32_t i_dst, uint32_t n) {
        ggml_init_params params = {
            /*.mem_size   =*/ 2*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };

        ggml_context_ptr ctx { ggml_init(params) };

        ggml_tensor * view_src = ggml_view_2d(ctx.get(), src, src->ne[0], n, src->nb[1], i_src*src->nb[1]);
        ggml_tensor * view_dst = ggml_view_2d(ctx.get(), dst, dst->ne[0], n, dst->nb[1], i_dst*dst->nb[1]);

        ggml_backend_view_init(view_src);
        ggml_backend_view_init(view_dst);

        ggml_backend_tensor_copy(view_src, view_dst);
    });
}

// columns of two transposed V tensors
// note: these take the way over the host, as there is no copy of strided tensors between buffers. V is transposed only where flash
//       attention is off, and what is copied is a window
static void lt_copy_columns(const lt_kv_ops::cell_pairs & pairs, const ggml_tensor * src, ggml_tensor * dst) {
    GGML_ASSERT(src->type == dst->type && src->ne[0] == dst->ne[0]);

    const size_t size_el = ggml_type_size(src->type);
    const size_t n_embd  = src->ne[0];

    std::vector<uint8_t> tmp;

    lt_for_each_run(pairs, [&](uint32_t i_src, uint32_t i_dst, uint32_t n) {
        tmp.resize(n_embd*n*size_el);

        ggml_backend_tensor_get_2d(src, tmp.data(), i_src*size_el, n*size_el, n_embd, src->ne[1]*size_el, n*size_el);
        ggml_backend_tensor_set_2d(dst, tmp.data(), i_dst*size_el, n*size_el, n_embd, dst->ne[1]*size_el, n*size_el);
    });
}

void lt_kv_ops::copy_data(
        const llama_kv_cache & src, uint32_t strm_src,
              llama_kv_cache & dst, uint32_t strm_dst,
            const cell_pairs & pairs,
                     int32_t   il) {
    assert(src.v_trans == dst.v_trans);

    for (const auto & layer_dst : dst.layers) {
        if (il >= 0 && (int32_t) layer_dst.il != il) {
            continue;
        }

        const auto & layer_src = src.layers[src.map_layer_ids.at(layer_dst.il)];

        lt_copy_rows(pairs, layer_src.k_stream[strm_src], layer_dst.k_stream[strm_dst]);

        if (src.v_trans) {
            lt_copy_columns(pairs, layer_src.v_stream[strm_src], layer_dst.v_stream[strm_dst]);
        } else {
            lt_copy_rows   (pairs, layer_src.v_stream[strm_src], layer_dst.v_stream[strm_dst]);
        }
    }
}

void lt_kv_ops::copy_cell(const llama_kv_cells & src, uint32_t i_src, llama_kv_cells & dst, uint32_t i_dst) {
    const llama_pos         pos = src.pos_get(i_src);
    const llama_kv_cell_ext ext = src.ext_get(i_src);

    if (!dst.is_empty(i_dst)) {
        dst.rm(i_dst);
    }

    dst.pos_set(i_dst, pos);
    dst.ext_set(i_dst, ext);
}

void lt_kv_ops::copy_all(const llama_kv_cache & src, llama_kv_cache & dst) {
    for (uint32_t strm = 0; strm < src.n_stream; ++strm) {
        const auto & cells_src = src.v_cells[strm];
              auto & cells_dst = dst.v_cells[strm];

        cell_pairs pairs;
        for (uint32_t i = 0; i < cells_src.size(); ++i) {
            if (cells_src.is_empty(i)) {
                continue;
            }

            copy_cell(cells_src, i, cells_dst, i);
            for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
                if (cells_src.seq_has(i, s)) {
                    cells_dst.seq_add(i, s);
                }
            }

            pairs.push_back({ i, i });
        }

        copy_data(src, strm, dst, strm, pairs);

        dst.v_heads[strm] = src.v_heads[strm];
    }
}

template <typename T>
static void lt_hide(const llama_kv_cache & kv, const lt_mask & mask, const llama_ubatch & ubatch, ggml_tensor * dst, T hidden) {
    const int64_t n_kv = dst->ne[0];

    T * data = (T *) dst->data;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id s = ubatch.seq_id[i][0];

        const auto & cells = kv.get_cells(s);

        for (int64_t j = 0; j < n_kv; ++j) {
            if (cells.seq_has(j, s) && mask.is_masked(s, cells.pos_get(j), ubatch.pos[i])) {
                data[i*n_kv + j] = hidden;
            }
        }
    }
}

void lt_kv_ops::hide(const llama_kv_cache & kv, const lt_mask & mask, const llama_ubatch & ubatch, ggml_tensor * dst) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    if (dst->type == GGML_TYPE_F16) {
        lt_hide<ggml_fp16_t>(kv, mask, ubatch, dst, ggml_fp32_to_fp16(-INFINITY));
    } else {
        lt_hide<float>(kv, mask, ubatch, dst, -INFINITY);
    }
}

void lt_kv_ops::map(llama_kv_cache & kv, llama_seq_id seq_id, const std::function<llama_pos(llama_pos)> & map) {
    auto & cells = kv.v_cells[kv.seq_to_stream[seq_id]];

    const auto pos = cells.seq_pos_get(seq_id);
    for (const auto & [p, i] : pos) {
        if (map(p) != p) {
            cells.pos_add(i, map(p) - p);
        }
    }
}

bool lt_kv_ops::is_sane(const llama_kv_cache & kv, llama_seq_id seq_id) {
    const auto & pos = kv.get_cells(seq_id).seq_pos_get(seq_id);

    return pos.empty() || (pos.begin()->first >= 0 && pos.rbegin()->first < LT_POS_END/2);
}

void lt_kv_ops::purge(llama_kv_cache & kv, llama_seq_id seq_id) {
    auto & cells = kv.v_cells[kv.seq_to_stream[seq_id]];

    const auto pos = cells.seq_pos_get(seq_id);
    for (const auto & [_, i] : pos) {
        cells.seq_rm(i, seq_id);
    }
}

void lt_kv_ops::set_head(llama_kv_cache & kv, uint32_t strm, uint32_t i) {
    kv.v_heads[strm] = i;
}

void lt_kv_ops::use_rotation_of(const llama_kv_cache & src, llama_kv_cache & dst) {
    // note: a cache rotates only if all its layers have the same head size, so one with fewer layers may rotate where this one doesn't
    GGML_ASSERT(dst.attn_rot_k >= src.attn_rot_k && dst.attn_rot_v >= src.attn_rot_v);

    dst.attn_rot_k = src.attn_rot_k;
    dst.attn_rot_v = src.attn_rot_v;
}

const lt_kept & lt_kv_ops::kept(const llama_kv_cache & kv) {
    return kv.lt_kept_layers;
}

void lt_kv_ops::for_each_layer(const llama_kv_cache & kv, const std::function<void(int32_t, ggml_tensor *, ggml_tensor *)> & f) {
    for (const auto & layer : kv.layers) {
        f(layer.il, layer.k, layer.v);
    }
}

bool lt_kv_ops::has_equal_layers(const llama_kv_cache & kv) {
    const auto is_equal = [](const ggml_tensor * a, const ggml_tensor * b) {
        return a && b ? ggml_are_same_shape(a, b) && a->type == b->type : a == b;
    };

    bool res = true;
    for_each_layer(kv, [&](int32_t, const ggml_tensor * k, const ggml_tensor * v) {
        const auto & first = kv.layers.front();

        res = res && is_equal(k, first.k) && is_equal(v, first.v);
    });

    return res;
}

// where the values begin in memory that begins with the keys
static size_t lt_offs_v(ggml_backend_buffer_type_t buft, const ggml_tensor * k) {
    return GGML_PAD(ggml_backend_buft_get_alloc_size(buft, k), ggml_backend_buft_get_alignment(buft));
}

static size_t lt_size(ggml_backend_buffer_type_t buft, const ggml_tensor * k, const ggml_tensor * v) {
    return lt_offs_v(buft, k) + (v ? ggml_backend_buft_get_alloc_size(buft, v) : 0);
}

// throws std::runtime_error
static ggml_backend_buffer_ptr lt_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_ptr res { ggml_backend_buft_alloc_buffer(buft, size) };
    if (!res) {
        throw std::runtime_error(format("%.1f MiB could not be allocated", size/1024.0/1024.0));
    }

    // what is in no cell must still be numbers
    ggml_backend_buffer_clear(res.get(), 0);

    return res;
}

// keys and values in a buffer, and what looks at them
template <typename Layer>
static void lt_put_layer(const Layer & layer, ggml_backend_buffer_t buf) {
    const auto put = [&](ggml_tensor * t, size_t offs) {
        t->buffer = nullptr;
        ggml_backend_tensor_alloc(buf, t, (uint8_t *) ggml_backend_buffer_get_base(buf) + offs);
    };

    put(layer.k, 0);
    if (layer.v) {
        put(layer.v, lt_offs_v(ggml_backend_buffer_get_type(buf), layer.k));
    }

    for (const auto * views : { &layer.k_stream, &layer.v_stream }) {
        for (ggml_tensor * view : *views) {
            if (view) {
                view->buffer = nullptr;
                ggml_backend_view_init(view);
            }
        }
    }
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_ops::shared_breakdown(const llama_kv_cache & kv) {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for_each_layer(kv, [&](int32_t, const ggml_tensor * k, const ggml_tensor * v) {
        auto * buft = ggml_backend_buffer_get_type(k->buffer);

        res[buft] = std::max(res[buft], lt_size(buft, k, v));
    });

    return res;
}

std::vector<ggml_backend_buffer_ptr> lt_kv_ops::share_memory(llama_kv_cache & kv) {
    std::vector<ggml_backend_buffer_ptr> res;
    std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_t> bufs;

    for (const auto & [buft, size] : shared_breakdown(kv)) {
        res.push_back(lt_alloc(buft, size));

        bufs[buft] = res.back().get();
    }

    for (const auto & layer : kv.layers) {
        lt_put_layer(layer, bufs[ggml_backend_buffer_get_type(layer.k->buffer)]);
    }

    return res;
}

template <typename Layers>
static auto lt_find_layer(Layers & layers, int32_t il) {
    const auto it = std::find_if(layers.begin(), layers.end(), [&](const auto & layer) { return (int32_t) layer.il == il; });
    GGML_ASSERT(it != layers.end());

    return it;
}

template <typename Bufs>
static auto lt_find_buffer(Bufs & ctxs_bufs, const ggml_tensor * k) {
    const auto it = std::find_if(ctxs_bufs.begin(), ctxs_bufs.end(), [&](const auto & ctx_buf) { return ctx_buf.second.get() == k->buffer; });
    GGML_ASSERT(it != ctxs_bufs.end());

    return it;
}

void lt_kv_ops::take_memory(llama_kv_cache & kv, int32_t il, std::vector<ggml_backend_buffer_ptr> & spare) {
    const auto it = lt_find_layer(kv.layers, il);

    const ggml_tensor * k = it->k;

    auto & buf = lt_find_buffer(kv.ctxs_bufs, k)->second;

    auto * buft = ggml_backend_buffer_get_type(buf.get());

    const size_t size = lt_size(buft, k, it->v);

    const auto it_spare = std::find_if(spare.begin(), spare.end(), [&](const auto & cur) {
        return ggml_backend_buffer_get_type(cur.get()) == buft && ggml_backend_buffer_get_size(cur.get()) == size;
    });

    ggml_backend_buffer_ptr taken;

    if (it_spare != spare.end()) {
        taken = std::move(*it_spare);
        spare.erase(it_spare);
    } else {
        // note: one of another size would stay too large for this layer, or be held beside it
        if (!spare.empty()) {
            spare.pop_back();
        }

        taken = lt_alloc(buft, size);
    }

    lt_put_layer(*it, taken.get());

    buf = std::move(taken);
}

ggml_backend_buffer_ptr lt_kv_ops::give_memory(llama_kv_cache & kv, int32_t il) {
    const auto it = lt_find_layer(kv.layers, il);

    auto & ctx_buf = *lt_find_buffer(kv.ctxs_bufs, it->k);

    ggml_backend_buffer_ptr res { ggml_backend_buft_alloc_buffer(ggml_backend_buffer_get_type(ctx_buf.second.get()), 0) };

    for (ggml_tensor * t = ggml_get_first_tensor(ctx_buf.first.get()); t; t = ggml_get_next_tensor(ctx_buf.first.get(), t)) {
        t->buffer = res.get();
        t->data   = nullptr;
    }

    std::swap(res, ctx_buf.second);

    return res;
}

bool lt_kv_ops::has_memory(const llama_kv_cache & kv, int32_t il) {
    return lt_find_layer(kv.layers, il)->k->data;
}

void lt_kv_ops::drop_layer(llama_kv_cache & kv, int32_t il) {
    const auto it = lt_find_layer(kv.layers, il);

    const auto it_buf = lt_find_buffer(kv.ctxs_bufs, it->k);

    kv.layers   .erase(it);
    kv.ctxs_bufs.erase(it_buf);

    kv.map_layer_ids.clear();
    for (size_t i = 0; i < kv.layers.size(); ++i) {
        kv.map_layer_ids[kv.layers[i].il] = i;
    }
}

std::map<ggml_backend_buffer_type_t, size_t> lt_kv_ops::breakdown(const llama_kv_cache & kv) {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [_, buf] : kv.ctxs_bufs) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}
