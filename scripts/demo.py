#!/usr/bin/env python3
"""The demo: a small checkpoint becomes hybrid GGUF files that answer with and without streaming, then a real model does.

Converts models/demo, which measures what half of its layers can do without the far context, quantizes it, shows what `lt-gguf inspect`
shows, and lets each file answer questions about texts longer than its window: once with full attention (`streaming="off"`), once as
the hybrid that it is.
What is made stays in build/demo, so that a second run begins with the answers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import demo_real_model  # this and testbed are beside this file
import numpy as np
from rich.console import Console
from rich.table import Table
from testbed.testbed_data import ASSISTANT, END, USER

from lt_gguf.conversion import convert
from lt_gguf.evaluation.haystack import Haystack, take
from lt_gguf.evaluation.puzzle import hide
from lt_gguf.evaluation.tasks import find_task
from lt_gguf.evaluation.words import WordSource
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.report.inspection import print_tables
from lt_gguf.report.tables import print_candidates
from lt_gguf.runtime import crash
from lt_gguf.runtime.cpu import set_up_openmp
from lt_gguf.runtime.library import tool_path

if TYPE_CHECKING:
    from lt_gguf import Llama

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "models" / "demo"
FOLDER = ROOT / "build" / "demo"

N_CTX = 4096  # what the model was trained for
SINK, WINDOW = 4, 252  # 256 positions of a context of 4096: streaming layers forget most of each text
# Which half of the layers streams: what several strategies choose is run, on so few prompts that it takes a minute or so.
SELECTION = {"questions": 8, "calibration_length": 768, "threads": 1}
QUANTIZATIONS = ("q8_0", "q4_K_M")

# One thread: a model this small gains nothing from more.
SETTINGS = {"n_ctx": N_CTX, "n_batch": 128, "n_ubatch": 128, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1}

N_QUESTIONS = 8
N_CHARS = 6000  # of each text: two thousand tokens, eight windows
N_TIMED = 96  # tokens that are written after each, more than an answer takes

console = Console(highlight=False)


class Question(NamedTuple):
    """A text, a question about it, and the word that the answer must have."""

    prompt: str
    asked: str
    expected: str


class Answer(NamedTuple):
    """An answer, and how fast the prompt was read and it was written, in tokens a second."""

    text: str
    prompt_speed: float
    speed: float


class Run(NamedTuple):
    """What came of one file with one kind of attention; speeds are medians, in tokens a second."""

    kv_bytes: int
    prompt_speed: float
    answer_speed: float
    answers: list[str]


def main() -> None:
    crash.enable("scripts/demo.py")
    set_up_openmp()
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = [make_f16()]
    files += [quantize(files[0], name) for name in QUANTIZATIONS]
    model = read_model(files[0])
    print_tables(model, model.spec)

    questions = make_questions()
    speeds = ("prompt\ntokens/s", "answer\ntokens/s")
    table = Table("weights", "attention", "KV cache", *speeds, "right", "as full", title="Full beside hybrid")
    for column in table.columns[2:]:
        column.justify = "right"
    for file in files:
        with console.status(f"{file.name}: answering {N_QUESTIONS} questions, twice each"):
            runs = answer_all(file, questions)
        if file == files[0]:
            show_an_answer(questions, runs)
        for attention, run in runs.items():
            right = sum(question.expected in answer for question, answer in zip(questions, run.answers))
            agreeing = sum(a == b for a, b in zip(run.answers, runs["full"].answers))
            table.add_row(
                file.stem.removeprefix("demo-") if attention == "full" else format_bytes(file.stat().st_size),
                attention,
                format_bytes(run.kv_bytes),
                f"{run.prompt_speed:.0f}",
                f"{run.answer_speed:.0f}",
                f"{right}/{len(questions)}",
                f"{agreeing}/{len(questions)}",
                end_section=attention == "hybrid",
            )
    console.print(table)
    console.print(
        f"Context {N_CTX} tokens, {N_QUESTIONS} texts of about {N_CHARS} characters, greedy answers. right: the answer has the "
        "word that was asked for. as full: it is, letter by letter, what full attention answers."
    )
    console.print(f"The files are in {FOLDER.relative_to(ROOT)}.")
    demo_real_model.run(FOLDER)


def make_f16() -> Path:
    """Converts the checkpoint, if that hasn't been done with the same sinks and window."""
    file = FOLDER / "demo-f16.gguf"
    newest = max(path.stat().st_mtime for path in CHECKPOINT.iterdir())
    if file.exists() and file.stat().st_mtime > newest:
        spec = read_model(file).spec
        if spec is not None and (spec.sink, spec.window) == (SINK, WINDOW):
            return file
    console.print(f"Converting {CHECKPOINT.relative_to(ROOT)}: which of its layers can do without the far context?")
    with console.status("converting") as status:
        show = lambda what, done, total: status.update(f"{what}: {done} of {total}")  # noqa: E731
        options = {"sink": SINK, "window": WINDOW, **SELECTION, "progress": show}
        converted = convert(CHECKPOINT, file, outtype="f16", overwrite=True, **options)
    print_candidates(converted.selection, converted.spec)
    return converted.files[0]


