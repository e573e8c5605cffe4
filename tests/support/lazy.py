"""The lazy ratio of LightTransfer (arXiv 2410.13846, section 3.2), with plain softmax in transformers."""

from __future__ import annotations

import copy

import numpy as np
import torch

from lt_gguf.spec import Lazy


def lazy_ratios(model: torch.nn.Module, tokens: np.ndarray, sink: int, window: int, w_last: int, lazy: Lazy = "mean") -> np.ndarray:
    """Of each layer: of the attention on sinks and window, the mean or the minimum over the last `w_last` queries and all heads,
    float64.

    The keys that count are those at p < sink or p >= len(tokens) - window, as far as the query sees them.
    """
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch has no grouped product of float64
    with torch.no_grad():
        attentions = model(torch.from_numpy(tokens)[None], use_cache=False, output_attentions=True).attentions
    p = np.arange(len(tokens))
    near = (p < sink) | (p >= len(tokens) - window)
    ratios = [weights[0, :, -w_last:, :].numpy()[..., near].sum(-1) for weights in attentions]  # each (heads, queries)
    return np.array([ratio.min() if lazy == "min" else ratio.mean() for ratio in ratios])


def laziest(ratios: np.ndarray, fraction: float) -> tuple[int, ...]:
    """The floor(fraction * n) layers with the highest ratios; of equal ones the layer with the lower number stays full."""
    order = sorted(range(len(ratios)), key=lambda layer: (ratios[layer], layer))
    return tuple(sorted(order[len(ratios) - int(fraction * len(ratios)) :]))
