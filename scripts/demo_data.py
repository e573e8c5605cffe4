"""The training and held-out text of the demo model: made here, or read from the running Python.

Four kinds of documents, all free to use:

- stories from a small grammar (this file's own words, MIT);
- Python's language reference (`pydoc_data.topics`) and standard-library docstrings (PSF licence), as real prose;
- key-value retrieval: facts in natural wording among filler text, asked for at the end;
- short chats in the model's chat format, some of them with retrieval.

A document is a list of `(text, weight)` segments: the loss of a segment's tokens is multiplied by its weight.
Segments end where a word, a number or a sentence ends. No piece of the tokenizer crosses these places, so encoding
the segments one by one gives the same tokens as encoding the whole text.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"

Segments = list[tuple[str, float]]

ANSWER_WEIGHT = 4.0  # what can only be known by looking it up in the context
CONTEXT_WEIGHT = 0.3  # facts whose values are random: nothing to learn but their form

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Noah Olga Paul Rosa Sam Tina Victor
Alice Bruno Carl Diana Edgar Fiona George Helen Ivan Julia Karl Laura Martin Nina Oscar Peter Ruth Simon Tom
Vera""".split()
ADJECTIVES = "red blue green white black tall new small large quiet golden silver wooden round broken hidden".split()
NOUNS = """lighthouse bridge garden tower house mill boat clock box door window table lamp chair ship train
key bag book bell cup map ring shop""".split()
ANIMALS = "cat dog horse cow goat duck fox wolf bear mouse rabbit sheep".split()
PLACES = "river forest village market harbour school library station castle island mountain valley".split()
FOODS = "bread soup cheese apples cake fish rice honey milk pears nuts tea".split()
WORDS = """stone cloud silk amber maple copper velvet winter summer thunder paper salt ivory olive cotton iron
pepper ginger lemon marble coral tulip falcon rocket candle pillow hammer basket orange purple yellow brown
pink glass wool sugar coffee mirror needle ladder saddle violin guitar drum feather button carpet blanket
anchor engine wagon tunnel temple palace desert meadow canyon glacier comet planet moon star""".split()
MOODS = "happy sad tired proud hungry calm brave curious".split()
TIMES = ["in the morning", "in the evening", "at noon", "one day", "on a rainy day", "on a sunny day", "late at night"]

TEXT_HELD_OUT_EVERY = 20
KEY_HELD_OUT_EVERY = 10


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _held_out(text: str, every: int) -> bool:
    """A split that depends on the text alone, so it is the same in every run."""
    return zlib.crc32(text.encode()) % every == 0


# ---------------------------------------------------------------------------------------------- stories

_EVENTS = [
    "{n} found the {a} {o} near the {p}. The {a} {o} belonged to {m}.",
    "{n} met a {c}. The {c} was {d}, so {n} gave it some {f}.",
    "{n} and {m} walked to the {p}. They looked for the {a} {o}, but they did not find it.",
    "{n} carried the {a} {o} to the {p}. It was heavy, and {n} was soon tired.",
    "A {c} came out of the {p}. {m} was afraid of it, but {n} was not.",
    "{n} was hungry. {m} had some {f} and shared it with {n}.",
    "It began to rain. {n} and {m} ran to the {p} and waited there.",
    "{n} asked {m} about the {a} {o}. \"I left it at the {p},\" said {m}.",
    "\"Where is the {c}?\" asked {n}. \"It is at the {p},\" said {m}.",
    "{m} sold {f} at the {p}. {n} bought some and ate it at once.",
    "{n} wanted to see the {p}. {m} knew the way and went with {n}.",
    "The {c} took the {f} from {n} and ran away. {n} laughed, and {m} laughed too.",
]
_OPENINGS = [
    "{n} lived near the {p} with a {c}.",
    "{t}, {n} went to the {p}.",
    "Once there was a {c} that lived by the {p}. Its best friend was {n}.",
    "{n} and {m} were good friends. {t}, they met at the {p}.",
    "{n} owned the {a} {o}. {n} liked it more than anything else.",
]
_ENDINGS = [
    "At the end of the day {n} was {d}, and {m} was {d} too.",
    "Then {n} went home and slept well.",
    "From that day on, {n} and the {c} were friends.",
    "{n} thanked {m} and went back to the {p}.",
    "That is how {n} learned to share.",
]


