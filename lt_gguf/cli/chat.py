"""`lt-gguf chat`: talk with a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer

from lt_gguf.cli import model
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.spec import format_layers

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

HELP = (
    "/retry answers again, /edit TEXT replaces your last message, /undo forgets it and its answer, /reset begins anew, "
    "/exit or Ctrl-D leaves, Ctrl-C stops an answer"
)


@model.takes_options(model.RunOptions)
def chat(
    file: model.ModelOrDefault = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the model is told first.")] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens of an answer; -1: no limit.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    snapshot_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory for going back to an earlier message without reading all again; 0: none. Else 512MiB.",
        ),
    ] = None,
    *,
    options: model.RunOptions,
) -> None:
    """Chat with a GGUF model. Answers go to stdout, everything else to stderr."""
    from lt_gguf.runtime.log import captured_errors

    file = model.find(file)
    with captured_errors(forward=options.verbose):
        llm = model.load(file, options, snapshot_limit)
        conversation = Conversation(llm, system, n_predict, temperature)

        @cache
        def full_kv() -> int:
            shape = read_model(file).kv_shape
            return kv_memory(shape, None, llm.n_ctx(), type_k=options.cache_type, flash_attn=options.flash_attn).total

        say(f"{describe_memory(llm, full_kv)} · {model.describe_threads(llm.n_threads)}")
        if "tokenizer.chat_template" not in llm.metadata:
            say(f"the file has no chat template, using {llm.chat_format}")
        say(HELP)
        while (line := read_line()) is not None:
            if line == "/exit":
                break
            answered = conversation.obey(line)
            if answered:
                say(f"{answered} · {describe_memory(llm, full_kv)}")


class Conversation:
    """The messages so far, and how the next answer is made."""

    def __init__(self, llm: Llama, system: str | None, n_predict: int, temperature: float) -> None:
        self.llm = llm
        self.system = system
        self.n_predict = n_predict
        self.temperature = temperature
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def obey(self, line: str) -> str | None:
        """Does what a line asks for: a command, or a message to answer. Returns a line about an answer, if one was made."""
        command, _, text = line.partition(" ")
        if command == "/edit" and text.strip():
            return self.edit(text.strip())
        if command == "/edit":
            say("/edit TEXT: give the message that replaces your last one")
        elif line == "/retry":
            return self.retry()
        elif line == "/undo":
            say("the last message is forgotten" if self.undo() else "there is no message to forget")
        elif line == "/reset":
            self.reset()
            say("the conversation begins anew")
        elif line == "/help":
            say(HELP)
        elif line:
            return self.answer(line)
        return None

    def undo(self) -> bool:
        """Forgets the last message and its answer; false if there is none."""
        last = self._last_message()
        if last is None:
            return False
        del self.messages[last:]
        return True

    def retry(self) -> str | None:
        """Answers the last message once more."""
        last = self._last_message()
        if last is None:
            say("there is no message to answer again")
            return None
        return self._answer(self.messages[: last + 1])

    def edit(self, text: str) -> str | None:
        """Answers `text` in place of the last message."""
        last = self._last_message()
        if last is None:
            say("there is no message to replace")
            return None
        return self._answer([*self.messages[:last], {"role": "user", "content": text}])

    def answer(self, text: str) -> str:
        """Prints the answer to `text` while it is made; returns a line about it. Ctrl-C ends it."""
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def _last_message(self) -> int | None:
        """Index of the user's last message."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)

    def _answer(self, messages: list[dict[str, str]]) -> str:
        """Answers the last one of `messages`, which then are the conversation; it stays as it was if they don't fit."""
        words: list[str] = []
        read_before = self.llm.n_read
        first: tuple[int, float] | None = None  # tokens in the context, and the time, when the prompt has been read
        ended = ""
        try:
            for chunk in self.llm.create_chat_completion(
                messages, max_tokens=self.n_predict, temperature=self.temperature, stream=True
            ):
                first = first or (self.llm.n_tokens, time.monotonic())
                choice = chunk["choices"][0]
                if word := choice["delta"].get("content"):
                    words.append(word)
                    print(word, end="", flush=True)
                if choice["finish_reason"] == "length":
                    ended = " (cut off: the context is full)" if self._is_full() else " (cut off)"
        except KeyboardInterrupt:
            ended = " (stopped)"
        except ValueError as error:  # the prompt doesn't fit the context
            return f"error: {error}; /reset begins anew, --ctx makes it larger"
        print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": "".join(words)}]
        read = f" · read {self.llm.n_read - read_before} tokens"
        rate = ""
        if first and self.llm.n_tokens > first[0]:
            rate = f" · {(self.llm.n_tokens - first[0]) / (time.monotonic() - first[1]):.1f} tokens/s"
        return f"{self.llm.n_tokens} of {self.llm.n_ctx()} tokens{read}{rate}{ended}"

    def _is_full(self) -> bool:
        return self.llm.n_tokens >= self.llm.n_ctx() - 1


def describe_memory(llm: Llama, full_kv: Callable[[], int]) -> str:
    """The KV memory of this context, beside the `full_kv()` bytes of the same model without streaming layers."""
    used = llm.kv_bytes()["total"]
    if llm.streaming is None:
        return f"KV {format_bytes(used)}, no layer streams{' yet' if llm.auto else ''}"
    chosen = f", layers {format_layers(llm.streaming.layers)} stream" if llm.auto else ""
    return f"KV {format_bytes(used)} hybrid, {format_bytes(full_kv())} full ({1 - used / full_kv():.0%} saved){chosen}"


def read_line() -> str | None:
    """The next line of the user, `None` at the end."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - input() then has line editing and a history

            return input("> ").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        return None


def say(line: str) -> None:
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{line}{plain}", file=sys.stderr, flush=True)
