"""Hybrids of a checkpoint that share the reading of a prompt say what the runtime says, which reads it for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import make_prompt
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.tasks import find_task
from lt_gguf.hf.shared_prefill import CheckpointScorer
from lt_gguf.spec import StreamingSpec

DEMO = Path(__file__).parents[2] / "models" / "demo"
EXACT = 1e-3  # of log-probabilities: logits of this model are some ten times those of random ones
OPTIONS = ScorerOptions(n_threads=1, n_parallel=1, flash_attn=False, cache_type_k="f32", cache_type_v="f32")


@pytest.fixture(scope="module")
def checkpoint() -> CheckpointScorer:
    return CheckpointScorer(DEMO)


@pytest.fixture(scope="module")
def runtime(demo_gguf):
    with Scorer(demo_gguf, "off", OPTIONS) as scorer:
        yield scorer


def specs(n_layer: int) -> list[StreamingSpec | None]:
    odd, even = tuple(range(1, n_layer, 2)), tuple(range(0, n_layer, 2))
    return [
        StreamingSpec(odd, n_layer, 4, 28, "full"),
        None,
        StreamingSpec(even, n_layer, 0, 20, "full"),
        StreamingSpec(even, n_layer, 4, 28, "stream"),
        StreamingSpec(tuple(range(n_layer)), n_layer, 2, 9, "full"),
    ]


def test_both_tokenize_alike(checkpoint, runtime):
    text = "The code of the red lighthouse is 48213.\n<|end|> Füße, 12"
    assert checkpoint.bos == runtime.bos and checkpoint.chat_template == runtime.chat_template
    assert checkpoint.tokenize(text, special=True) == runtime.tokenize(text, special=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi-key", "votes"])
def test_log_probabilities_are_those_of_the_runtime(checkpoint, runtime, task):
    prompt = make_prompt(checkpoint, find_task(task), np.random.default_rng(1), 380, None, Haystack())
    answer = (*prompt.given, *prompt.answer)
    asked = specs(checkpoint.n_layer)
    for spec, found in zip(asked, checkpoint.logprobs(prompt.prompt, answer, asked), strict=True):
        runtime.with_streaming("off" if spec is None else spec)
        (expected,) = runtime.logprobs([(prompt.prompt, answer)])
        assert found.shape == expected.shape and np.abs(found - expected).max() < EXACT, spec


def test_the_order_of_the_specs_changes_nothing(checkpoint):
    prompt, answer = [*checkpoint.bos, *range(300, 420)], list(range(500, 512))
    asked = specs(checkpoint.n_layer)
    together = checkpoint.logprobs(prompt, answer, asked)
    for spec, found in zip(asked, together, strict=True):
        np.testing.assert_array_equal(checkpoint.logprobs(prompt, answer, [spec])[0], found)
    assert np.abs(together[0] - together[1]).max() > 1e-2, "a hybrid must differ from the full model here"


def test_an_answer_of_one_token_is_the_full_models(checkpoint):
    """It follows from the end of the prompt, which all layers have read in full."""
    asked = specs(checkpoint.n_layer)[:3]
    found = checkpoint.logprobs([*checkpoint.bos, *range(300, 380)], [7], asked)
    assert all(rows.shape[0] == 1 and np.array_equal(rows, found[1]) for rows in found)
