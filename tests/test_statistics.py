"""Confidence intervals: against published numbers, formulas written out, and how often they hold the truth."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_gguf.statistics import lost_share, mean_interval, mean_score, paired_difference, relative_loss, wilson

scores = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_mean_score():
    assert mean_score([1.0, 0.0, 0.5, 1.0]) == pytest.approx((0.625, *wilson(0.625, 4)))
    with pytest.raises(ValueError, match="must be at least 1"):
        mean_score([])


@pytest.mark.parametrize(
    "right, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_as_published(right, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.integers(1, 10_000), st.floats(0.5, 0.999))
def test_wilson_holds_the_mean(mean, n, confidence):
    low, high = wilson(mean, n, confidence)
    assert 0 <= low <= mean <= high <= 1 and low < high
    assert wilson(mean, 4 * n, confidence)[1] - wilson(mean, 4 * n, confidence)[0] < high - low


def test_wilson_covers_as_often_as_it_says():
    n = 40
    intervals = [wilson(right / n, n) for right in range(n + 1)]

    def coverage(p: float) -> float:
        held = (right for right, (low, high) in enumerate(intervals) if low <= p <= high)
        return sum(math.comb(n, right) * p**right * (1 - p) ** (n - right) for right in held)

    assert np.mean([coverage(p) for p in np.linspace(0.005, 0.995, 199)]) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("mean, n, what", [(0.5, 0, "scores: are 0"), (1.5, 3, "score = 1.5"), (math.nan, 3, "score = nan")])
def test_wilson_refuses(mean, n, what):
    with pytest.raises(ValueError, match=what):
        wilson(mean, n)


@pytest.mark.parametrize("both, first, second, neither", [(794, 150, 86, 570), (30, 4, 0, 1), (500, 0, 0, 0), (0, 3, 0, 0)])
def test_paired_difference_of_right_and_wrong(both, first, second, neither):
    """The formula of Agresti and Min 2005, section 3, from the four counts with 1/2 added to each."""
    a = [1.0] * (both + first) + [0.0] * (second + neither)
    b = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    n = both + first + second + neither + 2
    only_first, only_second = (first + 0.5) / n, (second + 0.5) / n
    centre = only_first - only_second
    half = NormalDist().inv_cdf(0.975) * math.sqrt((only_first + only_second - centre**2) / n)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx((first - second) / (n - 2))
    assert (low, high) == pytest.approx((max(-1, centre - half), min(1, centre + half)))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_paired_difference_holds_the_difference_and_is_never_certain(pairs):
    first, second = zip(*pairs)
    difference, low, high = paired_difference(first, second)
    assert -1 <= low <= difference <= high <= 1 and low < high
    assert paired_difference(second, first) == pytest.approx((-difference, -high, -low))


@given(scores, st.floats(0.8, 0.98))
def test_more_confidence_is_wider(first, confidence):
    second = first[::-1]
    narrow, wide = (paired_difference(first, second, c) for c in (confidence, confidence + 0.01))
    assert wide.low <= narrow.low and narrow.high <= wide.high and wide != narrow


def test_pairing_counts():
    """Models that are wrong on the same prompts differ by nothing; models wrong on others may well differ."""
    first = np.arange(200) % 2
    same, other = paired_difference(first, first), paired_difference(first, 1 - first)
    assert same.value == other.value == 0 and same.high < other.high / 5


class Pair:
    """Two models that find the same prompts hard, and answer these shares of them right."""

    def __init__(self, p_full: float, p_hybrid: float) -> None:
        self.p_full = p_full
        rng = np.random.default_rng(0)
        self.limit = np.quantile(self._for_the_hybrid(rng, rng.random(100_000)), p_hybrid)

    def draw(self, rng, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the full model and the hybrid on n prompts."""
        hardness = rng.random(n)
        return (hardness < self.p_full) * 1.0, (self._for_the_hybrid(rng, hardness) < self.limit) * 1.0

    @staticmethod
    def _for_the_hybrid(rng, hardness: np.ndarray) -> np.ndarray:
        return 0.7 * hardness + 0.3 * rng.random(hardness.size)


@pytest.mark.parametrize("p_full, p_hybrid", [(0.9, 0.8), (0.98, 0.97), (0.5, 0.5)])
def test_paired_intervals_cover_as_often_as_they_say(p_full, p_hybrid):
    rng = np.random.default_rng(1)
    truth, loss = p_full - p_hybrid, (1 - p_hybrid / p_full) / 2  # the second task loses nothing
    n_held = np.zeros(2)
    pair, alike = Pair(p_full, p_hybrid), Pair(0.9, 0.9)
    for _ in range(1000):
        first, second = pair.draw(rng, 100)
        _, low, high = paired_difference(first, second)
        n_held[0] += low <= truth <= high
        third, fourth = alike.draw(rng, 100)
        _, low, high = relative_loss({"a": first, "b": third}, {"a": second, "b": fourth})
        n_held[1] += low <= loss <= high
    assert (n_held / 1000 > 0.93).all() and (n_held / 1000 < 0.995).all()


def test_relative_loss_by_hand():
    full = {"a": [1, 1, 0.5, 0.5], "b": [1, 0]}
    hybrid = {"b": [0, 1], "a": [1, 0, 0.5, 0]}
    value, low, high = relative_loss(full, hybrid)
    assert value == pytest.approx((1 - 1.5 / 3 + 1 - 1) / 2)
    assert low < value < high


