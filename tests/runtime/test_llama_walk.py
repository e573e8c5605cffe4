"""Random conversations with `lt_gguf.Llama`: after each step all is as in a fresh context."""

from __future__ import annotations

import pytest
from support.llama import all_modes, assert_like
from support.llama_walk import Walk
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture


@pytest.mark.slow
@all_modes
@pytest.mark.parametrize("seed", range(8))
def test_random_walk(hybrid_file, monkeypatch, mode, seed):
    walk = Walk(hybrid_file, mode, seed, monkeypatch)
    for _ in range(30):
        walk.step()
        assert_like(walk.llm, hybrid_file, mode, walk.history)
