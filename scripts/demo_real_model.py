"""The demo's second half: a real model reads a long, real text and is asked for what stands far back in it.

SmolLM2-135M-Instruct, a model of a laptop's size at its smallest, reads 6,000 tokens of Python's own documentation with facts among
them, which no model can know, and is asked for one after the other in a conversation: once with full attention, once as a
hybrid. Both are asked the same, so what the hybrid loses is what it doesn't find and the full model does.

Which layers stream was measured once, and models/smollm2/README.md says how and with which losses: on two cores it takes as
long as all the rest of the demo several times over.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lt_gguf import models
from lt_gguf.calibration import read_texts
from lt_gguf.evaluation.haystack import haystack_of, take
from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.flagging import flag
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report.report import Report
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.spec import format_layers

if TYPE_CHECKING:
    from lt_gguf import Llama

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "models" / "smollm2" / "report.json"

N_CTX = 8192  # what the model was trained for
N_TEXT = 6000  # tokens of the documentation
FIRST, LAST = 0.05, 0.75  # where the facts stand in it: the window never reaches back to the last one
N_ANSWER = 48  # most tokens of an answer

console = Console(highlight=False)


class Fact(NamedTuple):
    """A sentence in the text, the question about it, and the word that the answer must have."""

    statement: str
    question: str
    expected: str


FACTS = (
    Fact(
        "The meeting with the engineers takes place in room 417.",
        "In which room does the meeting with the engineers take place?",
        "417",
    ),
    Fact("The name of Anna's dog is Biscuit.", "What is the name of Anna's dog?", "Biscuit"),
    Fact("The red lighthouse was built in the year 1874.", "In which year was the red lighthouse built?", "1874"),
    Fact("Dr. Weber's favourite instrument is the cello.", "What is Dr. Weber's favourite instrument?", "cello"),
)


class Conversation(NamedTuple):
    """What came of the questions with one kind of attention."""

    n_tokens: int  # in the context at its end
    kv_bytes: int
    read_seconds: float  # of the first message, text and question
    speed: float  # of the answers, in tokens a second
    answers: list[str]


def run(folder: Path) -> None:
    """Prints it all; `folder` keeps the hybrid file."""
    from lt_gguf import Llama  # note: as in demo.py, it loads the native library

    report = Report.read(REPORT)
    source = models.resolve("smollm2")
    hybrid = make_hybrid(source, folder / "smollm2-hybrid.gguf", report)
    model = read_model(hybrid)
    n_layers = f"{len(report.spec.layers)} of {model.n_layer} layers stream"
    console.print(
        f"\n[bold]A real model[/bold]: {models.MODELS['smollm2']}; {n_layers} ({format_layers(report.spec.layers)}), sink "
        f"{report.spec.sink}, window {report.spec.window}. They are the half that loses least: models/smollm2/README.md has what was "
        "measured."
    )

    text = ""
    conversations: dict[str, Conversation] = {}
    for attention, streaming in (("full", "off"), ("hybrid", None)):
        llm = Llama(str(hybrid), streaming=streaming, n_ctx=N_CTX, n_batch=512, flash_attn=True, verbose=False)
        text = text or make_text(llm)
        with console.status(
            f"{attention}: reading {N_TEXT:,} tokens on {usable_cores()} cores, then answering {len(FACTS)} questions"
        ):
            conversations[attention] = converse(llm, text)
        llm.close()
    console.print(answers_table(conversations))
    console.print(measures_table(conversations))
    console.print(
        f"The facts stand in the first three quarters of the text, and a streaming layer sees its last {report.spec.window} tokens only. "
        + what_is_lost(conversations)
    )
    console.print("Talk with it about a text of your own: lt-gguf chat " + str(hybrid.relative_to(ROOT)))


def make_hybrid(source: Path, file: Path, report: Report) -> Path:
    """The model with the layers that the report chose, as `lt-gguf flag --from` writes it, if that hasn't been done."""
    if not file.exists() or read_model(file).spec != report.spec:
        flag(source, file, report.spec, report.provenance, overwrite=True)
    return file


