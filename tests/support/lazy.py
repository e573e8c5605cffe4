"""The lazy ratio of LightTransfer (arXiv 2410.13846, section 3.2), with plain softmax in transformers."""

from __future__ import annotations

import copy

import numpy as np
import torch


def lazy_ratios(model: torch.nn.Module, tokens: np.ndarray, sink: int, window: int, w_last: int) -> np.ndarray:
    """Of each layer: the mean over the last `w_last` queries and all heads of the attention on sinks and window, float64.

    The keys that count are those at p < sink or p >= len(tokens) - window, as far as the query sees them.
    """
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch has no grouped product of float64
    with torch.no_grad():
        attentions = model(torch.from_numpy(tokens)[None], use_cache=False, output_attentions=True).attentions
    p = np.arange(len(tokens))
    lazy = (p < sink) | (p >= len(tokens) - window)
    return np.array([weights[0, :, -w_last:, :].numpy()[..., lazy].sum(-1).mean() for weights in attentions])


def laziest(ratios: np.ndarray, fraction: float) -> tuple[int, ...]:
    """The floor(fraction * n) layers with the highest ratios; of equal ones the layer with the lower number stays full."""
    order = sorted(range(len(ratios)), key=lambda layer: (ratios[layer], layer))
    return tuple(sorted(order[len(ratios) - int(fraction * len(ratios)) :]))
