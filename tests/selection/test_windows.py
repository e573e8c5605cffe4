"""`loss` among several windows: the smallest cache within the tolerance, or the least loss at equal memory."""

from __future__ import annotations

from functools import partial

import pytest
from support.candidates import FakeCandidates, Layers, candidates, evidence

from lt_gguf.selection import Model, Request, Selection, strategy
from lt_gguf.selection.evidence import Evidence
from lt_gguf.selection.windows import cells

N, N_CTX, SINK = 8, 8000, 4
WINDOWS = (250, 1000, 4000)
# what a layer loses, by window: nothing in most layers, and in the last ones less with a longer window
LOSS = {250: 0.3, 1000: 0.011, 4000: 0.004}


def measured(window: int) -> FakeCandidates:
    def of(window: int, layers: Layers) -> Evidence:
        lost = LOSS[window] * sum(il >= 4 for il in layers) + 1e-5 * sum(layers)
        return evidence(lost, *[max(0.0, 1 - lost)] * 10)

    return candidates(partial(of, window))


@pytest.fixture
def tried() -> FakeCandidates:
    asked = measured(1000)
    asked.others = {window: measured(window) for window in WINDOWS}
    return asked


def select(tried: FakeCandidates, windows=WINDOWS, **settings) -> Selection:
    model = Model("llama", "a model", N, N)
    return strategy("loss").select(
        Request(model, candidates=tried, window=1000, sink=SINK, windows=windows, n_ctx=N_CTX, **settings)
    )


def test_the_smallest_cache_within_the_tolerance(tried):
    # 250: the first four layers; 1000: as many; 4000: all eight, each of which keeps half
    found = select(tried, max_loss=0.0105, max_kl=1)
    assert (found.window, found.layers) == (250, (0, 1, 2, 3)) and found.warning is None
    sizes = {window: len(select(tried, (window,), max_loss=0.0105, max_kl=1).layers) for window in (250, 1000)}
    assert sizes == {250: 4, 1000: 4}
    # with more tolerance two more layers stream with 1000, and that is worth more than the shorter window
    found = select(tried, max_loss=0.03, max_kl=1)
    assert (found.window, len(found.layers)) == (1000, 6)
    assert "of the full cache at 8,000 tokens it takes 52% with 250, 34% with 1000, 50% with 4000 tokens of window" in found.reason


def test_the_least_loss_at_equal_memory(tried):
    """Where four layers stream with 1,000 tokens, four do with 250, and seven with 4,000: what these lose is counted."""
    found = select(tried, fraction=0.5)
    assert (found.window, len(found.layers)) == (250, 4)
    of_window = {c.name.partition(",")[0]: c for c in found.candidates if c.name.startswith("window ")}
    assert list(of_window) == ["window 250", "window 1000", "window 4000"]
    found = select(tried, n_streaming=6)
    counts = {c.name: len(c.layers) for c in found.candidates if c.name.startswith("window ")}
    assert counts == {"window 250, 6": 6, "window 1000, 6": 6}  # with 4,000 even all layers take more
    assert found.window == 1000
    allowed = cells(N, 6, SINK, 1000, N_CTX)
    assert all(cells(N, n, SINK, int(name.split()[1].rstrip(",")), N_CTX) <= allowed for name, n in counts.items())


def test_what_is_announced_is_for_all_windows(tried):
    one = measured(1000)
    one.others = {1000: one}
    strategy("loss").select(Request(Model("llama", "a model", N, N), candidates=one, window=1000))
    select(tried)
    ((choosing, judging),), ((more, more_judging),) = one.announced, tried.announced
    assert (more, more_judging) == (3 * choosing, 3 * judging)
    for fake in tried.others.values():
        assert len(fake.choosing.asked) <= choosing and len(fake.judging.asked) <= judging


def test_one_more_window_that_is_out_of_range(tried):
    with pytest.raises(ValueError, match="window = 0"):
        select(tried, (0,))