def make_text(llm: Llama) -> str:
    """The documentation of the running Python with the facts among its sentences."""

    def n_tokens(sentence: str) -> int:
        return len(llm.tokenize(f" {sentence}".encode(), add_bos=False))

    rng = np.random.default_rng(5)
    sentences = take(haystack_of(read_texts(None).documents).sentences(rng), N_TEXT, n_tokens)
    places = np.linspace(FIRST, LAST, len(FACTS)) * len(sentences)
    for place, fact in reversed(list(zip(places.astype(int), FACTS))):
        sentences.insert(int(place), fact.statement)
    return " ".join(sentences)


def converse(llm: Llama, text: str) -> Conversation:
    """Asks the questions one after the other, the first in the message that brings the text; always the most likely answer."""
    messages: list[dict[str, str]] = []
    answers: list[str] = []
    n_decoded, decoding, read_seconds = 0, 0.0, 0.0
    for fact in FACTS:
        question = fact.question if messages else f"{text}\n\n{fact.question}"
        messages.append({"role": "user", "content": question})
        asked = time.perf_counter()
        first, n_before, words = 0.0, 0, []
        for chunk in llm.create_chat_completion(messages, max_tokens=N_ANSWER, temperature=0, stream=True):
            if not first:
                first, n_before = time.perf_counter(), llm.n_tokens
            words.append(chunk["choices"][0]["delta"].get("content", ""))
        decoding += time.perf_counter() - first
        n_decoded += llm.n_tokens - n_before
        read_seconds = read_seconds or first - asked
        answers.append("".join(words).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return Conversation(llm.n_tokens, llm.kv_bytes()["total"], read_seconds, n_decoded / decoding, answers)


def what_is_lost(conversations: dict[str, Conversation]) -> str:
    """In words: what the full model finds and the hybrid doesn't."""
    found = {
        attention: {fact for fact, answer in zip(FACTS, conversation.answers) if is_right(answer, fact.expected)}
        for attention, conversation in conversations.items()
    }
    lost = [fact.question for fact in FACTS if fact in found["full"] - found["hybrid"]]
    n = len(found["full"])
    facts = f"the {n} facts" if n != 1 else "the one fact"
    return f"Of {facts} that the full model finds the hybrid loses {f'{len(lost)}: ' + ' '.join(lost) if lost else 'none.'}"


def answers_table(conversations: dict[str, Conversation]) -> Table:
    table = Table("asked", *conversations, title="What was found", show_lines=True)
    for i, fact in enumerate(FACTS):
        answers = (conversation.answers[i] for conversation in conversations.values())
        table.add_row(fact.question, *(mark(answer, fact.expected) for answer in answers))
    return table


def mark(answer: str, expected: str) -> str:
    """The beginning of an answer, green where it is right and red where it isn't."""
    colour, sign = ("green", "✓") if is_right(answer, expected) else ("red", "✗")
    shown = " ".join(answer.split())
    return f"[{colour}]{sign}[/{colour}] {escape(shown[:70])}{'…' if len(shown) > 70 else ''}"


def is_right(answer: str, expected: str) -> bool:
    return expected.lower() in answer.lower()


def measures_table(conversations: dict[str, Conversation]) -> Table:
    table = Table("attention", "KV cache", "first message\nread in", "answers\ntokens/s", "found", title="Full beside hybrid")
    for column in table.columns[1:]:
        column.justify = "right"
    for attention, conversation in conversations.items():
        found = sum(is_right(answer, fact.expected) for answer, fact in zip(conversation.answers, FACTS))
        table.add_row(
            attention,
            format_bytes(conversation.kv_bytes),
            f"{conversation.read_seconds:.0f} s",
            f"{conversation.speed:.1f}",
            f"{found}/{len(FACTS)}",
        )
    return table
