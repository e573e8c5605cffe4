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
