"""Conversations about long texts in which far-away things are asked for: what the loss of streaming layers is measured on.

A document is a text with facts in it, in the model's own chat template, read once; each of its conversations goes on with a question
in the first message and another one in a later message. What is compared comes after the beginning of an answer, because with
`prefill = full` the first token after a prompt comes from full attention, whatever streams.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lt_gguf.calibration import Texts
from lt_gguf.evaluation.facts import FactKind, passage
from lt_gguf.evaluation.haystack import Haystack, haystack_of
from lt_gguf.evaluation.prompts import Tokenizer, answer_tokens, ask, encode, go_on, n_common, space
from lt_gguf.evaluation.puzzle import Puzzle
from lt_gguf.evaluation.words import WordSource
from lt_gguf.selection.evidence import FIRST, LATER, TEXT

QUESTIONS_OF_A_DOCUMENT = 4  # conversations
DECODED_TEXT = 32  # tokens with which the text goes on
_NEAR = 96  # tokens: a question, with its template, and the beginning of an answer
_LAST_SENTENCES = 20  # of a continuation: enough for DECODED_TEXT tokens, whatever the tokenizer


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Args:
        where: `first` or `later` (`selection.evidence`).
        kind: of the question.
        message: tokens that are read as a prompt.
        answer: tokens that are decoded after it.
        span: [begin, end) of those of the answer that can only be looked up.
    """

    where: str
    kind: str
    message: tuple[int, ...]
    answer: tuple[int, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """Tokens whose predictions are compared, and what they are asked for with."""

    where: str
    kind: str
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """What is read once, and how it goes on.

    Args:
        length: most tokens of it with one conversation.
        prefix: tokens that all conversations begin with.
        text: tokens with which the text itself would go on.
        conversations: the rest of each: a first message and a later one.
    """

    length: int
    prefix: tuple[int, ...]
    text: tuple[int, ...]
    conversations: tuple[tuple[Turn, Turn], ...]

    @property
    def probes(self) -> list[Probe]:
        """How the text goes on, but for its first token, and then the answers of each conversation."""
        answers = (turn for both in self.conversations for turn in both)
        return [
            Probe(TEXT, TEXT, self.text[1:]),
            *(Probe(turn.where, turn.kind, turn.answer[slice(*turn.span)]) for turn in answers),
        ]

    @property
    def n_probes(self) -> int:
        return 1 + 2 * len(self.conversations)

    @property
    def n_tokens(self) -> int:
        """Of it with all its conversations."""
        said = sum(len(turn.message) + len(turn.answer) for both in self.conversations for turn in both)
        return len(self.prefix) + max(len(self.text), said)


def make_documents(
    tokenizer: Tokenizer,
    texts: Texts,
    kinds: Mapping[str, FactKind | None],
    n: int,
    length: int,
    window: int,
    seed: Sequence[int],
    of_a_document: int = QUESTIONS_OF_A_DOCUMENT,
) -> list[Document]:
    """Documents with `n` conversations together.

    Args:
        tokenizer: of the model; with a chat template these are chats, else plain text.
        texts: what facts are hidden in.
        kinds: of questions, in turn; `None`: a passage of the text.
        length: most tokens of a document with one of its conversations.
        window: last tokens that a streaming layer sees; what is asked for stands before them.
        seed: of all that is drawn.
        of_a_document: conversations about each, but for the last one's.

    Raises:
        ValueError: `length` is too small, or the model's chat template refuses a message.
    """
    haystack = haystack_of(texts.documents)
    documents: list[Document] = []
    asked = 0
    while asked < n:
        rng = np.random.default_rng([*seed, length, len(documents)])
        n_asked = min(of_a_document, n - asked)
        # note: both questions of a conversation are of different kinds, and each kind is asked for in both places
        names = list(kinds)
        pairs = [(names[(asked + i) % len(names)], names[(asked + i + 1 + i // len(names)) % len(names)]) for i in range(n_asked)]
        documents.append(_Writer(tokenizer, haystack, kinds, pairs, length, window, rng).write())
        asked += n_asked
    return documents


class _Writer:
    """Writes one document."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        haystack: Haystack,
        kinds: Mapping[str, FactKind | None],
        pairs: Sequence[tuple[str, str]],
        length: int,
        window: int,
        rng: np.random.Generator,
    ) -> None:
        self.tokenizer, self.kinds, self.pairs, self.length, self.rng = tokenizer, kinds, pairs, length, rng
        self.far = max(0.0, 1 - (window + _NEAR) / length)  # share of the text
        self.words = WordSource(rng, held_out=False)
        names = [name for pair in pairs for name in pair]
        self.facts = [kind.fact(self.words) if (kind := kinds[name]) else None for name in names]
        # where each stands: spread over what a streaming layer doesn't see, in any order
        self.depths = self.far * (rng.permutation(len(names)) + rng.random(len(names))) / len(names)
        self.sentences = haystack.sentences(rng)
        self.filler: list[str] = []
        self.placing = rng.integers(2**63)

    def write(self) -> Document:
        n = self._n_sentences()
        text, puzzles = self._text(n)
        self._sentences(n + _LAST_SENTENCES)
        goes_on = text + " " + " ".join(self.filler[n : n + _LAST_SENTENCES])
        conversations = [self._conversation(text, puzzles[2 * i : 2 * i + 2], pair) for i, pair in enumerate(self.pairs)]
        prompts = [conversation[0].message for conversation in conversations]
        # the text as it would go on has another end of its last sentence, a token or two
        going_on = encode(self.tokenizer, ask(self.tokenizer, goes_on, ""))
        prefix = prompts[0][: min(n_common(prompts[0], other) for other in (*prompts[1:], going_on))]
        n_prefix = len(prefix)
        return Document(
            self.length,
            prefix,
            going_on[n_prefix : n_prefix + min(DECODED_TEXT, self.length // 8)],
            tuple((_without(first, n_prefix), later) for first, later in conversations),
        )

    def _sentences(self, n: int) -> list[str]:
        self.filler.extend(islice(self.sentences, max(0, n - len(self.filler))))
        return self.filler[:n]

    def _text(self, n: int) -> tuple[str, list[Puzzle]]:
        """The text with `n` sentences and the facts among them, and what is asked for."""
        filler = self._sentences(n)
        rng = np.random.default_rng(self.placing)
        places = np.array([round(depth * n) for depth in self.depths])
        puzzles: list[Puzzle] = []
        hidden: list[tuple[int, str]] = []
        for fact, place in zip(self.facts, places.tolist()):
            if fact is None:
                near = np.arange(max(0, place - 10), min(int(self.far * n) or n, place + 10))
                found = passage(filler, near, rng) if len(near) else None
                fact = found[1] if found else self._instead().fact(WordSource(rng, held_out=False, used=set(self.words.used)))
                hidden += [] if found else [(place, fact.statements[0])]
            else:
                hidden.append((place, fact.statements[0]))
            puzzles.append(fact)
        parts = [*filler]
        for place, statement in sorted(hidden, reverse=True):
            parts.insert(place, statement)
        return " ".join(parts), puzzles

    def _instead(self) -> FactKind:
        """Where the text has no passage to ask for, as with very short prompts."""
        return next(kind for kind in self.kinds.values() if kind is not None)

    def _conversation(self, text: str, puzzles: Sequence[Puzzle], kinds: tuple[str, str]) -> tuple[Turn, Turn]:
        tokenizer, (first, later) = self.tokenizer, puzzles
        message = ask(tokenizer, text, first.question)
        answered = first.prefix + first.rest
        between = go_on(tokenizer, text, first.question, answered, later.question)
        return self._turn(FIRST, kinds[0], message, first, True), self._turn(LATER, kinds[1], between, later, False)

    def _turn(self, where: str, kind: str, message: str, puzzle: Puzzle, begins: bool) -> Turn:
        """`message` is everything before the answer that hasn't been read."""

        def tokens(text: str) -> tuple[int, ...]:
            if begins:
                return encode(self.tokenizer, text)
            return tuple(self.tokenizer.tokenize(text, special=self.tokenizer.chat_template is not None))

        asked, with_given = tokens(message), tokens(message + space(self.tokenizer) + puzzle.prefix)
        n_message = n_common(asked, with_given)
        given = with_given[n_message:]
        answer, spans = answer_tokens(self.tokenizer, puzzle)
        begin, end = spans[0]
        return Turn(where, kind, with_given[:n_message], (*given, *answer), (len(given) + begin, len(given) + end))

    def _n_sentences(self) -> int:
        """As many as fit with every conversation."""

        def n_tokens(n: int, pairs: Sequence[tuple[str, str]]) -> int:
            text, puzzles = self._text(n)
            turns = (self._conversation(text, puzzles[2 * i : 2 * i + 2], pair) for i, pair in enumerate(pairs))
            return max(sum(len(turn.message) + len(turn.answer) for turn in both) for both in turns)

        if (least := n_tokens(1, self.pairs)) > self.length:
            raise ValueError(
                f"conversations take {least} tokens at least, must be at most {self.length}: ask for longer ones, or select by lazy-ratio"
            )
        too_many = 2
        while n_tokens(too_many, self.pairs[:1]) <= self.length:
            too_many *= 2
        n = bisect_right(range(too_many), self.length, lo=too_many // 2, key=lambda n: n_tokens(n, self.pairs[:1])) - 1
        while n_tokens(n, self.pairs) > self.length:  # one conversation is longer than another by some tokens
            n -= 1
        return n


def _without(turn: Turn, n: int) -> Turn:
    return Turn(turn.where, turn.kind, turn.message[n:], turn.answer, turn.span)
