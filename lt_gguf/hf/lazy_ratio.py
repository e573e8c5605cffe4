"""The lazy ratio of an attention layer, measured inside any transformers model that dispatches through `AttentionInterface`.

The lazy ratio of a layer is the mean, over the last `w_last` queries q of a prompt of T tokens and over all heads, of the
attention on the keys p <= q with p < sink or p >= T - window (LightTransfer, arXiv 2410.13846, section 3.2). As there, it
comes from two log-sum-exp values, `exp(lse over these keys - lse over all keys)`, of w_last rows of logits; the layer's
output comes from torch's fused attention. So no n×n matrix is ever built, and memory grows with T, not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "lazy_ratio"  # the name that the attention below is registered under

BLOCK_BYTES = 64 << 20  # of logits that are in memory at a time where torch's fused attention can't be used


@dataclass
class Measure:
    """What is measured, and what was found in the layer that is running.

    Args:
        sink: number of first positions that a streaming layer sees.
        window: number of last positions that it sees.
        w_last: number of last queries that are looked at; all of them if the prompt has fewer.
    """

    sink: int
    window: int
    w_last: int
    found: list[float | None] = field(default_factory=list)

    def take(self, layer: int) -> float:
        """The ratio that the layer, which has just run, has left here; NaN of one that has a sliding window of its own.

        Raises:
            ValueError: the layer has no attention that could be measured, or more than one, or it isn't a number.
        """
        found, self.found = self.found, []
        if not found:
            raise ValueError(
                f"layer {layer} takes no attention from transformers' AttentionInterface: its lazy ratio can't be measured"
            )
        if len(found) > 1:
            raise ValueError(f"layer {layer} has {len(found)} attentions, must have one: its lazy ratio can't be measured")
        if found[0] is None:
            return math.nan
        if found[0] != found[0]:
            raise ValueError(f"layer {layer}: its attention logits have NaN: try --dtype float32, or check the weights")
        return found[0]


_current: ContextVar[Measure | None] = ContextVar("measure", default=None)


@contextmanager
def measuring(measure: Measure) -> Iterator[Measure]:
    """Inside the with block every attention of `IMPLEMENTATION` adds its ratio to `measure.found`; `None` if it has a window of its own."""
    token = _current.set(measure)
    try:
        yield measure
    finally:
        _current.reset(token)


def lazy_ratio(
    query: torch.Tensor,
    key: torch.Tensor,
    measure: Measure,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> float:
    """The share of the last queries' attention that goes to the first `sink` and the last `window` positions.

    Args:
        query: (1, n_head, T, head_dim), RoPE applied; keys and queries are those of one prompt, without padding.
        key: (1, n_head_kv, T, head_dim).
        scale: what logits are multiplied with.
        softcap: logits are `softcap * tanh(logit / softcap)`, as in Gemma 2.
        sink_logits: (n_head,), a learned logit that takes part in each head's softmax, as in gpt-oss.
    """
    length, n_head_kv = key.shape[2], key.shape[1]
    n_last = min(measure.w_last, length)
    positions = torch.arange(length, device=key.device)
    future = positions > positions[length - n_last :, None]
    recent = max(length - measure.window, 0)
    sink = min(measure.sink, recent)  # note: no key counts twice
    queries = query[0, :, length - n_last :].unflatten(0, (n_head_kv, -1))
    extra = None if sink_logits is None else sink_logits.unflatten(0, (n_head_kv, -1))
    ratios = []
    for head in range(n_head_kv):  # note: one at a time, so that the logits of w_last rows stay small
        logits = _logits(queries[head], key[0, head], scale, softcap).masked_fill_(future, -torch.inf)
        lazy = torch.cat([logits[..., :sink], logits[..., recent:]], dim=-1).logsumexp(dim=-1)
        full = logits.logsumexp(dim=-1)
        if extra is not None:
            full = torch.logaddexp(full, extra[head][:, None].to(full.dtype))
        ratios.append((lazy - full).exp().flatten())
    return torch.cat(ratios).cpu().double().mean().item()  # note: on the CPU, Apple's GPUs have no float64


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of one prompt in linear memory: (1, T, n_head, value_dim). Arguments as for `lazy_ratio`.

    Args:
        window: number of last positions that a query sees, its own included; `None`: all.
    """
    n_head_kv, n_group = key.shape[1], query.shape[1] // key.shape[1]
    # note: KV heads take the place of the batch, so that the heads of a group share theirs without a copy
    queries = query[0].unflatten(0, (n_head_kv, n_group))
    keys, values = key[0][:, None], value[0][:, None]
    # note: torch's fused attention has no softcap and no extra logits, and on Apple's GPUs it builds the n×n matrix
    if softcap is None and sink_logits is None and window is None and query.device.type != "mps":
        # note: with head sizes that differ (multi-head latent attention) it falls back to the n×n matrix
        size = max(query.shape[-1], value.shape[-1])
        q, k, v = (functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (queries, keys, values))
        k, v = (x.expand(-1, n_group, -1, -1) for x in (k, v))
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        output = output[..., : value.shape[-1]]
    else:
        extra = None if sink_logits is None else sink_logits.unflatten(0, (n_head_kv, n_group))
        output = _attention_in_blocks(queries, keys[:, 0], values[:, 0], scale, softcap, extra, window)
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous()


