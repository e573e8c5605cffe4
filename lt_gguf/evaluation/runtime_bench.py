"""Runs hybrids and their full model on the same conversations, on the patched runtime.

With `prefill = full` a document is read once, whatever streams after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from lt_gguf.evaluation.divergence import kl_divergence
from lt_gguf.evaluation.outcomes import KnownOutcomes
from lt_gguf.evaluation.probes import Document, Probe, Turn
from lt_gguf.selection.evidence import Evidence, Outcome
from lt_gguf.spec import StreamingSpec, format_layers, parse_layers
from lt_gguf.spec.cache_types import CacheTypes

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.evaluation.shared_prompts import SharedPrompts
    from lt_gguf.runtime.text_model import TextModel

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
        beside: a bench with the same documents, whose full model hybrids are compared with; `None`: this one's.
    """

    def __init__(
        self,
        model: TextModel,
        options: ScorerOptions,
        spec: StreamingSpec,
        documents: Sequence[Document],
        known: KnownOutcomes,
        done: Callable[[int], None] = lambda n: None,
        beside: RuntimeBench | None = None,
    ) -> None:
        self._model, self._options, self._spec, self._known, self._done = model, options, spec, known, done
        self._beside = beside
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

    def with_cache(self, types: CacheTypes, keep: Layers = ()) -> RuntimeBench:
        """The same documents, read again with other types of the KV cache, beside the full model of this bench; has its own `close`.

        Args:
            keep: layers that are kept in 16 bits, as streaming layers are.
        """
        kept = parse_layers(self._options.cache_keep or "none", self._model.n_layer)
        options = replace(
            self._options,
            cache_type_k=types.k,
            cache_type_v=types.v,
            cache_keep=format_layers(sorted({*kept, *keep})) or None,
            flash_attn=self._options.flash_attn or types.needs_flash_attn,
        )
        known = KnownOutcomes.of(self._model.file, options, self._documents, beside=self._options)
        return RuntimeBench(self._model, options, self._spec, self._documents, known, self._done, beside=self)

    def measure(self, layers: Layers) -> Evidence:
        """Asks everything with these streaming layers; with none, it is the full model.

        Raises:
            ValueError: the model can't stream so, or a conversation doesn't fit the context.
        """
        return self.measure_all([layers])[0]

    def measure_all(self, sets: Sequence[Layers]) -> list[Evidence]:
        """The same for many sets, for which a question is read once."""
        if self._missing(sets):
            self._full_model()  # what all are compared with
        missing = self._missing(sets)
        for begin in range(0, len(missing), _AT_ONCE):
            self._measure(missing[begin : begin + _AT_ONCE])
        return [Evidence(self._known.get(self._spec, layers)) for layers in sets]

    def _missing(self, sets: Sequence[Layers]) -> list[Layers]:
        return [layers for layers in dict.fromkeys(sets) if not self._known.has(self._spec, layers)]

    def _full_model(self) -> list[np.ndarray]:
        """Its log-probabilities for each probe (compared tokens, n_vocab); it is run first."""
        if self._beside is not None:
            return self._beside._full_model()
        if self._shared.full is None:
            self._shared.full = self._room()
            self._measure([()])
        return self._shared.full

    def _measure(self, sets: list[Layers]) -> None:
        outcomes: dict[Layers, list[Outcome]] = {layers: [] for layers in sets}
        probes = iter(self._full_model())
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
            if not layers and self._beside is None:
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


def _n_tokens(conversation: tuple[Turn, Turn]) -> int:
    first, later = conversation
    return len(first.answer) + len(later.message) + len(later.answer)
