"""What a conversation costs, in lines: memory beside what full attention would take, speed, what was read and what was spared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lt_gguf.chat.conversation import Conversation, Fit
from lt_gguf.chat.screen import format_seconds
from lt_gguf.chat.turns import Answer
from lt_gguf.memory.kv import cache_types_text
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.runtime.state_store import describe_limit
from lt_gguf.spec import StreamingSpec, format_layers
from lt_gguf.spec.cache_types import PLAIN

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

# Gives the bytes of the KV cache that the same model has without streaming layers.
FullKV = Callable[[], int]


def describe_memory(llm: Llama, full_kv: FullKV) -> str:
    """The KV memory of this context, beside that of the same model without streaming layers."""
    used = llm.kv_bytes()["total"]
    types = "" if llm.cache_types == PLAIN else f", {cache_types(llm)}"
    if llm.streaming is None:
        return f"KV {format_bytes(used)}, no layer streams{' yet' if llm.auto else ''}{types}"
    chosen = f", layers {format_layers(llm.streaming.layers)} stream" if llm.auto else ""
    return f"KV {format_bytes(used)} hybrid, {format_bytes(full_kv())} full ({1 - used / full_kv():.0%} saved){types}{chosen}"


def cache_types(llm: Llama) -> str:
    """The types of this context's cache, as in `K q8_0, V q4_0, f16 in streaming layers`."""
    full = StreamingSpec((), llm._n_layer(), cache_keep=llm.cache_keep)
    # note: layers that are chosen for the prompt keep the types that they had
    return cache_types_text(str(llm.cache_types), full if llm.auto or llm.streaming is None else llm.streaming)


def describe_answer(conversation: Conversation, answer: Answer) -> str:
    """Tokens in the context, read and generated, of an answer."""
    llm = conversation.llm
    restored = f" · restored {answer.n_restored} from disk" if answer.n_restored else ""
    rate = f" · {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    ended = f" ({answer.ended})" if answer.ended else ""
    return f"{llm.n_tokens} of {llm.n_ctx()} tokens{restored} · read {answer.n_read} tokens{rate}{ended}"


def first_token(answer: Answer | None) -> str:
    return f"first token after {answer.seconds_to_first:.2f} s" if answer and answer.seconds_to_first is not None else ""


def status(conversation: Conversation, full_kv: FullKV) -> str:
    """The line below what is typed, short enough for most windows; what may be cut off stands last."""
    llm, answer = conversation.llm, conversation.last
    parts = [f"{llm.n_tokens} of {llm.n_ctx()} tokens ({llm.n_tokens / llm.n_ctx():.0%})"]
    if documents := conversation.documents:
        parts.append(documents[0].name if len(documents) == 1 else f"{len(documents)} documents")
    if answer and answer.tokens_per_second:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer and answer.seconds_to_first is not None:
        parts.append(f"first token {answer.seconds_to_first:.2f} s")
    used = format_bytes(llm.kv_bytes()["total"])
    parts.append(f"KV {used}" if llm.streaming is None else f"KV {used}, full attention {format_bytes(full_kv())}")
    return " · ".join(parts)


def describe_fit(conversation: Conversation, fit: Fit, what: str) -> str:
    """Whether documents fit, and what reading them takes."""
    if not fit.fits:
        return f"{what}: {fit.n_new} tokens"
    parts = [f"{what}: {fit.n_new} tokens, fits: {fit.n_left} of {fit.n_ctx} are left then"]
    if fit.n_on_disk:
        parts.append(f"{fit.n_on_disk} are on disk from an earlier time")
    if fit.n_to_read:
        speed = conversation.tokens_per_second_read
        estimate = f", about {format_seconds(fit.n_to_read / speed)}" if speed else ""
        parts.append(f"{fit.n_to_read} to read{estimate}")
    return " · ".join(parts)


def stats(conversation: Conversation, full_kv: FullKV) -> list[tuple[str, str]]:
    """Names and figures of all there is to know."""
    llm, last, kept = conversation.llm, conversation.last, conversation.kept
    kv = llm.kv_bytes()
    rows = [
        ("model", Path(llm.model_path).name),
        ("context", f"{llm.n_tokens} of {llm.n_ctx()} tokens; the model was trained for {llm._model.n_ctx_train()}"),
        ("memory", describe_memory(llm, full_kv)),
        (
            "",
            f"full layers {format_bytes(kv['full'])}, streaming {format_bytes(kv['streaming'])}, a prompt {format_bytes(kv['prompt'])}",
        ),
        ("cache", cache_types(llm)),
        ("documents", "; ".join(document.describe() for document in conversation.documents) or "none"),
        ("questions", str(len(conversation.turns))),
        ("computed", f"{llm.n_read} tokens read, {llm.n_decoded} generated"),
        ("spared", f"{conversation.n_restored} tokens restored from disk"),
    ]
    if conversation.tokens_per_second_read:
        rows.append(("reading", f"{conversation.tokens_per_second_read:.1f} tokens/s"))
    if last:
        rate = f", {last.tokens_per_second:.1f} tokens/s" if last.tokens_per_second else ""
        rows.append(("last answer", f"{last.n_generated} tokens{rate}, {first_token(last) or 'no token'}"))
    if kept:
        disk = f"{describe_limit(kept.store)}, {kept.store.folder}" if kept.store.limit else "nothing is kept (--cache-limit 0)"
        rows.append(("on disk", disk))
    return rows


def layers(llm: Llama) -> list[tuple[str, str]]:
    """What each layer is, and what it holds now."""
    n_layer = llm._n_layer()
    spec = llm.streaming
    if spec is None:
        later = f"; the laziest {llm.auto.fraction:.0%} are chosen at the end of the first long prompt" if llm.auto else ""
        return [("full", f"all {n_layer} layers hold {llm.n_tokens} tokens{later}")]
    full = tuple(il for il in range(n_layer) if not spec.is_streaming(il))
    held = llm.n_tokens if llm.kv_bytes()["prompt"] else min(llm.n_tokens, spec.sink + spec.window)
    seen = f"sink {spec.sink}, window {spec.window}, prefill {spec.prefill}"
    return [
        ("full", f"{len(full)} layers hold {llm.n_tokens} tokens: {format_layers(full) or 'none'}"),
        ("streaming", f"{len(spec.layers)} layers hold {held} tokens ({seen}): {format_layers(spec.layers)}"),
        ("", "".join("s" if spec.is_streaming(il) else "F" for il in range(n_layer)) + "  F: full, s: streaming, layer 0 first"),
    ]
