"""The trained checkpoint on small samples: it finds what it is asked for, and shows which layers it needs for that.

`scripts/experiments/experiments.py` measures the same on 500 prompts of each task.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import make_prompt
from lt_gguf.evaluation.retrieval import questions, run
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.hf import analysis
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.spec import StreamingSpec
from lt_gguf.statistics import paired_difference

DEMO = Path(__file__).parents[2] / "models" / "demo"
SINK, WINDOW, LENGTH = 4, 60, 640
SAMPLES = 8  # of each task and depth
DEPTHS = (0.1, 0.5)  # where streaming layers don't see the needle any more


@pytest.fixture(scope="module")
def scorer(demo_gguf):
    with Scorer(demo_gguf, "off", ScorerOptions(n_threads=1, n_parallel=2)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def scores(scorer):
    """Gives the scores of a spec, one a prompt, the same prompts for each."""
    asked = questions(["single", "multi-key"], [LENGTH], DEPTHS, SAMPLES)

    @cache
    def measure(layers: tuple[int, ...], prefill: str = "full") -> list[float]:
        scorer.with_streaming(StreamingSpec(layers, scorer.n_layer, SINK, WINDOW, prefill) if layers else "off")
        return [answer.score for answer in run(scorer, asked, seed=3, fast=True)]

    return measure


@pytest.fixture(scope="module")
def ratios(scorer) -> np.ndarray:
    """Lazy ratios at the ends of questions and answers, (prompts, layers)."""
    samples = []
    for i, task in enumerate(TASKS.values()):
        prompt = make_prompt(scorer, task, np.random.default_rng(i), LENGTH, None, Haystack(), held_out=False)
        samples.append([*prompt.tokens, *prompt.answer])
    return analysis.measure(DEMO, samples, sink=SINK, window=WINDOW, w_last=32)


def choose(name: str, ratios: np.ndarray) -> tuple[int, ...]:
    n_layer = ratios.shape[1]
    return strategy(name).select(Request(Model("llama", "demo", n_layer, n_layer), ratios=ratios, sink=SINK, window=WINDOW)).layers


@pytest.mark.slow
def test_the_full_model_finds_needles_with_keys_that_it_never_saw(scores):
    assert np.mean(scores(())) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy-ratio", "frequency"])
def test_the_lazy_half_may_stream_and_the_others_may_not(scores, ratios, name):
    lazy = choose(name, ratios)
    others = tuple(il for il in range(ratios.shape[1]) if il not in lazy)
    full, hybrid, reverse = scores(()), scores(lazy), scores(others)
    assert paired_difference(full, hybrid).value < 0.07, "the lazy layers aren't needed"
    assert paired_difference(full, reverse).low > 0.2, "the testbed must tell layers apart"


@pytest.mark.slow
def test_generated_answers_score_as_the_most_likely_tokens_do(scorer):
    """Unless an answer is right in other words, which this model doesn't know."""
    scorer.with_streaming("off")
    asked = questions(["single"], [LENGTH], [0.3], 4)
    generated = [answer.score for answer in run(scorer, asked, seed=3)]
    assert generated == [answer.score for answer in run(scorer, asked, seed=3, fast=True)]
