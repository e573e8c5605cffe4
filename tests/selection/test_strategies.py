"""The strategies of selection: which layers they choose, what they refuse, and the rule for ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import candidates, evidence

from lt_gguf.selection import Model, Request, Selection, Strategy, asked_strategy, laziest, strategies, strategy
from lt_gguf.spec import Provenance

NAN = math.nan
BY_RATIOS = ("lazy-ratio", "frequency", "threshold")
MEASURING = ("loss", "kl", "kl-greedy", "auto")


def request(ratios=None, n_layer: int = 8, n_main: int | None = None, **settings) -> Request:
    model = Model("llama", "a model", n_layer, n_layer if n_main is None else n_main)
    return Request(model, ratios=None if ratios is None else np.array(ratios, dtype=np.float64), **settings)


def choose(name: str, *arguments, **settings) -> tuple[int, ...]:
    return strategy(name).select(request(*arguments, **settings)).layers


# -------------------------------------------------------------------------------------------- lazy-ratio

# few different values, so that there are ties, and layers without a ratio
RATIO = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, NAN]), st.floats(0, 1))


@given(st.lists(RATIO, max_size=40).flatmap(lambda ratios: st.tuples(st.just(ratios), st.integers(0, len(ratios)))))
def test_the_papers_queue_is_a_plain_sort(case):
    ratios, n = case
    order = sorted((il for il, ratio in enumerate(ratios) if not math.isnan(ratio)), key=lambda il: (ratios[il], il))
    n = min(n, len(order))
    assert laziest(ratios, n) == tuple(sorted(order[len(order) - n :]))


def test_of_equal_ratios_the_lower_layer_stays_full():
    assert laziest([0.5] * 5, 2) == (3, 4)
    assert laziest([0.5, 0.9, 0.5, 0.1], 2) == (1, 2)
    assert laziest([0.0, -0.0, 0.0], 1) == (2,)


def test_lazy_ratio_takes_the_mean_of_the_samples():
    ratios = [[0.9, 0.2, 0.6, 0.1], [0.1, 0.8, 0.7, 0.2]]  # means 0.5, 0.5, 0.65, 0.15
    selection = strategy("lazy-ratio").select(request(ratios, 4, sink=7, window=99))
    assert selection.layers == (1, 2)
    assert (selection.strategy, selection.sink, selection.window, selection.prefill) == ("lazy-ratio", 7, 99, None)
    assert selection.reason == (
        "2 of 4 measured layers have the highest mean lazy ratio over 2 samples: 0.5000 or more, where the full layers have "
        "0.5000 or less"
    )


def test_the_order_of_samples_decides_no_tie():
    column = [0.1, 0.2, 0.3]  # a plain sum of these depends on their order
    ratios = np.array([column, column[::-1]]).T
    assert choose("lazy-ratio", ratios, 2, fraction=0.5) == (1,)
    assert choose("lazy-ratio", ratios[::-1], 2, fraction=0.5) == (1,)


def test_layers_without_a_ratio_stay_full_and_do_not_count():
    assert choose("lazy-ratio", [[NAN, 0.2, 0.1, NAN]], 4) == (1,)
    assert choose("frequency", [[NAN, 0.2, 0.1, NAN]], 4) == (1,)
    assert choose("threshold", [[NAN, 0.95, 0.1, NAN]], 4) == (1,)
    assert choose("lazy-ratio", [[NAN] * 4], 4) == ()


def test_layers_that_only_predict_ahead_are_no_candidates():
    """Neither where their ratios are left out nor where somebody measured them."""
    for ratios in ([[0.5, 0.6, 0.7]], [[0.5, 0.6, 0.7, 0.99]]):
        for name in BY_RATIOS:
            settings = {"threshold": 0.65} if name == "threshold" else {"fraction": 0.34}
            assert choose(name, ratios, 4, 3, **settings) == (2,)
    assert choose("interleave-odd", None, 5, 4) == (1, 3)
    assert choose("interleave-even", None, 6, 5) == (0, 2)
    assert choose("manual", None, 5, 4, layers="all") == (0, 1, 2, 3)


@pytest.mark.parametrize("fraction, n", [(0, 0), (0.3, 3), (0.7, 7), (0.99, 9), (1, 10)])
def test_a_share_is_rounded_down_exactly(fraction, n):
    ratios = [[0.1 * il for il in range(10)]]
    for name in ("lazy-ratio", "frequency", "interleave-odd", "interleave-even"):
        assert len(choose(name, ratios, 10, fraction=fraction)) == n


# --------------------------------------------------------------------------------------------- frequency


def test_frequency_counts_samples_and_not_how_much():
    # layer 0 is very lazy once, layers 2 and 3 are a little lazy in the other two
    ratios = [[1.0, 0.9, 0.1, 0.1], [0.0, 0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.3]]
    assert choose("lazy-ratio", ratios, 4) == (0, 1)
    assert choose("frequency", ratios, 4) == (2, 3)
    assert "in 2 or more of 3 samples" in strategy("frequency").select(request(ratios, 4)).reason


def test_frequency_breaks_ties_by_the_mean_then_by_the_layer():
    ratios = [[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.6, 0.7]]  # each once in the lazy half; means 0.5, 0.5, 0.35, 0.45
    assert choose("frequency", ratios, 4, fraction=0.25) == (1,)
    assert choose("frequency", ratios, 4, fraction=0.75) == (0, 1, 3)


# --------------------------------------------------------------------------------------------- threshold


def test_threshold():
    ratios = [[0.9, 0.5, 0.95, 0.89], [0.9, 0.5, 0.95, 0.9]]
    assert choose("threshold", ratios, 4) == (0, 2)  # 0.9 by default
    assert choose("threshold", ratios, 4, threshold=0.5, fraction=0) == (0, 1, 2, 3)
    assert choose("threshold", ratios, 4, threshold=1.0) == ()
    assert choose("threshold", ratios, 4, n_streaming=2) == (0, 2)


def test_threshold_refuses_what_breaks_the_budget():
    with pytest.raises(ValueError, match="makes 1 layers stream, the KV budget needs 2: must be a lower --threshold"):
        choose("threshold", [[0.95, 0.5, 0.5]], 3, n_streaming=2)


# -------------------------------------------------------------------------- interleave, manual, the registry


def test_interleave():
    assert choose("interleave-odd") == (1, 3, 5, 7)
    assert choose("interleave-even") == (0, 2, 4, 6)
    assert choose("interleave-odd", None, 7) == (1, 3, 5)
    assert choose("interleave-even", None, 7) == (0, 2, 4)
    assert choose("interleave-odd", fraction=0.25) == (3, 7)
    assert choose("interleave-even", fraction=0.25) == (0, 4)
    assert choose("interleave-odd", fraction=0.75) == (1, 2, 3, 5, 6, 7)
    assert choose("interleave-even", fraction=0.75) == (0, 1, 2, 4, 5, 6)
    assert choose("interleave-odd", n_streaming=2, fraction=1) == (3, 7)
    assert choose("interleave-even", n_streaming=4, fraction=0) == (0, 2, 4, 6)
    assert "the odd ones" in strategy("interleave-odd").select(request()).reason
    assert "odd" not in strategy("interleave-odd").select(request(n_layer=7, n_streaming=3)).reason


@given(st.integers(1, 60), st.data())
def test_interleave_makes_as_many_layers_stream_as_asked(n_layer, data):
    n = data.draw(st.integers(0, n_layer))
    for name in ("interleave-odd", "interleave-even"):
        layers = choose(name, None, n_layer, n_streaming=n)
        assert len(layers) == len(set(layers)) == n and set(layers) <= set(range(n_layer))
        gaps = np.diff(layers)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_manual():
    assert choose("manual", layers="1,3,5-7") == (1, 3, 5, 6, 7)
    assert choose("manual", layers="none") == ()
    with pytest.raises(ValueError, match='layers = "8": must be "all", "none", or layers .* from 0 to 7'):
        choose("manual", layers="8")
    with pytest.raises(ValueError, match="makes 1 layers stream, the KV budget needs 2: must be more of them"):
        choose("manual", layers="3", n_streaming=2)


def test_the_registry_has_them_all():
    by_ratios_or_none = ["lazy-ratio", "frequency", "threshold", "interleave-odd", "interleave-even"]
    names = ["loss", *by_ratios_or_none, *MEASURING[1:], "manual", "preset", "trained"]
    assert strategies() == (*names, "preset:QwQ-32B-LightTransfer")
    for name in strategies():
        chosen = strategy(name)
        assert isinstance(chosen, Strategy) and chosen.name == name
        assert chosen.needs_ratios == (name in (*BY_RATIOS, "auto"))
        assert chosen.measures_hybrid == (name in MEASURING)
    assert Provenance(strategy("interleave-odd").select(request()).strategy).selection == "interleave-odd"


@pytest.mark.parametrize("name", ["laziest", "", "lazy-ratio:", "preset:", "preset:QwQ-32B", "manual:1,2"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f'selection = "{name}": must be one of loss, lazy-ratio, .*preset:QwQ-32B-LightTransfer'):
        strategy(name)


def test_what_is_asked_for_by_the_options_alone():
    assert asked_strategy(None, None, None).name == "loss"
    assert asked_strategy(None, "1,3", None).name == "manual"
    assert asked_strategy(None, None, 0.8).name == "threshold"
    assert asked_strategy("frequency", None, None).name == "frequency"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("lazy-ratio", "1,3", None), "selection lazy-ratio: chooses the layers itself, must not be given --streaming-layers"),
        (("manual", None, None), "selection manual: needs --streaming-layers, as in 1,3,5-9, all or none"),
        (("interleave-odd", None, 0.5), "selection interleave-odd: takes no --threshold"),
        ((None, "1,3", 0.5), "selection manual: takes no --threshold"),
    ],
)
def test_options_that_do_not_go_together(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        asked_strategy(*arguments)
    name, layers, threshold = arguments
    with pytest.raises(ValueError, match=complaint):
        strategy(name or "manual").select(request([[0.5] * 8], layers=layers, threshold=threshold))


# ---------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"fraction": 1.5}, "fraction = 1.5: must be a number from 0 to 1"),
        ({"fraction": NAN}, "fraction = nan"),
        ({"n_streaming": 9}, "streaming layers = 9: must be from 0 to 8"),
        ({"n_streaming": -1}, "streaming layers = -1"),
        ({"threshold": 1.1}, "threshold = 1.1: must be a lazy ratio, a number from 0 to 1"),
        ({"window": 0}, "window = 0: must be an integer from 1"),
        ({"sink": -1}, "sink = -1"),
        ({"ratios": [[0.5] * 7]}, "lazy ratios: are of 7 layers, the model has 8"),
        ({"ratios": [[0.5] * 9]}, "lazy ratios: are of 9 layers, the model has 8"),
        ({"ratios": [0.5] * 8}, r"lazy ratios: are an array of shape \(8,\), must be \(samples, layers\)"),
        ({"ratios": np.empty((0, 8))}, r"shape \(0, 8\)"),
        ({"ratios": [[1.2] + [0.5] * 7]}, "lazy ratios: 1.2 is among them, must be numbers from 0 to 1"),
        ({"ratios": [[-math.inf] + [0.5] * 7]}, "lazy ratios: -inf is among them"),
        ({"ratios": [[0.5] * 8, [0.5] * 3 + [NAN] + [0.5] * 4]}, "layer 3 was measured in 1 of 2 samples, must be in all"),
    ],
)
def test_a_bad_request_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        request(**settings)
    assert "\n" not in str(error.value)


def test_what_float32_adds_is_cut_off():
    assert request([[1 + 1e-7] * 8]).mean_ratios.max() == 1


def test_ratios_are_needed():
    for name in BY_RATIOS:
        with pytest.raises(ValueError, match=f"selection {name}: needs lazy ratios, and none were measured"):
            choose(name)


def test_a_budget_that_needs_more_layers_than_were_measured():
    with pytest.raises(ValueError, match="the KV budget needs 3 streaming layers, only 2 can be chosen"):
        choose("lazy-ratio", [[0.5, NAN, 0.5, NAN]], 4, n_streaming=3)


# --------------------------------------------------------------------------- layers that can't stream

SLIDING = Model("gemma3", "a model", 13, 12, may_stream=(2, 5, 8, 11))  # the others have a window of their own; one predicts ahead


def choose_sliding(name: str, **settings) -> Selection:
    ratios = np.linspace(0.1, 0.9, 12)[None] if name in BY_RATIOS else None
    return strategy(name).select(Request(SLIDING, ratios=ratios, **settings))


@pytest.mark.parametrize(
    "name, layers",
    [
        ("lazy-ratio", (8, 11)),
        ("frequency", (8, 11)),
        ("threshold", (11,)),
        ("interleave-odd", (5, 11)),
        ("interleave-even", (2, 8)),
    ],
)
def test_a_share_is_of_the_layers_that_may_stream(name, layers):
    assert choose_sliding(name).layers == layers


@pytest.mark.parametrize("name", BY_RATIOS)
def test_ratios_of_layers_that_cannot_stream_do_not_count(name):
    ratios = np.full((1, 12), 0.99)
    ratios[0, [2, 5, 8, 11]] = 0.1, 0.95, 0.2, 0.3
    found = strategy(name).select(Request(SLIDING, ratios=ratios, fraction=0.25))
    assert found.layers == (5,)
    assert "of 4 measured layers" in found.reason


def test_a_number_is_of_the_layers_that_may_stream():
    assert choose_sliding("interleave-odd", n_streaming=3).layers == (5, 8, 11)
    with pytest.raises(ValueError, match="streaming layers = 5: must be from 0 to 4, the layers that can stream"):
        choose_sliding("interleave-odd", n_streaming=5)


def test_all_by_hand_are_those_that_may_stream():
    assert choose_sliding("manual", layers="all").layers == (2, 5, 8, 11)
    assert choose_sliding("manual", layers="5,11").layers == (5, 11)
    with pytest.raises(
        ValueError, match="selection manual: layer 4 has no full attention, must be of those that may stream: 2,5,8,11"
    ):
        choose_sliding("manual", layers="4-5")


@pytest.mark.parametrize("name", ["kl", "kl-greedy", "loss"])
def test_no_other_layer_is_tried(name):
    measured = candidates(lambda layers: evidence(sum(1 / (il + 1) for il in layers)))
    found = strategy(name).select(Request(SLIDING, fraction=0.5, candidates=measured))
    assert found.layers == (8, 11)
    assert {il for asked in (measured.choosing.asked, measured.judging.asked) for layers in asked for il in layers} == {2, 5, 8, 11}
