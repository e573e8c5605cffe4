"""Streaming attention for any transformers model that dispatches through `AttentionInterface`.

In a streaming layer the key at position p is visible to the query at position q iff
`p <= q and (p < sink or q - p < window)` (LightTransfer, arXiv 2410.13846, section 3); the other layers stay as they
are. With `prefill = full` this holds for decoded tokens, and a prompt's tokens see all of their prompt, the sinks and
the last `window` positions before it: which tokens are prompts is then given. The model's code and weights are not
touched: transformers builds one attention mask a forward pass and hands it to every layer, so the mask registered here has
two slots, `causal` and `streaming`, and the attention function registered here gives each layer the slot that is its own.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator, Sequence

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from lt_gguf.spec import StreamingSpec

CAUSAL, STREAMING = 0, 1  # the slots of the mask, in the place where other masks have their heads

# transformers' names of the attention that runs below ours -> the name it is registered under ("sdpa" in a name makes
# transformers check that the model supports it)
IMPLEMENTATIONS = {"sdpa": "streaming_sdpa", "eager": "streaming_eager"}

SPEC_ATTRIBUTE = "streaming_attention"  # on the model's config; a plain dict, so that the config still saves as JSON


Prompts = Sequence[tuple[int, int]]  # half-open ranges of positions, ascending


def apply_streaming_attention(
    model: PreTrainedModel, spec: StreamingSpec, implementation: str = "sdpa", prompts: Prompts | None = None
) -> None:
    """Makes the layers that `spec` flags attend to sinks and window only, from the next forward pass on.

    `implementation` is the attention that runs below the mask: "sdpa" or "eager" (the model's own). `prompts` says which
    positions [begin, end) of every sequence are prompts, where the spec's prefill is "full"; an open one may end after
    the sequence. It holds for training, for prompts of any split and for decoding with a cache; padded and packed
    batches count positions within each sequence.

    Raises ValueError if the spec doesn't fit the model, if prompts are missing, malformed or don't fit its prefill
    mode, or if the model can't take another attention implementation.
    """
    config = model.config.get_text_config(decoder=True)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}")
    if spec.prefill == "full" and prompts is None:
        raise ValueError("prefill 'full' needs the prompts: say which positions they are, or use prefill 'stream'")
    if spec.prefill == "stream" and prompts is not None:
        raise ValueError("prefill 'stream' takes no prompts: every token streams, leave them out or use prefill 'full'")
    ends = [end for prompt in prompts or () for end in prompt]
    if ends != sorted(ends) or any(begin < 0 or begin == end for begin, end in prompts or ()):
        raise ValueError(f"prompts {list(prompts)}: must be ascending (begin, end) with 0 <= begin < end that don't overlap")
    if spec.n_layer != config.num_hidden_layers:
        raise ValueError(f"the spec is for {spec.n_layer} layers, the model has {config.num_hidden_layers}")
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * spec.n_layer
    for layer in spec.layers:
        if layer_types[layer] != "full_attention":
            raise ValueError(f"layer {layer} is a {layer_types[layer]} layer: only full_attention layers can stream")

    model.set_attn_implementation(IMPLEMENTATIONS[implementation])
    if config._attn_implementation != IMPLEMENTATIONS[implementation]:  # for some models transformers only warns
        raise ValueError(f"{type(model).__name__} doesn't take its attention from transformers' AttentionInterface")
    rule = {"sink": spec.sink, "window": spec.window, "prompts": [list(prompt) for prompt in prompts or ()]}
    setattr(config, SPEC_ATTRIBUTE, {"layers": list(spec.layers), "rule": rule})


def remove_streaming_attention(model: PreTrainedModel, implementation: str = "sdpa") -> None:
    """Gives every layer full attention again, computed by `implementation`."""
    config = model.config.get_text_config(decoder=True)
    if hasattr(config, SPEC_ATTRIBUTE):
        delattr(config, SPEC_ATTRIBUTE)
    model.set_attn_implementation(implementation)


@contextmanager
def streaming_attention(
    model: PreTrainedModel, spec: StreamingSpec | None, implementation: str = "sdpa", prompts: Prompts | None = None
) -> Iterator[PreTrainedModel]:
    """`model` with `spec` applied (None: with full attention) inside a with block; as it was before, after it."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation, getattr(config, SPEC_ATTRIBUTE, None)
    try:
        if spec is None:
            remove_streaming_attention(model, implementation)
        else:
            apply_streaming_attention(model, spec, implementation, prompts)
        yield model
    finally:
        remove_streaming_attention(model, before[0])
        if before[1] is not None:
            setattr(config, SPEC_ATTRIBUTE, before[1])


def visible(q: torch.Tensor, p: torch.Tensor, sink: int, window: int, prompts: Prompts = ()) -> torch.Tensor:
    """Whether the keys at positions `p` are visible to the queries at `q` in a streaming layer, elementwise."""
    first = q - window + 1  # of the window
    for begin, end in prompts:
        first = torch.where((q >= begin) & (q < end), begin - window, first)
    return (p <= q) & ((p < sink) | (p >= first))


def streaming_mask(config: PretrainedConfig, **mask_arguments) -> torch.Tensor:
    """Mask function for transformers: bool (batch_size, 2, q_length, kv_length), True where a key is visible.

    Positions are read off the causal slot, because it alone knows how a batch is padded, packed or cached: a query's
    position in its own sequence is the number of keys that it sees causally, less one.
    """
    mask_arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    causal = sdpa_mask(**mask_arguments)
    q = causal.sum(dim=-1, keepdim=True) - 1
    if causal.shape[-2] == causal.shape[-1]:
        p = q.transpose(-1, -2)
    else:  # a cache: one sequence a row, and the last query sees all of it
        p = causal[:, :, -1:].cumsum(dim=-1) - 1
    spec = getattr(config, SPEC_ATTRIBUTE)
    return torch.cat([causal, causal & visible(q, p, **spec["rule"])], dim=1)


def _slot(module: torch.nn.Module, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The part of `streaming_mask`'s result that is for the layer `module`: bool (batch, 1, q_length, kv_length)."""
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[1] != 2:
        raise ValueError(
            f"{type(module).__name__} got a mask that transformers' mask functions did not build: streaming attention "
            "needs a model that calls create_causal_mask, and no 4-dimensional attention_mask from the caller"
        )
    layers = getattr(module.config, SPEC_ATTRIBUTE)["layers"]
    slot = STREAMING if module.layer_idx in layers else CAUSAL
    return attention_mask[:, slot : slot + 1]


def _streaming_sdpa(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, _slot(module, attention_mask), **kwargs)


def _streaming_eager(module, query, key, value, attention_mask, **kwargs):
    hidden = torch.finfo(query.dtype).min
    additive = torch.where(_slot(module, attention_mask), torch.zeros((), dtype=query.dtype), hidden)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, additive, **kwargs)


for _name, _forward in (("sdpa", _streaming_sdpa), ("eager", _streaming_eager)):
    AttentionInterface.register(IMPLEMENTATIONS[_name], _forward)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], streaming_mask)
