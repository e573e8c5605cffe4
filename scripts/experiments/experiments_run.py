"""Asks many hybrids the same questions: on the patched runtime, or in torch where the prompt is read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lt_gguf.evaluation.results import Journal
from lt_gguf.evaluation.retrieval import Question, hash_of, prompt_of, questions, run
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.evaluation.summary import FULL
from lt_gguf.hf.shared_prefill import CheckpointScorer
from lt_gguf.spec import StreamingSpec

SEED = 1
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ONE_PLACE = ("single", "multi-key")  # tasks with one needle to find, at each of DEPTHS
ANYWHERE = ("multi-query", "variable-tracking", "votes")

Progress = Callable[[str, int, int], None]


def all_questions(samples: int, length: int) -> list[Question]:
    """`samples` of each task; of those with one needle, a fifth of them at each depth. Tasks and depths in turn, so that an
    unfinished run has some of each."""
    asked = [
        *questions(ONE_PLACE, [length], DEPTHS, -(-samples // len(DEPTHS))),
        *questions(ANYWHERE, [length], (), samples),
    ]
    return sorted(asked, key=lambda question: (turn_of(question), question.task, question.depth or 0.0))


def turn_of(question: Question) -> int:
    """After how many others of its task it is asked; those at all depths together."""
    return question.index * (1 if question.depth is None else len(DEPTHS))


def ask_runtime(scorer: Scorer, specs: Sequence[str], asked: Sequence[Question], journal: Journal, progress: Progress) -> None:
    """Asks what `journal` doesn't have, one spec after the other, each prompt read again for each."""
    for spec in specs:
        missing = [question for question in asked if (spec, question) not in journal.records]
        if not missing:
            continue
        scorer.with_streaming(spec)
        for done, answer in enumerate(run(scorer, missing, SEED, fast=True), 1):
            journal.add(spec, answer.question, score=answer.score, prompt=answer.prompt)
            progress(spec, done, len(missing))


def ask_shared(
    scorer: CheckpointScorer, specs: Sequence[str], asked: Sequence[Question], journal: Journal, progress: Progress
) -> None:
    """The same in torch, one question after the other, each prompt read once. `score_tokens` is that of `fast` scoring."""
    parsed = {spec: None if spec == FULL else StreamingSpec.parse(spec, scorer.n_layer) for spec in specs}
    for done, question in enumerate(asked, 1):
        missing = [spec for spec in specs if (spec, question) not in journal.records]
        if missing:
            prompt = prompt_of(scorer, question, SEED)
            answer = (*prompt.given, *prompt.answer)
            found = scorer.logprobs(prompt.prompt, answer, [parsed[spec] for spec in missing])
            for spec, logprobs in zip(missing, found, strict=True):
                score = prompt.score_tokens(np.argmax(logprobs[prompt.n_given :], axis=1).tolist())
                journal.add(spec, question, score=score, prompt=hash_of(prompt.tokens))
        progress(f"{len(specs)} hybrids", done, len(asked))
