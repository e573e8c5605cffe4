"""Measures candidates, sets of layers that might stream, on the patched runtime: what strategies that measure are given.

Each is run on the same prompts as the full model: calibration texts, whose last tokens are decoded, and generated puzzles, whose
answers stand further back than a streaming layer sees.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lt_gguf.calibration import Texts, cut_samples
from lt_gguf.evaluation.divergence import kl_divergence
from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import Tokenizer, make_prompt
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.selection.evidence import Evidence, Measurement
from lt_gguf.spec import StreamingSpec

if TYPE_CHECKING:
    from lt_gguf.evaluation.scorer import Scorer, ScorerOptions

Progress = Callable[[str, int, int], None]  # what is being done, prompts done, of how many

DEFAULT_PUZZLES = 20
DECODED = 64  # tokens of a text that are compared: its last ones
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """A prompt and how it goes on.

    Args:
        prompt: tokens that are read as a prompt.
        continuation: tokens that are decoded after it.
        spans: parts [begin, end) of the continuation that can only be looked up in the prompt, if it is a puzzle's.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def compared(self) -> np.ndarray:
        """Which tokens of the continuation count: of a puzzle's the looked-up ones, else all. bool (continuation,)"""
        which = np.full(len(self.continuation), not self.spans)
        for begin, end in self.spans:
            which[begin:end] = True
        return which

    def score(self, log_probs: np.ndarray) -> float:
        """Share of the spans whose every token is the most likely one, by log-probabilities (continuation, n_vocab)."""
        right = log_probs.argmax(axis=1) == self.continuation
        return sum(bool(right[begin:end].all()) for begin, end in self.spans) / len(self.spans)


class RuntimeBench:
    """Compares hybrids with their full model on the same samples.

    The full model's log-probabilities are kept in a file that the system removes; a set of layers is run once, however
    often it is asked for.

    Args:
        scorer: of the model.
        spec: what a streaming layer sees, and how prompts are read; its layers don't count.
        samples: at least one text and one puzzle.
        done: is called after each prompt with the number of tokens that were run.
    """

    def __init__(
        self, scorer: Scorer, spec: StreamingSpec, samples: Sequence[Sample], done: Callable[[int], None] = lambda n: None
    ) -> None:
        self._scorer, self._spec, self._samples, self._done = scorer, spec, samples, done
        self._full: list[np.ndarray] = []  # for each sample: (compared tokens, n_vocab)
        self._found: dict[tuple[int, ...], Evidence] = {}

    @property
    def runs(self) -> int:
        """How many sets of layers were run."""
        return len(self._found)

    def measure(self, layers: tuple[int, ...]) -> Evidence:
        """Runs all samples with these streaming layers; with none, it is the full model.

        Raises:
            ValueError: the model can't stream so, or a sample doesn't fit the context.
        """
        spec = replace(self._spec, layers=layers)
        if spec.layers not in self._found:
            if spec.layers:
                self.measure(())
            else:
                self._full = self._room()
            self._found[spec.layers] = self._run(spec)
        return self._found[spec.layers]

    def _run(self, spec: StreamingSpec) -> Evidence:
        self._scorer.with_streaming(spec)
        of_texts, of_answers, scores = [], [], []
        outputs = self._scorer.logprobs((sample.prompt, sample.continuation) for sample in self._samples)
        for sample, full, log_probs in zip(self._samples, self._full, outputs, strict=True):
            compared = log_probs[sample.compared]
            if not spec.layers:
                full[:] = compared
            divergence = kl_divergence(full, compared)
            if sample.spans:
                of_answers.append(divergence)
                scores.append(sample.score(log_probs))
            else:
                of_texts.append(divergence)
            self._done(len(sample.prompt) + len(sample.continuation))
        kl_text, kl_answer = (float(np.concatenate(parts).mean()) for parts in (of_texts, of_answers))
        return Evidence(kl_text, kl_answer, tuple(scores))

    def _room(self) -> list[np.ndarray]:
        n_tokens = [int(sample.compared.sum()) for sample in self._samples]
        # note: 0.6 MB a token with a vocabulary of 150,000
        everything = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=(sum(n_tokens), self._scorer.n_vocab))  # noqa: SIM115 (closed with the array)
        return np.split(everything, np.cumsum(n_tokens)[:-1])


