"""Candidates measured on the runtime: the numbers are those of separate runs, and everything is counted."""

from __future__ import annotations

import numpy as np
import pytest

from lt_gguf.calibration import Texts
from lt_gguf.evaluation.candidates import RuntimeBench, RuntimeCandidates, Sample, open_candidates, puzzle_samples, text_samples
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.stories import story
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.evaluation.words import keys
from lt_gguf.spec import StreamingSpec

SINK, WINDOW, LENGTH = 4, 60, 420
OPTIONS = ScorerOptions(n_threads=1, n_parallel=2)


@pytest.fixture(scope="module")
def scorer(demo_gguf):
    with Scorer(demo_gguf, "off", OPTIONS) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def texts() -> Texts:
    rng = np.random.default_rng(1)
    return Texts("stories.txt", "ab" * 32, tuple(story(rng) for _ in range(120)))


def spec_of(scorer: Scorer, layers=(), prefill: str = "full") -> StreamingSpec:
    return StreamingSpec(layers, scorer.n_layer, SINK, WINDOW, prefill)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["full", "stream"], ids=["reading-in-full", "reading-in-streams"])
def test_the_numbers_are_those_of_a_run_by_hand(demo_gguf, scorer, texts, prefill):
    """Each token of the continuation decoded alone, by lt_gguf.Llama; KL and scores by their definitions."""
    import lt_gguf

    samples = [*text_samples(scorer, texts, 1, 200), *puzzle_samples(scorer, spec_of(scorer), 2, LENGTH, [7])]
    layers = (1, 2)
    exact = ScorerOptions(n_threads=1, n_parallel=2, cache_type_k="f32", cache_type_v="f32", flash_attn=False)
    with Scorer(demo_gguf, "off", exact) as own:
        found = RuntimeBench(own, spec_of(scorer, prefill=prefill), samples).measure(layers)
    of_texts, of_answers, scores = [], [], []
    settings = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}  # 0: f32
    settings |= {"flash_attn": False, "verbose": False}
    for sample in samples:
        by_model = []
        for streaming in ("off", spec_of(scorer, layers, prefill)):
            llm = lt_gguf.Llama(str(demo_gguf), streaming=streaming, **settings)
            llm.eval(sample.prompt)
            rows = []
            for token in sample.continuation:
                rows.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()], dtype=np.float64))
                llm.eval([token])
            by_model.append(log_softmax(np.array(rows)))
        full, hybrid = by_model
        kl = (np.exp(full) * (full - hybrid)).sum(axis=1)
        if not sample.spans:
            of_texts += kl.tolist()
            continue
        right = hybrid.argmax(axis=1) == np.array(sample.continuation)
        of_answers += [kl[i] for begin, end in sample.spans for i in range(begin, end)]
        scores.append(np.mean([right[begin:end].all() for begin, end in sample.spans]))
    assert len(of_texts) == 50 and len(of_answers) > 0  # a quarter of the text is decoded
    assert found.kl_text == pytest.approx(np.mean(of_texts), rel=1e-3, abs=1e-6)
    assert found.kl_answer == pytest.approx(np.mean(of_answers), rel=1e-3, abs=1e-6)
    assert found.scores == tuple(scores)
    assert found.kl_answer > 0


def test_a_score_is_the_share_of_the_parts_that_are_all_right():
    sample = Sample((1,), (5, 6, 7, 8), ((0, 2), (3, 4)))
    log_probs = np.full((4, 10), -9.0)
    log_probs[range(4), sample.continuation] = -0.1
    assert sample.score(log_probs) == 1
    log_probs[2, 0] = 0  # between the parts
    assert sample.score(log_probs) == 1
    log_probs[1, 0] = 0
    assert sample.score(log_probs) == 0.5
    assert sample.compared.tolist() == [True, True, False, True]
    assert Sample((1,), (5, 6)).compared.all()


