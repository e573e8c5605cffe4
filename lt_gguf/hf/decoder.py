"""What both ways of running a causal language model need of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import logging


def find_layers(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The decoder of a causal language model, and its layers.

    Raises:
        ValueError: it has no list of as many layers as its config says.
    """
    n_layer = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layer:
            return decoder, child
    raise ValueError(f"{type(model).__name__} has no list of its {n_layer} layers: its lazy ratios can't be measured")


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The keyword argument that gives `model` its KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    # note: also since then in a model whose code isn't transformers' own
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Inside the with block transformers shows no bar for the weights that it loads."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
