"""What a GGUF file says of its layers and of its KV cache: as JSON, as tables on a terminal, and as a picture."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lt_gguf.gguf.file import GGUFModel
from lt_gguf.memory.kv import KVMemory, cache_types_text, kv_memory
from lt_gguf.memory.prompt import PromptMemory, prompt_memory
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report import plots
from lt_gguf.spec import CacheTypes, StreamingSpec, format_layers
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE
from lt_gguf.spec.keys import LAZY_RATIO_KEY

CONTEXTS = (4096, 32768, 131072)
BAR_WIDTH = 10


def describe(model: GGUFModel, spec: StreamingSpec | None, cache_type: str = DEFAULT_CACHE_TYPE) -> dict[str, Any]:
    """What `lt-gguf inspect --json` prints. Sizes are in bytes, contexts in tokens; a lazy ratio that wasn't measured is null.

    Args:
        cache_type: of the layers with full attention, as `CacheTypes.parse` reads it.

    Raises:
        ValueError: the cache type is unknown or doesn't fit the model.
    """
    ratios = _lazy_ratios(model) or (math.nan,) * model.n_layer
    return {
        "path": str(model.path),
        "name": model.name,
        "architecture": model.architecture,
        "bytes": model.n_bytes,
        "files": model.n_files,
        "n_layer": model.n_layer,
        "n_ctx_train": model.n_ctx_train,
        "head_size_k": model.head_size_k,
        "head_size_v": model.head_size_v,
        "cache_type": cache_type,
        "cache_keep": list(spec.cache_keep) if spec else [],
        "cache_recommended": _describe_recommended(model),
        "streaming": _describe_spec(model, spec),
        "why_not_streaming": model.why_not_streaming,
        "own_window": None
        if model.own_window is None
        else {"tokens": model.own_window.tokens, "layers": list(model.own_window.layers)},
        "provenance": {"selection": model.provenance.selection, "calibration": _calibration(model)} if model.provenance else None,
        "layers": [
            {
                "layer": il,
                "attention": _attention(model, spec, il),
                "n_head": model.n_head[il],
                "n_head_kv": model.n_head_kv[il],
                "kv_bytes_per_token": _token_bytes(model, spec, il, cache_type),
                "lazy_ratio": round(ratios[il], 6) if math.isfinite(ratios[il]) else None,
            }
            for il in range(model.n_layer)
        ],
        "kv_memory": [
            {
                "n_ctx": n_ctx,
                "full": full.total,
                "hybrid": hybrid.total,
                "hybrid_full_layers": hybrid.full,
                "hybrid_streaming_layers": hybrid.streaming,
                "hybrid_own_window_layers": hybrid.own,
                "prompt_whole": prompt.whole,
                "prompt_batches": prompt.batches,
            }
            for n_ctx, full, hybrid, prompt in _memory(model, spec, cache_type)
        ],
    }


def print_tables(model: GGUFModel, spec: StreamingSpec | None, cache_type: str = DEFAULT_CACHE_TYPE) -> None:
    """Prints what `lt-gguf inspect` shows. Raises ValueError as `describe` does."""
    memory_rows = _memory(model, spec, cache_type)  # raises before anything is printed
    console = Console(highlight=False)
    files = f" in {model.n_files} files" if model.n_files > 1 else ""
    size = f"{model.n_layer} layers, {format_bytes(model.n_bytes)}{files}"
    console.print(f"[bold]{escape(model.name)}[/bold]: {model.architecture}, {size}")
    for line in (_summary(model, spec), *_provenance(model)):
        console.print(line, markup=False)
    if model.recommended is not None:
        console.print(f"recommended for the KV cache: {model.recommended}")

    ratios = _lazy_ratios(model)
    types = cache_types_text(cache_type, spec)
    if ratios:
        layers = Table("layer", "attention", "KV heads", f"KV bytes a token ({types})")
    else:
        layers = Table("layers", "attention", "KV heads each", f"KV bytes a token, each ({types})")
    for index in (0, 2, 3):
        layers.columns[index].justify = "right"
    if ratios:
        layers.add_column("lazy ratio", no_wrap=True)
    for il, *cells in _layer_rows(model, spec, cache_type, ratios):
        layers.add_row(il, *cells, style="green" if cells[0] == "streaming" else None)
    console.print(layers)

    if model.why_not_streaming:
        console.print(f"KV memory: not shown for this architecture, {model.why_not_streaming}")
        return
    peaks = ["at its peak"] if any(prompt.whole for *_, prompt in memory_rows) else []
    memory = Table("context", "KV full", "KV hybrid", "saved", *peaks, title=f"KV cache, {types}")
    for column in memory.columns:
        column.justify = "right"
    for n_ctx, full, hybrid, prompt in memory_rows:
        saved = f"{1 - hybrid.total / full.total:.0%}" if full.total else "-"
        peak = [format_bytes(hybrid.total + prompt.whole)] if peaks else []
        memory.add_row(f"{n_ctx // 1024}k", format_bytes(full.total), format_bytes(hybrid.total), saved, *peak)
    console.print(memory)
    if peaks:
        console.print("At its peak: while a prompt is read that fills the context and comes as a whole")


def _layer_rows(
    model: GGUFModel, spec: StreamingSpec | None, cache_type: str, ratios: tuple[float, ...] | None
) -> list[tuple[str, ...]]:
    """The rows of the table of layers. Without ratios, which differ from layer to layer, one for each run of equal layers."""
    runs: list[tuple[list[int], tuple[str, ...]]] = []
    for il in range(model.n_layer):
        token_bytes = _token_bytes(model, spec, il, cache_type)
        cells = _attention(model, spec, il) or "-", str(model.n_head_kv[il]), "-" if token_bytes is None else f"{token_bytes:,}"
        if ratios:
            runs.append(([il], (*cells, _bar(ratios[il]))))
        elif runs and runs[-1][1] == cells:
            runs[-1][0].append(il)
        else:
            runs.append(([il], cells))
    return [(format_layers(layers), *cells) for layers, cells in runs]


def draw(model: GGUFModel, spec: StreamingSpec | None, path: Path) -> None:
    """Draws the model's lazy ratios into a file.

    Raises:
        ValueError: the model has none, or the file's name ends in neither .png nor .svg.
        OSError: it can't be written.
        ImportError: matplotlib is missing.
    """
    plots.check()
    ratios = _lazy_ratios(model)
    if not ratios:
        raise ValueError(f"{model.path}: has no lazy ratios to draw: lt-gguf analyze measures them, lt-gguf flag --from adds them")
    layers = spec.layers if spec else ()
    subtitle = _describe_calibration(_calibration(model))
    plots.save_as(plots.lazy_ratio_bars(ratios, layers, f"Lazy ratios of {model.name}", subtitle), path)


def _summary(model: GGUFModel, spec: StreamingSpec | None) -> str:
    if model.why_not_streaming:
        return f"can't have streaming layers: {model.why_not_streaming}"
    if spec is None or not spec.layers:
        return "no layer streams: an ordinary model"
    chosen = f", chosen by {model.provenance.selection}" if model.provenance and _is_the_files(model, spec) else ""
    return (
        f"{len(spec.layers)} layers stream{chosen}: {format_layers(spec.layers)}; "
        f"sink {spec.sink}, window {spec.window}, prefill {spec.prefill}"
    )


def _is_the_files(model: GGUFModel, spec: StreamingSpec) -> bool:
    """Whether a spec says of what streams what the file says."""
    return replace(spec, cache_keep=()) == model.spec


def _describe_recommended(model: GGUFModel) -> dict[str, Any] | None:
    found = model.recommended
    if found is None:
        return None
    breaks = [str(types) for types in found.breaks]
    return {"type_k": found.types.k, "type_v": found.types.v, "keep": list(found.keep), "breaks": breaks}


def _describe_spec(model: GGUFModel, spec: StreamingSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    provenance = model.provenance if _is_the_files(model, spec) else None
    return {
        "spec": str(spec),
        "layers": list(spec.layers),
        "sink": spec.sink,
        "window": spec.window,
        "prefill": spec.prefill,
        "selection": provenance.selection if provenance else None,
    }


def _lazy_ratios(model: GGUFModel) -> tuple[float, ...] | None:
    """One number a layer, NaN where none was measured; `None` if the file has none, or not one for each layer."""
    ratios = model.provenance.lazy_ratio if model.provenance else None
    return ratios if ratios is not None and len(ratios) == model.n_layer else None


def _calibration(model: GGUFModel) -> Any:
    """What the file says of it, as JSON; else as the text that it is."""
    text = model.provenance.calibration if model.provenance else None
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _provenance(model: GGUFModel) -> list[str]:
    """Lines on where the lazy ratios come from."""
    if model.provenance is None:
        return []
    lines = []
    ratios, calibration = model.provenance.lazy_ratio, _calibration(model)
    if ratios is not None and len(ratios) != model.n_layer:
        lines.append(f"{LAZY_RATIO_KEY} has {len(ratios)} numbers, must have one for each of {model.n_layer} layers: not shown")
    if calibration is not None:
        lines.append(f"lazy ratios measured on {_describe_calibration(calibration)}")
    return lines


def _describe_calibration(calibration: Any) -> str:
    """The keys are those of `calibration.Calibration.describe`; whatever else somebody has written is shown as it is."""
    if calibration is None:
        return ""
    try:
        return (
            f"{calibration['data']}: {calibration['samples']} samples of {calibration['length']} tokens, last "
            f"{calibration['w_last']} of each, sink {calibration['w_sink']}, window {calibration['w_recent']}"
        )
    except (KeyError, TypeError):
        return calibration if isinstance(calibration, str) else json.dumps(calibration)


def _bar(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "-"
    return f"{ratio:.4f} {'█' * round(min(max(ratio, 0), 1) * BAR_WIDTH):░<{BAR_WIDTH}}"


def _attention(model: GGUFModel, spec: StreamingSpec | None, il: int) -> str | None:
    """`full`, `streaming`, or `window 512` of a layer with a sliding window of its own; `None` in a model with an attention of its own."""
    if model.why_not_streaming:
        return None
    if model.own_window and il in model.own_window.layers:
        return f"window {model.own_window.tokens}"
    return "streaming" if spec is not None and spec.is_streaming(il) else "full"


def _token_bytes(model: GGUFModel, spec: StreamingSpec | None, il: int, cache_type: str) -> int | None:
    """KV bytes that a token takes in a layer, `None` where there is no plain KV cache."""
    if model.why_not_streaming:
        return None
    types = CacheTypes.parse(cache_type)
    k, v = types if spec is None else (spec.cache_type(il, name) for name in types)
    shape = model.kv_shape
    return shape.token_bytes(il, k, v) if il < len(shape.n_head_kv) else None


def _memory(model: GGUFModel, spec: StreamingSpec | None, cache_type: str) -> list[tuple[int, KVMemory, KVMemory, PromptMemory]]:
    """Context size, memory of the ordinary model, memory of the hybrid one, and what a prompt that fills it takes besides."""
    if model.why_not_streaming:
        return []
    shape = model.kv_shape
    types = CacheTypes.parse(cache_type)
    ordinary = None if spec is None else spec.without_streaming()
    return [
        (
            n_ctx,
            kv_memory(shape, ordinary, n_ctx, type_k=types.k, type_v=types.v),
            kv_memory(shape, spec, n_ctx, type_k=types.k, type_v=types.v),
            prompt_memory(shape, spec, n_ctx, n_embd=model.n_embd, type_k=types.k, type_v=types.v),
        )
        for n_ctx in CONTEXTS
    ]
