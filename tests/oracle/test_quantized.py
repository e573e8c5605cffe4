"""Quantized weights: the runtime computes what transformers does with the dequantized ones, full and hybrid, in both prefill modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.oracle import RELATIVE, Subject, difference, random_tokens
from support.quantized import FAMILY, N_LAYER, TYPES, build, without
from support.transcript import Transcript

SINK, WINDOW = 4, 40

# How far the runtime may be off by itself: the root mean square of the differences, as a share of the logits' standard deviation.
# It rounds the activations of a matrix product to 8 bits, with a scale for 32 values, or 256 with K-quants: half a percent each time,
# 0.020 and 0.029 after the 15 products here, 0.031 with a q8_0 cache. A kernel that loses one value in 256 is off by 0.24.
NOISE = 0.05

CASES = [("stream", "f32", False), ("stream", "q8_0", True), ("full", "f32", False), ("full", "f16", True)]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Callable[[str], Subject]:
    """The random Llama with weights of a type, quantized once: `quantized("q4_K")`."""
    base = Subject.of(FAMILY, N_LAYER, tmp_path_factory.mktemp("quantized"))
    built: dict[str, Subject] = {}

    def get(type_: str) -> Subject:
        if type_ not in built:
            built[type_] = build(base, type_)
        return built[type_]

    return get


def conversation(model: Subject, spec, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Two prompts and two answers, the runtime's logits and transformers'. 15 micro-batches of 1 to 64 tokens."""
    with model.context(spec, n_ctx=512, n_ubatch=64, **settings) as context:
        transcript = Transcript(model, spec, context)
        for n_prompt in (110, 43):
            transcript.read(n_prompt, most=True)
            transcript.decode(6)
        return transcript.logits()


def noise(computed: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((computed - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("prefill, kv, flash", CASES)
def test_the_dequantized_model(quantized, measured, type_, prefill, kv, flash):
    model = quantized(type_)
    spec = model.spec(SINK, WINDOW, [0], prefill=prefill)
    computed_full, expected_full = conversation(model, None, kv=kv, flash=flash)
    computed, expected = conversation(model, spec, kv=kv, flash=flash)
    assert noise(computed_full, expected_full) <= NOISE
    assert noise(computed, expected) <= NOISE
    assert noise(computed, expected_full) > 2 * NOISE, "it didn't stream, or it would not be seen"
    full = difference(computed_full, expected_full)
    details = dict(full=full, noise=max(noise(computed_full, expected_full), noise(computed, expected)), spec=str(spec))
    setting = f"prefill = {prefill}, {kv} KV" + ", flash attention" * flash
    measured(f"llama {type_}", setting, difference(computed, expected), RELATIVE * full, **details)


@pytest.mark.parametrize("type_", TYPES)
def test_the_oracle_notices_one_lost_value_in_256(quantized, type_):
    """What the test above can see, of a kernel's faults: 256 values are the largest block."""
    model = quantized(type_)
    tokens = random_tokens(100)
    expected, other = model.expected(tokens, None), replace(model, hf=without(model.hf, 256)).expected(tokens, None)
    assert noise(other, expected) > 2 * NOISE