def quantize(source: Path, name: str) -> Path:
    """Quantizes with llama-quantize, if that hasn't been done since `source` was made."""
    file = FOLDER / f"demo-{name}.gguf"
    if file.exists() and file.stat().st_mtime > source.stat().st_mtime:
        return file
    console.print(f"Quantizing to {name}")
    unfinished = file.with_suffix(".unfinished")
    try:
        command = [tool_path("llama-quantize"), source, unfinished, name]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return unfinished.replace(file)
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            sys.exit(f"error: {crash.describe_death('llama-quantize', f'quantizing to {name}', -error.returncode)}")
        sys.exit(
            f"error: llama-quantize: {(error.output.decode(errors='replace').strip().splitlines() or ['no reason given'])[-1]}"
        )
    finally:
        unfinished.unlink(missing_ok=True)


def make_questions() -> list[Question]:
    """Texts like those that the model was trained on, worded as there, so that it answers in whole sentences by itself; what it is
    asked for is drawn anew for each."""
    rng = np.random.default_rng(20241)
    questions = []
    for _ in range(N_QUESTIONS):
        puzzle = find_task("multi-key").puzzle(WordSource(rng, held_out=False))
        filler = take(Haystack().sentences(rng), N_CHARS, len)
        text = " ".join(part.text for part in hide(rng, filler, [puzzle]))
        prompt = f"{USER}{text}\n{puzzle.question}{END}{ASSISTANT}"
        questions.append(Question(prompt, puzzle.question, *puzzle.expected))
    return questions


def answer_all(file: Path, questions: list[Question]) -> dict[str, Run]:
    """Lets the file answer with full attention and as a hybrid, in turns, so that whatever else runs slows down both."""
    from lt_gguf import Llama  # note: it loads the native library, which may crash on a CPU that it wasn't compiled for

    models = {
        attention: Llama(str(file), streaming=streaming, verbose=False, **SETTINGS)
        for attention, streaming in (("full", "off"), ("hybrid", None))
    }
    given: dict[str, list[Answer]] = {attention: [] for attention in models}
    for question in questions:
        for attention, llm in models.items():
            given[attention].append(answer(llm, question.prompt))
    runs = {
        attention: Run(
            llm.kv_bytes()["total"],
            median(answer.prompt_speed for answer in given[attention]),
            median(answer.speed for answer in given[attention]),
            [answer.text for answer in given[attention]],
        )
        for attention, llm in models.items()
    }
    for llm in models.values():
        llm.close()
    return runs


def answer(llm: Llama, prompt: str) -> Answer:
    """Reads the prompt into an empty cache and answers greedily, then goes on writing to measure the speed."""
    tokens = llm.tokenize(prompt.encode(), special=True)
    llm.reset()
    start = time.perf_counter()
    llm.eval(tokens)
    prompt_seconds = time.perf_counter() - start
    text: list[int] = []
    start = time.perf_counter()
    for i in range(N_TIMED):
        token = llm.sample(temp=0)
        if len(text) == i and token != llm.token_eos():
            text.append(token)
        llm.eval([token])
    seconds = time.perf_counter() - start
    return Answer(llm.detokenize(text).decode(errors="replace").strip(), len(tokens) / prompt_seconds, N_TIMED / seconds)


def show_an_answer(questions: list[Question], runs: dict[str, Run]) -> None:
    """The first question, as an example."""
    console.print(f"[bold]For example[/bold], after a text of {len(questions[0].prompt)} characters: {questions[0].asked}")
    for attention, run in runs.items():
        console.print(f"  {attention:6} [italic]{run.answers[0]}[/italic]")


if __name__ == "__main__":
    main()
