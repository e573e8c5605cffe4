"""The training text of the testbed model: made here, or read from the running Python.

- puzzles of `lt_gguf.evaluation` (needles, variable tracking, votes), several in one text, with keys and wordings that the
  evaluation doesn't ask for;
- dense lookups: lists of names and values, and sequences of words, that come again;
- stories from a small grammar (this project's own words, MIT), and short chats;
- Python's language reference (`pydoc_data.topics`) and standard-library docstrings (PSF licence), as real prose.

A document is a list of `(text, weight)` segments: the loss of a segment's tokens is multiplied by its weight.
Segments end where a word, a number or a sentence ends. No piece of the tokenizer crosses these places, so encoding
the segments one by one gives the same tokens as encoding the whole text.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lt_gguf.evaluation.haystack import Haystack, take
from lt_gguf.evaluation.puzzle import Puzzle, hide
from lt_gguf.evaluation.stories import story
from lt_gguf.evaluation.tasks import Needles, VariableTracking, Votes
from lt_gguf.evaluation.words import ANIMALS, NAMES, NOUNS, PLACES, VALUES, WordSource, is_held_out, keys, pick

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"

Segments = list[tuple[str, float]]

ANSWER_WEIGHT = 4.0  # what can only be known by looking it up in the context
CONTEXT_WEIGHT = 0.3  # statements whose values are random: nothing to learn but their form

TEXT_HELD_OUT_EVERY = 20
TEXT_SHARE = 0.2  # of a haystack's passages that are real prose, not stories
LONGEST_COPY = 40  # words

_CHARS_OF_A_STATEMENT = 45  # about; a question and its answer have twice as many


# ------------------------------------------------------------------------------------- Python's own texts


def python_texts() -> tuple[list[str], list[str]]:
    """Paragraph-wise texts of the running Python: (training, held-out). PSF licence."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.glob("*.py")) + sorted(stdlib.glob("*/__init__.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                doc = ast.get_docstring(node)
                if doc and len(doc) > 200:
                    texts.append(doc)
    train: list[str] = []
    held_out: list[str] = []
    for text in texts:
        text = "\n".join(line.strip() for line in text.splitlines())  # indentation would cost a token a space
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        text = "\n".join(p for p in paragraphs if p and p.isascii())
        if len(text) > 200:
            (held_out if is_held_out(text, TEXT_HELD_OUT_EVERY) else train).append(text)
    return train, held_out


# --------------------------------------------------------------------------------------------- lookups


def fact_map(rng: np.random.Generator, n_chars: int) -> Segments:
    """Dense lookups: a list of `name value` pairs that comes again and again in another order."""
    n = int(rng.integers(3, 20))
    keys = [str(k) for k in rng.choice(NAMES + NOUNS + ANIMALS, n, replace=False)]
    values = [pick(rng, VALUES) if rng.random() < 0.6 else str(rng.integers(100, 100_000)) for _ in keys]
    segments: Segments = [("List:", 1.0)]
    length = 0
    seen: set[int] = set()
    while length < n_chars:
        for i in rng.permutation(n):
            i = int(i)
            segments.append((f" {keys[i]}", CONTEXT_WEIGHT))
            segments.append((f" {values[i]}", ANSWER_WEIGHT if i in seen else CONTEXT_WEIGHT))
            segments.append((",", CONTEXT_WEIGHT))
            seen.add(i)
            length += len(keys[i]) + len(values[i]) + 3
        segments[-1] = (".", CONTEXT_WEIGHT)
    return segments