def test_relative_loss_is_as_unsure_as_a_bootstrap_says():
    rng = np.random.default_rng(2)
    full, hybrid = {}, {}
    for task, p, q, n in (("a", 0.95, 0.9, 800), ("b", 0.9, 0.3, 1500)):
        full[task], hybrid[task] = Pair(p, q).draw(rng, n)
    losses = []
    for _ in range(2000):
        chosen = {task: rng.integers(len(full[task]), size=len(full[task])) for task in full}
        losses.append(np.mean([1 - hybrid[task][i].mean() / full[task][i].mean() for task, i in chosen.items()]))
    _, low, high = relative_loss(full, hybrid)
    expected = np.quantile(losses, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.06 * (expected[1] - expected[0]))


def test_a_model_that_answers_all_is_not_certain_to():
    for n, width in ((10, 0.2), (500, 0.005)):
        right = {"a": [1.0] * n}
        value, low, high = relative_loss(right, right)
        assert value == 0 and -low == pytest.approx(high) and width / 2 < high < 2 * width


@pytest.mark.parametrize(
    "full, hybrid, complaint",
    [
        ({}, {}, "tasks: are none of the full model"),
        ({"a": [1]}, {"b": [1]}, "tasks: are a of the full model, b of the hybrid, must be the same"),
        ({"a": [1, 1]}, {"a": [1]}, "task a: scores: are 2 of one model, 1 of the other"),
        ({"a": [0, 0]}, {"a": [1, 0]}, "task a: the full model scores 0"),
        ({"a": [1, 2]}, {"a": [1, 0]}, "task a: score = 2.0: must be from 0 to 1"),
        ({"a": [1, math.nan]}, {"a": [1, 0]}, "task a: score = nan"),
        ({"a": []}, {"a": []}, "task a: scores: are 0 of one model"),
    ],
)
def test_scores_that_cannot_be_compared(full, hybrid, complaint):
    with pytest.raises(ValueError) as error:
        relative_loss(full, hybrid)
    assert str(error.value).startswith(complaint) and "\n" not in str(error.value)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_share(confidence):
    for interval in (lambda: wilson(0.5, 9, confidence), lambda: mean_interval([1, 2], confidence)):
        with pytest.raises(ValueError, match="confidence = "):
            interval()


@pytest.mark.parametrize("n, least", [(8, 0.91), (30, 0.93)])
@pytest.mark.parametrize("distribution", ["standard_normal", "standard_exponential"])
def test_mean_interval_covers_nearly_as_often_as_it_says(n, least, distribution):
    rng = np.random.default_rng(3)
    truth = 0 if distribution == "standard_normal" else 1
    intervals = [mean_interval(getattr(rng, distribution)(n)) for _ in range(300)]
    assert least < np.mean([low <= truth <= high for _, low, high in intervals]) < 0.99
    assert all(low < mean < high for mean, low, high in intervals)


def test_mean_interval_follows_units_and_seed():
    values = np.random.default_rng(4).standard_exponential(12)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert mean_interval(100 * values + 5) == pytest.approx((100 * mean + 5, 100 * low + 5, 100 * high + 5))
    assert mean_interval(values) == (mean, low, high) != mean_interval(values, seed=1)
    assert high - mean > 1.2 * (mean - low)  # skewed as the values are
    wide = mean_interval(values, 0.99)
    assert wide.low < low and high < wide.high


def test_mean_interval_of_few_values():
    assert mean_interval([0.3], limits=(0, 1)) == (0.3, 0, 1)
    assert mean_interval([0, 1, 2]) == (1, -math.inf, math.inf)
    assert mean_interval([0.3, 0.5]) == (pytest.approx(0.4), -math.inf, math.inf)
    assert mean_interval([0.3, 0.5], limits=(0, math.inf)) == (pytest.approx(0.4), 0, math.inf)
    assert mean_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = mean_interval([0.0, 0.0, 0.0, 0.1, 0.9], limits=(0, 1))
    assert low == 0 and mean < high <= 1


@pytest.mark.parametrize("values", [[], [1, math.nan], [1, math.inf], [[1, 2], [3, 4]]])
def test_values_without_a_mean(values):
    with pytest.raises(ValueError, match="values: must be finite numbers"):
        mean_interval(values)


def test_the_share_that_is_lost_of_what_is_found():
    rng = np.random.default_rng(3)
    full = rng.random(60)
    hybrid = full * (rng.random(60) > 0.2)
    found = lost_share(full, hybrid)
    assert found.value == pytest.approx(1 - hybrid.sum() / full.sum())
    assert found.low < found.value < found.high and 0.1 < found.high - found.low < 0.4
    assert lost_share(full, full) == (0, 0, 0)
    assert lost_share([0.5, 0.0, 1.0], [1.0, 0.0, 0.5]).value == 0
    with pytest.raises(ValueError, match="the full model finds nothing"):
        lost_share([0.0, 0.0], [0.0, 1.0])


def test_the_interval_of_a_lost_share_holds_the_truth():
    """Of 300 experiments with 32 prompts, of which each loses a tenth of the answers on average."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        full = rng.random(32)
        found = lost_share(full, full * (rng.random(32) > 0.1))
        held += found.low <= 0.1 <= found.high
    assert held > 0.85 * 300
