"""Measures candidates, sets of layers that might stream, on the patched runtime: what strategies that measure are given.

All are asked the same questions about the same documents. With `prefill = full` these are read once for all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lt_gguf.calibration import Texts
from lt_gguf.evaluation.divergence import kl_divergence
from lt_gguf.evaluation.facts import CHOOSING, JUDGING
from lt_gguf.evaluation.outcomes import KnownOutcomes
from lt_gguf.evaluation.probes import Document, Probe, Turn, make_documents
from lt_gguf.selection.evidence import Evidence, Measurement, Outcome
from lt_gguf.spec import StreamingSpec

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.evaluation.shared_prompts import SharedPrompts
    from lt_gguf.runtime.text_model import TextModel

Progress = Callable[[str, int, int], None]  # what is being done, tokens done, of how many

DEFAULT_QUESTIONS = 16  # conversations to choose by, and twice as many to judge by
LONG_LENGTH = 16_384  # tokens of the conversations that the choice is judged by, too, where the model's context allows
LONG_QUESTIONS = 16  # of these, at most: with four, one word is more than 1 %
_OF_A_LONG_DOCUMENT = 8  # of these: reading one takes as long as four short ones, asking doesn't
_SEED = 0
_AT_ONCE = 8  # sets that are measured before they are written down: an interrupted measurement goes on with the next ones

Layers = tuple[int, ...]


@dataclass
class _Read:
    """What has been read of some documents, whatever streams after it."""

    prompts: dict[int, SharedPrompts] = field(default_factory=dict)  # by length
    states: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)  # of documents
    full: list[np.ndarray] | None = None  # for each probe: the full model's log-probabilities (compared tokens, n_vocab)
    closing: ExitStack = field(default_factory=ExitStack)
    windows: set[int] = field(default_factory=set)  # that are asked for
    read: int = 0  # tokens
    computed: int = 0


class RuntimeBench:
    """Compares hybrids with their full model on the same conversations.

    The full model's log-probabilities are kept in a file that the system removes. A set of layers is measured once, however often
    it is asked for.

    Args:
        model: whose layers.
        options: how it is run.
        spec: what a streaming layer sees, and how prompts are read; its layers don't count.
        documents: at least one.
        known: what has been measured of these documents before, and takes what is measured now.
        done: is called with a number of tokens that were read or computed.
    """

    def __init__(
        self,
        model: TextModel,
        options: ScorerOptions,
        spec: StreamingSpec,
        documents: Sequence[Document],
        known: KnownOutcomes,
        done: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._model, self._options, self._spec, self._known, self._done = model, options, spec, known, done
        self._documents = sorted(documents, key=lambda document: document.length)
        self._shared = _Read(windows={spec.window})

    def close(self) -> None:
        """Frees the contexts."""
        self._shared.closing.close()

    @property
    def read(self) -> int:
        """Tokens of documents that have been read."""
        return self._shared.read

    @property
    def computed(self) -> int:
        """Tokens that have been computed for sets of layers."""
        return self._shared.computed

    @property
    def sets(self) -> int:
        """How many sets of layers have been measured, now or before, with all windows."""
        return sum(self._known.count(replace(self._spec, window=window)) for window in self._shared.windows)

    @property
    def tokens_to_read(self) -> int:
        """Of all documents, with `prefill = full` but once."""
        return sum(len(document.prefix) for document in self._documents)

    @property
    def tokens_of_prompts(self) -> int:
        """Of the first messages of all conversations, as if each were read for itself."""
        return sum(len(document.prefix) + len(first.message) for document in self._documents for first, _ in document.conversations)

    @property
    def tokens_of_a_set(self) -> int:
        """That are computed for each set."""
        n = sum(len(document.text) + sum(map(_n_tokens, document.conversations)) for document in self._documents)
        return n + (self.tokens_to_read if self._spec.prefill == "stream" else 0)

    def with_window(self, window: int) -> RuntimeBench:
        """The same documents, as they have been read, for streaming layers with another window; to be closed together."""
        spec = replace(self._spec, window=window)
        other = RuntimeBench(self._model, self._options, spec, self._documents, self._known, self._done)
        other._shared = self._shared
        self._shared.windows.add(window)
        return other

    def measure(self, layers: Layers) -> Evidence:
        """Asks everything with these streaming layers; with none, it is the full model.

        Raises:
            ValueError: the model can't stream so, or a conversation doesn't fit the context.
        """
        return self.measure_all([layers])[0]

    def measure_all(self, sets: Sequence[Layers]) -> list[Evidence]:
        """The same for many sets, for which a question is read once."""
        missing = [layers for layers in dict.fromkeys(sets) if not self._known.has(self._spec, layers)]
        for begin in range(0, len(missing), _AT_ONCE):
            self._measure(missing[begin : begin + _AT_ONCE])
        return [Evidence(self._known.get(self._spec, layers)) for layers in sets]

    def _measure(self, sets: list[Layers]) -> None:
        if self._shared.full is None:
            self._shared.full = self._room()
            sets = [(), *(layers for layers in sets if layers)]  # what all are compared with
        outcomes: dict[Layers, list[Outcome]] = {layers: [] for layers in sets}
        probes = iter(self._shared.full)
        n_before = accumulate((len(document.conversations) for document in self._documents), initial=0)
        for conversation, document in zip(n_before, self._documents):
            full = [next(probes) for _ in range(document.n_probes)]
            prompts = self._context(document)
            if self._spec.prefill == "full":
                self._recall(prompts, document)
                for layers, found in self._ask_all(prompts, document, sets, read=True):
                    outcomes[layers] += self._outcomes(layers, document, conversation, found, full)
                continue
            for layers in sets:  # each reads the document for itself
                prompts.clear()
                prompts.hide(self._hybrid(layers))
                self._read(prompts, document.prefix)
                for _, found in self._ask_all(prompts, document, [layers], read=False):
                    outcomes[layers] += self._outcomes(layers, document, conversation, found, full)
        for layers in sets:
            self._known.add(self._spec, layers, outcomes[layers])

    def _ask_all(
        self, prompts: SharedPrompts, document: Document, sets: Sequence[Layers], read: bool
    ) -> Iterator[tuple[Layers, list[np.ndarray]]]:
        """All that is asked about a document which has been read, for some sets: log-probabilities for each of its probes.

        `read`: the first messages are read once for all sets, with full attention.
        """
        n_prefix = prompts.n_past()
        texts: dict[Layers, np.ndarray] = {}
        for layers in sets:
            prompts.hide(self._hybrid(layers))
            (rows,) = prompts.decode([document.text])
            texts[layers] = rows[:-1]
            prompts.cut([n_prefix])
            self._count(len(document.text))
        conversations = document.conversations
        prompts.share(len(conversations))
        first_messages = [first.message for first, _ in conversations]
        if read:
            prompts.hide(None)
            prompts.read(first_messages)
            self._count(sum(map(len, first_messages)))
        n_past = [prompts.n_past(seq) for seq in range(len(conversations))]
        for layers in sets:
            prompts.hide(self._hybrid(layers))
            if not read:
                prompts.read(first_messages)
            first = prompts.decode([turn.answer for turn, _ in conversations])
            prompts.read([turn.message for _, turn in conversations])
            later = prompts.decode([turn.answer for _, turn in conversations])
            prompts.cut(n_past)
            self._count(sum(map(_n_tokens, conversations)))
            found = [texts[layers]]
            for turns, both in zip(conversations, zip(first, later)):
                found += [row[turn.span[0] - 1 : turn.span[1] - 1] for turn, row in zip(turns, both)]
            yield layers, found

    def _outcomes(
        self, layers: Layers, document: Document, conversation: int, found: list[np.ndarray], full: list[np.ndarray]
    ) -> Iterator[Outcome]:
        for i, (probe, log_probs, expected) in enumerate(zip(document.probes, found, full, strict=True)):
            if not layers:
                expected[:] = log_probs
            yield self._outcome(probe, document, conversation + max(0, i - 1) // 2, log_probs, expected)

    @staticmethod
    def _outcome(probe: Probe, document: Document, conversation: int, log_probs: np.ndarray, full: np.ndarray) -> Outcome:
        expected = np.asarray(probe.expected)
        weights = np.exp(
            full[np.arange(len(expected)), expected].astype(np.float64)
        )  # what the full model doesn't know counts little
        known, found = (float((weights * (rows.argmax(axis=1) == expected)).mean()) for rows in (full, log_probs))
        hit = bool((log_probs.argmax(axis=1) == expected).all())
        kl = float(kl_divergence(full, log_probs).mean())
        return Outcome(probe.where, probe.kind, document.length, conversation, kl, known, found, hit)

    def _hybrid(self, layers: Layers) -> StreamingSpec | None:
        return replace(self._spec, layers=layers) if layers else None

    def _context(self, document: Document) -> SharedPrompts:
        if document.length not in self._shared.prompts:
            from lt_gguf.evaluation.shared_prompts import SharedPrompts

            alike = [other for other in self._documents if other.length == document.length]
            n_ctx, n_seq = max(other.n_tokens for other in alike), max(len(other.conversations) for other in alike)
            self._shared.prompts[document.length] = self._shared.closing.enter_context(
                SharedPrompts(self._model, self._options, n_ctx, n_seq)
            )
        return self._shared.prompts[document.length]

    def _recall(self, prompts: SharedPrompts, document: Document) -> None:
        """Lets a context hold a document, as it was read with full attention."""
        if document.prefix in self._shared.states:
            prompts.restore(self._shared.states[document.prefix], len(document.prefix))
            return
        prompts.clear()
        prompts.hide(None)
        self._read(prompts, document.prefix)
        self._shared.states[document.prefix] = prompts.save()

    def _read(self, prompts: SharedPrompts, prefix: tuple[int, ...]) -> None:
        step = self._options.n_batch
        for begin in range(0, len(prefix), step):  # note: so that somebody who waits sees that it goes on
            part = prefix[begin : begin + step]
            prompts.read([part])
            self._shared.read += len(part)
            self._done(len(part))

    def _count(self, n: int) -> None:
        self._shared.computed += n
        self._done(n)

    def _room(self) -> list[np.ndarray]:
        n_tokens = [len(probe.expected) for document in self._documents for probe in document.probes]
        # note: 0.6 MB a token with a vocabulary of 150,000
        everything = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(sum(n_tokens), self._model.n_vocab))  # noqa: SIM115 (closed with the array)
        return np.split(everything, np.cumsum(n_tokens)[:-1])


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
    from lt_gguf.runtime.text_model import TextModel

    options = options or ScorerOptions()
    if options.n_gpu_layers == 0 and options.cache_type_v in ("f16", "bf16", "f32"):
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


def _n_tokens(conversation: tuple[Turn, Turn]) -> int:
    first, later = conversation
    return len(first.answer) + len(later.message) + len(later.answer)