class RuntimeCandidates:
    """Two benches with different prompts on one loaded model, and an account of what they run.

    Args:
        scorer: of the model.
        spec: what a streaming layer sees, and how prompts are read; its layers don't count.
        texts: calibration texts.
        samples: prompts of each bench that are cut out of them.
        puzzles: generated prompts of each bench, of all tasks of the evaluation in turn.
        length: tokens of each prompt with its continuation.
        progress: is called with what is announced, and after each prompt.

    Raises:
        ValueError: a number is out of range, there is too little text, or a puzzle is longer than `length`.
    """

    def __init__(
        self,
        scorer: Scorer,
        spec: StreamingSpec,
        texts: Texts,
        *,
        samples: int,
        puzzles: int,
        length: int,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        check_puzzles(puzzles)
        if scorer.n_ctx_train and length > scorer.n_ctx_train:
            raise ValueError(f"calibration length = {length}: must be at most the model's context of {scorer.n_ctx_train}")
        self._texts, self._progress = texts, progress
        self._n_texts, self._n_puzzles, self._length = samples, puzzles, length
        self._prompts = self._tokens = 0
        self._announced, self._to_do = "", 0
        of_texts = text_samples(scorer, texts, 2 * samples, length)
        choosing, judging = (puzzle_samples(scorer, spec, puzzles, length, [_SEED, i]) for i in range(2))
        self.choosing = RuntimeBench(scorer, spec, [*of_texts[::2], *choosing], self._count)
        self.judging = RuntimeBench(scorer, spec, [*of_texts[1::2], *judging], self._count)

    def announce(self, runs: int) -> None:
        """Tells the progress display how much is to be run at most."""
        n = self._n_texts + self._n_puzzles
        self._announced = f"candidates: up to {runs} runs of {n} prompts of {self._length:,} tokens"
        self._to_do = self._prompts + runs * n
        self._progress(self._announced, self._prompts, self._to_do)

    @property
    def measurement(self) -> Measurement:
        """What has been run until now, by both benches."""
        data = self._texts.name, self._texts.sha256
        runs = self.choosing.runs + self.judging.runs
        return Measurement(*data, self._n_texts, self._n_puzzles, self._length, runs, self._prompts, self._tokens)

    def _count(self, n_tokens: int) -> None:
        self._prompts += 1
        self._tokens += n_tokens
        self._progress(self._announced, self._prompts, self._to_do)


@contextmanager
def open_candidates(
    file: Path,
    spec: StreamingSpec,
    texts: Texts,
    *,
    samples: int,
    puzzles: int,
    length: int,
    options: ScorerOptions | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[RuntimeCandidates]:
    """Loads a GGUF file for as long as the with block lasts. The arguments are those of `RuntimeCandidates`.

    Raises:
        ValueError: as `Scorer` and `RuntimeCandidates` do.
    """
    from lt_gguf.evaluation.scorer import Scorer, ScorerOptions

    with Scorer(file, "off", options or ScorerOptions()) as scorer:
        yield RuntimeCandidates(scorer, spec, texts, samples=samples, puzzles=puzzles, length=length, progress=progress)


def check_puzzles(puzzles: int) -> None:
    """Raises ValueError if so many can't be asked."""
    if puzzles < 1:
        raise ValueError(f"puzzles = {puzzles}: must be at least 1")


def text_samples(tokenizer: Tokenizer, texts: Texts, n: int, length: int) -> list[Sample]:
    """`n` samples cut out of texts, spread evenly over them; at most a quarter of each is decoded.

    Raises:
        ValueError: as `cut_samples` does.
    """
    n_decoded = min(DECODED, length // 4)
    prompts = cut_samples(texts, lambda text: tokenizer.tokenize(text, special=True), tokenizer.bos, n, length)
    return [Sample(tuple(tokens[:-n_decoded]), tuple(tokens[-n_decoded:])) for tokens in prompts]


def puzzle_samples(tokenizer: Tokenizer, spec: StreamingSpec, n: int, length: int, seed: Sequence[int]) -> list[Sample]:
    """`n` puzzles of all tasks in turn, whose needles are spread over what streaming layers don't see at the end.

    Their keys and wordings are not those that an evaluation asks for: what is chosen here can be evaluated there.

    Raises:
        ValueError: a puzzle is longer than `length`.
    """
    tasks = list(TASKS.values())
    far = max(0.0, 1 - spec.window / length)
    samples = []
    for i in range(n):
        rng = np.random.default_rng([*seed, i])
        depth = far * (i + 0.5) / n
        prompt = make_prompt(tokenizer, tasks[i % len(tasks)], rng, length, depth, Haystack(), held_out=False)
        # note: the answer's given beginning is decoded, as if the model had written it (see `Prompt.n_given`)
        spans = tuple((prompt.n_given + begin, prompt.n_given + end) for begin, end in prompt.spans)
        samples.append(Sample(prompt.prompt, (*prompt.given, *prompt.answer), spans))
    return samples
