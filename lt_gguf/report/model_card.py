"""The README of a published hybrid model, and the section of it that a report writes on its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lt_gguf.memory.kv import KVShape, cache_types_text, kv_memory
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report.caches import HEADS, cache_rows
from lt_gguf.report.loss_plots import pictures_of_loss
from lt_gguf.report.report import Report
from lt_gguf.selection.base import LONGEST_COMPARED
from lt_gguf.selection.caches import Caches
from lt_gguf.selection.evidence import WHERE, Candidate
from lt_gguf.spec import CacheRecommendation, CacheTypes, StreamingSpec, format_layers
from lt_gguf.spec.cache_types import PLAIN

CONTEXTS = (4096, 32768, 131072)
PAPER = "[arXiv 2410.13846](https://arxiv.org/abs/2410.13846)"
_LONG_TABLE = 12  # lines of a table that is shown as a whole


class KVRow(NamedTuple):
    """Bytes of the KV cache at a context size: of the ordinary model, and of the hybrid one."""

    n_ctx: int
    full: int
    hybrid: int


def kv_rows(
    shape: KVShape, spec: StreamingSpec, n_ctx_train: int = 0, *, recommended: CacheRecommendation | None = None
) -> list[KVRow]:
    """The rows of a card's table of memory, up to the context size that the model was trained for, if that is known.

    Args:
        recommended: what the file recommends for the cache, `None`: nothing, so that it is f16.

    Raises:
        ValueError: as `kv_memory` does.
    """
    contexts = [*(n_ctx for n_ctx in CONTEXTS if n_ctx < n_ctx_train), n_ctx_train] if n_ctx_train else CONTEXTS
    types, hybrid = _cache(spec, recommended)
    full = hybrid.without_streaming()
    return [
        KVRow(n_ctx, *(kv_memory(shape, of, n_ctx, type_k=types.k, type_v=types.v).total for of in (full, hybrid)))
        for n_ctx in contexts
    ]


def model_card(
    report: Report,
    files: Sequence[Path],
    base_model: str | None,
    license_id: str | None,
    kv: Sequence[KVRow] = (),
    *,
    recommended: CacheRecommendation | None = None,
    folder: str = "",
) -> str:
    """A README.md for the hub, ready to publish.

    Args:
        files: the GGUF files, as they lie beside the card.
        base_model: hub id of the checkpoint, as in `org/name`; anything else is named in the text only.
        license_id: of the checkpoint, as its own card says; left out if unknown.
        kv: rows of the table of memory.
        recommended: what the files recommend for the KV cache, which `kv` is of then; else it is of an f16 cache.
        folder: where the report's pictures lie, seen from the card; beside it if empty.
    """
    title = f"{base_model.rstrip('/').rsplit('/', 1)[-1] if base_model else Path(report.model).stem}, hybrid"
    first = files[0].name if files else "model.gguf"
    of = f" of {_link(base_model)}" if base_model else ""
    parts = [
        _front_matter(report, base_model, license_id),
        f"# {title}",
        f"A GGUF file{of} in which {len(report.spec.layers)} of {report.spec.n_layer} attention layers keep a KV cache of "
        f"constant size: sinks and a window (LightTransfer, {PAPER}). The weights are those of the "
        "base model, as far as they aren't quantized.",
        streaming_section(report, folder).rstrip(),
    ]
    if kv:
        types, spec = _cache(report.spec, recommended)
        parts += ["## Memory", _kv_table(kv, cache_types_text(str(types), spec))]
    if recommended is not None:
        parts.append(f"Recommended for the KV cache: {_plain(str(recommended))}. lt-gguf takes it where nothing else is asked for.")
    parts += ["## Files", _files_list(files), "## Run it", _how_to_run(first)]
    return "\n\n".join(part for part in parts if part) + "\n"


def streaming_section(report: Report, folder: str = "") -> str:
    """The Markdown section that says which layers stream and why, with the pictures of a report in `folder`."""
    spec, chosen = report.spec, report.selection
    layers = f" ({format_layers(spec.layers)})" if spec.layers else ""
    parts = [
        "## Streaming layers",
        f"{len(spec.layers)} of {spec.n_layer} layers stream{layers}: there a token sees the first {spec.sink} tokens and the "
        f"last {spec.window}, its own included. The other layers see everything. {_prefill(spec)}",
        f"Chosen by `{chosen.strategy}`: {_plain(chosen.reason)}.",
    ]
    mean = report.mean_ratios
    path = f"{folder.rstrip('/')}/" if folder else ""
    if mean is not None:
        parts += [
            _measured(report),
            f"![Lazy ratio of each layer, the streaming ones marked]({path}lazy_ratio.png)",
            f"![Lazy ratio of each layer and sample]({path}lazy_ratio_by_sample.png)",
            _ratio_table(mean, spec),
        ]
    if chosen.warning is not None:
        parts.append(f"**{_plain(chosen.warning)}.**")
    if chosen.candidates:
        if pictures_of_loss(report):
            parts += [
                f"![Loss over the share of streaming layers]({path}loss.png)",
                f"![Loss of each layer alone]({path}loss_by_layer.png)",
            ]
        parts += [_compared(report), _candidate_table(chosen.candidates, spec)]
    if report.caches is not None:
        parts += [
            f"Types of the KV cache, of {LONGEST_COMPARED:,} tokens, in the layers whose cache grows; those that stream keep 16 bits:",
            f"![Loss over the memory of the KV cache]({path}loss_over_memory.png)",
            _cache_table(report, report.caches),
        ]
    return "\n\n".join(parts) + "\n"


def number(value: float) -> str:
    """With four decimals; a dash where nothing was measured."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _prefill(spec: StreamingSpec) -> str:
    if spec.prefill == "full":
        return "A prompt is read with full attention in all layers; the streaming ones stream after it."
    return "They stream while a prompt is read, too."


