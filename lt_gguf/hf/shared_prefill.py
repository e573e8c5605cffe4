"""Many hybrids of one checkpoint asked the same question: the prompt is read once, for all of them.

With `prefill = full` all layers read a prompt with full attention, whatever streams after it. So what the layers keep of the
prompt is the same for every set of layers, sinks and window, and only the few tokens of an answer have to be computed for each.
The patched runtime reads the prompt again for each context; this gives the same log-probabilities (tested) in far less time
where dozens of hybrids are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lt_gguf.hf.decoder import cache_argument
from lt_gguf.hf.streaming_attention import streaming_attention
from lt_gguf.spec import StreamingSpec


class CheckpointScorer:
    """A Hugging Face checkpoint in memory, with the tokenizer's side of `lt_gguf.evaluation.prompts.Tokenizer`.

    Args:
        checkpoint: folder of the checkpoint.
        dtype: of weights and computation.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.n_layer: int = self.model.config.get_text_config(decoder=True).num_hidden_layers

    @cached_property
    def bos(self) -> list[int]:
        """The tokens that a text begins with."""
        return self._tokenizer("").input_ids

    @property
    def chat_template(self) -> str | None:
        """In Jinja, `None` if there is none."""
        return self._tokenizer.chat_template

    @property
    def eos_text(self) -> str:
        """How a template writes the end of an answer."""
        return self._tokenizer.eos_token or ""

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Without `bos`; names of special tokens in the text are these tokens."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], specs: Sequence[StreamingSpec | None]) -> list[np.ndarray]:
        """The log-probabilities at the place of each token of the answer, for each spec (`None`: full attention).

        Args:
            prompt: at least one token.
            answer: at least one token.
            specs: those with `prefill = stream` read the prompt themselves.

        Returns:
            float32 (tokens of the answer, n_vocab) for each spec.
        """
        tokens = torch.tensor([[*prompt, *answer[:-1]]])
        n_prompt = len(prompt)
        cache, first = None, None
        found = []
        for spec in specs:
            if spec is not None and spec.prefill == "stream":
                with streaming_attention(self.model, spec):
                    logits = self.model(tokens, use_cache=False, logits_to_keep=len(answer)).logits[0]
            else:
                if cache is None:
                    cache = DynamicCache(config=self.model.config)
                    with streaming_attention(self.model, None):
                        first = self.model(tokens[:, :n_prompt], **cache_argument(self.model, cache), logits_to_keep=1).logits[0]
                assert first is not None  # made with the cache
                logits = torch.cat([first, self._decode(tokens[:, n_prompt:], cache, spec, n_prompt)])
            found.append(logits.float().log_softmax(-1).numpy())
        return found

    def _decode(self, tokens: torch.Tensor, cache: DynamicCache, spec: StreamingSpec | None, n_prompt: int) -> torch.Tensor:
        """(tokens, n_vocab) logits; the cache is as it was before."""
        if not tokens.shape[1]:
            return torch.empty(0, self.model.config.get_text_config(decoder=True).vocab_size)
        prompts = None if spec is None else [(0, n_prompt)]
        with streaming_attention(self.model, spec, prompts=prompts):
            logits = self.model(tokens, **cache_argument(self.model, cache)).logits[0]
        cache.crop(-tokens.shape[1])
        return logits
