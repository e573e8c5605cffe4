"""`kl` and `kl-greedy`: which layers they choose, how often they run the model, and what they record."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import FakeCandidates, Layers, candidates, evidence

from lt_gguf.memory.kv import KVShape
from lt_gguf.report.report import Report
from lt_gguf.selection import Model, Request, Selection, strategy
from lt_gguf.selection.evidence import Evidence
from lt_gguf.selection.within_budget import select_within

ALONE = (0.3, 0.1, 0.7, 0.2)  # nats that each layer costs


def additive(layers: Layers) -> Evidence:
    return evidence(sum(ALONE[il] for il in layers))


def select(name: str, measured: FakeCandidates, n_main: int = 4, **settings) -> Selection:
    return strategy(name).select(Request(Model("llama", "a model", 5, n_main), candidates=measured, **settings))


def test_the_layers_that_cost_least_alone():
    measured = candidates(additive)
    found = select("kl", measured, sink=3, window=50)
    assert (found.strategy, found.layers, found.sink, found.window, found.prefill) == ("kl", (1, 3), 3, 50, None)
    assert found.reason == (
        "2 of 4 layers change the model least when they stream alone, by a KL divergence of 0.2 nats or less, where the full "
        "layers have 0.3 or more"
    )
    assert measured.choosing.asked == [(), (0,), (1,), (2,), (3,)]
    assert measured.judging.asked == []
    assert measured.announced == [(5, 0)]


@pytest.mark.parametrize("fraction, layers", [(0.25, (1,)), (0.75, (0, 1, 3)), (1, (0, 1, 2, 3)), (0, ())])
@pytest.mark.parametrize("name", ["kl", "kl-greedy"])
def test_a_share_of_the_layers(name, fraction, layers):
    assert select(name, candidates(additive), fraction=fraction).layers == layers


@pytest.mark.parametrize("name", ["kl", "kl-greedy"])
def test_of_equal_layers_the_lower_ones_stay_full(name):
    assert select(name, candidates(lambda layers: evidence(len(layers)))).layers == (2, 3)


@pytest.mark.parametrize("name", ["kl", "kl-greedy"])
def test_texts_and_answers_count_alike(name):
    costs = {0: (0.1, 0.9), 1: (0.4, 0.4), 2: (0.9, 0.3), 3: (0.6, 0.1)}

    def both(layers: Layers) -> Evidence:
        return evidence(sum(costs[il][1] for il in layers), kl_text=sum(costs[il][0] for il in layers))

    assert select(name, candidates(both)).layers == (1, 3)


def backing_up(layers: Layers) -> Evidence:
    """Layers 0 and 1 do the same work: either may stream, not both."""
    return evidence((0.01 * len(layers) + 0.05 * len({2, 3} & {*layers})) + 5 * ({0, 1} <= {*layers}))


def test_greedy_sees_what_only_shows_together():
    assert select("kl", candidates(backing_up)).layers == (0, 1)
    measured = candidates(backing_up)
    found = select("kl-greedy", measured)
    assert found.layers == (1, 3)
    assert [candidate.layers for candidate in found.candidates] == [(), (1,), (1, 3)]
    assert [candidate.name for candidate in found.candidates] == ["full", "with layer 1", "with layer 3"]
    assert found.candidates[-1].evidence == backing_up((1, 3))
    assert measured.announced == [(1 + 4 + 3, 0)] and len(measured.choosing.asked) == 8


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_as_many_runs_as_announced(case):
    n_main, n_streaming = case
    for name in ("kl", "kl-greedy"):
        measured = candidates(lambda layers: evidence(sum(layers)))
        found = strategy(name).select(
            Request(Model("llama", "a model", n_main, n_main), n_streaming=n_streaming, candidates=measured)
        )
        assert found.layers == tuple(range(n_streaming))  # layer il costs il nats
        assert measured.announced == [(len(measured.choosing.asked), 0)]


def test_layers_that_only_predict_ahead_are_not_run():
    measured = candidates(additive)
    assert select("kl", measured, n_main=3, n_streaming=2).layers == (0, 1)
    assert (3,) not in measured.choosing.asked and (4,) not in measured.choosing.asked


def test_what_is_recorded():
    found = select("kl", candidates(additive))
    assert [(candidate.name, candidate.layers) for candidate in found.candidates] == [
        ("full", ()), ("layer 0", (0,)), ("layer 1", (1,)), ("layer 2", (2,)), ("layer 3", (3,)),
    ]  # fmt: skip
    assert [candidate.evidence.kl for candidate in found.candidates] == [0, *ALONE]
    assert found.measurement.sets == 5
    report = Report("m.gguf", "llama", found.spec(5), found, fraction=0.5)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_budget_of_memory():
    """The smallest number that fits is chosen among; nothing is run again for another number."""
    shape = KVShape((2,) * 4, 2, 64, 64)
    measured = candidates(additive)
    request = Request(Model("llama", "a model", 4, 4), candidates=measured, window=252)
    full = 4 * 512 * 8192
    found = select_within(strategy("kl"), request, shape, full * 4 // 5, 8192, n_embd=64, prefill="stream")
    assert found.layers == (1,) and "1 is the smallest number" in found.reason and len(found.candidates) == 5


@pytest.mark.parametrize("name", ["kl", "kl-greedy"])
def test_without_a_model_to_run(name):
    with pytest.raises(ValueError, match=f"selection {name}: runs the hybrid itself, must be asked of a GGUF file"):
        select(name, None)
