"""KL divergence, top-1 agreement and perplexity: from given distributions, and of the runtime against decoding token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.native import Model
from support.oracle import Subject, random_tokens

from lt_gguf.calibration import Texts
from lt_gguf.evaluation import divergence
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.divergence import Means, compare, kl_divergence, measure, summarize, text_samples
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.statistics import mean_interval

SPEC = "layers=1,3;sink=2;window=24;prefill="
OPTIONS = ScorerOptions(n_parallel=2, n_batch=64, n_threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn=False)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class GivenScorer:
    """Log-probabilities that depend on the spec and the tokens only; says what it was asked."""

    n_vocab = 50
    bos = [1]
    options = ScorerOptions(n_parallel=3)

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []  # spec, number of samples

    def with_streaming(self, streaming) -> None:
        self.streaming = str(streaming)
        self.asked.append((self.streaming, 0))

    def logprobs(self, requests):
        for prompt, continuation in requests:
            self.asked[-1] = self.streaming, self.asked[-1][1] + 1
            yield self.answer(self.streaming, prompt, continuation)

    def answer(self, streaming: str, prompt, continuation) -> np.ndarray:
        noise = 0.0 if streaming == "off" else float(streaming)
        base = np.random.default_rng([*prompt, *continuation]).normal(0, 2, (len(continuation), self.n_vocab))
        other = np.random.default_rng([len(prompt), 7]).normal(0, 2, base.shape)
        return log_softmax(base + noise * other).astype(np.float32)

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % self.n_vocab for c in text]


SAMPLES = [([1, 2, 3], [4, 5, 6, 7]), ([1, 9], [8, 7]), ([1, 4, 4, 4], [3, 2, 1]), ([1], [5, 5, 5, 5, 5])]


def by_the_formula(streaming: str, sample) -> tuple[list[float], list[bool], list[float], list[float]]:
    """Sums written out, in Python's own floats."""
    full, hybrid = (GivenScorer().answer(spec, *sample).astype(float).tolist() for spec in ("off", streaming))
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(p, q)) for p, q in zip(full, hybrid)]
    same = [max(range(50), key=p.__getitem__) == max(range(50), key=q.__getitem__) for p, q in zip(full, hybrid)]
    full_nll, hybrid_nll = ([-row[token] for row, token in zip(rows, sample[1])] for rows in (full, hybrid))
    return kl, same, full_nll, hybrid_nll


def assert_right(comparison, streaming: str, sample) -> None:
    kl, same, full_nll, hybrid_nll = by_the_formula(streaming, sample)
    assert comparison.kl == pytest.approx(kl, abs=1e-6)
    assert comparison.same_top.tolist() == same
    assert comparison.full_nll == pytest.approx(full_nll)
    assert comparison.hybrid_nll == pytest.approx(hybrid_nll)
    assert comparison.means == pytest.approx([np.mean(values) for values in (kl, same, full_nll, hybrid_nll)], abs=1e-6)


def test_each_token_by_the_formula():
    hybrids = ["0.3", "1"]
    comparisons = list(measure(GivenScorer(), hybrids, SAMPLES))
    assert len(comparisons) == len(SAMPLES)
    for sample, by_hybrid in zip(SAMPLES, comparisons):
        for streaming, comparison in zip(hybrids, by_hybrid, strict=True):
            assert_right(comparison, streaming, sample)
    tops = np.concatenate([by_hybrid[0].same_top for by_hybrid in comparisons])
    assert tops.any() and not tops.all()  # else the test would not see what it compares


@pytest.mark.parametrize("fits, groups", [(100, [3, 1]), (8, [2, 2]), (7, [2, 1, 1]), (0, [1, 1, 1, 1])])
def test_some_samples_are_compared_at_a_time(monkeypatch, fits, groups):
    monkeypatch.setattr(divergence, "_MEMORY", fits * 4 * GivenScorer.n_vocab)
    scorer = GivenScorer()
    for sample, (_, comparison) in zip(SAMPLES, measure(scorer, ["0.3", "1"], SAMPLES), strict=True):
        assert_right(comparison, "1", sample)
    assert scorer.asked == [(spec, n) for n in groups for spec in ("off", "0.3", "1")]


