"""Hybrid models in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): the model `lt-gguf`.

    python -m lt_gguf.evaluation.lm_eval_cli run --model lt-gguf --model_args model=FILE.gguf,n_parallel=8 --tasks gsm8k

is the harness's own command with this model in it. Harness versions that find models by entry points (after 0.4.13) have it in
`lm_eval run`, too. In Python it is enough to import this module before `lm_eval.simple_evaluate`.

`--model_args` are those of `HybridLM`. The harness separates them by commas, so in a spec there are + instead:
`streaming=layers=1+3+5-9;sink=4;window=1020`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.scorer import Request, Scorer
from lt_gguf.models import resolve
from lt_gguf.models.remembered import chosen_for
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE

_logger = logging.getLogger(__name__)

DEFAULT_MAX_GEN_TOKS = 256  # the harness's own models have the same


@register_model("lt-gguf")
class HybridLM(LM):  # type: ignore[misc]  # the harness brings no types
    """A GGUF file whose flagged layers stream.

    What a task calls the context is read as a prompt, and the continuation is decoded. So with `prefill = full` streaming
    layers see all of the context, and the continuation sees what they have kept of it; in `loglikelihood_rolling` nearly
    everything is decoded.

    Args:
        model: path of the GGUF file, the first one of a split model, or a name as `lt_gguf.models.resolve` takes it.
        streaming: which layers stream, as for `lt_gguf.Llama`, but with + for the commas between layers.
        n_ctx: most tokens of a context and its continuation; 0: as many as the model was trained for. Of longer ones the
            first tokens are left out, but not the one that begins a text.
        n_parallel: requests that are worked on at a time; the harness's `batch_size` is the same.
        n_batch, n_threads, n_gpu_layers, cache_type_k, cache_type_v, flash_attn: as for `ScorerOptions`.
        cache_keep: the same, but with + for the commas between layers.
        max_gen_toks: most tokens of an answer, where the task doesn't say it.
        seed: of sampling, where a task asks for a temperature.
        batch_size, max_batch_size, device: from the harness; the last two have no effect.

    Raises:
        ValueError: an option is out of range, the file can't be loaded, or its model can't stream as asked.
    """

    def __init__(
        self,
        model: str,
        streaming: StreamingSpec | str | None = None,
        n_ctx: int = 0,
        n_parallel: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        cache_type_k: str = DEFAULT_CACHE_TYPE,
        cache_type_v: str = DEFAULT_CACHE_TYPE,
        cache_keep: int | str | None = None,
        flash_attn: bool = True,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if n_parallel is None:
            n_parallel = ScorerOptions.n_parallel if batch_size in (None, "auto") else int(batch_size)
        options = ScorerOptions(
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_batch=n_batch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            cache_type_k=cache_type_k,
            cache_type_v=cache_type_v,
            cache_keep=None if cache_keep is None else str(cache_keep).replace("+", ","),
            flash_attn=flash_attn,
        )
        file = resolve(model)
        chosen, unknown = chosen_for(file, streaming.replace("+", ",") if isinstance(streaming, str) else streaming)
        if unknown:
            raise ValueError(unknown)
        self._scorer = Scorer(file, chosen, options)
        self.max_length = n_ctx or self._scorer.n_ctx_train
        self.max_gen_toks = max_gen_toks
        self._random = np.random.default_rng(seed)

    def close(self) -> None:
        """Frees the model."""
        self._scorer.close()

    # -- what the harness asks for

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether greedy decoding gives it."""
        pairs = [self._fit(*self._encode_pair(*request.args)) for request in requests]
        results = self._score(pairs, "loglikelihood", disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text: its log-probability, in windows of `max_length` tokens which predict each token once. The first one
        follows the token that begins a text, the others what is before them: a token, the last one as much as fits."""
        windows: list[Request] = []
        ends: list[int] = []
        for request in requests:
            tokens = self._scorer.tokenize(request.args[0], special=True)
            rolling = get_rolling_token_windows(tokens, self._first_token, max_seq_len=self.max_length, context_len=1)
            windows += map(make_disjoint_window, rolling)
            ends.append(len(windows))
        scores = [score for score, _ in self._score(windows, "loglikelihood_rolling", disable_tqdm)]
        results = [sum(scores[begin:end]) for begin, end in zip([0, *ends], ends)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, generation arguments): the answer, up to the first of the strings in `until`."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for group in groups.values():
                arguments = requests[group[0]].args[1]
                contexts = [requests[i].args[0] for i in group]
                for i, answer in self._generate(contexts, arguments):
                    answers[group[i]] = answer
                    self.cache_hook.add_partial("generate_until", requests[group[i]].args, answer)
                    bar.update()
        return answers

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its cached requests apart by."""
        return self._scorer.file.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's, `None` if none is asked for.

        Raises:
            ValueError: the file has none.
        """
        if not chat_template:
            return None
        if self._scorer.chat_template is None:
            raise ValueError(f"{self._scorer.file}: has no chat template: evaluate it without --apply_chat_template")
        return self._scorer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat in the model's format. Without `add_generation_prompt` the last message is the beginning of an
        answer, and the text ends with it."""
        scorer = self._scorer
        end = [] if scorer.end_token is None else [scorer.end_token]
        formatter = load_llama_cpp().llama_chat_format.Jinja2ChatFormatter(
            template=self.chat_template(True),
            bos_token=scorer.detokenize(scorer.bos, special=True),
            eos_token=scorer.detokenize(end, special=True),
            add_generation_prompt=add_generation_prompt,
        )
        text = formatter(messages=chat_history).prompt
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        scorer = self._scorer
        return {"streaming": str(scorer.spec or "off"), "n_parallel": scorer.options.n_parallel, "max_length": self.max_length}

    # -- tokens

    @property
    def _first_token(self) -> int:
        """What a text without context follows."""
        scorer = self._scorer
        if scorer.bos:
            return scorer.bos[0]
        if scorer.end_token is None:
            raise ValueError(f"{scorer.file}: has no token that begins or ends a text: its first token has no probability")
        return scorer.end_token

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text, names of special tokens included; what begins a text is there once."""
        tokens, bos = self._scorer.tokenize(text, special=True), self._scorer.bos
        return tokens if tokens[: len(bos)] == bos else bos + tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in the harness's own models, spaces between them belong to the continuation."""
        stripped = context.rstrip()
        prompt = self._encode(stripped)
        answer = self._encode(context + continuation)[len(prompt) :]
        return prompt or [self._first_token], answer

    def _fit(self, prompt: list[int], answer: list[int], n_answer: int | None = None) -> Request:
        """The prompt without as many of its first tokens as makes room for the answer, or for one of `n_answer` tokens."""
        # note: the last token of an answer is not computed
        n_room = self.max_length + 1 - (len(answer) if n_answer is None else n_answer)
        if len(prompt) <= n_room:
            return prompt, answer
        bos = self._scorer.bos if prompt[:1] == self._scorer.bos else []
        if n_room <= len(bos):
            raise ValueError(
                f"an answer of {self.max_length + 1 - n_room} tokens leaves no room for its context: must have at most "
                f"{self.max_length - len(bos)}; give a larger n_ctx or a smaller max_gen_toks"
            )
        _logger.warning("a context of %d tokens is cut to its last %d", len(prompt), n_room)
        return bos + prompt[len(prompt) - n_room + len(bos) :], answer

    # -- work

    def _score(self, requests: Sequence[Request], name: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the most likely one) of the answers."""
        order = _longest_first(len(prompt) + len(answer) for prompt, answer in requests)
        results = [(0.0, True)] * len(requests)
        scores = self._scorer.logprobs((requests[i] for i in order), _log_probability_and_rank)
        for i, score in zip(order, tqdm(scores, name, len(requests), disable=disable_tqdm), strict=True):
            results[i] = float(score[:, 0].sum(dtype=np.float64)), bool(score[:, 1].all())
        return results

    def _generate(self, contexts: list[str], arguments: dict[str, Any]) -> Iterable[tuple[int, str]]:
        """(place in `contexts`, answer), in the order in which they are ready."""
        n_max = int(arguments.get("max_gen_toks", self.max_gen_toks))
        until = [text for text in _as_list(arguments.get("until")) if text]
        # note: special tokens have no text to look for
        named = [tokens[0] for text in until if len(tokens := self._scorer.tokenize(text, special=True)) == 1]
        stop = self._scorer.eos | {token for token in named if not self._scorer.detokenize([token])}
        prompts = [self._fit(self._encode(context) or [self._first_token], [], n_max)[0] for context in contexts]
        order = _longest_first(map(len, prompts))
        answers = self._scorer.generate(
            ((prompts[i], n_max) for i in order), stop, choose=self._chooser(arguments), is_done=self._ends_with_any(until)
        )
        for i, answer in zip(order, answers, strict=True):
            text = self._scorer.detokenize(answer)
            yield i, text[: min((text.find(end) for end in until if end in text), default=len(text))]

    def _ends_with_any(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether an answer has one of the strings at its end. (A token has at least a byte, but for special ones.)"""
        n_tokens = max((len(text.encode()) for text in until), default=0) + 1
        return lambda answer: any(text in self._scorer.detokenize(answer[-n_tokens:]) for text in until)

    def _chooser(self, arguments: dict[str, Any]) -> Callable[[np.ndarray], int]:
        """The most likely token, or with a temperature (and without `do_sample` = false) any of the `top_k` most likely, or of
        the most likely ones that have a probability of `top_p` together."""
        unknown = set(arguments) - {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
        if unknown:
            known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
            raise ValueError(f"generation argument {', '.join(sorted(unknown))}: unknown, must be one of {known}")
        temperature = float(arguments.get("temperature") or 0)
        if temperature <= 0 or arguments.get("do_sample") is False:
            return np.argmax
        top_k, top_p = int(arguments.get("top_k") or 0), float(arguments.get("top_p") or 1)
        return lambda row: _sample(self._random, row, temperature, top_k, top_p)


def _log_probability_and_rank(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float32 (places, 2): the log-probability of the token at each place, and whether it is the most likely one."""
    return np.stack([np.take_along_axis(rows, tokens[:, None], 1)[:, 0], rows.argmax(1) == tokens], axis=1)


def _sample(random: np.random.Generator, row: np.ndarray, temperature: float, top_k: int, top_p: float) -> int:
    order = np.argsort(-row, kind="stable")[: top_k or None]
    weights = np.exp((row[order] - row[order[0]]).astype(np.float64) / temperature)
    before = np.cumsum(weights) - weights  # those that are more likely
    weights[before >= top_p * weights.sum()] = 0
    return int(random.choice(order, p=weights / weights.sum()))


def _longest_first(sizes: Iterable[int]) -> list[int]:
    """An order in which neighbours have about the same size, and what takes the most memory comes first."""
    return [i for i, _ in sorted(enumerate(sizes), key=lambda item: -item[1])]


def _as_list(until: str | list[str] | None) -> list[str]:
    return [until] if isinstance(until, str) else list(until or [])
