"""Streaming attention for any transformers model that dispatches through `AttentionInterface`.

In a streaming layer the key at position p is visible to the query at position q iff
`p <= q and (p < sink or q - p < window)` (LightTransfer, arXiv 2410.13846, section 3); the other layers stay as they
are. With `prefill = full` this holds for decoded tokens, and a prompt's tokens see all of their prompt, the sinks and
the last `window` positions before it: which tokens are prompts is then given. The model's code and weights are not
touched: transformers builds one attention mask a forward pass and hands it to every layer, so the mask made here has
two slots, `CAUSAL` and `STREAMING`, and the attention function registered here gives each layer the slot that is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, flex_attention_mask, sdpa_mask
from transformers.utils.import_utils import is_torch_flex_attn_available

from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.in_config import read_spec

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL, STREAMING = 0, 1  # the slots of the mask; of a dense one, in the place where other masks have their heads

# What `implementation` may be -> the name it is registered under (transformers looks for "sdpa" and "flex_attention" in a
# name and checks that the model supports it)
IMPLEMENTATIONS = {
    "auto": "streaming_auto",
    "sdpa": "streaming_sdpa",
    "eager": "streaming_eager",
    "flex_attention": "streaming_flex_attention",
}

SPEC_ATTRIBUTE = "streaming_attention"  # on the model's config; a plain dict, so that the config still saves as JSON

Prompts = Sequence[tuple[int, int]]  # half-open ranges of positions, ascending


class BlockMasks(tuple["BlockMask", "BlockMask"]):
    """flex_attention's masks of the two slots; it computes only blocks of 128 by 128 that have something visible in them."""


def apply_streaming(
    model: PreTrainedModel, spec: StreamingSpec | None = None, *, prompts: Prompts | None = None, implementation: str = "auto"
) -> None:
    """Makes the layers that `spec` flags attend to sinks and window only, from the next forward pass on.

    It holds for training, for prompts of any split and for decoding with a cache; padded and packed batches count positions
    within each sequence.

    Args:
        model: a causal language model.
        spec: which layers stream; without it the one that the checkpoint's config says it was trained with.
        prompts: which positions [begin, end) of every sequence are prompts, where the spec's prefill is "full"; an open
            one may end after the sequence.
        implementation: the attention that runs below the mask: "sdpa"; "eager", the model's own; "flex_attention", whose
            work grows with what is visible (on a CPU without gradients); or "auto", see `_auto_mask`.

    Raises:
        ValueError: the spec doesn't fit the model, there is none, the prompts are missing, malformed or don't fit its
            prefill mode, or the model can't take the implementation.
    """
    config = model.config.get_text_config(decoder=True)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}")
    if spec is None:
        spec = _spec_of_config(model)
    _check_prompts(spec, prompts)
    if spec.n_layer != config.num_hidden_layers:
        raise ValueError(f"the spec is for {spec.n_layer} layers, the model has {config.num_hidden_layers}")
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * spec.n_layer
    for layer in spec.layers:
        if layer_types[layer] != "full_attention":
            raise ValueError(f"layer {layer} is a {layer_types[layer]} layer: only full_attention layers can stream")

    if implementation == "auto" and _needs_eager(model, config):
        implementation = "eager"
    elif implementation == "auto" and not _can_flex(model, config):
        implementation = "sdpa"
    model.set_attn_implementation(IMPLEMENTATIONS[implementation])
    if config._attn_implementation != IMPLEMENTATIONS[implementation]:  # for some models transformers only warns
        raise ValueError(f"{type(model).__name__} doesn't take its attention from transformers' AttentionInterface")
    rule = {"sink": spec.sink, "window": spec.window, "prompts": [list(prompt) for prompt in prompts or ()]}
    setattr(config, SPEC_ATTRIBUTE, {"layers": list(spec.layers), "rule": rule})


def remove_streaming(model: PreTrainedModel, implementation: str = "sdpa") -> None:
    """Gives every layer full attention again, computed by `implementation`."""
    config = model.config.get_text_config(decoder=True)
    if hasattr(config, SPEC_ATTRIBUTE):
        delattr(config, SPEC_ATTRIBUTE)
    model.set_attn_implementation(implementation)