def test_another_model_than_the_full_one_to_compare_with():
    (same,), *_ = measure(GivenScorer(), ["0.3"], SAMPLES, full="0.3")
    assert (same.kl == 0).all() and same.same_top.all() and (same.full_nll == same.hybrid_nll).all()


def test_progress():
    reported = []
    list(measure(GivenScorer(), ["0.3", "1"], SAMPLES, progress=lambda *what: reported.append(what)))
    assert [done for _, done, _ in reported] == list(range(1, 13)) and {total for *_, total in reported} == {12}
    assert [what for what, *_ in reported[::4]] == ["full model", "hybrid 1 of 2", "hybrid 2 of 2"]


def test_a_sample_without_a_continuation():
    with pytest.raises(ValueError, match="sample 2: has no continuation"):
        list(measure(GivenScorer(), ["1"], [SAMPLES[0], ([1, 2], [])]))


def test_kl_divergence_of_impossible_tokens():
    p = np.log(np.array([[0.5, 0.5, 1e-300], [0.25, 0.75, 1e-300]]))
    p[:, 2] = -math.inf
    q = np.log(np.array([[0.25, 0.25, 0.5], [0.25, 0.75, 1e-300]]))
    q[1, 2] = -math.inf
    assert kl_divergence(p, q) == pytest.approx([math.log(2), 0])
    assert kl_divergence(q, p) == pytest.approx([math.inf, 0])
    p[0, 0] = math.nan
    assert np.isnan(kl_divergence(p, q)).tolist() == [True, False]


def test_kl_divergence_is_not_negative():
    p = log_softmax(np.random.default_rng(0).normal(0, 3, (200, 1000))).astype(np.float32)
    q = np.nextafter(p, np.float32(1), dtype=np.float32)  # a sum of probabilities above 1
    assert (kl_divergence(p, q) == 0).all()


def test_summary():
    rng = np.random.default_rng(0)
    kl, same, full_nll = rng.random(10) / 10, rng.random(10), 2 + rng.random(10)
    hybrid_nll = full_nll + kl * rng.random(10)
    means = [Means(*numbers) for numbers in zip(kl, same, full_nll, hybrid_nll)]
    found = summarize(iter(means))
    assert found.kl == mean_interval(kl, limits=(0, math.inf))
    assert found.same_top == mean_interval(same, limits=(0, 1))
    assert found.full_perplexity == pytest.approx(np.exp(mean_interval(full_nll)))
    assert found.hybrid_perplexity == pytest.approx(np.exp(mean_interval(hybrid_nll)))
    assert found.perplexity_ratio == pytest.approx(np.exp(mean_interval(hybrid_nll - full_nll)))
    assert found.full_perplexity.value == pytest.approx(math.exp(full_nll.mean()))
    low, high = found.perplexity_ratio[1:]
    assert high - low < 0.1 * (found.full_perplexity.high - found.full_perplexity.low)  # pairs say more
    assert summarize(means, 0.5).kl.high < found.kl.high
    kl, same, *perplexities, _ = summarize([Means(0.1, 0.5, 2, 3)])
    assert kl == (0.1, 0, math.inf) and same == (0.5, 0, 1)
    assert [perplexity[1:] for perplexity in perplexities] == [(1, math.inf)] * 2


@pytest.mark.parametrize("means", [[], [Means(math.inf, 1, 2, math.inf), Means(0, 1, 2, 2)]])
def test_no_summary(means):
    with pytest.raises(ValueError, match="must be finite numbers, at least one"):
        summarize(means)


