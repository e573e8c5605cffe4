"""`lt-gguf chat`: talk with a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from lt_gguf.cli import model
from lt_gguf.cli.common import format_bytes
from lt_gguf.kv_memory import DEFAULT_CACHE_TYPE, kv_memory

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    file: model.ModelFile,
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the model is told first.")] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens of an answer; -1: no limit.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    seed: model.Seed = -1,
    ctx: model.Context = model.DEFAULT_CONTEXT,
    streaming: model.Streaming = None,
    cache_type: model.CacheType = DEFAULT_CACHE_TYPE,
    threads: model.Threads = 0,
    n_gpu_layers: model.GpuLayers = -1,
    batch_size: model.BatchSize = model.DEFAULT_BATCH_SIZE,
    flash_attn: model.FlashAttention = True,
    verbose: model.Verbose = False,
) -> None:
    """Chat with a GGUF model. Answers go to stdout, everything else to stderr."""
    from lt_gguf.runtime.log import captured_errors

    with captured_errors(forward=verbose):
        llm = model.load(
            file,
            ctx=ctx,
            streaming=streaming,
            cache_type=cache_type,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            batch_size=batch_size,
            flash_attn=flash_attn,
            seed=seed,
            verbose=verbose,
        )
        conversation = Conversation(llm, system, n_predict, temperature)
        memory = describe_memory(llm, file, cache_type, flash_attn)
        say(memory)
        if "tokenizer.chat_template" not in llm.metadata:
            say(f"the file has no chat template, using {llm.chat_format}")
        say(HELP)
        while (line := read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                conversation.reset()
                say("the conversation begins anew")
            elif line == "/help":
                say(HELP)
            elif line:
                say(f"{conversation.answer(line)} · {memory}")


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

    def answer(self, text: str) -> str:
        """Prints the answer to `text` while it is made; returns a line about it. Ctrl-C ends it."""
        self.messages.append({"role": "user", "content": text})
        words: list[str] = []
        first: tuple[int, float] | None = None  # tokens in the context, and the time, when the prompt has been read
        ended = ""
        try:
            for chunk in self.llm.create_chat_completion(
                self.messages, max_tokens=self.n_predict, temperature=self.temperature, stream=True
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
            self.messages.pop()
            return f"error: {error}; /reset begins anew, --ctx makes it larger"
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(words)})
        rate = ""
        if first and self.llm.n_tokens > first[0]:
            rate = f" · {(self.llm.n_tokens - first[0]) / (time.monotonic() - first[1]):.1f} tokens/s"
        return f"{self.llm.n_tokens} of {self.llm.n_ctx()} tokens{rate}{ended}"

    def _is_full(self) -> bool:
        return self.llm.n_tokens >= self.llm.n_ctx() - 1


def describe_memory(llm: Llama, file: str, cache_type: str, flash_attn: bool) -> str:
    """The KV memory of this context, beside that of the same model without streaming layers."""
    used = llm.kv_bytes()["total"]
    if llm.streaming is None:
        return f"KV {format_bytes(used)}, no layer streams"
    shape = model.read_model(file).kv_shape
    full = kv_memory(shape, None, llm.n_ctx(), type_k=cache_type, flash_attn=flash_attn).total
    return f"KV {format_bytes(used)} hybrid, {format_bytes(full)} full ({1 - used / full:.0%} saved)"


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
