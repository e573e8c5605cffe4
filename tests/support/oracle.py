"""The logits oracle: what transformers says a hybrid model answers, and how far the runtime is from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support.checkpoints import save_gguf
from support.families import FAMILIES, N_VOCAB, SLIDING_FAMILIES, Family

from lt_gguf.hf.streaming_attention import Prompts, streaming_attention
from lt_gguf.spec import StreamingSpec

if "LT_TEST_DRIVER" in os.environ:  # another processor's code, in another process
    from support.driver import Model
else:
    from support.native import Model

# Largest absolute logit difference with f32 KV and without flash attention. A GPU's float32 may be coarser than a CPU's:
# scripts/checks/backend_tests.sh measures how far the full model is off and gives the bound that follows.
EXACT = float(os.environ.get("LT_TEST_EXACT", 2e-4))
EXACT_RATIO = EXACT / 50 if "LT_TEST_EXACT" in os.environ else 1e-6  # the same for a lazy ratio
RELATIVE = 2.5  # elsewhere: how many times the full model's own error a hybrid's may be


@dataclass
class Subject:
    """One family's random model, in transformers and in the runtime."""

    family: str
    hf: torch.nn.Module
    native: Model
    attention: str = "sdpa"  # what computes it in transformers

    @classmethod
    def build(cls, family: str, n_layer: int, directory: Path) -> Subject:
        if family in SLIDING_FAMILIES:
            return cls.of(*SLIDING_FAMILIES[family], directory)
        return cls.of(FAMILIES[family], n_layer, directory)

    @classmethod
    def of(cls, family: Family, n_layer: int, directory: Path) -> Subject:
        hf = family.build_model(n_layer)
        return cls(family.name, hf, Model(save_gguf(hf, family, directory)), family.attention)

    @property
    def n_layer(self) -> int:
        return self.native.n_layer

    @property
    def may_stream(self) -> list[int]:
        """The layers with full attention."""
        types = getattr(self.hf.config, "layer_types", None) or ["full_attention"] * self.n_layer
        return [il for il, layer_type in enumerate(types) if layer_type == "full_attention"]

    def spec(self, sink: int, window: int, layers=None, seed: int = 0, prefill: str = "stream") -> StreamingSpec:
        """A spec with `layers`, or with random ones of those that may: at least one streams and at least one doesn't."""
        if layers is None:
            random = np.random.default_rng([seed, sink, window])
            n = random.integers(1, len(self.may_stream))
            layers = random.choice(self.may_stream, n, replace=False).tolist()
        return StreamingSpec(tuple(sorted(layers)), self.n_layer, sink, window, prefill)

    def expected(self, tokens: np.ndarray, spec: StreamingSpec | None, prompts: Prompts | None = None) -> np.ndarray:
        """transformers' logits in float32, (len(tokens), n_vocab). `prompts`: which tokens are prompts, for `prefill = full`."""
        if spec is None:
            prompts = None
        with torch.no_grad(), streaming_attention(self.hf, spec, prompts=prompts, implementation=self.attention):
            return self.hf(torch.from_numpy(np.asarray(tokens))[None], use_cache=False).logits[0].numpy()

    def context(self, spec: StreamingSpec | str | None, **settings):
        self.native.set_streaming("off" if spec is None else str(spec))
        try:
            return self.native.context(**settings)
        finally:
            self.native.set_streaming(None)

    def computed(self, tokens: np.ndarray, spec: StreamingSpec | None, n_prompt: int, **settings) -> np.ndarray:
        """The runtime's logits: `n_prompt` tokens as a prompt, then one by one."""
        with self.context(spec, **settings) as context:
            prompt = context.decode(tokens[:n_prompt])
            if n_prompt == len(tokens):
                return prompt
            return np.concatenate([prompt, context.decode_one_by_one(tokens[n_prompt:], n_prompt)])


def random_tokens(n: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference; infinite where a number is missing or not finite."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a.astype(np.float64) - b).max(initial=0))
