"""`prefill = full` on the transformers side: prompts see all of themselves, and what follows them streams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.families import FAMILIES
from support.reference import NumpyLlama
from transformers import DynamicCache

from lt_gguf.hf.decoder import cache_argument
from lt_gguf.hf.streaming_attention import apply_streaming, streaming_attention, visible
from lt_gguf.spec import StreamingSpec

N_LAYER = 4
N_TOKENS = 90
CONVERSATIONS = [
    [(0, 40)],
    [(0, 90)],
    [(0, 30), (45, 60), (60, 70), (75, 76)],
    [(5, 9), (50, 90)],
    [(20, 120)],  # still being read where the tokens end
]


def spec(layers, sink=3, window=11, prefill="full") -> StreamingSpec:
    return StreamingSpec(tuple(layers), N_LAYER, sink, window, prefill)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, inputs, streaming, prompts=None, implementation="sdpa", **arguments):
    with torch.no_grad(), streaming_attention(model, streaming, prompts=prompts, implementation=implementation):
        return model(inputs, **arguments).logits


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return FAMILIES[request.param].build_model(N_LAYER)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build_model(N_LAYER)


@pytest.mark.parametrize("sink, window", [(0, 1), (3, 1), (4, 7), (100, 2)])
@pytest.mark.parametrize("prompts", CONVERSATIONS)
def test_visible_is_the_rule_of_the_specification(sink, window, prompts):
    q, p = torch.arange(N_TOKENS)[:, None], torch.arange(N_TOKENS)[None]
    begins = [next((begin for begin, end in prompts if begin <= q < end), None) for q in range(N_TOKENS)]
    expected = [
        [p <= q and (p < sink or (q - p < window if begin is None else p >= begin - window)) for p in range(N_TOKENS)]
        for q, begin in enumerate(begins)
    ]
    assert visible(q, p, sink, window, prompts).tolist() == expected


def test_no_prompt_is_streaming_throughout_and_one_prompt_is_the_full_model(model):
    inputs = tokens(1, N_TOKENS)
    streaming = logits(model, inputs, spec(range(N_LAYER), prefill="stream"))
    assert torch.equal(logits(model, inputs, spec(range(N_LAYER)), []), streaming)
    full = logits(model, inputs, None)
    assert torch.equal(logits(model, inputs, spec(range(N_LAYER)), [(0, N_TOKENS)]), full)
    assert not torch.allclose(streaming, full, atol=1e-2)


def test_a_first_prompt_no_longer_than_sink_and_window_changes_nothing_after_it_either(model):
    inputs, n = tokens(1, 14), 13  # the 14th token is the first that sees all of sink and window, and no more
    full = logits(model, inputs, None)
    torch.testing.assert_close(logits(model, inputs, spec([0, 2]), [(0, n)]), full, atol=2e-5, rtol=0)


@pytest.mark.parametrize("prompts", CONVERSATIONS)
@pytest.mark.parametrize("layers", [[0], [1, 2], range(N_LAYER)])
@pytest.mark.parametrize("sink, window", [(0, 1), (2, 9), (40, 3)])
def test_matches_attention_written_out_in_numpy(llama, layers, sink, window, prompts):
    streaming = spec(layers, sink, window)
    inputs = tokens(1, N_TOKENS)
    conversation = NumpyLlama(llama, streaming).conversation()
    rows, ends = [], sorted({0, N_TOKENS} | {min(end, N_TOKENS) for prompt in prompts for end in prompt})
    for first, last in itertools.pairwise(ends):
        behind = next((begin - window for begin, end in prompts if begin <= first < end), None)
        rows.append(conversation.decode(inputs[0, first:last].numpy(), range(first, last), behind))
    computed = logits(llama, inputs, streaming, prompts)[0].numpy()
    np.testing.assert_allclose(computed, np.concatenate(rows), atol=2e-5)


def test_eager_and_sdpa_agree(model):
    inputs, prompts = tokens(1, N_TOKENS), CONVERSATIONS[2]
    sdpa = logits(model, inputs, spec([0, 3]), prompts)
    eager = logits(model, inputs, spec([0, 3]), prompts, "eager")
    torch.testing.assert_close(eager, sdpa, atol=2e-5, rtol=0)


@pytest.mark.parametrize("prompts", CONVERSATIONS)
def test_every_split_with_a_cache_equals_one_forward_pass(llama, prompts):
    inputs, streaming = tokens(1, N_TOKENS), spec([1, 2, 3])
    expected = logits(llama, inputs, streaming, prompts)
    with torch.no_grad(), streaming_attention(llama, streaming, prompts=prompts):
        parts, cache = [], DynamicCache(config=llama.config)
        for part in inputs.split([23, 30, 7] + [1] * 30, dim=1):
            parts.append(llama(part, **cache_argument(llama, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "prefill, prompts, words",
    [
        ("full", None, "'full' needs the prompts"),
        ("stream", [(0, 5)], "'stream' takes no prompts"),
        ("full", [(5, 5)], r"prompts \[\(5, 5\)\]: must be ascending"),
        ("full", [(7, 5)], "must be ascending"),
        ("full", [(-1, 5)], "must be ascending"),
        ("full", [(0, 9), (8, 12)], "don't overlap"),
        ("full", [(8, 12), (0, 4)], "must be ascending"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(llama, prefill, prompts, words):
    with pytest.raises(ValueError, match=words):
        apply_streaming(llama, spec([1], prefill=prefill), prompts=prompts)


def test_a_checkpoint_can_be_saved_while_prompts_are_set(llama):
    before = llama.config.to_dict()
    with streaming_attention(llama, spec([1]), prompts=[(0, 9)]):
        assert llama.config.to_json_string()
    assert llama.config.to_dict() == before
