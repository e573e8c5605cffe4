"""The model families of the logits oracle: for each a small configuration with random weights.

Small, but in no way degenerate: head_dim is a multiple of 32 so that the KV cache can be quantized, and the weights
are mild (no attention logit beyond a few units) so that f16 noise stays small, yet far from uniform attention, so
that a single wrongly masked key is seen.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

N_VOCAB = 320
N_CTX_TRAIN = 8192


@dataclass(frozen=True)
class Family:
    """One row of the table: `config` is the transformers class, `options` what differs from `COMMON`, `hparams`
    what upstream's converter asks for and transformers 5 no longer writes to config.json, `mlp_gain` the
    size of the MLPs' outputs (ggml's GELU on a CPU is a float16 table, so where it is used the MLPs must be faint)."""

    name: str
    config: str
    options: dict = field(default_factory=dict)
    hparams: dict = field(default_factory=dict)
    mlp_gain: float = 0.8

    def build_config(self, n_layer: int) -> PretrainedConfig:
        options = COMMON | {"num_hidden_layers": n_layer} | self.options
        if callable(layers := options.pop("per_layer", None)):
            options |= layers(n_layer)
        return getattr(transformers, self.config)(**options)

    def build_model(self, n_layer: int = 4) -> PreTrainedModel:
        """A float32 model in eval mode, the same weights in every run."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = transformers.AutoModelForCausalLM.from_config(self.build_config(n_layer), dtype=torch.float32)
        randomize(model, self.mlp_gain)
        return model.eval()


COMMON = dict(
    vocab_size=N_VOCAB,
    hidden_size=128,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=N_CTX_TRAIN,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaConfig"),
        Family("llama-mha", "LlamaConfig", {"num_key_value_heads": 4, "head_dim": 64}),
        Family("mistral", "MistralConfig", {"sliding_window": None}),
        Family("qwen2", "Qwen2Config"),
        Family("qwen3", "Qwen3Config", {"head_dim": 64}),
        Family(
            "qwen2-moe",
            "Qwen2MoeConfig",
            {
                "num_experts": 3,
                "num_experts_per_tok": 3,  # all: with a choice, noise in the cache flips experts and is no longer noise
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 96,
                # transformers builds a sliding mask for this family even where no layer uses it
                "sliding_window": N_CTX_TRAIN,
                "per_layer": lambda n: {"layer_types": ["full_attention"] * n},
            },
        ),
        Family("mixtral", "MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": None}),
        Family("phi3", "Phi3Config", {"sliding_window": None}),
        Family("gemma", "GemmaConfig", {"head_dim": 64, "num_key_value_heads": 1, "tie_word_embeddings": True}, mlp_gain=0.01),
        Family("smollm3", "SmolLM3Config"),  # every fourth layer without RoPE, here and in llama.cpp
        Family("stablelm", "StableLmConfig", {"partial_rotary_factor": 0.25}),
        Family("gpt-neox", "GPTNeoXConfig", {"rotary_pct": 0.25}, hparams={"rotary_pct": 0.25}, mlp_gain=0.01),
    )
}


def randomize(model: PreTrainedModel, mlp_gain: float) -> None:
    """Weights with unit-size activations in every layer and attention logits of about 1.

    Matrices get a standard deviation of 1 / sqrt(fan in), queries and keys a little more; norms and biases get
    values around their neutral ones, so that a converter or runtime that loses one of them is seen.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() >= 2:
                gain = 0.8
                if any(part in name for part in ("q_proj", "k_proj", "qkv")):
                    gain = 1.0
                elif "query_key_value" in name:
                    gain = 1.25
                elif any(part in name for part in ("down_proj", "dense_4h_to_h")):
                    gain = mlp_gain
                parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
            else:
                parameter.normal_(mean=0.0 if "Gemma" in type(model).__name__ else 1.0, std=0.1)