@contextmanager
def streaming_attention(
    model: PreTrainedModel, spec: StreamingSpec | None, *, prompts: Prompts | None = None, implementation: str = "sdpa"
) -> Iterator[PreTrainedModel]:
    """`model` with `spec` applied (None: with full attention) inside a with block; as it was before, after it."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation, getattr(config, SPEC_ATTRIBUTE, None)
    try:
        if spec is None:
            remove_streaming(model, implementation)
        else:
            apply_streaming(model, spec, prompts=prompts, implementation=implementation)
        yield model
    finally:
        remove_streaming(model, before[0])
        if before[1] is not None:
            setattr(config, SPEC_ATTRIBUTE, before[1])


def visible(q: torch.Tensor, p: torch.Tensor, sink: int, window: int, prompts: Prompts = ()) -> torch.Tensor:
    """Whether the keys at positions `p` are visible to the queries at `q` in a streaming layer, elementwise."""
    first = q - window + 1  # of the window
    for begin, end in prompts:
        first = torch.where((q >= begin) & (q < end), begin - window, first)
    return (p <= q) & ((p < sink) | (p >= first))


def _spec_of_config(model: PreTrainedModel) -> StreamingSpec:
    config = model.config.get_text_config(decoder=True)
    found = read_spec(model.config.to_dict(), config.num_hidden_layers)
    if found is None:
        raise ValueError(f"{type(model).__name__}: its config doesn't say which layers were trained to stream, give a spec")
    return found[0]


def _check_prompts(spec: StreamingSpec, prompts: Prompts | None) -> None:
    if spec.prefill == "full" and prompts is None:
        raise ValueError("prefill 'full' needs the prompts: say which positions they are, or use prefill 'stream'")
    if spec.prefill == "stream" and prompts is not None:
        raise ValueError("prefill 'stream' takes no prompts: every token streams, leave them out or use prefill 'full'")
    ends = [end for prompt in prompts or () for end in prompt]
    if ends != sorted(ends) or any(begin < 0 or begin == end for begin, end in prompts or ()):
        raise ValueError(f"prompts {list(prompts or ())}: must be ascending (begin, end) with 0 <= begin < end that don't overlap")


# ---------------------------------------------------------------------------------------------------------- masks

MaskFunction = Callable[[Any, Any, Any, Any], torch.Tensor]  # of the indices of batch, head, query and key


def _positions(
    batch_size: int, n_token: int, mask_function: MaskFunction, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The position of each token in its own sequence, int64 (batch_size, n_token). Padding doesn't count.

    Args:
        mask_function: transformers' rule of the full layers, which knows how sequences are packed in a row: where one
            begins, its first token doesn't see the token before it.
        attention_mask: bool (batch_size, n <= n_token), False where a token is padding; None: none is. transformers packs no
            sequences in a row with one.
    """
    if attention_mask is not None:
        padding = max(0, n_token - attention_mask.shape[-1])
        return torch.nn.functional.pad(attention_mask, (0, padding)).long().cumsum(dim=-1) - 1
    index = torch.arange(n_token, device=device).expand(batch_size, -1)
    batch = torch.arange(batch_size, device=device)[:, None]
    follows = mask_function(batch, torch.zeros_like(batch), index[:, 1:], index[:, :-1])
    begin = torch.where(follows, 0, index[:, 1:]).cummax(dim=-1).values
    return index - torch.nn.functional.pad(begin, (1, 0))


def _streaming_function(
    config: PretrainedConfig,
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,  # type: ignore[assignment]  # typed for numbers, called with tensors
    attention_mask: torch.Tensor | None = None,
    device: torch.device,
    **_: Any,
) -> MaskFunction:
    """The mask function of the streaming layers: `mask_function`, and `visible` by the positions in each sequence."""
    positions = _positions(batch_size, kv_offset + kv_length, mask_function, attention_mask, device)
    rule = getattr(config, SPEC_ATTRIBUTE)["rule"]

    def in_sight(batch: Any, head: Any, q: Any, p: Any) -> torch.Tensor:
        return visible(positions[batch, q], positions[batch, p], **rule)

    return and_masks(mask_function, in_sight)


