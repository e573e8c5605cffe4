"""`lt_fill`: a sequence grows without being computed, and holds what decoding would have left."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import FULL, STREAMING, Model, api
from support.small_gguf import write_small

SPECS = [
    "off",
    "layers=1,3;sink=2;window=40;prefill=full",
    "layers=0,1,2;sink=2;window=40;prefill=stream",
    "layers=all;sink=0;window=9",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    with Model(write_small(tmp_path_factory.mktemp("fill") / "small.gguf")[0]) as model:
        yield model
        model.set_streaming(None)


def fill(context, n: int, seq: int = 0) -> None:
    api().fill(context.handle, seq, n)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [1, 31, 200])
def test_it_holds_what_decoding_would_have_left(model, spec, n):
    model.set_streaming(spec)
    with model.context(n_batch=32) as filled, model.context(n_batch=32) as decoded:
        fill(filled, n)
        decoded.decode_one_by_one([5] * n)
        assert filled.pos_max() == n - 1
        assert filled.positions(FULL) == decoded.positions(FULL) == list(range(n))
        if spec != "off":
            # note: what is no longer visible may lie there until its cell is needed
            visible = set(decoded.positions(STREAMING)) & set(filled.positions(STREAMING))
            parsed = dict(field.split("=") for field in spec.split(";"))
            sink, window = int(parsed["sink"]), int(parsed["window"])
            assert visible >= {p for p in range(n) if p < sink or n - p < window}
            assert filled.kv_cells(STREAMING) == decoded.kv_cells(STREAMING)


@pytest.mark.parametrize("spec", SPECS)
def test_it_goes_on_and_leaves_nothing_behind(model, spec):
    model.set_streaming(spec)
    tokens = np.random.default_rng(0).integers(5, model.n_vocab, 90)
    with model.context(n_batch=32) as used, model.context(n_batch=32) as fresh:
        fill(used, 100)
        used.decode([5, 6], 100)
        fill(used, 50)
        assert used.pos_max() == 151
        used.clear()
        assert used.pos_max() == -1
        assert np.array_equal(used.read_prompt(tokens), fresh.read_prompt(tokens))


def test_sequences_of_their_own(model):
    model.set_streaming(SPECS[1])
    with model.context(n_ctx=512, n_batch=32, n_seq_max=2) as context:
        fill(context, 60, 0)
        fill(context, 90, 1)
        assert (context.pos_max(0), context.pos_max(1)) == (59, 89)


@pytest.mark.parametrize(
    ("spec", "n", "seq", "reason"),
    [
        ("off", 513, 0, "don't fit the KV cache"),
        (SPECS[1], 700, 0, "don't fit the KV cache"),
        ("off", 1, 1, "there is no sequence 1"),
        ("off", 1, -1, "there is no sequence -1"),
        ("auto=0.5;sink=2;window=40", 5, 0, "chosen for a prompt"),
    ],
)
def test_it_says_why_not(model, spec, n, seq, reason):
    model.set_streaming(spec)
    with model.context(n_batch=32) as context:
        with pytest.raises(ValueError, match=reason) as refusal:
            fill(context, n, seq)
        assert "\n" not in str(refusal.value)
        context.clear()
        context.decode([5])  # it still works
