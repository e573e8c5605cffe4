"""The transformers side of streaming attention, checked against itself and against attention written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import FAMILIES
from support.reference import NumpyLlama
from transformers import DynamicCache

from lt_gguf.hf.decoder import cache_argument
from lt_gguf.hf.streaming_attention import (
    apply_streaming,
    remove_streaming,
    streaming_attention,
    visible,
)
from lt_gguf.spec import StreamingSpec

N_LAYER = 4
FAMILY_NAMES = sorted(FAMILIES)


def spec(layers, sink=4, window=20) -> StreamingSpec:
    return StreamingSpec(layers=tuple(layers), n_layer=N_LAYER, sink=sink, window=window, prefill="stream")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, inputs: torch.Tensor, streaming: StreamingSpec | None, implementation="sdpa", **arguments):
    with torch.no_grad(), streaming_attention(model, streaming, implementation=implementation):
        return model(inputs, **arguments).logits


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def model(request):
    return FAMILIES[request.param].build_model(N_LAYER)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build_model(N_LAYER)


@pytest.mark.parametrize("sink, window", [(0, 1), (0, 5), (3, 1), (4, 7), (100, 2)])
def test_visible_is_the_rule_of_the_specification(sink, window):
    q, p = torch.arange(30)[:, None], torch.arange(30)[None]
    expected = [[p <= q and (p < sink or q - p < window) for p in range(30)] for q in range(30)]
    assert visible(q, p, sink, window).tolist() == expected


def test_a_window_as_long_as_the_prompt_changes_nothing(model):
    inputs = tokens(1, 60)
    full = logits(model, inputs, None)
    assert torch.equal(logits(model, inputs, spec(range(N_LAYER), sink=0, window=60)), full)
    assert torch.equal(logits(model, inputs, spec([])), full)
    assert not torch.allclose(logits(model, inputs, spec([1])), full, atol=1e-2)


def test_eager_and_sdpa_agree(model):
    inputs = tokens(1, 90)
    torch.testing.assert_close(logits(model, inputs, spec([0, 3]), "eager"), logits(model, inputs, spec([0, 3])), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layers", [[0], [1, 2], range(N_LAYER)])
@pytest.mark.parametrize("sink, window", [(0, 1), (2, 9), (40, 3)])
def test_matches_attention_written_out_in_numpy(llama, layers, sink, window):
    streaming = spec(layers, sink, window)
    inputs = tokens(1, 50)
    written_out = NumpyLlama(llama, streaming).conversation().decode(inputs[0].numpy(), range(50))
    np.testing.assert_allclose(logits(llama, inputs, streaming)[0].numpy(), written_out, atol=2e-5)


def test_decoding_with_a_cache_equals_one_forward_pass(model):
    inputs, streaming = tokens(1, 70), spec([1, 2, 3], sink=2, window=11)
    expected = logits(model, inputs, streaming)
    with torch.no_grad(), streaming_attention(model, streaming):
        parts, cache = [], DynamicCache(config=model.config)
        for part in inputs.split([30, 25] + [1] * 15, dim=1):
            parts.append(model(part, **cache_argument(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=0)


def test_padding_does_not_count_as_sink(llama):
    streaming = spec([0, 2], sink=3, window=8)
    inputs = tokens(1, 40)
    expected = logits(llama, inputs, streaming)
    padded = torch.cat([torch.zeros(1, 13, dtype=torch.long), inputs], dim=1)
    mask = (torch.arange(53) >= 13).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(llama, padded, streaming, attention_mask=mask, position_ids=positions)[:, 13:]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_packed_sequences_have_sinks_of_their_own(llama):
    streaming = spec([0, 1, 3], sink=3, window=8)
    inputs = [tokens(1, n, seed=n) for n in (35, 20, 27)]
    expected = torch.cat([logits(llama, part, streaming) for part in inputs], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in inputs])[None]
    got = logits(llama, torch.cat(inputs, dim=1), streaming, position_ids=positions, use_cache=False)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_gradients_flow_to_visible_keys_only(llama):
    inputs = tokens(1, 30)
    embedded = llama.get_input_embeddings()(inputs).detach().requires_grad_()
    with streaming_attention(llama, spec(range(N_LAYER), sink=2, window=1)):
        llama(inputs_embeds=embedded, use_cache=False).logits[0, -1].sum().backward()
    reached = embedded.grad[0].abs().sum(-1) > 0
    assert reached.nonzero().flatten().tolist() == [0, 1, 29]  # through any number of layers: sinks and itself


def test_removing_it_restores_the_model_and_its_config(llama):
    inputs = tokens(1, 40)
    before, config = logits(llama, inputs, None), llama.config.to_dict()
    apply_streaming(llama, spec([1]))
    assert llama.config.to_json_string()  # a checkpoint can be saved while it is applied
    remove_streaming(llama)
    assert llama.config.to_dict() == config
    with torch.no_grad():
        assert torch.equal(llama(inputs).logits, before)


@pytest.mark.parametrize(
    "streaming, implementation, words",
    [
        (StreamingSpec(layers=(1,), n_layer=5, sink=4, window=8, prefill="stream"), "sdpa", "5 layers.*has 4"),
        (StreamingSpec(layers=(1,), n_layer=4, sink=4, window=8, prefill="stream"), "flash", "'flash' is unknown.*sdpa, eager"),
    ],
)
def test_what_does_not_fit_is_refused(llama, streaming, implementation, words):
    with pytest.raises(ValueError, match=words):
        apply_streaming(llama, streaming, implementation=implementation)


def test_a_layer_with_a_window_of_its_own_is_refused():
    from transformers import AutoModelForCausalLM, Qwen3Config

    options = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=N_LAYER, head_dim=16)
    options |= dict(num_attention_heads=2, num_key_value_heads=2, use_sliding_window=True, sliding_window=8)
    sliding = AutoModelForCausalLM.from_config(Qwen3Config(**options, max_window_layers=2))
    with pytest.raises(ValueError, match="layer 3 is a sliding_attention layer"):
        apply_streaming(sliding, spec([0, 3]))
    inputs = tokens(1, 30) % 64
    assert torch.isfinite(logits(sliding, inputs, spec([0]))).all()


def test_a_model_with_an_attention_of_its_own_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=N_LAYER, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM.*AttentionInterface"):
        apply_streaming(bloom, spec([1]))


def test_a_mask_made_by_the_caller_is_refused(llama):
    with pytest.raises(ValueError, match="transformers' mask functions did not build"):
        logits(llama, tokens(1, 8), spec([1]), attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