def test_the_full_model_and_what_was_run_before(scorer, texts):
    samples = [*text_samples(scorer, texts, 1, 100), *puzzle_samples(scorer, spec_of(scorer), 1, LENGTH, [0])]
    tokens = []
    bench = RuntimeBench(scorer, spec_of(scorer), samples, tokens.append)
    some = bench.measure((2,))
    assert bench.runs == 2 and len(tokens) == 4  # the full model was run first
    full = bench.measure(())
    assert (full.kl_text, full.kl_answer) == (0, 0)
    assert bench.measure((2,)) is some and bench.runs == 2 and len(tokens) == 4
    assert sum(tokens) == 2 * sum(len(sample.prompt) + len(sample.continuation) for sample in samples)


@pytest.mark.slow
def test_a_model_without_far_sight_answers_otherwise(scorer, texts):
    samples = [*text_samples(scorer, texts, 1, 200), *puzzle_samples(scorer, spec_of(scorer), 10, LENGTH, [3])]
    bench = RuntimeBench(scorer, spec_of(scorer), samples)
    full, blind = bench.measure(()), bench.measure(tuple(range(scorer.n_layer)))
    assert blind.kl_answer > 0.1 and full.kl_answer == 0


def test_puzzles(scorer):
    samples = puzzle_samples(scorer, spec_of(scorer), 10, LENGTH, [5])
    said = [scorer.detokenize(sample.prompt) for sample in samples]
    assert all(LENGTH - 40 < len(sample.prompt) + len(sample.continuation) <= LENGTH for sample in samples)
    assert all(sample.spans for sample in samples) and len(TASKS) == 5
    held_out = [key for key in keys(held_out=True) if any(key in text for text in said)]
    assert not held_out or all(f"the {key} is" not in text for key in held_out for text in said)
    # what is asked for is where a streaming layer doesn't look: the value, of a needle, is far from the end
    for sample in (samples[0], samples[5]):
        (begin, end), *_ = sample.spans
        value = sample.continuation[begin:end]
        places = [i for i in range(len(sample.prompt)) if sample.prompt[i : i + len(value)] == value]
        assert places and max(places) < len(sample.prompt) - WINDOW
    again = puzzle_samples(scorer, spec_of(scorer), 10, LENGTH, [5])
    assert again == samples
    others = puzzle_samples(scorer, spec_of(scorer), 10, LENGTH, [6])
    assert not {sample.prompt for sample in samples} & {sample.prompt for sample in others}


@pytest.mark.slow
def test_two_benches_with_other_prompts(demo_gguf, texts):
    steps = []
    settings = {"samples": 2, "puzzles": 3, "length": LENGTH, "options": OPTIONS}
    with Scorer(demo_gguf, "off", OPTIONS) as scorer:
        spec = spec_of(scorer)
    with open_candidates(demo_gguf, spec, texts, **settings, progress=lambda *step: steps.append(step)) as measured:
        one, other = measured.choosing._samples, measured.judging._samples
        assert len(one) == len(other) == 5
        assert not {sample.prompt for sample in one} & {sample.prompt for sample in other}
        measured.announce(3)
        measured.choosing.measure((0,))
        measured.judging.measure(())
        found = measured.measurement
    assert steps[0] == ("candidates: up to 3 runs of 5 prompts of 420 tokens", 0, 15)
    assert steps[-1] == (steps[0][0], 15, 15)
    n_tokens = 2 * sum(len(s.prompt + s.continuation) for s in one) + sum(len(s.prompt + s.continuation) for s in other)
    assert (found.data, found.sha256, found.texts, found.puzzles, found.length) == ("stories.txt", "ab" * 32, 2, 3, LENGTH)
    assert (found.runs, found.prompts, found.tokens) == (3, 15, n_tokens)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"puzzles": 0}, "puzzles = 0: must be at least 1"),
        ({"samples": 0}, "samples = 0: must be at least 1"),
        ({"samples": 900}, "stories.txt: part 1 of 1800 has"),
        ({"length": 1 << 20}, "calibration length = 1048576: must be at most the model's context of"),
        ({"length": 100}, "takes .* tokens, must be at most 100"),
    ],
)
def test_what_cannot_be_measured(scorer, texts, changes, complaint):
    settings = {"samples": 2, "puzzles": 5, "length": LENGTH} | changes
    with pytest.raises(ValueError, match=complaint) as error:
        RuntimeCandidates(scorer, spec_of(scorer), texts, **settings)
    assert "\n" not in str(error.value)