def repeated_words(rng: np.random.Generator, n_chars: int) -> Segments:
    """A random sequence of words, then the same again: copying needs only a look at what followed last time."""
    n = int(rng.integers(5, LONGEST_COPY))
    words = [pick(rng, VALUES + NAMES + NOUNS + PLACES + ANIMALS) for _ in range(n)]
    once = "".join(" " + word for word in words)
    segments: Segments = [("Repeat:", 1.0), (once, CONTEXT_WEIGHT)]
    for _ in range(max(1, n_chars // len(once))):
        segments.append((" |", CONTEXT_WEIGHT))
        segments.append((f" {words[0]}", CONTEXT_WEIGHT))
        segments.append((once[len(words[0]) + 1 :], ANSWER_WEIGHT / 2))
    return segments


@dataclass
class ConfusableWords(WordSource):
    """Words for training: half of the keys share their adjective or their noun with another one.

    By chance few do, so a model learns to look at one of the two words only, and takes the wrong needle wherever that isn't enough.
    """

    seen: list[str] = field(default_factory=list)

    def key(self) -> str:
        if self.seen and self.rng.random() < 0.5:
            adjective, noun = pick(self.rng, self.seen).split()
            alike = [k for k in keys(self.held_out) if (k.split()[0] == adjective) != (k.split()[1] == noun) and k not in self.used]
            if alike:
                self.used.add(key := pick(self.rng, alike))
                self.seen.append(key)
                return key
        self.seen.append(super().key())
        return self.seen[-1]


@dataclass
class ConfusableNumbers(ConfusableWords):
    """And half of the numbers begin like another one: with its first digit, or its first two.

    While a number is copied, its own digits say which number it is, too. Among random ones they nearly always suffice from the second
    digit on, so a model learns to trust them more than the words before the number, and goes astray where two begin alike.
    """

    numbers: list[str] = field(default_factory=list)

    def number(self) -> str:
        number = super().number()
        if self.numbers and self.rng.random() < 0.5:
            n = int(self.rng.integers(1, 3))
            alike = pick(self.rng, self.numbers)[:n] + number[n:]
            if alike not in self.used:
                self.used.add(number := alike)
        self.numbers.append(number)
        return number


def random_puzzles(rng: np.random.Generator, words: WordSource, n_chars: int, votes: bool) -> list[Puzzle]:
    """Puzzles of a random kind and size about the same statements, of at most about `n_chars` characters.

    Args:
        votes: whether it may be a vote; a text can have one only.
    """
    room = n_chars // _CHARS_OF_A_STATEMENT
    kind = rng.random()
    if kind < 0.12 and room >= 6:
        n_hops = int(rng.integers(1, min(4, room // 4 + 1)))
        n_chains = int(rng.integers(1, 3)) if room > 2 * n_hops + 6 else 1
        return [VariableTracking(n_hops=n_hops, n_chains=n_chains).puzzle(words)]
    if kind < 0.24 and room >= 7 and votes:
        n_others = int(rng.integers(1, 4))
        most = int(rng.integers(3, min(14, max(4, 2 * room // (2 + n_others)))))
        others = tuple(int(rng.integers(1, max(2, most // 2))) for _ in range(n_others))
        return [Votes(most=most, others=others).puzzle(words)]
    if kind < 0.40 and room >= 6:
        n_queries = int(rng.integers(2, 5))
        return Needles("multi-query", int(rng.integers(n_queries, min(9, room))), n_queries).puzzles(words, 1)
    if kind < 0.80 and room >= 6:
        n_keys = int(rng.integers(2, min(9, room - 2)))
        n_questions = 1 + int(rng.integers(0, max(1, min(n_keys, (room - n_keys) // 2))))
        return Needles("multi-key", n_keys).puzzles(words, n_questions)
    return [Needles("single", n_keys=1).puzzle(words)]


def puzzles(
    rng: np.random.Generator,
    n_chars: int,
    texts: Sequence[str],
    source: type[WordSource] = WordSource,
) -> Segments:
    """Several puzzles hidden in one haystack, and their questions after it, as a chat or in plain text.

    They take from a hundredth to nearly all of the text, so that dense texts and sparse ones are seen.

    Args:
        source: where keys and numbers come from.
    """
    budget = n_chars * (rng.uniform(0.1, 0.95) if rng.random() < 0.7 else rng.uniform(0.1, 0.3) ** 2)
    words = source(rng, held_out=False)
    chat = bool(rng.random() < 0.6)
    hidden: list[Puzzle] = []
    asking: list[Segments] = []
    used, votes = 0, True
    while used == 0 or budget - used > 4 * _CHARS_OF_A_STATEMENT:
        for puzzle in random_puzzles(rng, words, int(budget - used), votes):
            hidden.append(puzzle)
            asking.append(_asked(puzzle, chat))
            used += sum(len(statement) + 1 for statement in puzzle.statements)
            used += sum(len(text) for text, _ in asking[-1])
            votes = votes and "votes" not in puzzle.question
    haystack = Haystack(texts, TEXT_SHARE) if texts else Haystack()
    filler = take(haystack.sentences(rng), max(0, n_chars - used), lambda sentence: len(sentence) + 1)
    segments: Segments = [(USER, 1.0)] if chat else []
    for i, part in enumerate(hide(rng, filler, hidden)):
        segments.append(((" " if i else "") + part.text, CONTEXT_WEIGHT if part.hidden else 1.0))
    for i, j in enumerate(rng.permutation(len(asking))):
        segments += asking[int(j)] if i or not chat else [("\n", CONTEXT_WEIGHT), *asking[int(j)][1:]]
    return segments


def _asked(puzzle: Puzzle, chat: bool) -> Segments:
    """The question, after another, and the answer. The prompts of `lt_gguf.evaluation.prompts` look the same."""
    if chat:
        segments: Segments = [(USER, CONTEXT_WEIGHT), (puzzle.question, CONTEXT_WEIGHT), (f"{END}{ASSISTANT}", 1.0)]
    else:
        segments = [(f"\nQuestion: {puzzle.question}\nAnswer:", CONTEXT_WEIGHT)]
    for i, piece in enumerate(puzzle.answer):
        space = "" if i or chat else " "
        segments.append((space + piece.text, ANSWER_WEIGHT if piece.looked_up else 1.0))
    return [*segments, (END, 1.0)] if chat else segments


# ------------------------------------------------------------------------------------------------ chats


def _greeting(rng: np.random.Generator) -> tuple[str, str]:
    name = pick(rng, NAMES)
    return pick(
        rng,
        [
            ("Hello!", "Hello! How can I help you?"),
            ("Hi there.", "Hello! How can I help you?"),
            (f"My name is {name}. What is my name?", f"Your name is {name}."),
            ("Who are you?", "I am a very small language model. I was trained on a CPU in an hour or two."),
            ("What can you do?", "I can tell short stories and look things up in a text that you give me."),
            ("Thank you!", "You are welcome."),
            ("Goodbye.", "Goodbye!"),
        ],
    )


def chat(rng: np.random.Generator) -> Segments:
    """One to three turns: greetings, requests for a story."""
    segments: Segments = []
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5:
            question, answer = _greeting(rng)
        else:
            text = story(rng, 2)
            names = [word for word in text.replace(".", " ").replace(",", " ").split() if word in NAMES]
            about = names[0] if names else pick(rng, ANIMALS)
            question = pick(rng, [f"Tell me a story about {about}.", f"Tell a story about {about}, please."])
            answer = text
        segments += [(f"{USER}{question}", CONTEXT_WEIGHT), (f"{END}{ASSISTANT}", 1.0), (answer, 1.0), (END, 1.0)]
    return segments


# -------------------------------------------------------------------------------------------- documents

PUZZLES = {"puzzles": WordSource, "alike": ConfusableWords, "closely alike": ConfusableNumbers}  # kind of document -> its words


def document(rng: np.random.Generator, n_chars: int, texts: Sequence[str], shares: dict[str, float]) -> Segments:
    """One training document of about `n_chars` characters; `shares` says how often each kind comes."""
    weights = np.array(list(shares.values()))
    kind = list(shares)[int(rng.choice(len(shares), p=weights / weights.sum()))]
    if kind == "map":
        return fact_map(rng, n_chars)
    if kind == "repeat":
        return repeated_words(rng, n_chars)
    if kind in PUZZLES:
        return puzzles(rng, n_chars, texts, PUZZLES[kind])
    if kind == "chat":
        segments = chat(rng)
        while sum(len(text) for text, _ in segments) < n_chars:
            segments += chat(rng)
        return segments
    if kind == "python":
        text = pick(rng, texts)
        start = int(rng.integers(max(1, len(text) - n_chars)))
        start = text.find(" ", start) + 1
        return [(text[start : start + n_chars], 1.0)]
    assert kind == "story"
    stories = story(rng)
    while len(stories) < n_chars:
        stories += "\n\n" + story(rng)
    return [(stories, 1.0)]
