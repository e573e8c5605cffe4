"""What is read ahead of a prompt's rest takes more memory than the prompt as a whole: beyond the limit it is read with the rest."""

from __future__ import annotations

import numpy as np
import pytest
from support.llama import answer, fed, load, logits, n_read, text
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf.runtime.prompts import NotAheadError

DOCUMENT, QUESTION = text(1500), text(30, 1)
STREAMING = "layers=0-3;prefill=full"
# bytes of a token's keys and values in a layer, and of its hidden state: as a whole a prompt takes both once, in batches the former
# for each of four layers
TOKEN = HIDDEN = 256
LIMIT = 1800 * (TOKEN + HIDDEN)


def limited(file, limit: int = LIMIT, **settings):
    return load(file, "by_layer", streaming=STREAMING, prompt_limit=limit, **settings)


def assert_like(llm, file, *history: tuple[str, list[int]]) -> None:
    fresh = fed(file, "by_layer", list(history), streaming=STREAMING)
    assert llm._input_ids.tolist() == fresh._input_ids.tolist() == [token for _, part in history for token in part]
    np.testing.assert_allclose(logits(llm), logits(fresh), atol=2e-4)


def test_it_is_refused_before_any_of_it_is_read(hybrid_file):
    llm = limited(hybrid_file)
    with pytest.raises(NotAheadError, match="a prompt of 1501 tokens needs 1.5 MiB"):
        llm.read_ahead(DOCUMENT)
    assert llm.n_tokens == llm.n_read == 0 and llm.kv_bytes()["prompt"] == 0
    assert n_read(llm, lambda: llm.read(DOCUMENT + QUESTION)) == 1530
    assert_like(llm, hybrid_file, ("prompt", DOCUMENT + QUESTION))
    assert n_read(llm, lambda: answer(llm, DOCUMENT + QUESTION, 1)) == 0


def test_what_does_not_fit_as_a_whole_either(hybrid_file):
    llm = limited(hybrid_file, 1000 * (TOKEN + HIDDEN))
    for read in (llm.read_ahead, llm.read):
        with pytest.raises(ValueError, match="needs .* the limit is") as error:
            read(DOCUMENT)
        assert type(error.value) is ValueError
    llm.read(DOCUMENT[:900])
    assert llm.n_tokens == 900


@pytest.mark.parametrize("before", [0, 200])
def test_where_a_part_was_read_ahead_all_is_read_again(hybrid_file, before):
    """Its first part fits in batches, too, but its rest doesn't any more."""
    llm, said = limited(hybrid_file), text(before, 2)
    history = [("prompt", said)] if before else []
    if before:
        llm.read(said)
    llm.read_ahead(said + DOCUMENT[:500])
    assert llm.n_tokens == before + 500
    with pytest.raises(NotAheadError):
        llm.read_ahead(said + DOCUMENT)
    assert llm.n_tokens == before + 500
    steps: list[tuple[int, int]] = []
    assert n_read(llm, lambda: llm.read(said + DOCUMENT + QUESTION, lambda *step: steps.append(step))) == 1530
    assert steps == sorted(steps) and steps[-1] == (1530, 1530) and len(steps) > 100
    assert_like(llm, hybrid_file, *history, ("prompt", DOCUMENT + QUESTION))


def test_a_prompt_that_fits_is_read_ahead(hybrid_file):
    llm = limited(hybrid_file)
    llm.read_ahead(DOCUMENT[:700])
    assert n_read(llm, lambda: llm.read(DOCUMENT[:700] + QUESTION)) == 30
    assert_like(llm, hybrid_file, ("prompt", DOCUMENT[:700] + QUESTION))


def test_an_error_in_the_middle_leaves_what_was_before(hybrid_file):
    llm = limited(hybrid_file)
    llm.read(QUESTION)

    for share in (0.5, 1):

        def fail(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            llm.read(QUESTION + DOCUMENT, fail)
        assert llm.n_tokens == len(QUESTION)
    llm.read(QUESTION + DOCUMENT)
    assert_like(llm, hybrid_file, ("prompt", QUESTION), ("prompt", DOCUMENT))
