"""`loss`: as many layers as lose no more than is tolerated, grown one by one, by what is lost together, and judged on other questions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import FakeBench, FakeCandidates, Layers, candidates, evidence

from lt_gguf.report.folder import write_report
from lt_gguf.report.report import Report
from lt_gguf.selection import Model, Request, Selection, strategy
from lt_gguf.selection.evidence import FIRST, LATER, TEXT, Evidence, Outcome
from lt_gguf.selection.loss import grow

ALONE = (0.02, 0.001, 0.9, 0.004, 0.05, 0.0005, 0.0101, 0.301)
N = len(ALONE)
ORDER = sorted(range(N), key=lambda il: ALONE[il])


def additive(layers: Layers) -> Evidence:
    kl = sum(ALONE[il] for il in layers)
    return evidence(kl, *[max(0.0, 1 - kl)] * 20)


def select(measured: FakeCandidates, **settings) -> Selection:
    return strategy("loss").select(Request(Model("llama", "a model", N, N), candidates=measured, **settings))


@pytest.mark.parametrize("max_loss, n", [(0.0, 0), (0.0006, 1), (0.002, 2), (0.006, 3), (0.016, 4), (0.04, 5), (0.09, 6), (0.4, 7)])
def test_as_many_as_lose_no_more_than_is_tolerated(max_loss, n):
    found = select(candidates(additive), max_loss=max_loss, max_kl=10)
    assert found.layers == tuple(sorted(ORDER[:n])) and found.warning is None
    assert found.reason.startswith(
        f"{n} of 8 layers, the most that lose no more than is tolerated, chosen by what is lost with them"
    )


def test_the_divergence_is_a_limit_of_its_own():
    def finds_all(layers: Layers) -> Evidence:
        return evidence(sum(ALONE[il] for il in layers), *[1.0] * 20)

    assert len(select(candidates(finds_all), max_kl=0.016).layers) == 4
    assert len(select(candidates(finds_all)).layers) == 6  # 0.0856 of at most 0.1


def test_it_is_judged_by_other_questions():
    """A layer that the questions to choose by don't need, but others do."""

    def judging(layers: Layers) -> Evidence:
        return evidence(2.0 if 5 in layers else 0.0, *[0.0 if 5 in layers else 1.0] * 20)

    found = select(candidates(additive, judging))
    assert found.layers == () and "0 of 8 layers" in found.reason


@pytest.mark.parametrize("asked, n", [({"fraction": 0.5}, 4), ({"n_streaming": 7}, 7), ({"fraction": 0}, 0), ({"fraction": 1}, 8)])
def test_a_number_that_is_asked_for(asked, n):
    found = select(candidates(additive), **asked)
    assert found.layers == tuple(sorted(ORDER[:n]))
    if n <= 3:
        assert found.warning is None
    else:
        lost = 1 - max(0.0, 1 - sum(ALONE[il] for il in sorted(ORDER[:n])))
        assert found.warning.startswith(f"{n} streaming layers lose {lost:.1%} of what the full model finds (KL ")
        assert found.warning.endswith("within the tolerance (0.01 of what it finds and 0.1 nats) are up to 3 layers")


def backing_up(layers: Layers) -> Evidence:
    """Layers 1 and 5 do the same work: either may stream, not both."""
    kl = sum(ALONE[il] for il in layers) + 5 * ({1, 5} <= {*layers})
    return evidence(kl, *[0.0 if kl > 1 else 1.0] * 20)


def test_a_layer_that_does_anothers_work_falls_behind():
    path = grow(FakeBench(backing_up), ALONE)
    assert path[1] == (5,) and 1 not in path[-2] and path[-1] == tuple(range(N))
    assert len(select(candidates(backing_up)).layers) == 5


def test_a_layer_that_costs_less_in_company_comes_before_one_that_costs_more():
    """Alone 2 loses a little less than 3; beside 0 and 1 it loses far more, and 3 nothing."""
    alone = (0.001, 0.002, 0.010, 0.011, 0.5)

    def measured(layers: Layers) -> Evidence:
        together = {0, 1} < {*layers}
        costs = (*alone[:2], 0.1, 0.0, alone[4]) if together else alone
        return evidence(sum(costs[il] for il in layers))

    assert grow(FakeBench(measured), alone)[3:] == [(0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16), st.data())