def _measured(report: Report) -> str:
    text = "A layer's lazy ratio is the share of its attention that goes to these tokens, here measured with " + report.conditions
    if report.calibration is not None:
        text += f" ({_plain(report.calibration.data)}, sha256 {report.calibration.sha256[:12]})"
    return text + "."


def _ratio_table(mean: Sequence[float], spec: StreamingSpec) -> str:
    lines = ["| layer | lazy ratio | |", "| --: | --: | --- |"]
    for il, ratio in enumerate(mean):
        value = "not measured" if math.isnan(ratio) else f"{ratio:.4f}"
        lines.append(f"| {il} | {value} | {'streams' if spec.is_streaming(il) else ''} |")
    return _folded("All lazy ratios", lines)


def _compared(report: Report) -> str:
    text = (
        "These candidates were asked the same as the full model. How far their predictions are from its own is the KL divergence, in "
        "nats: where a text goes on, and over what has to be looked up far back in it to answer a question in the first message, beside "
        "the text, or in a later one. Lost is the share that a candidate doesn't find of what the full model finds, and found is the "
        "share of the answers whose every token is the most likely one."
    )
    measured = report.selection.measurement
    return text if measured is None else f"{text} Measured on {_plain(str(measured))}."


def _cache_table(report: Report, caches: Caches) -> str:
    lines = [f"| {' | '.join(HEADS)} |", f"| --- | --- |{' --: |' * (len(HEADS) - 3)} --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cache_rows(report, caches))])


def _candidate_table(candidates: Sequence[Candidate], spec: StreamingSpec) -> str:
    heads = (*(f"KL, {where}" for where in WHERE), "lost", "found")
    lines = [f"| candidate | streaming layers | {' | '.join(heads)} | |", f"| --- | --- |{' --: |' * len(heads)} --- |"]
    for candidate in candidates:
        evidence = candidate.evidence
        streams = bool(candidate.layers) and set(candidate.layers) <= set(spec.layers)
        numbers = [number(evidence.kl_where(where).value) for where in WHERE]
        loss = evidence.loss
        numbers += [
            f"{loss.value:.1%} ({loss.low:.1%} to {loss.high:.1%})" if candidate.layers else "0 %",
            f"{evidence.accuracy:.1%}",
        ]
        layers = format_layers(candidate.layers) or "none"
        lines.append(f"| {_plain(candidate.name)} | {layers} | {' | '.join(numbers)} | {'streams' if streams else ''} |")
    return "\n".join(lines) if len(lines) <= _LONG_TABLE else _folded("All candidates", lines)


def _folded(title: str, lines: Sequence[str]) -> str:
    """A part that a reader opens: a big model has 80 layers."""
    return "\n".join([f"<details><summary>{title}</summary>", "", *lines, "", "</details>"])


def _front_matter(report: Report, base_model: str | None, license_id: str | None) -> str:
    # note: a JSON string is a YAML string too, whatever is in it
    lines = ["---"]
    if license_id:
        lines.append(f"license: {json.dumps(license_id)}")
    if base_model and _is_hub_id(base_model):
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: quantized"]
    lines += ["library_name: gguf", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("gguf", "llama.cpp", "lt-gguf", "lighttransfer", "long-context")]
    return "\n".join([*lines, "---"])


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _link(base_model: str) -> str:
    return f"[{base_model}](https://huggingface.co/{base_model})" if _is_hub_id(base_model) else _plain(base_model)


def _kv_table(rows: Sequence[KVRow], cache_types: str) -> str:
    lines = [
        f"The KV cache, {cache_types}, one sequence:",
        "",
        "| context | full | hybrid | saved |",
        "| --: | --: | --: | --: |",
    ]
    for row in rows:
        saved = f"{1 - row.hybrid / row.full:.0%}" if row.full else "-"
        lines.append(f"| {row.n_ctx:,} | {format_bytes(row.full)} | {format_bytes(row.hybrid)} | {saved} |")
    return "\n".join(lines)


def _cache(spec: StreamingSpec, recommended: CacheRecommendation | None) -> tuple[CacheTypes, StreamingSpec]:
    """The types of K and V in the layers with full attention, and the spec with the layers that stay in 16 bits."""
    if recommended is None:
        return PLAIN, spec
    return recommended.types, replace(spec, cache_keep=recommended.keep)


def _files_list(files: Sequence[Path]) -> str:
    return "\n".join(f"- `{file.name}`" + (f", {format_bytes(file.stat().st_size)}" if file.exists() else "") for file in files)


def _how_to_run(file: str) -> str:
    return "\n".join(
        [
            "With lt-gguf, which gives the streaming layers their small cache:",
            "",
            "```sh",
            f"lt-gguf inspect {file}",
            f"lt-gguf chat {file}",
            "```",
            "",
            "Any other llama.cpp loads it too, and runs it with full attention in all layers.",
        ]
    )


def _plain(text: str) -> str:
    """A text with nothing in it that Markdown or HTML would take for its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
