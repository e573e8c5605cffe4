"""Presets: what they say of a published checkpoint, and when a checkpoint is taken for it."""

from __future__ import annotations

import pytest

from lt_gguf.selection import Model, Request, strategy

NAME = "QwQ-32B-LightTransfer"
# as the issue and the paper's authors list them
LAYERS = (*range(5, 25), 26, 27, 28, 30, 31, 32, 33, 35, 37, 38, 43, 51)
CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 64}


def request(name: str = "a model", n_layer: int = 64, architecture: str = "qwen2", **config) -> Request:
    return Request(Model(architecture, name, n_layer, n_layer, config), sink=4, window=1020)


def test_what_it_says():
    selection = strategy(f"preset:{NAME}").select(request())
    assert selection.layers == LAYERS and len(LAYERS) == 32
    assert (selection.sink, selection.window, selection.prefill) == (129, 1025, "stream")
    assert selection.strategy == f"preset:{NAME}"
    # a prompt is read so even where the user's default is full attention
    assert selection.spec(64, "full").prefill == "stream"


@pytest.mark.parametrize(
    "recognised",
    [
        request(f"someone/{NAME}", **CONFIG),
        request(NAME, **CONFIG),
        request(NAME.lower(), **CONFIG),
        request("QwQ 32B LightTransfer"),  # the name in a GGUF file, with its architecture and no config
        request("model", **CONFIG, _name_or_path=f"some/folder/{NAME}"),
        request("model", **CONFIG, auto_map={"AutoModelForCausalLM": f"someone/{NAME}--modeling.Model"}),
    ],
)
def test_it_is_recognised(recognised):
    assert strategy("preset").select(recognised).strategy == f"preset:{NAME}"


@pytest.mark.parametrize(
    "other",
    [
        request("QwQ-32B", **CONFIG),
        request(f"{NAME}-abliterated", **CONFIG),
        request(f"not-{NAME}", **CONFIG),
        request(NAME, **CONFIG | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        request(NAME, 48, **CONFIG),
        request("model", **CONFIG, _name_or_path=None, auto_map=["x", 3]),
    ],
)
def test_it_is_not_recognised(other):
    with pytest.raises(ValueError, match=f"isn't recognised, must be one of preset:{NAME}"):
        strategy("preset").select(other)


def test_by_name_only_the_number_of_layers_must_be_right():
    assert strategy(f"preset:{NAME}").select(request("something else", architecture="llama")).layers == LAYERS
    with pytest.raises(ValueError, match=f"selection preset:{NAME}: is for 64 layers, a model has 48"):
        strategy(f"preset:{NAME}").select(request(n_layer=48))
