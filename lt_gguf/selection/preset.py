"""`preset`: published checkpoints that were trained with streaming attention in certain layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lt_gguf.selection.base import Model, Request, Selection, Strategy
from lt_gguf.spec import parse_layers


@dataclass(frozen=True)
class Checkpoint:
    """What a published checkpoint was trained with.

    Args:
        model_types: `model_type` of its config, or llama.cpp's architecture.
        n_layer: number of its layers.
        layers: that were trained to stream.
        sink: number of first positions that these saw in training.
        window: number of last positions that these saw in training.
        source: where this is said.
    """

    model_types: tuple[str, ...]
    n_layer: int
    layers: str
    sink: int
    window: int
    source: str


# note: its training mask lets a query see key positions 0 to 128 and distances 0 to 1024, hence the odd numbers
PRESETS: Mapping[str, Checkpoint] = {
    "QwQ-32B-LightTransfer": Checkpoint(
        ("qwen2",), 64, "5-24,26-28,30-33,35,37,38,43,51", 129, 1025, "arXiv 2410.13846, Train mode"
    ),
}


class Preset(Strategy):
    """The layers, sinks, window and prefill mode that a published checkpoint was trained with.

    Args:
        preset: a key of `PRESETS`; if not given, the checkpoint is recognised by its config.
    """

    name = "preset"
    counts = False
    instead = "another selection, a larger budget or a smaller context"

    def __init__(self, preset: str | None = None) -> None:
        self.preset = preset
        if preset is not None:
            self.name = f"{Preset.name}:{preset}"

    def choose(self, request: Request) -> Selection:
        name = self.preset or recognise(request.model)
        if name is None:
            names = ", ".join(f"preset:{known}" for known in PRESETS)
            raise ValueError(f"selection preset: {request.model.name} isn't recognised, must be one of {names} by name")
        found = PRESETS[name]
        n_main = request.model.n_layer_main
        if n_main != found.n_layer:
            raise ValueError(f"selection preset:{name}: is for {found.n_layer} layers, {request.model.name} has {n_main}")
        reason = f"the layers that {name} was trained to stream in, with its own sinks and window ({found.source})"
        layers = parse_layers(found.layers, n_main)
        # note: it was trained with streaming attention over the whole text, so its prompts must be read so too
        return Selection(f"{Preset.name}:{name}", layers, reason, found.sink, found.window, prefill="stream")


def recognise(model: Model) -> str | None:
    """The preset of a checkpoint whose config says which one it is, `None` if it doesn't."""
    model_type = str(model.config.get("model_type", model.architecture)).lower()
    architectures = _strings(model.config.get("architectures"))
    said = [model.name, str(model.config.get("_name_or_path", "")), *_strings(model.config.get("auto_map"))]
    for name, known in PRESETS.items():
        is_family = model_type in known.model_types or any(
            architecture.lower().startswith(known.model_types) for architecture in architectures
        )
        # note: a word of its own in a path, so that a model that was made from it (…-abliterated, …-v2) isn't taken for it
        is_named = any(_names(text, name) for text in said)
        if is_family and is_named and model.n_layer_main == known.n_layer:
            return name
    return None


def _names(text: str, preset: str) -> bool:
    """True if a path, an id or a title names the preset as a whole word."""
    # note: upstream's converter writes names with spaces; an id may stand before "--" and a module after it
    return re.search(rf"(?:^|[/\\]|--){re.escape(preset)}(?:$|[/\\]|--)", text.replace(" ", "-"), re.IGNORECASE) is not None


def _strings(value: Any) -> list[str]:
    """The strings of a list or of a dict's values, which a config may or may not have."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [item for item in items if isinstance(item, str)]
