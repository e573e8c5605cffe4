"""Attention with few queries on the CPU: our kernel against float64, and what may not change a bit of its result."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import F16, Attention, rounded

TOLERANCE = 2e-6  # of the result's norm: sums in float32
TYPES = [Type.F16, Type.F32, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1]
HIDDEN = float("-inf")


def attention(seed: int, n_streams=1, n_q=1, n_kv=2, n_group=3, dim=64, dim_v=None, n_cells=300, seen=0.7, sinks=False, **settings):
    rng = np.random.default_rng(seed)
    type_k, type_v = settings.get("type_k", F16), settings.get("type_v", F16)
    mask = np.where(rng.random((n_streams, n_q, n_cells)) < seen, 0, HIDDEN).astype(np.float16)
    if settings.get("max_bias"):
        mask = np.where(mask == 0, -rng.integers(0, 60, mask.shape), mask).astype(np.float16)
    return Attention(
        q=rng.normal(size=(n_streams, n_q, n_kv * n_group, dim)).astype(np.float32),
        k=rounded(rng.normal(size=(n_streams, n_cells, n_kv, dim)), type_k),
        v=rounded(rng.normal(size=(n_streams, n_cells, n_kv, dim_v or dim)), type_v),
        mask=mask,
        sinks=rng.normal(size=n_kv * n_group).astype(np.float32) if sinks else None,
        **settings,
    )


def error(found: np.ndarray, expected: np.ndarray) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (norm or 1))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.fixed_dictionaries(
        {
            "n_streams": st.sampled_from([1, 1, 3]),
            "n_q": st.sampled_from([1, 1, 2, 5, 16]),
            "n_kv": st.sampled_from([1, 2, 3, 8]),
            "n_group": st.sampled_from([1, 2, 3, 4, 5, 7, 9]),
            "dim": st.sampled_from([64, 96, 128, 192, 256, 576]),
            "dim_v": st.sampled_from([None, None, 64, 128]),
            "n_cells": st.sampled_from([1, 3, 64, 255, 256, 1100, 2500]),
            "seen": st.sampled_from([0, 0.05, 0.5, 1]),
            "type_k": st.sampled_from(TYPES),
            "type_v": st.sampled_from(TYPES),
            "sinks": st.booleans(),
            "max_bias": st.sampled_from([0.0, 0.0, 8.0]),
            "softcap": st.sampled_from([0.0, 0.0, 30.0]),
        }
    ),
)
def test_against_float64(seed, shape):
    made = attention(seed, **shape)
    assert error(made.run(n_threads=1 + seed % 3), made.expected()) < TOLERANCE


@pytest.mark.parametrize("dim", [16, 48, 80, 112])
def test_heads_that_no_width_of_vectors_divides(dim):
    made = attention(1, dim=dim, n_q=2)
    assert error(made.run(), made.expected()) < TOLERANCE


def test_without_a_mask():
    made = attention(2, n_cells=700, n_q=3)
    made.mask = None
    assert error(made.run(n_threads=2), made.expected()) < TOLERANCE


def test_large_and_small_scores():
    """The maximum comes late, early, and is far from the rest; one that is all that counts."""
    for order in (1, -1):
        made = attention(3, n_cells=900, seen=1)
        made.q *= 40
        made.k = rounded(np.sort(made.k, axis=1)[:, ::order], F16)
        assert error(made.run(), made.expected()) < 1e-5


def test_what_sees_nothing_is_zero():
    made = attention(4, n_q=3, n_cells=600, seen=0.5)
    made.mask[0, 1] = HIDDEN
    found = made.run(n_threads=2)
    assert (found[0, 1] == 0).all() and error(found, made.expected()) < TOLERANCE


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_threads_change_no_bit(n_threads):
    made = attention(5, n_streams=2, n_q=4, n_cells=3000)
    assert np.array_equal(made.run(n_threads=n_threads), made.run(n_threads=1))


@pytest.mark.parametrize("type_", [Type.F16, Type.Q8_0])
def test_hidden_cells_change_no_bit(type_):
    """Cells that a query doesn't see can as well not be there: a layer that hides computes what one that drops computes."""
    made = attention(6, n_cells=1500, seen=0.4, type_k=type_, type_v=type_)
    found = made.run()
    seen = np.flatnonzero(made.mask[0, 0] == 0)
    made.k, made.v, made.mask = made.k[:, seen], made.v[:, seen], made.mask[:, :, seen]
    assert np.array_equal(made.run(), found)
    made.k[:, -1] = np.nan  # which is seen: so what is not, isn't read
    assert np.isnan(made.run()).any()


def test_other_queries_change_no_bit():
    made = attention(7, n_streams=2, n_q=6, n_cells=800)
    found = made.run(n_threads=2)
    for stream in range(2):
        for iq in range(6):
            alone = Attention(
                q=made.q[stream : stream + 1, iq : iq + 1],
                k=made.k[stream : stream + 1],
                v=made.v[stream : stream + 1],
                mask=made.mask[stream : stream + 1, iq : iq + 1],
            )
            assert np.array_equal(alone.run()[0, 0], found[stream, iq])


def test_it_is_left_to_ggml_where_nobody_asks():
    """And what ggml computes differs in its roundings, so it was ours before."""
    made = attention(8, n_cells=1000)
    ours, theirs = made.run(), made.run(ours=False)
    assert not np.array_equal(ours, theirs)
    assert error(ours, made.expected()) < error(theirs, made.expected()) < 1e-2


def test_many_queries_are_left_to_ggml():
    made = attention(9, n_q=17)
    assert np.array_equal(made.run(), made.run(ours=False))
