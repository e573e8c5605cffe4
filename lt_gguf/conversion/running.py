"""Layers that are chosen by running the converted file: what measures candidates on it, and how it is told the choice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lt_gguf.calibration import Texts
from lt_gguf.conversion.options import Options
from lt_gguf.gguf.flagging import flag
from lt_gguf.selection.evidence import Candidates
from lt_gguf.spec import CacheRecommendation, Provenance, StreamingSpec


def open_converted(
    file: Path, n_layer: int, options: Options, texts: Texts, length: int, progress: Callable[[str, int, int], None]
) -> AbstractContextManager[Candidates]:
    """Loads a converted file, the first one of a split model, and makes the conversations to measure candidates on.

    Args:
        length: tokens of a conversation.

    Raises:
        ValueError: as `evaluation.candidates.open_candidates`.
    """
    from lt_gguf.evaluation.candidates import open_candidates
    from lt_gguf.evaluation.context import ScorerOptions

    spec = StreamingSpec((), n_layer, options.sink, options.window, options.prefill)
    numbers: dict[str, Any] = {"questions": options.questions, "length": length, "windows": options.windows}
    how = ScorerOptions(n_threads=options.threads or None, n_gpu_layers=0 if options.device == "cpu" else -1)
    show = lambda what, done, total: progress(f"Comparing {what}", done, total)  # noqa: E731
    return open_candidates(file, spec, texts, **numbers, options=how, progress=show)


def flag_converted(
    first: Path,
    spec: StreamingSpec,
    provenance: Provenance,
    recommended: CacheRecommendation | None,
    progress: Callable[[int, int], None],
) -> Path:
    """Says in a model, given by its first file, which layers stream and what is recommended for its cache; returns the folder of the
    new files.

    The folder of the old ones, which must hold nothing else, is gone then.
    """
    flagged = first.parent.with_name("flagged")
    flagged.mkdir()
    flag(first, flagged / first.name, spec, provenance, progress, recommended=recommended)
    shutil.rmtree(first.parent)
    return flagged
