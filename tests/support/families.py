"""The model families of the logits oracle: for each a small configuration with random weights.

Small, but in no way degenerate: head_dim is a multiple of 32 so that the KV cache can be quantized, and the weights
are mild (no attention logit beyond a few units) so that f16 noise stays small, yet far from uniform attention, so
that a single wrongly masked key is seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
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
    size of the MLPs' outputs (ggml's GELU on a CPU is a float16 table, so where it is used the MLPs must be faint),
    `attention` what computes attention in transformers: not all models can have sdpa."""

    name: str
    config: str
    options: dict = field(default_factory=dict)
    hparams: dict = field(default_factory=dict)
    mlp_gain: float = 0.8
    attention: str = "sdpa"

    def build_config(self, n_layer: int) -> PretrainedConfig:
        options = COMMON | {"num_hidden_layers": n_layer} | self.options
        if self.name in SLIDING_FAMILIES:
            options["sliding_window"] = OWN_WINDOW
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


OWN_WINDOW = 48  # of the layers that have a sliding window of their own


def one_full_in(n: int) -> Callable[[int], dict]:
    """The last layer of each `n` has full attention, the others have a sliding window."""
    return lambda n_layer: {"layer_types": ["sliding_attention" if (il + 1) % n else "full_attention" for il in range(n_layer)]}


def wider_heads_in_full_layers(n_layer: int) -> dict:
    """As in Gemma 4; one layer of four has full attention."""
    types = one_full_in(4)(n_layer)["layer_types"]
    wider = {str(il): {"head_dim": 64} for il, kind in enumerate(types) if kind == "full_attention"}
    return {"layer_types": types, "per_layer_config": wider}


# Layers with a sliding window beside those with full attention: apart, because of these only the latter may stream. With how many
# layers they have two or three of those.
SLIDING_FAMILIES = {
    family.name: (family, n_layer)
    for family, n_layer in (
        (
            Family(
                "gemma3",
                "Gemma3TextConfig",
                {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True, "per_layer": one_full_in(6)},
                mlp_gain=0.01,
            ),
            12,
        ),
        (
            Family(
                "gpt-oss",
                "GptOssConfig",
                {
                    "head_dim": 64,
                    "num_local_experts": 3,
                    "num_experts_per_tok": 3,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                    "per_layer": one_full_in(2),
                },
                attention="eager",  # its heads' learned sinks
            ),
            6,
        ),
        (
            Family(
                "cohere2",  # its full layers have no RoPE
                "Cohere2Config",
                {"logit_scale": 1.0, "tie_word_embeddings": True, "per_layer": one_full_in(4)},
                hparams={"rotary_pct": 1.0},
            ),
            8,
        ),
        (
            Family(
                "gemma2",
                "Gemma2Config",
                {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True, "per_layer": one_full_in(2)},
                mlp_gain=0.01,
                attention="eager",  # its softcap
            ),
            4,
        ),
        (
            Family(
                "gemma4",
                "Gemma4TextConfig",
                {
                    "head_dim": 32,
                    "hidden_size_per_layer_input": 0,
                    "vocab_size_per_layer_input": N_VOCAB,
                    "num_kv_shared_layers": 0,
                    "tie_word_embeddings": True,
                    "per_layer": wider_heads_in_full_layers,
                },
                mlp_gain=0.01,
            ),
            8,
        ),
        (Family("olmo3", "Olmo3Config", {"per_layer": one_full_in(4)}), 8),
    )
}


def randomize(model: PreTrainedModel, mlp_gain: float) -> None:
    """Weights with unit-size activations in every layer and attention logits of about 1.

    Matrices get a standard deviation of 1 / sqrt(fan in), queries and keys a little more; norms and biases get
    values around their neutral ones, so that a converter or runtime that loses one of them is seen.
    """
    is_gemma = "Gemma" in type(model).__name__  # whose norms multiply by 1 + weight
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
            elif is_gemma and "post_feedforward" in name:  # what it norms has just lost its size
                parameter.normal_(mean=mlp_gain - 1, std=0.1 * mlp_gain)
            else:
                parameter.normal_(mean=0.0 if is_gemma else 1.0, std=0.1)
