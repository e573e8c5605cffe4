"""Measures candidates, sets of layers that might stream, on the patched runtime: what strategies that measure are given.

All are asked the same questions about the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lt_gguf.calibration import Texts
from lt_gguf.evaluation.facts import CHOOSING, JUDGING
from lt_gguf.evaluation.outcomes import KnownOutcomes
from lt_gguf.evaluation.probes import make_documents
from lt_gguf.evaluation.runtime_bench import Layers, RuntimeBench
from lt_gguf.selection.evidence import Evidence, Measurement
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import CacheTypes

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.runtime.text_model import TextModel

Progress = Callable[[str, int, int], None]  # what is being done, tokens done, of how many

DEFAULT_QUESTIONS = 16  # conversations to choose by, and twice as many to judge by
LONG_LENGTH = 16_384  # tokens of the conversations that the choice is judged by, too, where the model's context allows
LONG_QUESTIONS = 16  # of these, at most: with four, one word is more than 1 %
_OF_A_LONG_DOCUMENT = 16  # of these: reading one takes as long as four short ones, and what is kept of it as much memory
_SEED = 0


class RuntimeCandidates:
    """Two benches with different documents and questions on one loaded model, and an account of what they run.

    Args:
        model: whose layers.
        options: how it is run.
        spec: what a streaming layer sees, and how prompts are read; its layers don't count.
        texts: what the documents are made of.
        questions: conversations to choose by; twice as many are judged by, because a tolerance is kept by these.
        length: tokens of each.
        windows: others that will be asked for; questions are about what none of them shows.
        progress: is called with what is announced, and after each step.

    Raises:
        ValueError: a number is out of range, or a conversation is longer than `length`.
    """

    def __init__(
        self,
        model: TextModel,
        options: ScorerOptions,
        spec: StreamingSpec,
        texts: Texts,
        *,
        questions: int,
        length: int,
        windows: Sequence[int] = (),
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        check_questions(questions)
        if model.n_ctx_train and length > model.n_ctx_train:
            raise ValueError(f"calibration length = {length}: must be at most the model's context of {model.n_ctx_train}")
        self._texts, self._progress, self._questions, self._length = texts, progress, questions, length
        self._announced, self._done, self._to_do = "", 0, 0
        to_choose, to_judge = texts.halves()
        far = max((spec.window, *windows))
        choosing = make_documents(model, to_choose, CHOOSING, questions, length, far, [_SEED, 0])
        judging = make_documents(model, to_judge, JUDGING, 2 * questions, length, far, [_SEED, 1])
        self._n_long = min(LONG_QUESTIONS, questions) if length < LONG_LENGTH <= model.n_ctx_train else 0
        if self._n_long:
            judging += make_documents(model, to_judge, JUDGING, self._n_long, LONG_LENGTH, far, [_SEED, 2], _OF_A_LONG_DOCUMENT)
        self._lengths = tuple(sorted({document.length for document in [*choosing, *judging]}))
        self.choosing, self.judging = (
            RuntimeBench(model, options, spec, documents, KnownOutcomes.of(model.file, options, documents), self._count)
            for documents in (choosing, judging)
        )

    def close(self) -> None:
        """Frees the contexts."""
        self.choosing.close()
        self.judging.close()

    def with_window(self, window: int) -> RuntimeCandidates:
        """The same questions for streaming layers with another window, one of those that were announced; to be closed together."""
        other = copy(self)
        other.choosing, other.judging = self.choosing.with_window(window), self.judging.with_window(window)
        return other

    def judge_with_cache(self, types: CacheTypes, layers: Layers) -> Evidence:
        """What these streaming layers, in 16 bits, lose with other types of the KV cache in the others, on the questions to judge by.

        Raises:
            ValueError: the model can't be run so.
        """
        bench = self.judging.with_cache(types, layers)
        try:
            return bench.measure(layers)
        finally:
            bench.close()

    def announce_caches(self, n: int) -> None:
        """Tells the progress display that so many times everything to judge by is read again."""
        bench = self.judging
        self._announced = f"cache types: {n} times the conversations to judge by are read"
        self._to_do = self._done + n * (bench.tokens_to_read + bench.tokens_of_a_set)
        self._progress(self._announced, self._done, self._to_do)

    def announce(self, choosing: int, judging: int) -> None:
        """Tells the progress display about how much is to be done."""
        n = 0
        for bench, sets in ((self.choosing, choosing), (self.judging, judging)):
            if sets:
                n += (0 if bench.read else bench.tokens_to_read) + sets * bench.tokens_of_a_set
        self._announced = (
            f"loss: about {choosing} sets of layers on {self._questions} conversations of {self._length:,} tokens, "
            f"and {judging} on others"
        )
        self._to_do = self._done + n
        self._progress(self._announced, self._done, self._to_do)

    @property
    def measurement(self) -> Measurement:
        """What has been measured until now, by both benches."""
        benches = self.choosing, self.judging
        read, computed, sets = (sum(getattr(bench, name) for bench in benches) for name in ("read", "computed", "sets"))
        return Measurement(self._texts.name, self._texts.sha256, self._questions, self._lengths, sets, read, computed, self._n_long)

    def _count(self, n_tokens: int) -> None:
        self._done += n_tokens
        self._to_do = max(self._to_do, self._done)
        self._progress(self._announced, self._done, self._to_do)


@contextmanager
def open_candidates(
    file: Path,
    spec: StreamingSpec,
    texts: Texts,
    *,
    questions: int,
    length: int,
    windows: Sequence[int] = (),
    options: ScorerOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[RuntimeCandidates]:
    """Loads a GGUF file for as long as the with block lasts. The arguments are those of `RuntimeCandidates`.

    Raises:
        ValueError: as `TextModel` and `RuntimeCandidates` do.
    """
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.runtime.build_info import has_gpu
    from lt_gguf.runtime.text_model import TextModel

    options = options or ScorerOptions()
    runs_on_gpu = options.n_gpu_layers != 0 and has_gpu()
    if not runs_on_gpu and options.cache_type_v in ("f16", "bf16", "f32"):
        # a CPU computes the few tokens of a candidate faster without it, 2.7 times at 4,096 tokens
        options = replace(options, flash_attn=False)
    model = TextModel(file, options.n_gpu_layers)
    try:
        candidates = RuntimeCandidates(
            model, options, spec, texts, questions=questions, length=length, windows=windows, progress=progress
        )
        try:
            yield candidates
        finally:
            candidates.close()
    finally:
        model.close()


def check_questions(questions: int) -> None:
    """Raises ValueError if so many can't be asked."""
    if questions < 1:
        raise ValueError(f"questions = {questions}: must be at least 1")
