"""A plugin of `llm`, the command-line tool: `llm -m lt-gguf/smollm2 "Hello!"` answers with our runtime.

llm finds it by the entry point `llm` of the installed package, and imports it when it lists its models; the native library is loaded
with the first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

from lt_gguf import models

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

PREFIX = "lt-gguf/"


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Each named model, and `lt-gguf/file` for a GGUF file or a model on the hub, as `-o file model.gguf`."""
    for name in models.MODELS:
        register(HybridModel(name))
    register(HybridModel(None))


class HybridModel(llm.Model):
    """A model that stays loaded as long as the process asks it the same way.

    Args:
        name: one of `lt_gguf.models.MODELS`; `None`: what the option `file` says.
    """

    can_stream = True

    class Options(llm.Options):
        """What `-o NAME VALUE` takes."""

        file: str | None = Field(description="GGUF file, or a model on the hub as ORG/NAME:Q4_K_M", default=None)
        streaming: str | None = Field(description="Which layers stream: a spec, off, auto or auto:0.5", default=None)
        n_ctx: int | None = Field(description="Context in tokens; as large as memory allows if it isn't said", default=None)
        max_tokens: int | None = Field(description="Most tokens of an answer", default=None)
        temperature: float | None = Field(description="Temperature of sampling, 0: the most likely token", default=None)

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.model_id = f"{PREFIX}{name or 'file'}"
        self._loaded: tuple[tuple[Any, ...], Llama] | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Pieces of the answer. Raises llm.ModelError: the model can't be had, or can't answer."""
        try:
            llama = self._load(prompt.options)
            said = llama.create_chat_completion(
                messages(prompt, conversation),
                stream=True,
                max_tokens=prompt.options.max_tokens,
                temperature=0.8 if prompt.options.temperature is None else prompt.options.temperature,
            )
            for chunk in said:
                if text := chunk["choices"][0]["delta"].get("content"):
                    yield text
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise llm.ModelError(str(error)) from error

    def _load(self, options: Any) -> Llama:
        from lt_gguf.runtime.llama import Llama

        if self.name is None and not options.file:
            raise ValueError(f"{self.model_id}: needs -o file MODEL, a GGUF file or a model on the hub")
        how = (options.file or self.name, options.streaming, options.n_ctx)
        if self._loaded is None or self._loaded[0] != how:
            if self._loaded is not None:
                self._loaded[1].close()
                self._loaded = None
            file = models.resolve(str(how[0]))
            settings: dict[str, Any] = {"n_ctx": options.n_ctx or "auto", "flash_attn": True, "verbose": False}
            self._loaded = how, Llama(file, streaming=options.streaming, **settings)
        return self._loaded[1]


def messages(prompt: Any, conversation: Any) -> list[dict[str, str]]:
    """What was said before, and what is said now, as chat templates take it."""
    before = [] if conversation is None else conversation.responses
    said: list[dict[str, str]] = []
    for one in [*(response.prompt for response in before), prompt]:
        if one.system:  # the latest one holds
            said = [message for message in said if message["role"] != "system"]
            said.insert(0, {"role": "system", "content": one.system})
        said.append({"role": "user", "content": one.prompt})
        if one is not prompt:
            said.append({"role": "assistant", "content": before[sum(m["role"] == "assistant" for m in said)].text()})
    return said
