"""Checkpoints that can't be made hybrid are refused before a weight is read, with one line that says why."""

from __future__ import annotations

import json

import pytest
import torch
from support.families import FAMILIES
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from lt_gguf.hf.analysis import check, measure

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(folder, content, weights: bool = True):
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if weights:  # never read
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def refused(folder, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        check(folder)
    assert "\n" not in str(error.value)


def config(family: str, **options) -> dict:
    return AutoConfig.for_model(family, **SHAPE | options).to_dict()


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("mistral", {"sliding_window": 512}, "all layers of this mistral have a sliding window of 512"),
        ("mixtral", {"sliding_window": 512}, "sliding window of 512"),
        ("phi3", {"sliding_window": 512, "pad_token_id": 0}, "sliding window of 512"),
        ("gemma2", {"layer_types": ["sliding_attention"] * 4}, "layer 0 of this gemma2 is a sliding_attention layer"),
        ("gemma3_text", {}, "layer 0 of this gemma3_text is a sliding_attention layer"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, "layer 2.*sliding_attention"),
        ("llama4_text", {}, "layer 0 of this llama4_text is a chunked_attention layer"),
        ("qwen3_next", {}, "layer 0 of this qwen3_next is a linear_attention layer"),
        ("mamba", {}, "layer 0 of this mamba is a linear_attention layer"),
        ("rwkv", {"attention_hidden_size": 64}, "rwkv has recurrent layers"),
        ("jamba", {}, "jamba"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM isn't a causal language model"),
        ("bert", {"architectures": ["BertModel"]}, "BertModel isn't a causal language model"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification isn't a causal"),
        ("t5", {}, "t5 has an encoder and a decoder"),
        ("bart", {"is_encoder_decoder": True}, "bart has an encoder and a decoder"),
        ("clip", {}, "isn't a causal language model"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    ],
)
def test_families_that_cannot_stream(tmp_path, family, options, words):
    content = config(family) | options
    if "layer_types" in content and any(name in options for name in ("use_sliding_window",)):
        content.pop("layer_types")  # so that the config makes them of the options
    refused(write(tmp_path, content), words)


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"architectures": ["LlamaModel"]}),
        ("gpt_neox", {"architectures": ["GPTNeoXForCausalLM"]}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": 262144, "pad_token_id": 0}),  # as Phi-3's files with 128k say: more than any prompt has
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 64}),
        ("llama", {"sliding_window": 64}),  # a key that the family knows nothing of
        ("gemma2", {"layer_types": ["full_attention"] * 4}),
        ("gemma2", {}),  # every second layer, and that in llama.cpp, too
        ("gpt_oss", {}),
    ],
)
def test_full_attention_is_let_through(tmp_path, family, options):
    check(write(tmp_path, config(family) | options))


def test_a_transformers_that_is_too_old(tmp_path, monkeypatch):
    monkeypatch.setattr("lt_gguf.checkpoint.checks.transformers_version", "5.9.1")
    refused(tmp_path, "transformers 5.9.1: is too old to measure lazy ratios, must be 5.16 or later")
    monkeypatch.setattr("lt_gguf.checkpoint.checks.transformers_version", "5.16.0.dev0")
    refused(tmp_path, "has no config.json")


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path / "nothing", "must be a folder with a Hugging Face checkpoint")
    refused(tmp_path, "has no config.json")
    write(tmp_path, config("llama"), weights=False)
    refused(tmp_path, "has no weights, must have model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(tmp_path, "model-1.safetensors: is missing, but model.safetensors.index.json names it")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "isn't an index of weights")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "isn't JSON"),
        ("[]", "can't read the config"),
        ({}, "can't read the config"),
        ({"model_type": "no_such_family"}, "can't read the config of this no_such_family"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "comes with code of its own, which isn't run"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, content, words):
    refused(write(tmp_path, content), words)


def test_a_model_with_an_attention_of_its_own(tmp_path):
    """transformers' Bloom doesn't dispatch: that is seen when the first layer has run."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=320, hidden_size=64, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path)
    settings = dict(sink=0, window=1, w_last=1, device="cpu", work_dir=tmp_path / "work")
    for layer_by_layer in (True, False):
        with pytest.raises(ValueError, match="layer 0 takes no attention from transformers' AttentionInterface"):
            measure(tmp_path, [[5, 6, 7]], layer_by_layer=layer_by_layer, **settings)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"is_causal": False}, "layer 1 .* doesn't attend causally"),
        ({"attention_mask": torch.empty(0)}, "layer 1 .* has a window or a mask of its own"),
        ({"position_bias": torch.zeros(1)}, "layer 1 .* attends in a way of its own"),
    ],
)
def test_attention_that_cannot_be_measured(options, words):
    module = torch.nn.Module()
    module.layer_idx = 1
    tensors = [torch.zeros(1, 2, 5, 4)] * 3
    attention = AttentionInterface()["lazy_ratio"]
    with pytest.raises(ValueError, match=words):
        attention(module, *tensors, **{"attention_mask": None} | options)


@pytest.mark.parametrize("layer_by_layer", [True, False])
def test_a_window_that_the_config_hides_is_seen_when_it_cuts(tmp_path, monkeypatch, layer_by_layer):
    monkeypatch.setattr("lt_gguf.checkpoint.checks._check_layers", lambda *_: None)
    model = FAMILIES["mistral"].build_model(2)
    model.config.sliding_window = 8
    model.save_pretrained(tmp_path)
    settings = dict(sink=1, window=2, w_last=2, device="cpu", layer_by_layer=layer_by_layer, work_dir=tmp_path / "work")
    assert measure(tmp_path, [[5] * 8], **settings).shape == (1, 2)
    with pytest.raises(ValueError, match=r"layer 0 \(MistralAttention\) has a window or a mask of its own"):
        measure(tmp_path, [[5] * 9], **settings)
