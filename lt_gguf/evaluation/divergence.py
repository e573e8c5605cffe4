"""How far a hybrid's predictions are from the full model's, on the same text and the same weights.

A sample is a prompt, which the model reads as one, and its continuation, which is decoded token by token: with
`prefill = full` only decoded tokens can show a difference. At each of them two distributions of the next token are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lt_gguf.calibration import Texts, cut_samples
from lt_gguf.spec import AutoSpec, StreamingSpec
from lt_gguf.statistics import DEFAULT_CONFIDENCE, Estimate, mean_interval

if TYPE_CHECKING:
    from lt_gguf.evaluation.scorer import Scorer

Sample = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its continuation
Streaming = StreamingSpec | AutoSpec | str | None  # as `Scorer.with_streaming` takes it

_MEMORY = 2**28  # bytes of the full model's log-probabilities that are kept at a time; of one sample always


class Means(NamedTuple):
    """What one sample comes to; all that an interval needs, and small enough to be written down.

    Args:
        kl: mean KL(full || hybrid), in nats.
        same_top: share of the tokens at which both find the same token most likely.
        full_nll: mean of minus the log-probability that the full model gives the token that stands there, in nats.
        hybrid_nll: that of the hybrid.
    """

    kl: float
    same_top: float
    full_nll: float
    hybrid_nll: float


@dataclass(frozen=True)
class Comparison:
    """A hybrid beside the full model at each token of one continuation; fields as in `Means`, (tokens of the continuation,)."""

    kl: np.ndarray
    same_top: np.ndarray
    full_nll: np.ndarray
    hybrid_nll: np.ndarray

    @property
    def means(self) -> Means:
        return Means(*(float(values.mean()) for values in (self.kl, self.same_top, self.full_nll, self.hybrid_nll)))


class Divergence(NamedTuple):
    """How far a hybrid is from the full model on some samples, each of which counts alike, with intervals over samples.

    Args:
        kl: mean KL(full || hybrid), in nats; 0: the same predictions.
        same_top: share of the tokens at which both find the same token most likely.
        full_perplexity: exp of the mean negative log-likelihood of the full model.
        hybrid_perplexity: that of the hybrid.
        perplexity_ratio: hybrid over full. The interval is of the samples' own ratios, so much narrower than of the two.
    """

    kl: Estimate
    same_top: Estimate
    full_perplexity: Estimate
    hybrid_perplexity: Estimate
    perplexity_ratio: Estimate


def compare(
    scorer: Scorer,
    hybrid: Streaming,
    samples: Sequence[Sample],
    full: Streaming = "off",
    progress: Callable[[str, int, int], None] | None = None,
) -> Divergence:
    """How far `hybrid` is from `full`. Arguments and errors as for `measure` and `summarize`."""
    return summarize([comparison.means for (comparison,) in measure(scorer, [hybrid], samples, full, progress)])


def measure(
    scorer: Scorer,
    hybrids: Sequence[Streaming],
    samples: Sequence[Sample],
    full: Streaming = "off",
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[Comparison, ...]]:
    """Compares hybrids with the full model, sample by sample.

    Only one model is in memory. The full model's log-probabilities are exact and kept for some samples at a time: in
    `_MEMORY`, or for one sample, `4 * len(continuation) * n_vocab` bytes. Afterwards `scorer` goes on with the last hybrid. One that
    `reads_once` reads each prompt once, else it is read for each hybrid.

    Args:
        scorer: of the file.
        hybrids: what streams in each of them.
        samples: prompts and continuations, of at least one token each.
        full: what they are compared with.
        progress: called with what is being done, samples predicted and samples to be predicted, by `full` and by each hybrid.

    Yields:
        for each sample, in order, a comparison for each hybrid, in order.

    Raises:
        ValueError: a continuation is empty; and as `Scorer.logprobs` and `Scorer.with_streaming` do.
    """
    for number, (_, continuation) in enumerate(samples, 1):
        if not len(continuation):
            raise ValueError(f"sample {number}: has no continuation, must have at least one token to predict")
    report = progress or (lambda *_: None)
    total = len(samples) * (1 + len(hybrids))
    done = 0

    def read(streaming: Streaming, group: list[Sample], name: str) -> Iterator[np.ndarray]:
        nonlocal done
        scorer.with_streaming(streaming)
        for logprobs in scorer.logprobs(group):
            done += 1
            report(name, done, total)
            yield logprobs

    # note: as many as it holds, so that the next hybrid finds them read
    for group in _groups(samples, 4 * scorer.n_vocab, _MEMORY, scorer.options.n_parallel):
        expected = list(read(full, group, "full model"))
        by_hybrid = []
        for number, hybrid in enumerate(hybrids, 1):
            computed = read(hybrid, group, f"hybrid {number} of {len(hybrids)}")
            by_hybrid.append([_compare(*three) for three in zip(expected, computed, group, strict=True)])
        yield from zip(*by_hybrid, strict=True)


def summarize(means: Iterable[Means], confidence: float = DEFAULT_CONFIDENCE) -> Divergence:
    """Averages over samples, with intervals by bootstrap.

    Raises:
        ValueError: there is no sample, or a number isn't finite, as where a hybrid gives probability 0.
    """
    kl, same_top, full_nll, hybrid_nll = np.array([*means], dtype=np.float64).reshape(-1, len(Means._fields)).T
    return Divergence(
        mean_interval(kl, confidence, (0.0, math.inf)),
        mean_interval(same_top, confidence, (0.0, 1.0)),
        _exp(mean_interval(full_nll, confidence, (0.0, math.inf))),
        _exp(mean_interval(hybrid_nll, confidence, (0.0, math.inf))),
        _exp(mean_interval(hybrid_nll - full_nll, confidence)),
    )


def text_samples(scorer: Scorer, texts: Texts, samples: int, n_prompt: int, n_continuation: int) -> list[Sample]:
    """Cuts texts into samples, spread evenly over them. To show a difference, one must be longer than sink + window.

    Args:
        n_prompt: tokens of each prompt, the one that begins a text included.
        n_continuation: tokens of each continuation.

    Raises:
        ValueError: a number is out of range, or there is too little text.
    """
    if n_prompt <= len(scorer.bos):
        raise ValueError(f"tokens of a prompt = {n_prompt}: must be at least {len(scorer.bos) + 1}")
    if n_continuation < 1:
        raise ValueError(f"tokens of a continuation = {n_continuation}: must be at least 1")
    cut = cut_samples(texts, scorer.tokenize, scorer.bos, samples, n_prompt + n_continuation)
    return [(tokens[:n_prompt], tokens[n_prompt:]) for tokens in cut]


def kl_divergence(full: np.ndarray, hybrid: np.ndarray) -> np.ndarray:
    """KL(full || hybrid) = sum over tokens of p_full * (log p_full - log p_hybrid), in nats.

    Args:
        full: log-probabilities, (n, n_vocab).
        hybrid: of the same shape.

    Returns:
        float64 (n,): infinite where the hybrid gives probability 0 to what is possible.
    """
    divergences = np.empty(len(full))
    for i, (p, q) in enumerate(zip(full, hybrid, strict=True)):  # row by row: a vocabulary in float64 takes a megabyte
        p, q = p.astype(np.float64), q.astype(np.float64)
        probability = np.exp(p)
        possible = probability != 0
        divergences[i] = np.sum(probability[possible] * (p[possible] - q[possible]))
    return np.maximum(divergences, 0.0)  # below 0 only by rounding; NaN stays


def _compare(full: np.ndarray, hybrid: np.ndarray, sample: Sample) -> Comparison:
    _, continuation = sample
    stands = np.arange(len(continuation)), np.asarray(continuation)
    return Comparison(
        kl_divergence(full, hybrid),
        full.argmax(axis=1) == hybrid.argmax(axis=1),
        -full[stands].astype(np.float64),
        -hybrid[stands].astype(np.float64),
    )


def _exp(estimate: Estimate) -> Estimate:
    with np.errstate(over="ignore"):  # of a few samples, an end of the interval may be infinite
        return Estimate(*(float(np.exp(number)) for number in estimate))


def _groups(samples: Iterable[Sample], bytes_a_token: int, memory: int, n_most: int) -> Iterator[list[Sample]]:
    """At most so many samples, whose continuations take at most `memory`, and at least one."""
    group: list[Sample] = []
    left = memory
    for sample in samples:
        size = bytes_a_token * len(sample[1])
        if group and (size > left or len(group) == n_most):
            yield group
            group, left = [], memory
        group.append(sample)
        left -= size
    if group:
        yield group
