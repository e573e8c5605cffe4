"""The analysis with one layer's weights in memory at a time: same ratios, from any files, and it goes on where it was."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.tiny_checkpoint import write_checkpoint
from transformers import LlamaConfig

from lt_gguf.hf import analysis, analysis_state
from lt_gguf.hf.analysis import choose_dtype, load_tokenizer, measure
from lt_gguf.hf.layer_by_layer import LayerByLayer

N_LAYER = 4
SAMPLES = [np.random.default_rng(seed).integers(3, 320, 50).tolist() for seed in range(3)]
SETTINGS = dict(sink=2, window=10, w_last=8, device="cpu")


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build_model(N_LAYER)


@pytest.fixture
def checkpoint(llama, tmp_path):
    folder = tmp_path / "checkpoint"
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(params=["in memory", "on disk"])
def hidden_states(request, monkeypatch):
    if request.param == "on disk":
        monkeypatch.setattr(analysis_state, "MEMORY_SHARE", 0)


def whole(checkpoint, **settings):
    return measure(checkpoint, SAMPLES, layer_by_layer=False, **SETTINGS | settings)


def by_layer(checkpoint, work, samples=SAMPLES, **settings):
    return measure(checkpoint, samples, work_dir=work, **SETTINGS | settings)


class Loaded:
    """Notes the layers that are loaded; can fail like an interruption in the middle of one."""

    def __init__(self, monkeypatch, interrupt_at: tuple[int, int] | None = None) -> None:
        self.layers, self.runs = [], []
        load, run = LayerByLayer.load, LayerByLayer.run

        def noting_load(model, layer):
            self.layers.append(layer)
            load(model, layer)

        def noting_run(model, layer, hidden):
            self.runs.append(layer)
            if interrupt_at == (layer, self.runs.count(layer) - 1):
                raise KeyboardInterrupt
            return run(model, layer, hidden)

        monkeypatch.setattr(LayerByLayer, "load", noting_load)
        monkeypatch.setattr(LayerByLayer, "run", noting_run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_both_ways_agree(checkpoint, work, dtype, hidden_states):
    ratios = by_layer(checkpoint, work, dtype=dtype)
    np.testing.assert_allclose(ratios, whole(checkpoint, dtype=dtype), rtol=0, atol=1e-6)
    assert ((ratios > 0) & (ratios < 1)).all()


@pytest.mark.parametrize(
    "own, has_bfloat16, chosen",
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", True, torch.float32),
        ("float32", True, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_the_dtype_on_a_cpu(monkeypatch, own, has_bfloat16, chosen):
    monkeypatch.setattr(analysis, "_has_bfloat16", lambda: has_bfloat16)
    config = LlamaConfig(dtype=own)
    assert choose_dtype("auto", config, torch.device("cpu")) == chosen
    assert choose_dtype("auto", config, torch.device("cuda")) == getattr(torch, own or "float32")
    assert choose_dtype("float16", config, torch.device("cpu")) == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("form", ["one file", "sharded", "pytorch", "pytorch sharded", "without prefix"])
def test_all_forms_of_files(tmp_path, work, form, tie):
    model = write_checkpoint(tmp_path / "first", tie_word_embeddings=tie)
    expected = whole(tmp_path / "first")
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    assert ("lm_head.weight" in tensors) != tie
    if form == "without prefix":  # as the base model alone is saved
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if "lm_head" not in name}
    names = sorted(tensors, reverse=True)
    ending = "bin" if "pytorch" in form else "safetensors"
    stem = "pytorch_model" if "pytorch" in form else "model"
    save = torch.save if "pytorch" in form else save_file
    if "sharded" in form:
        weight_map = {name: f"{stem}-{i % 3}-of-3.{ending}" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save(tensors, folder / f"{stem}.{ending}")
    np.testing.assert_allclose(by_layer(folder, work), expected, rtol=0, atol=1e-6)


def test_only_one_layer_has_weights(checkpoint, work, monkeypatch):
    present = []
    run = LayerByLayer.run

    def noting(model, layer, hidden):
        loaded = [name.removeprefix("model.") for name, weight in model._model.named_parameters() if not weight.is_meta]
        names = {name.removeprefix("layers.").split(".")[0] for name in loaded}
        present.append((layer, names))
        return run(model, layer, hidden)

    monkeypatch.setattr(LayerByLayer, "run", noting)
    by_layer(checkpoint, work)
    assert present == [(layer, {str(layer), "norm"}) for layer in range(N_LAYER) for _ in SAMPLES]


@pytest.mark.parametrize("interrupt_at", [(0, 0), (2, 1), (3, 2)])
def test_goes_on_after_an_interruption(checkpoint, work, monkeypatch, hidden_states, interrupt_at):
    monkeypatch.setattr(analysis_state, "SAVE_SECONDS", 0)
    monkeypatch.setattr(analysis_state, "SAVE_SHARE", float("inf"))
    expected = whole(checkpoint)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Loaded(patch, interrupt_at)
        by_layer(checkpoint, work)
    embedded = []
    embed = LayerByLayer.embed
    monkeypatch.setattr(LayerByLayer, "embed", lambda *arguments: embedded.append(1) or embed(*arguments))
    loaded = Loaded(monkeypatch)
    np.testing.assert_allclose(by_layer(checkpoint, work), expected, rtol=0, atol=1e-6)
    assert loaded.layers == list(range(interrupt_at[0], N_LAYER)) and not embedded


def test_states_in_memory_are_not_saved_all_the_time(checkpoint, work, monkeypatch):
    written = []
    write = analysis_state.AnalysisState._write
    monkeypatch.setattr(
        analysis_state.AnalysisState, "_write", lambda state, layer, *rest: written.append(layer) or write(state, layer, *rest)
    )
    by_layer(checkpoint, work)
    assert set(written) == {0}


def test_a_finished_analysis_is_not_done_again_and_leaves_little(checkpoint, work, monkeypatch):
    ratios = by_layer(checkpoint, work)
    assert {path.name for path in work.iterdir()} == {"state.json", "lock"}
    loaded = Loaded(monkeypatch)
    np.testing.assert_array_equal(by_layer(checkpoint, work), ratios)
    assert loaded.layers == []


def test_another_analysis_begins_anew(checkpoint, work, monkeypatch):
    by_layer(checkpoint, work)
    loaded = Loaded(monkeypatch)
    all_layers = list(range(N_LAYER))
    for change in ({"sink": 3}, {"w_last": 5}, {"dtype": "float64"}, {"samples": SAMPLES[:2]}):
        ratios = by_layer(checkpoint, work, **change)
        assert loaded.layers == all_layers and ratios.shape == (len(change.get("samples", SAMPLES)), N_LAYER)
        loaded.layers.clear()
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    by_layer(checkpoint, work, samples=SAMPLES[:2])
    assert loaded.layers == all_layers


def test_the_default_folder_is_in_the_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    by_layer(checkpoint, None)
    (folder,) = (tmp_path / "cache" / "analysis").iterdir()
    assert (folder / "state.json").is_file()


def test_two_at_once_are_refused(checkpoint, work):
    with analysis_state.locked(work), pytest.raises(ValueError, match="another process is at this analysis"):
        by_layer(checkpoint, work)


def test_progress_names_the_layer(checkpoint, work):
    for run in (lambda **more: by_layer(checkpoint, work, **more), lambda **more: whole(checkpoint, **more)):
        steps = []
        run(progress=lambda *step: steps.append(step))
        for layer in range(N_LAYER):
            assert any(f"layer {layer}" in what for what, _, _ in steps)
        done = [done / total for _, done, total in steps]
        assert done == sorted(done) and done[0] == 0 and done[-1] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, words",
    [
        ("model.layers.2.mlp.up_proj.weight", "layer 2: model.layers.2.mlp.up_proj.weight has NaN"),
        ("model.layers.0.input_layernorm.weight", "layer 0: model.layers.0.input_layernorm.weight has NaN"),
        ("model.embed_tokens.weight", "the input embedding: model.embed_tokens.weight has NaN"),
    ],
)
def test_bad_weights_are_named(checkpoint, work, name, words, value):
    row = SAMPLES[1][7] if "embed" in name else -1  # of the embedding only the rows that occur are read
    change(checkpoint, lambda tensors: tensors[name][row].view(-1)[-1:].fill_(value))
    refused(lambda: by_layer(checkpoint, work), words)
    refused(lambda: whole(checkpoint), f"{name} has NaN")


def test_bad_hidden_states_are_named(checkpoint, work):
    change(checkpoint, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    for run in (lambda: by_layer(checkpoint, work), lambda: whole(checkpoint)):
        refused(run, "hidden states that come out of layer 1 have NaN or infinite values")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"), "layer 1.*k_proj.weight is missing"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), "embedding.*embed_tokens.weight is missing"),
        (
            lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2, 3)}),
            r"layer 3.*up_proj.weight has the shape \(2, 3\), must have \(160, 128\)",
        ),
    ],
)
def test_wrong_weights_are_named(checkpoint, work, damage, words):
    change(checkpoint, damage)
    refused(lambda: by_layer(checkpoint, work), words)


def test_a_damaged_file_is_named(checkpoint, work):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: by_layer(checkpoint, work), "model.safetensors: can't be read")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"device": "gpu"}, "device 'gpu': torch doesn't know it"),
        ({"device": "cuda:7"}, "device 'cuda:7': torch finds none"),
        ({"dtype": "int8"}, "dtype 'int8': must be one of auto, float32"),
        ({"w_last": 0}, "w_last = 0"),
        ({"window": 0}, "window = 0"),
        ({"sink": -1}, "sink = -1"),
        ({"samples": []}, "samples: must be one or more"),
        ({"samples": [[1], []]}, "samples: must be one or more"),
        ({"samples": [[1, 320]]}, "sample 0: has the token 320, the model's tokens are 0 to 319"),
    ],
)
def test_settings_out_of_range(checkpoint, work, settings, words):
    refused(lambda: by_layer(checkpoint, work, **settings), words)


def test_the_tokenizer(tmp_path):
    write_checkpoint(tmp_path)
    assert load_tokenizer(tmp_path)[1] == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))
    tokenize, begin = load_tokenizer(tmp_path)
    tokens = tokenize("the quick brown fox")
    assert begin == [1] and 1 not in tokens and len(tokens) > 3
    assert tokenize("the quick") == tokens[: len(tokenize("the quick"))]


def test_a_checkpoint_without_a_tokenizer(checkpoint):
    refused(lambda: load_tokenizer(checkpoint), "has no tokenizer that transformers can read")


def refused(run, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        run()
    assert "\n" not in str(error.value)


def change(checkpoint, how) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    how(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
