"""Random walks over a hybrid model's memory, against a plain model of what it must hold and numpy's logits."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from support.walk.copying import Copying
from support.walk.states import States

OTHER_SHAPES = [(0, 1), (20, 1), (0, 40)]


class EveryStep(Copying, States):
    """All kinds of steps, in any order."""


@pytest.mark.slow
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["half", "all"])
@pytest.mark.parametrize("prefill", ["stream", "full"])
@pytest.mark.parametrize("sink, window", [(3, 16), *(pytest.param(*shape, marks=pytest.mark.full) for shape in OTHER_SHAPES)])
def test_random_walks(request, sink, window, prefill, layers, unified):
    settings_of_walk = dict(layers=layers, unified=unified, prefill=prefill, sink=sink, window=window)
    machine = type("Walk", (EveryStep,), settings_of_walk)
    full = request.config.getoption("--full")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200 if full else 25,
            stateful_step_count=40,
            derandomize=not full,  # without --full the same walks in every run
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )


def test_the_beginning_of_an_open_prompt_is_copied_again():
    """Sequence 1 reads a prompt; sequence 0 begins with a part of it, reads one of its own, and is then to begin so once more."""
    walk = type("Walk", (EveryStep,), {"layers": [1], "unified": True, "prefill": "full", "sink": 3, "window": 16})()
    try:
        walk.decode_a_few_tokens(seq=1, n=1)
        walk.feed_several_sequences_at_once(n=(0, 19, 12), asked=("all", "all", "all"), in_turns=False)
        walk.feed_several_sequences_at_once(n=(0, 31, 7), asked=("all", "none", "all"), in_turns=False)
        walk.memory_holds_what_it_must()
        walk.copy_a_prefix(source=1, destination=0, last=0.25)
        walk.feed_a_few_tokens(seq=0, n=1, asked="all")
        walk.read_a_declared_prompt(seq=0, n=186, size=1, asked="all")
        walk.memory_holds_what_it_must()
        walk.copy_a_prefix(source=1, destination=0, last=0.25)
        walk.memory_holds_what_it_must()
    finally:
        walk.teardown()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["half", "all"])
def test_a_prompt_in_its_own_part_is_not_copied_behind_other_text(layers):
    """Found by a walk: the copy is refused as a whole, and what was there stays."""
    walk = type("Walk", (EveryStep,), dict(layers=layers, unified=True, prefill="full", sink=3, window=16))()
    walk.begin_with_prompts(lengths=(0, 0, 0), asked="all")
    walk.feed_a_long_text(asked="all", n=101, seq=0)
    walk.feed_a_few_tokens(asked="all", n=1, seq=2)
    walk.feed_a_long_text(asked="none", n=237, seq=0)
    walk.copy_what_follows(destination=2, source=0)
    walk.memory_holds_what_it_must()
    assert walk.model.sequences[2].refused and len(walk.model.sequences[2].entries) == 1
    walk.teardown()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["half", "all"])
def test_cells_that_only_the_full_part_still_shares_are_not_moved(layers):
    """Found by a walk: one of two sequences with a common beginning goes on and drops it, and its context is shifted."""
    walk = type("Walk", (EveryStep,), dict(layers=layers, unified=True, prefill="full", sink=3, window=16))()
    walk.begin_with_prompts(lengths=(100, 0, 0), asked="none")
    walk.memory_holds_what_it_must()
    walk.copy_a_prefix(source=0, destination=1, last=1.0)
    walk.feed_a_long_text(seq=0, n=200, asked="all")
    walk.memory_holds_what_it_must()
    walk.add_to_positions(seq=0, first=0.1, last=1.0, by=1)
    walk.memory_holds_what_it_must()
    assert walk.model.sequences[0].refused
    walk.teardown()