def test_samples_of_a_text():
    texts = Texts("book.txt", "0", ("".join(map(chr, range(100, 900))),))
    samples = text_samples(GivenScorer(), texts, 4, 30, 12)
    whole = GivenScorer().tokenize(texts.documents[0])
    for i, (prompt, continuation) in enumerate(samples):
        assert prompt + continuation == [1, *whole[200 * i : 200 * i + 41]]
        assert (len(prompt), len(continuation)) == (30, 12)
    for numbers, complaint in (((4, 1, 12), "tokens of a prompt = 1: must be at least 2"), ((4, 30, 0), "continuation = 0")):
        with pytest.raises(ValueError, match=complaint):
            text_samples(GivenScorer(), texts, *numbers)


# ------------------------------------------------------------------------------------------- the runtime


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("divergence")).native


@pytest.fixture(scope="module", params=[False, True], ids=["reads-for-each", "reads-once"])
def scorer(model, request):
    with Scorer(model.path, "off", OPTIONS, reads_once=request.param) as scorer:
        yield scorer


def random_samples(n: int, n_prompt: int, n_continuation: int) -> list[tuple[list[int], list[int]]]:
    texts = [random_tokens(n_prompt + n_continuation, seed).tolist() for seed in range(n)]
    return [(text[:n_prompt], text[n_prompt:]) for text in texts]


def token_by_token(model: Model, spec: str, sample) -> np.ndarray:
    prompt, continuation = sample
    model.set_streaming(spec)
    with model.context() as context:
        rows = [context.read_prompt(prompt), context.decode_one_by_one(continuation[:-1], len(prompt))]
    return log_softmax(np.concatenate(rows))


@pytest.mark.parametrize("reads_in_full", [True, False])
def test_the_runtime_token_by_token(model, scorer, reads_in_full):
    spec = SPEC + ("full" if reads_in_full else "stream")
    samples = random_samples(3, 70, 20)
    comparisons = list(measure(scorer, [spec], samples))
    for sample, (comparison,) in zip(samples, comparisons, strict=True):
        full, hybrid = (token_by_token(model, streaming, sample) for streaming in ("off", spec))
        np.testing.assert_allclose(comparison.kl, (np.exp(full) * (full - hybrid)).sum(axis=1), rtol=0.01, atol=1e-5)
        assert comparison.same_top.tolist() == (full.argmax(axis=1) == hybrid.argmax(axis=1)).tolist()
        np.testing.assert_allclose(comparison.full_nll, -full[range(20), sample[1]], atol=1e-3)
        np.testing.assert_allclose(comparison.hybrid_nll, -hybrid[range(20), sample[1]], atol=1e-3)
        # what is read with full attention is understood as by the full model; what is decoded isn't
        assert (comparison.kl[0] < 1e-5) == reads_in_full and comparison.kl[1:].mean() > 1e-3


def test_no_difference_within_sink_and_window(scorer):
    found = compare(scorer, SPEC + "stream", random_samples(4, 10, 15))
    assert found.kl.value < 1e-6 and found.same_top.value == 1
    assert found.perplexity_ratio == pytest.approx((1, 1, 1), abs=1e-4)
    assert found.full_perplexity.low < found.full_perplexity.value < found.full_perplexity.high


def test_more_streaming_layers_are_further_away(scorer):
    one, all_layers = (f"layers={layers};sink=2;window=24;prefill=stream" for layers in ("3", "all"))
    comparisons = list(measure(scorer, [one, all_layers], random_samples(6, 100, 8)))
    first, second = (summarize(by_hybrid[i].means for by_hybrid in comparisons) for i in (0, 1))
    assert 0 < first.kl.low <= first.kl.value < second.kl.low
    assert second.same_top.value < first.same_top.value < 1
    assert str(scorer.spec) == "layers=0-3;sink=2;window=24;prefill=stream"  # it goes on with the last one


def test_errors_of_the_runtime_are_passed_on(scorer):
    with pytest.raises(ValueError, match="layers"):
        compare(scorer, "layers=9;window=24", random_samples(1, 4, 2))
