"""A whole evaluation: the same questions and texts for the full model and for hybrids of one file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lt_gguf.calibration import Texts
from lt_gguf.evaluation import divergence
from lt_gguf.evaluation.divergence import Means, Sample
from lt_gguf.evaluation.haystack import Haystack, haystack_of
from lt_gguf.evaluation.results import Journal
from lt_gguf.evaluation.retrieval import Question, hash_of, prompt_of, questions, run
from lt_gguf.evaluation.summary import FULL, TEXT

if TYPE_CHECKING:
    from lt_gguf.evaluation.scorer import Scorer

PREDICTED = 256  # last tokens of a text, which are predicted; of a short one its second half

# what is being done (the spec, `None` where all are measured together; and a text), records so far, records in all
Progress = Callable[[str | None, str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is asked of each model.

    Args:
        tasks: names of `tasks.TASKS`.
        lengths: of prompts and of texts, in tokens.
        depths: where needles stand, from 0 to 1.
        samples: prompts for each task, length and depth.
        text_samples: texts for each length.
        on_text: whether it is also measured how texts are predicted.
        seed: of the prompts.
        fast: see `retrieval.run`.
        haystack: what needles are hidden in; `None`: stories.

    Raises:
        ValueError: there is no such task, or a number is out of range.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    text_samples: int = 1
    on_text: bool = False
    seed: int = 0
    fast: bool = False
    haystack: Texts | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: must be at least 0")
        if self.text_samples < 1:
            raise ValueError(f"samples of text = {self.text_samples}: must be at least 1")
        self.questions()

    def questions(self) -> list[Question]:
        """What is asked in tasks."""
        return questions(self.tasks, self.lengths, self.depths, self.samples)

    def text_questions(self, length: int) -> list[Question]:
        """The keys of what is measured on texts of one length."""
        return [Question(TEXT, length, None, index) for index in range(self.text_samples)] if self.on_text else []

    def n_records(self, n_specs: int) -> int:
        """How many records that makes."""
        return n_specs * (len(self.questions()) + sum(len(self.text_questions(length)) for length in self.lengths))

    def settings(self, texts: Texts) -> dict[str, Any]:
        """What decides what a record says; tasks, lengths and the like say only which ones there are."""
        scoring = "most likely tokens of the right answer" if self.fast else "generated answer"
        # note: which texts these are depends on their number
        text = {"name": texts.name, "sha256": texts.sha256, "samples": self.text_samples}
        settings = {"seed": self.seed, "scoring": scoring, "text": text}
        if self.haystack is not None:
            settings["haystack"] = {"name": self.haystack.name, "sha256": self.haystack.sha256}
        return settings


def evaluate(
    scorer: Scorer, specs: Sequence[str], plan: Plan, texts: Texts, journal: Journal, progress: Progress | None = None
) -> None:
    """Measures what `journal` doesn't have yet. It can be stopped at any time and called again.

    Args:
        scorer: of the file, which `reads_once` where several are compared; afterwards one of `specs` is in force.
        specs: texts of what streams, `FULL` among them if hybrids are to be compared with the full model.
        texts: what is predicted, if the plan has samples of it.
        progress: called when something is done.

    Raises:
        ValueError: a length is too small for a task or there is too little text for it; the model can't stream as asked.
        OSError: a record can't be written.
    """
    total = plan.n_records(len(specs))
    asked = plan.questions()
    done = 0

    def report(spec: str | None, what: str, n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(spec, what, done, total)

    haystack = Haystack() if plan.haystack is None else haystack_of(plan.haystack.documents)
    for task in plan.tasks:  # what doesn't fit is said before hours of measuring
        prompt_of(scorer, next(q for q in asked if (q.task, q.length) == (task, min(plan.lengths))), plan.seed, haystack)
    for spec in specs:
        report(spec, "tasks", sum((spec, question) in journal.records for question in asked))
    for group, spec in _in_turn(scorer, specs, asked):
        missing = [question for question in group if (spec, question) not in journal.records]
        if missing:
            scorer.with_streaming(spec)
        for answer in run(scorer, missing, plan.seed, haystack, plan.fast):
            journal.add(spec, answer.question, score=answer.score, prompt=answer.prompt)
            report(spec, f"{answer.question.task}, {answer.question.length:,} tokens", 1)
    for length in plan.lengths if plan.on_text else ():
        of_length = plan.text_questions(length)
        to_predict = {(spec, question) for spec in specs for question in of_length} - journal.records.keys()
        what = f"text, {length:,} tokens"
        report(None, what, len(specs) * len(of_length) - len(to_predict))
        if to_predict:
            for spec, question, means, prompt in _predict(scorer, specs, texts, of_length, to_predict):
                journal.add(spec, question, **means._asdict(), prompt=prompt)
                report(None, what, (spec, question) in to_predict)


def _in_turn(scorer: Scorer, specs: Sequence[str], asked: Sequence[Question]) -> Iterator[tuple[Sequence[Question], str]]:
    """What is asked of which model next: of those that share their prompts as many questions as `scorer` holds at a time, so that these
    are read once; of others everything, because each of them has a context of its own."""
    sharing = [spec for spec in specs if scorer.shares(spec)]
    n = scorer.options.n_parallel
    for begin in range(0, len(asked), n):
        yield from ((asked[begin : begin + n], spec) for spec in sharing)
    yield from ((asked, spec) for spec in specs if spec not in sharing)


def _predict(
    scorer: Scorer, specs: Sequence[str], texts: Texts, asked: Sequence[Question], missing: Collection[tuple[str, Question]]
) -> Iterator[tuple[str, Question, Means, str]]:
    """What each spec makes of the texts of one length of which something is missing, with a hash of the text's tokens."""
    length = asked[0].length
    n_predicted = min(PREDICTED, length // 2)
    samples = divergence.text_samples(scorer, texts, len(asked), length - n_predicted, n_predicted)
    wanted = [question for question in asked if any((spec, question) in missing for spec in specs)]
    samples = [samples[question.index] for question in wanted]
    hybrids = [spec for spec in specs if spec != FULL]
    measured = _compare(scorer, hybrids, samples) if hybrids else _predict_with_full(scorer, samples)
    for question, (prompt, continuation), by_spec in zip(wanted, samples, measured, strict=True):
        for spec in specs:
            yield spec, question, by_spec[spec], hash_of([*prompt, *continuation])


def _compare(scorer: Scorer, hybrids: Sequence[str], samples: Sequence[Sample]) -> Iterator[dict[str, Means]]:
    for comparisons in divergence.measure(scorer, hybrids, samples, FULL):
        means = [comparison.means for comparison in comparisons]
        yield dict(zip(hybrids, means, strict=True)) | {FULL: _full_means(means[0].full_nll)}


def _predict_with_full(scorer: Scorer, samples: Sequence[Sample]) -> Iterator[dict[str, Means]]:
    scorer.with_streaming(FULL)
    for (_, continuation), logprobs in zip(samples, scorer.logprobs(samples), strict=True):
        yield {FULL: _full_means(-float(logprobs[np.arange(len(continuation)), continuation].mean(dtype=np.float64)))}


def _full_means(nll: float) -> Means:
    """The full model compared with itself."""
    return Means(kl=0.0, same_top=1.0, full_nll=nll, hybrid_nll=nll)