def test_growing_measures_little(alone, data):
    """A few sets for each layer, whatever is lost together; and layers with which far more is lost come last."""
    n = len(alone)
    bad = data.draw(st.sets(st.integers(0, n - 1), max_size=2))
    power = data.draw(st.sampled_from([0.5, 1, 2, 4]))
    bench = FakeBench(lambda layers: evidence(sum(alone[il] for il in layers) ** power + 1e6 * len(bad & set(layers))))
    path = grow(bench, alone)
    assert len(bench.asked) <= 7 * n  # at most 4 and 3 more at once
    assert set(path[n - len(bad)]) == set(range(n)) - bad
    assert path[-1] == tuple(range(n))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_path_grows_by_one_layer_at_a_time(alone):
    path = grow(FakeBench(lambda layers: evidence(math.sqrt(sum(alone[il] for il in layers)))), alone)
    assert [len(layers) for layers in path] == list(range(len(alone) + 1))
    assert all(set(few) < set(more) for few, more in itertools.pairwise(path))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_of_losses_that_add_up_the_least_come_first(alone):
    bench = FakeBench(lambda layers: evidence(math.fsum(sorted(alone[il] for il in layers))))
    path = grow(bench, alone)
    for n, layers in enumerate(path):
        assert sum(sorted(alone)[:n]) == pytest.approx(sum(alone[il] for il in layers), abs=1e-9)
    assert len(bench.asked) <= 2 * len(alone) + 1


def test_no_more_is_measured_than_was_announced():
    measured = candidates(additive)
    select(measured)
    ((choosing, judging),) = measured.announced
    assert len(measured.choosing.asked) <= choosing == 1 + N + N + N // 2
    assert len(measured.judging.asked) <= judging


def test_a_model_that_finds_nothing_is_chosen_for_by_divergence():
    def unknowing(layers: Layers) -> Evidence:
        kl = sum(ALONE[il] for il in layers)
        return Evidence((Outcome(TEXT, TEXT, 100, 0, kl, 0, 0, False), Outcome(FIRST, "name", 100, 0, kl, 0.001, 0, False)))

    found = select(candidates(unknowing), max_kl=0.04)
    assert len(found.layers) == 5 and "the full model finds only 0.1% of what is asked for, too little to say" in found.reason


def outcome(where: str, prompt: int, kl: float, known: float, found: float, length: int = 100) -> Outcome:
    return Outcome(where, "name", length, prompt, kl, known, found, found == known)


def test_what_the_full_model_does_not_know_counts_little():
    found = Evidence((outcome(FIRST, 0, 1.0, 0.9, 0.9), outcome(FIRST, 1, 3.0, 0.1, 0.0), outcome(LATER, 0, 2.0, 0.5, 0.25)))
    assert found.kl_where(FIRST).value == pytest.approx(0.9 * 1.0 + 0.1 * 3.0)
    assert found.kl == pytest.approx((1.2 + 2.0) / 2)
    assert found.loss_where(FIRST).value == pytest.approx(0.1) and found.loss_where(LATER).value == pytest.approx(0.5)
    assert math.isnan(found.kl_text) and found.worst.prompt == 0


def long_ones(*found: float) -> Evidence:
    """Thirty short conversations in which nothing is lost, and one long one for each number."""
    short = [outcome(FIRST, i, 0.0, 1.0, 1.0) for i in range(30)]
    return Evidence((*short, *(outcome(FIRST, 30 + i, 0.0, 1.0, value, length=400) for i, value in enumerate(found))))


def test_a_length_at_which_more_is_lost_for_certain_decides():
    found = long_ones(0.95, 0.95, 0.95)
    tolerance = Request(Model("llama", "a model", N, N)).tolerance
    assert found.loss.value < 0.01 and not tolerance.allows(found) and tolerance.allows(found.of_length(100))
    assert tolerance.warning(found, 5).startswith(
        "5 streaming layers lose 0.5% of what the full model finds (KL 0 nats), 5.0% (5.0% to 5.0%) at 400 tokens; tolerated are"
    )


def test_of_a_few_long_conversations_one_word_is_no_proof():
    found = long_ones(1.0, 1.0, 1.0, 0.8)
    tolerance = Request(Model("llama", "a model", N, N)).tolerance
    assert found.of_length(400).loss.value == pytest.approx(0.05) and tolerance.allows(found)
    assert not tolerance.allows(long_ones(1.0, 1.0, 1.0, 0.5))  # of all together it is too much


def test_the_report_and_its_pictures(tmp_path):
    found = select(candidates(additive), fraction=0.75)
    report = Report("m.gguf", "llama", found.spec(N), found, 0.75)
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    names = {path.name for path in write_report(report, tmp_path / "report")}
    assert {"loss.png", "loss.svg", "loss_by_layer.png", "loss_by_layer.svg"} <= names
    text = (tmp_path / "report" / "report.md").read_text()
    assert "6 streaming layers lose" in text and "(loss.png)" in text and "| loss, 6 |" in text
    picture = (tmp_path / "report" / "loss.svg").read_text()
    assert "chosen: 6 of 8" in picture and "KV cache at 32,768 tokens" in picture
