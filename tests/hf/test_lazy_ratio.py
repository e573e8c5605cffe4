"""Lazy ratios by log-sum-exp inside transformers, against softmax written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.families import FAMILIES, OWN_WINDOW, SLIDING_FAMILIES, Family
from support.lazy import lazy_ratios
from torch.utils._python_dispatch import TorchDispatchMode

from lt_gguf.hf import lazy_ratio as measured
from lt_gguf.hf.analysis import measure
from lt_gguf.hf.lazy_ratio import Measure, causal_attention, lazy_ratio

N_LAYER = 3
SINK, WINDOW, W_LAST = 3, 20, 8

MLA = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, num_key_value_heads=4)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1, n_group=1)
ALL_FULL = {"per_layer": lambda n: {"layer_types": ["full_attention"] * n}}

MORE = {
    family.name: family
    for family in (
        Family("gemma2", "Gemma2Config", {"head_dim": 32, "attn_logit_softcapping": 2.0} | ALL_FULL, mlp_gain=0.01),
        Family("gpt-oss", "GptOssConfig", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2} | ALL_FULL),
        Family("deepseek-v3", "DeepseekV3Config", MLA | EXPERTS | {"topk_group": 1, "n_shared_experts": 1}),
        Family("qwen3-moe", "Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        Family("glm", "GlmConfig", {"head_dim": 32, "partial_rotary_factor": 0.5}),
        Family("phi", "PhiConfig", {"partial_rotary_factor": 0.5}),
        Family("olmo2", "Olmo2Config"),
        Family("cohere", "CohereConfig", {"use_qk_norm": True}),
        Family("granite", "GraniteConfig", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0}),
        Family("opt", "OPTConfig", {"ffn_dim": 160, "word_embed_proj_dim": 128}),
        Family("gpt2", "GPT2Config", {"n_layer": N_LAYER, "n_head": 4, "n_embd": 128}),
    )
}
ALL = FAMILIES | MORE


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 320, length).tolist() for length in lengths]


@pytest.fixture(scope="module", params=sorted(ALL))
def saved(request, tmp_path_factory):
    """A model with random weights and the folder that it is saved in."""
    model = ALL[request.param].build_model(N_LAYER)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
@pytest.mark.parametrize("family", SLIDING_FAMILIES)
def test_layers_with_a_window_of_their_own_are_run_and_not_measured(family, tmp_path):
    """Also in a prompt that is no longer than it."""
    family, n_layer = SLIDING_FAMILIES[family]
    model = family.build_model(n_layer)
    model.save_pretrained(tmp_path)
    full = [il for il, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    samples = prompts(130, OWN_WINDOW)
    expected = np.array([lazy_ratios(model, np.array(sample), SINK, WINDOW, W_LAST) for sample in samples])
    for layer_by_layer in (True, False):
        settings = dict(sink=SINK, window=WINDOW, w_last=W_LAST, device="cpu", dtype="float32", work_dir=tmp_path / "work")
        found = measure(tmp_path, samples, layer_by_layer=layer_by_layer, **settings)
        assert [np.flatnonzero(~np.isnan(ratios)).tolist() for ratios in found] == [full, full]
        np.testing.assert_allclose(found[:, full], expected[:, full], atol=1e-6)


@pytest.mark.slow
def test_both_ways_equal_plain_softmax(saved, tmp_path):
    model, folder = saved
    samples = prompts(70, 70, 45)
    expected = [lazy_ratios(model, np.array(sample), SINK, WINDOW, W_LAST) for sample in samples]
    options = dict(sink=SINK, window=WINDOW, w_last=W_LAST, device="cpu", dtype="float32")
    by_layer = measure(folder, samples, work_dir=tmp_path, **options)
    whole = measure(folder, samples, layer_by_layer=False, **options)
    assert by_layer.shape == whole.shape == (3, N_LAYER) and by_layer.dtype == whole.dtype == np.float64
    np.testing.assert_allclose(by_layer, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5)
    assert len(set(by_layer.flatten().round(4))) > N_LAYER  # that there is something to tell apart


@pytest.mark.parametrize(
    "sink, window, w_last",
    [(0, 1, 1), (4, 20, 32), (0, 5, 32), (3, 69, 8), (3, 70, 8), (3, 500, 8), (60, 20, 8), (500, 1, 8), (4, 20, 500)],
)
def test_edges_of_the_settings(tmp_path, sink, window, w_last):
    model = FAMILIES["llama"].build_model(2)
    model.save_pretrained(tmp_path)
    options = dict(sink=sink, window=window, w_last=w_last, device="cpu", dtype="float64", layer_by_layer=False)
    got = measure(tmp_path, prompts(70), **options)[0]
    np.testing.assert_allclose(got, lazy_ratios(model, np.array(prompts(70)[0]), sink, window, w_last), rtol=0, atol=1e-7)


def tensors(n_head: int, n_head_kv: int, length: int, size: int, value_size: int, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    shapes = (n_head, size), (n_head_kv, size), (n_head_kv, value_size)
    return [torch.randn(1, heads, length, n, generator=random, dtype=torch.float64).to(dtype) for heads, n in shapes]


def written_out(query, key, value, scale, softcap=None, sink_logits=None):
    """(weights, output) of causal attention, with plain softmax."""
    length, group = key.shape[2], query.shape[1] // key.shape[1]
    logits = query[0] @ key[0].repeat_interleave(group, dim=0).transpose(1, 2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits[:, None, None].expand(-1, length, 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., :length]
    return weights, (weights @ value[0].repeat_interleave(group, dim=0)).transpose(0, 1)[None]


@pytest.mark.parametrize("block_bytes", [1, 5000, 64 << 20])
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -1, 2, 3.0]).double()}])
@pytest.mark.parametrize("n_head_kv, size, value_size", [(4, 8, 8), (2, 8, 8), (1, 12, 8), (2, 8, 12)])
def test_attention_and_ratio_written_out(monkeypatch, n_head_kv, size, value_size, extras, block_bytes):
    monkeypatch.setattr(measured, "BLOCK_BYTES", block_bytes)
    query, key, value = tensors(4, n_head_kv, 37, size, value_size)
    weights, output = written_out(query, key, value, 0.7, **extras)
    got = causal_attention(query, key, value, 0.7, **extras)
    torch.testing.assert_close(got, output, atol=1e-12, rtol=0)
    lazy = (torch.arange(37) < 2) | (torch.arange(37) >= 37 - 9)
    expected = weights[:, -6:, lazy].sum(-1).mean().item()
    assert lazy_ratio(query, key, Measure(2, 9, 6), 0.7, **extras) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block_bytes", [1, 5000, 64 << 20])
@pytest.mark.parametrize("window", [1, 9, 36, 37, 60])
@pytest.mark.parametrize("extras", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -1, 2, 3.0]).double()}])
def test_attention_within_a_window(monkeypatch, window, extras, block_bytes):
    """As if the keys and values before it weren't there."""
    monkeypatch.setattr(measured, "BLOCK_BYTES", block_bytes)
    query, key, value = tensors(4, 2, 37, 8, 12)
    got = causal_attention(query, key, value, 0.7, **extras, window=window)
    for q in range(37):
        first = max(0, q - window + 1)
        _, output = written_out(*(x[:, :, first : q + 1] for x in (query, key, value)), 0.7, **extras)
        torch.testing.assert_close(got[:, q], output[:, -1], atol=1e-12, rtol=0)


def test_half_precision_is_measured_in_single():
    query, key, _ = tensors(4, 2, 300, 32, 32, torch.bfloat16)
    exact = lazy_ratio(query.double(), key.double(), Measure(4, 20, 16), 0.2)
    assert lazy_ratio(query, key, Measure(4, 20, 16), 0.2) == pytest.approx(exact, abs=1e-6)


class Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor has that torch made."""

    n_values = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        output = function(*arguments, **(named or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.n_values = max(self.n_values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_size, extras", [(8, {}), (4, {}), (8, {"softcap": 1.5})])
def test_memory_is_linear_in_the_length(monkeypatch, value_size, extras, dtype):
    monkeypatch.setattr(measured, "BLOCK_BYTES", 1 << 16)
    n = 1500
    query, key, value = tensors(4, 2, n, 8, value_size, dtype)
    with Largest() as largest:
        causal_attention(query, key, value, 0.3, **extras)
        lazy_ratio(query, key, Measure(4, 20, 8), 0.3, **extras)
    assert 0 < largest.n_values <= 4 * 8 * n  # as queries have
