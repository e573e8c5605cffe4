"""Every architecture that llama.cpp knows either streams like the others or refuses to, and says why.

The models are those that upstream's test-llama-archs makes, random weights for each architecture;
scripts/checks/upstream_tests.sh makes them and sets LT_TEST_MODELS to their directory.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from support.native import FULL, STREAMING, C, Model

DIRECTORY = os.environ.get("LT_TEST_MODELS")
MODELS = sorted(Path(DIRECTORY).glob("*.gguf")) if DIRECTORY else []

pytestmark = pytest.mark.skipif(not MODELS, reason="LT_TEST_MODELS names no directory with models")

N_TOKENS = 240  # the models have 256 positions
NEVER_FULL = 100_000  # a window that nothing leaves
WINDOW = 28
FLOOR = 5e-5  # what another order of summation may change (ggml's GELU is a table in float16: it turns last bits into more)

# Architectures that keep an ordinary KV cache and still can't stream, because their graph takes its keys from elsewhere too.
REFUSED_WITH_PLAIN_CACHE = {
    "deepseek2", "deepseek2-ocr", "mistral4", "plm", "minicpm3",  # multi-head latent attention
    "t5", "eagle3", "dflash",  # an encoder
    "llama-embed",  # not causal
}  # fmt: skip


def logits(model: Model, n_ubatch: int, n_cells: int, causal: bool = True) -> np.ndarray:
    """Of N_TOKENS random tokens. A second sequence that is decoded in between takes the cells that the first can do without.
    Not `causal`: as the tokens of an image are read, which look ahead in some layers."""
    tokens = np.random.default_rng(0).integers(3, min(model.n_vocab, 128), N_TOKENS)
    context = model.context(n_ctx=512, n_ubatch=n_ubatch, n_batch=512, n_seq_max=2, kv_unified=True)
    assert context.kv_cells(STREAMING) == n_cells
    C.llama_set_causal_attn(context.handle, causal)
    try:
        before = context.decode(tokens[:-20], seq=0)
        context.decode(tokens[::-1], seq=1)
        return np.concatenate([before, context.decode(tokens[-20:], start=N_TOKENS - 20, seq=0)])
    finally:
        context.close()


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_streams_or_refuses(path):
    with Model(path) as model:
        everywhere = "layers=all;sink=4"
        try:
            model.set_streaming(f"{everywhere};window={NEVER_FULL}")
        except ValueError as error:
            assert "can't have streaming layers" in str(error)
            context = model.context(n_ctx=512)
            plain = context.kv_cells(FULL) > 0
            context.close()
            arch = path.stem.rsplit("-", 1)[0]
            assert not plain or arch in REFUSED_WITH_PLAIN_CACHE, f"{arch} could stream: {error}"
            return

        model.set_streaming("off")
        full = logits(model, n_ubatch=512, n_cells=0)
        noise = max(FLOOR, 4 * np.abs(logits(model, n_ubatch=32, n_cells=0) - full).max())

        # A window that nothing leaves: the same numbers through the streaming part.
        model.set_streaming(f"{everywhere};window={NEVER_FULL}")
        np.testing.assert_array_equal(logits(model, n_ubatch=512, n_cells=512), full)
        looking_ahead = logits(model, n_ubatch=512, n_cells=512, causal=False)
        model.set_streaming("off")
        np.testing.assert_array_equal(logits(model, n_ubatch=512, n_cells=0, causal=False), looking_ahead)

        # A narrow one: hiding keys that are in the cache and dropping them is the same.
        model.set_streaming(f"{everywhere};window={WINDOW}")
        hidden = logits(model, n_ubatch=512, n_cells=512)
        dropped = logits(model, n_ubatch=32, n_cells=256)
        assert np.abs(hidden - full).max() > 3 * noise, "the window changed nothing"
        assert np.abs(dropped - hidden).max() <= noise
