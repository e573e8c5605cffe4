"""Lazy ratios against the score of kvpress's SimLayerKVPress, the other implementation of the method.

It scores a layer by the attention of the last `n_last` queries on the first `n_initial` positions and on the `n_recent`
before the last `n_last`: unlike the paper's, its window ends before the queries that it looks with. So its score is our ratio
with window = n_recent + n_last, less our ratio of the last n_last positions alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from support.families import FAMILIES

from lt_gguf.hf.analysis import measure

N_LAYER = 3
LENGTH = 90


@pytest.fixture(scope="module")
def press_class():
    found = importlib.util.find_spec("kvpress")
    if found is None:
        pytest.skip("kvpress isn't installed: the score of SimLayerKVPress can't be compared with")
    # its package imports all presses, and with them data sets and trainers: only what the press is built on is loaded
    for name in ("kvpress", "kvpress.presses"):
        package = types.ModuleType(name)
        package.__path__ = [f"{found.submodule_search_locations[0]}{name.removeprefix('kvpress').replace('.', '/')}"]
        sys.modules[name] = package
    try:
        yield importlib.import_module("kvpress.presses.simlayerkv_press").SimLayerKVPress
    except ImportError as error:
        pytest.skip(f"kvpress doesn't work with this transformers: {error}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "kvpress"]:
            del sys.modules[name]


def score(press, arguments) -> float:
    """It only says whether the score is over the threshold, so look for the threshold where that turns."""
    low, high = 0.0, 1.0
    for _ in range(40):
        press.lazy_threshold = (low + high) / 2
        low, high = (press.lazy_threshold, high) if press.is_lazy(*arguments) else (low, press.lazy_threshold)
    return low


def scores(model, press, tokens: list[int]) -> list[float]:
    found = []

    def after(module, arguments, named, output):
        keys = (named.get("cache") or named["past_key_values"]).layers[module.layer_idx].keys
        hidden = arguments[0] if arguments else named["hidden_states"]
        found.append(score(press, (module, hidden, keys, named["position_embeddings"])))

    hooks = [layer.self_attn.register_forward_hook(after, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=True)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("n_initial, n_recent, n_last", [(4, 20, 1), (4, 20, 8), (2, 7, 32)])
def test_ratios_equal_the_score(press_class, tmp_path, family, n_initial, n_recent, n_last):
    model = FAMILIES[family].build_model(N_LAYER)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 320, LENGTH).tolist()
    expected = scores(model, press_class(n_last=n_last, n_recent=n_recent, n_initial=n_initial), tokens)
    options = dict(w_last=n_last, device="cpu", dtype="float32", layer_by_layer=False)
    ratios = measure(tmp_path, [tokens], sink=n_initial, window=n_recent + n_last, **options)
    ratios = ratios - measure(tmp_path, [tokens], sink=0, window=n_last, **options)
    np.testing.assert_allclose(ratios[0], expected, rtol=0, atol=1e-6)
    assert len(set(np.round(expected, 5))) == N_LAYER