def streaming_mask(config: PretrainedConfig, **arguments: Any) -> torch.Tensor:
    """Mask function for transformers: bool (batch_size, 2, q_length, kv_length), True where a key is visible."""
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    in_streaming = arguments | {"mask_function": _streaming_function(config, **arguments)}
    full, streaming = sdpa_mask(**arguments), sdpa_mask(**in_streaming)
    assert full is not None and streaming is not None  # as no skipping is allowed
    return torch.cat([full, streaming], dim=1)


def _block_masks(config: PretrainedConfig, **arguments: Any) -> BlockMasks:
    """The same for flex_attention."""
    in_streaming = arguments | {"mask_function": _streaming_function(config, **arguments)}
    return BlockMasks((flex_attention_mask(**arguments), flex_attention_mask(**in_streaming)))


def _auto_mask(config: PretrainedConfig, **arguments: Any) -> torch.Tensor | BlockMasks:
    """Block masks on an Nvidia GPU where more tokens come at once than sink and window hold, else dense ones.

    Of fewer tokens no block would be hidden; for one at a time, as in decoding, flex_attention would be compiled anew as the
    cache grows. The rule follows from that, it isn't tuned by timing.
    """
    rule = getattr(config, SPEC_ATTRIBUTE)["rule"]
    pays = torch.device(arguments["device"]).type == "cuda" and arguments["q_length"] > rule["sink"] + rule["window"]
    return (_block_masks if pays else streaming_mask)(config, **arguments)


def _needs_eager(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """torch's fused attention knows neither learned sinks (gpt-oss) nor a softcap (Gemma 2), and would leave them out."""
    return not getattr(model, "_supports_sdpa", True) or bool(getattr(config, "attn_logit_softcapping", None))


def _can_flex(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """transformers' flex_attention has no dropout, and not every model takes it."""
    has_dropout = bool(getattr(config, "attention_dropout", 0) or 0)
    return getattr(model, "_supports_flex_attn", False) and is_torch_flex_attn_available() and not has_dropout


# ------------------------------------------------------------------------------------------------------ attention

Masks = torch.Tensor | BlockMasks | None  # of both slots
Attended = tuple[torch.Tensor, torch.Tensor | None]  # and weights, where they are known


def _slot(module: torch.nn.Module, masks: Masks) -> Any:
    """The part of the masks that is for the layer `module`: bool (batch, 1, q_length, kv_length), or a block mask."""
    slot = STREAMING if module.layer_idx in getattr(module.config, SPEC_ATTRIBUTE)["layers"] else CAUSAL
    if isinstance(masks, BlockMasks):
        return masks[slot]
    if not isinstance(masks, torch.Tensor) or masks.dim() != 4 or masks.shape[1] != 2:
        raise ValueError(
            f"{type(module).__name__} got a mask that transformers' mask functions did not build: streaming attention "
            "needs a model that calls create_causal_mask, and no 4-dimensional attention_mask from the caller"
        )
    return masks[:, slot : slot + 1]


def _streaming_sdpa(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Masks, **kwargs: Any
) -> Attended:
    return sdpa_attention_forward(module, query, key, value, _slot(module, attention_mask), **kwargs)


def _streaming_flex(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Masks, **kwargs: Any
) -> Attended:
    return flex_attention_forward(module, query, key, value, _slot(module, attention_mask), **kwargs)


def _streaming_auto(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Masks, **kwargs: Any
) -> Attended:
    run = _streaming_flex if isinstance(attention_mask, BlockMasks) else _streaming_sdpa
    return run(module, query, key, value, attention_mask, **kwargs)


def _streaming_eager(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Masks, **kwargs: Any
) -> Attended:
    hidden = torch.finfo(query.dtype).min
    additive = torch.where(_slot(module, attention_mask), torch.zeros((), dtype=query.dtype), hidden)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, additive, **kwargs)


for _name, _forward, _mask in (
    ("auto", _streaming_auto, _auto_mask),
    ("sdpa", _streaming_sdpa, streaming_mask),
    ("eager", _streaming_eager, streaming_mask),
    ("flex_attention", _streaming_flex, _block_masks),
):
    AttentionInterface.register(IMPLEMENTATIONS[_name], _forward)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_name], _mask)