def story(rng: np.random.Generator, n_events: int | None = None) -> str:
    """A short story about two people: the same people, animal and things from its first sentence to its last."""
    n, m = (str(name) for name in rng.choice(NAMES, 2, replace=False))
    cast = dict(n=n, m=m, c=_pick(rng, ANIMALS), a=_pick(rng, ADJECTIVES), o=_pick(rng, NOUNS), p=_pick(rng, PLACES),
                d=_pick(rng, MOODS), f=_pick(rng, FOODS), t=_pick(rng, TIMES))
    n_events = int(rng.integers(2, 6)) if n_events is None else n_events
    events = [_EVENTS[i] for i in rng.permutation(len(_EVENTS))[:n_events]]
    lines = []
    for template in [_pick(rng, _OPENINGS), *events, _pick(rng, _ENDINGS)]:
        if rng.random() < 0.25:  # the people change roles, the cast stays
            cast["n"], cast["m"] = cast["m"], cast["n"]
        sentences = template.format(**cast).split(". ")
        lines.append(". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences))
    return " ".join(lines)


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
            (held_out if _held_out(text, TEXT_HELD_OUT_EVERY) else train).append(text)
    return train, held_out


# ------------------------------------------------------------------------------------------- retrieval

@dataclass(frozen=True)
class Fact:
    """One thing to remember: `statement + value + "."` says it, `question` asks for it."""

    question: str
    statement: str
    value: str


_THING_FACTS = [
    ("What is the code of the {k}?", "The code of the {k} is"),
    ("What is hidden in the {k}?", "Hidden in the {k} is"),
    ("What is the sign on the {k}?", "The sign on the {k} is"),
]
_NAME_FACTS = [
    ("What is the secret word of {k}?", "The secret word of {k} is"),
    ("What does {k} like?", "{k} likes"),
    ("What is the number of {k}?", "The number of {k} is"),
]
_NUMBER_WORDS = ("code", "number")


def _value(rng: np.random.Generator, statement: str) -> str:
    if any(word in statement for word in _NUMBER_WORDS):
        return str(rng.integers(100, 1000))
    return _pick(rng, WORDS)


def facts(rng: np.random.Generator, n: int, held_out: bool = False) -> list[Fact]:
    """`n` facts with different keys and random values; things (`red lighthouse`) are split into training and
    held-out ones, so a held-out key is a pair of words that training never put together in a fact."""
    things = [f"{a} {o}" for a in ADJECTIVES for o in NOUNS if _held_out(f"{a} {o}", KEY_HELD_OUT_EVERY) == held_out]
    keys = [(str(k), _THING_FACTS) for k in rng.choice(things, min(n, len(things)), replace=False)]
    if not held_out:  # people's names are too few to hold any out
        keys += [(str(k), _NAME_FACTS) for k in rng.choice(NAMES, min(n, len(NAMES)), replace=False)]
    out = []
    for i in rng.permutation(len(keys))[:n]:
        key, templates = keys[int(i)]
        question, statement = _pick(rng, templates)
        out.append(Fact(question.format(k=key), statement.format(k=key), _value(rng, statement)))
    return out


def fact_map(rng: np.random.Generator, n_chars: int) -> Segments:
    """Dense lookups: a list of `name value` pairs that comes again and again in another order."""
    n = int(rng.integers(3, 20))
    keys = [str(k) for k in rng.choice(NAMES + NOUNS + ANIMALS, n, replace=False)]
    values = [_pick(rng, WORDS) if rng.random() < 0.7 else str(rng.integers(100, 1000)) for _ in keys]
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
    n = int(rng.integers(5, 40))
    words = [_pick(rng, WORDS + NAMES + NOUNS + PLACES + ANIMALS) for _ in range(n)]
    once = "".join(" " + word for word in words)
    segments: Segments = [("Repeat:", 1.0), (once, CONTEXT_WEIGHT)]
    for _ in range(max(1, n_chars // len(once))):
        segments.append((" |", CONTEXT_WEIGHT))
        segments.append((f" {words[0]}", CONTEXT_WEIGHT))
        segments.append((once[len(words[0]) + 1:], ANSWER_WEIGHT / 2))
    return segments


def retrieval(
    rng: np.random.Generator, n_chars: int, texts: list[str], held_out: bool = False, n_facts: int | None = None,
    n_questions: int | None = None, chat: bool | None = None,
) -> tuple[Segments, list[Fact]]:
    """Facts spread over about `n_chars` characters of filler, then questions. Returns the facts asked for, in order."""
    chat = bool(rng.random() < 0.5) if chat is None else chat
    if n_facts is None:
        n_facts = int(rng.integers(1, max(2, min(12, n_chars // 60))))
    all_facts = facts(rng, n_facts, held_out)
    n_facts = len(all_facts)
    if n_questions is None:
        n_questions = int(rng.integers(1, 6))
    asked = [all_facts[int(i)] for i in rng.permutation(n_facts)[:n_questions]]

    budget = n_chars - sum(len(f.statement) + len(f.value) + 3 for f in all_facts)
    budget -= sum(len(f.question) + len(f.statement) + len(f.value) + 20 for f in asked)
    filler = filler_sentences(rng, budget, texts)
    at = np.sort(rng.integers(0, len(filler) + 1, n_facts))
    parts: list[tuple[str, float]] = []
    for i in range(len(filler) + 1):
        for fact in (all_facts[j] for j in range(n_facts) if at[j] == i):
            parts.append((f"{fact.statement} {fact.value}.", CONTEXT_WEIGHT))
        if i < len(filler):
            parts.append((filler[i], 1.0))
    body: Segments = [((" " if i else "") + text, weight) for i, (text, weight) in enumerate(parts)]

    segments: Segments = [(USER, 1.0)] if chat else []
    segments += body
    for i, fact in enumerate(asked):
        if chat:
            asking = f"\n{fact.question}" if i == 0 else f"{USER}{fact.question}"
            segments += [(asking, CONTEXT_WEIGHT), (f"{END}{ASSISTANT}", 1.0)]
        else:
            segments += [(f"\nQuestion: {fact.question}\nAnswer:", CONTEXT_WEIGHT)]
        statement = fact.statement if chat else f" {fact.statement}"
        segments += [(statement, 1.0), (f" {fact.value}", ANSWER_WEIGHT), (".", 1.0)]
        if chat:
            segments += [(END, 1.0)]
    return segments, asked


def filler_sentences(rng: np.random.Generator, n_chars: int, texts: list[str]) -> list[str]:
    """Sentences of stories (mostly) or of `texts`, together at most `n_chars` characters."""
    out: list[str] = []
    length = 0
    while True:
        if texts and rng.random() < 0.2:
            lines = _pick(rng, texts).split("\n")
            start = int(rng.integers(len(lines)))
            sentences = lines[start:start + 2]
        else:
            sentences = [s.strip() + "." for s in story(rng).split(". ")]
            sentences[-1] = sentences[-1][:-1]
        for sentence in sentences:
            length += len(sentence) + 1
            if length > n_chars:
                return out
            out.append(sentence)


# ------------------------------------------------------------------------------------------------ chats

def _greeting(rng: np.random.Generator) -> tuple[str, str]:
    name = _pick(rng, NAMES)
    return _pick(rng, [
        ("Hello!", "Hello! How can I help you?"),
        ("Hi there.", "Hello! How can I help you?"),
        (f"My name is {name}. What is my name?", f"Your name is {name}."),
        ("Who are you?", "I am a very small language model. I was trained on a CPU in half an hour."),
        ("What can you do?", "I can tell short stories and look things up in a text that you give me."),
        ("Thank you!", "You are welcome."),
        ("Goodbye.", "Goodbye!"),
    ])


def chat(rng: np.random.Generator) -> Segments:
    """One to three turns: greetings, requests for a story."""
    segments: Segments = []
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5:
            question, answer = _greeting(rng)
        else:
            text = story(rng, 2)
            names = [word for word in text.replace(".", " ").replace(",", " ").split() if word in NAMES]
            about = names[0] if names else _pick(rng, ANIMALS)
            question = _pick(rng, [f"Tell me a story about {about}.", f"Tell a story about {about}, please."])
            answer = text
        segments += [(f"{USER}{question}", CONTEXT_WEIGHT), (f"{END}{ASSISTANT}", 1.0), (answer, 1.0), (END, 1.0)]
    return segments


# -------------------------------------------------------------------------------------------- documents

def document(rng: np.random.Generator, n_chars: int, texts: list[str], shares: dict[str, float]) -> Segments:
    """One training document of about `n_chars` characters; `shares` says how often each kind comes."""
    kinds = list(shares)
    kind = _pick_weighted(rng, kinds, [shares[k] for k in kinds])
    if kind == "map":
        return fact_map(rng, n_chars)
    if kind == "repeat":
        return repeated_words(rng, n_chars)
    if kind == "retrieval":
        return retrieval(rng, n_chars, texts)[0]
    if kind == "chat":
        segments = chat(rng)
        while sum(len(text) for text, _ in segments) < n_chars:
            segments += chat(rng)
        return segments
    if kind == "python":
        text = _pick(rng, texts)
        start = int(rng.integers(max(1, len(text) - n_chars)))
        start = text.find(" ", start) + 1
        return [(text[start:start + n_chars], 1.0)]
    stories = story(rng)
    while len(stories) < n_chars:
        stories += "\n\n" + story(rng)
    return [(stories, 1.0)]


def _pick_weighted(rng: np.random.Generator, items: list[str], weights: list[float]) -> str:
    weights_ = np.array(weights) / np.sum(weights)
    return items[int(rng.choice(len(items), p=weights_))]
