"""A whole prompt in one llama_decode, which the runtime reads layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from lt_gguf.runtime import api
from lt_gguf.runtime.batch import Batch, batch_part
from lt_gguf.runtime.interruptible import stopped_by_ctrl_c


class WholePrompt(Batch):
    """A batch for prompts of up to `size` tokens of sequence 0."""

    def decode(self, context: Any, tokens: Sequence[int], begin: int, report: Callable[[int], None] | None) -> None:
        """Reads `tokens` from position `begin` on; the last one gives logits.

        Args:
            context: of llama_cpp, `Llama._ctx`.
            report: called meanwhile with the share of the work that is done, in tokens. An error that it raises stops it.

        Raises:
            RuntimeError: llama_decode failed; none of the prompt is there.
            KeyboardInterrupt: Ctrl-C stopped it; none of it is there.
        """
        wanted = np.zeros(len(tokens), np.int8)
        wanted[-1] = 1
        self.fill(batch_part(tokens, begin, 0, wanted))
        whole: Any = SimpleNamespace(batch=self.native)  # as much as decode looks at
        failed: list[BaseException] = []  # note: an error can't pass through llama.cpp
        with stopped_by_ctrl_c() as is_stopped:

            def on_progress(share: float) -> bool:
                try:
                    if report is not None:
                        report(int(share * len(tokens)))
                except BaseException as error:
                    failed.append(error)
                return not failed and not is_stopped()

            try:
                with api.progress(context.ctx, on_progress):
                    context.decode(whole)
            finally:
                if failed:
                    raise failed[0]
