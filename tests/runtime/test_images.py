"""Images, whose tokens all have one position in time: sinks and window count positions, cells hold tokens."""

from __future__ import annotations

import numpy as np
import pytest
from support.images import ImageChat, ImageModel
from support.native import PARTIAL, PROMPT, STREAMING, log
from support.oracle import EXACT, difference

from lt_gguf.spec import StreamingSpec

N_LAYER, LAYERS = 4, (1, 3)
SINK, WINDOW, N_UBATCH = 4, 60, 64
IMAGE = 15, 20  # more tokens than the streaming part has cells at first
N_CELLS = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ImageModel:
    return ImageModel(tmp_path_factory.mktemp("images"), N_LAYER)


def spec_of(prefill: str | None, window: int = WINDOW) -> StreamingSpec | None:
    return StreamingSpec(LAYERS, N_LAYER, SINK, window, prefill) if prefill else None


def chat_of(model: ImageModel, prefill: str | None, **settings) -> ImageChat:
    settings = dict(n_ctx=4096, n_batch=1024, n_ubatch=N_UBATCH) | settings
    spec = spec_of(prefill)
    return ImageChat(model, spec, model.context(spec, **settings))


PREFILLS = pytest.mark.parametrize("prefill", ["stream", "full"], ids=["streamed", "read-in-full"])  # note: "full" is a mark


@pytest.mark.parametrize("prefill", ["stream", "full", None])
@pytest.mark.parametrize(
    "before, shape, n_batch",
    [(50, IMAGE, None), (90, IMAGE, 100), (90, (3, 100), 70), (2, IMAGE, 100), (1, (20, 15), None)],
    ids=["in-the-window", "behind-it", "wide", "among-the-sinks", "tall"],
)
def test_an_image_of_more_tokens_than_the_window(model, before, shape, n_batch, prefill):
    chat = chat_of(model, prefill)
    with chat.context as context:
        chat.text(before)
        chat.image(*shape, n_batch=n_batch)
        chat.text(10, end=True)
        if prefill:
            assert context.kv_bytes(PROMPT) == 0
        if prefill == "full":  # and one position more than the window, as the next token could have the last one once more
            assert context.positions(STREAMING) == [p for p in chat.positions[0] if p < SINK or p >= chat.next - WINDOW - 1]
        chat.decode(90)
        assert chat.difference() <= EXACT


def test_the_streaming_part_grows_for_it_and_takes_no_more_where_it_fits(model):
    for shape, grows in (((10, 10), False), (IMAGE, True)):
        for prefill in ("stream", "full"):
            chat = chat_of(model, prefill)
            with chat.context as context:
                chat.text(90)
                chat.image(*shape)
                chat.text(10, end=True)
                assert (context.kv_cells(STREAMING) > N_CELLS) == grows


@PREFILLS
def test_a_conversation_with_images(model, prefill):
    """A second one follows the first at once; a third ends its prompt and goes on as another one, at the same position."""
    chat = chat_of(model, prefill)
    with chat.context as context:
        chat.text(20)
        chat.image(*IMAGE)
        chat.image(3, 40, n_batch=50)
        chat.text(5, end=True)
        chat.decode(30)
        chat.text(7)
        chat.image(10, 12, n_batch=40)
        chat.text(1, end=True)
        chat.decode(20, together=5)
        chat.text(100, end=True)
        chat.decode(10)
        assert context.kv_bytes(PROMPT) == 0
        assert chat.difference() <= EXACT


@PREFILLS
def test_the_rest_of_an_image_sees_as_far_as_its_beginning(model, prefill):
    """Also where what is read of it ends a batch, and in the smallest of batches."""
    chat = chat_of(model, prefill)
    with chat.context:
        chat.text(100, end=True)
        chat.decode(20)
        chat.image(12, 12, n_batch=1 if prefill == "full" else 5)
        chat.text(1, end=True)
        chat.decode(5)
        assert chat.difference() <= EXACT


@PREFILLS
def test_going_back_behind_an_image(model, prefill):
    """An answer is taken back, then the image itself; what can't be taken back is refused."""
    chat = chat_of(model, prefill)
    with chat.context as context:
        chat.text(80)
        chat.image(*IMAGE)
        chat.text(10, end=True)
        n_prompt = len(chat)
        chat.decode(5, together=5)
        assert context.seq_rm(0, int(chat.positions[0, n_prompt]))
        chat.forget(n_prompt)
        chat.decode(3)
        begin = int(chat.positions[0, 80])
        if context.seq_rm(0, begin):  # all of it is still held, as far as it is seen from there
            chat.forget(80)
            chat.text(30, end=True)
        assert context.seq_rm(0, -1, -1)
        assert context.positions(STREAMING) == []
        assert chat.difference() <= EXACT


@PREFILLS
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
def test_saved_states(model, prefill, unified):
    """A whole one goes into a context whose streaming part hasn't grown yet, a partial one back into its own."""
    settings = dict(n_seq_max=2, kv_unified=unified, n_ctx=4096)
    chat = chat_of(model, prefill, **settings)
    with chat.context as context:
        chat.text(80)
        chat.image(*IMAGE)
        chat.text(10, end=True)
        n_prompt = len(chat)
        partial, whole, everything = context.save_seq(0, PARTIAL), context.save_seq(0), context.save()
        chat.decode(90)
        assert context.restore_seq(partial, 0, PARTIAL)
        assert context.seq_rm(0, int(chat.positions[0, n_prompt]))
        chat.forget(n_prompt)
        chat.decode(3)
        assert chat.difference() <= EXACT
        expected = np.stack([chat.rows[i] for i in range(n_prompt, n_prompt + 3)])
        tokens = chat.tokens[n_prompt:]
        begin = int(chat.positions[0, n_prompt])
    for restore, seq in ((lambda c: c.restore_seq(whole, 1), 1), (lambda c: c.restore(everything), 0)):
        other = chat_of(model, prefill, **settings)
        with other.context as context:
            assert restore(context), log.lines[-3:]
            got = context.decode(tokens, begin, seq)
            assert difference(got, expected) <= EXACT
            assert context.kv_bytes(PROMPT) == 0


@PREFILLS
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
def test_one_sequence_reads_an_image_while_another_decodes(model, prefill, unified):
    chat = chat_of(model, prefill, n_seq_max=2, kv_unified=unified, n_ctx=8192)
    with chat.context as context:
        other = ImageChat(model, chat.spec, context, seq=1)
        other.text(100, end=True)
        other.decode(10)
        chat.text(80)
        for part in range(3):
            chat.image(8, 18, n_batch=60)
            other.decode(5 if part else 40)
        chat.text(10, end=True)
        other.text(3)
        other.image(6, 20)
        chat.decode(70)
        other.text(2, end=True)
        other.decode(40)
        assert context.kv_bytes(PROMPT) == 0
        assert max(chat.difference(), other.difference()) <= EXACT