def _attention_in_blocks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """(n_head_kv, n_group, T, value_dim) from queries of (n_head_kv, n_group, T, head_dim): a few rows of logits at a time."""
    n_head_kv, n_group, length, _ = queries.shape
    output = queries.new_empty(n_head_kv, n_group, length, values.shape[-1])
    n_rows = max(1, BLOCK_BYTES // (4 * n_group * length))
    positions = torch.arange(length, device=keys.device)
    for begin in range(0, length, n_rows):
        end = min(begin + n_rows, length)
        first = 0 if window is None else max(0, begin - window + 1)
        distances = positions[begin:end, None] - positions[first:end]
        hidden = (distances < 0) | (distances >= (window or length))
        for head in range(n_head_kv):
            logits = _logits(queries[head, :, begin:end], keys[head, first:end], scale, softcap).masked_fill_(hidden, -torch.inf)
            full = logits.logsumexp(dim=-1, keepdim=True)
            if sink_logits is not None:
                full = torch.logaddexp(full, sink_logits[head][:, None, None].to(full.dtype))
            weights = logits.sub_(full).exp_()
            output[head, :, begin:end] = weights.to(values.dtype) @ values[head, first:end]
    return output


def _logits(queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """(n_group, n_query, n_key), in float32 or, where the model is, in float64."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    logits = (queries.to(dtype) * scale) @ keys.to(dtype).T
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention; the names are its own."""
    layer = getattr(module, "layer_idx", "?")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ValueError(f"layer {layer} ({type(module).__name__}) doesn't attend causally: must be a causal language model")
    is_sliding = _is_sliding(module)
    cuts = sliding_window is not None and sliding_window < key.shape[2]
    # note: the mask of a sliding layer says no more than that its window cuts
    if cuts != (attention_mask is not None) or (cuts and not is_sliding):
        raise ValueError(f"layer {layer} ({type(module).__name__}) has a window or a mask of its own, must have full attention")
    if position_bias is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"layer {layer} ({type(module).__name__}) attends in a way of its own: its lazy ratio can't be measured")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (measure := _current.get()) is not None:
        measure.found.append(None if is_sliding else lazy_ratio(query, key, measure, scale, softcap, s_aux))
    return causal_attention(query, key, value, scale, softcap, s_aux, sliding_window if cuts else None), None


def _is_sliding(module: torch.nn.Module) -> bool:
    """Whether the layer is one of those with a sliding window in a model that has others, too."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    return types is not None and types[module.layer_idx] == "sliding_attention"


_NOT_CAUSAL = torch.empty(0)


def _mask(
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: object,
) -> torch.Tensor | None:
    """What transformers calls for a mask: none where it is plainly causal, else something for `_attention` to refuse.

    A model may ask for masks that none of its layers uses, so what is asked for isn't refused here.
    """
    # note: prompts come alone and without padding, so a mask of tokens hides nothing
    plain = allow_is_causal_skip and (local_size is None or local_size >= kv_length)
    return None if plain else _NOT_CAUSAL


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
