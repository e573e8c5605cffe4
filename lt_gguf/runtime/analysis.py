"""Lazy ratios of a GGUF model, also a quantized one, measured by the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lt_gguf.runtime.llama import Llama


def measure(
    llm: Llama,
    samples: Sequence[Sequence[int]],
    *,
    sink: int,
    window: int,
    w_last: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """The lazy ratios of each sample.

    Args:
        samples: prompts.
        progress: called before each sample and at the end with what is being done, samples done and samples in all.

    Returns:
        float64 (samples, layers), NaN where a layer has no KV cache of its own.

    Raises:
        ValueError: as `Llama.lazy_ratios` does.
    """
    report = progress or (lambda *_: None)
    ratios = []
    for i, sample in enumerate(samples):
        report(f"sample {i + 1} of {len(samples)}", i, len(samples))
        ratios.append(llm.lazy_ratios(sample, sink, window, w_last))
    report(f"{len(samples)} samples", len(samples), len(samples))
    return np.asarray(ratios, dtype=np.float64)


def tokenizer(llm: Llama) -> tuple[Callable[[str], list[int]], list[int]]:
    """What gives the tokens of a text, none added, and the tokens that begin a prompt.

    The names of special tokens in a text are these tokens, as transformers does it: a text may be a chat in a model's format.
    """
    return lambda text: llm.tokenize(text.encode(), add_bos=False, special=True), llm.tokenize(b"", add_bos=True)
