"""The reference for lazy ratios, against attention written out in numpy and against cases known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from support.families import FAMILIES
from support.lazy import laziest, lazy_ratios
from support.oracle import random_tokens
from support.reference import NumpyLlama

from lt_gguf.spec import StreamingSpec

N_LAYER = 4
TOKENS = random_tokens(70)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build_model(N_LAYER)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_keys_are_all_of_the_attention(family):
    model = FAMILIES[family].build_model(N_LAYER)
    np.testing.assert_allclose(lazy_ratios(model, TOKENS, 4, 70, 32), 1, rtol=0, atol=1e-6)
    some = lazy_ratios(model, TOKENS, 4, 20, 32)
    assert ((some > 0) & (some < 1)).all() and len(set(some)) == N_LAYER


def test_one_token(llama):
    np.testing.assert_allclose(lazy_ratios(llama, TOKENS[:1], 0, 1, 32), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sink, window, w_last", [(4, 20, 32), (0, 5, 1), (3, 1, 8), (4, 20, 200)])
def test_first_layer_in_numpy(llama, sink, window, w_last):
    """Layer 0 needs no layer below it: its weights from embeddings, one query and one head at a time."""
    numpy = NumpyLlama(llama, StreamingSpec.off(N_LAYER))
    w, prefix, n = numpy.weights, "model.layers.0", len(TOKENS)
    h = numpy.norm(w["model.embed_tokens.weight"][TOKENS], f"{prefix}.input_layernorm")
    q, k = (
        numpy.rope((h @ w[f"{prefix}.self_attn.{part}_proj.weight"].T).reshape(n, -1, numpy.head_dim), np.arange(n))
        for part in "qk"
    )
    masses = []
    for i in range(max(0, n - w_last), n):
        for head in range(numpy.n_head):
            weights = np.exp(k[: i + 1, head * numpy.n_kv // numpy.n_head] @ q[i, head] / np.sqrt(numpy.head_dim))
            lazy = [p for p in range(i + 1) if p < sink or p >= n - window]
            masses.append(weights[lazy].sum() / weights.sum())
    assert lazy_ratios(llama, TOKENS, sink, window, w_last)[0] == pytest.approx(np.mean(masses), abs=1e-6)


@pytest.mark.parametrize(
    "ratios, fraction, layers",
    [
        ([0.1, 0.9, 0.5, 0.7], 0.5, (1, 3)),
        ([0.1, 0.9, 0.5, 0.7], 0.74, (1, 3)),
        ([0.1, 0.9, 0.5, 0.7], 0.75, (1, 2, 3)),
        ([0.1, 0.9, 0.5, 0.7], 0, ()),
        ([0.1, 0.9, 0.5, 0.7], 1, (0, 1, 2, 3)),
        ([1, 1, 1, 1], 0.5, (2, 3)),
        ([0.5, 1, 0.5, 0.5], 0.5, (1, 3)),
    ],
)
def test_laziest(ratios, fraction, layers):
    assert laziest(np.array(ratios), fraction) == layers
