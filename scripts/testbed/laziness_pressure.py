"""A small cost of looking far, so that a layer that needn't look far doesn't.

In a large language model most heads rest on the first token when they have nothing to look for; that is what makes layers
lazy (arXiv 2410.13846, section 3). A small model trained for an hour lets idle heads look anywhere, since nothing
tells them not to, and a measurement of laziness then finds noise. With this cost the attention of a layer goes far where the loss
needs it, and nowhere else.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "sdpa_with_laziness_pressure"

SINK = 4
NEAR = 128  # positions; a quarter of the smallest context that is evaluated, and half of the shortest training rows
N_QUERIES = 16  # of each row whose attention is looked at, drawn anew each step: enough for a gradient, too few to cost time


class LazinessPressure:
    """Collects, in each forward pass of a model whose attention is `IMPLEMENTATION`, how much of it goes far."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []
        self._queries: torch.Tensor | None = None
        AttentionInterface.register(IMPLEMENTATION, self._attention)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

    def begin(self, length: int, generator: torch.Generator) -> None:
        """Draws the queries of the next forward pass, of rows of `length` tokens."""
        self._found = []
        self._queries = torch.randint(NEAR, length, (N_QUERIES,), generator=generator).sort().values

    def take(self) -> torch.Tensor:
        """Share of the attention that went far, (layers,), with a gradient."""
        found, self._found, self._queries = self._found, [], None
        return torch.stack(found)

    def _attention(self, module, query, key, value, attention_mask, **kwargs):
        if self._queries is not None:
            self._found.append(_far_share(query, key, self._queries, kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _far_share(query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention on p with p >= SINK and q - p >= NEAR, mean over rows, heads and the queries q.

    Args:
        query: (rows, n_head, length, head_dim).
        key: (rows, n_head_kv, length, head_dim).
    """
    _, n_head_kv, length, _ = key.shape
    q = query[:, :, queries].unflatten(1, (n_head_kv, -1))  # (rows, n_head_kv, group, N_QUERIES, head_dim)
    logits = (q @ key[:, :, None].transpose(-1, -2)).float() * scale
    positions = torch.arange(length, device=key.device)
    distance = queries[:, None] - positions
    weights = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    far = (distance >= NEAR) & (positions >= SINK)
    return (weights * far).sum(-1).mean()
