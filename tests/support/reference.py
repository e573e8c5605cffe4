"""Streaming attention written out in numpy for Llama weights: slow, plain, and with nothing that could be evicted.

It keeps every key and value that a conversation ever had, so it also answers for what no transformers model does:
sequences that lost tokens in the middle, or whose positions were shifted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Entry:
    """One token of a conversation: its position now, and per layer its key before RoPE and its value, (n_kv, dim)."""

    pos: int
    token: int
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    def at(self, pos: int) -> Entry:
        return replace(self, pos=pos)


class NumpyLlama:
    """The weights of a `LlamaForCausalLM`, computed with in float64."""

    def __init__(self, model, spec):
        config = model.config
        self.spec = spec
        self.weights = {name: w.detach().numpy().astype(np.float64) for name, w in model.state_dict().items()}
        self.n_layer = config.num_hidden_layers
        self.n_head, self.n_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        self.frequencies = 1.0 / config.rope_parameters["rope_theta"] ** exponents

    def conversation(self) -> Conversation:
        return Conversation(self)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]

    def rope(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """x: (n, heads, head_dim), positions: (n,)."""
        angle = positions[:, None, None] * np.concatenate([self.frequencies] * 2)
        first, second = np.split(x, 2, axis=-1)
        return x * np.cos(angle) + np.concatenate([-second, first], axis=-1) * np.sin(angle)

    def visible(self, layer: int, q: np.ndarray, p: np.ndarray, first: int | None) -> np.ndarray:
        causal = p <= q
        if not self.spec.is_streaming(layer):
            return causal
        recent = q - p < self.spec.window if first is None else p >= first
        return causal & ((p < self.spec.sink) | recent)


class Conversation:
    """One sequence: the entries that are in it, in the order in which they came."""

    def __init__(self, llama: NumpyLlama, entries: Iterable[Entry] = ()):
        self.llama = llama
        self.entries = list(entries)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], first: int | None = None) -> np.ndarray:
        """Adds `tokens` at `positions` and returns their logits, (len(tokens), n_vocab).

        With `first` they belong to a prompt that is read with `prefill = full`: behind the sinks they see all from there.
        """
        m, n = self.llama, len(tokens)
        w = m.weights
        q_pos = np.asarray(list(positions))
        k_pos = np.concatenate([[entry.pos for entry in self.entries], q_pos]).astype(int)
        x = w["model.embed_tokens.weight"][np.asarray(tokens)]
        new_keys, new_values = [], []
        for layer in range(m.n_layer):
            name = f"model.layers.{layer}"
            h = m.norm(x, f"{name}.input_layernorm")
            q, k, v = ((h @ w[f"{name}.self_attn.{part}_proj.weight"].T).reshape(n, -1, m.head_dim) for part in "qkv")
            new_keys.append(k)
            new_values.append(v)
            if self.entries:
                k = np.concatenate([np.stack([entry.keys[layer] for entry in self.entries]), k])
                v = np.concatenate([np.stack([entry.values[layer] for entry in self.entries]), v])
            k = np.repeat(m.rope(k, k_pos), m.n_head // m.n_kv, axis=1)
            v = np.repeat(v, m.n_head // m.n_kv, axis=1)
            scores = m.rope(q, q_pos).transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.sqrt(m.head_dim)  # (heads, queries, keys)
            scores += np.where(m.visible(layer, q_pos[:, None], k_pos[None], first), 0.0, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores @ v.transpose(1, 0, 2) / scores.sum(-1, keepdims=True)).transpose(1, 0, 2)
            x = x + mixed.reshape(n, -1) @ w[f"{name}.self_attn.o_proj.weight"].T
            h = m.norm(x, f"{name}.post_attention_layernorm")
            gate = h @ w[f"{name}.mlp.gate_proj.weight"].T
            up = h @ w[f"{name}.mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.down_proj.weight"].T
        for i, (token, pos) in enumerate(zip(tokens, q_pos)):
            keys, values = tuple(k[i] for k in new_keys), tuple(v[i] for v in new_values)
            self.entries.append(Entry(int(pos), int(token), keys, values))
        return m.norm(x, "model.norm") @ w["lm_head.weight"].T
