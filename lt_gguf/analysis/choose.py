"""What a file can spare, measured once."""

from __future__ import annotations

import os
from typing import Any

from lt_gguf.analysis.analyze import Progress, Settings, analyze
from lt_gguf.analysis.subjects import GGUFFile
from lt_gguf.models import resolve
from lt_gguf.models.remembered import recall
from lt_gguf.selection import DEFAULT_MAX_KL, DEFAULT_MAX_LOSS, DEFAULT_STRATEGY, Request, strategy
from lt_gguf.spec import DEFAULT_SINK, DEFAULT_WINDOW, StreamingSpec


class _Silent:
    """Shows no progress."""

    def __call__(self, what: str, done: int, total: int) -> None:
        pass

    def announce(self, line: str) -> None:
        pass


def choose_streaming(
    model: str | os.PathLike[str],
    *,
    max_loss: float = DEFAULT_MAX_LOSS,
    max_kl: float = DEFAULT_MAX_KL,
    sink: int | None = None,
    window: int | None = None,
    again: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> StreamingSpec:
    """The layers of a GGUF file that may stream: as many as lose no more than is tolerated (strategy `loss`).

    The first time they are measured, which takes minutes to hours; what was chosen last, by this or by `lt-gguf analyze`, is remembered
    in the user cache, and `lt_gguf.Llama(model, streaming="auto")` takes it.

        spec = lt_gguf.choose_streaming("model.gguf")
        llm = lt_gguf.Llama("model.gguf", streaming=spec)

    Args:
        model: path of the file, or a name as `lt_gguf.models.resolve` takes it.
        max_loss: share of what the full model finds that may be lost, from 0 to 1.
        max_kl: largest KL divergence from the full model, in nats.
        sink: first positions that a streaming layer sees; `None`: as it is remembered, else 4.
        window: last positions that it sees; `None`: as it is remembered, else 1020.
        again: measure even if something is remembered, for example with another tolerance. What was measured before isn't measured
            again.
        progress: is told how far it is.
        settings: fields of `lt_gguf.analysis.Settings`, and of `lt_gguf.evaluation.context.ScorerOptions`: how the model is run.

    Raises:
        ValueError: an argument is out of range, or the model can't stream.
        OSError: the file can't be read.
    """
    from lt_gguf.evaluation.context import ScorerOptions

    file = str(resolve(model))
    remembered = None if again else recall(file)
    if remembered is not None and sink in (None, remembered.sink) and window in (None, remembered.window):
        return remembered
    how = {name: settings.pop(name) for name in list(settings) if name in Settings.__dataclass_fields__}
    subject = GGUFFile(file, ScorerOptions(**settings))
    sink, window = DEFAULT_SINK if sink is None else sink, DEFAULT_WINDOW if window is None else window
    request = Request(subject.model, sink=sink, window=window, max_loss=max_loss, max_kl=max_kl)
    report = analyze(subject, strategy(DEFAULT_STRATEGY), request, Settings(all_ratios=False, **how), progress or _Silent())
    return report.spec
