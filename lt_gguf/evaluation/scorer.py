"""`Scorer`: what a GGUF model says to many prompts, several at a time: log-probabilities of given answers, or its own answers.

Each request is a conversation of its own: a prompt, read as one, and an answer, decoded. With `prefill = full` that makes a
difference: only decoded tokens see what streaming layers have kept. So a prompt need be read only once for several hybrids.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lt_gguf.evaluation.context import DEFAULT_OPTIONS, ScorerOptions, ScoringContext
from lt_gguf.evaluation.variants import split_variant
from lt_gguf.runtime import api
from lt_gguf.runtime.batch import POSITION, SEQUENCE, batch_part
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.spec import AutoSpec, StreamingSpec, parse_running, runtime_text, with_cache_keep
from lt_gguf.spec.cache_types import CacheTypes, streaming_cache_type
from lt_gguf.spec.fields import is_auto

T = TypeVar("T")
Request = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its answer
Question = tuple[Sequence[int], int] | tuple[Sequence[int], int, Sequence[int]]  # a prompt, tokens, the answer's beginning
Keep = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of rows of log-probabilities and the tokens at their places

_N_CTX_STEP = 1024  # a context that grows grows by so many tokens, so that it rarely does

_NO_TOKENS = np.empty(0, np.int32)


def _keep_all(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return rows


class Scorer(TextModel):
    """A model, and a context in which requests are worked on. A context manager.

    Args:
        file: GGUF file, the first one of a split model.
        streaming: which layers stream, as for `lt_gguf.Llama`: `None`: what the file and the environment variable
            LT_STREAMING say; `"off"`: none; a spec or its text. `auto` takes n_parallel = 1.
        options: how the model is run.
        reads_once: the full model and hybrids with `prefill = full` share one context, in which streaming layers are only not shown
            what they would have dropped (`lt_context_hide`): the logits are the same, the cache is the full model's, and prompts
            that are asked again right away with another of them aren't read again.

    Raises:
        ValueError: the file can't be loaded, or its model can't stream as asked.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        streaming: StreamingSpec | AutoSpec | str | None = None,
        options: ScorerOptions = DEFAULT_OPTIONS,
        reads_once: bool = False,
    ) -> None:
        super().__init__(file, options.n_gpu_layers)
        self.options, self._reads_once = options, reads_once
        self._types = CacheTypes(options.cache_type_k, options.cache_type_v)
        self._context: ScoringContext | None = None
        self._hidden: StreamingSpec | None = None  # in place of streaming; `None`: the context really streams
        self._held: tuple[tuple[int, ...], ...] = ()  # prompts that it has
        self._held_rows = np.empty((0, 0), np.float32)  # and what comes next
        try:
            self._set_spec(streaming)
            self._make_context(options.n_ctx or _N_CTX_STEP)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the context and the model. Nothing else can be done afterwards."""
        self._free_context()
        super().close()

    # -- what streams

    @property
    def spec(self) -> StreamingSpec | None:
        """Which layers stream, `None` if none does. Where they are chosen for the prompt: for the last one that was read."""
        if self._context is None or self._context.handle is None:
            return None
        if self._hidden is not None:
            return self._hidden if self._hidden.layers else None
        spec, _ = parse_running(api.context_spec(self._context.handle), self.n_layer)
        return spec if spec.layers else None

    def with_streaming(self, streaming: StreamingSpec | AutoSpec | str | None) -> None:
        """Goes on with another spec, on the same weights, or with a variant's text, which says the type of the KV cache, too. Iterators
        that haven't ended go on with it, too.

        Raises:
            ValueError: the model can't stream so.
        """
        was_hiding = self._hidden is not None
        before = self._types
        streaming, self._types = self._variant(streaming)
        self._set_spec(streaming)
        if was_hiding and self._types == before and self._hidden is not None and self._context is not None:
            self._hide(self._hidden)
        else:
            self._make_context(self._n_ctx)

    def shares(self, streaming: StreamingSpec | AutoSpec | str | None) -> bool:
        """Whether its prompts are those of the full model with the same type of cache. Raises ValueError: the model can't stream so."""
        spec, types = self._variant(streaming)
        return self._hideable(self._resolve(spec), types) is not None

    def _variant(
        self, streaming: StreamingSpec | AutoSpec | str | None
    ) -> tuple[StreamingSpec | AutoSpec | str | None, CacheTypes]:
        """A variant's spec, and its types of K and V."""
        spec, types = split_variant(streaming) if isinstance(streaming, str) else (streaming, None)
        return spec, types or CacheTypes(self.options.cache_type_k, self.options.cache_type_v)

    def _set_spec(self, spec: StreamingSpec | AutoSpec | str | None) -> None:
        text = self._resolve(spec)
        self._chooses = is_auto(text)
        self._context_spec: str | None = str(with_cache_keep(api.HIDE_LATER, self.options.cache_keep))
        self._hidden = self._hideable(text, self._types) if self._reads_once else None
        if self._hidden is None:
            kept = with_cache_keep(spec, self.options.cache_keep)
            self._context_spec = None if kept is None else runtime_text(kept)

    def _hideable(self, text: str, types: CacheTypes) -> StreamingSpec | None:
        """A spec that only decoding depends on, with a cache of these types, not what prompts leave behind; `None`: another one."""
        if is_auto(text):
            return None
        spec = StreamingSpec.parse(text, self.n_layer)
        is_same = all(
            streaming_cache_type(full, spec.type) == full for full in types
        )  # note: hidden keys have the full layers' type
        return spec if (spec.prefill == "full" and is_same) or not spec.layers else None

    def _resolve(self, spec: StreamingSpec | AutoSpec | str | None) -> str:
        """What the runtime makes of a spec: its text with all keys."""
        if spec is not None and not isinstance(spec, (str, StreamingSpec, AutoSpec)):
            raise ValueError(f'streaming = {spec!r}: must be a StreamingSpec, an AutoSpec, a string, "off" or None')
        if isinstance(spec, StreamingSpec) and spec.n_layer != self.n_layer:
            raise ValueError(f"streaming: is for a model of {spec.n_layer} layers, must be for {self.n_layer}")
        spec = with_cache_keep(spec, self.options.cache_keep)
        try:
            api.set_model_spec(self.handle, None if spec is None else runtime_text(spec))
        except ValueError as error:
            raise ValueError(f"streaming: {error}") from None
        return api.model_spec(self.handle)

    def _hide(self, spec: StreamingSpec) -> None:
        assert self._context is not None and self._context.handle is not None
        api.context_hide(self._context.handle, spec)

    # -- requests

    def logprobs(self, requests: Iterable[Request], keep: Keep = _keep_all) -> Iterator[np.ndarray]:
        """The log-probabilities of what comes at the place of each token of an answer, after the prompt and the answer so far.

        Args:
            requests: prompts, of at least a token, and answers.
            keep: what is kept of the log-probabilities of a few places, float32 (places, n_vocab), and the answer's tokens
                there, int32 (places,): an array with a row for each place. By default everything, which is a lot where a
                large vocabulary meets long answers.

        Yields:
            what is kept, by default float32 (tokens of the answer, n_vocab), in the order of the requests.

        Raises:
            ValueError: a prompt is empty, doesn't fit the prompt limit, or doesn't fit n_ctx with its answer.
            RuntimeError: llama_decode failed.
        """
        for group in _groups(requests, self.options.n_parallel):
            yield from self._score(group, keep)

    def generate(
        self,
        requests: Iterable[Question],
        stop: Collection[int] = (),
        *,
        choose: Callable[[np.ndarray], int] = np.argmax,
        is_done: Callable[[list[int]], bool] = lambda answer: False,
    ) -> Iterator[list[int]]:
        """The model's own answers.

        Args:
            requests: prompts, of at least a token, most tokens of their answers, and maybe the beginning of an answer, which is
                decoded and not counted.
            stop: tokens that end an answer, and are no part of it.
            choose: gives the next token for log-probabilities, float32 (n_vocab,); by default the most likely one.
            is_done: whether an answer, of at least a token, is to end here.

        Yields:
            the tokens of an answer, without its given beginning, in the order of the requests.

        Raises:
            ValueError, RuntimeError: as for `logprobs`.
        """
        for group in _groups(requests, self.options.n_parallel):
            yield from self._answer(group, stop, choose, is_done)

    def _score(self, group: list[Request], keep: Keep) -> list[np.ndarray]:
        # note: an empty answer has no first token; what is kept for it is dropped
        first_tokens = np.array([answer[0] if len(answer) else 0 for _, answer in group], np.int32)
        rest_tokens = np.concatenate([np.asarray(answer[1:], np.int32) for _, answer in group])
        sizes = [len(answer) for _, answer in group]
        first = self._read([prompt for prompt, _ in group], sizes, keep, first_tokens)
        rest = self._continue([answer[:-1] for _, answer in group], [len(prompt) for prompt, _ in group], keep, rest_tokens)
        return [np.concatenate([first[seq, None], rest[seq]])[:size] for seq, size in enumerate(sizes)]

    def _answer(
        self,
        group: list[Question],
        stop: Collection[int],
        choose: Callable[[np.ndarray], int],
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        prompts, n_max, given = zip(*((*request, ())[:3] for request in group), strict=True)
        rows = self._read(prompts, [len(begun) + n for begun, n in zip(given, n_max, strict=True)])
        answers: list[list[int]] = [[] for _ in group]
        running = [seq for seq, n in enumerate(n_max) if n > 0]
        to_decode: list[Sequence[int]] = list(given)
        n_past = [len(prompt) for prompt in prompts]
        while running:
            for seq, new_rows in enumerate(self._continue(to_decode, n_past)):
                n_past[seq] += len(new_rows)
                if len(new_rows):
                    rows[seq] = new_rows[-1]
            to_decode, unfinished = [[] for _ in group], []
            for seq in running:
                token = int(choose(rows[seq]))
                if token in stop:
                    continue
                answers[seq].append(token)
                if len(answers[seq]) < n_max[seq] and not is_done(answers[seq]):
                    to_decode[seq] = [token]
                    unfinished.append(seq)
            running = unfinished
        return answers

    # -- batches

    def _read(
        self, prompts: Sequence[Sequence[int]], n_answer: list[int], keep: Keep = _keep_all, expected: np.ndarray = _NO_TOKENS
    ) -> np.ndarray:
        """Reads prompts into an empty context that has room for answers of so many tokens.

        Returns:
            what is kept, by default float32 (prompts, n_vocab): log-probabilities of what comes next.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a request's prompt is empty: must have at least one token, as the one that begins a text")
        # note: the last token of an answer is not computed
        self._need(max(len(prompt) + max(0, n - 1) for prompt, n in zip(prompts, n_answer, strict=True)))
        assert self._context is not None  # `_need` has made it
        asked = tuple(tuple(map(int, prompt)) for prompt in prompts)
        if self._held and asked == self._held:
            for seq, prompt in enumerate(asked):
                self._context.cut(seq, len(prompt))
            return keep(self._held_rows, expected)
        self._context.clear()
        self._held = ()
        wanted = [np.arange(len(prompt)) == len(prompt) - 1 for prompt in prompts]
        parts = [batch_part(prompt, 0, seq, wanted[seq]) for seq, prompt in enumerate(prompts)]
        rows = self._decode(np.concatenate(parts, axis=1), n_prompt=[len(prompt) for prompt in prompts])
        if self._hidden is not None:
            self._held, self._held_rows = asked, rows
        return keep(rows, expected)

    def _continue(
        self, tokens: Sequence[Sequence[int]], n_past: list[int], keep: Keep = _keep_all, expected: np.ndarray = _NO_TOKENS
    ) -> list[np.ndarray]:
        """Decodes tokens of each sequence after its first `n_past`: what is kept for each, by default log-probabilities of
        what comes after each token, float32 (tokens, n_vocab)."""
        parts = [batch_part(part, n_past[seq], seq, True) for seq, part in enumerate(tokens)]
        kept = self._decode(np.concatenate(parts, axis=1), keep, expected)
        return np.split(kept, np.cumsum([part.shape[1] for part in parts])[:-1])

    def _decode(
        self, tokens: np.ndarray, keep: Keep = _keep_all, expected: np.ndarray = _NO_TOKENS, n_prompt: Sequence[int] = ()
    ) -> np.ndarray:
        """Computes the tokens of an array for batches (4, any number).

        Args:
            keep: as for `logprobs`.
            expected: the tokens of answers at the places of those that are wanted, for `keep`.
            n_prompt: if they are prompts, their lengths. They are announced when they begin, so that streaming layers make
                room for all of one, but not for all of them at once.

        Returns:
            what is kept, by default float32 (those that are wanted, n_vocab): log-probabilities.
        """
        assert self._context is not None  # `_read` has made it
        n_at_once = self._context.n_at_once if len(n_prompt) else self._context.n_wanted_at_once
        kept = [keep(np.empty((0, self.n_vocab), np.float32), _NO_TOKENS)]
        for begin in range(0, tokens.shape[1], n_at_once):
            part = tokens[:, begin : begin + n_at_once]
            for seq in part[SEQUENCE, part[POSITION] == 0].tolist():
                self._context.begin_prompt(seq, n_prompt[seq])
            rows = self._context.compute(part)
            kept.append(keep(rows, expected[: len(rows)]))
            expected = expected[len(rows) :]
        return np.concatenate(kept)

    def _need(self, n_tokens: int) -> None:
        """Has a context with room for so many tokens in a sequence; a new one is empty."""
        if self.options.n_ctx and n_tokens > self.options.n_ctx:
            raise ValueError(f"a prompt and its answer take {n_tokens} tokens, must be at most n_ctx = {self.options.n_ctx}")
        if self._context is None or n_tokens > self._n_ctx:
            self._make_context(self.options.n_ctx or -(-n_tokens // _N_CTX_STEP) * _N_CTX_STEP)

    def _make_context(self, n_ctx: int) -> None:
        self._free_context()
        options = replace(self.options, cache_type_k=self._types.k, cache_type_v=self._types.v)
        if self._chooses and options.n_parallel > 1:
            raise ValueError(f"n_parallel = {options.n_parallel}: must be 1 where the layers are chosen for the prompt")
        api.set_model_spec(self.handle, self._context_spec)
        self._context = ScoringContext(self, options, n_ctx, options.n_parallel)
        self._n_ctx = n_ctx
        if self._hidden is not None:
            self._hide(self._hidden)

    def _free_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None
        self._held = ()


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group
